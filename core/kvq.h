/* kvq.h: the public interface of the pykvq core, a runtime for GGUF language models whose KV cache
 * is quantized in blocks: `sinks (f16) | sealed blocks | recent rows (f16)`, per layer and KV head.
 *
 * Two objects. A `kvq_model` is a mapped file: immutable once open, shared by any number of
 * sessions and threads. A `kvq_session` is one timeline of tokens with its KV cache: used by one
 * thread at a time, except kvq_session_cancel, which any thread may call. A session must be closed
 * before its model.
 *
 * Errors: a function that can fail returns a status; for anything but KVQ_OK, kvq_error() gives one
 * full sentence on the same thread until the next failure there. Nothing prints, exits or aborts.
 * Memory: everything is allocated by the open functions; evaluating allocates nothing, but for the
 * sealed blocks of layers on a GPU, which come in chunks as the context grows.
 *
 * Python's bindings are generated from the part between the cffi marks below: declarations only
 * there.
 */
#ifndef KVQ_H
#define KVQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* [cffi-begin] */

/* The values are part of the interface and never change. */
typedef enum kvq_status {
    KVQ_OK = 0,
    KVQ_ERR_ARGUMENT = 1,    /* a caller's value is out of range */
    KVQ_ERR_IO = 2,          /* the file cannot be opened, mapped or read */
    KVQ_ERR_FORMAT = 3,      /* the file contradicts itself or the GGUF specification */
    KVQ_ERR_UNSUPPORTED = 4, /* valid, but not implemented: architecture, tensor, type, value */
    KVQ_ERR_MEMORY = 5,      /* not enough memory */
    KVQ_ERR_CONTEXT = 6,     /* the session's context is full */
    KVQ_CANCELLED = 7,       /* kvq_session_cancel or a progress callback stopped the evaluation */
    KVQ_ERR_DEVICE = 8       /* a device or its driver failed, or is not there */
} kvq_status;

typedef struct kvq_model kvq_model;
typedef struct kvq_session kvq_session;
typedef struct kvq_profile kvq_profile;

const char *kvq_version(void);
const char *kvq_error(void);

/* ---- model ------------------------------------------------------------------------------- */

typedef struct kvq_model_info {
    const char *architecture; /* owned by the model */
    int32_t n_layers, n_heads, n_kv_heads;
    int32_t d_model, d_head, d_ff, n_vocab;
    int32_t n_ctx_train;
    uint64_t n_params;
    uint64_t bytes_weights; /* tensor data as mapped */
    int32_t has_weights;    /* 0: opened from a file that ends before them */
} kvq_model_info;

/* Maps `path` (all files of a split one) and checks every tensor that the architecture needs.
 * Weights stay mapped and are never expanded. The file must not be cut while it is open. */
kvq_status kvq_model_open(kvq_model **out, const char *path);
/* The same for a file that may end anywhere after its header. A model without weights describes
 * itself and plans sessions; it opens none and gives no tensor's values. */
kvq_status kvq_model_open_header(kvq_model **out, const char *path);
void kvq_model_close(kvq_model *model); /* takes NULL */
void kvq_model_describe(const kvq_model *model, kvq_model_info *out);

/* Two channels of a head that RoPE turns by position * frequency radians: (a, b) becomes
 * (a cos - b sin, a sin + b cos). The frequency has the model's scaling and factors in it. */
typedef struct kvq_rope_pair {
    int32_t first, second;
    double frequency;
} kvq_rope_pair;

/* The pairs are the same in all heads of queries and keys; channels in none of them are not
 * turned. */
int32_t kvq_model_rope_count(const kvq_model *model);
kvq_status kvq_model_rope(const kvq_model *model, int32_t index, kvq_rope_pair *out);

/* Numbered as in the GGUF specification. */
typedef enum kvq_meta_type {
    KVQ_META_U8 = 0,
    KVQ_META_I8 = 1,
    KVQ_META_U16 = 2,
    KVQ_META_I16 = 3,
    KVQ_META_U32 = 4,
    KVQ_META_I32 = 5,
    KVQ_META_F32 = 6,
    KVQ_META_BOOL = 7,
    KVQ_META_STRING = 8,
    KVQ_META_ARRAY = 9,
    KVQ_META_U64 = 10,
    KVQ_META_I64 = 11,
    KVQ_META_F64 = 12
} kvq_meta_type;

/* One metadata entry. `data` points into the mapped file, little-endian, unaligned; it holds the
 * value, or the `count` elements of an array one after the other. A string is its length (u64) and
 * its bytes, without a final zero. Valid until the model is closed. */
typedef struct kvq_meta {
    const char *key; /* key_length bytes, no final zero */
    uint64_t key_length;
    int32_t type; /* kvq_meta_type; for an array, of its elements */
    int32_t is_array;
    uint64_t count; /* elements; 1 if not an array */
    const uint8_t *data;
    uint64_t bytes; /* length of data */
} kvq_meta;

uint64_t kvq_model_meta_count(const kvq_model *model);
kvq_status kvq_model_meta(const kvq_model *model, uint64_t index, kvq_meta *out);

typedef struct kvq_tensor_info {
    const char *name; /* name_length bytes, no final zero */
    uint64_t name_length;
    uint32_t n_dims;
    uint64_t shape[4]; /* as in the file: shape[0] runs fastest; unused are 1 */
    const char *type;  /* e.g. "Q4_K" */
    uint64_t bytes;
} kvq_tensor_info;

uint64_t kvq_model_tensor_count(const kvq_model *model);
kvq_status kvq_model_tensor(const kvq_model *model, uint64_t index, kvq_tensor_info *out);

/* The numbers of a tensor: values[n] in the order of the file, where n is the product of its shape.
 * KVQ_ERR_UNSUPPORTED for a type that the core cannot multiply. */
kvq_status kvq_model_tensor_values(const kvq_model *model, uint64_t index, float *values,
                                   uint64_t n);

/* How many bytes the header of a GGUF file has (metadata and tensor directory), given the first n
 * bytes of the file; 0 where it goes on behind them. `label` is how errors call the file. */
kvq_status kvq_header_measure(const char *label, const uint8_t *data, uint64_t n, uint64_t *bytes);

/* ---- profiles ---------------------------------------------------------------------------- */

/* Tells a model from others, by its tensors' names, types and shapes and a part of its weights; 0
 * for one without weights. */
uint64_t kvq_model_fingerprint(const kvq_model *model);

/* Opens what calibration found for this very model: a GGUF file made by `pykvq calibrate`. Its
 * numbers are checked and copied, so the file may go. A session that uses a profile must be closed
 * before it; any number may share it. For a model without weights, whose fingerprint is not known,
 * the shape alone is compared. */
kvq_status kvq_profile_open(kvq_profile **out, const kvq_model *model, const char *path);
void kvq_profile_close(kvq_profile *profile); /* takes NULL */

/* ---- KV schemes -------------------------------------------------------------------------- */

typedef enum kvq_profile_use {
    KVQ_PROFILE_NONE = 0,     /* the scheme makes no use of a profile */
    KVQ_PROFILE_OPTIONAL = 1, /* it has a form with a profile and a data-free one */
    KVQ_PROFILE_NEEDED = 2    /* there is no session of it without a profile */
} kvq_profile_use;

/* A row of schemes.def for one head width: what `--kv NAME` means and what it costs. */
typedef struct kvq_scheme_info {
    const char *name;
    const char *summary;           /* one line */
    const char *basis_k, *basis_v; /* e.g. "hadamard" */
    const char *codec_k, *codec_v; /* e.g. "u2" */
    kvq_profile_use profile;
    int32_t has_budget;         /* 1: kvq_session_options.kv_bits says how many bits it may take */
    int32_t has_layers;         /* 1: kvq_session_options.l_k and l_v say which layers have more */
    int32_t key_bias_sensitive; /* 1: loses far more on models whose keys have a bias (Qwen2) */
    int32_t sinks, window;      /* defaults, in tokens */
    int32_t block;              /* tokens per sealed block */
    /* Per element of a sealed block, all its metadata included. Where a plan spends bits by layer,
     * head or channel they are what it takes at most; kvq_session_stats has what a model gets. Of a
     * scheme with two forms, the one without a profile. */
    double bits_k, bits_v;
} kvq_scheme_info;

int32_t kvq_scheme_count(void);
/* Fills `out` for scheme number `index` and heads of width `d_head`. KVQ_ERR_ARGUMENT for an index
 * out of range, KVQ_ERR_UNSUPPORTED where the scheme has no form for that width. */
kvq_status kvq_scheme_describe(int32_t index, int32_t d_head, kvq_scheme_info *out);

/* ---- session ----------------------------------------------------------------------------- */

/* Called before each layer of each pass, on the calling thread; returning non-zero cancels. */
typedef int32_t (*kvq_progress)(void *user, int32_t n_done, int32_t n_total);

typedef struct kvq_session_options {
    const char *scheme; /* NULL: "skvq" */
    int32_t n_ctx; /* tokens that the cache holds; 0: the smaller of the trained context and 4096 */
    int32_t n_batch;   /* tokens per pass through the layers; 0: 512 */
    int32_t n_threads; /* 0: one per processor that the process may use; never more than that */
    int32_t sinks;     /* first tokens kept in f16; -1: the scheme's default */
    int32_t window;    /* last tokens kept in f16; -1: the scheme's default */
    const kvq_profile *profile; /* NULL: none */
    double kv_bits; /* that schemes with a plan aim at, per element; 0: the scheme's default */
    /* asymkv: how many layers, from the first, have the higher bits for keys and for values; -1:
     * all layers for keys, half of them for values. -1 for other schemes. */
    int32_t l_k, l_v;
    /* Tokens of sealed blocks that a token evaluated alone reads, per KV head: the blocks whose
     * mean scores highest with its queries; rounded up to whole blocks. 0: all. Passes of several
     * tokens read all, so the result depends on how tokens are cut into passes. Needs keys whose
     * blocks keep a mean. */
    int32_t kv_topk;
    int32_t no_memory_check; /* 1: open a session even if it does not fit into the memory */
    /* 1: each thread but the caller's stays on one processor: the n-th on the n-th that the process
     * may use, in every session alike. KVQ_ERR_UNSUPPORTED where the system has no call for it. */
    int32_t pin_threads;
    /* Where layers run: "cpu"; "cuda" or "cuda:1", an error where there is no such device that
     * pykvq can use; "auto" (or NULL): the first device that can be used, with as many layers as
     * fit its free memory, else the CPU. kvq_session_stats says what it became. A process that was
     * forked after devices were asked for has none. */
    const char *device;
    /* Layers on a GPU, counted from the last; the output matrix goes there too where they are more
     * than the model has. -1: all, or with "auto" as many as fit. With "cpu" none: an error. */
    int32_t n_gpu_layers;
    kvq_progress upload; /* called while weights go to a GPU, in MiB; NULL: nobody looks */
    void *upload_user;
} kvq_session_options;

typedef enum kvq_logits { KVQ_LOGITS_NONE = 0, KVQ_LOGITS_LAST = 1, KVQ_LOGITS_ALL = 2 } kvq_logits;

typedef struct kvq_session_stats {
    const char *isa; /* instruction set of the kernels that run */
    const char *scheme;
    int32_t n_ctx, n_batch, n_threads, sinks, window;
    int32_t n_tokens;        /* in the cache now */
    int32_t n_tokens_sealed; /* of these, in sealed blocks */
    uint64_t bytes_kv;       /* allocated for the cache: the sum of the three below */
    uint64_t bytes_sinks, bytes_sealed, bytes_recent;
    uint64_t bytes_sealed_k, bytes_sealed_v; /* the parts of bytes_sealed */
    uint64_t bytes_tables;                   /* the profile, where it is used: sessions share it */
    uint64_t bytes_scratch;                  /* what a pass works in */
    uint64_t bytes_weights;                  /* of the model, mapped: its sessions share them */
    uint64_t bytes_total;                    /* weights, cache, tables and scratch, wherever */
    int32_t gpu;                             /* index of the CUDA device; -1: all runs on the CPU */
    int32_t n_gpu_layers;                    /* layers there: the last ones */
    int32_t gpu_head;                        /* 1: the output matrix too */
    /* The GPU's part of the bytes above, once the context is full, with what its alignment adds;
     * and what is allocated there now (0 for a plan). */
    uint64_t bytes_gpu, bytes_gpu_now;
    /* The parts of bytes_gpu: weights; sinks and recent rows; sealed blocks, which come in chunks
     * of bytes_gpu_chunk; the profile with the tracks; what a pass works in. */
    uint64_t bytes_gpu_weights, bytes_gpu_rows, bytes_gpu_sealed, bytes_gpu_tables;
    uint64_t bytes_gpu_scratch, bytes_gpu_chunk;
    uint64_t bytes_host_weights; /* weights that the CPU reads: all, if nothing is on a GPU */
    double bits_sealed_k, bits_sealed_v; /* per element of a sealed block, metadata included */
    /* Bits per element of the whole cache (sinks, sealed blocks, recent rows, all metadata,
     * tables): bits_full once n_ctx tokens fill it, bits_used for the n_tokens that it holds now.
     */
    double bits_full, bits_used;
    int32_t uses_profile;  /* 1: with another profile, or without, the cache would be another */
    int32_t kv_topk;       /* 0: tokens evaluated alone read all sealed blocks */
    uint64_t bytes_step_k; /* of keys that one more token evaluated alone reads, all layers */
    uint64_t bytes_step_v; /* the same of values */
    uint64_t n_evaluated;  /* tokens since the session was opened */
    double seconds_evaluated;
    /* Time by stage since kvq_session_time started the clocks: products with weights; attention;
     * new rows into the cache and blocks sealed; embedding, norms, RoPE and activations. */
    uint64_t ns_weights, ns_attention, ns_append, ns_other;
} kvq_session_stats;

/* Fails with KVQ_ERR_MEMORY where bytes_total exceeds kvq_memory_available(), unless the options
 * say otherwise. */
kvq_status kvq_session_open(kvq_session **out, const kvq_model *model,
                            const kvq_session_options *options);
/* Takes NULL; not in a process that was forked after the opening. */
void kvq_session_close(kvq_session *session);

/* Describes the session that kvq_session_open would make, byte for byte, without its memory. */
kvq_status kvq_session_plan(const kvq_model *model, const kvq_session_options *options,
                            kvq_session_stats *out);

/* The largest n_ctx whose session has a bytes_total of at most `memory`; 0: not even 1 token fits.
 * options->n_ctx is not read. */
kvq_status kvq_session_longest(const kvq_model *model, const kvq_session_options *options,
                               uint64_t memory, int32_t *n_ctx);

/* Bytes that can be had without paging: free memory and what the system holds as a cache of files,
 * such as mapped weights; on Linux no more than the control groups of the process leave it (v1 and
 * v2: the limits of containers); the whole memory where the system does not tell. A sixteenth of
 * it, 1 GiB at most, is left out, as headroom. */
uint64_t kvq_memory_available(void);

/* Appends tokens[n] to the timeline. Logits (f32) go to logits[n_vocab] for KVQ_LOGITS_LAST, to
 * logits[n][n_vocab] for KVQ_LOGITS_ALL. On an error or a cancellation the session holds
 * the tokens of the passes that were completed (stats.n_tokens). A pass that was stopped may have
 * sealed blocks of earlier tokens sooner than they would have been: up to the whole window, if it
 * was a long one. Under a lossy scheme their rows are then lost; kvq_session_truncate(0) starts
 * afresh.
 *
 * The result does not depend on the number of threads. On the CPU and without kv_topk it does not
 * depend either on how the tokens are cut into calls or passes, as long as none of them crosses a
 * token at which a block is sealed (see kvq_session_until_seal). On a GPU the same passes give the
 * same result, and others the same but for rounding: sums have another order there. */
kvq_status kvq_session_eval(kvq_session *session, const int32_t *tokens, int32_t n,
                            kvq_logits which, float *logits, kvq_progress progress, void *user);

/* Tokens that can follow before the next block is sealed (at least 1). Passes that do not exceed it
 * read the very cache that token-by-token decoding reads; on a GPU, one whose rows differ by
 * rounding. */
int32_t kvq_session_until_seal(const kvq_session *session);

/* Keeps the first n tokens. When n falls inside a sealed block, that block's rows return to f16 as
 * the codes give them back: what was lost in sealing stays lost. */
kvq_status kvq_session_truncate(kvq_session *session, int32_t n);

/* Stops the running evaluation within one layer's time, or, without one running, the next at its
 * start (so that no cancellation is lost between two calls); it returns KVQ_CANCELLED. Any thread
 * may call it. */
void kvq_session_cancel(kvq_session *session);

void kvq_session_describe(const kvq_session *session, kvq_session_stats *out);

/* The bytes of one sealed block, for tests and research: side 0 is keys, 1 values. Writing to them
 * changes what the next token reads. Of a layer on a GPU they are a copy, valid until the next call
 * for the session, which takes what was written. */
kvq_status kvq_session_block(kvq_session *session, int32_t layer, int32_t kv_head, int32_t side,
                             int32_t block, uint8_t **data, uint64_t *bytes);

/* What sealing makes of fixed numbers, over all layers and KV heads, as one number that is the same
 * on every machine: as long as it is the same, so is what sealed blocks lose. It depends on scheme,
 * bits, profile and on how this version packs blocks. Takes milliseconds per layer. */
uint64_t kvq_session_digest(const kvq_session *session);

/* For measuring: makes the timeline n tokens long, as if its sealed blocks had come again and again
 * in the same order; the sinks and the recent rows stay, those as the last tokens. So a context of
 * a million tokens can be timed after a prompt of some thousand; what the model then says is
 * meaningless. At least one block must be sealed, and n differ from the tokens held by whole
 * blocks.
 */
kvq_status kvq_session_fill(kvq_session *session, int32_t n);

/* Starts the clocks of stats.ns_* from 0, or stops them and puts them to 0. Stopped at first. */
void kvq_session_time(kvq_session *session, int32_t on);

/* Both sets of functions below serve calibration and research; NULL takes them away. They run on
 * the thread that evaluates, between two steps of a pass, and may not call back into the session.
 */

/* Queries, keys and values of a pass, after RoPE, before the cache sees them:
 * q[n][n_heads][d_head], k and v[n][n_kv_heads][d_head], tokens first .. first + n - 1 of the
 * timeline. */
typedef void (*kvq_observer)(void *user, int32_t layer, int32_t first, int32_t n, const float *q,
                             const float *k, const float *v);
void kvq_session_observe(kvq_session *session, kvq_observer observer, void *user);

/* Tries out a quantizer that has no stored form: called when a block of one layer and side (0 keys
 * after RoPE, 1 values) is sealed, with its rows[n_kv_heads][block][d_head], the first of which is
 * that of token `first`; what it leaves there is what later tokens read (rounded to f16). The
 * session's scheme must be f16, opened with the sinks and window that are wanted. */
typedef void (*kvq_simulator)(void *user, int32_t layer, int32_t side, int32_t first, float *rows);
kvq_status kvq_session_simulate(kvq_session *session, kvq_simulator simulator, void *user);

/* Allocations made by the core since the process started: evaluating leaves it unchanged. */
uint64_t kvq_alloc_calls(void);

/* What this machine can do at most, as measured now with n_threads threads (0: one per processor
 * that the process may use; never more than that) and the instruction set that sessions use. A
 * measurement takes about a second. */
typedef struct kvq_machine_limits {
    const char *isa;
    int32_t n_threads;
    double read_bytes; /* read from memory per second, over a buffer of n_bytes */
    /* Per second, two for each product of 8-bit integers that is summed, and the same of 16 bits;
     * 0 where the instruction set has no measure of it (ref). */
    double int8_operations, int16_operations;
} kvq_machine_limits;

/* n_bytes: of the buffer, which should exceed the caches; at least 1 MiB; 0: 512 MiB. */
kvq_status kvq_machine_measure(kvq_machine_limits *out, int32_t n_threads, uint64_t n_bytes);

/* A device that can evaluate instead of the processor. */
typedef struct kvq_device_info {
    const char *kind;           /* "cuda" */
    int32_t index;              /* among those of its kind, as the driver counts them */
    char name[256];             /* as the driver has it, e.g. "Orin" */
    int32_t compute_capability; /* 10 * major + minor */
    int32_t driver_version;     /* newest CUDA that the driver knows: 1000 * major + 10 * minor */
    uint64_t bytes_total;
    /* Once a context of this process is there; 0 if none can be had. Where the memory is that of
     * the processor, kvq_memory_available(), if the device can have so much. */
    uint64_t bytes_free;
    int32_t n_multiprocessors;
    int32_t clock_khz; /* of the multiprocessors */
    int32_t memory_clock_khz, memory_bus_bits;
    int32_t bytes_l2;
    int32_t bytes_shared; /* shared memory that one thread block can have */
    int32_t integrated;   /* its memory is that of the processor */
    const char *kernels; /* the toolkit that built those that it takes, e.g. "CUDA 13.0"; or NULL */
    int32_t usable;      /* whether sessions can run on it */
    char why_not[512];   /* where not, one full sentence */
} kvq_device_info;

/* Devices here, usable or not. For 0, kvq_error() says why there are none: no driver, one that is
 * too old or does not start, or no device. The first call of the process loads the driver. */
int32_t kvq_device_count(void);

/* KVQ_ERR_ARGUMENT if there is no device of this index, KVQ_ERR_DEVICE if the driver does not tell
 * what it is. One that is there but of no use is described, with the reason. */
kvq_status kvq_device_describe(int32_t index, kvq_device_info *out);

/* The instruction sets this build knows and this processor has, best first, comma-separated; and
 * the one that sessions use: the best, or the one that the environment variable KVQ_ISA names. */
const char *kvq_isa_available(void);
kvq_status kvq_isa_selected(const char **name);

/* [cffi-end] */

#ifdef __cplusplus
}
#endif

#endif
