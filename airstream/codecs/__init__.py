"""Packed weights: what a block of a type is, and how blocks become numbers. `BLOCK_TYPES` has every type by name.

Knows bytes and tensors, on any device. Refuses to know files, models, or who needs the numbers when.
"""
