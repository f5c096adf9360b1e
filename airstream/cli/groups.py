"""These are the arguments that several commands share: of the machine, of loading, of the source, of generation."""

from __future__ import annotations

import argparse
from typing import Any

from airstream.cli import values
from airstream.cli.values import number

COUNT = number(int, at_least=1)

MAX_SEED = (1 << 63) - 1
SCALE = number(float, at_least=1e-6, at_most=1_000_000)
"""What logits can be divided by, and multiplied with: they stay numbers in float32."""

TEMPERATURE = number(float, at_least=1e-6, at_most=1_000_000, or_zero=True)

DEVICE = "device that computes (default: the accelerator if there is one, else cpu)"


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Which machine a plan is for."""
    group = parser.add_argument_group("another machine (what is not given is as here)")
    group.add_argument("--gpu", metavar="CARD", help='"RTX 3090", which need not be here; "3090,4090" with --table')
    group.add_argument(
        "--ram", type=values.size, metavar="SIZE", help="all memory of the host: 64GiB, of which 90%% is used"
    )
    group.add_argument(
        "--disk-gbps", type=number(float, above=0), metavar="GB/S", help="of the disk that the checkpoint lies on"
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """What `AutoModel.from_pretrained` takes."""
    group = parser.add_argument_group("loading (as in AutoModel.from_pretrained)")
    group.add_argument(
        "--max-memory",
        action="append",
        type=values.memory,
        metavar="SIZE",
        help="4GiB, or 0=4GiB cpu=8GiB; default: most of it",
    )
    group.add_argument("--device", type=values.device, help=DEVICE)
    group.add_argument("--dtype", type=values.dtype, help='of the weights (default: "auto", the checkpoint\'s own)')
    group.add_argument(
        "--max-context", "--context", type=COUNT, metavar="TOKENS", help="tokens per sequence to plan for"
    )
    group.add_argument(
        "--max-batch-size", "--batch", type=COUNT, metavar="N", help="sequences to plan for (default: 1)"
    )
    group.add_argument(
        "--layers-per-batch", type=number(int, at_least=1, word="auto"), metavar="N", help="layers moved as one unit"
    )
    group.add_argument(
        "--prefetch-batches",
        type=number(int, at_least=0, word="auto"),
        metavar="N",
        help="layer batches read ahead; 0: none",
    )
    group.add_argument(
        "--page-cache", action=argparse.BooleanOptionalAction, help="read through the page cache (default: if it fits)"
    )
    group.add_argument("--attn-implementation", help="as in transformers")
    group.add_argument(
        "--compression", "--codec", type=values.codec, metavar="CODEC", help="repack so, into the cache folder, once"
    )
    group.add_argument(
        "--kernels", choices=("exact", "fast"), help="fast: multiply packed weights as they are, rounding otherwise"
    )
    add_source(group)


def add_source(group: Any) -> None:
    """Where a checkpoint comes from."""
    group.add_argument("--gguf-file", metavar="FILE", help="the GGUF file to use, of a folder or hub repository")
    group.add_argument("--subfolder", metavar="FOLDER", help="of the folder or repository, where the checkpoint lies")
    group.add_argument("--variant", help="of the weights: fp16 names model.fp16.safetensors")
    group.add_argument("--revision", help="of the hub repository")
    group.add_argument("--token", help="of the hub")
    group.add_argument("--cache-dir", help="of the hub")
    group.add_argument("--local-files-only", action="store_true", default=None, help="do not use the network")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code from the checkpoint")


def add_generation(parser: argparse.ArgumentParser, default: str) -> None:
    """How many tokens come, and which; `default` says what is done unless asked otherwise."""
    group = parser.add_argument_group("generation", f"By default: {default}.")
    group.add_argument("--max-new-tokens", type=COUNT, default=256, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--prefill-chunk-size", type=COUNT, metavar="TOKENS", help="read the prompt in pieces, which takes less memory"
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--greedy", action="store_true", help="take the most likely token")
    choice.add_argument("--sample", action="store_true", help="sample as the checkpoint says")
    group.add_argument("--temperature", type=TEMPERATURE, metavar="T", help="sample; 0 takes the most likely token")
    group.add_argument(
        "--top-p", type=number(float, above=0, at_most=1), metavar="P", help="sample the most likely that make up P"
    )
    group.add_argument("--top-k", type=number(int, at_least=0), metavar="K", help="sample the K most likely; 0: all")
    group.add_argument(
        "--min-p",
        type=number(float, at_least=0, at_most=1),
        metavar="P",
        help="those at least P times the likeliest",
    )
    group.add_argument("--repetition-penalty", type=SCALE, metavar="R", help="above 1: what was there is less likely")
    group.add_argument(
        "--stop", action="append", type=values.text, metavar="TEXT", help="end before this text; or one of several"
    )
    group.add_argument("--seed", type=number(int, at_least=0, at_most=MAX_SEED), metavar="N", help="of sampling")
