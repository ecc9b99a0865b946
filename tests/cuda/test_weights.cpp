// test_weights.cpp: the products of weights and what stands between them (matvec.cu, gemm.cu,
// elementwise.cu) on the simulator, against the reference functions of the core, in several orders
// of threads. Buffers have exact sizes, so that ASan sees any access beyond.
#include "cusim.h"

#include "cuda/kernels/elementwise_args.h"
#include "cuda/kernels/matmul_args.h"

#define _Static_assert static_assert
extern "C" {
#include "ops.h"
#include "weights.h"
}

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

namespace {

int passed, failed;
bool quick; // where a run is slow: fewer orders

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (condition) {                                                                           \
            passed++;                                                                              \
        } else {                                                                                   \
            failed++;                                                                              \
            printf("FAILED line %d: ", __LINE__);                                                  \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

// ---- data -------------------------------------------------------------------------------------

uint64_t random_state = 0x9e3779b97f4a7c15u;

uint32_t random_bits() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}
float random_between(float low, float high) {
    return low + (high - low) * (float)(random_bits() >> 8) * 0x1p-24f;
}

/* n elements on a multiple of 16 bytes and not one byte more. */
template <class T> class Exact {
  public:
    explicit Exact(size_t n, T fill = T()) : n_(n) {
        void *p = nullptr;
        if (posix_memalign(&p, 16, n * sizeof(T)) != 0) exit(2);
        data_ = static_cast<T *>(p);
        for (size_t i = 0; i < n; i++) data_[i] = fill;
    }
    Exact(Exact &&other) : data_(other.data_), n_(other.n_) { other.data_ = nullptr; }
    Exact(const Exact &) = delete;
    Exact &operator=(const Exact &) = delete;
    ~Exact() { free(data_); }
    T *data() { return data_; }
    const T *data() const { return data_; }
    size_t size() const { return n_; }
    T &operator[](size_t i) { return data_[i]; }
    const T &operator[](size_t i) const { return data_[i]; }

  private:
    T *data_;
    size_t n_;
};

Exact<float> random_floats(size_t n, float scale) {
    Exact<float> x(n);
    for (size_t i = 0; i < n; i++) x[i] = random_between(-scale, scale);
    return x;
}

void put_half(uint8_t *p, float value) {
    const uint16_t half = kvq_f32_to_f16(value);
    memcpy(p, &half, 2);
}

size_t bytes_of_row(int kind, int n_cols) {
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    return (size_t)n_cols / format->block * format->bytes;
}

/* Any codes and small scales, whose halves would otherwise be infinite now and then. */
Exact<uint8_t> random_weights(int kind, int n_rows, int n_cols) {
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    Exact<uint8_t> w((size_t)n_rows * bytes_of_row(kind, n_cols));
    for (size_t i = 0; i < w.size(); i++) w[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < w.size(); i += format->bytes) {
        uint8_t *const block = w.data() + i;
        const float value = random_between(-0.02f, 0.02f);
        const uint16_t brain = (uint16_t)(random_bits() & 0x807fu) | 0x3c00u; // 2^-7 to 2^-6
        switch (kind) {
        case KVQ_WEIGHT_F32:
            memcpy(block, &value, 4);
            break;
        case KVQ_WEIGHT_BF16:
            memcpy(block, &brain, 2);
            break;
        case KVQ_WEIGHT_Q4_1:
        case KVQ_WEIGHT_Q5_1:
        case KVQ_WEIGHT_Q4_K:
        case KVQ_WEIGHT_Q5_K:
            put_half(block + 2, value * 7);
            [[fallthrough]];
        case KVQ_WEIGHT_Q6_K:
            put_half(block + (kind == KVQ_WEIGHT_Q6_K ? 208 : 0), value);
            break;
        default:
            put_half(block, value);
            break;
        }
        if (kind == KVQ_WEIGHT_Q4_1 || kind == KVQ_WEIGHT_Q5_1 || kind == KVQ_WEIGHT_Q4_K ||
            kind == KVQ_WEIGHT_Q5_K) {
            put_half(block, random_between(-0.02f, 0.02f));
        }
    }
    return w;
}

// ---- launches -----------------------------------------------------------------------------------

struct NamedOrder {
    const char *name;
    cusim::Order order;
    uint64_t seed;
};

std::vector<NamedOrder> orders() {
    std::vector<NamedOrder> all = {{"forward", cusim::Order::forward, 1},
                                   {"reverse", cusim::Order::reverse, 1},
                                   {"random 1", cusim::Order::random, 1},
                                   {"random 2", cusim::Order::random, 2}};
    if (quick) all.resize(2);
    return all;
}

void use(const NamedOrder &order) {
    cusim::options.order = order.order;
    cusim::options.seed = order.seed;
}

/* False, with the reason printed, where the simulator found an error. */
template <class Arguments>
bool launch(const std::string &name, dim3 grid, unsigned threads, size_t shared, Arguments a) {
    const cusim::Kernel *const kernel = cusim::find_kernel(name);
    if (!kernel) {
        printf("there is no kernel %s\n", name.c_str());
        return false;
    }
    void *parameters[] = {&a, nullptr};
    return cusim::launch(*kernel, grid, dim3(threads), shared, parameters);
}

unsigned blocks_for(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

// ---- products -----------------------------------------------------------------------------------

struct Product {
    int kind, n, n_cols;
    std::vector<int> n_rows; // of each matrix
    bool add, bias;
    float magnitude; // of the activations
};

std::string describe(const Product &p) {
    std::string rows;
    for (int n : p.n_rows) rows += (rows.empty() ? "" : "+") + std::to_string(n);
    return std::string(kvq_weight_formats[p.kind].name) + " " + rows + " x " +
           std::to_string(p.n_cols) + ", " + std::to_string(p.n) + " tokens" +
           (p.add ? ", add" : "") + (p.bias ? ", bias" : "");
}

/* What a matrix is multiplied to, in f64, and the sum of |w x| that errors are measured by. */
struct Expected {
    std::vector<double> y, size; // [n][n_rows]
};

Expected multiply_exactly(int kind, const Exact<uint8_t> &w, int n_rows, const Exact<float> &x,
                          int n, int n_cols) {
    Expected e;
    e.y.resize((size_t)n * n_rows);
    e.size.resize((size_t)n * n_rows);
    std::vector<float> row((size_t)n_cols);
    for (int r = 0; r < n_rows; r++) {
        kvq_weight_formats[kind].dequantize(
            row.data(), w.data() + (size_t)r * bytes_of_row(kind, n_cols), (size_t)n_cols);
        for (int t = 0; t < n; t++) {
            double sum = 0, size = 0;
            for (int c = 0; c < n_cols; c++) {
                const double product = (double)row[c] * (double)x[(size_t)t * n_cols + c];
                sum += product;
                size += fabs(product);
            }
            e.y[(size_t)t * n_rows + r] = sum;
            e.size[(size_t)t * n_rows + r] = size;
        }
    }
    return e;
}

/* The truth that the tests use is that of the core. */
void check_expected(const Product &p, const Expected &e, const Exact<uint8_t> &w, int n_rows,
                    const Exact<float> &x) {
    kvq_activations acts = {};
    acts.x = x.data();
    acts.n_tok = (size_t)p.n;
    acts.n_cols = (size_t)p.n_cols;
    std::vector<float> y((size_t)p.n * n_rows);
    kvq_matmul_reference((kvq_weight_kind)p.kind, y.data(), (size_t)n_rows, w.data(),
                         (size_t)n_rows, &acts);
    bool equal = true;
    for (size_t i = 0; i < y.size(); i++) equal = equal && y[i] == (float)e.y[i];
    CHECK(equal, "%s: the expected product is not the reference's", describe(p).c_str());
}

constexpr float untouched = -12345.0f;

/* Launches `kernel` in all orders and compares all matrices; `limit` is the error allowed relative
 * to the sum of |w x|. */
template <class Launch>
void check_product(const Product &p, double limit, const std::string &kernel, Launch launch_it) {
    const size_t n_matrices = p.n_rows.size();
    Exact<float> x = random_floats((size_t)p.n * p.n_cols, p.magnitude);
    std::vector<Exact<uint8_t>> w;
    std::vector<Exact<float>> bias;
    std::vector<Expected> expected;
    for (int n_rows : p.n_rows) {
        w.push_back(random_weights(p.kind, n_rows, p.n_cols));
        bias.push_back(random_floats((size_t)n_rows, p.magnitude));
        expected.push_back(multiply_exactly(p.kind, w.back(), n_rows, x, p.n, p.n_cols));
        check_expected(p, expected.back(), w.back(), n_rows, x);
    }
    for (const NamedOrder &order : orders()) {
        use(order);
        kvq_cuda_matmul_args a = {};
        std::vector<Exact<float>> y;
        for (size_t i = 0; i < n_matrices; i++) {
            const int n_rows = p.n_rows[i], stride = n_rows + 3;
            y.emplace_back((size_t)(p.n - 1) * stride + n_rows, untouched);
            for (int t = 0; t < p.n && p.add; t++) {
                for (int r = 0; r < n_rows; r++) y[i][(size_t)t * stride + r] = (float)(t - r);
            }
            a.matrices[i] = {w[i].data(), p.bias ? bias[i].data() : nullptr, y[i].data(), n_rows,
                             stride};
        }
        a.x = x.data();
        a.n_matrices = (int)n_matrices;
        a.n = p.n;
        a.n_cols = p.n_cols;
        a.add = p.add;
        const bool ran = launch_it(kernel, a);
        double worst = 0;
        bool stayed = true;
        for (size_t i = 0; i < n_matrices; i++) {
            const int n_rows = p.n_rows[i], stride = n_rows + 3;
            for (size_t at = 0; at < y[i].size(); at++) {
                const size_t t = at / stride, r = at % stride;
                if (r >= (size_t)n_rows) {
                    stayed = stayed && y[i][at] == untouched;
                    continue;
                }
                const size_t e = t * n_rows + r;
                const double before = p.add ? (double)t - (double)r : 0.0;
                const double more = p.bias ? (double)bias[i][r] : 0.0;
                const double error = fabs((double)y[i][at] - (expected[i].y[e] + before + more));
                const double size = expected[i].size[e] + (fabs(before) + fabs(more)) * 0x1p-4;
                const double relative = error / (size > 0 ? size : 1);
                if (!(relative <= worst)) worst = relative;
            }
        }
        CHECK(ran && worst <= limit && stayed, "%s %s, %s: error %.2e of %.2e allowed%s%s",
              kernel.c_str(), describe(p).c_str(), order.name, worst, limit,
              ran ? "" : ", errors of the launch", stayed ? "" : ", wrote between the rows of y");
    }
}

bool is_float(int kind) { return kvq_weight_formats[kind].block == 1; }

/* Widths that a format has: edges of chunks and panels, ragged ones of floats. */
std::vector<int> widths(int kind) {
    if (is_float(kind)) return {1, 7, 33, 64, 100, 1020, 1021, 1032, 4104};
    if (kvq_weight_formats[kind].block == 256) return {256, 768, 1024, 1280, 4352};
    return {32, 64, 96, 576, 1024, 1056, 4128};
}

constexpr int some_rows[] = {1, 7, 33, 100};

void test_matvec() {
    for (int kind = 0; kind < KVQ_WEIGHT_KINDS; kind++) {
        int which = 0;
        for (int n_cols : widths(kind)) {
            for (int n = 1; n <= KVQ_MATVEC_TOKENS; n++, which++) {
                Product p = {kind,           n,   n_cols, {some_rows[which % 4]}, which % 3 == 1,
                             which % 2 == 1, 1.0f};
                if (which % 5 == 4) p.n_rows = {33, 4, 7};
                if (which % 5 == 2) p.n_rows = {5, 70};
                const int n_processors = which % 2 ? 2 : 132;
                const std::string kernel = std::string("kvq_cuda_matvec_") +
                                           kvq_weight_formats[kind].name + "_" +
                                           std::to_string(kvq_cuda_matvec_tokens(n));
                check_product(p, 4e-6, kernel, [&](const std::string &name, auto &a) {
                    const kvq_cuda_launch_shape s = kvq_cuda_matvec_shape(&a, n_processors);
                    return launch(name, dim3(s.blocks, s.blocks_y), s.threads, s.shared_bytes, a);
                });
            }
        }
    }
}

/* The halves of a launch, made on the simulator, too. */
bool launch_gemm(const std::string &kernel, kvq_cuda_matmul_args a) {
    const int padded = kvq_cuda_halves_in_row(a.n_cols);
    Exact<uint16_t> halves((size_t)a.n * padded, 0xffff);
    Exact<float> unscale((size_t)a.n, NAN);
    const kvq_cuda_halve_args h = {a.x, halves.data(), unscale.data(), a.n, a.n_cols};
    if (!launch("kvq_cuda_halve", dim3((unsigned)a.n), KVQ_HALVE_THREADS, 0, h)) return false;
    a.x = nullptr;
    a.halves = halves.data();
    a.unscale = unscale.data();
    const kvq_cuda_launch_shape s = kvq_cuda_gemm_shape(&a);
    return launch(kernel, dim3(s.blocks, s.blocks_y), s.threads, s.shared_bytes, a);
}

/* Weights and activations are rounded to 11 bits each, so 2^-10 at the worst. */
constexpr double gemm_limit = 0x1p-10;

void test_gemm() {
    const int some_tokens[] = {9, 40, 1, 17, 65, 130};
    for (int kind = 0; kind < KVQ_WEIGHT_KINDS; kind++) {
        const std::string kernel = std::string("kvq_cuda_gemm_") + kvq_weight_formats[kind].name;
        int which = kind;
        for (int n_cols : widths(kind)) {
            if (n_cols > 1100) continue; // slow, and nothing is new there
            for (int i = 0; i < 2; i++, which++) {
                Product p = {kind,           some_tokens[which % 6], n_cols, {some_rows[which % 4]},
                             which % 3 == 1, which % 2 == 1,         1.0f};
                if (which % 5 == 4) p.n_rows = {130, 4, 7};
                if (which % 5 == 2) p.n_rows = {5, 200};
                if (which % 4 == 3) p.magnitude = 1e5f; // no half holds these
                if (which % 7 == 3) p.magnitude = 1e-9f;
                check_product(p, gemm_limit, kernel, launch_gemm);
            }
        }
    }
}

/* Zeros, and what comes nearest to the ends of the range of floats. */
void test_halve() {
    const float largest[] = {0.0f, 1e-45f, 1e-38f, 1e-20f, 65504.0f, 70000.0f, 3e38f};
    const int n = 7, n_cols = 37, padded = kvq_cuda_halves_in_row(n_cols);
    Exact<float> x = random_floats((size_t)n * n_cols, 1.0f);
    for (int t = 0; t < n; t++) {
        for (int c = 0; c < n_cols; c++) x[(size_t)t * n_cols + c] *= largest[t];
    }
    for (const NamedOrder &order : orders()) {
        use(order);
        Exact<uint16_t> halves((size_t)n * padded, 0xffff);
        Exact<float> unscale((size_t)n, NAN);
        const kvq_cuda_halve_args a = {x.data(), halves.data(), unscale.data(), n, n_cols};
        const bool ran = launch("kvq_cuda_halve", dim3(n), KVQ_HALVE_THREADS, 0, a);
        for (int t = 0; t < n; t++) {
            bool good = true;
            for (int c = 0; c < padded; c++) {
                const double back =
                    (double)kvq_f16_to_f32(halves[(size_t)t * padded + c]) * (double)unscale[t];
                const double before = c < n_cols ? (double)x[(size_t)t * n_cols + c] : 0.0;
                /* The second: half the smallest step of halves, scaled back at the most. */
                const double limit =
                    fabs(before) * 0x1p-11 + fmax((double)largest[t] * 0x1p-38, 0x1p-138);
                good = good && fabs(back - before) <= limit;
            }
            CHECK(ran && good, "halves of magnitudes up to %g, %s", (double)largest[t], order.name);
        }
    }
}

// ---- between products ---------------------------------------------------------------------------

/* The largest |a - b| over the largest |b|. */
double difference(const float *a, const float *b, size_t n) {
    double worst = 0, most = 1e-30;
    for (size_t i = 0; i < n; i++) {
        most = fmax(most, fabs((double)b[i]));
        const double error = fabs((double)a[i] - (double)b[i]);
        if (!(error <= worst)) worst = error;
    }
    return worst / most;
}

void test_norm() {
    for (int width : {1, 31, 64, 576, 2049}) {
        for (float magnitude : {1e-4f, 1.0f, 3000.0f}) {
            const int n = 3;
            const Exact<float> x = random_floats((size_t)n * width, magnitude);
            const Exact<float> w = random_floats((size_t)width, 2.0f);
            Exact<float> expected((size_t)n * width);
            for (int t = 0; t < n; t++) {
                kvq_rms_norm(&expected[(size_t)t * width], &x[(size_t)t * width], w.data(),
                             (size_t)width, 1e-5f);
            }
            for (const NamedOrder &order : orders()) {
                use(order);
                Exact<float> y((size_t)n * width, untouched);
                const kvq_cuda_norm_args a = {x.data(), w.data(), y.data(), 1e-5f, n, width};
                const bool ran = launch("kvq_cuda_norm", dim3(n), KVQ_ELEMENTWISE_THREADS, 0, a);
                const double worst = difference(y.data(), expected.data(), y.size());
                CHECK(ran && worst <= 1e-6, "norm of width %d, magnitude %g, %s: error %.2e", width,
                      (double)magnitude, order.name, worst);
            }
        }
    }
}

void test_rotate() {
    struct Shape {
        int n, n_heads, n_kv_heads, d_head, d_rope;
    };
    for (const Shape s : {Shape{1, 1, 1, 2, 2}, Shape{3, 9, 3, 64, 64}, Shape{2, 14, 2, 64, 32},
                          Shape{5, 4, 4, 80, 80}, Shape{1, 32, 8, 128, 128}}) {
        for (int neox = 0; neox < 2; neox++) {
            const size_t of_q = (size_t)s.n_heads * s.d_head,
                         of_k = (size_t)s.n_kv_heads * s.d_head;
            const Exact<float> q = random_floats(s.n * of_q, 1), k = random_floats(s.n * of_k, 1);
            Exact<float> cos_sin((size_t)s.n * s.d_rope);
            Exact<float> expected_q(q.size()), expected_k(k.size());
            memcpy(expected_q.data(), q.data(), q.size() * 4);
            memcpy(expected_k.data(), k.data(), k.size() * 4);
            for (int t = 0; t < s.n; t++) {
                float *const angles = &cos_sin[(size_t)t * s.d_rope];
                kvq_rope_angles(angles, 1000 + t, s.d_rope, 1e4f, 1.0f, nullptr);
                kvq_rope_rotate(&expected_q[t * of_q], s.n_heads, s.d_head, angles, s.d_rope, neox);
                kvq_rope_rotate(&expected_k[t * of_k], s.n_kv_heads, s.d_head, angles, s.d_rope,
                                neox);
            }
            for (const NamedOrder &order : orders()) {
                use(order);
                Exact<float> q_out(q.size()), k_out(k.size());
                memcpy(q_out.data(), q.data(), q.size() * 4);
                memcpy(k_out.data(), k.data(), k.size() * 4);
                const kvq_cuda_rotate_args a = {q_out.data(), k_out.data(), cos_sin.data(),
                                                s.n,          s.n_heads,    s.n_kv_heads,
                                                s.d_head,     s.d_rope,     neox};
                const size_t pairs = (size_t)(s.n_heads + s.n_kv_heads) * s.d_rope / 2;
                const bool ran =
                    launch("kvq_cuda_rotate", dim3(blocks_for(pairs, KVQ_ELEMENTWISE_THREADS), s.n),
                           KVQ_ELEMENTWISE_THREADS, 0, a);
                const double of_queries = difference(q_out.data(), expected_q.data(), q.size());
                const double of_keys = difference(k_out.data(), expected_k.data(), k.size());
                CHECK(ran && of_queries <= 3e-7 && of_keys <= 3e-7,
                      "rotation of %d of %d channels, %s, %s: errors %.2e, %.2e", s.d_rope,
                      s.d_head, neox ? "neox" : "pairs", order.name, of_queries, of_keys);
            }
        }
    }
}

void test_gate() {
    const int n = 2, d_ff = 300;
    Exact<float> gate((size_t)n * d_ff);
    const Exact<float> up = random_floats((size_t)n * d_ff, 3.0f);
    for (size_t i = 0; i < gate.size(); i++) {
        gate[i] = i % 7 == 0 ? random_between(-200, 200) : random_between(-8, 8);
    }
    for (const NamedOrder &order : orders()) {
        use(order);
        Exact<float> out(gate.size());
        memcpy(out.data(), gate.data(), gate.size() * 4);
        const kvq_cuda_gate_args a = {out.data(), up.data(), n, d_ff};
        const bool ran =
            launch("kvq_cuda_gate", dim3(blocks_for((size_t)d_ff, KVQ_ELEMENTWISE_THREADS), n),
                   KVQ_ELEMENTWISE_THREADS, 0, a);
        double worst = 0;
        for (size_t i = 0; i < out.size(); i++) {
            const double x = (double)gate[i], expected = x / (1 + exp(-x)) * (double)up[i];
            const double error = fabs((double)out[i] - expected) / fmax(1e-30, fabs(expected));
            if (fabs(expected) > 1e-37 && !(error <= worst)) worst = error;
        }
        CHECK(ran && worst <= 5e-7, "gate, %s: error %.2e", order.name, worst);
    }
}

} // namespace

int main(int argc, char **argv) {
    quick = argc > 1 && strcmp(argv[1], "o2") != 0;
    test_norm();
    test_rotate();
    test_gate();
    test_matvec();
    test_halve();
    test_gemm();
    printf("%d passed\n", passed);
    if (failed) printf("%d FAILED\n", failed);
    return failed != 0;
}
