"""This folder says which bytes of a checkpoint become which tensor, and where tensors lie in memory.

It knows files' headers and transformers' converters. It reads no weight and allocates nothing; it refuses to know
budgets. Read `tensors`, `pieces` and `byte_plan` (bytes of one tensor), then `tracing`, `row_numbers`, `moves` and
`expansion` (what converters do), then `parts` (layers, lm_head, tables), and `slab` and `ring` (places in memory).
"""
