/* cuda_weights.c: see cuda_weights.h. */
#include "cuda/cuda_weights.h"

#include <pthread.h>

enum { WEIGHTS_ALIGN = 256, PIECE = 32 << 20 /* bytes that go up at once */ };

/* Sessions of a model may be opened by several threads. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- which tensors there are ------------------------------------------------------------- */

/* Calls `visit` for every tensor that the device has, as the model and as `w` have it. */
typedef void visit_fn(void *context, const kvq_tensor *from, kvq_tensor *to);

static void visit(void *context, visit_fn *run, const kvq_tensor *from, kvq_tensor *to) {
    if (from->data) run(context, from, to);
}

static void for_tensors(const kvq_model *model, kvq_cuda_weights *w, visit_fn *run, void *context) {
    for (int l = w->first_layer; l < (int)model->config.n_layers; l++) {
        kvq_layer none, *const to = w->layers ? &w->layers[l] : &none;
#define KVQ_LAYER_TENSOR(MEMBER, NAME, COLS, ROWS, NEED)                                           \
    visit(context, run, &model->layers[l].MEMBER, &to->MEMBER);
#include "tensors.def"
#undef KVQ_LAYER_TENSOR
    }
    if (!w->head) return;
    visit(context, run, &model->output_norm, &w->output_norm);
    visit(context, run, &model->output, &w->output);
}

static size_t tensor_bytes(const kvq_tensor *tensor) { return tensor->rows * tensor->row_bytes; }

static void count_bytes(void *context, const kvq_tensor *from, kvq_tensor *to) {
    uint64_t *const total = context;
    (void)to;
    *total += kvq_round_up(tensor_bytes(from), WEIGHTS_ALIGN);
}

uint64_t kvq_cuda_weights_bytes(const kvq_model *model, int first_layer, bool head) {
    kvq_cuda_weights w = {.first_layer = first_layer, .head = head};
    uint64_t total = 0;
    for_tensors(model, &w, count_bytes, &total);
    return total;
}

const kvq_tensor *kvq_cuda_weights_find(const kvq_cuda_weights *weights, const kvq_model *model,
                                        const kvq_tensor *tensor) {
    if (tensor == &model->output_norm) return &weights->output_norm;
    if (tensor == &model->output) return &weights->output;
    const size_t at = (size_t)((const uint8_t *)tensor - (const uint8_t *)model->layers);
    return (const kvq_tensor *)(const void *)((const uint8_t *)weights->layers + at);
}

/* ---- upload ------------------------------------------------------------------------------ */

typedef struct upload {
    const kvq_cuda_api *api;
    CUstream stream;
    kvq_cuda_weights *weights;
    kvq_progress progress;
    void *user;
    uint64_t done;
    kvq_status status;
} upload;

/* Whether the upload goes on. Others may open and close sessions meanwhile, the caller's code among
 * them: the weights are not in the list yet. */
static bool report(const upload *u, uint64_t bytes) {
    bool goes_on = true;
    pthread_mutex_unlock(&lock);
    if (u->progress) {
        goes_on = !u->progress(u->user, (int32_t)(bytes >> 20), (int32_t)(u->weights->bytes >> 20));
    }
    pthread_mutex_lock(&lock);
    return goes_on;
}

static void copy_tensor(void *context, const kvq_tensor *from, kvq_tensor *to) {
    upload *const u = context;
    const size_t bytes = tensor_bytes(from);
    const CUdeviceptr address = u->weights->memory + u->done;
    for (size_t at = 0; at < bytes && u->status == KVQ_OK; at += PIECE) {
        const size_t n = bytes - at < PIECE ? bytes - at : PIECE;
        u->status = kvq_cuda_check(
            u->api, kvq_cuda_copy_up(u->api, address + at, from->data + at, n, u->stream),
            "cuMemcpyHtoDAsync and cuStreamSynchronize of %zu bytes of weights", n);
        if (u->status == KVQ_OK && !report(u, u->done + at + n)) {
            u->status = kvq_fail(KVQ_CANCELLED, "The upload of the weights was cancelled.");
        }
    }
    *to = *from;
    to->data = (const uint8_t *)(uintptr_t)address;
    u->done += kvq_round_up(bytes, WEIGHTS_ALIGN);
}

static void free_weights(kvq_cuda_weights *w, const kvq_cuda_api *api) {
    if (w->memory) api->cuMemFree(w->memory);
    kvq_free(w->layers);
    kvq_free(w);
}

static kvq_status make_weights(kvq_cuda_weights **out, const kvq_cuda_api *api, CUstream stream,
                               const kvq_model *model, const kvq_cuda_weights *wanted,
                               kvq_progress progress, void *user) {
    kvq_cuda_weights *const w = kvq_alloc(sizeof *w);
    if (w) {
        *w = *wanted;
        w->layers = kvq_alloc(model->config.n_layers * sizeof *w->layers);
    }
    if (!w || !w->layers) {
        kvq_free(w);
        return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    }
    upload u = {.api = api, .stream = stream, .weights = w, .progress = progress, .user = user};
    u.status = kvq_cuda_check(api, api->cuMemAlloc(&w->memory, w->bytes),
                              "cuMemAlloc of %.2f GB for weights", (double)w->bytes / 1e9);
    if (u.status == KVQ_OK) for_tensors(model, w, copy_tensor, &u);
    if (u.status != KVQ_OK) {
        free_weights(w, api);
        return u.status;
    }
    *out = w;
    return KVQ_OK;
}

/* Under the lock; NULL if there are none. */
static kvq_cuda_weights *find_weights(const kvq_model *model, int index, int first_layer,
                                      bool head) {
    kvq_cuda_weights *const *const list = model->uploaded, *w;
    for (w = *list; w; w = w->next) {
        if (w->index == index && w->first_layer == first_layer && w->head == head) break;
    }
    return w;
}

bool kvq_cuda_weights_shared(const kvq_model *model, int index, int first_layer, bool head) {
    pthread_mutex_lock(&lock);
    const bool found = find_weights(model, index, first_layer, head) != NULL;
    pthread_mutex_unlock(&lock);
    return found;
}

kvq_status kvq_cuda_weights_open(const kvq_cuda_weights **out, const kvq_cuda_api *api,
                                 CUstream stream, const kvq_model *model, int index,
                                 int first_layer, bool head, kvq_progress progress, void *user) {
    kvq_cuda_weights **const list = model->uploaded;
    kvq_status status = KVQ_OK;
    const kvq_cuda_weights wanted = {.users = 1,
                                     .index = index,
                                     .first_layer = first_layer,
                                     .head = head,
                                     .bytes = kvq_cuda_weights_bytes(model, first_layer, head)};
    pthread_mutex_lock(&lock);
    kvq_cuda_weights *w = find_weights(model, index, first_layer, head);
    if (w) {
        w->users++;
    } else {
        status = make_weights(&w, api, stream, model, &wanted, progress, user);
        if (status == KVQ_OK) {
            w->next = *list;
            *list = w;
        }
    }
    if (status == KVQ_OK) *out = w;
    pthread_mutex_unlock(&lock);
    return status;
}

void kvq_cuda_weights_close(const kvq_cuda_weights *weights, const kvq_cuda_api *api,
                            const kvq_model *model) {
    if (!weights) return;
    pthread_mutex_lock(&lock);
    kvq_cuda_weights **at = model->uploaded;
    while (*at != weights) at = &(*at)->next;
    kvq_cuda_weights *const w = *at;
    if (--w->users == 0) {
        *at = w->next;
        free_weights(w, api);
    }
    pthread_mutex_unlock(&lock);
}
