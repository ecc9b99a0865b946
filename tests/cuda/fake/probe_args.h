/* probe_args.h: what kvq_cuda_probe (probe.cu) takes. */
#ifndef PROBE_ARGS_H
#define PROBE_ARGS_H

#include <stdint.h>

enum {
    PROBE_THREADS = 64,  /* at most */
    PROBE_SHARED = 1024, /* bytes of static shared memory */
};

typedef struct probe_args {
    uint32_t *out; /* [n], on the device */
    uint32_t n, value;
} probe_args;

#endif
