/* What an optimizer step does to a matrix, each in one pass over it. */

#include <math.h>
#include <stdint.h>

/* grad *= scale, and of every row the part along its unit-norm weight row is taken out (not where
   there are no weights); squares[r] = ||grad[r]||^2 afterwards. */
void scale_and_project(float *grad, const float *weight, float scale, int64_t rows, int64_t d,
                     float *squares) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *g = grad + r * d, along = 0, square = 0;
        if (weight) {
            const float *w = weight + r * d;
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < d; i++) along += g[i] * w[i];
            along *= scale;
#pragma omp simd reduction(+ : square)
            for (int64_t i = 0; i < d; i++) {
                g[i] = g[i] * scale - along * w[i];
                square += g[i] * g[i];
            }
        } else {
#pragma omp simd reduction(+ : square)
            for (int64_t i = 0; i < d; i++) {
                g[i] *= scale;
                square += g[i] * g[i];
            }
        }
        squares[r] = square;
    }
}

/* Rows of zeros stay. */
static inline void to_unit_norm(float *y, int64_t d) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < d; i++) square += y[i] * y[i];
    float norm = sqrtf(square), by = norm == 0 ? 1 : 1 / norm;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) y[i] *= by;
}

/* z' = z - lr sign(g), y' = (1 - c) (y - (1 - beta) z) + (1 - beta + beta c) z', in place; then
   rows of y' get unit norm, if they are to. */
void signum_step(float *y_all, float *z_all, const float *g_all, int64_t rows, int64_t d, float lr,
                 float beta, float c, int64_t unit_norm) {
    float before = 1 - beta, keep = 1 - c, after = 1 - beta + beta * c;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *y = y_all + r * d, *z = z_all + r * d;
        const float *g = g_all + r * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float moved = z[i] - lr * (float)((g[i] > 0) - (g[i] < 0));
            y[i] = (y[i] - before * z[i]) * keep + after * moved;
            z[i] = moved;
        }
        if (unit_norm) to_unit_norm(y, d);
    }
}

void normalize_rows(float *y, int64_t rows, int64_t d) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) to_unit_norm(y + r * d, d);
}
