"""Rewriting a checkpoint so that each layer is one run of bytes: what goes where, writing it, and proof of it."""
