/* The k largest of values + bias in every row of a matrix. */

#include "largest.h"

static inline void listed_columns(block b, int bf16, const wanted *w, float *values) {
    for (int64_t r = 0; r < b.rows; r++)
        for (int64_t i = 0; i < w->width; i++)
            values[r * w->width + i] = load_one(row_of(b, r, bf16), w->among[i], bf16);
}

/* One or two selections from each row, while it is at hand. */
void select_largest(const void *values, int64_t bf16, int64_t rows, int64_t width,
                    const int32_t *among, int64_t m, int64_t k, const float *bias, float *top,
                    int64_t *columns, const int32_t *other_among, int64_t other_m, int64_t other_k,
                    const float *other_bias, float *other_top, int64_t *other_columns) {
    wanted all[2] = {{among, m, k, bias, top, columns},
                     {other_among, other_m, other_k, other_bias, other_top, other_columns}};
    int64_t room = 2 * (k > other_k ? k : other_k) + STEP;
#pragma omp parallel
    {
        float *maxima = allocate_words(ROWS * width), *listed = allocate_words(ROWS * width);
        int32_t *keys = allocate_words(width > room ? width : room);
        kept own[ROWS];
        for (int r = 0; r < ROWS; r++) own[r] = (kept){allocate_words(room), allocate_words(room), 0, 0};
#pragma omp for schedule(static)
        for (int64_t from = 0; from < rows; from += ROWS)
            for (const wanted *w = all; w < all + 2 && w->k; w++) {
                const char *start = (const char *)values + from * width * (bf16 ? 2 : 4);
                block b = {start, rows - from < ROWS ? rows - from : ROWS, width, width, w->bias};
                if (w->among) {
                    if (bf16) listed_columns(b, 1, w, listed);
                    else listed_columns(b, 0, w, listed);
                    b = (block){(const char *)listed, b.rows, w->width, w->width, w->bias};
                }
                if (bf16 && !w->among) select_rows(b, 1, w->k, own, maxima, keys);
                else select_rows(b, 0, w->k, own, maxima, keys);
                for (int64_t r = 0; r < b.rows; r++) write_row(own + r, w, from + r);
            }
        free(maxima);
        free(listed);
        free(keys);
        for (int r = 0; r < ROWS; r++) {
            free(own[r].scores);
            free(own[r].columns);
        }
    }
}
