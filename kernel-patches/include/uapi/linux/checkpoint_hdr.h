/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Checkpoint/restart: the format of an image.
 *
 * A stream of records, each led by struct ckpt_hdr. The fixed part of a
 * record is one of the structs below; its tails (texts, byte strings and
 * arrays) follow in the order of their counts, each padded with zeros to a
 * multiple of eight bytes. "<tail>_len" counts bytes, "nr_<tail>" items.
 *
 * All numbers are little-endian on the architectures defined so far. Pids
 * are those of the pid namespace of the root task. Padding is zero.
 */
#ifndef _UAPI_LINUX_CHECKPOINT_HDR_H
#define _UAPI_LINUX_CHECKPOINT_HDR_H

#include <linux/types.h>

#define CKPT_REV		7
#define CKPT_MAX_RECORD		(32 << 20)
#define CKPT_MAGIC_HEADER	0x4d49475241544f52ULL
#define CKPT_MAGIC_TRAILER	0x524f544152474944ULL
#define CKPT_OBJREF_NONE	0

/*
 * @type: enum ckpt_hdr_type
 * @len: of the whole record in bytes, this header included
 */
struct ckpt_hdr {
	__s32 type;
	__s32 len;
} __attribute__((aligned(8)));

enum ckpt_hdr_type {
	CKPT_HDR_HEADER = 1,
	CKPT_HDR_HEADER_X86 = 2,
	CKPT_HDR_CONTAINER = 3,
	CKPT_HDR_TREE = 102,
	CKPT_HDR_TASK = 103,
	CKPT_HDR_RESTART_BLOCK = 106,
	CKPT_HDR_CPU = 108,
	CKPT_HDR_CRED = 115,
	CKPT_HDR_FILE_TABLE = 301,
	CKPT_HDR_FILE = 304,
	CKPT_HDR_PIPE_BUFFER = 305,
	CKPT_HDR_EPOLL_ITEMS = 308,
	CKPT_HDR_PIPE = 309,
	CKPT_HDR_EVENT_FD = 310,
	CKPT_HDR_TIMER_FD = 311,
	CKPT_HDR_SIGNAL_FD = 312,
	CKPT_HDR_DELETED_FILE = 313,
	CKPT_HDR_FILE_DATA = 314,
	CKPT_HDR_PID_FD = 315,
	CKPT_HDR_FILE_LOCK = 316,
	CKPT_HDR_INOTIFY = 317,
	CKPT_HDR_INOTIFY_WATCH = 318,
	CKPT_HDR_FILE_OWNER = 319,
	CKPT_HDR_PTY = 320,
	CKPT_HDR_PTY_DATA = 321,
	CKPT_HDR_MM = 401,
	CKPT_HDR_VMAS = 402,
	CKPT_HDR_PAGES = 403,
	CKPT_HDR_SHM = 404,
	CKPT_HDR_MAPPED_FILE = 405,
	CKPT_HDR_ROUND_MARK = 406,
	CKPT_HDR_NAME = 407,
	CKPT_HDR_SHARED_FILE = 408,
	CKPT_HDR_TMPFS_ENTRY = 409,
	CKPT_HDR_TMPFS_XATTR = 410,
	CKPT_HDR_FS = 451,
	CKPT_HDR_SYSV_SHM = 501,
	CKPT_HDR_SYSV_SEM = 502,
	CKPT_HDR_SYSV_QUEUE = 503,
	CKPT_HDR_SYSV_MESSAGE = 504,
	CKPT_HDR_MQ_QUEUE = 505,
	CKPT_HDR_MQ_MESSAGE = 506,
	CKPT_HDR_SIGHAND = 601,
	CKPT_HDR_SIGNAL = 602,
	CKPT_HDR_SIG_PENDING = 604,
	CKPT_HDR_SOCKET = 701,
	CKPT_HDR_SOCKET_BUFFER = 702,
	CKPT_HDR_SOCKET_TCP = 703,
	CKPT_HDR_TRAILER = 9001,
	CKPT_HDR_ERROR = 9999,
};

enum ckpt_arch {
	CKPT_ARCH_X86_64 = 2,
	CKPT_ARCH_AARCH64 = 5,
};

enum ckpt_task_flag {
	CKPT_TASK_FLAG_THREAD = 0x1,
	CKPT_TASK_FLAG_ZOMBIE = 0x2,
	CKPT_TASK_FLAG_ORPHAN = 0x4, /* its parent is outside of the tree */
};

enum ckpt_task_state {
	CKPT_TASK_STATE_RUNNING = 0,
	CKPT_TASK_STATE_STOPPED = 1, /* by a job-control signal; `exit_code` holds the signal */
	CKPT_TASK_STATE_ZOMBIE = 2,
};

enum ckpt_task_bits {
	CKPT_TASK_BITS_NO_NEW_PRIVS = 0x1,
	CKPT_TASK_BITS_CHILD_SUBREAPER = 0x2,
	CKPT_TASK_BITS_THP_DISABLED = 0x4,
	CKPT_TASK_BITS_NOT_DUMPABLE = 0x8,
	CKPT_TASK_BITS_STOP_REPORTED = 0x10,
	CKPT_TASK_BITS_MEMBARRIER_GLOBAL = 0x20, /* registered for membarrier(2) */
	CKPT_TASK_BITS_MEMBARRIER_PRIVATE = 0x40,
	CKPT_TASK_BITS_MEMBARRIER_SYNC_CORE = 0x80,
	CKPT_TASK_BITS_MEMBARRIER_RSEQ = 0x100,
	CKPT_TASK_BITS_TSC_DENIED = 0x200, /* PR_SET_TSC */
	CKPT_TASK_BITS_CPUID_DENIED = 0x400, /* ARCH_SET_CPUID */
	CKPT_TASK_BITS_MCE_EARLY = 0x800, /* PR_MCE_KILL */
	CKPT_TASK_BITS_MCE_LATE = 0x1000,
	CKPT_TASK_BITS_MERGE_ALL = 0x2000, /* PR_SET_MEMORY_MERGE */
	CKPT_TASK_BITS_LOCK_FUTURE = 0x4000, /* mlockall(2): MCL_FUTURE */
	CKPT_TASK_BITS_LOCK_ONFAULT = 0x8000, /* with MCL_ONFAULT */
	/* PR_THP_DISABLE_EXCEPT_ADVISED, with THP_DISABLED */
	CKPT_TASK_BITS_THP_EXCEPT_ADVISED = 0x10000,
};

enum ckpt_vma_kind {
	CKPT_VMA_KIND_ANON = 1,
	CKPT_VMA_KIND_FILE = 2, /* objref is a MappedFile */
	CKPT_VMA_KIND_SHM = 3, /* objref is a Shm */
	CKPT_VMA_KIND_HEAP = 4,
	CKPT_VMA_KIND_STACK = 5,
	CKPT_VMA_KIND_VDSO = 6,
	CKPT_VMA_KIND_VVAR = 7,
	CKPT_VMA_KIND_VVAR_VCLOCK = 8,
};

enum ckpt_vma_flag {
	CKPT_VMA_FLAG_READ = 0x1,
	CKPT_VMA_FLAG_WRITE = 0x2,
	CKPT_VMA_FLAG_EXEC = 0x4,
	CKPT_VMA_FLAG_SHARED = 0x8,
	CKPT_VMA_FLAG_GROWSDOWN = 0x10,
	CKPT_VMA_FLAG_LOCKED = 0x20,
	CKPT_VMA_FLAG_NORESERVE = 0x40,
	CKPT_VMA_FLAG_DONTFORK = 0x80,
	CKPT_VMA_FLAG_DONTDUMP = 0x100,
	CKPT_VMA_FLAG_WIPEONFORK = 0x200,
	CKPT_VMA_FLAG_HUGEPAGE = 0x400,
	CKPT_VMA_FLAG_NOHUGEPAGE = 0x800,
	CKPT_VMA_FLAG_MERGEABLE = 0x1000,
	CKPT_VMA_FLAG_RANDOM = 0x2000,
	CKPT_VMA_FLAG_SEQUENTIAL = 0x4000,
	CKPT_VMA_FLAG_DROPPABLE = 0x8000,
	CKPT_VMA_FLAG_MAY_WRITE = 0x10000, /* of a shared mapping: it can be made writable */
	CKPT_VMA_FLAG_LOCKED_ONFAULT = 0x20000, /* MLOCK_ONFAULT, with LOCKED */
};

enum ckpt_page_kind {
	CKPT_PAGE_KIND_DATA = 0, /* contents follow */
	CKPT_PAGE_KIND_ZERO = 1, /* reads as zeros; nothing follows */
	CKPT_PAGE_KIND_ABSENT = 2, /* dropped or never touched: whatever the mapping itself gives */
	CKPT_PAGE_KIND_GUARD = 3, /* to touch it is a fault (MADV_GUARD_INSTALL); of an Mm */
};

enum ckpt_shm_kind {
	CKPT_SHM_KIND_ANON = 1,
	CKPT_SHM_KIND_MEMFD = 2,
	CKPT_SHM_KIND_SYSV = 3,
};

struct ckpt_task_pids {
	__s32 pid;
	__s32 tgid;
	__s32 ppid;
	__s32 pgid;
	__s32 sid;
	__u32 flags;
} __attribute__((aligned(8)));

struct ckpt_gid {
	__u32 gid;
	__u32 reserved;
} __attribute__((aligned(8)));

struct ckpt_vma_item {
	__u64 start;
	__u64 end;
	__u64 offset; /* in bytes, into the file or the shared memory */
	__u32 flags;
	__u32 kind;
	__s32 objref;
	__s32 name_objref; /* a Name, for PR_SET_VMA_ANON_NAME */
} __attribute__((aligned(8)));

struct ckpt_page_range {
	__u64 start; /* virtual address, or offset in bytes for a Shm */
	__u32 nr_pages;
	__u32 kind;
} __attribute__((aligned(8)));

struct ckpt_rlimit {
	__u64 soft;
	__u64 hard;
} __attribute__((aligned(8)));

struct ckpt_itimer {
	__u64 value; /* remaining, in microseconds */
	__u64 interval;
} __attribute__((aligned(8)));

struct ckpt_posix_timer {
	__s32 timer_id;
	__s32 clock;
	__u32 notify;
	__u32 signo;
	__s32 tid;
	__s32 overrun;
	__u64 sigval;
	__u64 value; /* remaining */
	__u64 interval;
} __attribute__((aligned(8)));

/*
 * First record.
 *
 * `monotonic` and `boottime` are what the tasks themselves saw at `time`
 * (CLOCK_REALTIME).
 */
struct ckpt_hdr_header {
	struct ckpt_hdr h;
	__u64 magic;
	__u16 arch_id;
	__u16 rev;
	__u16 kernel_major;
	__u16 kernel_minor;
	__u16 kernel_patch;
	__u16 page_shift;
	__u32 uflags;
	__u64 time;
	__s64 monotonic;
	__s64 boottime;
	__u32 sysname_len;
	__u32 nodename_len;
	__u32 release_len;
	__u32 version_len;
	__u32 machine_len;
	__u32 domainname_len;
	__u32 engine_len;
} __attribute__((aligned(8)));

/*
 * Second record on x86-64: what the registers below need of the destination's
 * processor.
 */
struct ckpt_hdr_header_x86 {
	struct ckpt_hdr h;
	__u64 xfeatures;
	__u32 xstate_size;
	__u32 cpu_vendor_len;
	__u32 cpu_model_len;
	__u32 cpu_flags_len;
	__u32 vdso_digest_len;
} __attribute__((aligned(8)));

/*
 * The container that the tree lives in, if any. `spec` is the JSON text of its
 * specification.
 */
struct ckpt_hdr_container {
	struct ckpt_hdr h;
	__s32 init_pid;
	__u32 name_len;
	__u32 spec_len;
} __attribute__((aligned(8)));

/*
 * The task hierarchy, parents before children, leaders before their threads.
 *
 * May come again (tasks are born and die during pre-copy): the last one is the
 * authority.
 */
struct ckpt_hdr_tree {
	struct ckpt_hdr h;
	__u32 generation;
	__u32 nr_tasks;
} __attribute__((aligned(8)));

/*
 * One task: a thread, or the leader of a process. Follows everything that it
 * refers to.
 */
struct ckpt_hdr_task {
	struct ckpt_hdr h;
	__s32 pid;
	__u32 state; /* enum TaskState */
	__s32 exit_code; /* as wait(2) encodes it, for zombies */
	__s32 exit_signal;
	__s32 pdeath_signal;
	__s32 mm_objref;
	__s32 files_objref;
	__s32 fs_objref;
	__s32 sighand_objref;
	__s32 signal_objref;
	__s32 cred_objref;
	__u32 personality;
	__s32 sched_policy;
	__s32 sched_priority;
	__s32 nice;
	__s32 ioprio;
	__u32 rseq_len;
	__u32 rseq_sig;
	__s32 altstack_flags;
	__u32 flags; /* enum TaskBits */
	__u64 clear_child_tid;
	__u64 robust_list;
	__u64 robust_len;
	__u64 rseq_ptr;
	__u64 altstack_sp;
	__u64 altstack_size;
	__u64 blocked;
	__u64 timerslack;
	__u32 comm_len;
	__u32 affinity_len;
} __attribute__((aligned(8)));

/*
 * A system call that was interrupted and goes on for its remaining time.
 *
 * `remaining` is in ns, or -1 if the call is to be made again as it was.
 */
struct ckpt_hdr_restart_block {
	struct ckpt_hdr h;
	__s32 pid;
	__u32 syscall;
	__s64 remaining;
	__u32 args_len;
} __attribute__((aligned(8)));

/*
 * Registers of one task.
 *
 * `regs` as PTRACE_GETREGSET(NT_PRSTATUS) gives them, `xstate` as
 * NT_X86_XSTATE.
 */
struct ckpt_hdr_cpu {
	struct ckpt_hdr h;
	__s32 pid;
	__u32 arch_id;
	__u32 regs_len;
	__u32 xstate_len;
} __attribute__((aligned(8)));

struct ckpt_hdr_cred {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 uid;
	__u32 euid;
	__u32 suid;
	__u32 fsuid;
	__u32 gid;
	__u32 egid;
	__u32 sgid;
	__u32 fsgid;
	__u32 securebits;
	__u64 cap_inheritable;
	__u64 cap_permitted;
	__u64 cap_effective;
	__u64 cap_bounding;
	__u64 cap_ambient;
	__u32 nr_groups;
} __attribute__((aligned(8)));

/*
 * An address space. Its mappings follow in `Vmas`, its contents in `Pages`;
 * both may come again.
 */
struct ckpt_hdr_mm {
	struct ckpt_hdr h;
	__s32 objref;
	__s32 oom_score_adj;
	__u64 start_code;
	__u64 end_code;
	__u64 start_data;
	__u64 end_data;
	__u64 start_brk;
	__u64 brk;
	__u64 start_stack;
	__u64 arg_start;
	__u64 arg_end;
	__u64 env_start;
	__u64 env_end;
	__s32 exe_objref; /* a MappedFile */
	__s32 pid; /* of the process whose address space it is */
	__u32 auxv_len;
} __attribute__((aligned(8)));

/*
 * All mappings of one address space, sorted. The last one in the stream is the
 * authority.
 */
struct ckpt_hdr_vmas {
	struct ckpt_hdr h;
	__s32 mm_objref;
	__u32 reserved;
	__u32 nr_vmas;
} __attribute__((aligned(8)));

/*
 * A chunk of contents: ranges, then the contents of the DATA ranges, one after
 * the other.
 *
 * The last chunk of an object in a round has no ranges.
 */
struct ckpt_hdr_pages {
	struct ckpt_hdr h;
	__s32 objref; /* an Mm, a Shm or a SharedFile */
	__u32 crc; /* zlib.crc32 of `data`, or 0 */
	__u32 nr_ranges;
	__u32 data_len;
} __attribute__((aligned(8)));

/*
 * Memory shared by several mappings or descriptors.
 *
 * Anonymous, memfd, System V or a deleted tmpfs file.
 */
struct ckpt_hdr_shm {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 kind; /* enum ShmKind */
	__u64 size;
	__u32 seals;
	__u32 mode;
	__u32 name_len;
} __attribute__((aligned(8)));

/*
 * A file that is mapped or executed. Its content is not in the stream: the
 * same path is verified.
 */
struct ckpt_hdr_mapped_file {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 mode;
	__u64 size;
	__u64 mtime;
	__u32 path_len;
	__u32 build_id_len;
} __attribute__((aligned(8)));

/*
 * The pages that follow belong to round `number`; `flags` 1: the tasks are
 * stopped, this is the last.
 */
struct ckpt_hdr_round_mark {
	struct ckpt_hdr h;
	__u32 number;
	__u32 flags; /* enum RoundFlag */
	__u64 time;
} __attribute__((aligned(8)));

struct ckpt_hdr_name {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 reserved;
	__u32 text_len;
} __attribute__((aligned(8)));

struct ckpt_hdr_fs {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 umask;
	__u32 cwd_len;
	__u32 root_len;
} __attribute__((aligned(8)));

/*
 * `actions`: 64 times struct sigaction of the kernel (handler, flags,
 * restorer, mask), signal 1 first.
 */
struct ckpt_hdr_sighand {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 reserved;
	__u32 actions_len;
} __attribute__((aligned(8)));

/*
 * What the threads of a process share: limits and timers.
 */
struct ckpt_hdr_signal {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 reserved;
	__u32 nr_rlimits;
	__u32 nr_itimers;
	__u32 nr_timers;
} __attribute__((aligned(8)));

/*
 * Signals that wait.
 *
 * `infos` is an array of siginfo_t (128 bytes each). `shared`: of the whole
 * process.
 */
struct ckpt_hdr_sig_pending {
	struct ckpt_hdr h;
	__s32 pid;
	__u32 shared;
	__u32 infos_len;
} __attribute__((aligned(8)));

/*
 * Last record. Without it nothing may be restarted.
 */
struct ckpt_hdr_trailer {
	struct ckpt_hdr h;
	__u64 magic;
	__u64 nr_records;
} __attribute__((aligned(8)));

enum ckpt_file_kind {
	CKPT_FILE_KIND_REGULAR = 1, /* path */
	CKPT_FILE_KIND_DIRECTORY = 2, /* path */
	CKPT_FILE_KIND_PATH = 3, /* path; opened with O_PATH */
	CKPT_FILE_KIND_DEVICE = 4, /* path; `rdev` must be the same */
	CKPT_FILE_KIND_DELETED = 5, /* a DeletedFile */
	CKPT_FILE_KIND_PIPE = 6, /* a Pipe */
	CKPT_FILE_KIND_FIFO = 7, /* path, and a Pipe with what is in it */
	CKPT_FILE_KIND_EVENTFD = 8, /* an EventFd */
	CKPT_FILE_KIND_TIMERFD = 9, /* a TimerFd */
	CKPT_FILE_KIND_SIGNALFD = 10, /* a SignalFd */
	CKPT_FILE_KIND_EPOLL = 11, /* nothing; its EpollItems follow */
	CKPT_FILE_KIND_MEMFD = 12, /* a Shm */
	CKPT_FILE_KIND_SOCKET = 13, /* a Socket */
	CKPT_FILE_KIND_PIDFD = 14, /* a PidFd */
	CKPT_FILE_KIND_MQUEUE = 15, /* a MqQueue */
	CKPT_FILE_KIND_INOTIFY = 16, /* an Inotify */
	CKPT_FILE_KIND_PTY_MASTER = 17, /* path, and a Pty */
	CKPT_FILE_KIND_PTY_SLAVE = 18, /* path (/dev/tty as well), and a Pty */
};

enum ckpt_owner_type {
	CKPT_OWNER_TYPE_NONE = 0,
	CKPT_OWNER_TYPE_THREAD = 1,
	CKPT_OWNER_TYPE_PROCESS = 2,
	CKPT_OWNER_TYPE_GROUP = 3,
};

enum ckpt_socket_state {
	CKPT_SOCKET_STATE_UNCONNECTED = 1, /* bound, if `local` says so */
	CKPT_SOCKET_STATE_LISTENING = 2,
	CKPT_SOCKET_STATE_CONNECTED = 3, /* TCP: any state that has a peer, see SocketTcp */
	/* the connection has ended; what is queued can still be read */
	CKPT_SOCKET_STATE_PEER_GONE = 4,
	CKPT_SOCKET_STATE_CONNECTING = 5, /* TCP: the SYN is on its way; sent anew */
};

struct ckpt_descriptor {
	__s32 fd; /* its number */
	__s32 file_objref; /* a File */
	__u32 cloexec; /* 1: FD_CLOEXEC */
	__u32 reserved;
} __attribute__((aligned(8)));

struct ckpt_epoll_item {
	__u64 data;
	/* 0 except for EPOLLONESHOT and EPOLLET: an event that was delivered and not renewed */
	__u32 events;
	__s32 fd; /* the number under which it was added */
	__s32 file_objref; /* the File it is about */
	__u32 reserved;
} __attribute__((aligned(8)));

struct ckpt_socket_option {
	__s32 level;
	__s32 name;
	__s64 value;
} __attribute__((aligned(8)));

/*
 * The open descriptors of a process, sorted by number.
 */
struct ckpt_hdr_file_table {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 reserved;
	__u32 nr_descriptors;
} __attribute__((aligned(8)));

/*
 * An open file description.
 *
 * `size` and `mtime` (ns since the epoch) are those of the file when it was
 * saved; `dev`,
 * `ino` and `rdev` as stat(2) has them, as information except `rdev` of a
 * device.
 * `owner_signal` is F_GETSIG.
 */
struct ckpt_hdr_file {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 kind; /* enum FileKind */
	__u32 flags; /* F_GETFL */
	__u32 mode; /* st_mode */
	__s64 pos;
	__u64 size;
	__u64 mtime;
	__u64 dev;
	__u64 ino;
	__u64 rdev;
	__s32 inode_objref;
	__u32 owner_type; /* enum OwnerType */
	__s32 owner_pid;
	__s32 owner_signal;
	__u32 lock; /* 0 none, 1 shared, 2 exclusive: flock(2) */
	__u32 reserved;
	__u32 path_len;
} __attribute__((aligned(8)));

/*
 * What waits in a pipe: the next bytes, in order.
 */
struct ckpt_hdr_pipe_buffer {
	struct ckpt_hdr h;
	__s32 pipe_objref;
	__u32 flags; /* 1: one packet (O_DIRECT), otherwise a part of a stream of bytes */
	__u32 data_len;
} __attribute__((aligned(8)));

/*
 * What an epoll instance waits for. `pid` is the process that has both
 * descriptors.
 */
struct ckpt_hdr_epoll_items {
	struct ckpt_hdr h;
	__s32 epoll_objref; /* a File of kind EPOLL */
	__s32 pid;
	__u32 nr_items;
} __attribute__((aligned(8)));

struct ckpt_hdr_pipe {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 capacity; /* F_GETPIPE_SZ */
} __attribute__((aligned(8)));

struct ckpt_hdr_event_fd {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 semaphore; /* 1: EFD_SEMAPHORE */
	__u64 count;
} __attribute__((aligned(8)));

/*
 * A timer. `value` is what remains until the next expiration, 0 if it is not
 * armed; if `flags` has 1
 * (TFD_TIMER_ABSTIME) and the clock is CLOCK_REALTIME, it is the date instead.
 * In ns.
 */
struct ckpt_hdr_timer_fd {
	struct ckpt_hdr h;
	__s32 objref;
	__s32 clock;
	__u32 flags;
	__u32 reserved;
	__u64 ticks; /* expirations not read yet */
	__u64 value;
	__u64 interval;
} __attribute__((aligned(8)));

struct ckpt_hdr_signal_fd {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 reserved;
	__u64 mask;
} __attribute__((aligned(8)));

/*
 * A regular file that has no name any more. Its contents follow as FileData,
 * holes left out.
 */
struct ckpt_hdr_deleted_file {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 mode;
	__u64 size;
	__u32 uid;
	__u32 gid;
	__u32 path_len;
} __attribute__((aligned(8)));

struct ckpt_hdr_file_data {
	struct ckpt_hdr h;
	__s32 inode_objref; /* a DeletedFile */
	__u32 reserved;
	__u64 offset;
	__u32 data_len;
} __attribute__((aligned(8)));

struct ckpt_hdr_pid_fd {
	struct ckpt_hdr h;
	__s32 objref;
	__s32 pid; /* 0: of a process that has ended and was waited for */
} __attribute__((aligned(8)));

/*
 * A socket. `local` and `peer` are struct sockaddr as the kernel gives them,
 * empty if there is none.
 *
 * Options are those that differ from a new socket's. The ends of a connection
 * between two unix sockets
 * name each other by `peer_objref`.
 */
struct ckpt_hdr_socket {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 family;
	__u32 type; /* SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET */
	__u32 protocol;
	__u32 state; /* enum SocketState */
	__u32 shutdown; /* 1: reading, 2: writing, 3: both */
	__u32 backlog; /* of listen(2) */
	__s32 peer_objref; /* a Socket, or 0 */
	__u32 sndbuf; /* bytes, as getsockopt gives them */
	__u32 rcvbuf;
	__u32 buf_lock; /* SO_BUF_LOCK: 1 sndbuf, 2 rcvbuf set by the program */
	__u32 mode; /* unix: permissions of the socket's file */
	__u32 uid; /* of the socket; unix: of the socket's file */
	__u32 gid;
	__s32 error; /* SO_ERROR that waits to be read, or 0 */
	__u32 local_len;
	__u32 peer_len;
	__u32 path_len;
	__u32 device_len;
	__u32 congestion_len;
	__u32 nr_options;
} __attribute__((aligned(8)));

/*
 * What waits to be received from a socket, in order. `address` is the
 * sender's, if it has one.
 */
struct ckpt_hdr_socket_buffer {
	struct ckpt_hdr h;
	__s32 socket_objref;
	__u32 flags; /* 1: one whole message, otherwise a part of a stream of bytes */
	__u32 data_len;
	__u32 address_len;
} __attribute__((aligned(8)));

/*
 * The state of a TCP connection (TCP_REPAIR in tcp(7); kernel:
 * net/ipv4/tcp.c).
 *
 * `rcv_seq` and `snd_seq` are TCP_QUEUE_SEQ of the two queues: the sequence
 * numbers after the last byte
 * of `received` and of `sent`. The last `unsent` bytes of `sent` were never
 * sent.
 */
struct ckpt_hdr_socket_tcp {
	struct ckpt_hdr h;
	__s32 socket_objref;
	/* TCP_ESTABLISHED 1, FIN_WAIT1 4, FIN_WAIT2 5, CLOSE_WAIT 8, LAST_ACK 9, CLOSING 11 */
	__u32 state;
	__u32 rcv_seq;
	__u32 snd_seq;
	__u32 unsent;
	__u32 options; /* tcpi_options: 1 timestamps, 2 SACK, 4 window scaling */
	__u32 snd_wscale;
	__u32 rcv_wscale;
	__u32 mss_clamp;
	__u32 timestamp; /* TCP_TIMESTAMP */
	__u32 snd_wl1; /* struct tcp_repair_window */
	__u32 snd_wnd;
	__u32 max_window;
	__u32 rcv_wnd;
	__u32 rcv_wup;
	__u32 received_len;
	__u32 sent_len;
} __attribute__((aligned(8)));

/*
 * A lock on a range of a file (fcntl(2)). Taken again once every process has
 * its descriptors.
 */
struct ckpt_hdr_file_lock {
	struct ckpt_hdr h;
	__s32 file_objref; /* the File that it was taken through */
	__s32 pid; /* the process that has it, or 0: it belongs to the File (F_OFD_SETLK) */
	__s32 fd; /* the File's number in that process */
	__u32 kind; /* 1 shared, 2 exclusive */
	__u64 start; /* in bytes */
	__u64 length; /* 0: up to the end of the file, however it grows */
} __attribute__((aligned(8)));

enum ckpt_round_flag {
	CKPT_ROUND_FLAG_LAST = 0x1, /* the tasks are stopped: what follows is final */
	CKPT_ROUND_FLAG_END = 0x2, /* the round that is open is complete */
};

enum ckpt_shared_file_kind {
	CKPT_SHARED_FILE_KIND_DELETED = 1, /* has no name any more, and is mapped */
	CKPT_SHARED_FILE_KIND_TMPFS = 2, /* in a tmpfs of a container's own: see TmpfsEntry */
};

/*
 * A regular file that is on no other host. Its contents come as `Pages`, by
 * offset, as those of a `Shm`.
 *
 * A mapping of it is one of kind SHM; a program that was deleted may be one.
 * `mount` is the tmpfs that it is in,
 * empty where its file system is one of the hosts'. `name` is its path, as far
 * as known.
 */
struct ckpt_hdr_shared_file {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 kind; /* enum SharedFileKind */
	__u64 size;
	__s64 mtime; /* ns since the epoch */
	__u32 mode; /* permissions */
	__u32 uid;
	__u32 gid;
	__u32 reserved;
	__u32 mount_len;
	__u32 name_len;
} __attribute__((aligned(8)));

/*
 * A name in a tmpfs of a container's own, `mount`. Those of the last round are
 * all there are.
 *
 * Directories come before what is in them, "." being the first.
 */
struct ckpt_hdr_tmpfs_entry {
	struct ckpt_hdr h;
	/* a SharedFile, with several names if it has hard links; 0 for all others */
	__s32 shared_objref;
	__u32 mode; /* st_mode */
	__u32 uid;
	__u32 gid;
	__u32 rdev; /* of a character device that keeps nothing, such as /dev/null */
	__s64 mtime; /* ns since the epoch */
	__u32 mount_len;
	__u32 path_len;
	__u32 target_len;
} __attribute__((aligned(8)));

/*
 * An extended attribute of a TmpfsEntry ahead of it.
 */
struct ckpt_hdr_tmpfs_xattr {
	struct ckpt_hdr h;
	__u32 flags;
	__u32 reserved;
	__u32 mount_len;
	__u32 path_len;
	__u32 name_len;
	__u32 value_len;
} __attribute__((aligned(8)));

/*
 * A segment of System V shared memory (shmget(2)). Its contents are those of a
 * `Shm` of kind SYSV.
 */
struct ckpt_hdr_sysv_shm {
	struct ckpt_hdr h;
	__s32 shared_objref; /* of the Shm */
	__u32 shmid;
	__u32 key;
	__u32 mode; /* permissions, and SHM_DEST */
	__u32 uid;
	__u32 gid;
	__u32 cuid;
	__u32 cgid;
} __attribute__((aligned(8)));

/*
 * A set of System V semaphores (semget(2)).
 */
struct ckpt_hdr_sysv_sem {
	struct ckpt_hdr h;
	__u32 semid;
	__u32 key;
	__u32 mode;
	__u32 uid;
	__u32 gid;
	__u32 cuid;
	__u32 cgid;
	__u32 reserved;
	__u32 values_len;
} __attribute__((aligned(8)));

/*
 * A System V message queue (msgget(2)); what waits in it follows as
 * SysvMessage.
 */
struct ckpt_hdr_sysv_queue {
	struct ckpt_hdr h;
	__u32 msqid;
	__u32 key;
	__u32 mode;
	__u32 uid;
	__u32 gid;
	__u32 cuid;
	__u32 cgid;
	__u32 reserved;
	__u64 limit; /* bytes, msg_qbytes */
} __attribute__((aligned(8)));

struct ckpt_hdr_sysv_message {
	struct ckpt_hdr h;
	__u32 msqid;
	__u32 reserved;
	__s64 kind; /* mtype */
	__u32 text_len;
} __attribute__((aligned(8)));

/*
 * A POSIX message queue (mq_overview(7)); what waits in it follows as
 * MqMessage. No two have one name.
 */
struct ckpt_hdr_mq_queue {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 removed; /* 1: its name was removed; who has it open still has it */
	__u32 mode; /* permissions */
	__u32 uid;
	__u32 gid;
	__u32 max_messages;
	__u32 message_size;
	__u32 reserved;
	__s64 atime; /* ns since the epoch */
	__s64 mtime;
	__u32 name_len;
} __attribute__((aligned(8)));

/*
 * The next message, in the order in which they are received.
 */
struct ckpt_hdr_mq_message {
	struct ckpt_hdr h;
	__s32 queue_objref;
	__u32 priority;
	__u32 text_len;
} __attribute__((aligned(8)));

/*
 * An inotify instance; what it watches follows.
 */
struct ckpt_hdr_inotify {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 reserved;
} __attribute__((aligned(8)));

struct ckpt_hdr_inotify_watch {
	struct ckpt_hdr h;
	__s32 inotify_objref;
	__s32 wd; /* its number, by which they are sorted */
	__u32 mask; /* events, IN_EXCL_UNLINK and IN_ONESHOT */
	__u32 reserved;
	__u32 path_len;
} __attribute__((aligned(8)));

/*
 * Who owns the inode of a File of kind PIPE, MEMFD or SOCKET, if that is not
 * root; the last one holds.
 */
struct ckpt_hdr_file_owner {
	struct ckpt_hdr h;
	__s32 owned_objref;
	__u32 reserved;
	__u32 uid;
	__u32 gid;
} __attribute__((aligned(8)));

enum ckpt_pty_flag {
	CKPT_PTY_FLAG_LOCKED = 0x1, /* TIOCSPTLCK: the slave cannot be opened */
	CKPT_PTY_FLAG_PACKET = 0x2, /* TIOCPKT */
	CKPT_PTY_FLAG_SLAVE_EXCLUSIVE = 0x4, /* TIOCEXCL */
	CKPT_PTY_FLAG_MASTER_EXCLUSIVE = 0x8,
	CKPT_PTY_FLAG_STOPPED = 0x10, /* output is stopped: TCOOFF, ^S */
	/* the slave was opened, and is no more: EIO at the master */
	CKPT_PTY_FLAG_SLAVE_CLOSED = 0x20,
	/* the master is closed: the slave is hung up, no PTY_MASTER refers to it */
	CKPT_PTY_FLAG_HUNG_UP = 0x40,
};

enum ckpt_pty_end {
	CKPT_PTY_END_NONE = 0, /* raw input, output, or a line that is being typed */
	CKPT_PTY_END_LINE = 1, /* a line, which ends with the last byte of data */
	CKPT_PTY_END_EOF = 2, /* a line that was ended by the character EOF, which is not in data */
};

/*
 * A pair of pseudo-terminals. It comes ahead of the Files that refer to it.
 */
struct ckpt_hdr_pty {
	struct ckpt_hdr h;
	__s32 objref;
	__u32 index; /* of /dev/pts/N: the copy must have the same one */
	__u32 flags; /* enum PtyFlag */
	__u32 status; /* what packet mode has still to tell the master (TIOCPKT_*) */
	__s32 session; /* pid of the leader of the session that it is the terminal of, or 0 */
	__s32 foreground; /* process group in the foreground, or 0 */
	__u32 uid; /* owner of /dev/pts/N */
	__u32 gid;
	__u32 mode; /* its permission bits */
	__u16 rows; /* struct winsize */
	__u16 columns;
	__u16 width;
	__u16 height;
	__u32 termios_len;
} __attribute__((aligned(8)));

/*
 * What waits in a Pty, in the order in which it is read. A line that is being
 * typed comes last.
 */
struct ckpt_hdr_pty_data {
	struct ckpt_hdr h;
	__s32 pty_objref;
	__u32 direction; /* 1: input, which the slave reads; 2: output, which the master reads */
	__u32 end; /* enum PtyEnd */
	__u32 data_len;
} __attribute__((aligned(8)));

#endif /* _UAPI_LINUX_CHECKPOINT_HDR_H */
