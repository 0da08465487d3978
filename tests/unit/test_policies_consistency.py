"""What a cluster's state must be before anything is planned on it."""

from __future__ import annotations

from math import inf, nan

import msgspec
import pytest
from hypothesis import given, settings
from policies_samples import GIB, SIZE, cluster, clusters, host, workload

from policies.consistency import ClusterError, Trust, contradictions, inspect, validate
from policies.model import Cluster, HostState, Pressure, Resources


@pytest.mark.parametrize(
    ("hosts", "workloads", "sentence"),
    [
        ([host("a"), host("a")], [], "host a is there twice"),
        ([host("a")], [workload("w", "a"), workload("w", "a")], "workload w is there twice"),
        ([host("a")], [workload("w", "b")], "workload w is on host b, which is not known"),
        ([host("a")], [workload("w", "a", moving_to="c")], "workload w is moving to host c, which is not known"),
        ([host("a", capacity=Resources(nan, 1, 1))], [], "host a: capacity of cpu is nan"),
        ([host("a", capacity=Resources(1, inf, 1))], [], "host a: capacity of memory is inf"),
        ([host("a", capacity=Resources(0, 1, 1))], [], "host a: capacity of cpu is 0"),
        ([host("a", other=Resources(1, 1, -1))], [], "host a: other load of network is -1"),
        ([host("a", pressure=Pressure(io=1.5))], [], "host a: io pressure is 1.5"),
        ([host("")], [], "a host's name has 0 characters"),
        ([host("a")], [workload("w", "a", cpu=-1.0)], "workload w: use of cpu is -1"),
        ([host("a")], [workload("w", "a", gib=nan)], "workload w: use of memory is nan"),
        ([host("a")], [workload("w", "a", dirty_rate=inf)], "workload w: dirty rate is inf"),
        ([host("a")], [workload("w", "a", predicted_bytes=-1.0)], "workload w: predicted bytes is -1"),
        ([host("a")], [workload("w", "a", downtime_budget=nan)], "workload w: downtime budget is nan"),
        ([host("a")], [workload("w", "a", last_moved=nan)], "workload w: last moved at nan"),
        ([host("a")], [workload("w" * 300, "a")], "a workload's name has 300 characters"),
        ([host("a")], [workload("w", "a", affinity=tuple("x" * 600))], "workload w has more than 512 labels or groups"),
    ],
)
def test_nonsense_is_an_error_that_names_it(hosts: list, workloads: list, sentence: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ClusterError) as caught:
        validate(cluster(hosts, workloads))
    assert sentence in caught.value.message


def test_every_cause_is_told_but_not_thousands() -> None:
    with pytest.raises(ClusterError) as caught:
        validate(cluster([host("a")], [workload(f"w{number}", "b") for number in range(1000)]))
    assert len(caught.value.reasons) == 1000
    assert caught.value.message.endswith("and 980 more")


@given(clusters())
@settings(max_examples=50, deadline=None)
def test_sensible_clusters_are_valid_and_come_back_from_json(before: Cluster) -> None:
    validate(before)
    assert msgspec.json.decode(msgspec.json.encode(before), type=Cluster) == before


def aside(now: Cluster) -> dict[str, str]:
    return inspect(now, Trust(max_age=60, max_skew=5, tolerance=0.1)).hosts


def with_host(now: Cluster, **more: object) -> Cluster:
    return msgspec.structs.replace(now, hosts=(msgspec.structs.replace(now.hosts[0], **more),))  # type: ignore[arg-type]


def test_an_observation_must_be_fresh_and_of_our_time() -> None:
    now = cluster([host("a")], [workload("w", "a")])
    assert not aside(now)
    assert not aside(with_host(now, observed_at=941.0))
    assert "last observed 61 s ago" in aside(with_host(now, observed_at=939.0))["a"]
    assert not aside(with_host(now, observed_at=1004.0))
    assert "clock of host a is 6 s ahead" in aside(with_host(now, observed_at=1006.0))["a"]


def test_load_must_be_what_its_parts_make() -> None:
    now = cluster([host("a")], [workload("w", "a", 8.0, 32.0)])
    assert not aside(with_host(now, load=Resources(9.5, 34 * GIB)))
    assert (
        "10 of cpu are in use, its workloads and other tasks make 8"
        in aside(with_host(now, load=Resources(10.0, 32 * GIB)))["a"]
    )
    assert "of memory" in aside(with_host(now, load=Resources(8.0, GIB)))["a"]
    assert not aside(with_host(now, load=Resources(10.0, 32 * GIB), other=Resources(2.0, 0)))


def test_load_cannot_be_more_than_there_is() -> None:
    now = cluster([host("a")], [workload("w", "a", 18.0, 1.0)])
    assert f"of {SIZE.cpu:g}" in aside(now)["a"]


def test_a_lost_host_does_not_lie() -> None:
    assert not aside(cluster([host("a", state=HostState.LOST, observed_at=0.0)], []))


def test_rules_that_contradict_each_other_set_their_workloads_aside() -> None:
    together = {"affinity": ("t",)}
    hosts = [host("a"), host("b")]
    both = cluster(hosts, [workload(name, "a", anti_affinity=("x",), **together) for name in ("v", "w")])
    assert contradictions(both)["v"] == "v and w must share a host by their affinity, and must not by anti-affinity x"
    pins = cluster(hosts, [workload("v", "a", pinned=True, **together), workload("w", "b", pinned=True, **together)])
    assert "pinned to a and b" in contradictions(pins)["w"]
    labels = cluster(
        hosts,
        [workload(name, "a", host_labels={"zone": zone}, **together) for name, zone in (("v", "1"), ("w", "2"))],
    )
    assert "cannot have zone=1 and zone=2" in contradictions(labels)["v"]


def test_affinity_joins_through_others() -> None:
    chain = cluster(
        [host("a")],
        [
            workload("u", "a", affinity=("p",), anti_affinity=("x",)),
            workload("v", "a", affinity=("p", "q")),
            workload("w", "a", affinity=("q",), anti_affinity=("x",)),
            workload("free", "a"),
        ],
    )
    assert set(contradictions(chain)) == {"u", "v", "w"}
