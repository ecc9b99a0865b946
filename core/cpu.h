/* cpu.h: what the core asks of the machine. */
#ifndef KVQ_CPU_H
#define KVQ_CPU_H

#include <stdbool.h>

int kvq_cpu_count(void); /* processors that this process may use */

/* Keeps the calling thread on the i-th of them, counted on from the first beyond the last; false
 * where the system has no call for it, or refuses. */
bool kvq_cpu_pin(int i);

/* AVX2, FMA and F16C; these and AVX-512 F, BW, DQ, VL and VNNI. Asked here, since a file compiled
 * for them must not run before the answer. */
bool kvq_cpu_has_avx2(void);
bool kvq_cpu_has_avx512(void);

/* NEON's dot products of bytes (FEAT_DotProd); NEON itself every 64-bit ARM processor has. */
bool kvq_cpu_has_dotprod(void);

#endif
