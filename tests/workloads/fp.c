// SPDX-License-Identifier: Apache-2.0
/*
 * fp OUTFILE: vector and floating point registers that hold values for a long time.
 *
 * Each turn loads every register, spins for some milliseconds without touching them, stores them,
 * and compares. AVX and AVX-512 are used where the processor has them. Also kept: rounding mode and
 * masks in MXCSR and in the x87 control word, x87 registers, general registers.
 */
#define _GNU_SOURCE
#include <fenv.h>
#include <sys/auxv.h>

#include "workload.h"

static uint64_t wanted[32 * 8] __attribute__((aligned(64)));
static uint64_t found[32 * 8] __attribute__((aligned(64)));

#define LOAD(op, reg, n, width) op " " #n "*" #width "(%[in]), %%" reg #n "\n"
#define STORE(op, reg, n, width) op " %%" reg #n ", " #n "*" #width "(%[out])\n"
#define SIXTEEN(what, op, reg, width)                                                        \
	what(op, reg, 0, width) what(op, reg, 1, width) what(op, reg, 2, width)              \
	what(op, reg, 3, width) what(op, reg, 4, width) what(op, reg, 5, width)              \
	what(op, reg, 6, width) what(op, reg, 7, width) what(op, reg, 8, width)              \
	what(op, reg, 9, width) what(op, reg, 10, width) what(op, reg, 11, width)            \
	what(op, reg, 12, width) what(op, reg, 13, width) what(op, reg, 14, width)           \
	what(op, reg, 15, width)
#define REST(what, op, reg, width)                                                           \
	what(op, reg, 16, width) what(op, reg, 17, width) what(op, reg, 18, width)           \
	what(op, reg, 19, width) what(op, reg, 20, width) what(op, reg, 21, width)           \
	what(op, reg, 22, width) what(op, reg, 23, width) what(op, reg, 24, width)           \
	what(op, reg, 25, width) what(op, reg, 26, width) what(op, reg, 27, width)           \
	what(op, reg, 28, width) what(op, reg, 29, width) what(op, reg, 30, width)           \
	what(op, reg, 31, width)
#define SPIN "1: pause\n dec %[spins]\n jnz 1b\n"
#define XMM_CLOBBERS                                                                         \
	"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",      \
		"xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc"

static void hold_sse(long spins)
{
	asm volatile(SIXTEEN(LOAD, "movaps", "xmm", 16) SPIN SIXTEEN(STORE, "movaps", "xmm", 16)
		     : [spins] "+r"(spins)
		     : [in] "r"(wanted), [out] "r"(found)
		     : XMM_CLOBBERS);
}

__attribute__((target("avx"))) static void hold_avx(long spins)
{
	asm volatile(SIXTEEN(LOAD, "vmovaps", "ymm", 32) SPIN SIXTEEN(STORE, "vmovaps", "ymm", 32) "vzeroupper\n"
		     : [spins] "+r"(spins)
		     : [in] "r"(wanted), [out] "r"(found)
		     : XMM_CLOBBERS);
}

__attribute__((target("avx512f"))) static void hold_avx512(long spins)
{
	asm volatile(SIXTEEN(LOAD, "vmovaps", "zmm", 64) REST(LOAD, "vmovaps", "zmm", 64)
		     "kmovw (%[in]), %%k1\n kmovw 2(%[in]), %%k7\n"
		     SPIN
		     SIXTEEN(STORE, "vmovaps", "zmm", 64) REST(STORE, "vmovaps", "zmm", 64)
		     "kmovw %%k1, (%[out])\n kmovw %%k7, 2(%[out])\n vzeroupper\n"
		     : [spins] "+r"(spins)
		     : [in] "r"(wanted), [out] "r"(found)
		     : XMM_CLOBBERS, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
		       "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k7");
}

/* Six values wait on the x87 stack and four in general registers. */
static void hold_x87(long spins)
{
	double out[6];
	uint64_t r12, r13, r14, r15;

	asm volatile("fld1\n fldpi\n fldl2e\n fldln2\n fldlg2\n fldl2t\n"
		     "movabs $0x1212121212121212, %%r12\n movabs $0x1313131313131313, %%r13\n"
		     "movabs $0x1414141414141414, %%r14\n movabs $0x1515151515151515, %%r15\n" SPIN
		     "fstpl 40(%[out])\n fstpl 32(%[out])\n fstpl 24(%[out])\n"
		     "fstpl 16(%[out])\n fstpl 8(%[out])\n fstpl (%[out])\n"
		     "mov %%r12, %[a]\n mov %%r13, %[b]\n mov %%r14, %[c]\n mov %%r15, %[d]\n"
		     : [spins] "+r"(spins), [a] "=m"(r12), [b] "=m"(r13), [c] "=m"(r14), [d] "=m"(r15)
		     : [out] "r"(out)
		     : "r12", "r13", "r14", "r15", "memory", "cc");
	CHECK(out[0] == 1.0 && out[1] > 3.14159 && out[1] < 3.14160 && out[2] > 1.44 && out[3] > 0.69 &&
		      out[4] > 0.30 && out[5] > 3.32,
	      "x87 stack: %g %g %g %g %g %g", out[0], out[1], out[2], out[3], out[4], out[5]);
	CHECK(r12 == 0x1212121212121212 && r13 == 0x1313131313131313 && r14 == 0x1414141414141414 &&
		      r15 == 0x1515151515151515,
	      "general registers: %lx %lx %lx %lx", (long)r12, (long)r13, (long)r14, (long)r15);
}

static void turn(const char *name, void (*hold)(long), int words, unsigned long seed)
{
	for (int i = 0; i < words; i++)
		wanted[i] = wl_mix(seed * 1000 + i);
	memset(found, 0, sizeof(found));
	hold(200000);
	for (int i = 0; i < words; i++)
		CHECK(found[i] == wanted[i], "%s word %d: %016lx, not %016lx", name, i, (long)found[i],
		      (long)wanted[i]);
}

int main(int argc, char **argv)
{
	unsigned long ticks;
	volatile double one = 1.0, three = 3.0;
	double rounded_up;
	int avx, avx512;

	wl_start(argc, argv);
	avx = __builtin_cpu_supports("avx");
	avx512 = __builtin_cpu_supports("avx512f");
	fesetround(FE_UPWARD);
	rounded_up = one / three;
	wl_ready();
	for (ticks = 1; !wl_stopping; ticks++) {
		turn("sse", hold_sse, 32, ticks);
		if (avx)
			turn("avx", hold_avx, 64, ticks);
		if (avx512)
			turn("avx512", hold_avx512, 256, ticks);
		hold_x87(200000);
		CHECK(fegetround() == FE_UPWARD, "rounding mode %d", fegetround());
		CHECK(one / three == rounded_up, "1/3 is %.17g, was %.17g", one / three, rounded_up);
		wl_line("tick %lu avx %d avx512 %d", ticks, avx != 0, avx512 != 0);
		wl_sleep_us(20000);
	}
	wl_ok();
}
