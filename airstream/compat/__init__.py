"""This folder is the only one that touches semi-private functions of transformers: a new release is its work alone.

It wraps building a model without weights, the renames and conversions that transformers 5 applies to checkpoint keys,
the dtype each parameter must have, and what `from_pretrained` does after the last weight has been loaded. The same
calls work from 5.17 on; the test matrix runs the oldest and the newest supported release. It refuses to know plans,
memory and threads. Read `building`, `classes` and `weights` first, then `quantizers` and `gguf`, then `traits`; the
others are details of these.
"""
