/* The k largest scores of every row, where scores are a product that is never written down.

   scores = inputs W^T + bias, in tiles of 12 rows and 32 columns that stay in registers over the
   whole depth: float32, bfloat16 summed in float32, or int8 summed in int32. Scores are compared with
   their row's threshold while they are in registers, and few pass. Each score is one sum in a fixed
   order, so its bits depend neither on the other rows nor on the number of threads.

   Needs registers of 512 bits. Elsewhere, and where a processor multiplies bfloat16 by tiles of its
   own (AMX), PyTorch's product and select.c do this. */

#include <omp.h>

#include "largest.h"

enum { FLOAT32, BFLOAT16, INT8 };

#define TILE_ROWS 12
#define TILE_COLUMNS (2 * LANES)
#define ABOVE 128 /* makes the rows' int8 unsigned, as the instruction wants them */
#define FIRST 32  /* columns to each of the k largest that set the first thresholds */
#define MANY 4    /* times k scores are kept before only the k largest are */
#define BLOCK_ROWS (16 * TILE_ROWS) /* a panel of columns is read once for so many */
#define WORKSPACE (1 << 25)              /* bytes of a thread, if that leaves it a tile of rows */

/* How many columns a product of this kind is searched in at a time; 0 where it is not made here. */
int64_t columns_at_once(int64_t kind) {
    int made[3] = {0};
#ifdef __AVX512F__
    made[FLOAT32] = 1;
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    made[BFLOAT16] = 1;
#endif
#ifdef __AVX512VNNI__
    made[INT8] = 1;
#endif
    return made[kind] ? TILE_COLUMNS : 0;
}

#ifdef __AVX512F__

static inline int64_t per_word(int kind) { return kind == INT8 ? 4 : kind == BFLOAT16 ? 2 : 1; }

static inline int64_t words_of(int kind, int64_t d) {
    return (d + per_word(kind) - 1) / per_word(kind);
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Steps of int8 to a unit: 127 over the largest magnitude of a row, 1 where it is next to nothing.
   NaN counts as the largest of all, and gives NaN; infinity gives 0. */
static inline float steps_of(const void *row, int bf16, int64_t d) {
    words largest = {0}; /* bits of magnitudes are in their order */
    int32_t bits[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        words other = (words)load(row, i, bf16) & INT32_MAX, more = other > largest;
        largest = (other & more) | (largest & ~more);
    }
    memcpy(bits, &largest, sizeof largest);
    for (; i < d; i++) {
        float value = load_one(row, i, bf16);
        int32_t other;
        memcpy(&other, &value, 4);
        bits[0] = (other & INT32_MAX) > bits[0] ? other & INT32_MAX : bits[0];
    }
    for (int lane = 1; lane < LANES; lane++) bits[0] = bits[lane] > bits[0] ? bits[lane] : bits[0];
    float found;
    memcpy(&found, bits, 4);
    return found < 1e-30f ? 1 : 127 / found;
}

/* A row of d numbers as words. In int8 they are whole steps (0 where there are no such), `above` is
   added to each, and their sum is returned. */
static inline int32_t to_words(int kind, const void *row, int bf16, int64_t d, float steps,
                               int above, void *words) {
    int32_t sum = 0;
    if (kind == FLOAT32 || (kind == BFLOAT16 && bf16)) memcpy(words, row, d * 4 / per_word(kind));
    if (kind == BFLOAT16 && !bf16)
        for (int64_t i = 0; i < d; i++) ((uint16_t *)words)[i] = to_bf16(((const float *)row)[i]);
    if (kind == INT8)
        for (int64_t i = 0; i < d; i++) {
            int whole = steps > 0 ? (int)nearbyintf(load_one(row, i, bf16) * steps) : 0;
            ((uint8_t *)words)[i] = (uint8_t)(whole + above);
            sum += whole;
        }
    return sum;
}

/* Rows of words as columns, [words][width]. */
static inline void lay_out(const int32_t *rows, int64_t words, int64_t width, int32_t *table) {
    for (int64_t w = 0; w < words; w++)
        for (int64_t r = 0; r < width; r++) table[w * width + r] = rows[r * words + w];
}

/* Columns in the order they are searched in, laid out for the tiles. */
typedef struct {
    int64_t count, words;
    int32_t *panels; /* of TILE_COLUMNS columns, [words][TILE_COLUMNS] each */
    float *bias, *unit;
    int32_t *begin; /* where sums in int8 begin, as rows are laid out too high */
} laid_out;

static laid_out new_columns(int64_t count, int64_t words) {
    return (laid_out){count,          words,          allocate_words(count * words),
                      allocate_words(count), allocate_words(count), allocate_words(count)};
}

static void free_columns(laid_out columns) {
    void *all[] = {columns.panels, columns.bias, columns.unit, columns.begin};
    for (int i = 0; i < 4; i++) free(all[i]);
}

/* Column i is row among[i] of W; -1 stands for none, whose score is -inf. All threads share the work,
   each with memory for a tile's `rows`. */
static inline void lay_out_columns(int kind, const float *W, const float *bias, int64_t d,
                                   const int32_t *among, laid_out to, int32_t *rows) {
#pragma omp for schedule(static)
    for (int64_t from = 0; from < to.count; from += TILE_COLUMNS) {
        memset(rows, 0, TILE_COLUMNS * to.words * 4);
        for (int64_t i = from; i < from + TILE_COLUMNS; i++) {
            to.bias[i] = -INFINITY;
            to.unit[i] = to.begin[i] = 0;
            if (among[i] < 0) continue;
            const float *row = W + among[i] * d;
            float steps = kind == INT8 ? steps_of(row, 0, d) : 1;
            int32_t *own = rows + (i - from) * to.words;
            to.begin[i] = -ABOVE * to_words(kind, row, 0, d, steps, 0, own);
            to.bias[i] = bias[among[i]];
            to.unit[i] = 1 / steps;
        }
        lay_out(rows, to.words, TILE_COLUMNS, to.panels + from * to.words);
    }
}

typedef struct {
    lanes sums[TILE_ROWS][2];
} tile;

static inline __attribute__((always_inline)) void multiply(int kind, const int32_t *rows,
                                                           const int32_t *columns, int64_t words,
                                                           const int32_t *begin, tile *out) {
    __m512i total[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++)
        for (int c = 0; c < 2; c++)
            total[r][c] = kind == INT8 ? _mm512_loadu_si512(begin + LANES * c)
                                       : _mm512_setzero_si512();
    for (int64_t w = 0; w < words; w++, rows += TILE_ROWS, columns += TILE_COLUMNS) {
        __m512i column[2] = {_mm512_loadu_si512(columns), _mm512_loadu_si512(columns + LANES)};
#pragma GCC unroll 12
        for (int r = 0; r < TILE_ROWS; r++) {
            __m512i row = _mm512_set1_epi32(rows[r]);
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++) {
                if (kind == FLOAT32)
                    total[r][c] = (__m512i)_mm512_fmadd_ps((__m512)row, (__m512)column[c],
                                                           (__m512)total[r][c]);
#ifdef __AVX512BF16__
                if (kind == BFLOAT16)
                    total[r][c] = (__m512i)_mm512_dpbf16_ps((__m512)total[r][c], (__m512bh)row,
                                                            (__m512bh)column[c]);
#endif
#ifdef __AVX512VNNI__
                if (kind == INT8) total[r][c] = _mm512_dpbusd_epi32(total[r][c], row, column[c]);
#endif
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++)
        for (int c = 0; c < 2; c++)
            out->sums[r][c] = kind == INT8 ? (lanes)_mm512_cvtepi32_ps(total[r][c])
                                           : (lanes)total[r][c];
}

/* Keep the scores of a tile's row that pass. */
static inline void keep_passing_of_tile(const lanes scores[2], int64_t from, int64_t k, kept *own,
                           int32_t *keys) {
    uint64_t mask = passing(scores[0], own->threshold) |
                    passing(scores[1], own->threshold) << LANES;
    if (__builtin_expect(!mask, 1)) return;
    for (; mask; mask &= mask - 1) {
        int64_t i = __builtin_ctzll(mask);
        own->scores[own->count] = ((const float *)scores)[i];
        own->columns[own->count++] = (int32_t)(from + i);
    }
    if (own->count > MANY * k) keep_k_largest(own, k, keys);
}

/* Rows to be searched for, in float32 or bfloat16. */
typedef struct {
    const char *data;
    int64_t bf16, rows, d;
} matrix;

/* The memory of one thread: `block` rows at a time, of which the products with `stored` columns are
   written down. */
typedef struct {
    int64_t block, stored;
    int32_t *rows, *words, *keys;
    float *unit, *products, *maxima;
    kept *own;
} workspace;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* As many rows as share a panel well, fit into memory, and leave no thread without any. */
static int64_t rows_at_once(int64_t rows, int64_t row_bytes) {
    int64_t share = rows / omp_get_num_threads() + TILE_ROWS;
    int64_t most = smaller(BLOCK_ROWS, smaller(WORKSPACE / row_bytes, share)) / TILE_ROWS * TILE_ROWS;
    return most ? most : TILE_ROWS;
}

static workspace new_workspace(int64_t rows, int64_t words, int64_t stored, int64_t room) {
    int64_t block = rows_at_once(rows, 4 * (words + stored + 2 * room));
    workspace mine = {block,
                 stored,
                 allocate_words(TILE_COLUMNS * words),
                 allocate_words(block * words),
                 allocate_words(stored > room ? stored : room),
                 allocate_words(block),
                 allocate_words(block * stored),
                 allocate_words(ROWS * stored),
                 malloc(block * sizeof(kept))};
    for (int64_t r = 0; r < block; r++) mine.own[r] = (kept){allocate_words(room), allocate_words(room), 0, 0};
    return mine;
}

static void free_workspace(workspace mine) {
    for (int64_t r = 0; r < mine.block; r++) {
        free(mine.own[r].scores);
        free(mine.own[r].columns);
    }
    void *all[] = {mine.rows,     mine.words,  mine.keys, mine.unit,
                   mine.products, mine.maxima, mine.own};
    for (int i = 0; i < 7; i++) free(all[i]);
}

/* Lay `count` rows from `begin` on out, in tiles. */
static inline void lay_out_rows(int kind, matrix inputs, int64_t begin, int64_t count, int64_t words,
                                workspace mine) {
    for (int64_t from = 0; from < count; from += TILE_ROWS) {
        memset(mine.rows, 0, TILE_ROWS * words * 4);
        for (int64_t r = from; r < from + TILE_ROWS && r < count; r++) {
            const char *row = inputs.data + (begin + r) * inputs.d * (inputs.bf16 ? 2 : 4);
            float steps = kind == INT8 ? steps_of(row, inputs.bf16, inputs.d) : 1;
            mine.unit[r] = 1 / steps;
            to_words(kind, row, inputs.bf16, inputs.d, steps, ABOVE,
                     mine.rows + (r - from) * words);
        }
        lay_out(mine.rows, words, TILE_ROWS, mine.words + from * words);
    }
}

/* The k largest of the first `width` products that are written down, of at most ROWS rows from r. */
static void select_written(workspace mine, int64_t r, int64_t rows, int64_t width, const float *bias,
                           int64_t k, kept *own) {
    const char *from = (const char *)(mine.products + r * mine.stored);
    block b = {from, rows - r < ROWS ? rows - r : ROWS, width, mine.stored, bias};
    select_rows(b, 0, k, own, mine.maxima, mine.keys);
}

/* Scores of a block of rows: the largest of the products that are written down set the thresholds; of
   all others what passes is kept. */
static inline __attribute__((always_inline)) void search_rows(int kind, int64_t rows, laid_out in,
                                                              int64_t k, workspace mine) {
    for (int64_t from = 0; from < in.count; from += TILE_COLUMNS) {
        const int32_t *panel = in.panels + from * in.words;
        for (int64_t first = 0; first < rows; first += TILE_ROWS) {
            tile found;
            multiply(kind, mine.words + first * in.words, panel, in.words, in.begin + from, &found);
            for (int64_t r = first; r < first + TILE_ROWS && r < rows; r++) {
                lanes *scores = found.sums[r - first];
                for (int c = 0; c < 2; c++) {
                    int64_t i = from + c * LANES;
                    if (kind == INT8) scores[c] *= load(in.unit, i, 0) * mine.unit[r];
                    if (from < mine.stored)
                        *(lanes *)(mine.products + r * mine.stored + i) = scores[c];
                    scores[c] += load(in.bias, i, 0);
                }
                if (from >= mine.stored) keep_passing_of_tile(scores, from, k, mine.own + r, mine.keys);
            }
        }
        for (int64_t r = 0; from + TILE_COLUMNS == mine.stored && r < rows; r += ROWS)
            select_written(mine, r, rows, mine.stored, in.bias, k, mine.own + r);
    }
}

static inline __attribute__((always_inline)) void search_kind(int kind, matrix inputs,
                                                              const float *W, const float *bias,
                                                              wanted all, wanted dead) {
    int64_t words = words_of(kind, inputs.d);
    int64_t stored = dead.width + (FIRST * all.k + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    stored = smaller(stored, all.width);
    int64_t room = (MANY * all.k > 2 * dead.k ? MANY * all.k : 2 * dead.k) + STEP;
    laid_out columns = new_columns(all.width, words);
#pragma omp parallel
    {
        workspace mine = new_workspace(inputs.rows, words, stored, room);
        lay_out_columns(kind, W, bias, inputs.d, all.among, columns, mine.rows);
#pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < inputs.rows; from += mine.block) {
            int64_t rows = smaller(inputs.rows - from, mine.block);
            lay_out_rows(kind, inputs, from, rows, words, mine);
            search_rows(kind, rows, columns, all.k, mine);
            for (int64_t r = 0; r < rows; r++) {
                if (mine.own[r].count > all.k) keep_k_largest(mine.own + r, all.k, mine.keys);
                write_row(mine.own + r, &all, from + r);
            }
            for (int64_t r = 0; dead.k && r < rows; r += ROWS) {
                select_written(mine, r, rows, dead.width, columns.bias, dead.k, mine.own);
                for (int64_t i = r; i < r + ROWS && i < rows; i++)
                    write_row(mine.own + i - r, &dead, from + i);
            }
        }
        free_workspace(mine);
    }
    free_columns(columns);
}

#endif

/* `among` lists the rows of W in the order they are searched in, -1 where there is none: `count` in
   all, whole tiles of them, and first the `listed` ones among which a second selection is made. */
void search(int64_t kind, const void *inputs, int64_t bf16, int64_t rows, int64_t d, const float *W,
            const float *bias, const int32_t *among, int64_t count, int64_t k, float *top,
            int64_t *columns, int64_t listed, int64_t dead_k, float *dead_top,
            int64_t *dead_columns) {
#ifdef __AVX512F__
    matrix of = {inputs, bf16, rows, d};
    wanted all = {among, count, k, bias, top, columns};
    wanted dead = {among, listed, dead_k, bias, dead_top, dead_columns};
    if (kind == FLOAT32) search_kind(FLOAT32, of, W, bias, all, dead);
    if (kind == BFLOAT16) search_kind(BFLOAT16, of, W, bias, all, dead);
    if (kind == INT8) search_kind(INT8, of, W, bias, all, dead);
#endif
}
