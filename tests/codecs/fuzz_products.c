/* Any bytes at all, in memory of exactly their size, through every product with stored rows: for a sanitizer to watch. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    const uint8_t *numbers;
    const void *scales, *decode, *table;
    size_t columns, row_bytes, group, slots, scale_bytes;
} Weight;

typedef size_t Product(const Weight *, size_t, size_t, const float *, size_t, float *, size_t, float *);
typedef size_t Rows(const Weight *, size_t, size_t, void *, int, float *);
typedef struct {
    void *parallel;
    size_t threads, run, room;
    float *buffers;
} Team;

size_t team_product(const Team *, Product *, const Weight *, size_t, const float *, size_t, float *, size_t);
size_t team_rows(const Team *, Rows *, const Weight *, size_t, size_t, void *, int, size_t, const void *, size_t);
typedef size_t Decode(const void *from, void *to, size_t count, size_t n, size_t slots);

Decode decode_bf16x12, decode_bf16x11;
void decode_q8_0(void), decode_q4_k(void);

#define EACH KIND(blocks) KIND(lossless) KIND(bf16) KIND(int8) KIND(int4) KIND(nf4) KIND(fp8)
#define KIND(name) Product product_##name; Rows rows_##name;
EACH
#undef KIND
#define KIND(name) {product_##name, rows_##name},
static const struct {
    Product *multiply;
    Rows *widen;
} KINDS[] = {EACH};
enum { BLOCKS, LOSSLESS, BF16, INT8, INT4, NF4, FP8, NUM_KINDS };

static uint64_t state = 88172645463325252u;

static size_t any(size_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % below;
}

static void *some_bytes(size_t nbytes) {
    uint8_t *bytes = malloc(nbytes ? nbytes : 1);
    int is_any = any(2);
    for (size_t i = 0; i < nbytes; i++)
        bytes[i] = is_any || any(8) ? (uint8_t)any(256) : 0;
    return bytes;
}

/* Where rows of a kind lie; how many scales `rows` of them have. */
static size_t shape(int kind, size_t rows, Weight *weight) {
    int is_q8 = any(2), is_x12 = any(2);
    weight->group = kind == BF16 ? 1 : 32 * (1 + any(4));
    weight->columns = weight->group * (1 + any(5));
    switch (kind) {
    case BLOCKS:
        weight->group = is_q8 ? 32 : 256;
        weight->decode = is_q8 ? (const void *)decode_q8_0 : (const void *)decode_q4_k;
        weight->columns = weight->group * (1 + any(3));
        weight->row_bytes = weight->columns / weight->group * (is_q8 ? 34 : 144);
        return 0;
    case LOSSLESS:
        weight->group = 64 * (1 + any(4));
        weight->slots = 4 * any(weight->group / 32 + 1);
        weight->decode = is_x12 ? (const void *)decode_bf16x12 : (const void *)decode_bf16x11;
        weight->columns = weight->group * (1 + any(3));
        size_t n = weight->group, slots = weight->slots;
        weight->row_bytes = weight->columns / n * (8 + n + (is_x12 ? n / 2 + 3 * slots : 3 * n / 8 + slots));
        return 0;
    case BF16:
        weight->columns = 1 + any(200);
        weight->row_bytes = 2 * weight->columns;
        return 0;
    case INT8:
    case FP8:
        weight->row_bytes = weight->columns;
        break;
    default:
        weight->row_bytes = weight->columns / 2;
    }
    if (kind == INT8 && any(2))
        weight->group = weight->columns; /* a scale a row */
    return (kind == FP8 ? (rows + weight->group - 1) / weight->group : rows) * (weight->columns / weight->group);
}

static size_t one(int kind) {
    Weight weight = {0};
    size_t rows = 1 + any(40), num_scales = shape(kind, rows, &weight), count = 1 + any(3);
    weight.scale_bytes = any(2) ? 4 : 2;
    void *numbers = some_bytes(rows * weight.row_bytes), *scales = some_bytes(num_scales * weight.scale_bytes);
    void *table = some_bytes(16 * sizeof(float));
    weight.numbers = numbers, weight.scales = scales, weight.table = kind == NF4 ? table : NULL;
    float *vectors = some_bytes(count * weight.columns * sizeof(float)), *buffer = malloc(6 * weight.columns * sizeof(float));
    size_t first = any(rows), end = first + any(rows - first) + 1;
    float *out = malloc(count * rows * sizeof(float));
    size_t done = KINDS[kind].multiply(&weight, first, end, vectors, count, out, rows, buffer);
    int narrow = (int)any(2);
    void *dense = malloc((end - first) * weight.columns * (narrow ? 2 : 4));
    if (KINDS[kind].widen(&weight, first, end, dense, narrow, buffer) != done || done > end - first)
        exit(2);
    Team team = {NULL, 1 + any(3), 1 + any(5), 2 * weight.columns, buffer};
    if (team_rows(&team, KINDS[kind].widen, &weight, first, end - first, dense, narrow, weight.columns * (narrow ? 2 : 4),
            weight.numbers, weight.row_bytes) != done
        || (!first && end == rows
            && team_product(&team, KINDS[kind].multiply, &weight, rows, vectors, count, out, rows) != done))
        exit(3);
    free(numbers), free(scales), free(table), free(vectors), free(buffer), free(out), free(dense);
    return done < end - first;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 100;
    size_t damaged = 0;
    for (int round = 0; round < rounds; round++)
        for (int kind = 0; kind < NUM_KINDS; kind++)
            damaged += one(kind);
    printf("%zu damaged\n", damaged);
    return 0;
}
