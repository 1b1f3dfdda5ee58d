/* The next token of rows that only a temperature shapes: the draw of `mor.engine.sampler`, in the same arithmetic. */

#include <math.h>
#include <stdint.h>

#include "threads.h"

#define STEP 0x9E3779B97F4A7C15ull /* SplitMix64, doi 10.1145/2660193.2660195 */
#define UNIT 1099511627776.0       /* 2^40: weight of the most probable token */

static uint64_t mixed_bits(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

/* e^x for x <= 0 to 2e-16 of it, and what rounds to no weight where that is so. */
static inline double power_of_e(double x) {
    double clamped = x < -40 ? -40 : x;
    double whole = clamped * 1.4426950408889634 + 6755399441055744.0;
    union { double f; int64_t i; } bits = {whole};
    double count = whole - 6755399441055744.0;
    double r = clamped - count * 0.6931471803691238 - count * 1.9082149292705877e-10;
    double p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r * r + r + 1;
    bits.i = (int64_t)((uint64_t)(bits.i - 0x4338000000000000 + 1023) << 52);
    return p * bits.f;
}

/* The sum of e^((logit - most) / temperature), and each of them times UNIT in whole numbers. */
static double weighed(const float *logit, int64_t size, float most, double temperature, int64_t *weight) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < size; v++) {
        double power = power_of_e(((double)logit[v] - most) / temperature), rounded = power * UNIT + 4503599627370496.0;
        union { double f; int64_t i; } bits = {rounded};
        weight[v] = bits.i - 0x4330000000000000;
        sum += power;
    }
    return sum;
}

static int64_t drawn(const float *logit, int64_t size, double temperature, uint64_t seed, uint64_t index, int64_t *weight,
                     float *logprob) {
    float most = -INFINITY;
    int odd = 0;
#pragma omp simd reduction(max : most) reduction(+ : odd)
    for (int64_t v = 0; v < size; v++) {
        most = logit[v] > most ? logit[v] : most;
        odd += logit[v] != logit[v];
    }
    *logprob = NAN;
    if (odd || isinf(most)) return -1;
    double sum = weighed(logit, size, most, 1, weight);
    int64_t total = 0, token = 0;
    if (temperature == 0) {
        while (logit[token] != most) token++;
    } else {
        if (temperature != 1) weighed(logit, size, most, temperature, weight);
        for (int64_t v = 0; v < size; v++) total += weight[v];
        uint64_t number = mixed_bits(mixed_bits(seed * STEP + STEP) + (index + 1) * STEP);
        int64_t target = (int64_t)((double)(number >> 11) * 0x1p-53 * (double)total);
        while (token < size - 1 && weight[token] <= target) target -= weight[token++];
    }
    *logprob = (float)((double)logit[token] - most - log(sum));
    return token;
}

/* Tokens (N,), -1 where the logits (N, V) leave none, and the log-probabilities that the model gave them. `temperature`
(N,) is 0 for the largest logit. `scratch`: room for `threads` times V integers. */
void mor_draw(const float *logits, int64_t rows, int64_t size, const double *temperature, const int64_t *seed,
              const int64_t *index, int64_t *scratch, int64_t *tokens, float *logprobs, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t n = 0; n < rows; n++) {
        int64_t *weight = scratch + own_number() * size;
        tokens[n] = drawn(logits + n * size, size, temperature[n], (uint64_t)seed[n], (uint64_t)index[n], weight,
                          logprobs + n);
    }
}
