/* Blocks of bfloat16 that give every bit back: the same as lossless.py and lossless_pack.py, some times faster on a CPU.
 *
 * docs/formats.md has the bytes. Whatever a block says, nothing beside it is read, and nothing beside its numbers written.
 * Loops over arrays of bytes that the compiler turns into vectors of any width; numbers without a code come one by one,
 * after them.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "widths.h"

enum {
    HEAD = 8,         /* bytes before signs and mantissas */
    RUN = 64,         /* numbers that are taken at a time: what one word of a bit plane has */
    LISTED = 7,       /* the code of bf16x11 for an exponent of the list */
    WINDOW_X12 = 15,  /* consecutive exponents that have a code */
    WINDOW_X11 = 6,
};

INLINE uint64_t long_word(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE void put_long_word(uint8_t *at, uint64_t value) {
    memcpy(at, &value, sizeof value);
}

/* ------------------------------------------------------------------------------------------------------------ decoding */

/* Sixteen at a time, as vectors of gcc and clang: of the same loops a compiler makes vectors or not, by what is around. */
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef char SignedBytes __attribute__((vector_size(16)));
typedef uint64_t Words __attribute__((vector_size(16)));
typedef uint16_t Numbers __attribute__((vector_size(32)));

INLINE Bytes bytes_at(const uint8_t *at) {
    Bytes bytes;
    memcpy(&bytes, at, sizeof bytes);
    return bytes;
}

/* The numbers of 16 codes. Exponents are added up modulo 256; code 0 is exponent 0. */
INLINE void join(const uint8_t *rest_at, Bytes codes, uint8_t before, uint16_t *out) {
    Bytes exponents = (codes + before) & (Bytes)(codes != 0);
    Numbers rest = __builtin_convertvector(bytes_at(rest_at), Numbers);
    Numbers numbers = (rest & 0x80) << 8 | __builtin_convertvector(exponents, Numbers) << 7 | (rest & 0x7F);
    memcpy(out, &numbers, sizeof numbers);
}

/* Three parts of a block are read at once, and the processor foresees none of them from block to block: `next` bytes on is
 * the same part of the next one, if there is one. Naming memory that is not there does no harm. */
INLINE void foresee(const uint8_t *at, size_t next) {
    __builtin_prefetch((const void *)((uintptr_t)at + next));
}

INLINE void set_exponent(uint16_t *number, uint8_t exponent) {
    *number = (uint16_t)((*number & 0x807F) | exponent << 7);
}

INLINE void numbers_x12(const uint8_t *restrict block, size_t n, size_t next, uint16_t *restrict out) {
    uint8_t before = (uint8_t)(block[0] - 1);
    const uint8_t *rest = block + HEAD, *shared = rest + n;
    for (size_t first = 0; first < n; first += 32) {
        foresee(rest + first, next);
        foresee(shared + first / 2, next);
        Bytes pairs = bytes_at(shared + first / 2);
        join(rest + first, pairs & 15, before, out + first);
        join(rest + first + 16, pairs >> 4, before, out + first + 16);
    }
}

/* Byte a eight times, then byte b. */
#define EIGHT_EACH(a, b) a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b
#ifdef __clang__
#define COPIES(bytes, a, b) __builtin_shufflevector(bytes, bytes, EIGHT_EACH(a, b))
#else
#define COPIES(bytes, a, b) __builtin_shuffle(bytes, (Bytes){EIGHT_EACH(a, b)})
#endif

/* Of 16 bytes, eight copies of each of two bytes of a plane, each one's own bit, at place `plane`. */
INLINE Bytes own_bits(Bytes copies, int plane) {
    const Bytes own = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return (Bytes)((copies & own) != 0) & (uint8_t)(1 << plane);
}

/* Sixteen numbers, whose bits are in bytes a and b of the planes p, q and r. */
#define SIXTEEN(a, b)                                                                                             \
    join(rest + first + 8 * (a),                                                                                  \
        own_bits(COPIES(p, a, b), 0) | own_bits(COPIES(q, a, b), 1) | own_bits(COPIES(r, a, b), 2), before,       \
        out + first + 8 * (a))

INLINE void numbers_x11(const uint8_t *restrict block, size_t n, size_t next, uint16_t *restrict out) {
    uint8_t before = (uint8_t)(block[0] - 1);
    const uint8_t *rest = block + HEAD, *planes = rest + n;
    for (size_t first = 0; first < n; first += RUN) {
        const uint8_t *at = planes + first / 8;
        foresee(rest + first, next);
        foresee(planes + 3 * (first / 8), next); /* all three: they follow each other */
        Bytes p = (Bytes)(Words){long_word(at)};
        Bytes q = (Bytes)(Words){long_word(at + n / 8)};
        Bytes r = (Bytes)(Words){long_word(at + n / 4)};
        SIXTEEN(0, 1);
        SIXTEEN(2, 3);
        SIXTEEN(4, 5);
        SIXTEEN(6, 7);
    }
}

/* Gives numbers at `positions` their exponents; 0 if one of them is not there. */
INLINE int patch_x12(const uint8_t *restrict positions, size_t n, size_t slots, uint16_t *restrict out) {
    const uint8_t *exponents = positions + 2 * slots;
    size_t outside = 0;
    for (size_t slot = 0; slot < slots; slot++) {
        size_t position = positions[2 * slot] | (size_t)positions[2 * slot + 1] << 8;
        if (position < n)
            set_exponent(out + position, exponents[slot]);
        else
            outside++;
    }
    return outside == 0;
}

/* Gives numbers of code 7 the exponents that follow the planes, in order; 0 if there are too few. */
INLINE int patch_x11(const uint8_t *restrict planes, size_t n, size_t slots, uint16_t *restrict out) {
    const uint8_t *exponents = planes + 3 * (n / 8), *end = exponents + slots;
    for (size_t first = 0; first < n; first += RUN) {
        const uint8_t *at = planes + first / 8;
        uint64_t listed = long_word(at) & long_word(at + n / 8) & long_word(at + n / 4);
        for (; listed; listed &= listed - 1) {
            if (exponents == end)
                return 0;
            set_exponent(out + first + (size_t)__builtin_ctzll(listed), *exponents++);
        }
    }
    return 1;
}

/* decode_TYPE(blocks, out, count, n, slots): how many of `count` blocks, of any alignment, come before a damaged one. */
EVERY_WIDTH size_t decode_bf16x12(const uint8_t *blocks, uint16_t *out, size_t count, size_t n, size_t slots) {
    size_t nbytes = HEAD + n + n / 2 + 3 * slots;
    for (size_t number = 0; number < count; number++) {
        const uint8_t *block = blocks + number * nbytes;
        numbers_x12(block, n, nbytes, out + number * n);
        if (!patch_x12(block + HEAD + n + n / 2, n, slots, out + number * n))
            return number;
    }
    return count;
}

EVERY_WIDTH size_t decode_bf16x11(const uint8_t *blocks, uint16_t *out, size_t count, size_t n, size_t slots) {
    size_t nbytes = HEAD + n + 3 * (n / 8) + slots;
    for (size_t number = 0; number < count; number++) {
        const uint8_t *block = blocks + number * nbytes;
        numbers_x11(block, n, nbytes, out + number * n);
        if (!patch_x11(block + HEAD + n, n, slots, out + number * n))
            return number;
    }
    return count;
}

/* ------------------------------------------------------------------------------------------------------------ counting */

typedef struct {
    uint8_t base;   /* the lowest window that holds most */
    size_t outside; /* numbers that have no code */
} Window;

INLINE uint8_t exponent_of(uint16_t number) {
    return (uint8_t)(number >> 7);
}

INLINE void count_exponents(const uint16_t *restrict numbers, size_t n, uint32_t *restrict total) {
    uint16_t counts[4][256] = {{0}}; /* four, so that one increment does not wait for the last; each has n / 4 at most */
    for (size_t i = 0; i < n; i += 4) {
        uint64_t four;
        memcpy(&four, numbers + i, sizeof four);
        for (int lane = 0; lane < 4; lane++)
            counts[lane][(uint8_t)(four >> (16 * lane + 7))]++;
    }
    for (int e = 0; e < 256; e++)
        total[e] = (uint32_t)counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
}

INLINE Window window_of(const uint32_t *restrict total, size_t n, int width) {
    size_t wanted = n - total[0], held = 0, most = 0;
    Window best = {1, 0};
    int low = 1, base = 1;
    if (!wanted)
        return best;
    while (!total[low])
        low++;
    if (low > width) /* windows before hold nothing */
        base = low - width + 1;
    if (base + width > 256)
        base = 256 - width;
    for (int e = base; e < base + width; e++)
        held += total[e];
    for (;; base++) {
        if (held > most) {
            most = held;
            best.base = (uint8_t)base;
        }
        if (most == wanted || base + width == 256)
            break;
        held += total[base + width];
        held -= total[base];
    }
    best.outside = wanted - most;
    return best;
}

/* Of `count` blocks of `n` numbers, for each of `kinds` widths: `most` numbers without a code that one of them has, and the
 * window of each block, at `bases`: kind after kind. */
EVERY_WIDTH void count_outside(const uint16_t *numbers, size_t count, size_t n, size_t kinds, const int32_t *widths,
    size_t *most, uint8_t *bases) {
    uint32_t total[256];
    memset(most, 0, kinds * sizeof *most);
    for (size_t number = 0; number < count; number++) {
        count_exponents(numbers + number * n, n, total);
        for (size_t kind = 0; kind < kinds; kind++) {
            Window best = window_of(total, n, widths[kind]);
            most[kind] = best.outside > most[kind] ? best.outside : most[kind];
            bases[kind * count + number] = best.base;
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- encoding */

/* A bit for each of 16 bytes that are all ones or all zeros, the first one lowest. */
INLINE uint64_t bits_of(Bytes flags) {
#ifdef __SSE2__
    return (uint64_t)(unsigned)__builtin_ia32_pmovmskb128((SignedBytes)flags);
#else
    Words ones = (Words)(flags & 1) * 0x0102040810204080u >> 56;
    return ones[0] | ones[1] << 8;
#endif
}

/* Puts signs and mantissas of 16 numbers at `rest`. Returns their codes, `other` for what is outside of the window. */
INLINE Bytes part(const uint16_t *restrict from, Bytes base, uint8_t width, uint8_t other, uint8_t *restrict rest,
    Bytes *restrict outside) {
    Numbers numbers;
    memcpy(&numbers, from, sizeof numbers);
    Bytes exponents = __builtin_convertvector(numbers >> 7 & 0xFF, Bytes);
    Bytes plain = __builtin_convertvector((numbers >> 8 & 0x80) | (numbers & 0x7F), Bytes);
    memcpy(rest, &plain, sizeof plain);
    Bytes codes = exponents - base;
    Bytes inside = (Bytes)(codes < width);
    *outside = ~inside & (Bytes)(exponents != 0);
    return ((codes + 1) & inside) | (*outside & other);
}

typedef struct {
    uint8_t *positions; /* NULL if the format has none */
    uint8_t *exponents;
    size_t used, room;
} Slots;

/* Lists the exponents of those numbers from `first` on whose bits are set; 0 if there is no room. */
INLINE int list(uint64_t bits, const uint16_t *restrict numbers, size_t first, Slots *slots) {
    for (; bits; bits &= bits - 1) {
        size_t position = first + (size_t)__builtin_ctzll(bits);
        if (slots->used == slots->room)
            return 0;
        if (slots->positions) {
            slots->positions[2 * slots->used] = (uint8_t)position;
            slots->positions[2 * slots->used + 1] = (uint8_t)(position >> 8);
        }
        slots->exponents[slots->used++] = exponent_of(numbers[position]);
    }
    return 1;
}

INLINE int put_x12(const uint16_t *restrict numbers, uint8_t *restrict block, size_t n, size_t slots) {
    uint8_t *rest = block + HEAD, *shared = rest + n, *slots_at = shared + n / 2;
    Slots listed = {slots_at, slots_at + 2 * slots, 0, slots};
    memset(slots_at, 0, 2 * slots);
    memset(listed.exponents, exponent_of(numbers[0]), slots);
    Bytes base = block[0] - (Bytes){0}, outside[2];
    for (size_t first = 0; first < n; first += 32) {
        Bytes low = part(numbers + first, base, WINDOW_X12, 0, rest + first, outside);
        Bytes high = part(numbers + first + 16, base, WINDOW_X12, 0, rest + first + 16, outside + 1);
        Bytes pairs = low | high << 4;
        memcpy(shared + first / 2, &pairs, sizeof pairs);
        if (!list(bits_of(outside[0]) | bits_of(outside[1]) << 16, numbers, first, &listed))
            return 0;
    }
    return 1;
}

INLINE int put_x11(const uint16_t *restrict numbers, uint8_t *restrict block, size_t n, size_t slots) {
    uint8_t *rest = block + HEAD, *planes = rest + n;
    Slots listed = {NULL, planes + 3 * (n / 8), 0, slots};
    memset(listed.exponents, 0, slots);
    Bytes base = block[0] - (Bytes){0}, outside;
    for (size_t first = 0; first < n; first += RUN) {
        uint64_t bits[3] = {0};
        for (int part_of = 0; part_of < RUN; part_of += 16) {
            Bytes codes = part(numbers + first + part_of, base, WINDOW_X11, LISTED, rest + first + part_of, &outside);
            for (int plane = 0; plane < 3; plane++)
                bits[plane] |= bits_of((Bytes)((codes & (uint8_t)(1 << plane)) != 0)) << part_of;
        }
        for (size_t plane = 0; plane < 3; plane++)
            put_long_word(planes + plane * (n / 8) + first / 8, bits[plane]);
        if (!list(bits[0] & bits[1] & bits[2], numbers, first, &listed))
            return 0;
    }
    return 1;
}

/* encode_TYPE(numbers, blocks, count, n, slots, bases): all but the checksums; how many of `count` blocks come before one
 * that has more numbers without a code than slots. With the windows that were counted, if `bases` has them. */
#define ENCODER(type, window, code_bytes, put)                                                                    \
    EVERY_WIDTH size_t encode_##type(                                                                             \
        const uint16_t *numbers, uint8_t *blocks, size_t count, size_t n, size_t slots, const uint8_t *bases) {   \
        size_t nbytes = HEAD + n + (code_bytes);                                                                  \
        uint32_t total[256];                                                                                      \
        for (size_t number = 0; number < count; number++) {                                                       \
            uint8_t *block = blocks + number * nbytes;                                                            \
            memset(block, 0, HEAD);                                                                               \
            if (!bases)                                                                                           \
                count_exponents(numbers + number * n, n, total);                                                  \
            block[0] = bases ? bases[number] : window_of(total, n, window).base;                                  \
            if (!put(numbers + number * n, block, n, slots))                                                      \
                return number;                                                                                    \
        }                                                                                                         \
        return count;                                                                                             \
    }

ENCODER(bf16x12, WINDOW_X12, n / 2 + 3 * slots, put_x12)
ENCODER(bf16x11, WINDOW_X11, 3 * (n / 8) + slots, put_x11)
