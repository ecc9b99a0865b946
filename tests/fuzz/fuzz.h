/* fuzz.h: what a fuzz target defines, and libFuzzer or fuzz_main.c calls. */
#ifndef KVQ_FUZZ_H
#define KVQ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* Must take any bytes; a broken promise of the code under test aborts. Returns 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Inputs that the reader took for a valid file, and of these, that opened as a model: without some,
 * a run has tested little. */
extern unsigned long fuzz_accepted, fuzz_bound;

#endif
