/* Decoder layers of few rows on a CPU, in float32: one call for a whole run of layers, with keys and values in pages.

The twin of `mor.engine.layers` on `mor.engine.plain_ops`. Threads share the output features of each product; weights stay
as the model has them (output by input features), and are read once whatever the number of rows.

Legend: N rows, K input features, M output features, D hidden size, F feed-forward size, H query heads, G key/value heads,
E head size, P entries of a page, V vocabulary, W lanes of a vector. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"

#if defined(__AVX512F__)
#define W 16
#define LOW 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define HIGH 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define W 8
#define LOW 0, 2, 4, 6, 8, 10, 12, 14
#define HIGH 1, 3, 5, 7, 9, 11, 13, 15
#else
#define W 4
#define LOW 0, 2, 4, 6
#define HIGH 1, 3, 5, 7
#endif

/* A tile is NT rows by MT features: as many sums as a vector has lanes. */
enum { NT = 4, MT = W / NT, AHEAD = 2 * MT, HALF = (MT + 1) / 2 };

typedef float vector __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float part __attribute__((vector_size(4 * MT), aligned(4), may_alias)); /* a tile's features of one row */

typedef struct {
    const float *qkv, *qkv_bias, *out, *out_bias, *gate_up, *gate_up_bias, *down, *down_bias, *input_norm, *post_norm;
    float *keys, *values;
} Layer;

/* `x` (N, D) becomes the output. `page`, `place` (N,): of new entries; page NULL: none are made. A row sees entries
0..last of the pages in row `table_row` of `table`; one with last -1 takes no part. `overlay`, unless NULL: for each
recursion after the first, and each entry of the first's pages, the entry that lies over it, -1 for none; a row of
`recursion` r > 0 sees these, in pages that are r rows further in the table. `scratch`: see `mor_scratch`. */
typedef struct {
    const Layer *layers;
    float *x;
    const float *cos, *sin;
    const int64_t *page, *place;
    const int32_t *table;
    const int64_t *table_row, *last, *recursion;
    const int32_t *overlay;
    float *scratch;
    int64_t num_layers, rows, hidden, inner, heads, groups, head_size, page_entries, page_stride, table_stride;
    int64_t overlay_stride, longest, threads;
    float eps;
} Run;

static inline vector load(const float *from) { return *(const vector *)from; }

static inline vector paired(vector a, vector b) {
    return __builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH);
}

/* The sum of the lanes of each of W vectors, in their order. */
static inline vector sums(vector each[W]) {
#pragma GCC unroll 16
    for (int count = W / 2; count; count /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) each[i] = paired(each[2 * i], each[2 * i + 1]);
    return each[0];
}

typedef union { vector all; part of[NT]; float each[W]; } Tile;

/* each[i * MT + j] = row[i] . w[j] of the first `count` rows and inputs 0..whole. Meanwhile `fetches` rows of weights, from
`next` on, come nearer. */
static inline __attribute__((always_inline)) Tile tile(const float **row, const float **w, int64_t whole, int count,
                                                       const float *next, int64_t ldw, int fetches) {
    vector sum[W];
    for (int p = 0; p < W; p++) sum[p] = (vector){0};
    for (int64_t c = 0; c < whole; c += W) {
        vector own[MT];
        for (int j = 0; j < MT; j++) {
            own[j] = load(w[j] + c);
            if (j < fetches) __builtin_prefetch(next + j * ldw + c);
        }
        for (int i = 0; i < count; i++) {
            vector value = load(row[i] + c);
            for (int j = 0; j < MT; j++) sum[i * MT + j] += value * own[j];
        }
    }
    return (Tile){sums(sum)};
}

/* The same, compiled for each count. */
static inline __attribute__((always_inline)) Tile tile_of(int64_t count, const float **row, const float **w, int64_t whole,
                                                          const float *next, int64_t ldw, int fetches) {
    switch (count) {
    case 1: return tile(row, w, whole, 1, next, ldw, fetches);
    case 2: return tile(row, w, whole, 2, next, ldw, fetches);
    case 3: return tile(row, w, whole, 3, next, ldw, fetches);
    default: return tile(row, w, whole, NT, next, ldw, fetches);
    }
}

/* out[n][m] (+)= x[n] . weight[m] + bias[m] of rows 0..n and features m0..m1. */
static void product(const float *x, int64_t ldx, int64_t n, const float *weight, int64_t ldw, int64_t k, int64_t m0,
                    int64_t m1, const float *bias, float *out, int64_t ldo, int onto) {
    int64_t whole = k - k % W;
    for (int64_t m = m0; m < m1; m += MT) {
        const float *w[MT];
        for (int j = 0; j < MT; j++) w[j] = weight + (m + j < m1 ? m + j : m1 - 1) * ldw;
        for (int64_t first = 0; first < n; first += NT) {
            const float *row[NT];
            for (int i = 0; i < NT; i++) row[i] = x + (first + i < n ? first + i : n - 1) * ldx;
            /* The weights of a later tile of features, shared out among the tiles of rows: memory and arithmetic overlap. */
            const float *next = weight + (m + AHEAD) * ldw;
            Tile total;
            if (n <= NT) total = tile_of(n - first, row, w, whole, next, ldw, MT);
            else if (n <= 3 * NT) total = tile_of(n - first, row, w, whole, next + (first ? HALF * ldw : 0), ldw, HALF);
            else total = tile_of(n - first, row, w, whole, next + first / NT % MT * ldw, ldw, 1);
            if (whole == k && m + MT <= m1) {
                for (int i = 0; i < NT && first + i < n; i++) {
                    part *to = (part *)(out + (first + i) * ldo + m), value = total.of[i];
                    if (bias) value += *(const part *)(bias + m);
                    if (onto) value += *to;
                    *to = value;
                }
                continue;
            }
            for (int i = 0; i < NT && first + i < n; i++)
                for (int j = 0; j < MT && m + j < m1; j++) {
                    float value = total.each[i * MT + j], *to = out + (first + i) * ldo + m + j;
                    for (int64_t c = whole; c < k; c++) value += row[i][c] * w[j][c];
                    if (bias) value += bias[m + j];
                    *to = onto ? *to + value : value;
                }
        }
    }
}

static void normed(const float *x, const float *weight, int64_t d, float eps, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; c++) sum += x[c] * x[c];
    float scale = 1 / sqrtf(sum / d + eps);
#pragma omp simd
    for (int64_t c = 0; c < d; c++) out[c] = x[c] * scale * weight[c];
}

/* e^x for x <= 88, to 1e-7 of it; 0 from about -87 down. */
static inline float exponential(float x) {
    float clamped = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
    float whole = clamped * 1.44269504f + 12582912.0f;
    union { float f; int32_t i; } bits = {whole};
    float count = whole - 12582912.0f;
    float rest = clamped - count * 0.693359375f + count * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1;
    bits.i = (int32_t)((uint32_t)(bits.i - 0x4B400000 + 127) << 23);
    return x < -87.3f ? 0 : power * bits.f;
}

static void gated(float *gate, const float *up, int64_t count) {
#pragma omp simd
    for (int64_t c = 0; c < count; c++) gate[c] = gate[c] / (1 + exponential(-gate[c])) * up[c];
}

static void rotated(const float *from, const float *cos, const float *sin, int64_t e, float *to) {
    int64_t half = e / 2;
    for (int64_t c = 0; c < half; c++) {
        float first = from[c], second = from[half + c];
        to[c] = first * cos[c] - second * sin[c];
        to[half + c] = second * cos[half + c] + first * sin[half + c];
    }
}

/* Softmax of scores scaled, without the division by their sum: returns 1 / sum. */
static float weighted(float *score, int64_t length, float scale) {
    float most = score[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t l = 0; l < length; l++) most = score[l] > most ? score[l] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t l = 0; l < length; l++) {
        score[l] = exponential((score[l] - most) * scale);
        sum += score[l];
    }
    return 1 / sum;
}

/* Where what a row sees lies: pages of `entries`, `step` floats apart. */
typedef struct {
    const float *keys, *values;
    const int32_t *pages;
    int64_t page_stride, entries, step;
} Place;

/* out[h] = share[h] * sum of score[h][l] * value[l] for up to NT heads. */
static void mixed(const Place *place, int64_t e, const float *score, int64_t lds, int64_t length, int64_t heads,
                  const float *share, float *out) {
    int64_t step = place->step, entries = place->entries;
    const float *of[NT];
    for (int h = 0; h < NT; h++) of[h] = score + (h < heads ? h : heads - 1) * lds;
    for (int64_t c = 0; c < e; c += W) {
        float last[W] = {0};
        vector sum[NT];
        for (int h = 0; h < NT; h++) sum[h] = (vector){0};
        for (int64_t begin = 0, page = 0; begin < length; begin += entries, page++) {
            const float *value = place->values + place->pages[page] * place->page_stride + c;
            int64_t end = begin + entries < length ? begin + entries : length;
            for (int64_t l = begin; l < end; l++, value += step) {
                vector own;
                if (c + W <= e) {
                    own = load(value);
                } else {
                    memcpy(last, value, 4 * (e - c));
                    own = load(last);
                }
                for (int h = 0; h < NT; h++) sum[h] += own * of[h][l];
            }
        }
        for (int h = 0; h < NT && h < heads; h++) {
            vector result = sum[h] * share[h];
            for (int i = 0; i < W && c + i < e; i++) out[h * e + c + i] = result[i];
        }
    }
}

/* Copies of what a row sees, one entry after another: those of a page, and in their stead those that lie over them. */
static Place copied(const Run *run, const Place *from, int64_t recursion, int64_t length, float *copy) {
    static const int32_t only = 0;
    int64_t e = run->head_size, entries = run->page_entries;
    const int32_t *overlay = run->overlay + (recursion - 1) * run->overlay_stride;
    const int32_t *own_pages = from->pages + recursion * run->table_stride;
    for (int64_t l = 0; l < length; l++) {
        int64_t page = from->pages[l / entries], in_page = l % entries, own = overlay[page * entries + in_page];
        if (own >= 0) page = own_pages[own / entries], in_page = own % entries;
        int64_t at = page * from->page_stride + in_page * from->step;
        memcpy(copy + l * e, from->keys + at, 4 * e);
        memcpy(copy + (length + l) * e, from->values + at, 4 * e);
    }
    return (Place){copy, copy + length * e, &only, 0, length, e};
}

/* The query heads of one row and key/value head. */
static void attended(const Run *run, const Layer *layer, int64_t row, int64_t group, const float *query, float *score,
                     float *copy, float *out) {
    int64_t e = run->head_size, each = run->heads / run->groups, length = run->last[row] + 1, offset = group * e;
    const int32_t *pages = run->table + run->table_row[row] * run->table_stride;
    Place place = {layer->keys + offset, layer->values + offset, pages, run->page_stride, run->page_entries,
                   run->groups * e};
    if (run->overlay && run->recursion[row]) place = copied(run, &place, run->recursion[row], length, copy);
    int64_t entries = place.entries;
    float scale = 1 / sqrtf((float)e);
    for (int64_t first = 0; first < each; first += NT) {
        int64_t heads = each - first < NT ? each - first : NT;
        float share[NT];
        for (int64_t begin = 0, page = 0; begin < length; begin += entries, page++) {
            int64_t count = length - begin < entries ? length - begin : entries;
            const float *keys = place.keys + place.pages[page] * place.page_stride;
            product(query + first * e, e, heads, keys, place.step, e, 0, count, 0, score + begin, run->longest, 0);
        }
        for (int64_t h = 0; h < heads; h++) share[h] = weighted(score + h * run->longest, length, scale);
        mixed(&place, e, score, run->longest, length, heads, share, out + first * e);
    }
}

/* Rotate queries in place; rotated keys, and values, go to their pages. */
static void stored(const Run *run, const Layer *layer, int64_t row, float *qkv) {
    int64_t e = run->head_size, width = run->groups * e;
    const float *cos = run->cos + row * e, *sin = run->sin + row * e;
    for (int64_t h = 0; h < run->heads; h++) rotated(qkv + h * e, cos, sin, e, qkv + h * e);
    if (!run->page) return;
    int64_t at = run->page[row] * run->page_stride + run->place[row] * width;
    const float *keys = qkv + run->heads * e;
    for (int64_t g = 0; g < run->groups; g++) rotated(keys + g * e, cos, sin, e, layer->keys + at + g * e);
    memcpy(layer->values + at, keys + width, 4 * width);
}

/* Part `number` of 0..count, in whole tiles. */
static int64_t bound(int64_t count, int64_t number, int64_t parts) {
    int64_t tiles = (count + MT - 1) / MT;
    int64_t at = tiles * number / parts * MT;
    return at < count ? at : count;
}

static int64_t qkv_size(const Run *run) {
    return (run->heads + (run->page ? 2 * run->groups : 0)) * run->head_size;
}

/* Floats of scratch memory that a thread needs to copy what a row sees. */
static int64_t copy_size(const Run *run) { return run->overlay ? 2 * run->longest * run->head_size : 0; }

/* Floats of scratch memory that a run needs. */
int64_t mor_scratch(const Run *run) {
    int64_t attention = run->heads * run->head_size;
    return run->rows * (2 * run->hidden + qkv_size(run) + attention + 2 * run->inner + 1) +
           run->threads * (NT * run->longest + copy_size(run));
}

void mor_layers(const Run *run) {
    int64_t d = run->hidden, f = run->inner, e = run->head_size, c = qkv_size(run), a = run->heads * e, n = 0;
    float *x = run->scratch, *h = x + run->rows * d, *qkv = h + run->rows * d, *out = qkv + run->rows * c;
    float *both = out + run->rows * a, *scores = both + run->rows * 2 * f;
    float *copies = scores + run->threads * NT * run->longest;
    int32_t *taking = (int32_t *)(copies + run->threads * copy_size(run));
    for (int64_t row = 0; row < run->rows; row++)
        if (run->last[row] >= 0) {
            memcpy(x + n * d, run->x + row * d, 4 * d);
            taking[n++] = (int32_t)row;
        }
    if (!n) return;
#pragma omp parallel num_threads(run->threads)
    {
        int64_t me = own_number(), parts = num_parts();
        float *score = scores + me * NT * run->longest, *copy = copies + me * copy_size(run);
        for (const Layer *layer = run->layers; layer < run->layers + run->num_layers; layer++) {
#pragma omp for
            for (int64_t i = 0; i < n; i++) normed(x + i * d, layer->input_norm, d, run->eps, h + i * d);
            product(h, d, n, layer->qkv, d, d, bound(c, me, parts), bound(c, me + 1, parts), layer->qkv_bias, qkv, c, 0);
#pragma omp barrier
#pragma omp for
            for (int64_t i = 0; i < n; i++) stored(run, layer, taking[i], qkv + i * c);
#pragma omp for schedule(dynamic)
            for (int64_t pair = 0; pair < n * run->groups; pair++) {
                int64_t i = pair / run->groups, group = pair % run->groups, at = group * (run->heads / run->groups) * e;
                attended(run, layer, taking[i], group, qkv + i * c + at, score, copy, out + i * a + at);
            }
            product(out, a, n, layer->out, a, a, bound(d, me, parts), bound(d, me + 1, parts), layer->out_bias, x, d, 1);
#pragma omp barrier
#pragma omp for
            for (int64_t i = 0; i < n; i++) normed(x + i * d, layer->post_norm, d, run->eps, h + i * d);
            int64_t from = bound(f, me, parts), to = bound(f, me + 1, parts);
            const float *bias = layer->gate_up_bias;
            product(h, d, n, layer->gate_up, d, d, from, to, bias, both, 2 * f, 0);
            product(h, d, n, layer->gate_up + f * d, d, d, from, to, bias ? bias + f : 0, both + f, 2 * f, 0);
            for (int64_t i = 0; i < n; i++) gated(both + i * 2 * f + from, both + i * 2 * f + f + from, to - from);
#pragma omp barrier
            product(both, 2 * f, n, layer->down, f, f, bound(d, me, parts), bound(d, me + 1, parts), layer->down_bias, x, d,
                    1);
#pragma omp barrier
        }
    }
    for (int64_t i = 0; i < n; i++) memcpy(run->x + taking[i] * d, x + i * d, 4 * d);
}

/* logits (N, V) = norm of x (N, D) . weight (V, D). `scratch`: room for the norm. */
void mor_logits(const float *x, const float *norm, const float *weight, float *scratch, float *logits, int64_t n, int64_t d,
                int64_t v, int64_t threads, float eps) {
#pragma omp parallel num_threads(threads)
    {
        int64_t me = own_number(), parts = num_parts();
#pragma omp for
        for (int64_t i = 0; i < n; i++) normed(x + i * d, norm, d, eps, scratch + i * d);
        product(scratch, d, n, weight, d, d, bound(v, me, parts), bound(v, me + 1, parts), 0, logits, v, 0);
    }
}
