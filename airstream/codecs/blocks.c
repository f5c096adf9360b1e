/* Blocks of GGUF to numbers: the same as the functions of simple.py and super_blocks.py, some times faster on a CPU.
 *
 * Every number is computed in float32, in the order of the format's reference, and rounded once; compile without
 * contraction to fused multiply-adds, which round otherwise. Layouts: ggml-common.h of ggml, MIT licence. Knows neither
 * Python nor torch: native.py loads this as a shared library.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "widths.h"

enum { BUFFER = 2048 }; /* numbers that wait to be rounded: a few kilobytes, which stay in the first cache */

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t two_bytes(const uint8_t *at) {
    return at[0] | (uint32_t)at[1] << 8;
}

INLINE uint32_t word(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE float half_of_bits(uint32_t bits) {
    uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
    if (exponent == 31)
        return float_of_bits(sign | 0x7F800000 | fraction << 13);
    if (exponent == 0)
        return float_of_bits(sign) + (sign ? -1.0f : 1.0f) * ((float)fraction * 0x1p-24f);
    return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

INLINE float half(const uint8_t *at) {
    return half_of_bits(two_bytes(at));
}

/* ------------------------------------------------------------------------------------------ one scale for 32 numbers */

/* Halves of 16 bytes are 32 numbers: the low ones, then the high ones. Loops over 16, which are one vector of floats. */

INLINE void q4_0(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block);
    for (int i = 0; i < 16; i++)
        out[i] = (float)((block[2 + i] & 15) - 8) * scale;
    for (int i = 0; i < 16; i++)
        out[16 + i] = (float)((block[2 + i] >> 4) - 8) * scale;
}

INLINE void q4_1(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block), shift = half(block + 2);
    for (int i = 0; i < 16; i++)
        out[i] = (float)(block[4 + i] & 15) * scale + shift;
    for (int i = 0; i < 16; i++)
        out[16 + i] = (float)(block[4 + i] >> 4) * scale + shift;
}

INLINE void q5_0(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block);
    uint32_t fifth = word(block + 2);
    for (int i = 0; i < 16; i++)
        out[i] = (float)((int)((block[6 + i] & 15) | (fifth >> i & 1) << 4) - 16) * scale;
    for (int i = 0; i < 16; i++)
        out[16 + i] = (float)((int)(block[6 + i] >> 4 | (fifth >> (16 + i) & 1) << 4) - 16) * scale;
}

INLINE void q5_1(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block), shift = half(block + 2);
    uint32_t fifth = word(block + 4);
    for (int i = 0; i < 16; i++)
        out[i] = (float)(int)((block[8 + i] & 15) | (fifth >> i & 1) << 4) * scale + shift;
    for (int i = 0; i < 16; i++)
        out[16 + i] = (float)(int)(block[8 + i] >> 4 | (fifth >> (16 + i) & 1) << 4) * scale + shift;
}

INLINE void q8_0(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block);
    for (int i = 0; i < 32; i++)
        out[i] = (float)(int8_t)block[2 + i] * scale;
}

static const float IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const float FP4_LEVELS[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* twice E2M1 */

INLINE void levels(const uint8_t *restrict numbers, const float *table, float scale, float *restrict out) {
    for (int i = 0; i < 16; i++)
        out[i] = table[numbers[i] & 15] * scale;
    for (int i = 0; i < 16; i++)
        out[16 + i] = table[numbers[i] >> 4] * scale;
}

INLINE void iq4_nl(const uint8_t *restrict block, float *restrict out) {
    levels(block + 2, IQ4_LEVELS, half(block), out);
}

INLINE void mxfp4(const uint8_t *restrict block, float *restrict out) {
    uint32_t exponent = block[0]; /* of 2 ** (exponent - 128): half of the scale, for levels are twice the numbers */
    levels(block + 1, FP4_LEVELS, float_of_bits(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23), out);
}

/* ------------------------------------------------------------------------------- scales of scales, for 256 numbers */

INLINE void q2_k(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block + 80), minimum = half(block + 82);
    for (int group = 0; group < 16; group++) {
        const uint8_t *numbers = block + 16 + 32 * (group / 8) + 16 * (group % 2);
        float own_scale = scale * (float)(block[group] & 15), own_minimum = minimum * (float)(block[group] >> 4);
        for (int i = 0; i < 16; i++)
            out[16 * group + i] = (float)(numbers[i] >> 2 * (group / 2 % 4) & 3) * own_scale - own_minimum;
    }
}

INLINE void q3_k(const uint8_t *restrict block, float *restrict out) {
    const uint8_t *packed = block + 96;
    float scale = half(block + 108);
    for (int group = 0; group < 16; group++) {
        const uint8_t *numbers = block + 32 + 32 * (group / 8) + 16 * (group % 2), *high = block + 16 * (group % 2);
        int low_bits = packed[group % 8] >> 4 * (group / 8) & 15, high_bits = packed[8 + group % 4] >> 2 * (group / 4) & 3;
        float own_scale = scale * (float)((low_bits | high_bits << 4) - 32);
        for (int i = 0; i < 16; i++) {
            int number = (numbers[i] >> 2 * (group / 2 % 4) & 3) | (high[i] >> group / 2 & 1) << 2;
            out[16 * group + i] = (float)(number - 4) * own_scale;
        }
    }
}

/* Of Q4_K and Q5_K: the scale and the minimum of a group, six bits each. */
INLINE int six_bit_scale(const uint8_t *packed, int group) {
    return group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
}

INLINE int six_bit_minimum(const uint8_t *packed, int group) {
    return group < 4 ? packed[group + 4] & 63 : packed[group + 4] >> 4 | packed[group] >> 6 << 4;
}

INLINE void q4_k(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block), minimum = half(block + 2);
    for (int group = 0; group < 8; group++) {
        const uint8_t *numbers = block + 16 + 32 * (group / 2);
        float own_scale = scale * (float)six_bit_scale(block + 4, group);
        float own_minimum = minimum * (float)six_bit_minimum(block + 4, group);
        for (int i = 0; i < 32; i++)
            out[32 * group + i] = (float)(numbers[i] >> 4 * (group % 2) & 15) * own_scale - own_minimum;
    }
}

INLINE void q5_k(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block), minimum = half(block + 2);
    for (int group = 0; group < 8; group++) {
        const uint8_t *numbers = block + 48 + 32 * (group / 2), *high = block + 16;
        float own_scale = scale * (float)six_bit_scale(block + 4, group);
        float own_minimum = minimum * (float)six_bit_minimum(block + 4, group);
        for (int i = 0; i < 32; i++) {
            int number = (numbers[i] >> 4 * (group % 2) & 15) | (high[i] >> group & 1) << 4;
            out[32 * group + i] = (float)number * own_scale - own_minimum;
        }
    }
}

INLINE void q6_k(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block + 208);
    for (int group = 0; group < 16; group++) {
        int half_block = group / 8, quarter = group / 2 % 4, part = 16 * (group % 2);
        const uint8_t *numbers = block + 64 * half_block + 32 * (quarter % 2) + part;
        const uint8_t *high = block + 128 + 32 * half_block + part;
        float own_scale = scale * (float)(int8_t)block[192 + group];
        for (int i = 0; i < 16; i++) {
            int number = (numbers[i] >> 4 * (quarter / 2) & 15) | (high[i] >> 2 * quarter & 3) << 4;
            out[16 * group + i] = (float)(number - 32) * own_scale;
        }
    }
}

INLINE void iq4_xs(const uint8_t *restrict block, float *restrict out) {
    float scale = half(block);
    uint32_t high_bits = two_bytes(block + 2);
    for (int group = 0; group < 8; group++) {
        int own = (block[4 + group / 2] >> 4 * (group % 2) & 15) | (int)(high_bits >> 2 * group & 3) << 4;
        levels(block + 8 + 16 * group, IQ4_LEVELS, scale * (float)(own - 32), out + 32 * group);
    }
}

/* ------------------------------------------------------------- numbers looked up in a grid, whose rows are 4 or 8 long */

INLINE int nibble(const uint8_t *packed, int number) {
    return packed[number / 2] >> 4 * (number % 2) & 15;
}

/* Seven signs, and an eighth that makes the number of minuses even. */
INLINE int eight_signs(uint32_t seven) {
    uint32_t parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    return (int)(seven | ((parity ^ parity >> 1) << 7 & 128));
}

INLINE void signed_row(const int8_t *restrict row, int length, int signs, float scale, float *restrict out) {
    for (int i = 0; i < length; i++)
        out[i] = scale * (float)row[i] * (float)(1 - 2 * (signs >> i & 1));
}

INLINE void shifted_row(const int8_t *restrict row, int is_negative, float scale, float *restrict out) {
    float shift = is_negative ? -0.125f : 0.125f;
    for (int i = 0; i < 8; i++)
        out[i] = scale * ((float)row[i] + shift);
}

INLINE void iq2_xxs(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    float scale = half(block);
    for (int group = 0; group < 8; group++) {
        const uint8_t *rows = block + 2 + 8 * group;
        uint32_t signs = word(rows + 4);
        float own_scale = scale * (0.5f + (float)(signs >> 28)) * 0.25f;
        for (int i = 0; i < 4; i++)
            signed_row(grid + 8 * rows[i], 8, eight_signs(signs >> 7 * i & 127), own_scale, out + 32 * group + 8 * i);
    }
}

INLINE void iq2_xs(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    float scale = half(block);
    for (int i = 0; i < 32; i++) {
        uint32_t number = two_bytes(block + 2 + 2 * i);
        float own_scale = scale * (0.5f + (float)nibble(block + 66, i / 2)) * 0.25f;
        signed_row(grid + 8 * (number & 511), 8, eight_signs(number >> 9), own_scale, out + 8 * i);
    }
}

INLINE void iq2_s(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    float scale = half(block);
    for (int i = 0; i < 32; i++) {
        int row = block[2 + i] | (block[66 + i / 4] >> 2 * (i % 4) & 3) << 8;
        float own_scale = scale * (0.5f + (float)nibble(block + 74, i / 2)) * 0.25f;
        signed_row(grid + 8 * row, 8, block[34 + i], own_scale, out + 8 * i);
    }
}

INLINE void iq3_xxs(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    float scale = half(block);
    for (int group = 0; group < 8; group++) {
        uint32_t signs = word(block + 66 + 4 * group);
        float own_scale = scale * (0.5f + (float)(signs >> 28)) * 0.5f;
        for (int i = 0; i < 8; i++) {
            int own_signs = eight_signs(signs >> 7 * (i / 2) & 127) >> 4 * (i % 2);
            signed_row(grid + 4 * block[2 + 8 * group + i], 4, own_signs, own_scale, out + 32 * group + 4 * i);
        }
    }
}

INLINE void iq3_s(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    float scale = half(block);
    for (int i = 0; i < 64; i++) {
        int row = block[2 + i] | (block[66 + i / 8] >> i % 8 & 1) << 8;
        float own_scale = scale * (float)(1 + 2 * nibble(block + 106, i / 8));
        signed_row(grid + 4 * row, 4, block[74 + i / 2] >> 4 * (i % 2), own_scale, out + 4 * i);
    }
}

INLINE void iq1_s(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    float scale = half(block);
    for (int i = 0; i < 32; i++) {
        uint32_t high = two_bytes(block + 34 + 2 * (i / 4));
        uint32_t row = block[2 + i] | (high >> 3 * (i % 4) & 7) << 8;
        shifted_row(grid + 8 * row, high >> 15, scale * (float)(2 * (high >> 12 & 7) + 1), out + 8 * i);
    }
}

INLINE void iq1_m(const uint8_t *restrict block, float *restrict out, const int8_t *restrict grid) {
    const uint8_t *scales = block + 48;
    uint32_t bits = 0; /* of the scale: four in each of four words, above the scales of groups */
    for (int i = 0; i < 4; i++)
        bits |= two_bytes(scales + 2 * i) >> 12 << 4 * i;
    float scale = half_of_bits(bits);
    for (int i = 0; i < 32; i++) {
        int high = nibble(block + 32, i);
        uint32_t own_scale = two_bytes(scales + 2 * (i / 8)) >> 3 * (i / 2 % 4) & 7;
        int row = block[i] | (high & 7) << 8;
        shifted_row(grid + 8 * row, high & 8, scale * (float)(2 * own_scale + 1), out + 8 * i);
    }
}

/* ------------------------------------------------------------------------------------------------------------ kernels */

INLINE uint16_t bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded); /* what is not a number stays so */
}

/* decode_TYPE(blocks, out, count, to_bfloat16, grid): `count` blocks, of any alignment, to float32 or to bfloat16. `grid`:
 * the rows of the type's grid, if it has one. */
#define DEFINE(type, elements, nbytes, decode)                                                                    \
    EVERY_WIDTH void decode_##type(                                                                               \
        const uint8_t *blocks, void *out, size_t count, int to_bfloat16, const int8_t *grid) {                    \
        (void)grid;                                                                                               \
        if (!to_bfloat16) {                                                                                       \
            for (size_t number = 0; number < count; number++) {                                                   \
                const uint8_t *block = blocks + number * nbytes;                                                  \
                float *numbers = (float *)out + number * elements;                                                \
                decode;                                                                                           \
            }                                                                                                     \
            return;                                                                                               \
        }                                                                                                         \
        float buffer[BUFFER];                                                                                     \
        for (size_t first = 0; first < count; first += BUFFER / elements) {                                       \
            size_t some = count - first < BUFFER / elements ? count - first : BUFFER / elements;                  \
            for (size_t number = 0; number < some; number++) {                                                    \
                const uint8_t *block = blocks + (first + number) * nbytes;                                        \
                float *numbers = buffer + number * elements;                                                      \
                decode;                                                                                           \
            }                                                                                                     \
            for (size_t i = 0; i < some * elements; i++)                                                          \
                ((uint16_t *)out)[first * elements + i] = bfloat16(buffer[i]);                                    \
        }                                                                                                         \
    }

#define KERNEL(type, elements, nbytes) DEFINE(type, elements, nbytes, type(block, numbers))
#define GRID_KERNEL(type, nbytes) DEFINE(type, 256, nbytes, type(block, numbers, grid))

KERNEL(q4_0, 32, 18)
KERNEL(q4_1, 32, 20)
KERNEL(q5_0, 32, 22)
KERNEL(q5_1, 32, 24)
KERNEL(q8_0, 32, 34)
KERNEL(iq4_nl, 32, 18)
KERNEL(mxfp4, 32, 17)
KERNEL(q2_k, 256, 84)
KERNEL(q3_k, 256, 110)
KERNEL(q4_k, 256, 144)
KERNEL(q5_k, 256, 176)
KERNEL(q6_k, 256, 210)
KERNEL(iq4_xs, 256, 136)
GRID_KERNEL(iq1_s, 50)
GRID_KERNEL(iq1_m, 56)
GRID_KERNEL(iq2_xxs, 66)
GRID_KERNEL(iq2_xs, 74)
GRID_KERNEL(iq2_s, 82)
GRID_KERNEL(iq3_xxs, 98)
GRID_KERNEL(iq3_s, 110)
