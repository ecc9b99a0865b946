/* kv_plan.c: the plans by name. */
#include "kv/kv_plan.h"

#include <math.h>

/* Before the stretch: what codes leave after it, up to 1.4 times as much for 1-bit values, made
 * worse plans, since attention averages that noise. */
const float kvq_plan_loss[KVQ_CODECS] = {
    [KVQ_CODEC_u1] = 0.3474f,    [KVQ_CODEC_u2] = 0.1075f, [KVQ_CODEC_u4] = 0.0094f,
    [KVQ_CODEC_t1] = 0.307f,     [KVQ_CODEC_c8] = 0.195f,  [KVQ_CODEC_t2] = 0.0923f,
    [KVQ_CODEC_n2] = 0.1128f,    [KVQ_CODEC_n3] = 0.0345f, [KVQ_CODEC_nf4] = 0.0092f,
    [KVQ_CODEC_q8_0] = 2.83e-5f,
};

/* What errors of values count for against those of keys, beside what the sensitivities say. Found
 * by trial, of which no numbers are kept: with half of it plans diverge less at 1.5 and at 2 bits,
 * on both models of the catalogue (text of the calibration's kind, which was not part of it). To
 * check another weight w, multiply kvq.v_sensitivity of a profile by w / VALUE_WEIGHT (read_profile
 * and write_profile of pykvq/profile.py), and compare with `pykvq perplexity MODEL -f TEXT --kv
 * auto:1.5,auto --profile PATH --kld --stream`. */
#define VALUE_WEIGHT 0.5f

/* The codecs that a budget may be spent on for values, by rising bits. */
static const kvq_codec_id value_choices[] = {KVQ_CODEC_t1, KVQ_CODEC_c8,  KVQ_CODEC_t2,
                                             KVQ_CODEC_n3, KVQ_CODEC_nf4, KVQ_CODEC_q8_0};
enum { N_VALUE_CHOICES = sizeof value_choices / sizeof *value_choices };

static kvq_track *track_at(kvq_track *tracks, const kvq_plan_request *r, int layer, int side,
                           int head) {
    return tracks + ((size_t)layer * KVQ_SIDES + (size_t)side) * (size_t)r->n_heads + head;
}

static kvq_basis make_basis(kvq_basis_kind kind, const kvq_profile *p, int layer, int side,
                            int head) {
    kvq_basis basis = {.kind = kind};
    if (kind == KVQ_BASIS_permuted) {
        basis.order = p->order + kvq_profile_head(p, layer, head) * (size_t)p->d;
    }
    if (kind == KVQ_BASIS_calibrated) {
        const size_t h = kvq_profile_head(p, layer, head), d = (size_t)p->d;
        const bool keys = side == KVQ_KEYS;
        basis.store = (keys ? p->k_store : p->v_store) + h * d * d;
        basis.query = keys ? p->k_query + h * d * d : NULL;
        basis.restore = keys ? NULL : p->v_restore + h * d * d;
        basis.mean = (keys ? p->k_mean : p->v_mean) + h * d;
    }
    return basis;
}

static kvq_wave make_wave(kvq_basis_kind kind, const kvq_profile *p, int layer, int side,
                          int head) {
    if (kind != KVQ_BASIS_calibrated || side != KVQ_KEYS) return (kvq_wave){0};
    const size_t h = kvq_profile_head(p, layer, head), d = (size_t)p->d;
    return (kvq_wave){.n = p->n_waves[h],
                      .pair = p->wave_pair + h * KVQ_WAVES,
                      .u = p->wave_u + h * KVQ_WAVES * d,
                      .w = p->wave_w + h * KVQ_WAVES * d};
}

/* ---- widths of latent channels ----------------------------------------------------------- */

enum { MOST_UNITS = KVQ_D_MAX / 4 };
const float kvq_plan_run_loss[KVQ_RUNS] = {0.000044f, 0.00935f, 0.1125f, 0.3515f};

/* What a head's keys can be stored as with a number of 16-bit units per token: the widths of least
 * loss, reverse water-filling among 8, 4, 2, 1 and 0 bits. */
typedef struct mixture {
    float loss;
    uint16_t run[KVQ_RUNS];
} mixture;

static void find_mixtures(mixture best[MOST_UNITS + 1], const float *importance, int d) {
    float sum[KVQ_D_MAX + 1] = {0}; /* of the first c channels */
    for (int c = 0; c < d; c++) sum[c + 1] = sum[c] + importance[c];
    for (int units = 0; units <= d / 4; units++) best[units] = (mixture){.loss = sum[d]};
    for (int n8 = 0; n8 <= d / 4; n8 += 4) {
        for (int to4 = n8; to4 <= d; to4 += 4) {
            for (int to2 = to4; to2 <= d; to2 += 8) {
                for (int to1 = to2; to1 <= d; to1 += 16) {
                    const int units = n8 / 2 + (to4 - n8) / 4 + (to2 - to4) / 8 + (to1 - to2) / 16;
                    if (units > d / 4) continue;
                    const float loss = kvq_plan_run_loss[0] * sum[n8] +
                                       kvq_plan_run_loss[1] * (sum[to4] - sum[n8]) +
                                       kvq_plan_run_loss[2] * (sum[to2] - sum[to4]) +
                                       kvq_plan_run_loss[3] * (sum[to1] - sum[to2]) +
                                       (sum[d] - sum[to1]);
                    if (loss >= best[units].loss) continue;
                    best[units] = (mixture){loss,
                                            {(uint16_t)n8, (uint16_t)(to4 - n8),
                                             (uint16_t)(to2 - to4), (uint16_t)(to1 - to2)}};
                }
            }
        }
    }
}

static void set_runs(kvq_track *track, const uint16_t run[KVQ_RUNS]) {
    for (int i = 0; i < KVQ_RUNS; i++) track->shape.run[i] = run[i];
}

/* ---- a budget ---------------------------------------------------------------------------- */

/* The choices of one track: bytes of a block and divergence that it causes. Of keys, choice i has i
 * units; of values, codec[i]. */
typedef struct ladder {
    int n, at;
    kvq_codec_id codec[N_VALUE_CHOICES];
    size_t bytes[MOST_UNITS + 1];
    float loss[MOST_UNITS + 1];
    int next;   /* the step up that lowers the divergence most per byte; at: there is none */
    float gain; /* per byte */
} ladder;

static void find_step(ladder *l, size_t affordable) {
    l->next = l->at;
    l->gain = 0;
    for (int i = l->at + 1; i < l->n; i++) {
        if (l->bytes[i] <= l->bytes[l->at]) continue;
        const size_t more = l->bytes[i] - l->bytes[l->at];
        const float gain = (l->loss[l->at] - l->loss[i]) / (float)more;
        if (more <= affordable && gain > l->gain) {
            l->gain = gain;
            l->next = i;
        }
    }
}

static void make_ladder(ladder *l, const kvq_track *track, const kvq_profile *p, int layer,
                        int side, int head, const mixture *mixtures) {
    const size_t h = kvq_profile_head(p, layer, head);
    kvq_kv_shape shape = track->shape;
    *l = (ladder){0};
    if (side == KVQ_KEYS) {
        for (int units = 0; units <= shape.d / 4; units++, l->n++) {
            for (int i = 0; i < KVQ_RUNS; i++) shape.run[i] = mixtures[units].run[i];
            l->bytes[l->n] = kvq_mixed_bytes(&shape);
            l->loss[l->n] = p->k_sensitivity[layer] * mixtures[units].loss;
        }
        return;
    }
    for (int i = 0; i < N_VALUE_CHOICES; i++) {
        const kvq_codec_id codec = value_choices[i];
        if (shape.d % kvq_codecs[codec].d_multiple) continue;
        l->codec[l->n] = codec;
        l->bytes[l->n] = kvq_codecs[codec].bytes(&shape);
        l->loss[l->n++] = VALUE_WEIGHT * p->v_sensitivity[h] * kvq_plan_loss[codec];
    }
}

/* Requires that n ladders have room for so many bits per element; `elements` of a block of all of
 * them. */
static kvq_status check_budget(const ladder *ladders, int n, const kvq_plan_request *r, double bits,
                               double elements) {
    size_t least = 0, most = 0;
    for (int i = 0; i < n; i++) {
        size_t top = 0;
        for (int k = 0; k < ladders[i].n; k++) {
            if (ladders[i].bytes[k] > top) top = ladders[i].bytes[k];
        }
        least += ladders[i].bytes[0];
        most += top;
    }
    const double lowest = 8.0 * (double)least / elements, highest = 8.0 * (double)most / elements;
    if (bits >= lowest && bits <= highest) return KVQ_OK;
    /* rounded inward, so that what is named is accepted */
    return kvq_fail(KVQ_ERR_ARGUMENT,
                    "%.4g bits per element were asked for, but the KV scheme %s takes %.2f to %.2f "
                    "for heads %d wide.",
                    bits, r->scheme->name, ceil(100 * lowest) / 100, floor(100 * highest) / 100,
                    r->d_head);
}

/* Climbs n ladders that stand at their feet to where the bits per element end: the steepest
 * affordable step is taken until none is left. */
static kvq_status climb(ladder *ladders, int n, const kvq_plan_request *r, double bits) {
    const double elements =
        (double)KVQ_BLOCK * r->d_head * r->n_layers * r->n_heads * KVQ_SIDES; /* of a block */
    const kvq_status status = check_budget(ladders, n, r, bits, elements);
    if (status != KVQ_OK) return status;
    size_t spent = 0;
    for (int i = 0; i < n; i++) spent += ladders[i].bytes[0];
    size_t left = (size_t)(bits / 8 * elements) - spent;
    for (int i = 0; i < n; i++) find_step(&ladders[i], left);
    for (;;) {
        int best = 0;
        for (int i = 1; i < n; i++) best = ladders[i].gain > ladders[best].gain ? i : best;
        ladder *const l = &ladders[best];
        if (l->next == l->at) break;
        const size_t more = l->bytes[l->next] - l->bytes[l->at];
        if (more <= left) {
            left -= more;
            l->at = l->next;
        } /* else it was affordable when it was found, and is looked for again */
        find_step(l, left);
    }
    return KVQ_OK;
}

/* Spends bits where they lower the divergence most: by layer, head, side and channel. The
 * divergences that calibration measured add up to first order, and each falls with the bits along a
 * ladder. */
static kvq_status plan_budget(kvq_track *tracks, const kvq_plan_request *r, double bits) {
    const kvq_profile *const p = r->profile;
    const int n = r->n_layers * KVQ_SIDES * r->n_heads, d = kvq_padded_width(r->d_head);
    ladder *const ladders = kvq_alloc((size_t)n * sizeof *ladders);
    mixture(*const mixtures)[MOST_UNITS + 1] = kvq_alloc((size_t)n * sizeof *mixtures);
    kvq_status status = KVQ_OK;
    if (!ladders || !mixtures) {
        status = kvq_fail(KVQ_ERR_MEMORY, "There is no memory to plan a KV cache.");
        goto done;
    }
    for (int i = 0; i < n; i++) {
        const int head = i % r->n_heads, side = i / r->n_heads % KVQ_SIDES;
        const int layer = i / r->n_heads / KVQ_SIDES;
        if (side == KVQ_KEYS) {
            const float *const importance =
                p->importance + kvq_profile_head(p, layer, head) * (size_t)d;
            find_mixtures(mixtures[i], importance, d);
        }
        make_ladder(&ladders[i], &tracks[i], p, layer, side, head, mixtures[i]);
    }
    status = climb(ladders, n, r, bits);
    for (int i = 0; i < n && status == KVQ_OK; i++) {
        if (i / r->n_heads % KVQ_SIDES == KVQ_KEYS)
            set_runs(&tracks[i], mixtures[i][ladders[i].at].run);
        else
            tracks[i].codec = ladders[i].codec[ladders[i].at];
    }
done:
    kvq_free(ladders);
    kvq_free(mixtures);
    return status;
}

/* ---- AsymKV ------------------------------------------------------------------------------ */

static void set_codec(kvq_track *tracks, const kvq_plan_request *r, int layer, int side,
                      kvq_codec_id codec) {
    for (int head = 0; head < r->n_heads; head++) {
        track_at(tracks, r, layer, side, head)->codec = codec;
    }
}

/* The divergence if nothing of one side of a layer were known, as far as it goes by the mean square
 * error. */
static float divergence_of(const kvq_profile *p, int layer, int side) {
    float sum = 0;
    for (int head = 0; head < p->n_heads; head++) {
        const size_t h = kvq_profile_head(p, layer, head);
        if (side == KVQ_VALUES) sum += p->v_sensitivity[h];
        for (int c = 0; c < p->d && side == KVQ_KEYS; c++) {
            sum += p->k_sensitivity[layer] * p->importance[h * (size_t)p->d + (size_t)c];
        }
    }
    return sum;
}

/* The row's codecs for the first l_k and l_v layers, as in the paper; or, given an average of bits,
 * for those layers where they save most. */
static kvq_status plan_asymkv(kvq_track *tracks, const kvq_plan_request *r) {
    static const kvq_codec_id less[KVQ_SIDES] = {KVQ_ASYMKV_LESS_K, KVQ_ASYMKV_LESS_V};
    const kvq_codec_id more[KVQ_SIDES] = {r->scheme->codec_k, r->scheme->codec_v};
    const kvq_kv_shape shape = tracks[0].shape;
    const int n = r->n_layers * KVQ_SIDES;
    if (r->bits == 0) {
        const int first[KVQ_SIDES] = {r->l_k < 0 ? r->n_layers : r->l_k,
                                      r->l_v < 0 ? (r->n_layers + 1) / 2 : r->l_v};
        for (int i = 0; i < n; i++) {
            const int layer = i / KVQ_SIDES, side = i % KVQ_SIDES;
            set_codec(tracks, r, layer, side, layer < first[side] ? more[side] : less[side]);
        }
        return KVQ_OK;
    }
    ladder *const ladders = kvq_alloc((size_t)n * sizeof *ladders);
    if (!ladders) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory to plan a KV cache.");
    for (int i = 0; i < n; i++) {
        const int layer = i / KVQ_SIDES, side = i % KVQ_SIDES;
        const kvq_codec_id choice[] = {less[side], more[side]};
        const float all = divergence_of(r->profile, layer, side);
        for (int k = 0; k < 2; k++, ladders[i].n++) {
            ladders[i].bytes[k] = kvq_codecs[choice[k]].bytes(&shape) * (size_t)r->n_heads;
            ladders[i].loss[k] = kvq_plan_loss[choice[k]] * all;
        }
    }
    const kvq_status status = climb(ladders, n, r, r->bits);
    for (int i = 0; i < n; i++) {
        const int side = i % KVQ_SIDES;
        set_codec(tracks, r, i / KVQ_SIDES, side, ladders[i].at ? more[side] : less[side]);
    }
    kvq_free(ladders);
    return status;
}

/* ---- SKVQ -------------------------------------------------------------------------------- */

/* With a profile: its order of the channels, in groups that share a scale. Without one, or in a row
 * without groups, the row's Hadamard makes the channels of a head alike instead. */
static void plan_skvq(kvq_track *tracks, const kvq_plan_request *r) {
    const kvq_profile *const p = r->profile;
    const bool permuted = p && r->scheme->group_k > 0;
    for (int layer = 0; layer < r->n_layers; layer++) {
        for (int head = 0; head < r->n_heads; head++) {
            kvq_track *const k = track_at(tracks, r, layer, KVQ_KEYS, head);
            if (permuted)
                k->basis = make_basis(KVQ_BASIS_permuted, p, layer, KVQ_KEYS, head);
            else
                k->shape.group = k->shape.d;
        }
    }
}

/* ---- SVDq -------------------------------------------------------------------------------- */

static kvq_status plan_svdq(kvq_track *tracks, const kvq_plan_request *r, double bits) {
    const int d = kvq_padded_width(r->d_head), units = (int)(bits * d / 16);
    if (units < 1 || units > d / 4) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "%.3g bits per key element were asked for, expected %.3g to 4.", bits,
                        16.0 / d);
    }
    for (int layer = 0; layer < r->n_layers; layer++) {
        for (int head = 0; head < r->n_heads; head++) {
            mixture best[MOST_UNITS + 1];
            find_mixtures(
                best,
                r->profile->importance + kvq_profile_head(r->profile, layer, head) * (size_t)d, d);
            set_runs(track_at(tracks, r, layer, KVQ_KEYS, head), best[units].run);
        }
    }
    return KVQ_OK;
}

static void plan_svdq_steps(kvq_track *tracks, const kvq_plan_request *r) {
    for (int layer = 0; layer < r->n_layers; layer++) {
        for (int head = 0; head < r->n_heads; head++) {
            kvq_kv_shape *const shape = &track_at(tracks, r, layer, KVQ_KEYS, head)->shape;
            kvq_svdq_steps(shape->run, r->scheme, shape->d);
        }
    }
}

/* ---- all plans --------------------------------------------------------------------------- */

static kvq_status check_request(const kvq_plan_request *r) {
    const kvq_profile *const p = r->profile;
    if (!p && r->scheme->profile == KVQ_PROFILE_NEEDED) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The KV scheme %s needs a profile of the model, but was given none; "
                        "`pykvq calibrate` makes one, and skvq needs none.",
                        r->scheme->name);
    }
    if (p && (p->n_layers != r->n_layers || p->n_heads != r->n_heads || p->d_head != r->d_head)) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The profile %s is for %d layers of %d KV heads %d wide, but the model has "
                        "%d of %d, %d wide.",
                        p->label, p->n_layers, p->n_heads, p->d_head, r->n_layers, r->n_heads,
                        r->d_head);
    }
    if (r->bits != 0 && !kvq_scheme_has_budget(r->scheme)) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The bits of the KV scheme %s are fixed; choose auto for a budget of bits.",
                        r->scheme->name);
    }
    if (r->bits != 0 && !(r->bits >= 0.1 && r->bits <= 16)) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "kv_bits is %g, expected 0.1 to 16.", r->bits);
    }
    return KVQ_OK;
}

/* What the scheme's row says by itself. */
static kvq_track first_track(const kvq_plan_request *r, int layer, int side, int head) {
    const kvq_scheme *const s = r->scheme;
    const int group = side == KVQ_KEYS ? s->group_k : s->group_v;
    kvq_basis_kind kind = side == KVQ_KEYS ? s->basis_k : s->basis_v;
    kvq_track track = {.codec = side == KVQ_KEYS ? s->codec_k : s->codec_v,
                       .shape = kvq_scheme_shape(group, r->d_head)};
    /* A key bias, turned by RoPE, is a large oscillation in a few channels, which a Hadamard would
     * spread over all: codecs with a scale per channel do better without. */
    if ((s->plan == KVQ_PLAN_skvq || s->plan == KVQ_PLAN_asymkv) && side == KVQ_KEYS &&
        r->key_bias[layer]) {
        kind = KVQ_BASIS_identity;
    }
    track.basis = make_basis(kind, r->profile, layer, side, head);
    track.wave = make_wave(kind, r->profile, layer, side, head);
    return track;
}

static kvq_status check_layers(const char *name, int value, int n_layers) {
    if (value >= -1 && value <= n_layers) return KVQ_OK;
    return kvq_fail(KVQ_ERR_ARGUMENT, "%s is %d, expected 0 to %d, the number of layers.", name,
                    value, n_layers);
}

static kvq_status check_asymkv(const kvq_plan_request *r) {
    const bool counted = r->l_k != -1 || r->l_v != -1;
    if (r->scheme->plan != KVQ_PLAN_asymkv) {
        if (!counted) return KVQ_OK;
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "l_k and l_v were given to the KV scheme %s, but only asymkv and asymkv-4 "
                        "take them.",
                        r->scheme->name);
    }
    if (r->bits != 0 && !r->profile) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "To choose layers for %.3g bits the KV scheme %s needs a profile of the "
                        "model, but was given none; `pykvq calibrate` makes one.",
                        r->bits, r->scheme->name);
    }
    if (r->bits != 0 && counted) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The KV scheme %s takes either l_k and l_v or an average of bits, but "
                        "was given both (%.3g bits).",
                        r->scheme->name, r->bits);
    }
    const kvq_status status = check_layers("l_k", r->l_k, r->n_layers);
    return status == KVQ_OK ? check_layers("l_v", r->l_v, r->n_layers) : status;
}

kvq_status kvq_plan_make(kvq_track *tracks, const kvq_plan_request *r) {
    const kvq_scheme *const s = r->scheme;
    const double bits = r->bits != 0 ? r->bits : s->bits;
    kvq_status status = check_request(r);
    if (status == KVQ_OK) status = check_asymkv(r);
    if (status != KVQ_OK) return status;
    for (int layer = 0; layer < r->n_layers; layer++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            for (int head = 0; head < r->n_heads; head++) {
                *track_at(tracks, r, layer, side, head) = first_track(r, layer, side, head);
            }
        }
    }
    switch (s->plan) {
    case KVQ_PLAN_uniform:
        break;
    case KVQ_PLAN_skvq:
        plan_skvq(tracks, r);
        break;
    case KVQ_PLAN_asymkv:
        status = plan_asymkv(tracks, r);
        break;
    case KVQ_PLAN_svdq:
        status = plan_svdq(tracks, r, bits);
        break;
    case KVQ_PLAN_svdq_steps:
        plan_svdq_steps(tracks, r);
        break;
    case KVQ_PLAN_budget:
        status = plan_budget(tracks, r, bits);
        break;
    }
    for (int i = 0; i < r->n_layers * KVQ_SIDES * r->n_heads; i++) {
        tracks[i].block_bytes = kvq_codecs[tracks[i].codec].bytes(&tracks[i].shape);
        tracks[i].bytes_before =
            i % r->n_heads ? tracks[i - 1].bytes_before + tracks[i - 1].block_bytes : 0;
    }
    return status;
}

double kvq_plan_bits(const kvq_track *tracks, const kvq_plan_request *r, int side) {
    double bytes = 0;
    for (int i = 0; i < r->n_layers * KVQ_SIDES * r->n_heads; i++) {
        if (i / r->n_heads % KVQ_SIDES == side) bytes += (double)tracks[i].block_bytes;
    }
    return 8 * bytes / ((double)KVQ_BLOCK * r->d_head * r->n_layers * r->n_heads);
}

bool kvq_plan_uses_profile(const kvq_track *tracks, const kvq_plan_request *r) {
    if (!r->profile) return false;
    if (r->scheme->plan == KVQ_PLAN_asymkv) return r->bits != 0; /* it chose the layers */
    for (int i = 0; i < r->n_layers * KVQ_SIDES * r->n_heads; i++) {
        const kvq_basis_kind kind = tracks[i].basis.kind;
        if (kind == KVQ_BASIS_calibrated || kind == KVQ_BASIS_permuted) return true;
    }
    return false;
}
