/* kv_scheme.c: the rows of schemes.def. */
#include "kv/kv_scheme.h"

static const kvq_scheme schemes[] = {
#define KVQ_SCHEME(NAME, PLAN, PROFILE, KEY_BIAS, BASIS_K, CODEC_K, GROUP_K, BASIS_V, CODEC_V,     \
                   GROUP_V, BITS, SINKS, WINDOW, SUMMARY)                                          \
    {NAME,                                                                                         \
     SUMMARY,                                                                                      \
     KVQ_PLAN_##PLAN,                                                                              \
     KVQ_PROFILE_##PROFILE,                                                                        \
     KVQ_KEY_BIAS_##KEY_BIAS,                                                                      \
     KVQ_BASIS_##BASIS_K,                                                                          \
     KVQ_BASIS_##BASIS_V,                                                                          \
     KVQ_CODEC_##CODEC_K,                                                                          \
     KVQ_CODEC_##CODEC_V,                                                                          \
     GROUP_K,                                                                                      \
     GROUP_V,                                                                                      \
     BITS,                                                                                         \
     SINKS,                                                                                        \
     WINDOW},
#include "kv/schemes.def"
#undef KVQ_SCHEME
};
enum { N_SCHEMES = sizeof schemes / sizeof *schemes };

kvq_status kvq_scheme_find(const kvq_scheme **out, const char *name) {
    if (!name) name = "skvq";
    for (int i = 0; i < N_SCHEMES; i++) {
        if (strcmp(schemes[i].name, name) == 0) {
            *out = &schemes[i];
            return KVQ_OK;
        }
    }
    char known[400] = "";
    for (int i = 0; i < N_SCHEMES; i++) {
        if (i) strncat(known, ", ", sizeof known - strlen(known) - 1);
        strncat(known, schemes[i].name, sizeof known - strlen(known) - 1);
    }
    return kvq_fail(KVQ_ERR_ARGUMENT, "The KV scheme \"%.64s\" is unknown; known are: %s.", name,
                    known);
}

kvq_status kvq_scheme_check(const kvq_scheme *scheme, int d_head) {
    const int d = kvq_padded_width(d_head);
    const kvq_codec_id sides[2] = {scheme->codec_k, scheme->codec_v};
    if (d > KVQ_D_MAX) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "The model's heads are %d wide; KV caches are implemented "
                        "for widths up to %d.",
                        d_head, KVQ_D_MAX);
    }
    if (scheme->plan == KVQ_PLAN_svdq_steps && d % 64 != 0) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "The KV scheme %s shares bits out by eighths of a head whose width is a "
                        "multiple of 64, and this model's are %d wide; use svdq.",
                        scheme->name, d_head);
    }
    for (int side = 0; side < 2; side++) {
        const kvq_codec *const codec = &kvq_codecs[sides[side]];
        if (d % codec->d_multiple != 0) {
            return kvq_fail(
                KVQ_ERR_UNSUPPORTED,
                "The KV scheme %s packs heads whose width is a multiple of %d, and this "
                "model's are %d wide; use f16 or skvq.",
                scheme->name, codec->d_multiple, d_head);
        }
    }
    return KVQ_OK;
}

void kvq_svdq_steps(int run[KVQ_RUNS], const kvq_scheme *scheme, int d) {
    const int e = d / 8;
    const int two[KVQ_RUNS] = {e, e, e, 2 * e}, less[KVQ_RUNS] = {0, 2 * e, e, 0};
    memcpy(run, scheme->bits < 2 ? less : two, sizeof two);
}

/* Bits per element of a block of one side, as plans without a profile make it (SKVQ groups keys
 * only by the order of one). Of mixed with bits shared out by importance the most that it can take:
 * a scale for every channel. */
static double side_bits(const kvq_scheme *s, kvq_codec_id codec, int group, int d_head) {
    kvq_kv_shape shape = kvq_scheme_shape(group, d_head);
    double bytes = 0;
    if (codec == KVQ_CODEC_mixed && s->plan == KVQ_PLAN_svdq_steps) {
        kvq_svdq_steps(shape.run, s, shape.d);
    } else if (codec == KVQ_CODEC_mixed) {
        bytes = s->bits * KVQ_BLOCK * shape.d / 8 + shape.d;
    }
    bytes += (double)kvq_codecs[codec].bytes(&shape);
    return 8.0 * bytes / (KVQ_BLOCK * d_head);
}

int32_t kvq_scheme_count(void) { return N_SCHEMES; }

kvq_status kvq_scheme_describe(int32_t index, int32_t d_head, kvq_scheme_info *out) {
    if (index < 0 || index >= N_SCHEMES) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "KV scheme number %d does not exist; there are %d.",
                        index, N_SCHEMES);
    }
    if (d_head <= 0) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "A head cannot be %d channels wide.", d_head);
    }
    const kvq_scheme *const s = &schemes[index];
    const kvq_status status = kvq_scheme_check(s, d_head);
    if (status != KVQ_OK) return status;
    *out = (kvq_scheme_info){.name = s->name,
                             .summary = s->summary,
                             .basis_k = kvq_basis_name(s->basis_k),
                             .basis_v = kvq_basis_name(s->basis_v),
                             .profile = s->profile,
                             .key_bias_sensitive = s->key_bias == KVQ_KEY_BIAS_SENSITIVE,
                             .has_budget = kvq_scheme_has_budget(s),
                             .has_layers = s->plan == KVQ_PLAN_asymkv,
                             .codec_k = kvq_codecs[s->codec_k].name,
                             .codec_v = kvq_codecs[s->codec_v].name,
                             .sinks = s->sinks,
                             .window = s->window,
                             .block = KVQ_BLOCK,
                             .bits_k = side_bits(s, s->codec_k, 0, d_head),
                             .bits_v = side_bits(s, s->codec_v, s->group_v, d_head)};
    if (s->plan == KVQ_PLAN_asymkv) { /* half of the layers */
        out->bits_v = 0.5 * (out->bits_v + side_bits(s, KVQ_ASYMKV_LESS_V, 0, d_head));
    }
    if (s->plan == KVQ_PLAN_budget) out->bits_k = out->bits_v = s->bits;
    return KVQ_OK;
}
