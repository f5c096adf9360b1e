/* Any bytes at all, in memory of exactly their size, through every kernel that takes no table: for a sanitizer to watch. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef size_t Lossless(const void *from, void *to, size_t count, size_t n, size_t slots);
typedef void Blocks(const uint8_t *blocks, void *out, size_t count, int to_bfloat16, const int8_t *grid);

typedef size_t Encoder(const void *from, void *to, size_t count, size_t n, size_t slots, const uint8_t *bases);

Lossless decode_bf16x12, decode_bf16x11;
Encoder encode_bf16x12, encode_bf16x11;
void count_outside(
    const uint16_t *numbers, size_t count, size_t n, size_t kinds, const int32_t *widths, size_t *most, uint8_t *bases);
size_t crc32_of_rows(const uint8_t *rows, uint32_t *sums, size_t count, size_t nbytes);

#define TYPES                                                                                                     \
    TYPE(q4_0, 32, 18) TYPE(q4_1, 32, 20) TYPE(q5_0, 32, 22) TYPE(q5_1, 32, 24) TYPE(q8_0, 32, 34)               \
    TYPE(iq4_nl, 32, 18) TYPE(mxfp4, 32, 17) TYPE(q2_k, 256, 84) TYPE(q3_k, 256, 110) TYPE(q4_k, 256, 144)       \
    TYPE(q5_k, 256, 176) TYPE(q6_k, 256, 210) TYPE(iq4_xs, 256, 136)
#define TYPE(name, elements, nbytes) Blocks decode_##name;
TYPES
#undef TYPE
#define TYPE(name, elements, nbytes) {decode_##name, elements, nbytes},
static const struct {
    Blocks *decode;
    size_t elements, nbytes;
} KERNELS[] = {TYPES};

static uint64_t state = 88172645463325252u;

static uint64_t any(uint64_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % below;
}

/* Bytes of one of three kinds: any; few different ones; mostly zeros. */
static uint8_t *some_bytes(size_t nbytes) {
    uint8_t *bytes = malloc(nbytes ? nbytes : 1);
    uint64_t kind = any(3), mask = any(256);
    for (size_t i = 0; i < nbytes; i++)
        bytes[i] = (uint8_t)(kind == 0 ? any(256) : kind == 1 ? any(256) & mask : any(16) ? 0 : any(256));
    return bytes;
}

static size_t lossless(int is_x12) {
    size_t n = (is_x12 ? 32 : 64) * (1 + any(any(8) ? 12 : 1024)), slots = 4 * any(n / 32 + 1), count = any(4);
    size_t nbytes = 8 + n + (is_x12 ? n / 2 + 3 * slots : 3 * n / 8 + slots);
    uint8_t *blocks = some_bytes(count * nbytes), *numbers = some_bytes(count * n * 2);
    uint8_t *bases = any(2) ? some_bytes(count) : NULL; /* of windows that nobody counted, too */
    size_t done = (is_x12 ? encode_bf16x12 : encode_bf16x11)(numbers, blocks, count, n, slots, bases);
    free(bases);
    uint16_t *decoded = malloc(count * n * 2 + 1);
    (is_x12 ? decode_bf16x12 : decode_bf16x11)(blocks, decoded, done, n, slots);
    if (memcmp(decoded, numbers, done * n * 2))
        exit(2); /* what was packed has to come back */
    free(blocks);
    free(decoded);
    blocks = some_bytes(count * nbytes);
    decoded = malloc(count * n * 2);
    size_t whole = (is_x12 ? decode_bf16x12 : decode_bf16x11)(blocks, decoded, count, n, slots);
    const int32_t widths[2] = {15, 6};
    size_t most[2];
    bases = malloc(2 * count + 1);
    count_outside((uint16_t *)numbers, count, n, 2, widths, most, bases);
    if (most[0] > most[1] || most[1] > n || whole > count)
        exit(3);
    free(bases);
    uint32_t *sums = malloc(count * n * 2 * sizeof *sums + 1);
    size_t row = 1 + any(2 * n);
    crc32_of_rows(numbers, sums, count * n * 2 / row, row);
    free(sums);
    free(numbers);
    free(blocks);
    free(decoded);
    return whole < count;
}

/* `Team` and `Blocks` of team.c. */
typedef struct {
    void *parallel;
    size_t threads, run, room;
    float *buffers;
} Team;

typedef struct {
    const void *decode, *grid;
    size_t nbytes, elements, item_bytes, slots, is_lossless;
} Packed;

size_t team_unpack(const Team *, const Packed *, const uint8_t *packed, size_t count, char *out);

/* Blocks at the end of memory that is as large as their numbers, or reaches beyond them: as they are decoded elsewhere. */
static void in_place(void) {
    size_t kind = any(sizeof KERNELS / sizeof *KERNELS + 1), count = 1 + any(any(20) ? 40 : 4000), beyond = any(3) * any(90);
    int narrow = (int)any(2), is_lossless = kind == sizeof KERNELS / sizeof *KERNELS;
    size_t elements = is_lossless ? 64 : KERNELS[kind].elements, slots = is_lossless ? 8 : 0;
    size_t nbytes = is_lossless ? 8 + elements + 3 * elements / 8 + slots : KERNELS[kind].nbytes;
    narrow |= is_lossless;
    size_t wide = elements * (narrow ? 2 : 4), threads = 1 + any(3);
    Packed how = {is_lossless ? (const void *)decode_bf16x11 : (const void *)KERNELS[kind].decode, NULL, nbytes, elements,
        narrow ? 2 : 4, slots, is_lossless};
    Team team = {NULL, threads, 1, 2 * elements, malloc(threads * 2 * elements * sizeof(float))};
    uint8_t *packed = some_bytes(count * nbytes);
    char *memory = malloc(count * wide + beyond), *expected = malloc(count * wide);
    memcpy(memory + count * wide + beyond - count * nbytes, packed, count * nbytes);
    size_t whole = count;
    if (is_lossless)
        whole = decode_bf16x11(packed, expected, count, elements, slots);
    else
        KERNELS[kind].decode(packed, expected, count, narrow, NULL);
    if (team_unpack(&team, &how, (uint8_t *)memory + count * wide + beyond - count * nbytes, count, memory) != whole
        || memcmp(memory, expected, whole * wide))
        exit(4);
    free(team.buffers), free(packed), free(memory), free(expected);
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 100;
    size_t damaged = 0;
    for (int round = 0; round < rounds; round++) {
        damaged += lossless(1) + lossless(0);
        in_place();
        size_t kind = any(sizeof KERNELS / sizeof *KERNELS), count = any(40);
        int to_bfloat16 = (int)any(2);
        uint8_t *blocks = some_bytes(count * KERNELS[kind].nbytes);
        void *out = malloc(count * KERNELS[kind].elements * (to_bfloat16 ? 2 : 4));
        KERNELS[kind].decode(blocks, out, count, to_bfloat16, NULL);
        free(blocks);
        free(out);
    }
    printf("%zu damaged\n", damaged);
    return 0;
}
