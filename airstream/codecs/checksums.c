/* CRC-32, as zlib has it, of many rows: by multiplication without carries, where a processor of x86 has that. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "widths.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FOLDING __attribute__((target("pclmul,sse2")))

/* The rest of a byte, times x^8, by the polynomial; bits are in the order of bytes, lowest first. */
static void fill(uint32_t *table) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t rest = byte;
        for (int bit = 0; bit < 8; bit++)
            rest = rest >> 1 ^ (rest & 1 ? 0xEDB88320u : 0);
        table[byte] = rest;
    }
}

static uint32_t bytewise(const uint32_t *table, uint32_t sum, const uint8_t *at, size_t nbytes) {
    for (size_t i = 0; i < nbytes; i++)
        sum = sum >> 8 ^ table[(uint8_t)(sum ^ at[i])];
    return sum;
}

/* `sum`, times the two powers of x in `by`, and `next`: the same rest by the polynomial, so many bits later. */
FOLDING static inline __m128i fold(__m128i sum, __m128i by, __m128i next) {
    return _mm_xor_si128(
        _mm_xor_si128(_mm_clmulepi64_si128(sum, by, 0x00), _mm_clmulepi64_si128(sum, by, 0x11)), next);
}

FOLDING static inline __m128i words_at(const uint8_t *at, size_t number) {
    return _mm_loadu_si128((const __m128i *)(const void *)(at + 16 * number));
}

FOLDING static uint32_t crc32(const uint32_t *table, const uint8_t *at, size_t nbytes) {
    if (nbytes < 64)
        return ~bytewise(table, 0xFFFFFFFFu, at, nbytes);
    const __m128i by_64 = _mm_set_epi64x(0x1C6E41596, 0x154442BD4); /* x^(512 - 32), x^(512 + 32), modulo */
    const __m128i by_16 = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0); /* x^(128 - 32), x^(128 + 32) */
    __m128i sums[4];
    for (size_t i = 0; i < 4; i++)
        sums[i] = words_at(at, i);
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(-1));
    for (at += 64, nbytes -= 64; nbytes >= 64; at += 64, nbytes -= 64)
        for (size_t i = 0; i < 4; i++)
            sums[i] = fold(sums[i], by_64, words_at(at, i));
    for (size_t i = 1; i < 4; i++)
        sums[i] = fold(sums[i - 1], by_16, sums[i]);
    uint8_t last[16];
    memcpy(last, &sums[3], sizeof last);
    return ~bytewise(table, bytewise(table, 0, last, sizeof last), at, nbytes);
}

/* The checksums of `count` rows of `nbytes` bytes; 0 if this processor cannot. */
size_t crc32_of_rows(const uint8_t *rows, uint32_t *sums, size_t count, size_t nbytes) {
    uint32_t table[256];
    if (!__builtin_cpu_supports("pclmul"))
        return 0;
    fill(table);
    for (size_t number = 0; number < count; number++)
        sums[number] = crc32(table, rows + number * nbytes, nbytes);
    return 1;
}
#else
size_t crc32_of_rows(const uint8_t *rows, uint32_t *sums, size_t count, size_t nbytes) {
    (void)rows, (void)sums, (void)count, (void)nbytes;
    return 0;
}
#endif
