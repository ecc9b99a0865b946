/* test_kv_plan.c: what plans make of a scheme's row, a profile and a budget of bits. */
#include "kv/kv_plan.h"
#include "test.h"

enum { LAYERS = 5, HEADS = 2, D = 64, TRACKS = LAYERS * KVQ_SIDES * HEADS };

/* Later layers matter more, values twice as much as the keys of the layer before. */
static const kvq_profile *make_profile(void) {
    static float importance[LAYERS * HEADS * D], k[LAYERS], v[LAYERS * HEADS];
    static float matrices[LAYERS * HEADS * D * D], mean[LAYERS * HEADS * D];
    static uint16_t order[LAYERS * HEADS * D];
    static uint8_t n_waves[LAYERS * HEADS]; /* none */
    static kvq_profile p = {.n_layers = LAYERS,
                            .n_heads = HEADS,
                            .d_head = D,
                            .d = D,
                            .label = "test",
                            .k_store = matrices,
                            .k_query = matrices,
                            .k_mean = mean,
                            .v_store = matrices,
                            .v_restore = matrices,
                            .v_mean = mean,
                            .importance = importance,
                            .k_sensitivity = k,
                            .v_sensitivity = v,
                            .order = order,
                            .n_waves = n_waves};
    for (int i = 0; i < LAYERS * HEADS * D; i++) {
        importance[i] = 1.0f / (float)(1 + i % D);
        order[i] = (uint16_t)((i + 1) % D);
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        k[layer] = powf(4.0f, (float)layer);
        for (int head = 0; head < HEADS; head++) {
            v[layer * HEADS + head] = 10.0f * powf(4.0f, (float)layer);
        }
    }
    return &p;
}

static const bool no_bias[LAYERS] = {false};

static kvq_plan_request request_for(const char *scheme, const kvq_profile *profile) {
    kvq_plan_request r = {.profile = profile,
                          .n_layers = LAYERS,
                          .n_heads = HEADS,
                          .d_head = D,
                          .key_bias = no_bias,
                          .l_k = -1,
                          .l_v = -1};
    kvq_scheme_find(&r.scheme, scheme);
    return r;
}

static const kvq_track *at(const kvq_track *tracks, int layer, int side, int head) {
    return &tracks[(layer * KVQ_SIDES + side) * HEADS + head];
}

/* How many layers have a codec on one side, in all heads, and whether they are the first ones. */
static int layers_with(const kvq_track *tracks, int side, kvq_codec_id codec, bool *first) {
    int n = 0;
    *first = true;
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int head = 0; head < HEADS; head++) {
            if (at(tracks, layer, side, head)->codec != at(tracks, layer, side, 0)->codec)
                return -1;
        }
        if (at(tracks, layer, side, 0)->codec != codec) continue;
        *first = *first && n == layer;
        n++;
    }
    return n;
}

static const char *asymkv_has_more_bits_in_the_first_layers(void) {
    static const int given[][2] = {{-1, -1}, {2, 4}, {0, 0}, {LAYERS, LAYERS}, {-1, 1}};
    static const int expected[][2] = {
        {LAYERS, (LAYERS + 1) / 2}, {2, 4}, {0, 0}, {LAYERS, LAYERS}, {LAYERS, 1}};
    static const struct {
        const char *scheme;
        kvq_codec_id more[KVQ_SIDES];
    } schemes[] = {{"asymkv", {KVQ_CODEC_u2, KVQ_CODEC_t2}},
                   {"asymkv-4", {KVQ_CODEC_u4, KVQ_CODEC_nf4}}};
    static const kvq_codec_id less[KVQ_SIDES] = {KVQ_CODEC_u1, KVQ_CODEC_t1};
    for (size_t i = 0; i < 2 * sizeof given / sizeof *given; i++) {
        kvq_track tracks[TRACKS];
        kvq_plan_request r = request_for(schemes[i % 2].scheme, NULL);
        r.l_k = given[i / 2][0];
        r.l_v = given[i / 2][1];
        if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        for (int side = 0; side < KVQ_SIDES; side++) {
            bool first, rest;
            const int more = layers_with(tracks, side, schemes[i % 2].more[side], &first);
            const int others = layers_with(tracks, side, less[side], &rest);
            if (more != expected[i / 2][side] || more + others != LAYERS || !first) {
                return TEST_FAIL("%s with l_k, l_v = %d, %d: side %d has %d layers of more bits",
                                 schemes[i % 2].scheme, r.l_k, r.l_v, side, more);
            }
        }
    }
    return NULL;
}

static const char *asymkv_spends_bits_where_they_save_most(void) {
    const kvq_profile *const profile = make_profile();
    const kvq_kv_shape plain = kvq_plain_shape(D);
    const double most = 4.0 * (double)(kvq_u2_bytes(&plain) + kvq_t2_bytes(&plain)) /
                        (KVQ_BLOCK * D); /* of all layers */
    int before = -1;
    for (double bits = 1.4; bits < most + 0.1; bits += 0.1) {
        kvq_track tracks[TRACKS];
        kvq_plan_request r = request_for("asymkv", profile);
        bool first;
        int more = 0;
        r.bits = fmin(bits, most);
        if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        const double got =
            0.5 * (kvq_plan_bits(tracks, &r, KVQ_KEYS) + kvq_plan_bits(tracks, &r, KVQ_VALUES));
        if (got > bits) return TEST_FAIL("%.3g bits were given, and %.3g taken", bits, got);
        for (int side = 0; side < KVQ_SIDES; side++) {
            const kvq_codec_id codec = side == KVQ_KEYS ? KVQ_CODEC_u2 : KVQ_CODEC_t2;
            const int n = layers_with(tracks, side, codec, &first);
            TEST_CHECK(n >= 0);
            for (int i = 0; i < n; i++) { /* the last layers matter most here */
                TEST_CHECK(at(tracks, LAYERS - 1 - i, side, 0)->codec == codec);
            }
            more += n;
        }
        /* a step is a tenth of a bit of one of 10 sides of layers, and all bits are spent */
        TEST_CHECK(more >= before && (more == 2 * LAYERS || bits - got < 0.11));
        before = more;
    }
    TEST_CHECK(before == 2 * LAYERS);
    return NULL;
}

static const char *skvq_takes_order_and_groups_of_a_profile(void) {
    const kvq_profile *const profile = make_profile();
    kvq_track tracks[TRACKS];
    kvq_plan_request r = request_for("skvq-g32", profile);
    if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int head = 0; head < HEADS; head++) {
            const kvq_track *const k = at(tracks, layer, KVQ_KEYS, head);
            const kvq_track *const v = at(tracks, layer, KVQ_VALUES, head);
            TEST_CHECK(k->basis.kind == KVQ_BASIS_permuted &&
                       k->basis.order == profile->order + (layer * HEADS + head) * D);
            TEST_CHECK(k->shape.group == 32);
            TEST_CHECK(v->shape.group == 32);
            TEST_CHECK(k->block_bytes == kvq_u2_bytes(&k->shape));
        }
    }

    static const bool bias[LAYERS] = {true};
    r.profile = NULL;
    r.key_bias = bias;
    if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (int layer = 0; layer < LAYERS; layer++) {
        const kvq_track *const k = at(tracks, layer, KVQ_KEYS, 1);
        TEST_CHECK(k->basis.kind == (bias[layer] ? KVQ_BASIS_identity : KVQ_BASIS_hadamard));
        TEST_CHECK(k->shape.group == D);
    }
    return NULL;
}

/* Groups that do not divide a head are the head. */
static const char *groups_are_as_the_row_says_where_they_fit(void) {
    static const struct {
        int d_head, group;
    } heads[] = {{32, 32}, {64, 64}, {96, 96}, {128, 64}, {80, 80}, {256, 64}};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        kvq_track tracks[TRACKS];
        kvq_plan_request r = request_for("skvq-g64", NULL);
        r.d_head = heads[i].d_head;
        if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        if (at(tracks, 0, KVQ_VALUES, 0)->shape.group != heads[i].group) {
            return TEST_FAIL("groups of %d in heads %d wide, expected %d",
                             at(tracks, 0, KVQ_VALUES, 0)->shape.group, heads[i].d_head,
                             heads[i].group);
        }
    }
    return NULL;
}

static const char *a_budget_is_kept_and_spent(void) {
    const kvq_profile *const profile = make_profile();
    for (double bits = 1.0; bits < 5; bits += 0.37) {
        kvq_track tracks[TRACKS];
        kvq_plan_request r = request_for("auto", profile);
        r.bits = bits;
        if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        const double got =
            0.5 * (kvq_plan_bits(tracks, &r, KVQ_KEYS) + kvq_plan_bits(tracks, &r, KVQ_VALUES));
        if (!(got <= bits && got > 0.95 * bits)) {
            return TEST_FAIL("%.3g bits were given, and %.3g taken", bits, got);
        }
        TEST_CHECK(at(tracks, LAYERS - 1, KVQ_VALUES, 0)->block_bytes >=
                   at(tracks, 0, KVQ_VALUES, 0)->block_bytes);
        TEST_CHECK(at(tracks, LAYERS - 1, KVQ_KEYS, 0)->block_bytes >=
                   at(tracks, 0, KVQ_KEYS, 0)->block_bytes);
    }
    return NULL;
}

static const char *a_profile_is_used_where_it_changes_something(void) {
    const kvq_profile *const profile = make_profile();
    const struct {
        const char *scheme;
        const kvq_profile *profile;
        double bits;
        bool used;
    } cases[] = {{"f16", profile, 0, false},       {"nqkv", profile, 0, false},
                 {"skvq", profile, 0, false},      {"skvq-g32", NULL, 0, false},
                 {"skvq-g32", profile, 0, true},   {"asymkv", profile, 0, false},
                 {"asymkv", profile, 1.5, true},   {"svdq", profile, 0, true},
                 {"svdq-steps", profile, 0, true}, {"auto", profile, 0, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvq_track tracks[TRACKS];
        kvq_plan_request r = request_for(cases[i].scheme, cases[i].profile);
        r.bits = cases[i].bits;
        if (kvq_plan_make(tracks, &r) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        if (kvq_plan_uses_profile(tracks, &r) != cases[i].used) {
            return TEST_FAIL("%s, case %zu: expected %d", cases[i].scheme, i, cases[i].used);
        }
    }
    return NULL;
}

/* Each in a sentence that says what to do. */
static const char *what_cannot_be_planned_is_refused(void) {
    const kvq_profile *const profile = make_profile();
    static const struct {
        const char *scheme;
        bool profile;
        double bits;
        int l_k, l_v;
        const char *says;
    } wrong[] = {
        {"svdq", false, 0, -1, -1, "was given none; `pykvq calibrate` makes one"},
        {"asymkv", false, 1.5, -1, -1, "was given none; `pykvq calibrate` makes one"},
        {"asymkv", true, 1.5, 2, -1, "either"},
        {"asymkv", true, 1.0, -1, -1, "1 bits per element were asked for"},
        {"asymkv", true, 3, -1, -1, "asymkv takes 1.27 to 2.26 for heads 64 wide"},
        {"asymkv", false, 0, LAYERS + 1, 0, "l_k is 6, expected 0 to 5"},
        {"asymkv", false, 0, 0, -2, "l_v is -2, expected 0 to 5"},
        {"skvq", false, 0, 1, -1, "scheme skvq, but only asymkv"},
        {"skvq", true, 2, -1, -1, "fixed"},
        {"svdq-steps", true, 2, -1, -1, "fixed"},
        {"auto", true, 0.5, -1, -1, "auto takes 0.65 to 6.39 for heads 64 wide"},
        {"auto", true, 6.5, -1, -1, "6.5 bits per element were asked for"},
        {"auto", true, NAN, -1, -1, "expected 0.1 to 16"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        kvq_track tracks[TRACKS];
        kvq_plan_request r = request_for(wrong[i].scheme, wrong[i].profile ? profile : NULL);
        r.bits = wrong[i].bits;
        r.l_k = wrong[i].l_k;
        r.l_v = wrong[i].l_v;
        if (kvq_plan_make(tracks, &r) != KVQ_ERR_ARGUMENT || !strstr(kvq_error(), wrong[i].says)) {
            return TEST_FAIL("%s, %g bits, %d and %d layers: expected a sentence with \"%s\"",
                             wrong[i].scheme, wrong[i].bits, wrong[i].l_k, wrong[i].l_v,
                             wrong[i].says);
        }
    }
    return NULL;
}

const kvq_test tests_kv_plan[] = {
    {"kv plan: asymkv has more bits in the first layers", asymkv_has_more_bits_in_the_first_layers},
    {"kv plan: a profile is used where it changes something",
     a_profile_is_used_where_it_changes_something},
    {"kv plan: asymkv spends bits where they save most", asymkv_spends_bits_where_they_save_most},
    {"kv plan: skvq takes order and groups of a profile", skvq_takes_order_and_groups_of_a_profile},
    {"kv plan: groups are as the row says where they fit",
     groups_are_as_the_row_says_where_they_fit},
    {"kv plan: a budget is kept and spent", a_budget_is_kept_and_spent},
    {"kv plan: what cannot be planned is refused", what_cannot_be_planned_is_refused},
    {NULL, NULL},
};
