/* Rows of float32 or bfloat16, read sixteen numbers at a time. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

static inline lanes load(const void *row, int64_t at, int bf16) {
    if (!bf16) return *(const lanes *)((const float *)row + at);
    halves high = *(const halves *)((const uint16_t *)row + at);
    return (lanes)(__builtin_convertvector(high, words) << 16);
}

static inline float load_one(const void *row, int64_t at, int bf16) {
    if (!bf16) return ((const float *)row)[at];
    uint32_t word = (uint32_t)((const uint16_t *)row)[at] << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}
