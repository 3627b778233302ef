/* The sparse products of a step, and the order they run in.

   Every result is written by one thread that adds in the order of the entries: it has the same bits
   whatever the number of threads.

   Rows of a table are gathered many times over, and should come from a core's second-level cache.
   Where every result adds up many rows, some of the table's rows are added to all results, then the
   next. Otherwise, where the table is small enough, a strip of a few columns of all its rows is first
   copied together, and stays in cache while these columns of all results are made. */

#include <sys/mman.h>

#include "lanes.h"
#include "memory.h"

#ifdef __AVX512F__
#define WIDE 24 /* vectors of sixteen that stay in registers */
#else
#define WIDE 6
#endif
#define STRIP 64             /* columns copied together, at most */
#define NARROW 32            /* and where the table is long */
#define IN_CACHE (1 << 19)   /* bytes of a table that stay in a core's second-level cache */
#define FEW 4                /* entries that a result should find in a block of the table */
#define LOOKED_AT (1 << 16)  /* entries, at most, to judge how the others lie */
#define PARTS 64             /* of the results, for any number of threads */
#define COLLAPSE 25          /* madvise's MADV_COLLAPSE, newer than many a header */

typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));

static inline float sum_of(lanes v) {
    eight h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    four q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
    return (q[0] + q[1]) + (q[2] + q[3]);
}

/* Ask for pages of 2 MB where memory is large: they come several times faster than small ones, and
   rows gathered from all over a table need fewer addresses looked up. `touched`: it is in use. */
void use_huge_pages(void *start, int64_t bytes, int64_t touched) {
#ifdef __linux__
    uintptr_t from = ((uintptr_t)start + 4095) & ~(uintptr_t)4095;
    uintptr_t to = ((uintptr_t)start + bytes) & ~(uintptr_t)4095;
    if (bytes < 2 * HUGE_PAGE) return;
    madvise((void *)from, to - from, MADV_HUGEPAGE);
    if (touched) madvise((void *)from, to - from, COLLAPSE);
#endif
}

/* Columns [from, from + strip) of every row, zeros beyond the last; all threads share the work. */
static void copy_strip(const void *table, int bf16, int64_t rows, int64_t d, int64_t from,
                       int64_t strip, float *copy) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *to = copy + r * strip;
        if (from + strip <= d)
            for (int64_t i = 0; i < strip; i += LANES)
                *(lanes *)(to + i) = load(table, r * d + from + i, bf16);
        else
            for (int64_t i = 0; i < strip; i++)
                to[i] = from + i < d ? load_one(table, r * d + from + i, bf16) : 0;
    }
}

typedef struct {
    const float *weights;
    const int32_t *columns;
    int64_t begin, end;
} entries;

/* n vectors of: sum of weights[j] table[columns[j]], added to `out` if there is `more` in it */
static inline void add_up(entries e, const void *table, int bf16, int64_t stride, int64_t from,
                          int n, int more, float *out) {
    lanes total[WIDE];
#pragma GCC unroll 24
    for (int i = 0; i < n; i++) total[i] = more ? load(out, LANES * i, 0) : (lanes){0};
    for (int64_t j = e.begin; j < e.end; j++)
#pragma GCC unroll 24
        for (int i = 0; i < n; i++)
            total[i] += e.weights[j] *
                        load(table, e.columns[j] * stride + from + LANES * i, bf16);
#pragma GCC unroll 24
    for (int i = 0; i < n; i++) *(lanes *)(out + LANES * i) = total[i];
}

/* The same for columns [from, d), as many vectors at a time as there are registers. */
static inline void add_up_row(entries e, const void *table, int bf16, int64_t d, int more,
                              float *out) {
    if (more && e.begin == e.end) return;
    int64_t i = 0;
    for (; i + WIDE * LANES <= d; i += WIDE * LANES)
        add_up(e, table, bf16, d, i, WIDE, more, out + i);
    for (; i + 4 * LANES <= d; i += 4 * LANES) add_up(e, table, bf16, d, i, 4, more, out + i);
    for (; i + LANES <= d; i += LANES) add_up(e, table, bf16, d, i, 1, more, out + i);
    for (; i < d; i++) {
        if (!more) out[i] = 0;
        for (int64_t j = e.begin; j < e.end; j++)
            out[i] += e.weights[j] * load_one(table, e.columns[j] * d + i, bf16);
    }
}

/* How many rows of a table lie together in a core's cache, if only those count that entries use:
   judged by some of the entries. */
static int64_t rows_at_once(const int32_t *columns, int64_t count, int64_t rows, int64_t row_bytes) {
    char *used = calloc(rows, 1);
    int64_t total = 0, stride = count / LOOKED_AT + 1;
    for (int64_t j = 0; j < count; j += stride) used[columns[j]] = 1;
    for (int64_t r = 0; r < rows; r++) total += used[r];
    free(used);
    int64_t at_once = total ? rows * (IN_CACHE / row_bytes) / total : rows;
    return at_once > 0 ? at_once : 1;
}

/* The first of the results of a part, when all have as many entries. */
static int64_t first_of(const int32_t *starts, int64_t m, int64_t part) {
    int64_t wanted = starts[m] * part / PARTS, low = 0, high = m;
    while (part < PARTS && low < high) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] < wanted) low = middle + 1;
        else high = middle;
    }
    return part < PARTS ? low : m;
}

/* sum_rows, of some of the table's rows at a time: those whose entries come next, while entries of a
   result are in the order of their columns. */
static void sum_in_blocks(const int32_t *starts, const int32_t *columns, const float *weights,
                          int64_t m, const void *table, int64_t bf16, int64_t rows, int64_t d,
                          int64_t at_once, int64_t more, float *out) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t part = 0; part < PARTS; part++) {
        int64_t first = first_of(starts, m, part), last = first_of(starts, m, part + 1);
        int32_t *next = malloc((last - first + 1) * sizeof(int32_t));
        memcpy(next, starts + first, (last - first) * sizeof(int32_t));
        for (int64_t limit = at_once; limit < rows + at_once; limit += at_once)
            for (int64_t i = first; i < last; i++) {
                entries e = {weights, columns, next[i - first], next[i - first]};
                while (e.end < starts[i + 1] && columns[e.end] < limit) e.end++;
                int begun = more || limit > at_once;
                if (bf16) add_up_row(e, table, 1, d, begun, out + i * d);
                else add_up_row(e, table, 0, d, begun, out + i * d);
                next[i - first] = (int32_t)e.end;
            }
        free(next);
    }
}

/* out[m] = sum of weights[j] table[columns[j]] over j in [starts[m], starts[m + 1]), [M D]; added to
   what is there if there is `more`. */
void sum_rows(const int32_t *starts, const int32_t *columns, const float *weights, int64_t m,
              const void *table, int64_t bf16, int64_t rows, int64_t d, int64_t more, float *out) {
    int64_t at_once = rows_at_once(columns, starts[m], rows, d * (bf16 ? 2 : 4));
    if (starts[m] && starts[m] / m >= FEW * ((rows + at_once - 1) / at_once)) {
        sum_in_blocks(starts, columns, weights, m, table, bf16, rows, d, at_once, more, out);
        return;
    }
    int64_t strip = rows > 4096 ? NARROW : STRIP;
    if (rows > 16384 || starts[m] < 4 * rows) {
#pragma omp parallel for schedule(dynamic, 32)
        for (int64_t i = 0; i < m; i++) {
            entries e = {weights, columns, starts[i], starts[i + 1]};
            if (bf16) add_up_row(e, table, 1, d, more, out + i * d);
            else add_up_row(e, table, 0, d, more, out + i * d);
        }
        return;
    }
    float *copies = allocate_words(2 * rows * strip);
#pragma omp parallel
    for (int64_t from = 0, turn = 0; from < d; from += strip, turn ^= 1) {
        /* Two copies in turn: nobody writes into the one that others still read. */
        float *copy = copies + turn * rows * strip, found[STRIP] = {0};
        copy_strip(table, bf16, rows, d, from, strip, copy);
        int64_t width = d - from < strip ? d - from : strip;
#pragma omp for schedule(dynamic, 32) nowait
        for (int64_t i = 0; i < m; i++) {
            entries e = {weights, columns, starts[i], starts[i + 1]};
            if (more) memcpy(found, out + i * d + from, 4 * width);
            if (strip == NARROW) add_up(e, copy, 0, NARROW, 0, NARROW / LANES, more, found);
            else add_up(e, copy, 0, STRIP, 0, STRIP / LANES, more, found);
            memcpy(out + i * d + from, found, 4 * width);
        }
    }
    free(copies);
}

/* out[j] = <row, table[columns[j]]> over n vectors, added to what is there if there is `more` */
static inline void multiply(const float *row, entries e, const float *table, int64_t d, int64_t from,
                            int n, int more, float *out) {
    lanes own[WIDE];
#pragma GCC unroll 24
    for (int i = 0; i < n; i++) own[i] = load(row, from + LANES * i, 0);
    for (int64_t j = e.begin; j < e.end; j++) {
        const float *other = table + e.columns[j] * d + from;
        lanes total[4] = {{0}, {0}, {0}, {0}};
#pragma GCC unroll 24
        for (int i = 0; i < n; i++) total[i % 4] += own[i] * load(other, LANES * i, 0);
        float found = sum_of((total[0] + total[1]) + (total[2] + total[3]));
        out[j] = more ? out[j] + found : found;
    }
}

static inline void multiply_row(const float *row, entries e, const float *table, int64_t d,
                                float *out) {
    int64_t i = 0;
    for (; i + WIDE * LANES <= d; i += WIDE * LANES) multiply(row, e, table, d, i, WIDE, i > 0, out);
    for (; i + 4 * LANES <= d; i += 4 * LANES) multiply(row, e, table, d, i, 4, i > 0, out);
    for (; i + LANES <= d; i += LANES) multiply(row, e, table, d, i, 1, i > 0, out);
    for (int64_t j = e.begin; i < d && j < e.end; j++) {
        float rest = 0;
        for (int64_t c = i; c < d; c++) rest += row[c] * table[e.columns[j] * d + c];
        out[j] = i > 0 ? out[j] + rest : rest;
    }
}

/* sampled_product, of some of the table's rows at a time. */
static void multiply_in_blocks(const float *rows, const int32_t *starts, const int32_t *columns,
                               int64_t n, const float *table, int64_t table_rows, int64_t d,
                               int64_t at_once, float *out) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t part = 0; part < PARTS; part++) {
        int64_t first = first_of(starts, n, part), last = first_of(starts, n, part + 1);
        int32_t *next = malloc((last - first + 1) * sizeof(int32_t));
        memcpy(next, starts + first, (last - first) * sizeof(int32_t));
        for (int64_t limit = at_once; limit < table_rows + at_once; limit += at_once)
            for (int64_t i = first; i < last; i++) {
                entries e = {0, columns, next[i - first], next[i - first]};
                while (e.end < starts[i + 1] && columns[e.end] < limit) e.end++;
                multiply_row(rows + i * d, e, table, d, out);
                next[i - first] = (int32_t)e.end;
            }
        free(next);
    }
}

/* out[j] = <rows[n], table[columns[j]]> over j in [starts[n], starts[n + 1]), [E] */
void sampled_product(const float *rows, const int32_t *starts, const int32_t *columns, int64_t n,
                     const float *table, int64_t table_rows, int64_t d, float *out) {
    int64_t at_once = rows_at_once(columns, starts[n], table_rows, 4 * d);
    if (starts[n] && starts[n] / n >= FEW * ((table_rows + at_once - 1) / at_once)) {
        multiply_in_blocks(rows, starts, columns, n, table, table_rows, d, at_once, out);
        return;
    }
    if (table_rows > 14336 || starts[n] < 4 * table_rows) {
#pragma omp parallel for schedule(dynamic, 32)
        for (int64_t r = 0; r < n; r++)
            for (int64_t e = starts[r]; e < starts[r + 1]; e++) {
                const float *a = rows + r * d, *b = table + columns[e] * d;
                lanes total = {0}, other = {0};
                int64_t i = 0;
                for (; i + 2 * LANES <= d; i += 2 * LANES) {
                    total += load(a, i, 0) * load(b, i, 0);
                    other += load(a, i + LANES, 0) * load(b, i + LANES, 0);
                }
                float rest = 0;
                for (; i < d; i++) rest += a[i] * b[i];
                out[e] = sum_of(total + other) + rest;
            }
        return;
    }
    float *copies = allocate_words(2 * table_rows * STRIP);
#pragma omp parallel
    for (int64_t from = 0, turn = 0; from < d; from += STRIP, turn ^= 1) {
        float *copy = copies + turn * table_rows * STRIP, row[STRIP] = {0};
        copy_strip(table, 0, table_rows, d, from, STRIP, copy);
        int64_t width = d - from < STRIP ? d - from : STRIP;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n; i++) {
            memcpy(row, rows + i * d + from, 4 * width);
            for (int64_t j = starts[i]; j < starts[i + 1]; j++) {
                const float *other = copy + columns[j] * (int64_t)STRIP;
                lanes total = load(row, 0, 0) * load(other, 0, 0);
                for (int v = LANES; v < STRIP; v += LANES)
                    total += load(row, v, 0) * load(other, v, 0);
                out[j] = from ? out[j] + sum_of(total) : sum_of(total);
            }
        }
    }
    free(copies);
}

/* The entries of an index matrix sorted by column, those of a column in their old order: where each
   column starts, every entry's old place, and its row (counting sort). */
void sort_by_column(const int64_t *indices, int64_t rows, int64_t k, int64_t columns,
                    int32_t *starts, int32_t *order, int32_t *from_rows) {
    int32_t *next = calloc(columns + 1, sizeof(int32_t));
    for (int64_t e = 0; e < rows * k; e++) next[indices[e] + 1]++;
    for (int64_t l = 0; l < columns; l++) next[l + 1] += next[l];
    memcpy(starts, next, (columns + 1) * sizeof(int32_t));
    for (int64_t e = 0; e < rows * k; e++) order[next[indices[e]]++] = (int32_t)e;
    free(next);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows * k; i++) from_rows[i] = order[i] / (int32_t)k;
}

/* out[i] = values[order[i]] */
void take(const int32_t *order, int64_t count, const float *values, float *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = values[order[i]];
}
