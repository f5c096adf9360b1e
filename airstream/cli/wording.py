"""This puts errors in the words of the command line: what Python calls an argument is an option there.

It knows how messages write arguments. It refuses to know which error it is.
"""

from __future__ import annotations

import re

OPTIONS = (
    "max_memory", "max_context", "max_batch_size", "layers_per_batch", "prefetch_batches", "page_cache", "dtype",
    "device", "attn_implementation", "gguf_file", "subfolder", "variant", "revision", "token", "cache_dir",
    "local_files_only", "trust_remote_code", "prompt_tokens", "shard_size", "layers", "gpu", "ram", "disk_gbps",
    "compression", "codec", "kernels",
    "prefill_chunk_size", "max_new_tokens",
)  # fmt: skip
"""Arguments that are options of some command under the same name, with hyphens."""

FLAGS = ("local_files_only", "trust_remote_code")
"""Options that take no value."""

ARGUMENT = re.compile(
    rf"(?<![\w/.-])(?P<open>[\"'])?(?P<name>{'|'.join(OPTIONS)})=(?P<value>\{{[^{{}}]*\}}|\"[^\"]*\"|'[^']*'|\.\.\.|[\w.-]*\w)?(?(open)(?P=open))"
)
BARE = re.compile(rf"(?<![\w/.-])(?P<name>{'|'.join(name for name in OPTIONS if '_' in name)})(?![\w=/]|\.\w)")
CALL = re.compile(r"(?:from_pretrained|generate)\(\.\.\., ([^()]*)\)")
SIZES = re.compile(r"[\"']?(?P<memory>[\w:]+)[\"']?: *(?P<size>\"[^\"]*\"|'[^']*'|\.\.\.|\d+)")


def as_options(message: str) -> str:
    """`message` with `max_memory={"cpu": "192MiB"}` as `--max-memory 192MiB`, and all others alike."""
    message = ARGUMENT.sub(_written, CALL.sub(r"\1", message))
    return BARE.sub(lambda found: _option(found["name"]), message)


def _written(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    option = _option(name)
    if value is None or (name in FLAGS and value == "True"):
        return option
    if name == "page_cache" and value in ("True", "False"):
        return option if value == "True" else "--no-page-cache"
    return f"{option} {_sizes(value) if value.startswith('{') else _bare(value)}"


def _sizes(value: str) -> str:
    """`{0: "4GiB", "cpu": "8GiB"}` as `0=4GiB cpu=8GiB`; a size alone is that of the device that computes."""
    sizes = {size["memory"]: _bare(size["size"]) for size in SIZES.finditer(value)}
    if len(sizes) == 1 and "..." not in sizes.values():
        return next(iter(sizes.values()))
    return " ".join(f"{memory}={size}" for memory, size in sizes.items())


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _bare(text: str) -> str:
    """Without its quotes, unless there is a blank in it."""
    inside = text.strip("\"'")
    return inside if inside and not re.search(r"\s", inside) else text
