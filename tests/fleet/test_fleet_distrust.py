"""What a fleet is told that cannot be, or cannot be done: a clear word or a wait, and nothing is moved wrongly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.testing.fleet import CommandFailed, FleetStage, busy
from migrator.testing.servers import server

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

# What an agent that starts with this on its path does differently.
_WRONG_CLOCK = "import time\n_now = time.time\ntime.time = lambda: _now() + 3600\n"
_LIAR = (
    "import msgspec\n"
    "from migrator.fleet import host_report\n"
    "_told = host_report.HostSurvey._report\n"
    "def lie(self, rows):\n"
    "    host, workloads = _told(self, rows)\n"
    "    return msgspec.structs.replace(host, memory_used=0, cpu_used=0.0), workloads\n"
    "host_report.HostSurvey._report = lie\n"
)


@pytest.fixture(scope="module")
def stage() -> Iterator[FleetStage]:
    with FleetStage("ab", tag="dis", capacity="4,256MiB") as made:
        yield made


@pytest.fixture
def fleet(stage: FleetStage) -> Iterator[FleetStage]:
    stage.new_fleet()
    yield stage
    stage.clear()
    for label in stage.hosts:
        stage.stop_agent(label)


def other_agent(fleet: FleetStage, label: str, folder: Path, code: str) -> None:
    """The host's agent, started anew with this code run before it."""
    (folder / "sitecustomize.py").write_text(code)
    fleet.stop_agent(label)
    root = Path(__file__).resolve().parents[2]
    fleet.start_agent(label, env={"PYTHONPATH": f"{folder}:{root}"})


def test_rules_that_contradict_one_another_are_named_and_what_they_are_about_stays(fleet: FleetStage) -> None:
    for name in ("x", "y"):
        fleet.run("a", name, busy(60))
        fleet.command("rule", name, "--with", "pair", "--apart", "rivals")
    plan = fleet.json("balance", "--dry-run")
    assert plan["moves"] == []
    assert any("must share a host by their affinity" in note and "rivals" in note for note in plan["notes"])
    with pytest.raises(CommandFailed, match="must share a host") as caught:
        fleet.command("drain", "a")
    assert caught.value.code == 17
    assert fleet.where() == {"a": ["x", "y"], "b": []}


def test_a_drain_that_cannot_fit_says_what_stays_and_moves_the_rest(fleet: FleetStage) -> None:
    fleet.run("a", "big", busy(120))
    fleet.run("a", "small", busy(20))
    fleet.run("b", "there", busy(120))
    with pytest.raises(CommandFailed, match="big") as caught:
        fleet.command("drain", "a")
    assert caught.value.code == 17
    assert fleet.where() == {"a": ["big"], "b": ["small", "there"]}


@pytest.mark.parametrize(
    ("code", "says"),
    [(_WRONG_CLOCK, "the clock of host b is 3600 s ahead"), (_LIAR, "host b says that 0 of memory are in use")],
    ids=["clock", "liar"],
)
def test_a_host_that_is_not_believed_is_neither_source_nor_target(
    fleet: FleetStage, tmp_path: Path, code: str, says: str
) -> None:
    fleet.run("a", "w0", busy(60))
    fleet.run("a", "w1", busy(60))
    fleet.run("b", "w2", busy(60))
    other_agent(fleet, "b", tmp_path, code)
    plan = fleet.json("balance", "--dry-run")
    assert plan["moves"] == [] and any(says in note for note in plan["notes"]), plan["notes"]
    with pytest.raises(CommandFailed) as caught:
        fleet.command("drain", "a", "--deadline", "3s")
    assert caught.value.code == 17 and says in caught.value.output
    assert fleet.where() == {"a": ["w0", "w1"], "b": ["w2"]}


def test_a_store_that_is_damaged_or_gone_moves_nothing(fleet: FleetStage) -> None:
    fleet.run("a", "w0", busy(60))
    fleet.run("a", "w1", busy(60))
    path = Path(fleet.store.partition(":")[2])
    log = fleet.lan.folder / "gone.log"
    fleet.command("balance", "--mode", "off")
    controller = fleet.controller(name="gone")
    wait_for(lambda: "gone leads" in log.read_text())
    whole = path.read_bytes()
    path.unlink()
    wait_for(lambda: "nothing is moved" in log.read_text())
    assert controller.poll() is None, "it waits"
    controller.kill()
    controller.wait()
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.write_bytes(whole[:100] + b"\xff" * 4096 + whole[4196:])
    for words in (("hosts",), ("balance", "--now"), ("drain", "a"), ("controller",)):
        with pytest.raises(CommandFailed) as caught:
            fleet.command(*words, timeout=30)
        assert caught.value.code == 12 and "Traceback" not in caught.value.output.split("---")[0], caught.value.output
    path.unlink()
    with pytest.raises(CommandFailed, match="the fleet has no hosts"):  # a new one
        fleet.command("hosts")
    assert fleet.where() == {"a": ["w0", "w1"], "b": []}


def test_the_load_that_prometheus_tells_is_what_is_evened_out(fleet: FleetStage, tmp_path: Path) -> None:
    """A real one, with a real node exporter on host a: all memory of this machine is in use there, as it says."""
    a, client = fleet.hosts["a"], fleet.client
    fleet.stop_agent("a")
    fleet.stop_agent("b")
    for label in "ab":
        fleet.start_agent(label, capacity="64,64GiB")
    fleet.run("a", "w", busy(20))
    fleet.command("balance", "--mode", "off", "--thrift", "0", "--margin", "0", "--imbalance", "0")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n"
        f"- {{job_name: node, static_configs: [{{targets: ['{a.address}:9100']}}]}}\n"
    )
    argv = [
        "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={client.address}:9090",
    ]  # fmt: skip
    exporter = ["prometheus-node-exporter", f"--web.listen-address={a.address}:9100"]
    url = f"http://{client.address}:9090"

    def memory(*more: str) -> float:
        (host,) = (host for host in fleet.json("hosts", *more) if host["name"] == "a")
        return float(host["load"]["memory"])

    with (
        server(exporter, tmp_path / "exporter", 9100, host=a.address, netns=a.namespace),
        server(argv, tmp_path / "prometheus", 9090, host=client.address, netns=client.namespace, seconds=60),
    ):
        by_agent = memory()
        wait_for(lambda: memory("--prometheus", url) > 4 * by_agent)
        said = fleet.command("hosts", "--prometheus", url)
        plan = fleet.json("balance", "--dry-run", "--prometheus", url)
    assert "a" in said
    assert [(move["workload"], move["target"]) for move in plan["moves"]] == [("w", "b")]
    done = client.run(["migrator", "hosts", "--prometheus", url], check=False)
    assert "loads are what the agents say" in done.stderr, "it is gone"


def wait_for(holds: object, *, seconds: float = 60.0) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
