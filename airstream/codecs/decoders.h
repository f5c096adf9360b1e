/* What decodes blocks, for those who are handed its address. */

#ifndef AIRSTREAM_DECODERS_H
#define AIRSTREAM_DECODERS_H

#include <stddef.h>
#include <stdint.h>

/* decode_TYPE of blocks.c and of lossless.c. */
typedef void DecodeBlocks(const uint8_t *blocks, void *out, size_t count, int to_bfloat16, const void *grid);
typedef size_t DecodeLossless(const uint8_t *blocks, uint16_t *out, size_t count, size_t n, size_t slots);

#endif
