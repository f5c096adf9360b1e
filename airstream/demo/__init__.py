"""This folder has a small real model to try airstream on.

It knows where the model comes from and how it is unpacked. It refuses to know how a model is streamed. Read `model`,
then `unpack`, then `check`, which asks transformers for the right answer.
"""
