/* The k largest scores of a row, exactly, from one pass over them.

   A threshold comes first, from the largest of each of 4 k groups of columns: no score below the k-th
   largest of them can be one of the k, and few others pass. What passes is kept; where more than 2 k
   have gathered, because large scores share groups, tie, or a row is too short for groups, only the k
   largest stay, and the least of these is the new threshold. NaN passes every threshold
   and counts as the largest: it must not be lost on the way to the loss. */

#include <math.h>

#include "lanes.h"
#include "memory.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ROWS 4 /* at a time, so that a bias is loaded once for all */
#define STEP (4 * LANES)

/* What one row keeps: a few times k scores, and their columns. */
typedef struct {
    float *scores;
    int32_t *columns;
    int64_t count;
    float threshold;
} kept;

/* Integers in the order of floats, NaN of either sign last. */
static inline int32_t key_of(float score) {
    int32_t bits;
    memcpy(&bits, &score, 4);
    return score != score ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

static inline float score_of(int32_t key) {
    float score;
    key ^= (key >> 31) & INT32_MAX;
    memcpy(&score, &key, 4);
    return score;
}

static int32_t count_above(const int32_t *keys, int64_t n, int32_t limit) {
    words counts = {0};
    int32_t count = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) counts -= *(const words *)(keys + i) > limit;
    for (; i < n; i++) count += keys[i] > limit;
    for (int lane = 0; lane < LANES; lane++) count += counts[lane];
    return count;
}

/* A limit that at least k of the scores are above, and at most `enough` unless they tie. */
static int32_t limit_of(const float *scores, int64_t n, int64_t k, int64_t enough, int32_t *keys) {
    int32_t least = INT32_MAX, most = INT32_MIN + 1;
    for (int64_t i = 0; i < n; i++) {
        keys[i] = key_of(scores[i]);
        least = keys[i] < least ? keys[i] : least;
        most = keys[i] > most ? keys[i] : most;
    }
    int64_t low = least - 1LL, high = most; /* fewer than k are above high */
    while (high - low > 1) {
        int32_t middle = (int32_t)(low + (high - low) / 2), count = count_above(keys, n, middle);
        if (count < k) high = middle;
        else low = middle;
        if (count >= k && count <= enough) break;
    }
    return (int32_t)low;
}

/* Keep the k largest of more than k. */
static void keep_k_largest(kept *row, int64_t k, int32_t *keys) {
    int32_t limit = limit_of(row->scores, row->count, k, k, keys) + 1;
    int64_t ties = k - count_above(keys, row->count, limit), to = 0;
    for (int64_t i = 0; i < row->count; i++) {
        int tie = (keys[i] == limit) & (ties > 0);
        row->scores[to] = row->scores[i];
        row->columns[to] = row->columns[i];
        to += (keys[i] > limit) | tie;
        ties -= tie;
    }
    row->count = k;
    row->threshold = INFINITY;
    for (int64_t i = 0; i < k; i++)
        if (row->scores[i] < row->threshold) row->threshold = row->scores[i];
}

static inline lanes larger_of(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    for (int i = 0; i < LANES; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

/* Which of sixteen scores are not at or below the threshold, one bit each. */
static inline uint64_t passing(lanes scores, float threshold) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)scores, _mm512_set1_ps(threshold), _CMP_NLE_UQ);
#else
    uint64_t mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (uint64_t) !(scores[i] <= threshold) << i;
    return mask;
#endif
}

typedef struct {
    const char *values; /* the first of at most ROWS rows */
    int64_t rows, width, stride;
    const float *bias;
} block;

static inline const void *row_of(block b, int64_t r, int bf16) {
    return b.values + r * b.stride * (bf16 ? 2 : 4);
}

/* The largest of the scores i, i + groups, i + 2 groups, ... of every row, for every i < groups. */
static inline void group_maxima(block b, int bf16, int64_t groups, float *maxima) {
    for (int64_t i = 0; i < ROWS * groups; i++) maxima[i] = -INFINITY;
    for (int64_t from = 0; from + groups <= b.width; from += groups)
        for (int64_t r = 0; r < b.rows; r++) {
            const void *row = row_of(b, r, bf16);
            for (int64_t g = 0; g < groups; g += LANES) {
                lanes *largest = (lanes *)(maxima + r * groups + g);
                lanes scores = load(row, from + g, bf16) + load(b.bias, from + g, 0);
                *largest = larger_of(scores, *largest);
            }
        }
}

/* Keep the scores of columns [from, from + STEP) that pass. */
static inline void keep_passing(block b, int bf16, int64_t r, int64_t from, int64_t k, kept *own,
                        int32_t *keys) {
    const void *row = row_of(b, r, bf16);
    uint64_t mask = 0;
    if (from + STEP <= b.width)
        for (int i = 0; i < STEP; i += LANES)
            mask |= passing(load(row, from + i, bf16) + load(b.bias, from + i, 0),
                            own->threshold) << i;
    else
        for (int64_t i = from; i < b.width; i++)
            if (!(load_one(row, i, bf16) + b.bias[i] <= own->threshold)) mask |= 1ULL << (i - from);
    for (; mask; mask &= mask - 1) {
        int64_t column = from + __builtin_ctzll(mask);
        own->scores[own->count] = load_one(row, column, bf16) + b.bias[column];
        own->columns[own->count++] = (int32_t)column;
    }
    if (own->count > 2 * k) keep_k_largest(own, k, keys);
}

static int64_t groups_for(int64_t width, int64_t k) {
    int64_t groups = LANES * ((4 * k + LANES - 1) / LANES);
    return width >= 4 * groups ? groups : 0;
}

/* Leave with every row its k largest scores, or all that are above -inf. */
static inline void select_rows(block b, int bf16, int64_t k, kept *own, float *maxima,
                               int32_t *keys) {
    int64_t groups = groups_for(b.width, k);
    if (groups) group_maxima(b, bf16, groups, maxima);
    for (int64_t r = 0; r < b.rows; r++) {
        own[r].count = 0;
        own[r].threshold = -INFINITY;
        if (!groups) continue;
        int32_t limit = limit_of(maxima + r * groups, groups, k, k + k / 4, keys);
        if (limit > key_of(-INFINITY)) own[r].threshold = score_of(limit);
    }
    for (int64_t from = 0; from < b.width; from += STEP)
        for (int64_t r = 0; r < b.rows; r++) keep_passing(b, bf16, r, from, k, own + r, keys);
    for (int64_t r = 0; r < b.rows; r++)
        if (own[r].count > k) keep_k_largest(own + r, k, keys);
}

/* What is wanted of every row: the positive parts of the k largest, and their columns, from all
   columns or from the `width` listed in `among`, where -1 stands for none. Where fewer than k are above
   -inf, the rest are zeros of the first column. */
typedef struct {
    const int32_t *among;
    int64_t width, k;
    const float *bias;
    float *top;
    int64_t *columns;
} wanted;

static void write_row(const kept *found, const wanted *w, int64_t row) {
    for (int64_t j = 0, at = row * w->k; j < w->k; j++, at++) {
        float score = j < found->count ? found->scores[j] : 0;
        int32_t column = j < found->count ? found->columns[j] : 0;
        if (w->among) column = w->among[column];
        if (column < 0) column = w->among[0]; /* of a row of NaN none is NaN too */
        w->top[at] = score < 0 ? 0 : score;
        w->columns[at] = column;
    }
}
