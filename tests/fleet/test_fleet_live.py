"""A fleet of real agents: it is seen, evened out, emptied and led by one at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.testing.etcd import EtcdCluster
from migrator.testing.fleet import CommandFailed, FleetStage, busy
from migrator.testing.stage import MIGRATOR
from policies.day import decode

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def agents() -> Iterator[FleetStage]:
    with FleetStage("abc", tag="flt") as stage:
        yield stage


@pytest.fixture
def fleet(agents: FleetStage) -> Iterator[FleetStage]:
    """Three hosts, of a fleet that is new, without a workload."""
    agents.new_fleet()
    yield agents
    agents.clear()


def until(holds: Any, what: str, *, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def names(where: dict[str, list[str]]) -> list[str]:
    return sorted(name for on_host in where.values() for name in on_host)


def test_hosts_and_workloads_are_shown_as_they_are(fleet: FleetStage) -> None:
    fleet.run("a", "busy", busy(60, 0.2))
    fleet.run("b", "idle", busy(20), address="10.77.0.61")
    time.sleep(1)
    hosts = {host["name"]: host for host in fleet.json("hosts")}
    assert {name: host["state"] for name, host in hosts.items()} == {name: "active" for name in "abc"}
    assert hosts["a"]["workloads"] == ["busy"] and hosts["c"]["workloads"] == []
    assert hosts["a"]["capacity"] == {"cpu": 2.0, "memory": float(1 << 30), "network": 0.0}
    assert hosts["a"]["load"]["memory"] > 60 << 20 and hosts["a"]["cpu_features"] and hosts["a"]["kernel"]
    found = {one["name"]: one for one in fleet.json("ps", "--all")}
    assert found["busy"]["host"] == "a" and found["busy"]["used"]["cpu"] > 0.02
    assert found["idle"]["used"]["memory"] > 20 << 20
    text = fleet.command("hosts") + fleet.command("ps", "--all")
    assert "active" in text and "busy" in text


def test_what_is_watched_is_looked_at_again(fleet: FleetStage) -> None:
    watching = fleet.client.popen(
        [*MIGRATOR, "hosts", "--watch", "--json", "--interval", "0.2s"], stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None

    def on_a() -> Any:
        assert watching.stdout is not None
        return next(host for host in json.loads(watching.stdout.readline()) if host["name"] == "a")["workloads"]

    assert on_a() == []
    fleet.run("a", "late", busy(20))
    until(lambda: on_a() == ["late"], "it shows what was")
    watching.send_signal(signal.SIGINT)
    assert watching.wait(20) == 0


def test_a_busy_container_goes_where_there_is_room(fleet: FleetStage) -> None:
    for number, size in enumerate((220, 120, 60)):
        fleet.run("a", f"w{number}", busy(size, 0.1))
    plan = fleet.json("balance", "--dry-run")
    assert plan["moves"] and all(move["reason"] and move["gain"] > 0 for move in plan["moves"])
    assert fleet.json("plans") == []  # nothing was kept, and nothing moved
    assert fleet.where() == {"a": ["w0", "w1", "w2"], "b": [], "c": []}
    fleet.command("balance")
    (kept,) = fleet.json("plans")
    assert kept["state"] == "proposed"
    said = fleet.command("balance", "--apply", kept["id"])
    assert f"plan {kept['id']} is done" in said
    (done,) = fleet.json("plans")
    assert done["state"] == "done" and not done.get("failed")
    assert done["achieved"] < done["plan"]["imbalance"]
    where = fleet.where()
    assert names(where) == ["w0", "w1", "w2"] and len(where["a"]) < 3
    assert {move["workload"]: move["target"] for move in done["plan"]["moves"]} == {
        name: host for host, on_host in where.items() for name in on_host if host != "a"
    }
    with pytest.raises(CommandFailed, match="is done"):
        fleet.command("balance", "--apply", kept["id"])
    with pytest.raises(CommandFailed, match="no plan"):
        fleet.command("balance", "--apply", "nonsense")


def test_a_plan_of_another_moment_is_not_carried_out(fleet: FleetStage) -> None:
    for number in range(2):
        fleet.run("a", f"w{number}", busy(150))
    fleet.command("balance")
    (kept,) = fleet.json("plans")
    for move in kept["plan"]["moves"]:
        fleet.hosts["a"].run(["migrator", "stop", move["workload"]])
    with pytest.raises(CommandFailed, match=r"is stale.*is gone") as caught:
        fleet.command("balance", "--apply", kept["id"])
    assert caught.value.code == 18


def test_a_plan_that_was_rejected_is_not_carried_out(fleet: FleetStage) -> None:
    fleet.run("a", "w0", busy(150))
    fleet.run("a", "w1", busy(150))
    fleet.command("balance")
    (kept,) = fleet.json("plans")
    assert "is rejected" in fleet.command("balance", "--reject", kept["id"])
    for words in (("--reject",), ("--apply",)):
        with pytest.raises(CommandFailed, match="rejected"):
            fleet.command("balance", *words, kept["id"])
    (kept,) = fleet.json("plans")
    assert kept["state"] == "rejected" and "rejected by" in kept["why"]
    assert fleet.where()["a"] == ["w0", "w1"]


def test_nothing_is_moved_outside_of_the_windows_and_no_more_at_once_than_may(fleet: FleetStage) -> None:
    for number in range(3):
        fleet.run("a", f"w{number}", busy(200))
    tomorrow = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[(time.gmtime().tm_wday + 2) % 7]
    fleet.command(
        "balance", "--mode", "automatic", "--every", "1s", "--hold", "1", "--window", f"{tomorrow}/01:00-02:00"
    )
    log = fleet.lan.folder / "windows.log"
    fleet.controller(name="windows")
    until(lambda: leads(fleet, "windows"), "nobody leads")
    plan = fleet.json("balance", "--dry-run")
    assert plan["moves"] == [] and "no window is open" in plan["notes"]
    assert fleet.json("plans") == [], log.read_text()
    fleet.command("balance", "--mode", "automatic", "--window", "00:00-24:00", "--at-once", "1,1")
    until(lambda: fleet.count("a") <= 1, "nothing was moved")
    until(lambda: all(plan["state"] == "done" for plan in fleet.json("plans")), "the plan does not end")
    plans = fleet.json("plans")
    assert [len(plan["plan"]["moves"]) for plan in plans] == [1] * len(plans), "one at once is one in a plan"
    assert names(fleet.where()) == ["w0", "w1", "w2"]


def test_at_the_deadline_force_moves_what_its_downtime_budget_kept(fleet: FleetStage) -> None:
    fleet.run("a", "careful", busy(20))
    fleet.command("rule", "careful", "--max-downtime", "1us")
    fleet.command("drain", "a", "--dry-run")
    with pytest.raises(CommandFailed, match="careful") as caught:
        fleet.command("drain", "a")
    assert caught.value.code == 17 and fleet.where()["a"] == ["careful"]
    done = fleet.json("drain", "a", "--deadline", "2s", "--at-deadline", "force")
    assert done["state"] == "empty" and list(done["moved"]) == ["careful"]
    assert names(fleet.where()) == ["careful"]


def test_a_controller_balances_by_itself_once_it_may(fleet: FleetStage) -> None:
    for number in range(3):
        fleet.run("a", f"w{number}", busy(200))
    fleet.command("balance", "--mode", "automatic", "--every", "1s", "--hold", "2")
    fleet.controller()
    until(lambda: fleet.count("a") <= 1, "nothing was moved")
    until(lambda: all(plan["state"] == "done" for plan in fleet.json("plans")), "the plan does not end")
    after = fleet.where()
    assert names(after) == ["w0", "w1", "w2"]
    time.sleep(4)
    assert fleet.where() == after, "what is even is left alone"


def test_a_drained_host_is_empty_and_gets_back_what_it_had(fleet: FleetStage) -> None:
    for number in range(3):
        fleet.run("a", f"w{number}", busy(40), address=f"10.77.0.{70 + number}")
    done = fleet.json("drain", "a")
    assert done["state"] == "empty" and sorted(done["moved"]) == ["w0", "w1", "w2"] and done["stays"] == {}
    where = fleet.where()
    assert where["a"] == [] and names(where) == ["w0", "w1", "w2"]
    assert {host["name"]: host["state"] for host in fleet.json("hosts")}["a"] == "maintenance"
    plan = fleet.json("balance", "--dry-run")
    assert all(move["target"] != "a" for move in plan["moves"])
    assert fleet.json("drain", "a") == done, "asked for again it is empty still, and knows what it had"
    fleet.command("uncordon", "a", "--bring-back")
    assert fleet.where() == {"a": ["w0", "w1", "w2"], "b": [], "c": []}


def test_what_stays_is_named_with_the_reason(fleet: FleetStage) -> None:
    fleet.run("a", "pinned", busy(20))
    fleet.run("a", "free", busy(20))
    fleet.command("rule", "pinned", "--pin")
    with pytest.raises(CommandFailed, match="pinned is pinned to a") as caught:
        fleet.command("drain", "a")
    assert caught.value.code == 17
    where = fleet.where()
    assert where["a"] == ["pinned"] and names(where) == ["free", "pinned"]
    fleet.command("uncordon", "a")
    assert {host["name"]: host["state"] for host in fleet.json("hosts")}["a"] == "active"


def test_a_drain_in_which_the_leader_is_killed_is_ended_by_another(fleet: FleetStage) -> None:
    for number in range(6):
        fleet.run("a", f"w{number}", busy(60))
    first = fleet.controller("--ttl", "3", name="first")
    until(lambda: leads(fleet, "first"), "nobody leads")
    second = fleet.controller("--ttl", "3", name="second")
    fleet.command("drain", "a", "--parallel", "1", "--detach")
    until(lambda: fleet.count("a") <= 5, "the drain does not begin")
    first.kill()  # between or in the middle of moves: whatever it was
    assert fleet.count("a") > 0, "too late to show anything"
    until(lambda: leads(fleet, "second"), "nobody took the lead")
    done = fleet.json("drain", "a")
    assert done["state"] == "empty"
    where = fleet.where()
    assert where["a"] == [] and names(where) == [f"w{number}" for number in range(6)]
    assert second.poll() is None


def leads(fleet: FleetStage, name: str) -> bool:
    return f"{name} leads" in (fleet.lan.folder / f"{name}.log").read_text()


_ORDER = """
import asyncio, json, sys
from migrator.fleet.agents import peer_of
from migrator.fleet.membership import opened
from migrator.fleet.store import open_store
from migrator.host import Login, new_migration
from migrator.protocol.fleet import Depart, Departed
from pathlib import Path
import os

async def main(token, workload, source, target):
    login = Login(Path(os.environ["MIGRATOR_IDENTITY"]), Path(os.environ["MIGRATOR_KNOWN_HOSTS"]))
    async with opened(os.environ["MIGRATOR_STORE"], login) as fleet:
        await fleet.observer.look()
        agents = fleet.observer.agents
        order = Depart(new_migration(), workload, peer_of(agents[target].host), fleet.state.fleet.id, token)
        async for now in agents[source].depart(order):
            if isinstance(now, Departed):
                print(json.dumps([now.outcome, now.reason]))

asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
"""


def order(fleet: FleetStage, token: int, workload: str, source: str, target: str) -> tuple[str, str]:
    """Have an agent told to move a workload, as a controller with that token would."""
    done = fleet.client.python(_ORDER, str(token), workload, source, target, timeout=300)
    outcome, reason = json.loads(done.stdout)
    return outcome, reason


def test_agents_refuse_a_controller_that_was_deposed(fleet: FleetStage) -> None:
    fleet.run("a", "w", busy(20))
    assert order(fleet, 100, "w", "a", "b")[0] == "migrated"
    # Both have seen 100 now: a as the source, b as the destination.
    outcome, reason = order(fleet, 99, "w", "b", "c")
    assert outcome == "refused" and "was deposed: 100 was seen" in reason
    assert fleet.where() == {"a": [], "b": ["w"], "c": []}
    # c has seen nothing: it lets the old one send something away, but a does not take it.
    fleet.run("c", "v", busy(20))
    outcome, reason = order(fleet, 99, "v", "c", "a")
    assert outcome == "refused" and "was deposed: 100 was seen" in reason
    assert fleet.where() == {"a": [], "b": ["w"], "c": ["v"]}


def test_of_two_controllers_one_moves_and_one_that_slept_does_not_go_on(fleet: FleetStage) -> None:
    for number in range(3):
        fleet.run("a", f"w{number}", busy(30))
    first = fleet.controller("--ttl", "2", name="first")
    until(lambda: leads(fleet, "first"), "nobody leads")
    os.kill(first.pid, signal.SIGSTOP)
    fleet.controller("--ttl", "2", name="second")
    until(lambda: leads(fleet, "second"), "the sleeping one was not replaced")
    fleet.command("drain", "a", "--detach")
    os.kill(first.pid, signal.SIGCONT)  # it believes that it leads, for a moment
    done = fleet.json("drain", "a")
    assert done["state"] == "empty"
    assert names(fleet.where()) == ["w0", "w1", "w2"] and fleet.where()["a"] == []
    until(lambda: "leads no more" in (fleet.lan.folder / "first.log").read_text(), "the first has not noticed")
    assert first.poll() is None, "and waits for its turn"


def test_a_host_that_vanishes_is_lost_and_gets_nothing(fleet: FleetStage) -> None:
    fleet.run("a", "w0", busy(150))
    fleet.run("a", "w1", busy(150))
    fleet.stop_agent("c", kill=True)
    hosts = {host["name"]: host["state"] for host in fleet.json("hosts")}
    assert hosts == {"a": "active", "b": "active", "c": "lost"}
    plan = fleet.json("balance", "--dry-run")
    assert {move["target"] for move in plan["moves"]} == {"b"}
    with pytest.raises(CommandFailed, match="host c is lost"):
        fleet.command("drain", "c")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["drain", "nowhere"], "host 'nowhere' is not of this fleet"),
        (["uncordon", "a"], "a is not cordoned"),
        (["leave", "nowhere"], "its hosts are a, b, c"),
        (["drain", "a", "--at-deadline", "pray"], "stop, force or save"),
        (["drain", "a", "--evacuate", "90s", "--deadline", "1m"], "a deadline of its own"),
        (["balance", "--mode", "sometimes"], "off, recommend or automatic"),
        (["balance", "--dry-run", "--now"], "exclude one another"),
        (["join", "10.77.0.77"], "10.77.0.77"),
        (["hosts", "--interval", "1s"], "--interval is for --watch"),
        (["ps", "--all", "--watch", "--interval", "1ms"], "from 0.1 s to a day"),
        (["balance", "--reject", "nowhere"], "no plan 'nowhere'"),
        (["balance", "--mode", "automatic", "--window", "25:00-26:00"], "no window"),
        (["balance", "--mode", "automatic", "--at-once", "2,8"], "no ALL,HOST"),
        (["balance", "--window", "01:00-02:00"], "together with --mode"),
        (["balance", "--mode", "automatic", "--window", "noon"], "such as 01:00-05:00"),
        (["rule", "w", "--apart", "x", "--with", "x"], "cannot be both"),
        (["simulate", "/etc/passwd"], "a file made by `migrator record`"),
        (["simulate", "/nowhere"], "No such file"),
        (["snapshot", "w", "--every", "1ms"], "1s or more"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(nothing: FleetStage, argv: list[str], says: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        nothing.command(*argv)
    assert says in caught.value.output, caught.value.output
    assert "Traceback" not in caught.value.output.split("---")[0]


@pytest.fixture
def nothing(agents: FleetStage) -> FleetStage:
    """One on which nothing is done."""
    if not agents.store.endswith("/nothing.db"):
        agents.new_fleet("nothing")
    return agents


def test_a_key_without_the_right_sees_and_moves_nothing(nothing: FleetStage) -> None:
    # A host's key may bring workloads, and no more.
    done = nothing.hosts["a"].run(["migrator", "hosts"], env={"MIGRATOR_STORE": nothing.store}, check=False)
    assert "has no right to look at this host" in done.stderr and "active" not in done.stdout


def test_the_deadline_of_a_drain_saves_what_is_left_and_ends_it(fleet: FleetStage) -> None:
    fleet.run("a", "kept", busy(20))
    fleet.command("rule", "kept", "--pin")  # nothing can move it, so it is there at the deadline
    done = fleet.json("drain", "a", "--deadline", "4s", "--at-deadline", "save")
    assert done["state"] == "empty" and done["ended"] == ["kept"]
    assert fleet.where()["a"] == []
    (image,) = (fleet.lan.folder / "saved").glob("kept@*.image")
    info = json.loads(fleet.hosts["b"].run(["migrator", "image", "info", "--json", str(image)]).stdout)
    assert info["whole"] is True
    image.unlink()


def test_a_dying_host_sends_the_most_valuable_first(fleet: FleetStage) -> None:
    for number in range(3):
        fleet.run("a", f"w{number}", busy(40))
    fleet.command("rule", "w2", "--value", "9")
    done = fleet.json("drain", "a", "--evacuate", "60s", "--parallel", "1")
    assert done["state"] == "empty"
    assert next(iter(done["moved"])) == "w2" or first_moved(fleet) == "w2"


def first_moved(fleet: FleetStage) -> str:
    log = "".join(fleet.agent_log("a"))
    return min(("w0", "w1", "w2"), key=lambda name: log.rindex(f"{name} goes to"))


def test_a_leader_dies_with_the_state_in_etcd_and_a_member_of_it_with_him(
    agents: FleetStage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with agents.client.inside(), EtcdCluster(tmp_path_factory.mktemp("etcd"), members=3) as cluster:
        agents.use_store(cluster.url)
        try:
            for number in range(4):
                agents.run("a", f"w{number}", busy(60))
            first = agents.controller("--ttl", "3", name="first")
            until(lambda: leads(agents, "first"), "nobody leads")
            agents.controller("--ttl", "3", name="second")
            agents.command("drain", "a", "--parallel", "1", "--detach")
            until(lambda: agents.count("a") <= 3, "the drain does not begin")
            cluster.kill(cluster.leader())
            first.kill()
            until(lambda: leads(agents, "second"), "nobody took the lead")
            done = agents.json("drain", "a")
            assert done["state"] == "empty"
            where = agents.where()
            assert where["a"] == [] and names(where) == ["w0", "w1", "w2", "w3"]
        finally:
            agents.clear()
            agents.new_fleet()


def test_a_day_is_recorded_and_replayed(fleet: FleetStage, tmp_path: Path) -> None:
    fleet.run("a", "w0", busy(60, 0.1))
    fleet.run("a", "w1", busy(60))
    path = tmp_path / "day.json"
    fleet.command("record", str(path), "--for", "3s", "--every", "1s")
    with pytest.raises(CommandFailed, match="is there already"):
        fleet.command("record", str(path), "--for", "3s", "--every", "1s")
    cut = tmp_path / "cut.json"
    long = fleet.client.popen([*MIGRATOR, "record", str(cut), "--for", "1h", "--every", "1s"], stderr=subprocess.PIPE)
    assert long.stderr is not None and b"recording for" in long.stderr.readline()
    long.send_signal(signal.SIGINT)
    assert long.wait(60) == 0 and decode(cut.read_bytes()).recorded
    long.stderr.close()
    found = fleet.json("simulate", str(path))
    assert (found["hosts"], found["workloads"]) == (3, 2)
    assert {run["rule"] for run in found["others"]} and len(found["nothing"]["imbalance"]) == 3


def test_what_was_saved_on_a_schedule_is_gone_back_to(fleet: FleetStage) -> None:
    fleet.run("a", "diary", busy(20))
    fleet.command("snapshot", "diary", "--every", "1s", "--keep", "2", "--whole-every", "1")
    fleet.controller()
    until(lambda: len(saved(fleet)) == 2, "nothing is saved")
    listed = fleet.json("snapshots")
    (schedule,) = listed["schedules"]
    assert all(image["workload"] == "diary" and image["hosts"] == ["a", "b", "c"] for image in listed["images"])
    oldest = saved(fleet)[-1]
    until(lambda: oldest not in saved(fleet), "old ones stay")
    assert len(saved(fleet)) == 2 and schedule["keep"] == 2
    fleet.command("snapshot", "diary", "--stop")
    with pytest.raises(CommandFailed, match="diary runs on a"):
        fleet.command("revive", saved(fleet)[0])
    fleet.hosts["a"].run(["migrator", "stop", "diary"])
    fleet.command("revive", saved(fleet)[0], "--on", "c")
    assert fleet.where() == {"a": [], "b": [], "c": ["diary"]}
    clear_saved(fleet)


def test_increments_cost_what_is_new_and_any_of_them_is_gone_back_to_on_any_host(fleet: FleetStage) -> None:
    fleet.run("a", "diary", busy(20))
    for _ in range(4):
        fleet.command("snapshot", "diary", "--keep", "2", "--whole-every", "3")
    images = fleet.json("snapshots")["images"]
    # Two are kept, the newer of which begins anew, and what the older one builds on.
    assert ["base" in image for image in images] == [False, True, True, False]
    assert images[1]["base"] == images[2]["base"] == images[3]["image"]
    assert max(image["bytes"] for image in images[1:3]) < images[3]["bytes"] / 4
    assert images[1]["image"] in fleet.command("snapshots", "diary")
    fleet.hosts["a"].run(["migrator", "stop", "diary"])
    fleet.command("revive", images[1]["image"], "--on", "b")
    assert fleet.where() == {"a": [], "b": ["diary"], "c": []}
    fleet.hosts["b"].run(["migrator", "stop", "diary"])
    fleet.hosts["c"].run([*MIGRATOR, "restart", "-d", "-i", str(fleet.lan.folder / "saved" / images[2]["image"])])
    assert fleet.where() == {"a": [], "b": [], "c": ["diary"]}
    clear_saved(fleet)


def test_a_lost_host_is_recovered_only_when_somebody_says_that_it_is_off(fleet: FleetStage) -> None:
    fleet.run("a", "wanted", busy(20))
    fleet.run("a", "other", busy(20))
    fleet.command("snapshot", "wanted", "--every", "1s", "--whole-every", "1", "--restart-when-lost")
    controller = fleet.controller()
    until(lambda: len(saved(fleet)) >= 1, "nothing is saved")
    with pytest.raises(CommandFailed, match="a answers: it is not off"):
        fleet.command("recover", "a", "--is-off")
    controller.kill()
    until(lambda: any(one.get("host") for one in fleet.json("snapshots")["schedules"]), "its host is not known")
    fleet.stop_agent("a", kill=True)
    fleet.hosts["a"].end_containers()
    with pytest.raises(CommandFailed, match="is a off"):
        fleet.command("recover", "a")
    with pytest.raises(CommandFailed, match="a do not answer, and wanted may run there"):
        fleet.command("revive", saved(fleet)[0])
    assert "wanted runs on" in fleet.command("recover", "a", "--is-off")
    fleet.start_agent("a")
    where = fleet.where()
    assert names(where) == ["wanted"] and where["a"] == []
    assert {host["name"]: host["state"] for host in fleet.json("hosts")}["a"] == "maintenance"
    clear_saved(fleet)


def test_a_lost_host_is_recovered_by_the_controller_once_a_program_has_turned_it_off(
    fleet: FleetStage, tmp_path: Path
) -> None:
    fleet.run("a", "wanted", busy(20))
    fleet.run("a", "other", busy(20))
    fleet.command("snapshot", "wanted", "--every", "1s", "--restart-when-lost")
    controller = fleet.controller("--ttl", "2")
    until(lambda: any(one.get("host") for one in fleet.json("snapshots")["schedules"]), "nothing is saved")
    controller.kill()
    fleet.stop_agent("a", kill=True)  # what it had runs on: nobody else must run it
    host, program = fleet.hosts["a"], tmp_path / "turn-off"
    settings = " ".join(f"{name}={value}" for name, value in host.env.items() if name.startswith("MIGRATOR_"))
    program.write_text(
        f"#!/bin/sh\necho $1 $2 >> {tmp_path}/asked\n[ -e {tmp_path}/works ] || {{ echo no power; exit 3; }}\n"
        f"{settings} exec nsenter --net={host.netns_path} {sys.executable} {tmp_path}/end.py\n"
    )
    (tmp_path / "end.py").write_text(
        "from migrator.container import list_containers, stop\n"
        "for container in list_containers():\n    stop(container.name, timeout=0.2)\n"
    )
    program.chmod(0o777)
    with pytest.raises(CommandFailed, match="others may write"):
        fleet.command("controller", "--fence-with", str(program))
    program.chmod(0o755)
    first = fleet.controller("--fence-with", str(program), "--fence-after", "1s", "--ttl", "2", name="no-power")
    log = fleet.lan.folder / "no-power.log"
    until(lambda: "no power" in log.read_text(), "it does not try")
    assert fleet.where()["a"] == ["other", "wanted"] and fleet.where()["b"] == fleet.where()["c"] == []
    assert (tmp_path / "asked").read_text() == f"a {host.address}\n"
    first.kill()
    (tmp_path / "works").touch()
    fleet.controller("--fence-with", str(program), "--fence-after", "1s", "--ttl", "2", name="power")
    until(lambda: names(fleet.where()) == ["wanted"] and not fleet.where()["a"], "it is not restarted")
    fleet.start_agent("a")
    assert {host["name"]: host["state"] for host in fleet.json("hosts")}["a"] == "maintenance"
    fleet.command("snapshot", "wanted", "--stop")
    clear_saved(fleet)


def saved(fleet: FleetStage) -> list[str]:
    """The newest first."""
    return sorted((image.name for image in (fleet.lan.folder / "saved").glob("*.image")), reverse=True)


def clear_saved(fleet: FleetStage) -> None:
    for image in (fleet.lan.folder / "saved").glob("*@*"):
        image.unlink()
