/* peak_kernels.inl: how fast integers can be multiplied and summed, in vector words (vec_*.h): the
 * measure that the other kernels are held against. Products as these have them, with sums enough to
 * hide their latency, and operands that stay in registers. Included by the isa_*.c files. */

enum {
    PEAK_SUMS = 12, /* independent of each other */
    PEAK_TURNS = 4, /* per round: the ends of rounds are not free */
};

/* An optimizer would drop sums that nobody reads, and take a product that stays the same out of the
 * loop: so the sums are read, and one factor is made to look changed. */
static void peak_read(const vi sum[PEAK_SUMS]) {
    vi all = vi_zero();
    volatile int32_t seen;
    int32_t first;
    for (int i = 0; i < PEAK_SUMS; i++) all = vi_add(all, sum[i]);
    memcpy(&first, &all, sizeof first);
    seen = first;
    (void)seen;
}

static uint64_t peak_int8(uint64_t rounds) {
    const vb s = vb_set(-1);
    vb u = vb_set(1);
    vi sum[PEAK_SUMS];
    for (int i = 0; i < PEAK_SUMS; i++) sum[i] = vi_zero();
    for (uint64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 48
        for (int i = 0; i < PEAK_TURNS * PEAK_SUMS; i++) {
            opaque(u);
            sum[i % PEAK_SUMS] = vi_peak8(sum[i % PEAK_SUMS], u, s);
        }
    }
    peak_read(sum);
    return rounds * PEAK_TURNS * PEAK_SUMS * 2 * sizeof(vb);
}

static uint64_t peak_int16(uint64_t rounds) {
    const vi b = vi_set16(-1);
    vi a = vi_set16(1);
    vi sum[PEAK_SUMS];
    for (int i = 0; i < PEAK_SUMS; i++) sum[i] = vi_zero();
    for (uint64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 48
        for (int i = 0; i < PEAK_TURNS * PEAK_SUMS; i++) {
            opaque(a);
            sum[i % PEAK_SUMS] = vi_peak16(sum[i % PEAK_SUMS], a, b);
        }
    }
    peak_read(sum);
    return rounds * PEAK_TURNS * PEAK_SUMS * sizeof(vb); /* half as many products */
}
