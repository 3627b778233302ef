/* Large memory, in pages of 2 MB where the system has them. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define HUGE_PAGE (1 << 21)

void use_huge_pages(void *start, int64_t bytes, int64_t touched);

/* Memory for `count` words of four bytes; without any left the process ends. */
static inline void *allocate_words(int64_t count) {
    int64_t page = 4 * count < HUGE_PAGE ? 64 : HUGE_PAGE;
    int64_t bytes = (4 * count + page - 1) / page * page;
    void *memory = aligned_alloc(page, bytes);
    if (!memory) {
        fputs("error: no memory for a kernel's buffers\n", stderr);
        abort();
    }
    use_huge_pages(memory, bytes, 0);
    return memory;
}
