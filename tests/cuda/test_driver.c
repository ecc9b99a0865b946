/* test_driver.c: the driver API as the core finds and uses it, on the stand-in for libcuda.so.1
 * (fake/fakecuda.h), and what the stand-in itself promises to find.
 *
 *     test_driver STAND_IN OLD_DRIVER
 *
 * The core loads one driver in the life of a process, so every claim is tested in a child.
 */
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/cuda_image.h"
#include "fake/fakecuda.h"
#include "fake/probe_args.h"
#include "test.h"

char test_sentence[512];
static const char *stand_in, *old_driver; /* paths */

typedef const char *claim(void); /* NULL if it holds, else what broke */

/* Runs a claim in a child with further environment variables, a list that NULL ends. */
static const char *in_child(claim *holds, const char *const *variables) {
    int ends[2];
    if (pipe(ends) != 0) return TEST_FAIL("no pipe");
    const pid_t child = fork();
    if (child == 0) {
        for (; variables && *variables; variables++) putenv((char *)(uintptr_t)*variables);
        const char *const broke = holds();
        const ssize_t written = broke ? write(ends[1], broke, strlen(broke)) : 0;
        _exit(broke ? 1 : written != 0);
    }
    close(ends[1]);
    const ssize_t n = read(ends[0], test_sentence, sizeof test_sentence - 1);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) return TEST_FAIL("died of signal %d", WTERMSIG(status));
    if (WEXITSTATUS(status) == 0) return NULL;
    test_sentence[n > 0 ? n : 0] = '\0';
    return test_sentence;
}

#define VARIABLES(...) ((const char *const[]){__VA_ARGS__, NULL})

static const char *expect_error(const char *sentence) {
    if (strcmp(kvq_error(), sentence) == 0) return NULL;
    return TEST_FAIL("\"%s\", expected \"%s\"", kvq_error(), sentence);
}

/* A function of the stand-in itself. */
static void *of_stand_in(const char *name) {
    void *const library = dlopen(stand_in, RTLD_NOW | RTLD_NOLOAD);
    return library ? dlsym(library, name) : NULL;
}

static int count_of(const char *name) {
    int (*count)(void);
    void *const symbol = of_stand_in(name);
    if (!symbol) return -1;
    memcpy(&count, &symbol, sizeof count);
    return count();
}

static int leaks(void) { return count_of("fakecuda_leaks"); }
static int violations(void) { return count_of("fakecuda_violations"); }

/* ---- no driver, no device ------------------------------------------------------------------- */

static const char *no_library(void) {
    kvq_device_info info;
    TEST_CHECK(kvq_device_count() == 0);
    const char *const sentence = "There is no CUDA driver: /no/such/libcuda.so: cannot open shared "
                                 "object file: No such file or directory.";
    const char *broke = expect_error(sentence);
    if (broke) return broke;
    TEST_CHECK(kvq_device_describe(0, &info) == KVQ_ERR_DEVICE);
    return expect_error(sentence);
}

static const char *old_library(void) {
    TEST_CHECK(kvq_device_count() == 0);
    return expect_error("The CUDA driver 10.2 lacks cuInit, which pykvq needs.");
}

static const char *foreign_library(void) {
    TEST_CHECK(kvq_device_count() == 0);
    return expect_error("The CUDA driver (of a version that it does not tell) lacks cuInit, which "
                        "pykvq needs.");
}

static const char *no_device(void) {
    TEST_CHECK(kvq_device_count() == 0);
    return expect_error("The CUDA driver 13.0 finds no device.");
}

static const char *test_absent(void) {
    const struct {
        claim *holds;
        const char *library, *devices;
    } cases[] = {
        {no_library, "/no/such/libcuda.so", "1"},
        {old_library, old_driver, "1"},
        {foreign_library, "libm.so.6", "1"},
        {no_device, stand_in, "0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char library[4200], devices[40];
        snprintf(library, sizeof library, "KVQ_LIBCUDA=%s", cases[i].library);
        snprintf(devices, sizeof devices, "FAKECUDA_DEVICES=%s", cases[i].devices);
        const char *const broke = in_child(cases[i].holds, VARIABLES(library, devices));
        if (broke) return broke;
    }
    return NULL;
}

/* ---- devices and their images --------------------------------------------------------------- */

static const char *three_devices(void) {
    kvq_device_info info;
    TEST_CHECK(kvq_device_count() == 3);
    TEST_CHECK(kvq_device_describe(3, &info) == KVQ_ERR_ARGUMENT);
    const char *broke = expect_error("CUDA device 3 does not exist; there are 3.");
    if (broke) return broke;
    TEST_CHECK(kvq_device_describe(-1, &info) == KVQ_ERR_ARGUMENT);
    TEST_CHECK(kvq_device_describe(2, &info) == KVQ_OK);
    TEST_CHECK(info.usable && info.index == 2 && strcmp(info.kind, "cuda") == 0);
    TEST_CHECK(strcmp(info.name, "Simulated device 2") == 0);
    TEST_CHECK(info.compute_capability == 87 && info.driver_version == 13000);
    TEST_CHECK(info.bytes_total == 1000000 && info.bytes_free == 1000000);
    TEST_CHECK(info.n_multiprocessors == 16 && info.bytes_shared == 163 << 10);
    TEST_CHECK(info.clock_khz == 1300000 && info.memory_clock_khz == 3200000);
    TEST_CHECK(info.memory_bus_bits == 256 && info.bytes_l2 == 4 << 20 && info.integrated);
    TEST_CHECK(leaks() == 0 && violations() == 0);
    return NULL;
}

static const char *test_devices(void) {
    return in_child(three_devices, VARIABLES("FAKECUDA_DEVICES=3", "FAKECUDA_MEMORY=1000000",
                                             "FAKECUDA_INTEGRATED=1"));
}

/* What the images of fake_images.c give to a driver and a device. */
static const struct {
    const char *version, *capability;
    const char *kernels; /* the toolkit of the image that is taken; NULL: none is, since */
    const char *why_not;
} choices[] = {
    {"13000", "87", "CUDA 13.0", NULL},
    {"13010", "90", "CUDA 13.0", NULL},
    {"13000", "120", "CUDA 13.0", NULL}, /* by its PTX */
    {"13000", "75", "CUDA 12.9", NULL},  /* not in the first image */
    {"12020", "87", "CUDA 12.9", NULL},  /* not for the first image */
    {"12090", "90", "CUDA 12.9", NULL},  /* by its PTX */
    {"12020", "90", NULL,
     "cuModuleLoadData of the kernels in cache.cu, built by CUDA 12.9, on CUDA device 0 (Simulated "
     "device 0): the provided PTX was compiled with an unsupported toolchain. "
     "(CUDA_ERROR_UNSUPPORTED_PTX_VERSION)."},
    {"11040", "87", NULL,
     "The CUDA driver 11.4 is older than 12.0, which the kernels of this build of pykvq need."},
    {"12020", "72", NULL,
     "CUDA device 0 (Simulated device 0) has compute capability 7.2, expected 7.5 or more."},
};
static size_t choice;

static const char *chosen_image(void) {
    kvq_device_info info;
    if (kvq_device_describe(0, &info) != KVQ_OK) return kvq_error();
    if (leaks() != 0) return TEST_FAIL("%d leaks", leaks());
    if (choices[choice].kernels) {
        if (!info.usable) return TEST_FAIL("not usable: %.400s", info.why_not);
        TEST_CHECK(info.kernels && strcmp(info.kernels, choices[choice].kernels) == 0);
        return NULL;
    }
    TEST_CHECK(!info.usable && !info.kernels);
    if (strcmp(info.why_not, choices[choice].why_not) == 0) return NULL;
    return TEST_FAIL("\"%.220s\", expected \"%.220s\"", info.why_not, choices[choice].why_not);
}

static const char *test_images(void) {
    for (choice = 0; choice < sizeof choices / sizeof *choices; choice++) {
        char version[40], capability[40];
        snprintf(version, sizeof version, "FAKECUDA_VERSION=%s", choices[choice].version);
        snprintf(capability, sizeof capability, "FAKECUDA_CAPABILITY=%s",
                 choices[choice].capability);
        const char *const broke = in_child(chosen_image, VARIABLES(version, capability));
        if (broke) {
            char copy[512];
            snprintf(copy, sizeof copy, "%s", broke);
            return TEST_FAIL("driver %s, device %s: %.400s", choices[choice].version,
                             choices[choice].capability, copy);
        }
    }
    return NULL;
}

/* ---- every call fails in turn --------------------------------------------------------------- */

static const char *failing; /* the function */

/* Of the end, about which nobody can do anything: the context is entered and left a second time. */
static bool closes(const char *function, int call) {
    return strcmp(function, "cuModuleUnload") == 0 ||
           strcmp(function, "cuDevicePrimaryCtxRelease") == 0 ||
           (call == 2 && (strcmp(function, "cuCtxPushCurrent") == 0 ||
                          strcmp(function, "cuCtxPopCurrent") == 0));
}

/* A described device is usable, or says in a sentence what failed; or nothing can be said of it
 * but that. Whichever it is, nothing is left behind. */
static const char *failure_is_told(void) {
    kvq_device_info info;
    const char *sentence = "";
    const kvq_status status = kvq_device_describe(0, &info);
    if (status != KVQ_OK) sentence = kvq_error();
    if (status == KVQ_OK && !info.usable) sentence = info.why_not;
    const bool stays = strcmp(failing, "cuCtxPushCurrent_v2:2") == 0; /* as releasing wants it */
    if (leaks() != 0 && !stays) return TEST_FAIL("%s fails: %d leaks", failing, leaks());
    int (*calls)(const char *);
    void *const symbol = of_stand_in("fakecuda_calls");
    TEST_CHECK(symbol);
    memcpy(&calls, &symbol, sizeof calls);
    char name[64];
    snprintf(name, sizeof name, "%s", failing);
    const int fail_at = atoi(strchr(failing, ':') + 1);
    *strchr(name, ':') = '\0';
    if (calls(name) < fail_at) return "no such call";
    const size_t length = strlen(sentence);
    char base[64]; /* the name without its version, as the sentence has it */
    snprintf(base, sizeof base, "%s", name);
    if (strlen(base) > 3 && strcmp(base + strlen(base) - 3, "_v2") == 0) {
        base[strlen(base) - 3] = '\0';
    }
    if (closes(base, fail_at)) return NULL;
    if (!strstr(sentence, base) || !strstr(sentence, "unknown error (CUDA_ERROR_UNKNOWN).") ||
        sentence[length - 1] != '.') {
        return TEST_FAIL("%s fails: \"%s\"", failing, sentence);
    }
    return NULL;
}

static const char *test_failures(void) {
    static const char *const functions[] = {
#define KVQ_CUDA_API(name, symbol, parameters) #symbol,
#include "cuda/cuda_api.def"
#undef KVQ_CUDA_API
    };
    int n_failures = 0;
    for (size_t f = 0; f < sizeof functions / sizeof *functions; f++) {
        for (int n = 1;; n++) {
            char variable[80];
            snprintf(variable, sizeof variable, "FAKECUDA_FAIL=%s:%d", functions[f], n);
            failing = variable + strlen("FAKECUDA_FAIL=");
            const char *const broke = in_child(failure_is_told, VARIABLES(variable));
            if (broke && strcmp(broke, "no such call") == 0) break;
            if (broke) return broke;
            n_failures++;
        }
    }
    /* 9 functions are called once, 2 twice, the others for each attribute, module and kernel. */
    const int expected = 9 + 2 * 2 + 9 + 2 * KVQ_CUDA_MODULES + KVQ_CUDA_KERNELS;
    if (n_failures != expected) return TEST_FAIL("%d failures, not %d", n_failures, expected);
    return NULL;
}

/* ---- what the stand-in finds ---------------------------------------------------------------- */

/* A context with a stream and the kernel of fake/probe.cu. */
typedef struct bench {
    const kvq_cuda_api *api;
    CUcontext context;
    kvq_cuda_kernels kernels;
    CUfunction probe;
    CUstream stream;
    CUdeviceptr memory; /* 64 numbers and no more */
} bench;

enum { N = 64, BLOCK = 32 };

static const char *setup(bench *b) {
    *b = (bench){0};
    if (kvq_cuda_api_get(&b->api) != KVQ_OK) return kvq_error();
    TEST_CHECK(b->api->cuDevicePrimaryCtxRetain(&b->context, 0) == CUDA_SUCCESS);
    TEST_CHECK(b->api->cuCtxPushCurrent(b->context) == CUDA_SUCCESS);
    if (kvq_cuda_kernels_open(&b->kernels, b->api, "device 0") != KVQ_OK) return kvq_error();
    TEST_CHECK(b->api->cuModuleGetFunction(&b->probe, b->kernels.modules[0], "kvq_cuda_probe") ==
               CUDA_SUCCESS);
    TEST_CHECK(b->api->cuStreamCreate(&b->stream, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS);
    TEST_CHECK(b->api->cuMemAlloc(&b->memory, N * sizeof(uint32_t)) == CUDA_SUCCESS);
    return NULL;
}

static CUresult launch_with(bench *b, probe_args *args, unsigned shared_bytes, CUstream stream) {
    return b->api->cuLaunchKernel(b->probe, N / BLOCK + 1, 1, 1, BLOCK, 1, 1, shared_bytes, stream,
                                  (void *[]){args}, NULL);
}

static CUresult launch(bench *b, uint32_t value) {
    probe_args args = {(uint32_t *)(uintptr_t)b->memory, N, value};
    const CUresult result = launch_with(b, &args, BLOCK * sizeof(uint32_t), b->stream);
    memset(&args, 0xee, sizeof args); /* the driver has copied it */
    return result;
}

static CUresult fetch(bench *b, uint32_t *out) {
    return b->api->cuMemcpyDtoHAsync(out, b->memory, N * sizeof *out, b->stream);
}

static const char *teardown(bench *b, int expected_violations) {
    if (b->memory) TEST_CHECK(b->api->cuMemFree(b->memory) == CUDA_SUCCESS);
    TEST_CHECK(b->api->cuStreamDestroy(b->stream) == CUDA_SUCCESS);
    kvq_cuda_kernels_close(&b->kernels, b->api);
    TEST_CHECK(leaks() == 1); /* the context */
    TEST_CHECK(b->api->cuDevicePrimaryCtxRelease(0) == CUDA_SUCCESS);
    TEST_CHECK(leaks() == 0);
    if (violations() != expected_violations) return TEST_FAIL("%d violations", violations());
    return NULL;
}

static const char *launches_run_when_waited_for(void) {
    bench b;
    uint32_t out[N] = {7, 7};
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(fetch(&b, out) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamSynchronize(b.stream) == CUDA_SUCCESS);
    TEST_CHECK(out[0] == 0xffffffff); /* memory that nobody wrote */
    TEST_CHECK(launch(&b, 100) == CUDA_SUCCESS && fetch(&b, out) == CUDA_SUCCESS);
    TEST_CHECK(out[0] == 0xffffffff);
    TEST_CHECK(b.api->cuStreamSynchronize(b.stream) == CUDA_SUCCESS);
    for (uint32_t i = 0; i < N; i++) TEST_CHECK(out[i] == 100 + i);
    return teardown(&b, 0);
}

static const char *graphs_replay(void) {
    bench b;
    CUgraph graph;
    CUgraphExec executable;
    uint32_t out[N] = {7};
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(launch(&b, 4) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamBeginCapture(b.stream, CU_STREAM_CAPTURE_MODE_RELAXED) ==
               CUDA_SUCCESS);
    TEST_CHECK(launch(&b, 5) == CUDA_SUCCESS && fetch(&b, out) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamEndCapture(b.stream, &graph) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuGraphInstantiate(&executable, graph, 0) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuGraphDestroy(graph) == CUDA_SUCCESS);
    for (int i = 0; i < 2; i++) {
        memset(out, 0, sizeof out);
        TEST_CHECK(launch(&b, 1) == CUDA_SUCCESS);
        TEST_CHECK(b.api->cuGraphLaunch(executable, b.stream) == CUDA_SUCCESS);
        TEST_CHECK(out[1] == 0);
        TEST_CHECK(b.api->cuStreamSynchronize(b.stream) == CUDA_SUCCESS);
        TEST_CHECK(out[1] == 6);
    }
    TEST_CHECK(b.api->cuGraphExecDestroy(executable) == CUDA_SUCCESS);
    return teardown(&b, 0);
}

/* What may wait for a capture ends it, unless that is relaxed; what does wait for it always. */
static const char *captures_break(void) {
    bench b;
    CUgraph graph;
    CUdeviceptr more;
    const CUstreamCaptureMode thread_local_mode = (CUstreamCaptureMode)1;
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(b.api->cuStreamBeginCapture(b.stream, thread_local_mode) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuMemAlloc(&more, 4) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamEndCapture(b.stream, &graph) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamBeginCapture(b.stream, CU_STREAM_CAPTURE_MODE_RELAXED) ==
               CUDA_SUCCESS);
    TEST_CHECK(b.api->cuMemAlloc(&more, 4) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuMemFree(more) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamEndCapture(b.stream, &graph) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuGraphDestroy(graph) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamBeginCapture(b.stream, CU_STREAM_CAPTURE_MODE_RELAXED) ==
               CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamSynchronize(b.stream) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamEndCapture(b.stream, &graph) != CUDA_SUCCESS);
    return teardown(&b, 0);
}

static const char *first_launches_in_captures_are_found(void) {
    bench b;
    CUgraph graph;
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(b.api->cuStreamBeginCapture(b.stream, CU_STREAM_CAPTURE_MODE_RELAXED) ==
               CUDA_SUCCESS);
    TEST_CHECK(launch(&b, 5) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamEndCapture(b.stream, &graph) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuGraphDestroy(graph) == CUDA_SUCCESS);
    return teardown(&b, 1);
}

typedef struct CUevent_st *CUevent;

/* Those that bench/copy_speed.py calls; the core calls none of them. */
static struct {
    CUresult (*create)(CUevent *event, unsigned flags);
    CUresult (*record)(CUevent event, CUstream stream);
    CUresult (*synchronize)(CUevent event);
    CUresult (*elapsed)(float *milliseconds, CUevent first, CUevent last);
    CUresult (*destroy)(CUevent event);
} events;

static bool find(void *function, const char *name) {
    void *const symbol = of_stand_in(name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static const char *events_measure(void) {
    bench b;
    CUevent first, last;
    float milliseconds = -1;
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(find(&events.create, "cuEventCreate") && find(&events.record, "cuEventRecord") &&
               find(&events.synchronize, "cuEventSynchronize") &&
               find(&events.elapsed, "cuEventElapsedTime") &&
               find(&events.destroy, "cuEventDestroy_v2"));
    TEST_CHECK(events.create(&first, 0) == CUDA_SUCCESS);
    TEST_CHECK(events.create(&last, 0) == CUDA_SUCCESS);
    TEST_CHECK(events.record(first, b.stream) == CUDA_SUCCESS);
    TEST_CHECK(launch(&b, 1) == CUDA_SUCCESS);
    TEST_CHECK(events.record(last, b.stream) == CUDA_SUCCESS);
    TEST_CHECK(events.elapsed(&milliseconds, first, last) != CUDA_SUCCESS);
    TEST_CHECK(events.synchronize(last) == CUDA_SUCCESS);
    TEST_CHECK(events.elapsed(&milliseconds, first, last) == CUDA_SUCCESS);
    TEST_CHECK(milliseconds > 0);
    TEST_CHECK(events.destroy(first) == CUDA_SUCCESS);
    TEST_CHECK(events.destroy(last) == CUDA_SUCCESS);
    return teardown(&b, 0);
}

static const char *shared_memory_is_limited(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    const unsigned unasked = (48 << 10) - PROBE_SHARED, more = unasked + 16;
    const int most = (163 << 10) - PROBE_SHARED;
    const CUfunction_attribute limit = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    probe_args args = {(uint32_t *)(uintptr_t)b.memory, N, 1};
    TEST_CHECK(launch_with(&b, &args, unasked, b.stream) == CUDA_SUCCESS);
    TEST_CHECK(launch_with(&b, &args, more, b.stream) == CUDA_ERROR_INVALID_VALUE);
    TEST_CHECK(b.api->cuFuncSetAttribute(b.probe, limit, most + 1) == CUDA_ERROR_INVALID_VALUE);
    TEST_CHECK(b.api->cuFuncSetAttribute(b.probe, limit, most) == CUDA_SUCCESS);
    TEST_CHECK(launch_with(&b, &args, more, b.stream) == CUDA_SUCCESS);
    return teardown(&b, 0);
}

static const char *launch_bounds_hold(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    for (unsigned threads = PROBE_THREADS; threads <= PROBE_THREADS + 1; threads++) {
        probe_args args = {(uint32_t *)(uintptr_t)b.memory, N, 1};
        const CUresult result =
            b.api->cuLaunchKernel(b.probe, 1, 1, 1, threads, 1, 1, threads * sizeof(uint32_t),
                                  b.stream, (void *[]){&args}, NULL);
        TEST_CHECK(result == (threads > PROBE_THREADS ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS));
    }
    return teardown(&b, 0);
}

static const char *functions_end_with_their_module(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    const CUfunction_attribute limit = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    TEST_CHECK(launch(&b, 1) == CUDA_SUCCESS);
    kvq_cuda_kernels_close(&b.kernels, b.api);
    TEST_CHECK(launch(&b, 1) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuFuncSetAttribute(b.probe, limit, 16) != CUDA_SUCCESS);
    TEST_CHECK(violations() == 0);
    TEST_CHECK(b.api->cuStreamSynchronize(b.stream) != CUDA_SUCCESS); /* of the first launch */
    TEST_CHECK(violations() == 1);
    return NULL;
}

static const char *streams_that_capture_are_not_destroyed(void) {
    bench b;
    CUgraph graph;
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(b.api->cuStreamBeginCapture(b.stream, CU_STREAM_CAPTURE_MODE_RELAXED) ==
               CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamDestroy(b.stream) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamEndCapture(b.stream, &graph) != CUDA_SUCCESS);
    return teardown(&b, 1);
}

static const char *contexts_end_with_all_that_is_in_them(void) {
    bench b;
    CUdeviceptr more;
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(b.api->cuDevicePrimaryCtxRelease(0) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuMemAlloc(&more, 4) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuCtxPushCurrent(b.context) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuDevicePrimaryCtxRetain(&b.context, 0) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuCtxPushCurrent(b.context) == CUDA_SUCCESS);
    TEST_CHECK(launch(&b, 1) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuStreamSynchronize(b.stream) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuMemFree(b.memory) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuModuleUnload(b.kernels.modules[0]) != CUDA_SUCCESS);
    TEST_CHECK(b.api->cuDevicePrimaryCtxRelease(0) == CUDA_SUCCESS);
    TEST_CHECK(leaks() == 2 + KVQ_CUDA_MODULES); /* a stream and memory: nobody released them */
    TEST_CHECK(violations() == 0);
    return NULL;
}

static const char *addresses_are_aligned_as_promised(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    TEST_CHECK(b.memory % 256 == 0 && b.memory % 512 != 0);
    return teardown(&b, 0);
}

static const char *writes_behind_the_end_are_found(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    probe_args args = {(uint32_t *)(uintptr_t)b.memory, N + 1, 1};
    TEST_CHECK(launch_with(&b, &args, BLOCK * sizeof(uint32_t), b.stream) == CUDA_SUCCESS);
    TEST_CHECK(b.api->cuMemFree(b.memory) != CUDA_SUCCESS);
    b.memory = 0;
    return teardown(&b, 1);
}

static const char *pointers_of_the_host_are_found(void) {
    bench b;
    uint32_t on_host[N];
    const char *const broke = setup(&b);
    if (broke) return broke;
    probe_args args = {on_host, N, 1};
    TEST_CHECK(launch_with(&b, &args, BLOCK * sizeof(uint32_t), b.stream) == CUDA_SUCCESS);
    return teardown(&b, 1);
}

static const char *default_stream_is_refused(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    probe_args args = {(uint32_t *)(uintptr_t)b.memory, N, 1};
    TEST_CHECK(launch_with(&b, &args, BLOCK * sizeof(uint32_t), NULL) != CUDA_SUCCESS);
    return teardown(&b, 1);
}

static const char *memory_runs_out(void) {
    bench b;
    CUdeviceptr more = 0;
    const char *const broke = setup(&b);
    if (broke) return broke;
    const CUresult result = b.api->cuMemAlloc(&more, 1000000);
    TEST_CHECK(kvq_cuda_check(b.api, result, "cuMemAlloc of %d bytes for logits", 1000000) ==
               KVQ_ERR_MEMORY);
    const char *const other = expect_error(
        "cuMemAlloc of 1000000 bytes for logits: out of memory (CUDA_ERROR_OUT_OF_MEMORY).");
    return other ? other : teardown(&b, 0);
}

static const char *host_reads_device_memory(void) {
    bench b;
    const char *const broke = setup(&b);
    if (broke) return broke;
    return *(volatile uint32_t *)(uintptr_t)b.memory ? "it could" : "it could, and read 0";
}

static const char *test_host_access(void) {
    const char *const broke = in_child(host_reads_device_memory, NULL);
    return broke && strcmp(broke, "died of signal 11") == 0 ? NULL : "no crash";
}

static const char *test_stand_in(void) {
    claim *const claims[] = {
        launches_run_when_waited_for,
        graphs_replay,
        captures_break,
        first_launches_in_captures_are_found,
        events_measure,
        shared_memory_is_limited,
        launch_bounds_hold,
        functions_end_with_their_module,
        streams_that_capture_are_not_destroyed,
        contexts_end_with_all_that_is_in_them,
        addresses_are_aligned_as_promised,
        writes_behind_the_end_are_found,
        pointers_of_the_host_are_found,
        default_stream_is_refused,
        memory_runs_out,
    };
    for (size_t i = 0; i < sizeof claims / sizeof *claims; i++) {
        const char *const broke = in_child(claims[i], VARIABLES("FAKECUDA_MEMORY=1000000"));
        if (broke) return broke;
    }
    return NULL;
}

static const kvq_test tests[] = {
    {"driver: what is missing is said in a sentence", test_absent},
    {"driver: devices describe themselves", test_devices},
    {"driver: the first image that the driver and the device take is loaded", test_images},
    {"driver: every call that fails is told, and leaks nothing", test_failures},
    {"stand-in: streams, graphs, events and limits are those of a driver", test_stand_in},
    {"stand-in: the host cannot read device memory", test_host_access},
};

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s STAND_IN OLD_DRIVER\n", argv[0]);
        return 2;
    }
    stand_in = argv[1];
    old_driver = argv[2];
    setenv("KVQ_LIBCUDA", stand_in, 1);
    int failed = 0;
    const int n = (int)(sizeof tests / sizeof *tests);
    for (int i = 0; i < n; i++) {
        const char *const broke = tests[i].run();
        if (broke) printf("FAILED %s\n       %s\n", tests[i].name, broke);
        failed += broke != NULL;
    }
    printf("%d passed, %d failed\n", n - failed, failed);
    return failed != 0;
}
