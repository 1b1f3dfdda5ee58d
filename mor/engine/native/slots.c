/* What a visit of the slots does between its layers, on the rows that matter: the twin of `mor.engine.slot_steps`, and of
`mor.engine.slot_routing` for models without a router and for routers of linear scores.

A step lists slots as its rows, gathers what the layers read of them, and writes back what came of it.

Legend: S slots, N rows of a step, D hidden size, E head size, R recursions, Q virtual sequences, X pages of a sequence, P
entries of a page. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { RESTING = -1, BROKEN = -2 }; /* as `mor.engine.slot_state` has them */

/* The columns of `mor.engine.slot_state`: integers (S,), floats `float_stride` apart, and of a visit's reports. `stops`:
the first of `num_stops` columns. */
typedef struct {
    int64_t *token, *number, *recursion, *active, *depth, *live, *fresh, *made, *left, *limit, *seed, *top_k, *stops;
    double *gate, *temperature, *top_p, *min_p, *thresholds;
    int32_t *report_token, *report_depth;
    float *report_logprob;
    int64_t *visit, *lengths;
    int32_t *tables;
    float *stream, *x;
    int64_t column_stride, num_stops, float_stride, report_stride, sequences, table_stride;
} State;

/* See `mor.engine.slot_steps.Geometry`; `overlay_stride` is of a recursion. */
typedef struct {
    const float *embeddings, *cos, *sin;
    int32_t *overlay;
    int64_t hidden, head_size, recursions, nobodys, block_entries, outer_entries, taken, reads_first, writes_own;
    int64_t overlay_stride;
} Geometry;

/* The rows of a step: `count` slots, and of each the input and output `x` (N, D) of layers, its stream, the token drawn
for it and what that is drawn by, whether it goes on to a recursion, and its gate there. `limited`: whether any is drawn
with a filter. */
typedef struct {
    int64_t *slot;
    float *x, *stream;
    int64_t *token;
    float *logprob;
    double *temperature;
    int64_t *seed, *made, *goes_on;
    float *gate;
    int64_t count, limited;
} Rows;

/* Where rows find keys and values: see `Run` in `layers.c`. */
typedef struct {
    float *cos, *sin;
    int64_t *page, *place, *table_row, *last, *recursion;
} Placed;

typedef struct {
    const State *state;
    const Geometry *geometry;
    Rows *rows;
} Step;

/* Scores of `heads`, the weights (D,) of each recursion, of an input divided by `temperature`, compared to thresholds, or
those of `auxiliary` unless NULL: the gate is `alpha` times the activation. `heads` NULL: every row takes all recursions up
to its limit, and its output is the stream. */
typedef struct {
    const float *const *heads, *const *auxiliary;
    int64_t activation, weighted;
    float alpha, temperature;
} Router;

enum { IDENTITY, SIGMOID, TANH };

static void copied(float *to, const float *from, int64_t count) { memcpy(to, from, sizeof(float) * (size_t)count); }

static int rests(const State *s, int64_t slot) { return s->live[slot] > 0 && s->recursion[slot] == RESTING; }

/* Rows of the first `slots` that have been through their recursions: their streams. */
int64_t mor_finishing(const Step *step, int64_t slots) {
    const State *s = step->state;
    int64_t d = step->geometry->hidden, n = 0, limited = 0;
    Rows *rows = step->rows;
    for (int64_t slot = 0; slot < slots; slot++) {
        if (!rests(s, slot) || s->fresh[slot]) continue;
        int64_t at = slot * s->float_stride;
        limited |= s->top_k[slot] > 0 || s->top_p[at] < 1 || s->min_p[at] > 0;
        rows->slot[n] = slot;
        rows->temperature[n] = s->temperature[at];
        rows->seed[n] = s->seed[slot];
        rows->made[n] = s->made[slot];
        copied(rows->x + n++ * d, s->stream + slot * d, d);
    }
    rows->limited = limited;
    return rows->count = n;
}

/* Report the tokens of the rows, and let their slots take them: how many requests end. */
int64_t mor_sampled(const Step *step) {
    const State *s = step->state;
    const Rows *rows = step->rows;
    int64_t ended = 0, reports = *s->visit * s->report_stride;
    for (int64_t n = 0; n < rows->count; n++) {
        int64_t slot = rows->slot[n], token = rows->token[n], stops = token < 0;
        s->report_token[reports + slot] = (int32_t)(token < 0 ? BROKEN : token);
        s->report_depth[reports + slot] = (int32_t)s->depth[slot];
        s->report_logprob[reports + slot] = rows->logprob[n];
        for (int64_t i = 0; i < s->num_stops; i++) stops |= s->stops[i * s->column_stride + slot] == token;
        s->token[slot] = token < 0 ? 0 : token;
        s->number[slot]++;
        s->made[slot]++;
        s->left[slot]--;
        s->live[slot] = !stops && s->left[slot] > 0;
        ended += !s->live[slot];
    }
    return ended;
}

/* Rows of the first `slots` whose tokens enter: their embeddings. */
int64_t mor_entering(const Step *step, int64_t slots) {
    const State *s = step->state;
    int64_t d = step->geometry->hidden, n = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        if (!rests(s, slot)) continue;
        s->fresh[slot] = s->depth[slot] = 0;
        step->rows->slot[n] = slot;
        copied(step->rows->x + n++ * d, step->geometry->embeddings + s->token[slot] * d, d);
    }
    return step->rows->count = n;
}

static float dot(const float *a, const float *b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) sum += a[c] * b[c];
    return sum;
}

/* Whether a slot takes a recursion with input `x`, and its gate there. */
static int64_t chosen(const Step *step, const Router *router, int64_t slot, int64_t recursion, const float *x, float *gate) {
    const State *s = step->state;
    int64_t d = step->geometry->hidden, within = recursion < s->limit[slot];
    *gate = 1;
    if (!router->heads) return within;
    float logit = dot(x, router->heads[recursion], d) / router->temperature, decisive = logit;
    if (router->auxiliary) decisive = dot(x, router->auxiliary[recursion], d);
    if (router->activation == IDENTITY) *gate = logit;
    if (router->activation == SIGMOID) *gate = router->alpha / (1 + expf(-logit));
    if (router->activation == TANH) *gate = router->alpha * tanhf(logit);
    return within && decisive >= (float)s->thresholds[slot * s->float_stride + recursion];
}

/* Which of the rows that enter take the first recursion. */
void mor_begun(const Step *step, const Router *router) {
    const Rows *rows = step->rows;
    int64_t d = step->geometry->hidden;
    for (int64_t n = 0; n < rows->count; n++)
        rows->goes_on[n] = chosen(step, router, rows->slot[n], 0, rows->x + n * d, rows->gate + n);
}

/* Put rows that entered into their slots. */
void mor_entered(const Step *step) {
    const State *s = step->state;
    const Geometry *geometry = step->geometry;
    const Rows *rows = step->rows;
    int64_t d = geometry->hidden;
    for (int64_t n = 0; n < rows->count; n++) {
        int64_t slot = rows->slot[n];
        if (geometry->outer_entries) s->lengths[slot * s->sequences + geometry->recursions] = s->number[slot] + 1;
        s->recursion[slot] = geometry->reads_first || rows->goes_on[n] ? 0 : RESTING;
        s->active[slot] = rows->goes_on[n];
        s->gate[slot * s->float_stride] = rows->gate[n];
        copied(s->stream + slot * d, rows->x + n * d, d);
        copied(s->x + slot * d, rows->x + n * d, d);
    }
}

/* Rows of the first `slots` that take the block: their inputs. */
int64_t mor_going(const Step *step, int64_t slots) {
    const State *s = step->state;
    int64_t d = step->geometry->hidden, n = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        if (s->live[slot] <= 0 || s->recursion[slot] < 0) continue;
        step->rows->slot[n] = slot;
        copied(step->rows->x + n++ * d, s->x + slot * d, d);
    }
    return step->rows->count = n;
}

static int64_t page_of(const State *s, int64_t slot, int64_t sequence, int64_t number) {
    return s->tables[(slot * s->sequences + sequence) * s->table_stride + number];
}

/* Row `n` stands at its token's number, and sees a sequence up to entry `last`. */
static void seeing(const Step *step, Placed *to, int64_t n, int64_t sequence, int64_t last) {
    const Geometry *geometry = step->geometry;
    int64_t slot = step->rows->slot[n], e = geometry->head_size, number = step->state->number[slot];
    copied(to->cos + n * e, geometry->cos + number * e, e);
    copied(to->sin + n * e, geometry->sin + number * e, e);
    to->table_row[n] = slot * step->state->sequences + sequence;
    to->last[n] = last;
}

/* Places of the unshared layers, which have an entry of every token, at its number: the most entries that a row sees. */
int64_t mor_placed_outside(const Step *step, Placed *to) {
    int64_t sequence = step->geometry->recursions, entries = step->geometry->outer_entries, longest = 0;
    for (int64_t n = 0; n < step->rows->count; n++) {
        int64_t slot = step->rows->slot[n], number = step->state->number[slot];
        to->page[n] = page_of(step->state, slot, sequence, number / entries);
        to->place[n] = number % entries;
        seeing(step, to, n, sequence, number);
        longest = number < longest ? longest : number + 1;
    }
    return longest;
}

/* A token's entry of its recursion lies over the one of the first; at the first, nothing lies over that yet. */
static void laid_over(const Step *step, int64_t slot, int64_t recursion, int64_t entry) {
    const Geometry *geometry = step->geometry;
    int64_t number = step->state->number[slot], entries = geometry->block_entries;
    int32_t *over = geometry->overlay + page_of(step->state, slot, 0, number / entries) * entries + number % entries;
    if (recursion) over[(recursion - 1) * geometry->overlay_stride] = (int32_t)entry;
    for (int64_t r = 1; !recursion && r < geometry->recursions; r++) over[(r - 1) * geometry->overlay_stride] = -1;
}

/* Places of the block, whose sequences grow, at a `recursion` or with -1 at each row's own: the most entries that a row
sees. */
int64_t mor_placed_inside(const Step *step, Placed *to, int64_t recursion) {
    const State *s = step->state;
    const Geometry *geometry = step->geometry;
    int64_t longest = 0;
    for (int64_t n = 0; n < step->rows->count; n++) {
        int64_t slot = step->rows->slot[n], own = recursion < 0 ? s->recursion[slot] : recursion;
        int64_t writes = geometry->writes_own || !own, entries = geometry->block_entries;
        int64_t *length = s->lengths + slot * s->sequences + own, entry = *length;
        *length += writes;
        to->page[n] = writes ? page_of(s, slot, own, entry / entries) : geometry->nobodys;
        to->place[n] = entry % entries;
        to->recursion[n] = own;
        if (geometry->overlay) laid_over(step, slot, own, entry);
        int64_t last = geometry->reads_first ? s->number[slot] : entry;
        seeing(step, to, n, geometry->reads_first ? 0 : own, last);
        longest = last < longest ? longest : last + 1;
    }
    return longest;
}

/* x + gate * block(x) of rows that the block was applied to, and which of them go on. What is not active keeps its stream.
*/
void mor_merged(const Step *step, const Router *router) {
    const State *s = step->state;
    const Rows *rows = step->rows;
    int64_t d = step->geometry->hidden;
    for (int64_t n = 0; n < rows->count; n++) {
        int64_t slot = rows->slot[n], next = s->recursion[slot] + step->geometry->taken;
        float *y = rows->x + n * d, gate = (float)s->gate[slot * s->float_stride], weight = router->weighted ? gate : 1;
        const float *x = s->x + slot * d;
        if (!s->active[slot]) copied(y, s->stream + slot * d, d);
        else if (router->heads)
            for (int64_t c = 0; c < d; c++) y[c] = x[c] + weight * y[c];
        copied(rows->stream + n * d, y, d);
        rows->gate[n] = gate;
        rows->goes_on[n] = 0;
        if (s->active[slot] && next < step->geometry->recursions)
            rows->goes_on[n] = chosen(step, router, slot, next, y, rows->gate + n);
    }
}

/* Keep the streams and next inputs of rows, and who goes on. The visit is over. */
void mor_settled(const Step *step) {
    const State *s = step->state;
    const Rows *rows = step->rows;
    int64_t d = step->geometry->hidden, taken = step->geometry->taken;
    for (int64_t n = 0; n < rows->count; n++) {
        int64_t slot = rows->slot[n];
        s->depth[slot] += taken * s->active[slot];
        s->recursion[slot] = rows->goes_on[n] ? s->recursion[slot] + taken : RESTING;
        s->active[slot] = rows->goes_on[n];
        s->gate[slot * s->float_stride] = rows->gate[n];
        copied(s->stream + slot * d, rows->stream + n * d, d);
        copied(s->x + slot * d, rows->x + n * d, d);
    }
    ++*s->visit;
}
