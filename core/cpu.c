/* cpu.c: the instruction sets, best first, and the choice among them; processors. */
#include "isa/isa.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#if defined(_WIN32)
#include <windows.h>
#else
#include <sched.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
bool kvq_cpu_has_avx2(void) { /* F16C by cpuid: clang's builtin does not know its name */
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool kvq_cpu_has_avx512(void) { /* the builtin asks the system too: does it save these registers? */
    return kvq_cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(__aarch64__) || defined(_M_ARM64)
bool kvq_cpu_has_dotprod(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
#elif defined(_WIN32)
    enum { ARM_V82_DP_INSTRUCTIONS = 43 }; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE of newer SDKs */
    return IsProcessorFeaturePresent(ARM_V82_DP_INSTRUCTIONS);
#elif defined(__ARM_FEATURE_DOTPROD)
    return true; /* the whole program is compiled for it */
#else
    return false;
#endif
}
#endif

static bool always(void) { return true; }

static void softmax_reference(float *s, float *largest, float *sum, int n, int n_blocks) {
    for (int i = 0; i < n; i++) {
        for (int b = 0; b < n_blocks; b++) {
            const float *const x = s + (b * n + i) * KVQ_BLOCK;
            for (int t = 0; t < KVQ_BLOCK; t++) largest[i] = fmaxf(largest[i], x[t]);
        }
        sum[i] = 0;
        for (int b = 0; b < n_blocks; b++) {
            float *const x = s + (b * n + i) * KVQ_BLOCK;
            for (int t = 0; t < KVQ_BLOCK; t++) {
                x[t] = x[t] == -INFINITY ? 0.0f : exp2f(x[t] - largest[i]);
                sum[i] += x[t];
            }
        }
    }
}

static void swiglu_reference(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

const kvq_isa kvq_isa_ref = {
    .name = "ref", .supported = always, .softmax = softmax_reference, .swiglu = swiglu_reference};

static const kvq_isa *const best_first[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &kvq_isa_avx512,
    &kvq_isa_avx2,
#elif defined(__aarch64__) || defined(_M_ARM64)
    &kvq_isa_neon,
#endif
    &kvq_isa_ref,
};
enum { N_ISA = sizeof best_first / sizeof *best_first };

const char *kvq_isa_available(void) {
    static _Thread_local char names[64];
    size_t used = 0;
    for (int i = 0; i < N_ISA; i++) {
        if (!best_first[i]->supported()) continue;
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? "," : "",
                                 best_first[i]->name);
    }
    return names;
}

kvq_status kvq_isa_choose(const kvq_isa **out) {
    const char *const wanted = getenv("KVQ_ISA");
    for (int i = 0; i < N_ISA; i++) {
        if (wanted && *wanted && strcmp(wanted, best_first[i]->name) != 0) continue;
        if (!best_first[i]->supported()) continue;
        *out = best_first[i];
        return KVQ_OK;
    }
    return kvq_fail(
        KVQ_ERR_ARGUMENT,
        "the environment variable KVQ_ISA is \"%.32s\", but the instruction sets available "
        "here are: %s",
        wanted ? wanted : "", kvq_isa_available());
}

kvq_status kvq_isa_selected(const char **name) {
    const kvq_isa *isa = NULL;
    const kvq_status status = kvq_isa_choose(&isa);
    if (status == KVQ_OK) *name = isa->name;
    return status;
}

int kvq_cpu_count(void) {
#if defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
#else
#if defined(__linux__)
    cpu_set_t allowed; /* a container or taskset may grant fewer than there are */
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
#endif
}

bool kvq_cpu_pin(int i) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return false;
    int skipped = i % CPU_COUNT(&allowed), cpu = 0;
    for (;; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && skipped-- == 0) break;
    }
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    return sched_setaffinity(0, sizeof one, &one) == 0;
#else
    (void)i;
    return false;
#endif
}
