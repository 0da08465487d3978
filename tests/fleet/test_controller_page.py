"""The page of a controller: what it says, what it lets nobody do, and how it is in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from migrator.fleet import records as r
from migrator.fleet.agents import Observation
from migrator.fleet.cluster import Known, build
from migrator.fleet.controller import Controller
from migrator.fleet.membership import Fleet
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState
from migrator.fleet.store import open_store
from migrator.fleet.web import serve_page
from migrator.host import Login
from migrator.protocol.fleet import HostReport, WorkloadReport
from migrator.testing.browser import Browser
from policies import plan
from policies.cost import Cost

TOKEN = "0123456789abcdef"
HOSTILE = "<img src=x onerror=alert(1)>"


def host(name: str) -> r.Host:
    return r.Host(name=name, address=f"10.0.0.{ord(name) - 96}", cpus=4, memory_bytes=1 << 30, registered_at=1.0)


def observation(name: str, *workloads: str) -> Observation:
    report = HostReport(
        name=name,
        boot_id="x",
        at=time.time(),
        kernel="6.18",
        engine="user",
        cpus=4.0,
        memory=1 << 30,
        cpu_used=1.0 * len(workloads),
        memory_used=200 << 20,
    )
    running = tuple(
        WorkloadReport(name=one, state="running", cpu=1.0, memory=(200 << 20) // len(workloads)) for one in workloads
    )
    return Observation(report, running, time.time(), time.monotonic())


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    """One that has seen three hosts, with a plan, a drain and a move; it runs nothing."""
    store = await open_store(f"sqlite:{tmp_path}/fleet.db")
    state = await FleetState.open(store)
    observer = Observer(state, Login())
    made = Controller(Fleet(state, observer, Login()), name="controller-1")
    for name in "abc":
        await state.register(host(name))
    observer.known = Known({name: host(name) for name in "abc"})
    observer.observations = {"a": observation("a", "shop", "cache"), "b": observation("b", "db")}
    observer.errors = {"c": HOSTILE}
    observer.seen = build(time.time(), observer.known, observer.observations)
    cost = Cost(1e6, 2.0, 0.02, 0.1)
    move = plan.Move(
        workload="shop", source="a", target="b", cause=plan.Cause.BALANCE, reason=HOSTILE, gain=0.1, cost=cost
    )
    proposed = plan.make(observer.seen.cluster, [move], imbalance=0.2, predicted=0.1)
    for number, name in enumerate(("x" * 63, "shop")):
        ended = r.Move(workload=name, source="a", destination="b", migration=f"{number:032x}", token=1, started_at=1.0)
        why = "the network was slow, and what was to be sent never got less; " * 4
        await state.history.put(
            str(number), r.FinishedMove(move=ended, outcome=r.Outcome.ABORTED, ended_at=2.0, why=why)
        )
    await state.plans.put("p1", r.Plan(id="p1", state=r.PlanState.PROPOSED, plan=proposed))
    yield made
    await store.close()


@pytest.fixture
async def url(controller: Controller) -> AsyncIterator[str]:
    async with serve_page(controller, "127.0.0.1:0") as found:
        yield found


@pytest.fixture
async def acting_url(controller: Controller) -> AsyncIterator[str]:
    async with serve_page(controller, "127.0.0.1:0", token=TOKEN) as found:
        yield found


@pytest.fixture
async def web() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_the_state_is_what_the_controller_has_seen(url: str, web: aiohttp.ClientSession) -> None:
    async with web.get(f"{url}api/state") as answer:
        state = await answer.json()
    assert {one["name"]: one["state"] for one in state["hosts"]} == {"a": "active", "b": "active", "c": "lost"}
    assert [one["name"] for one in state["workloads"]] == ["shop", "cache", "db"]
    assert state["leads"] is False and state["may_act"] is False
    (shown,) = state["plans"]
    assert shown["state"] == "proposed" and shown["moves"][0]["target"] == "b"


@pytest.mark.parametrize("path", ["", "page.css", "page.js", "api/state", "nowhere"])
async def test_every_answer_forbids_what_the_page_does_not_need(
    url: str, web: aiohttp.ClientSession, path: str
) -> None:
    async with web.get(url + path) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.status == (404 if path == "nowhere" else 200)


@pytest.mark.parametrize("sent", ["", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"])
@pytest.mark.parametrize("path", ["drain", "uncordon", "apply"])
async def test_nobody_acts_without_the_token(
    controller: Controller, acting_url: str, web: aiohttp.ClientSession, path: str, sent: str
) -> None:
    headers = {"Authorization": sent} if sent else {}
    async with web.post(f"{acting_url}api/{path}", json={"host": "a"}, headers=headers) as answer:
        assert answer.status == 403
    assert await controller.state.cordons.all() == {}


@pytest.mark.parametrize("sent", ["Bearer ", "Bearer x", ""])
async def test_without_a_token_nobody_acts_at_all(url: str, web: aiohttp.ClientSession, sent: str) -> None:
    async with web.post(f"{url}api/drain", json={"host": "a"}, headers={"Authorization": sent}) as answer:
        assert answer.status == 403


async def test_with_the_token_a_host_is_drained_and_a_plan_applied(
    controller: Controller, acting_url: str, web: aiohttp.ClientSession
) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with web.post(f"{acting_url}api/drain", json={"host": "a"}, headers=headers) as answer:
        assert answer.status == 200
    stored = await controller.state.cordons.get("a")
    assert stored is not None and stored.record.drain is not None
    assert stored.record.drain.record.wanted == ("shop", "cache")
    async with web.post(f"{acting_url}api/uncordon", json={"host": "a"}, headers=headers) as answer:
        assert answer.status == 200
    assert await controller.state.cordons.get("a") is None
    async with web.post(f"{acting_url}api/apply", json={"plan": "p1"}, headers=headers) as answer:
        assert answer.status == 200
    approved = await controller.state.plans.get("p1")
    assert approved is not None and approved.record.state is r.PlanState.APPROVED


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("drain", b"", "no request"),
        ("drain", b"[]", "no request"),
        ("drain", b'{"host": "../a"}', "no request"),
        ("drain", b'{"host": "a", "force": true}', "no request"),
        ("drain", b'{"host": "x"}', "host x is not known"),
        ("drain", b'{"host": "c"}', "host c is lost"),
        ("uncordon", b'{"host": "a"}', "a is not cordoned"),
        ("apply", b'{"plan": "p9"}', "there is no plan"),
        ("drain", b'"' + b"x" * 5000 + b'"', ""),
    ],
)
async def test_what_makes_no_sense_is_refused_with_the_reason(
    acting_url: str, web: aiohttp.ClientSession, path: str, body: bytes, says: str
) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with web.post(f"{acting_url}api/{path}", data=body, headers=headers) as answer:
        assert answer.status in (400, 413, 503)
        assert says in (await answer.json())["error"]


# ------------------------------------------------------------------ in a browser


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    async with Browser(tmp_path / "browser") as made:
        yield made


PICTURES = os.environ.get("MIGRATOR_TEST_PICTURES", "")


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("dark", "width"), list(itertools.product((False, True), (1280, 390))))
async def test_it_is_read_in_light_and_dark_on_a_desk_and_on_a_phone(
    url: str, browser: Browser, dark: bool, width: int
) -> None:
    await browser.look(dark=dark, width=width)
    await browser.open(url)
    await browser.until("document.querySelectorAll('#hosts tbody tr').length == 3")
    assert await browser.value("document.documentElement.scrollWidth <= window.innerWidth"), "it must not be wider"
    whole = "[...document.querySelectorAll('#history .state')].every((one) => one.getClientRects().length == 1)"
    assert await browser.value(whole), "beside a long note a word keeps whole"
    hidden = "getComputedStyle(document.querySelector('#unlock')).display == 'none'"
    assert await browser.value(hidden), "there is no token here"
    ink, paper = [
        tuple(map(int, re.findall(r"\d+", await browser.value(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    ]
    assert contrast(ink, paper) >= 7
    for kind in ("active", "lost", "proposed"):
        of_state = f"getComputedStyle(document.querySelector('.state.{kind}')).color"
        shown = tuple(map(int, re.findall(r"\d+", await browser.value(of_state))[:3]))
        assert contrast(shown, paper) >= 4.5, kind
    assert (sum(paper) < 200) is dark
    if PICTURES:
        await browser.picture(Path(PICTURES) / f"page-{'dark' if dark else 'light'}-{width}.png")
    assert browser.errors == []


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """As WCAG has it."""

    def luminance(colour: tuple[int, ...]) -> float:
        parts = [value / 255 for value in colour]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.timeout(200)
async def test_texts_of_others_are_shown_and_never_obeyed(url: str, browser: Browser) -> None:
    await browser.open(url)
    await browser.until("document.querySelectorAll('#plans details').length == 1")
    assert await browser.value("document.querySelectorAll('img').length") == 0
    assert HOSTILE in await browser.value("document.querySelector('#plans details').textContent")
    assert HOSTILE in await browser.value("document.querySelector('#notes').textContent")
    assert browser.errors == []


@pytest.mark.timeout(200)
async def test_all_of_it_is_reached_by_keyboard(controller: Controller, acting_url: str, browser: Browser) -> None:
    await browser.open(acting_url)
    await browser.until("document.querySelectorAll('#hosts tbody tr').length == 3")
    assert await browser.value("document.querySelectorAll('button[aria-label^=Drain]').length") == 0
    await reach(browser, "token")
    await browser.write(TOKEN)
    await browser.press("Enter")
    await browser.until("document.querySelectorAll('button[aria-label^=Drain]').length == 2")
    await browser.value("window.confirm = () => true")
    await reach(browser, "Drain b")
    await browser.press("Enter")
    with_drain = controller.state.cordons
    for _ in range(100):
        if await with_drain.get("b") is not None:
            break
        await browser.until("true")
    assert await with_drain.get("b") is not None
    await browser.until("document.querySelectorAll('#drains tbody tr').length == 1")
    assert browser.errors == []


@pytest.mark.timeout(200)
async def test_a_wrong_token_is_told_and_asked_for_again(acting_url: str, browser: Browser) -> None:
    await browser.open(acting_url)
    await browser.until("document.querySelectorAll('#hosts tbody tr').length == 3")
    await browser.value("window.confirm = () => true")
    await browser.value("document.querySelector('#token').value = 'no token of this controller'")
    await browser.value("document.querySelector('#unlock').requestSubmit()")
    await browser.until("document.querySelector('#unlock').hidden")
    await browser.value("document.querySelector('button[aria-label=\"Drain b\"]').click()")
    await browser.until("document.querySelector('#error').textContent.includes('the token is missing or wrong')")
    await browser.until("!document.querySelector('#unlock').hidden")
    assert await browser.value("document.querySelectorAll('button[aria-label^=Drain]').length") == 0
    await browser.value("(async () => { for (let n = 0; n < 2; n++) { shown = ''; await refresh(); } })()")
    assert await browser.value("!document.querySelector('#error').hidden"), "what was asked for still was not done"


async def reach(browser: Browser, name: str) -> None:
    """Press Tab until it has the focus, and that can be seen."""
    for _ in range(40):
        await browser.press("Tab")
        focused = await browser.value(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.id || ''"
        )
        if focused == name:
            assert await browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    raise AssertionError(f"{name} is not reached by Tab")


@pytest.mark.timeout(200)
async def test_it_says_when_the_controller_is_gone_and_shows_what_was(controller: Controller, browser: Browser) -> None:
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve_page(controller, "127.0.0.1:0"))
        await browser.open(url)
        await browser.until("document.querySelectorAll('#hosts tbody tr').length == 3")
    await browser.until("!document.querySelector('#error').hidden")
    assert "as it was" in await browser.value("document.querySelector('#error').textContent")
    assert await browser.value("document.querySelectorAll('#hosts tbody tr').length") == 3


async def test_a_crowd_of_silent_connections_keeps_nobody_out(url: str) -> None:
    host, port = re.fullmatch(r"http://(.+):(\d+)/", url).groups()  # type: ignore[union-attr]
    crowd = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    try:
        ended = [reader for reader, _ in crowd[: 200 - 64]]
        for reader in ended:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(1), 30) == b""
        async with aiohttp.ClientSession() as session, session.get(f"{url}api/state") as answer:
            assert answer.status == 200
        assert not crowd[-1][0].at_eof()
    finally:
        for _, writer in crowd:
            writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"Authorization: Bearer \xff\xfe",
        b"Authorization: Bearer " + TOKEN.encode() + b"\xed\xb2\x80",
        b"Authorization: " + b"x" * 9000,
        b"Authorization: basic " + TOKEN.encode(),
        b"Content-Length: 99999999999999999999",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3",
        b"Host: \0",
    ],
)
async def test_no_request_is_a_failure_of_the_controller(
    acting_url: str, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = re.fullmatch(r"http://(.+):(\d+)/", acting_url).groups()  # type: ignore[union-attr]
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /api/drain HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + sent + b"\r\n\r\n")
    line = await asyncio.wait_for(reader.readline(), 30)
    assert re.match(rb"HTTP/1.[01] 4\d\d ", line), line
    assert not [one for one in caplog.records if "Traceback" in (one.exc_text or "")]
    writer.close()
