/* session_place.c: which layers of a session run on which device, and what they take there. */
#include <stdio.h>
#include <stdlib.h>

#include "cuda/cuda_weights.h"
#include "session_part.h"

enum {
    ANY_GPU = -2, /* "auto" */
    NO_GPU = -1,  /* "cpu" */
    MOST_GPUS = 64,
    MOST_LAYERS = 65536,
    ASSUMED_PROCESSORS = 128 /* of a GPU that is only planned for */
};

static kvq_status parse_device(const char *device, int *out) {
    if (!device || strcmp(device, "auto") == 0) {
        *out = ANY_GPU;
        return KVQ_OK;
    }
    if (strcmp(device, "cpu") == 0) {
        *out = NO_GPU;
        return KVQ_OK;
    }
    if (strcmp(device, "cuda") == 0) {
        *out = 0;
        return KVQ_OK;
    }
    if (strncmp(device, "cuda:", 5) == 0 && device[5] >= '0' && device[5] <= '9') {
        char *end;
        const long index = strtol(device + 5, &end, 10);
        if (!*end && index < MOST_GPUS) {
            *out = (int)index;
            return KVQ_OK;
        }
    }
    const kvq_shown shown = kvq_show(device, strlen(device));
    return kvq_fail(KVQ_ERR_ARGUMENT,
                    "device is \"%s\", expected auto, cpu, cuda or cuda:N (cuda:0 to cuda:%d).",
                    shown.text, MOST_GPUS - 1);
}

/* ---- what it takes ------------------------------------------------------------------------- */

static uint64_t tensor_bytes(const kvq_tensor *tensor) {
    return tensor->data ? (uint64_t)tensor->rows * tensor->row_bytes : 0;
}

uint64_t kvq_session_host_weights(const kvq_session *s) {
    const kvq_model *const model = s->model;
    uint64_t bytes = tensor_bytes(&model->token_embd) + tensor_bytes(&model->rope_freqs);
    if (!s->placement.n_layers_gpu) return model->bytes_weights;
    for (int l = 0; l < s->forward.n_layers_cpu; l++) {
#define KVQ_LAYER_TENSOR(MEMBER, NAME, COLS, ROWS, NEED)                                           \
    bytes += tensor_bytes(&model->layers[l].MEMBER);
#include "tensors.def"
#undef KVQ_LAYER_TENSOR
    }
    if (!s->placement.head_on_gpu) {
        bytes += tensor_bytes(&model->output_norm);
        if (model->output.data != model->token_embd.data) bytes += tensor_bytes(&model->output);
    }
    return bytes;
}

uint64_t kvq_session_host_bytes(const kvq_session *s) {
    return kvq_session_host_weights(s) + s->kv_bytes + s->table_bytes + s->scratch_bytes;
}

uint64_t kvq_session_gpu_bytes(const kvq_session *s) {
    const kvq_cuda_bytes *const b = &s->gpu_bytes;
    return b->weights + b->rows + b->sealed + b->tables + b->scratch;
}

/* Whether another session of the model has its weights there. */
static bool has_shared_weights(const kvq_session *s) {
    const kvq_placement *const p = &s->placement;
    return p->n_layers_gpu &&
           kvq_cuda_weights_shared(s->model, p->gpu, s->forward.n_layers_cpu, p->head_on_gpu);
}

/* What it would take of the memory that the GPU uses, beyond what is there: where that is the
 * host's, the host's part too. */
static uint64_t more_gpu_bytes(const kvq_session *s, const kvq_device_info *gpu) {
    return kvq_session_gpu_bytes(s) - (has_shared_weights(s) ? s->gpu_bytes.weights : 0) +
           (gpu->integrated ? kvq_session_host_bytes(s) : 0);
}

kvq_cuda_options kvq_session_cuda_options(const kvq_session *s) {
    return (kvq_cuda_options){.model = s->model,
                              .rings = s->forward.rings,
                              .tracks = s->tracks,
                              .turns = s->turns.n_pairs ? &s->turns : NULL,
                              .gpu = s->gpu,
                              .first_layer = s->forward.n_layers_cpu,
                              .head = s->placement.head_on_gpu,
                              .n_batch = s->n_batch};
}

/* ---- where it goes ------------------------------------------------------------------------- */

/* n layers on a GPU, of which the head counts as one more. */
static kvq_status place(kvq_session *s, int gpu, int n) {
    const int n_layers = (int)s->model->config.n_layers, on_gpu = n < n_layers ? n : n_layers;
    s->placement = (kvq_placement){
        .gpu = n ? gpu : NO_GPU, .n_layers_gpu = on_gpu, .head_on_gpu = n > n_layers};
    s->forward.n_layers_cpu = n_layers - on_gpu;
    s->forward.head_on_gpu = s->placement.head_on_gpu;
    return kvq_session_measure(s);
}

/* The most layers, head included, whose bytes fit; leaves them placed. */
static kvq_status place_what_fits(kvq_session *s, const kvq_device_info *gpu, uint64_t memory,
                                  int most) {
    /* One by one: where another session has the weights of many layers there, few may take more. */
    for (int n = most; n > 0; n--) {
        const kvq_status status = place(s, gpu->index, n);
        if (status != KVQ_OK || more_gpu_bytes(s, gpu) <= memory) return status;
    }
    return place(s, NO_GPU, 0);
}

static kvq_status check_gpu_memory(kvq_session *s, const kvq_device_info *gpu) {
    const kvq_cuda_bytes b = s->gpu_bytes;
    const uint64_t needed = more_gpu_bytes(s, gpu);
    const double gigabyte = 1e9, on_host = (double)kvq_session_host_bytes(s) / gigabyte;
    const int asked = s->placement.n_layers_gpu + s->placement.head_on_gpu;
    char weights[40] = "shared with another session", host[80] = "";
    char advice[160] = "no smaller number of layers would fit, but a smaller n_ctx may";
    if (needed <= gpu->bytes_free) return KVQ_OK;
    if (!has_shared_weights(s)) {
        snprintf(weights, sizeof weights, "%.2f", (double)b.weights / gigabyte);
    }
    if (gpu->integrated) {
        snprintf(host, sizeof host, ", for the CPU, whose memory it is, %.2f", on_host);
    }
    if (place_what_fits(s, gpu, gpu->bytes_free, asked - 1) == KVQ_OK &&
        s->placement.n_layers_gpu) {
        snprintf(advice, sizeof advice,
                 "%d of its layers would fit (n_gpu_layers), the rest runs on "
                 "the CPU; or choose a smaller n_ctx",
                 s->placement.n_layers_gpu + s->placement.head_on_gpu);
    }
    return kvq_fail(KVQ_ERR_MEMORY,
                    "A context of %d tokens under %s needs %.2f GB on CUDA device %d (weights %s, "
                    "KV cache %.2f, scratch %.2f%s), but only %.2f GB are free there; %s.",
                    s->n_ctx, s->scheme->name, (double)needed / gigabyte, gpu->index, weights,
                    (double)(b.rows + b.sealed + b.tables) / gigabyte, (double)b.scratch / gigabyte,
                    host, (double)gpu->bytes_free / gigabyte, advice);
}

/* Takes the first device that can be used; false if there is none. */
static bool find_gpu(kvq_session *s, kvq_device_info *out) {
    const int n = kvq_device_count();
    for (int i = 0; i < n; i++) {
        if (kvq_cuda_gpu_open(&s->gpu, out, i) == KVQ_OK && s->gpu) return true;
    }
    return false;
}

/* On a device that is in use. */
static kvq_status place_on(kvq_session *s, const kvq_session_options *o, const kvq_device_info *gpu,
                           int n, bool as_many_as_fit) {
    s->gpu_processors = gpu->n_multiprocessors;
    if (as_many_as_fit) {
        /* a sixteenth stays free, for code of kernels, and others' needs; of the host's memory it
         * is not among what is free */
        const uint64_t spare = gpu->integrated ? 0 : gpu->bytes_free / 16;
        const kvq_status status = place_what_fits(s, gpu, gpu->bytes_free - spare, n);
        return status == KVQ_ERR_UNSUPPORTED ? place(s, NO_GPU, 0) : status;
    }
    const kvq_status status = place(s, gpu->index, n);
    return status == KVQ_OK && !o->no_memory_check ? check_gpu_memory(s, gpu) : status;
}

kvq_status kvq_session_place(kvq_session *s, const kvq_session_options *o, bool is_plan) {
    const int all = (int)s->model->config.n_layers + 1;
    int index = NO_GPU, n = o->n_gpu_layers;
    kvq_device_info gpu;
    kvq_status status = parse_device(o->device, &index);
    if (status != KVQ_OK) return status;
    if (n < -1 || n > MOST_LAYERS) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "n_gpu_layers is %d, expected 0 to %d, or -1 for all layers.", n,
                        MOST_LAYERS);
    }
    if (index == NO_GPU && n > 0) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "n_gpu_layers is %d, but the device is cpu; expected 0, or a GPU.", n);
    }
    const bool as_many_as_fit = index == ANY_GPU && n == -1;
    if (n == -1 || n > all) n = all;
    if (index == NO_GPU || n == 0) return place(s, NO_GPU, 0);
    if (s->topk) {
        if (index == ANY_GPU) return place(s, NO_GPU, 0);
        return kvq_fail(KVQ_ERR_UNSUPPORTED, "kv_topk works on the CPU only; the device is %s.",
                        o->device);
    }
    s->gpu_processors = ASSUMED_PROCESSORS;
    if (index == ANY_GPU) {
        if (!find_gpu(s, &gpu)) return place(s, NO_GPU, 0);
    } else if (is_plan) {
        return place(s, index, n);
    } else {
        status = kvq_cuda_gpu_open(&s->gpu, &gpu, index);
        if (status != KVQ_OK) return status;
        if (!s->gpu) return kvq_fail(KVQ_ERR_DEVICE, "%s", gpu.why_not);
    }
    status = place_on(s, o, &gpu, n, as_many_as_fit);
    if (status == KVQ_OK && !s->placement.n_layers_gpu) {
        kvq_cuda_gpu_close(s->gpu);
        s->gpu = NULL;
    }
    return status;
}
