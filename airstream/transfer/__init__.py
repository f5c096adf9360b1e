"""This folder moves bytes: from files, by reader threads, into the memory of one device.

It knows files, threads, alignment and streams. It refuses to know what the bytes mean, and in which order they are
needed. Read `files`, `piece`, `jobs` and `reader` (a read), then `packing`, `buffers` and `host_memory` (memory), then
`base` (what a device is asked for), `cpu` and `landing`, then `accelerator` with `pinning`, `runtime` and
`torch_runtime`, and at last `machinery`, which holds all of it, and `opening`.
"""
