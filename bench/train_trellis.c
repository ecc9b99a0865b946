/* train_trellis.c: finds the 16 levels of the trellis codes t1 and t2 (core/kv/kv_format.h).
 *
 *     build/train_trellis BITS
 *
 * Lloyd's algorithm over a trellis (Marcellin and Fischer, IEEE Trans. Comm. 38(1), 1990): code
 * normal data by the path of least error, move each level to the mean of the data that use it,
 * repeat; best of several starts. Prints the mean square error and the levels, in units of
 * KVQ_LEVEL_UNIT, by their four bits of the stream, the last one highest.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { UNITS = 59, LEVELS = 16, LENGTH = 64, CHAINS = 4000, ROUNDS = 60, STARTS = 24 };

static double normal(uint64_t *state) {
    double u[2];
    for (int i = 0; i < 2; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        u[i] = ((double)(*state >> 11) + 0.5) / 9007199254740992.0;
    }
    return sqrt(-2 * log(u[0])) * cos(6.283185307179586 * u[1]);
}

/* Codes one chain; returns its error and leaves in used[t] the level of step t. */
static double code_chain(int used[LENGTH], const double x[LENGTH], const double level[LEVELS],
                         int bits) {
    const int states = LEVELS >> bits, branches = 1 << bits;
    double cost[LEVELS];
    int from[LENGTH][LEVELS];
    for (int s = 0; s < states; s++) cost[s] = s ? INFINITY : 0;
    for (int t = 0; t < LENGTH; t++) {
        double next[LEVELS];
        for (int s = 0; s < states; s++) next[s] = INFINITY;
        for (int i = 0; i < states * branches; i++) { /* window: old state low, new code high */
            const double off = x[t] - level[i], c = cost[i % states] + off * off;
            if (c < next[i >> bits]) {
                next[i >> bits] = c;
                from[t][i >> bits] = i;
            }
        }
        memcpy(cost, next, sizeof cost);
    }
    int s = 0;
    for (int i = 1; i < states; i++) s = cost[i] < cost[s] ? i : s;
    const double error = cost[s];
    for (int t = LENGTH - 1; t >= 0; t--) {
        used[t] = from[t][s];
        s = used[t] % states;
    }
    return error;
}

int main(int argc, char **argv) {
    const int bits = argc == 2 ? atoi(argv[1]) : 0;
    static double x[CHAINS][LENGTH];
    double best[LEVELS] = {0}, least = INFINITY;
    uint64_t state = 1;
    if (bits != 1 && bits != 2) {
        fprintf(stderr, "usage: %s 1|2\n", argv[0]);
        return 2;
    }
    for (int i = 0; i < CHAINS; i++) {
        for (int t = 0; t < LENGTH; t++) x[i][t] = normal(&state);
    }
    for (int start = 0; start < STARTS; start++) {
        double level[LEVELS], error = INFINITY;
        for (int i = 0; i < LEVELS; i++) level[i] = 1.2 * normal(&state);
        for (int round = 0; round < ROUNDS; round++) {
            double sum[LEVELS] = {0};
            int count[LEVELS] = {0}, used[LENGTH];
            error = 0;
            /* a tenth of the data finds the neighbourhood, all of it the place */
            const int n = round < ROUNDS - 15 ? CHAINS / 10 : CHAINS;
            for (int i = 0; i < n; i++) {
                error += code_chain(used, x[i], level, bits) / (n * LENGTH);
                for (int t = 0; t < LENGTH; t++) {
                    sum[used[t]] += x[i][t];
                    count[used[t]]++;
                }
            }
            for (int i = 0; i < LEVELS && round < ROUNDS - 1; i++) {
                level[i] = count[i] ? sum[i] / count[i] : 1.2 * normal(&state);
            }
        }
        if (error < least) {
            least = error;
            memcpy(best, level, sizeof best);
        }
    }
    printf("%d bits: mean square error %.5f\n", bits, least);
    for (int i = 0; i < LEVELS; i++) {
        printf("%.0f,%s", best[i] * UNITS, i % 8 == 7 ? "\n" : " ");
    }
    return 0;
}
