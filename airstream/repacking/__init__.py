"""This folder rewrites a checkpoint so that each layer is one run of bytes.

It knows bytes and the order of a model's tensors. It changes no value, and refuses to touch the original. Read `plan`
(what goes where), `write` and `manifest`, then `repack`, which composes them.
"""
