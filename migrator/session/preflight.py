"""Can this workload live there? A pure comparison of facts, and what collects them.

Each reason names an object, what is wrong with it and what to do. What would differ silently after the move
blocks; what is only worth knowing is a warning. The destination compares, because the files are there
(`migrator.session.file_facts`).
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from migrator.engine.base import Capability, FileFact
from migrator.linux import confinement, vdso
from migrator.protocol.messages import HostFacts, Propose, Reason, text
from migrator.text import size

# Flags of /proc/cpuinfo that tell what user space may execute (arch/x86/include/asm/cpufeatures.h). The
# others are about the kernel's own workings, or mitigations, and differ between equal processors.
_INSTRUCTIONS = frozenset(
    """
    fpu cx8 cmov mmx fxsr sse sse2 pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c
    rdrand lahf_lm abm 3dnowprefetch sse4a misalignsse xop fma4 tbm fsgsbase bmi1 avx2 bmi2 erms rtm avx512f
    avx512dq rdseed adx avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl xsaveopt xsavec xgetbv1
    avx_vnni avx512_bf16 avx512vbmi pku ospke avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg
    avx512_vpopcntdq rdpid cldemote movdiri movdir64b fsrm avx512_vp2intersect serialize tsxldtrk amx_bf16
    avx512_fp16 amx_tile amx_int8 waitpkg rdtscp
    """.split()  # noqa: SIM905 (a list of 70 strings is no easier to read)
)
_MOST_NOTES = 50
_MEMORY_SLACK = 64 << 20  # bytes that a host needs besides the workload


class PreflightReport(msgspec.Struct, frozen=True):
    """The outcome of a preflight, as `migrator check` shows it.

    predicted_downtime: seconds, before anything was measured on the link
    """

    migration: str
    source: HostFacts
    destination: HostFacts
    reasons: list[Reason]
    files: int
    rss_bytes: int
    predicted_downtime: float

    @property
    def ok(self) -> bool:
        return not any(reason.blocking for reason in self.reasons)


def compare(
    proposal: Propose,
    here: HostFacts,
    files: Mapping[str, FileFact | None],
    taken_pids: Collection[int] = (),
    log: str = "",
) -> tuple[list[Reason], list[str]]:
    """(reasons, paths of files to be sent). `files` has what this host has under each path asked for.
    `log` is that of the container, which is sent in any case."""
    reasons = _hosts(proposal, here)
    for pid in sorted(taken_pids):
        reasons.append(
            Reason(
                f"pid {pid}",
                f"is taken on {here.host}",
                "end that process, or move the workload as a container, which has pids of its own",
            )
        )
    wanted: list[str] = []
    named: list[tuple[str, str]] = []  # directories and FIFOs
    for fact in (told.value() for told in proposal.survey.files):
        problem = file_problem(fact, files.get(fact.path))
        if problem and not stat.S_ISREG(fact.mode):
            named.append((fact.path, problem))
        elif problem and (proposal.copy_files or fact.path == log):
            wanted.append(fact.path)
        elif problem:
            remedy = "install the same version there, or use --copy-files"
            reasons.append(Reason(fact.path, f"{problem} on {here.host}", remedy))
    carried = [*wanted, *(f"{tree.path}/" for tree in proposal.trees if proposal.copy_files)]
    for path, problem in named:
        if not any(one.startswith(f"{path}/") or f"{path}/".startswith(one) for one in carried):
            reasons.append(Reason(path, f"{problem} on {here.host}", "make it there, or use --copy-path"))
    reasons += [Reason(text(about), text(note), "", False) for about, note in proposal.survey.notes[:_MOST_NOTES]]
    return reasons, wanted


def _hosts(proposal: Propose, here: HostFacts) -> list[Reason]:
    there, reasons = proposal.source, []
    who = here.host
    if there.machine != here.machine:
        reasons.append(Reason(who, f"is a {here.machine} machine, {there.host} is {there.machine}"))
        return reasons
    lacking = sorted((proposal.survey.cpu_features & _INSTRUCTIONS) - here.cpu_features)
    if lacking:
        reasons.append(
            Reason(
                f"processor of {who}",
                f"lacks {', '.join(lacking)}, which the workload may have found and use",
                "choose a host with the same or a newer processor",
            )
        )
    if proposal.survey.xstate_size != here.xstate_size and here.xstate_size:
        reasons.append(
            Reason(
                f"processor of {who}",
                f"has {here.xstate_size} bytes of extended state, {there.host} has "
                f"{proposal.survey.xstate_size}: registers cannot be carried over",
                "choose a host of the same processor model and kernel",
            )
        )
    if there.engine != here.engine:
        remedy = "their images are the same"
        reasons.append(Reason("engine", f"{there.engine} saves, {here.engine} restarts", remedy, False))
    if there.kernel != here.kernel:
        problem = f"is {here.kernel} on {who}, {there.kernel} on {there.host}"
        reasons.append(Reason("kernel", problem, "usually harmless", False))
    for name, available in sorted(here.abilities.items()):
        if not available:
            reasons.append(Reason(f"kernel of {who}", f"cannot {name}", "see `migrator check` there", False))
    if here.cap_bounding and (withheld := proposal.survey.cap_bounding & ~here.cap_bounding):
        problem = f"may not give its copies {', '.join(confinement.names(withheld))}, which the workload may have"
        remedy = "take CapabilityBoundingSet= out of its unit, or run the workload with as few"
        reasons.append(Reason(f"the agent of {who}", problem, remedy))
    if here.confined:
        problem = f"is under {here.confined}, and so would be the copy"
        reasons.append(Reason(f"the agent of {who}", problem, "take that off the agent"))
    if there.vdso and here.vdso and there.vdso != here.vdso:
        problem = f"maps other code into every process (vdso) than that of {there.host}, and tasks may be in it"
        reasons.append(Reason(f"kernel of {who}", problem, "boot the same build of the kernel on both hosts"))
    if here.nr_open and (files := proposal.survey.most_files) > here.nr_open:
        problem = f"allows a process {here.nr_open} open files (fs.nr_open), the workload may have {files}"
        reasons.append(Reason(f"kernel of {who}", problem, f"sysctl fs.nr_open={files} there"))
    need = proposal.survey.rss_bytes + _MEMORY_SLACK
    if here.memory_available and here.memory_available < need:
        problem = f"has {size(here.memory_available)} available, {size(need)} are needed"
        reasons.append(Reason(f"memory of {who}", problem, "free some first"))
    top = max(proposal.survey.wanted_pids, default=0)
    if here.pid_max and top >= here.pid_max:
        remedy = f"sysctl kernel.pid_max={top + 1} there"
        reasons.append(Reason(f"pid {top}", f"is beyond kernel.pid_max of {who}, {here.pid_max}", remedy))
    return reasons


def file_problem(there: FileFact, here: FileFact | None) -> str:
    """What is wrong with a file on this host, "" if it is the same."""
    if here is None:
        return "is missing"
    if not stat.S_ISREG(there.mode):
        return "" if stat.S_IFMT(there.mode) == stat.S_IFMT(here.mode) else "is something else"
    if there.mode != here.mode:
        return f"has mode {here.mode:o}, not {there.mode:o}, as it has"
    if there.build_id and here.build_id and there.build_id != here.build_id:
        return f"is another build ({here.build_id[:12]}, not {there.build_id[:12]})"
    if there.writable:
        # It may have grown since the source looked, if both look at the same file; a stale copy has not.
        stale = here.size < there.size or here.mtime_ns < there.mtime_ns
        return "is older than the one that the workload writes to" if stale else ""
    if there.size != here.size:
        return f"has {here.size} bytes, not {there.size}"
    if there.digest and there.digest != here.digest:
        return "has other contents" if here.digest else "cannot be read"
    if bool(there.build_id) != bool(here.build_id):
        return "is another file"
    return ""


def without_congestion(names: Iterable[str], who: str) -> list[Reason]:
    """A reason for each congestion control that a socket cannot be given here. Loads the module, if there is one."""
    reasons = []
    for name in sorted(names):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            except OSError:
                what = f"congestion control {text(name)}"
                reasons.append(Reason(what, f"is not there on {who}", f"modprobe tcp_{text(name)} there"))
    return reasons


def taken(pids: Iterable[int]) -> list[int]:
    """Which of these pids are in use here, as processes or threads."""
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def collect_host(engine: str, capabilities: Iterable[Capability] = (), xstate_size: int = 0) -> HostFacts:
    """The facts of this host. `$MIGRATOR_HOST` replaces its name."""
    names = os.uname()
    cpu = _cpu(Path("/proc/cpuinfo").read_text())
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return HostFacts(
        host=os.environ.get("MIGRATOR_HOST") or names.nodename,
        kernel=names.release,
        machine=names.machine,
        cpu_vendor=cpu.get("vendor_id", ""),
        cpu_model=cpu.get("model name", ""),
        cpu_features=frozenset(cpu.get("flags", "").split()),
        xstate_size=xstate_size,
        engine=engine,
        abilities={capability.name: capability.available for capability in capabilities},
        memory_available=int(memory.get("MemAvailable", "0 kB").split()[0]) << 10,
        pid_max=int(Path("/proc/sys/kernel/pid_max").read_text()),
        vdso=vdso.digest(os.getpid()),
        nr_open=int(Path("/proc/sys/fs/nr_open").read_text()),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    )


def _cpu(text: str) -> dict[str, str]:
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
