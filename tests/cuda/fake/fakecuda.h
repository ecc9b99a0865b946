/* fakecuda.h: what the stand-in for libcuda.so.1 exports beside the driver's own functions, and the
 * environment variables that it reads when cuInit is called.
 *
 *   FAKECUDA_DEVICES=2            devices; 0: cuInit says that there is none (1)
 *   FAKECUDA_VERSION=12090        newest CUDA that the driver claims to know (13000)
 *   FAKECUDA_CAPABILITY=75        compute capability of all devices, 10 * major + minor (87)
 *   FAKECUDA_MEMORY=1000000       bytes of each device (4 GiB)
 *   FAKECUDA_INTEGRATED=1         their memory is said to be the host's (0)
 *   FAKECUDA_PROCESSORS=132       multiprocessors of each device (16)
 *   FAKECUDA_FAIL=cuMemAlloc_v2:3 the third call of this function fails with CUDA_ERROR_UNKNOWN;
 *                                 a third part is the number of another error. A function that
 *                                 releases something does so before it fails. `any` counts the
 *                                 calls of all functions but cuGetErrorName and cuGetErrorString.
 *
 * CUSIM_ORDER, which the simulator reads, sets the order of threads and blocks.
 */
#ifndef FAKECUDA_H
#define FAKECUDA_H

#ifdef __cplusplus
extern "C" {
#endif

/* Objects that were made and not released: allocations, streams, events, modules, graphs, and how
 * often contexts are retained. What went with its context, when that was released for the last
 * time, counts on. */
int fakecuda_leaks(void);

/* Faults of the caller that a real driver would not have noticed, each printed when it was found:
 * memory written beside its ends, host pointers given to a kernel, kernels whose first launch is
 * captured or that run after their module was unloaded, streams destroyed while they capture, races
 * that the simulator saw. */
int fakecuda_violations(void);

/* Calls of a function of the driver so far, also those that failed. */
int fakecuda_calls(const char *function);

/* The function of call `number`, from 1, as `any` counts them; empty beyond the last. */
const char *fakecuda_called(int number);

/* Reads the environment again and counts calls from 0 again, so that a process can try one fault or
 * one amount of memory after the other. The number of devices stays. */
void fakecuda_reread(void);

#ifdef __cplusplus
}
#endif

#endif
