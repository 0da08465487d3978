"""Everything that is true of x86-64 only: registers, system-call numbers, machine code, signal frames.

Another architecture is another module with the same names.
"""

from __future__ import annotations

import ctypes
import struct

from migrator.linux import ptrace

ARCH_ID = 2
USER_END = 0x7FFFFFFFF000
SYSCALL_INSTRUCTION = b"\x0f\x05"
SYSCALL_SIZE = 2
SYSCALL_RETURN = b"\x0f\x05\xc3"
RESTORERS = (bytes.fromhex("48c7c00f0000000f05"), bytes.fromhex("b80f0000000f05"))  # mov $15, %eax; syscall
RED_ZONE = 128  # bytes below the stack pointer that are still the program's
MINUS_ONE = (1 << 64) - 1

NR = {
    "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigreturn": 15, "ioctl": 16, "mremap": 25, "mincore": 27, "madvise": 28, "shmget": 29,
    "shmat": 30, "dup2": 33, "nanosleep": 35, "getitimer": 36, "setitimer": 38, "getpid": 39,
    "recvmsg": 47, "exit": 60, "wait4": 61, "fcntl": 72, "chdir": 80, "fchdir": 81, "umask": 95,
    "setuid": 105, "setgid": 106, "setpgid": 109, "setsid": 112, "setgroups": 116, "setresuid": 117,
    "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capset": 126, "rt_sigqueueinfo": 129,
    "sigaltstack": 131, "personality": 135, "setpriority": 141, "sched_setscheduler": 144, "mlock": 149,
    "mlockall": 151, "arch_prctl": 158, "get_mempolicy": 239,
    "prctl": 157, "setrlimit": 160, "chroot": 161, "getsid": 124, "gettid": 186, "sched_setaffinity": 203,
    "membarrier": 324, "set_tid_address": 218, "restart_syscall": 219, "timer_create": 222, "timer_settime": 223,
    "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "ioprio_set": 251,
    "openat": 257, "set_robust_list": 273, "get_robust_list": 274, "epoll_pwait": 281, "dup3": 292,
    "rt_tgsigqueueinfo": 297, "prlimit64": 302, "setns": 308, "userfaultfd": 323, "mlock2": 325, "rseq": 334,
    "pidfd_open": 434, "clone3": 435, "close_range": 436, "pidfd_getfd": 438, "ptrace": 101, "epoll_pwait2": 441,
    "poll": 7, "ppoll": 271, "process_vm_readv": 310, "keyctl": 250, "modify_ldt": 154,
    "semop": 65, "semtimedop": 220, "io_getevents": 208, "io_pgetevents": 333, "readv": 19, "writev": 20,
    "accept": 43, "accept4": 288, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmmsg": 299,
    "futex": 202, "socketpair": 53, "rt_sigtimedwait": 128, "select": 23, "pselect6": 270,
    "fstat": 5, "readlink": 89, "newfstatat": 262, "kcmp": 312, "openat2": 437, "tee": 276,
    "sched_getparam": 143, "sched_getscheduler": 145, "getpriority": 140, "ioprio_get": 252, "sched_getaffinity": 204,
    "connect": 42, "bind": 49, "getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55,
}  # fmt: skip

_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
REGS_SIZE = 8 * len(_REGISTERS)


class Regs(ctypes.Structure):
    """struct user_regs_struct."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS]
    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int

    def copy(self) -> Regs:
        return Regs.from_buffer_copy(self)


def get_regs(tid: int) -> Regs:
    return Regs.from_buffer_copy(ptrace.get_regset(tid, ptrace.NT_PRSTATUS))


def set_regs(tid: int, regs: Regs) -> None:
    ptrace.set_regset_at(tid, ptrace.NT_PRSTATUS, ctypes.addressof(regs), REGS_SIZE)


def get_xstate(tid: int) -> bytes:
    """The extended state (x87, SSE, AVX, ...) in the XSAVE format; as long as the processor needs."""
    return ptrace.get_regset(tid, ptrace.NT_X86_XSTATE)


def set_xstate(tid: int, xstate: bytes) -> None:
    ptrace.set_regset(tid, ptrace.NT_X86_XSTATE, xstate)


def xfeatures(xstate: bytes) -> int:
    """The features that the kernel saves (XCR0), as PTRACE_GETREGSET puts them into the software bytes."""
    return int(struct.unpack_from("<Q", xstate, 464)[0]) if len(xstate) >= 472 else 3


# A table of system calls {nr, six arguments, result} at r15, r14 entries, made one after the other; then
# the thread sends itself signal r12, whose delivery stops it for the tracer. A tracer that has died does
# not stop it: the signal is one that is ignored by default, and the thread goes on with rt_sigreturn of
# the context at r13, which is its own from before.
#
#   top:  test r14,r14; jz done
#         mov rax,[r15]; mov rdi,[r15+8]; mov rsi,[r15+16]; mov rdx,[r15+24]
#         mov r10,[r15+32]; mov r8,[r15+40]; mov r9,[r15+48]; syscall
#         mov [r15+56],rax; add r15,64; dec r14; jmp top
#   done: getpid; gettid; tgkill(pid, tid, r12); mov rsp,r13; rt_sigreturn; ud2
BATCH_CODE = bytes.fromhex(
    "4d85f6742a498b07498b7f08498b7710498b57184d8b57204d8b47284d8b"
    "4f300f05498947384983c74049ffceebd1b8270000000f0589c7b8ba0000"
    "000f0589c64489e2b8ea0000000f054c89ecb80f0000000f050f0b"
)
BATCH_ENTRY = 64

# The same for a table of our own, as a function of the C ABI: void walk(table, count).
#
#         push rbx; push rbp; mov rbx,rdi; mov rbp,rsi
#   top:  test rbp,rbp; jz done
#         mov rax,[rbx]; mov rdi,[rbx+8]; mov rsi,[rbx+16]; mov rdx,[rbx+24]
#         mov r10,[rbx+32]; mov r8,[rbx+40]; mov r9,[rbx+48]; syscall
#         mov [rbx+56],rax; add rbx,64; dec rbp; jmp top
#   done: pop rbp; pop rbx; ret
WALK_CODE = bytes.fromhex(
    "53554889fb4889f54885ed742a488b03488b7b08488b7310488b53184c8b53204c"
    "8b43284c8b4b300f05488943384883c34048ffcdebd15d5bc3"
)

# syscall; int3
CALL_CODE = bytes.fromhex("0f05cc")

# again: pause(); jmp again
STUB_CODE = bytes.fromhex("b8220000000f05ebf7")

# As a function of the C ABI: long spawn(args, size, elf, argv, envp, empty, keep_a, keep_b). clone3(args, size); in
# the child, which has descriptors of its own, fcntl(keep, F_SETFD, 0) of both; execveat(elf, empty, argv, envp,
# AT_EMPTY_PATH); _exit(99)
SPAWN_CODE = bytes.fromhex(
    "415441554156415753554989d44989cd4d89c64c89cb448b7c24388b6c2440b8b301"
    "00000f054885c075474489ffbe0200000031d2b8480000000f0589efbe0200000031"
    "d2b8480000000f054c89e74889de4c89ea4d89f249c7c000100000b8420100000f05"
    "bf63000000b8e70000000f055d5b415f415e415d415cc3"
)

# What becomes the root of a tree by restart(): waits for a byte of `stream` (if there is none, it ends), calls
# unshare(flags) unless flags are 0, then restart(getpid(), stream, RESTART_FROZEN). Where one of them fails, it writes
# what that returned to `status`, as 8 bytes, again and again until it is killed; if nobody has the other end any more,
# it ends.
_CALLER_CODE = (
    "5089df4889e6ba0100000031c00f0583f8017545",
    "85ff740bb8100100000f0585c07817b8270000000f0589c789deba02000000b8250200000f054889"
    "042489ef4889e6ba08000000b8010000000f0583f80874eabf01000000b8e70000000f05",
)


def caller_code(stream: int, status: int, unshare: int) -> bytes:
    """That code, for these descriptors."""
    begin, rest = map(bytes.fromhex, _CALLER_CODE)
    return (
        struct.pack("<Bi", 0xBB, stream)
        + struct.pack("<Bi", 0xBD, status)
        + begin
        + struct.pack("<Bi", 0xBF, unshare)
        + rest
    )


def guard_code(pipe: int, fd: int, text: bytes) -> bytes:
    """Waits until nobody has the other end of `pipe` any more, writes `text` to `fd`, and ends."""
    head = bytes.fromhex("6a00") + struct.pack("<Bi", 0xBF, pipe) + bytes.fromhex("4889e6ba0100000031c00f05")
    head += struct.pack("<Bi", 0xBF, fd) + bytes.fromhex("488d3515000000") + struct.pack("<Bi", 0xBA, len(text))
    return head + bytes.fromhex("b8010000000f0531ffb8e70000000f05") + text


# if the call has failed: exit_group
_OR_END = bytes.fromhex("85c07907b8e70000000f05")
# again: kill(getpid(), SIGSTOP); jmp again
_STAY_STOPPED = bytes.fromhex("b8270000000f0589c7be13000000b83e0000000f05ebe9")


def bystander_code(address: int, pidfd: int, namespaces: int, uid: int, gid: int) -> bytes:
    """For an executable at `address`: enters `namespaces` of the process behind `pidfd`, gives up all descriptors,
    groups and capabilities, takes `uid` and `gid`, ends with who has made it, can be looked at, and stays stopped.
    Where one of these fails, it ends."""
    kill, set_pdeathsig, set_dumpable = 9, 1, 4
    size = 8 * (4 * 5 + len(SYSCALL_INSTRUCTION) + len(_OR_END)) + len(_STAY_STOPPED)
    header = address + 0x78 + size  # of capset: version 3, then no capability
    calls = (
        (NR["setns"], pidfd, namespaces, 0),
        (NR["close_range"], 0, 0xFFFFFFFF, 0),
        (NR["setgroups"], 0, 0, 0),
        (NR["setresgid"], gid, gid, gid),
        (NR["setresuid"], uid, uid, uid),
        (NR["capset"], header, header + 8, 0),
        (NR["prctl"], set_pdeathsig, kill, 0),
        (NR["prctl"], set_dumpable, 1, 0),
    )
    code = b"".join(
        struct.pack("<BIBIBIBI", 0xB8, call[0], 0xBF, call[1], 0xBE, call[2], 0xBA, call[3])
        + SYSCALL_INSTRUCTION
        + _OR_END
        for call in calls
    )
    return code + _STAY_STOPPED + struct.pack("<II", 0x20080522, 0) + bytes(24)


def start_batch(tid: int, regs: Regs, code: int, table: int, count: int, signal: int, context: int) -> None:
    """Point a stopped thread at the batch code; `regs` are its own, for the segments."""
    set_regs(tid, batch_regs(regs, code, table, count, signal, context))


def batch_regs(regs: Regs, code: int, table: int, count: int, signal: int, context: int) -> Regs:
    """The registers for that."""
    new = regs.copy()
    new.orig_rax = MINUS_ONE
    new.rip, new.r15, new.r14, new.r13, new.r12 = code, table, count, context, signal
    return new


def start_call(tid: int, regs: Regs, instruction: int, number: int, args: tuple[int, ...], stack: int = 0) -> None:
    """Point a stopped thread at one `syscall` instruction, arguments in place; `stack` 0: on its own."""
    new = regs.copy()
    if stack:
        new.rsp = stack
    new.orig_rax = MINUS_ONE
    new.rip, new.rax = instruction, number
    padded = [a & MINUS_ONE for a in (*args, 0, 0, 0, 0, 0, 0)]
    new.rdi, new.rsi, new.rdx, new.r10, new.r8, new.r9 = padded[:6]
    set_regs(tid, new)


def result(regs: Regs) -> int:
    """The result of a system call: negative errno on error."""
    return ctypes.c_int64(regs.rax).value


def interrupted_call(regs: Regs) -> tuple[int, int]:
    """(number of the interrupted system call, the kernel's restart code) or (-1, 0) if none was."""
    number = ctypes.c_int64(regs.orig_rax).value
    code = ctypes.c_int64(regs.rax).value
    if number < 0 or code not in (-512, -513, -514, -516):
        return -1, 0
    return number, code


def call_again(regs: Regs) -> Regs:
    """Registers with which an interrupted system call is made again from its beginning."""
    new = regs.copy()
    new.rip -= SYSCALL_SIZE
    new.rax = regs.orig_rax
    new.orig_rax = MINUS_ONE
    return new


def call_number(code: bytes) -> int:
    """The number in `code`, the 7 bytes up to where a call returns: `mov $number, %eax; syscall`; or -1."""
    if len(code) == 7 and code[0] == 0xB8 and code[5:] == SYSCALL_INSTRUCTION:
        return int(struct.unpack_from("<I", code, 1)[0])
    return -1


CONTEXT_SIZE = 320  # struct ucontext up to and with its signal mask, rounded up
_FP_MAGIC1, _FP_MAGIC2 = 0x46505853, 0x46505845


def signal_context(regs: Regs, xstate: bytes, mask: int, address: int, call: int) -> bytes:
    """A struct ucontext for rt_sigreturn(2), to be put at `address` (a multiple of 64).

    A thread that returns to it goes on as it was; the interrupted system call `call` (-1: none) is made
    again from its beginning, as rt_sigreturn(2) ends what restart_syscall(2) could go on with. The
    alternate stack in it is invalid on purpose: the kernel then leaves the thread's own in place."""
    if call >= 0:
        regs = call_again(regs)
        regs.rax = call
    fpstate = address + CONTEXT_SIZE
    head = struct.pack("<QQQIIQ", 1 | 2 | 4, 0, 0, 0xDEAD, 0, 0)
    r = regs
    context = struct.pack(
        "<18Q4H4QQ8Q",
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
        r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags,
        r.cs & 0xFFFF, 0, 0, r.ss & 0xFFFF,
        0, 0, 0, 0,
        fpstate,
        *(0,) * 8,
    )  # fmt: skip
    frame = (head + context + struct.pack("<Q", mask)).ljust(CONTEXT_SIZE, b"\0")
    state = bytearray(xstate)
    struct.pack_into("<IIQI", state, 464, _FP_MAGIC1, len(state) + 4, xfeatures(xstate), len(state))
    state[484:512] = bytes(28)
    return frame + bytes(state) + struct.pack("<I", _FP_MAGIC2)


def stub_elf(address: int, code: bytes = STUB_CODE) -> bytes:
    """A static executable of one page: of a stub, which waits for ever, unless other code is given."""
    size = 0x78 + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, address + 0x78, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, address, address, size, size, 4096)
    return header + segment + code
