/* Products of weights as they are stored with vectors: a row is unpacked into a buffer that stays in the first caches,
 * and multiplied there. Nothing else of it is ever written to memory.
 *
 * Numbers are float32 and so are sums, thirty-two of them side by side: closer to the exact product than one whose weights
 * were rounded to bfloat16 first, and not to the bit the same. This file may be compiled with fused multiply-adds. It knows
 * neither Python nor torch: products.py loads it as a shared library. It believes the sizes that it is told.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "decoders.h"
#include "widths.h"

enum { LANES = 8, PARTS = 4 };

typedef float Floats __attribute__((vector_size(4 * LANES)));

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

/* A weight of `columns` numbers a row. What a field is depends on how the numbers are stored. */
typedef struct {
    const uint8_t *numbers; /* a row is `row_bytes` of them */
    const void *scales;     /* of a row, or of runs of `group` columns */
    const void *decode;     /* what decodes blocks of `group` numbers; `table` is its grid, `slots` those of a block */
    const void *table;
    size_t columns, row_bytes, group, slots;
    size_t scale_bytes; /* 4: scales are float32; 2: bfloat16 */
} Weight;

INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

INLINE float sum_of(const Floats *values) {
    float parts[LANES];
    memcpy(parts, values, sizeof parts);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            parts[lane] += parts[lane + half];
    return parts[0];
}

INLINE void widen(const uint16_t *restrict numbers, size_t count, float *restrict out) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)numbers[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

INLINE float scale_at(const Weight *weight, size_t number) {
    return weight->scale_bytes == 4 ? ((const float *)weight->scales)[number]
                                    : of_bits((uint32_t)((const uint16_t *)weight->scales)[number] << 16);
}

/* ------------------------------------------------------------------------------------------- one row, as it is stored */

/* TYPE_row(weight, row, out): its numbers in float32, in `out` or wherever they are; NULL if a block is damaged. `out` has
 * room for twice as many. */

INLINE const float *blocks_row(const Weight *weight, size_t row, float *out) {
    DecodeBlocks *decode = (DecodeBlocks *)weight->decode;
    decode(weight->numbers + row * weight->row_bytes, out, weight->columns / weight->group, 0, weight->table);
    return out;
}

INLINE const float *lossless_row(const Weight *weight, size_t row, float *out) {
    DecodeLossless *decode = (DecodeLossless *)weight->decode;
    uint16_t *narrow = (uint16_t *)(out + weight->columns);
    size_t count = weight->columns / weight->group;
    const uint8_t *blocks = weight->numbers + row * weight->row_bytes;
    if (decode(blocks, narrow, count, weight->group, weight->slots) != count)
        return NULL;
    widen(narrow, weight->columns, out);
    return out;
}

INLINE const float *bf16_row(const Weight *weight, size_t row, float *out) {
    widen((const uint16_t *)(weight->numbers + row * weight->row_bytes), weight->columns, out);
    return out;
}

/* Eight bytes in eight places. */
#define WIDEN(bytes, wide)                                                                                        \
    do {                                                                                                          \
        int32_t places_[LANES];                                                                                   \
        for (int lane = 0; lane < LANES; lane++)                                                                  \
            places_[lane] = (bytes)[lane];                                                                        \
        memcpy(&wide, places_, sizeof wide);                                                                      \
    } while (0)

#define LOWS 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGHS 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#ifdef __clang__
#define IN_TURN(a, b, places) __builtin_shufflevector(a, b, places)
#else
#define IN_TURN(a, b, places) __builtin_shuffle(a, b, (Bytes){places})
#endif

/* Sixteen bytes of each, in turn. */
INLINE void interleave(Bytes first, Bytes second, uint8_t *restrict out) {
    Bytes lows = IN_TURN(first, second, LOWS), highs = IN_TURN(first, second, HIGHS);
    memcpy(out, &lows, sizeof lows);
    memcpy(out + sizeof lows, &highs, sizeof highs);
}

/* Eight numbers of a table of sixteen. */
#ifdef __clang__
#define LOOK_UP(table, at, values)                                                                                \
    do {                                                                                                          \
        for (int lane = 0; lane < LANES; lane++)                                                                  \
            (values)[lane] = (table)[(at)[lane]];                                                                 \
    } while (0)
#else
#define LOOK_UP(table, at, values)                                                                                \
    do {                                                                                                          \
        Floats low_, high_;                                                                                       \
        memcpy(&low_, table, sizeof low_);                                                                        \
        memcpy(&high_, (table) + LANES, sizeof high_);                                                            \
        Ints lower_ = (Ints)__builtin_shuffle(low_, (at) & 7), upper_ = (Ints)__builtin_shuffle(high_, (at) & 7); \
        values = (Floats)((((at) > 7) & upper_) | (((at) <= 7) & lower_));                                        \
    } while (0)
#endif

/* ------------------------------------------------------------------------------ numbers that share scales, 32 at a time */

/* TYPE_bytes(numbers, first, room): 32 numbers of a row, from column `first` on, a byte each, in `room` or where they are.
 * TYPE_eight(weight, bytes, out): what eight of those are, without their scale.
 */

INLINE const uint8_t *int8_bytes(const uint8_t *numbers, size_t first, uint8_t *room) {
    (void)room;
    return numbers + first;
}

INLINE void int8_eight(const Weight *weight, const uint8_t *bytes, Floats *out) {
    (void)weight;
    Ints wide;
    WIDEN((const int8_t *)bytes, wide);
    *out = __builtin_convertvector(wide, Floats);
}

/* Halves of bytes, the low one first, 8 more than the number. */
INLINE const uint8_t *int4_bytes(const uint8_t *numbers, size_t first, uint8_t *room) {
    Bytes pairs;
    memcpy(&pairs, numbers + first / 2, sizeof pairs);
    interleave(pairs & 15, pairs >> 4, room);
    return room;
}

INLINE void int4_eight(const Weight *weight, const uint8_t *bytes, Floats *out) {
    (void)weight;
    Ints wide;
    WIDEN(bytes, wide);
    *out = __builtin_convertvector(wide - 8, Floats);
}

/* Halves of bytes, the high one first: places of a table of 16. */
INLINE const uint8_t *nf4_bytes(const uint8_t *numbers, size_t first, uint8_t *room) {
    Bytes pairs;
    memcpy(&pairs, numbers + first / 2, sizeof pairs);
    interleave(pairs >> 4, pairs & 15, room);
    return room;
}

INLINE void nf4_eight(const Weight *weight, const uint8_t *bytes, Floats *out) {
    const float *levels = (const float *)weight->table;
    Ints wide;
    WIDEN(bytes, wide);
    LOOK_UP(levels, wide, *out);
}

/* float8_e4m3fn. */
INLINE const uint8_t *fp8_bytes(const uint8_t *numbers, size_t first, uint8_t *room) {
    (void)room;
    return numbers + first;
}

INLINE void fp8_eight(const Weight *weight, const uint8_t *bytes, Floats *out) {
    (void)weight;
    Ints wide;
    WIDEN(bytes, wide);
    Ints magnitude = wide & 0x7F, is_small = magnitude < 8, is_nan = magnitude == 0x7F;
    /* Of small ones, the same with a bit before them, less that bit: no processor likes denormal numbers. */
    Ints bits = (magnitude << 20) + ((is_small & 121) | (~is_small & 120)) * (1 << 23);
    Floats values = (Floats)bits - (Floats)(is_small & 0x3C800000);
    *out = (Floats)((Ints)values | (wide & 0x80) << 24 | (is_nan & 0x7FC00000));
}

/* Where the scales of a row begin, of `rows` that share them. */
INLINE size_t scales_of(const Weight *weight, size_t row, size_t rows) {
    return row / rows * (weight->columns / weight->group);
}

#define ADD_PRODUCT(type, sum, part)                                                                              \
    do {                                                                                                          \
        Floats values_, others_;                                                                                  \
        type##_eight(weight, bytes + LANES * (part), &values_);                                                   \
        memcpy(&others_, vector + first + LANES * (part), sizeof others_);                                        \
        sum += values_ * others_;                                                                                 \
    } while (0)

/* TYPE_row of such numbers, whose scales `shared_rows` share, and TYPE_dot, which multiplies with a vector what is still in
 * registers, and with the scale when a group is over. `columns` are a multiple of `group`, and that is one of 32. */
#define GROUPED(type, shared_rows)                                                                                \
    INLINE const float *type##_row(const Weight *weight, size_t row, float *restrict out) {                       \
        const uint8_t *numbers = weight->numbers + row * weight->row_bytes;                                       \
        size_t scales = scales_of(weight, row, shared_rows);                                                      \
        for (size_t first = 0; first < weight->columns; first += LANES * PARTS) {                                 \
            float scale = scale_at(weight, scales + first / weight->group);                                       \
            uint8_t room[LANES * PARTS];                                                                          \
            const uint8_t *bytes = type##_bytes(numbers, first, room);                                            \
            for (size_t part = 0; part < LANES * PARTS; part += LANES) {                                          \
                Floats values;                                                                                    \
                type##_eight(weight, bytes + part, &values);                                                      \
                values *= scale;                                                                                  \
                memcpy(out + first + part, &values, sizeof values);                                               \
            }                                                                                                     \
        }                                                                                                         \
        return out;                                                                                               \
    }                                                                                                             \
    INLINE float type##_dot(const Weight *weight, size_t row, const float *vector) {                              \
        const uint8_t *numbers = weight->numbers + row * weight->row_bytes;                                       \
        size_t scales = scales_of(weight, row, shared_rows);                                                      \
        Floats total = {0};                                                                                       \
        for (size_t group = 0; group < weight->columns; group += weight->group) {                                 \
            Floats a = {0}, b = {0}, c = {0}, d = {0}; /* four, so that one sum does not wait for the last */     \
            for (size_t first = group; first < group + weight->group; first += LANES * PARTS) {                   \
                uint8_t room[LANES * PARTS];                                                                      \
                const uint8_t *bytes = type##_bytes(numbers, first, room);                                        \
                ADD_PRODUCT(type, a, 0);                                                                          \
                ADD_PRODUCT(type, b, 1);                                                                          \
                ADD_PRODUCT(type, c, 2);                                                                          \
                ADD_PRODUCT(type, d, 3);                                                                          \
            }                                                                                                     \
            total += ((a + b) + (c + d)) * scale_at(weight, scales + group / weight->group);                      \
        }                                                                                                         \
        return sum_of(&total);                                                                                    \
    }

GROUPED(int8, 1)
GROUPED(int4, 1)
GROUPED(nf4, 1)
GROUPED(fp8, weight->group)

/* --------------------------------------------------------------------------------------------------------- with vectors */

INLINE float dot(const float *weights, const float *vector, size_t count) {
    Floats sums[4] = {{0}}, left, right;
    size_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (size_t k = 0; k < 4; k++) {
            memcpy(&left, weights + i + k * LANES, sizeof left);
            memcpy(&right, vector + i + k * LANES, sizeof right);
            sums[k] += left * right;
        }
    for (; i + LANES <= count; i += LANES) {
        memcpy(&left, weights + i, sizeof left);
        memcpy(&right, vector + i, sizeof right);
        sums[0] += left * right;
    }
    Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (; i < count; i++)
        total += weights[i] * vector[i];
    return sum_of(&all) + total;
}

/* product_TYPE(weight, first, end, vectors, count, out, stride, buffer): of rows `first` to `end` with `count` vectors of
 * `columns` numbers, which follow each other; product number v of a row to out[v * stride + row]. `buffer` has room for two
 * rows. How many rows come before one with a damaged block.
 *
 * rows_TYPE(weight, first, end, out, narrow, buffer): rows `first` to `end`, to float32 or, if `narrow`, to bfloat16. */
#define KERNELS(type, is_grouped)                                                                                 \
    EVERY_WIDTH size_t product_##type(const Weight *weight, size_t first, size_t end, const float *vectors,       \
        size_t count, float *out, size_t stride, float *buffer) {                                                 \
        for (size_t row = first; row < end; row++) {                                                              \
            if (is_grouped && count == 1) {                                                                       \
                out[row] = type##_dot(weight, row, vectors);                                                      \
                continue;                                                                                         \
            }                                                                                                     \
            const float *numbers = type##_row(weight, row, buffer);                                               \
            if (!numbers)                                                                                         \
                return row - first;                                                                               \
            for (size_t v = 0; v < count; v++)                                                                    \
                out[v * stride + row] = dot(numbers, vectors + v * weight->columns, weight->columns);             \
        }                                                                                                         \
        return end - first;                                                                                       \
    }                                                                                                             \
    EVERY_WIDTH size_t rows_##type(                                                                               \
        const Weight *weight, size_t first, size_t end, void *out, int narrow, float *buffer) {                   \
        size_t columns = weight->columns;                                                                         \
        for (size_t row = first; row < end; row++) {                                                              \
            const float *numbers = type##_row(weight, row, buffer);                                               \
            if (!numbers)                                                                                         \
                return row - first;                                                                               \
            if (narrow)                                                                                           \
                for (size_t i = 0; i < columns; i++)                                                              \
                    ((uint16_t *)out)[(row - first) * columns + i] = to_bfloat16(numbers[i]);                     \
            else                                                                                                  \
                memcpy((float *)out + (row - first) * columns, numbers, columns * sizeof *numbers);               \
        }                                                                                                         \
        return end - first;                                                                                       \
    }

#define BY_ROWS(type)                                                                                             \
    INLINE float type##_dot(const Weight *weight, size_t row, const float *vector) {                              \
        (void)weight, (void)row, (void)vector;                                                                    \
        return 0; /* never asked */                                                                               \
    }

BY_ROWS(blocks)
BY_ROWS(lossless)
BY_ROWS(bf16)

KERNELS(blocks, 0)
KERNELS(lossless, 0)
KERNELS(bf16, 0)
KERNELS(int8, 1)
KERNELS(int4, 1)
KERNELS(nf4, 1)
KERNELS(fp8, 1)
