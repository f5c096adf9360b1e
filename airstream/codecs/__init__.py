"""This folder says what a block of packed weights is, and turns blocks into numbers.

It knows bytes and tensors, on any device. It refuses to know files, models, or who needs the numbers when. Read
`block_types` first, which has every type by name, and `decode`, where `decode_into` decodes. Then `words` and `simple`,
`super_blocks` and `grids`, which take blocks apart, and `native`, which calls the compiled kernels of `library`.

Of blocks that give every bit of a bfloat16 back `lossless_blocks` has the sizes. `lossless` decodes and proves them,
`lossless_pack` makes them, and `lossless_native` has their kernels.
"""
