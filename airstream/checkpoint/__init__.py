"""This folder finds a checkpoint and says which tensor lies where in its files.

It knows the formats (safetensors, GGUF, what `torch.save` pickles), the hub, and the small files beside weights. It
believes nothing that a file claims before that has been checked. It reads no weight, but for those that `pickles` has
to copy before they can be streamed. It refuses to know models and devices. Read `stored` first: it has `StoredTensor`
and `CheckpointIndex`. Then `safetensors`, `formats` and `hub`; `gguf` and `pickles` are the other formats; the files
named `*_file` check what is beside weights.
"""
