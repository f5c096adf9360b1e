"""The only package that touches semi-private functions of transformers, so that a new release is one folder's work.

What it wraps: building a model without weights, the renames and conversions that transformers 5 applies to checkpoint
keys, the dtype each parameter must have, and what `from_pretrained` does after the last weight has been loaded. The
same calls work from 5.17 on; the test matrix runs the oldest and the newest supported release.
"""
