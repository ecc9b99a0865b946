/* test_defects.cpp: each checker finds the defects that it is there for, and nothing in the kernel
 * without one. The argument is the variant: o2, asan or race.
 *
 * A case runs in a child process, since ASan ends it. What must be seen is a part of its output: a
 * report of the simulator or of ASan, or "wrong result".
 */
#include "cusim.h"
#include "defects_args.h"
#ifdef KVQ_RACE
#include "race.h"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

using cusim::Order;

struct Case {
    int defect;
    const char *what;
    const char *variant; // that must find it
    const char *found;   // NULL: the run must be clean
    int n, n_part;       // tokens, of a block
    Order order;
};

const Case cases[] = {
    {0, "no defect", "o2", nullptr, 150, 64, Order::forward},
    {0, "no defect", "o2", nullptr, 150, 64, Order::reverse},
    {0, "no defect", "o2", nullptr, 150, 64, Order::random},
    {0, "no defect", "asan", nullptr, 150, 64, Order::forward},
    {0, "no defect", "asan", nullptr, 150, 64, Order::random},
    {0, "no defect", "race", nullptr, 150, 64, Order::forward},
    {0, "no defect", "race", nullptr, 150, 64, Order::reverse},
    {0, "no defect", "race", nullptr, 150, 64, Order::random},
    {1, "no barrier between write and read", "race", "race on shared memory", 1, 32,
     Order::forward},
    {1, "no barrier between write and read", "o2", "wrong result", 64, 64, Order::forward},
    {2, "no barrier between read and the next write", "race", "race on shared memory", 64, 64,
     Order::forward},
    {2, "no barrier between read and the next write", "o2", "wrong result", 64, 64, Order::reverse},
    {3, "dynamic shared memory overrun", "asan", "heap-buffer-overflow", 32, 32, Order::forward},
    {4, "static shared memory overrun", "asan", "global-buffer-overflow", 32, 32, Order::forward},
    {5, "a barrier that some threads skip", "o2", "divergent __syncthreads", 64, 64,
     Order::forward},
    {6, "shared memory never written", "race", "shared memory read before it is written", 32, 32,
     Order::forward},
    {6, "shared memory never written", "o2", "wrong result", 32, 32, Order::forward},
    {7, "a mask that names absent lanes", "o2", "__shfl_xor_sync", 32, 32, Order::forward},
    {8, "copies not waited for", "o2", "asynchronous copies that it did not wait for", 32, 32,
     Order::forward},
    {8, "copies not waited for", "o2", "wrong result", 32, 32, Order::forward},
    {8, "copies not waited for", "race", "is in flight", 32, 32, Order::forward},
    {9, "global memory overrun", "asan", "heap-buffer-overflow", 64, 64, Order::forward},
    {10, "all lanes in one bank", "race", "bank conflict: ", 32, 32, Order::forward},
    {11, "blocks write to one place", "race", "of another block", 64, 32, Order::forward},
};

/* Of exactly this size, so that ASan sees what lies behind. */
struct Memory {
    explicit Memory(size_t n) : size(n), data(static_cast<float *>(malloc(n * sizeof(float)))) {
        for (size_t i = 0; i < n; i++) data[i] = NAN;
    }
    ~Memory() { free(data); }
    Memory(const Memory &) = delete;
    void fill(uint32_t seed) {
        for (size_t i = 0; i < size; i++) {
            seed = seed * 1664525 + 1013904223;
            data[i] = (float)(seed >> 8) / 8388608.0f - 1;
        }
    }
    size_t size;
    float *data;
};

bool run_without_conflicts([[maybe_unused]] const cusim::Kernel &kernel, const Case &c,
                           kvq_toy_args *arguments) {
    void *parameters[] = {arguments};
    const unsigned n_blocks = (unsigned)((c.n + c.n_part - 1) / c.n_part);
    const size_t shared = KVQ_TOY_TILE * KVQ_TOY_D * sizeof(float);
    bool good = cusim::launch(kernel, n_blocks, KVQ_TOY_D, shared, parameters);
#ifdef KVQ_RACE
    for (const cusim::MemoryUse &use : cusim::take_memory_use()) {
        if (!use.shared || use.cost <= 4 * use.least_cost) continue;
        fprintf(stderr, "bank conflict: %.1f passes where %.1f would do, at %s\n",
                (double)use.cost / (double)use.requests,
                (double)use.least_cost / (double)use.requests, use.place.c_str());
        good = false;
    }
#endif
    return good;
}

/* Runs the kernel and compares it with the definition of attention. True if all is well. */
bool run(const Case &c) {
    cusim::options.order = c.order;
    const size_t d = KVQ_TOY_D, n = (size_t)c.n, n_blocks = (n + c.n_part - 1) / c.n_part;
    Memory query(d), keys(n * d), values(n * d), sums(n_blocks * d), most(n_blocks),
        weight(n_blocks);
    query.fill(1);
    keys.fill(2);
    values.fill(3);
    const std::string name = "kvq_toy_" + std::to_string(c.defect);
    const cusim::Kernel *kernel = cusim::find_kernel(name);
    if (!kernel) {
        fprintf(stderr, "there is no kernel %s\n", name.c_str());
        return false;
    }
    kvq_toy_args arguments = {query.data, keys.data,   values.data, sums.data,
                              most.data,  weight.data, c.n,         c.n_part};
    bool good = run_without_conflicts(*kernel, c, &arguments);

    for (size_t channel = 0; channel < d; channel++) {
        double exact = 0, exact_weight = 0, sum = 0, sum_weight = 0, highest = -INFINITY;
        for (size_t i = 0; i < n; i++) {
            double score = 0;
            for (size_t j = 0; j < d; j++) score += (double)query.data[j] * keys.data[i * d + j];
            exact += exp(score) * values.data[i * d + channel];
            exact_weight += exp(score);
        }
        for (size_t b = 0; b < n_blocks; b++) highest = fmax(highest, most.data[b]);
        for (size_t b = 0; b < n_blocks; b++) {
            const double scale = exp(most.data[b] - highest);
            sum += scale * sums.data[b * d + channel];
            sum_weight += scale * weight.data[b];
        }
        if (fabs(sum / sum_weight - exact / exact_weight) < 1e-5) continue;
        fprintf(stderr, "wrong result: %g instead of %g in channel %zu\n", sum / sum_weight,
                exact / exact_weight, channel);
        return false;
    }
    return good;
}

/* What a child that runs the case writes to stderr; `good` is how it ended. */
std::string run_apart(const Case &c, bool *good) {
    int ends[2];
    if (pipe(ends) != 0) {
        perror("pipe");
        exit(2);
    }
    fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        exit(run(c) ? 0 : 1);
    }
    close(ends[1]);
    std::string output;
    char bytes[4096];
    for (ssize_t n; (n = read(ends[0], bytes, sizeof bytes)) > 0;) output.append(bytes, (size_t)n);
    close(ends[0]);
    int status = -1;
    waitpid(child, &status, 0);
    *good = status == 0;
    return output;
}

} // namespace

int main(int n_arguments, char **arguments) {
    if (n_arguments != 2) {
        fprintf(stderr, "usage: test_defects o2|asan|race\n");
        return 2;
    }
#ifdef KVQ_RACE
    cusim::measure_memory = true;
#endif
    int n_passed = 0, n_failed = 0;
    for (const Case &c : cases) {
        if (strcmp(c.variant, arguments[1]) != 0) continue;
        bool good;
        const std::string output = run_apart(c, &good);
        const bool as_expected =
            c.found ? !good && output.find(c.found) != std::string::npos : good && output.empty();
        (as_expected ? n_passed : n_failed)++;
        if (as_expected) continue;
        printf("FAILED: defect %d, %s, order %d: expected %s; it ended %s and said:\n%s\n",
               c.defect, c.what, (int)c.order, c.found ? c.found : "a clean run",
               good ? "well" : "badly", output.c_str());
    }
    printf("%d passed\n", n_passed);
    return n_failed || !n_passed;
}
