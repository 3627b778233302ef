/* The k largest entries of every row of a matrix, exactly, in one pass over it.

   Entries are compared as integers: the bits of positive floating-point numbers order as they do,
   and negative numbers fall behind them in any order, which no one minds who takes the positive part.
   NaN of either sign counts as the largest, so that it is not lost on the way to the loss.

   The largest of each of a few hundred groups are found first: no entry below the k-th largest of
   them can be one of the k, and few others pass. Where too many do, because a row is short or its
   large entries share groups, the k largest so far stay, and the smallest of those is the threshold. */

#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

/* The bits of negative NaN start here, as unsigned integers. */
#define NEGATIVE_NAN_16 0xff81u
#define NEGATIVE_NAN_32 0xff800001u

/* Entries of 64 neighbours above the threshold, one bit each. */
static inline uint64_t above_16(const int16_t *p, int16_t threshold) {
#ifdef __AVX512BW__
    __m512i t = _mm512_set1_epi16(threshold), nan = _mm512_set1_epi16((int16_t)NEGATIVE_NAN_16);
    uint64_t mask = 0;
    for (int i = 0; i < 2; i++) {
        __m512i values = _mm512_loadu_si512(p + 32 * i);
        uint64_t part = _mm512_cmpgt_epi16_mask(values, t) | _mm512_cmpge_epu16_mask(values, nan);
        mask |= part << 32 * i;
    }
    return mask;
#else
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++)
        mask |= (uint64_t)(p[i] > threshold || (uint16_t)p[i] >= NEGATIVE_NAN_16) << i;
    return mask;
#endif
}

static inline uint64_t above_32(const int32_t *p, int32_t threshold) {
#ifdef __AVX512BW__
    __m512i t = _mm512_set1_epi32(threshold), nan = _mm512_set1_epi32((int32_t)NEGATIVE_NAN_32);
    uint64_t mask = 0;
    for (int i = 0; i < 4; i++) {
        __m512i values = _mm512_loadu_si512(p + 16 * i);
        uint64_t part = _mm512_cmpgt_epi32_mask(values, t) | _mm512_cmpge_epu32_mask(values, nan);
        mask |= part << 16 * i;
    }
    return mask;
#else
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++)
        mask |= (uint64_t)(p[i] > threshold || (uint32_t)p[i] >= NEGATIVE_NAN_32) << i;
    return mask;
#endif
}

/* Put the k largest of n in front (quickselect). An entry is its value above its column. */
static void keep_largest(int64_t *entries, int n, int k) {
    int low = 0, high = n - 1;
    while (low < high) {
        int64_t a = entries[low], b = entries[(low + high) / 2], c = entries[high];
        int64_t pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
        int i = low, j = high;
        while (i <= j) {
            while (entries[i] > pivot) i++;
            while (entries[j] < pivot) j--;
            if (i <= j) {
                int64_t swapped = entries[i];
                entries[i++] = entries[j];
                entries[j--] = swapped;
            }
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else return;
    }
}

#define DEFINE_SELECT(name, type, unsigned_type, above, lowest, highest, nan)                  \
    static inline int64_t name##_entry(const type *row, int64_t column) {                      \
        int64_t value = (unsigned_type)row[column] >= nan ? highest : row[column];             \
        return value * (1LL << 32) + column;                                                   \
    }                                                                                          \
                                                                                               \
    static void name##_row(const type *row, int64_t width, int k, int64_t *kept, int64_t *out) { \
        int64_t groups = 64 * ((8 * (int64_t)k + 63) / 64), begin = 0;                         \
        int n = 0;                                                                             \
        type threshold = lowest;                                                               \
        if (width >= 4 * groups) {                                                             \
            type *largest = (type *)(kept + 2 * k + 64);                                       \
            for (int64_t i = 0; i < groups; i++) largest[i] = row[i];                          \
            for (int64_t from = groups; from + groups <= width; from += groups)                \
                for (int64_t i = 0; i < groups; i++)                                           \
                    largest[i] = row[from + i] > largest[i] ? row[from + i] : largest[i];      \
            int64_t *sorted = (int64_t *)(largest + groups);                                   \
            for (int64_t i = 0; i < groups; i++) sorted[i] = largest[i];                       \
            keep_largest(sorted, (int)groups, k);                                              \
            int64_t least = sorted[0];                                                         \
            for (int i = 1; i < k; i++) least = sorted[i] < least ? sorted[i] : least;         \
            threshold = least > lowest ? (type)(least - 1) : lowest;                           \
        }                                                                                      \
        if (threshold == lowest) /* the lowest value itself is never above it */               \
            for (; n < k; n++) kept[n] = name##_entry(row, n);                                 \
        for (begin = n; begin < width; begin += 64) {                                          \
            uint64_t mask = 0;                                                                 \
            if (begin + 64 <= width) {                                                         \
                mask = above(row + begin, threshold);                                          \
            } else {                                                                           \
                for (int64_t i = begin; i < width; i++)                                        \
                    if (row[i] > threshold || (unsigned_type)row[i] >= nan)                    \
                        mask |= 1ULL << (i - begin);                                           \
            }                                                                                  \
            for (; mask; mask &= mask - 1)                                                     \
                kept[n++] = name##_entry(row, begin + __builtin_ctzll(mask));                  \
            if (n > 2 * k) {                                                                   \
                keep_largest(kept, n, k);                                                      \
                n = k;                                                                         \
                int64_t least = kept[0];                                                       \
                for (int i = 1; i < k; i++) least = kept[i] < least ? kept[i] : least;         \
                threshold = (type)(least >> 32);                                               \
            }                                                                                  \
        }                                                                                      \
        if (n > k) keep_largest(kept, n, k);                                                   \
        for (int i = 0; i < k; i++) out[i] = kept[i] & 0xffffffffLL;                           \
    }                                                                                          \
                                                                                               \
    void name(const type *values, int64_t rows, int64_t width, int64_t k, int64_t *columns) {  \
        _Pragma("omp parallel") {                                                              \
            int64_t groups = 64 * ((8 * k + 63) / 64);                                         \
            int64_t *kept = malloc(sizeof(int64_t) * (2 * k + 64 + 2 * groups));               \
            _Pragma("omp for schedule(static)")                                                \
            for (int64_t i = 0; i < rows; i++)                                                 \
                name##_row(values + i * width, width, (int)k, kept, columns + i * k);          \
            free(kept);                                                                        \
        }                                                                                      \
    }

DEFINE_SELECT(select_16, int16_t, uint16_t, above_16, INT16_MIN, INT16_MAX, NEGATIVE_NAN_16)
DEFINE_SELECT(select_32, int32_t, uint32_t, above_32, INT32_MIN, INT32_MAX, NEGATIVE_NAN_32)
