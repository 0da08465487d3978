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

#define CKPT_REV		1
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
	CKPT_HDR_MM = 401,
	CKPT_HDR_VMAS = 402,
	CKPT_HDR_PAGES = 403,
	CKPT_HDR_SHM = 404,
	CKPT_HDR_MAPPED_FILE = 405,
	CKPT_HDR_ROUND_MARK = 406,
	CKPT_HDR_NAME = 407,
	CKPT_HDR_FS = 451,
	CKPT_HDR_SIGHAND = 601,
	CKPT_HDR_SIGNAL = 602,
	CKPT_HDR_SIG_PENDING = 604,
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
};

enum ckpt_page_kind {
	CKPT_PAGE_KIND_DATA = 0, /* contents follow */
	CKPT_PAGE_KIND_ZERO = 1, /* reads as zeros; nothing follows */
	CKPT_PAGE_KIND_ABSENT = 2, /* dropped or never touched: whatever the mapping itself gives */
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
	__s32 objref; /* an Mm or a Shm */
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
	__u32 flags;
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

#endif /* _UAPI_LINUX_CHECKPOINT_HDR_H */
