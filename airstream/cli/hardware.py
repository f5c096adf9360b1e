"""`airstream hardware [PATH]`: what this machine can do, measured once and then remembered."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from airstream.codecs.block_types import BLOCK_TYPES
from airstream.codecs.lossless_blocks import LOSSLESS, lossless_block
from airstream.loading.options import resolve_device
from airstream.rates import saved as store
from airstream.rates.facts import HardwareFacts
from airstream.system.importing import quiet_imports

TYPICAL_BLOCKS = {
    **{name: lossless_block(name, 4096, codec.nbytes(4096, 128)) for name, codec in LOSSLESS.items()},
    **{name: BLOCK_TYPES[name] for name in ("Q8_0", "Q4_K", "MXFP4")},
}
"""Types of packed weights, by name, of the size that they have in large models."""

AGAIN = "--refresh, when the machine is idle, measures again"


def run(arguments: argparse.Namespace) -> None:
    """Print the rates and where each comes from; measure them first if nobody has, or if asked to."""
    folder, device = Path(arguments.path), resolve_device(arguments.device)
    facts = None if arguments.refresh else store.stored(folder, device)
    where = f"kept in {store.store_file()}; {AGAIN}"
    if facts is None:
        facts = _measure(folder, device)
        where = _save(folder, device, facts)
    if arguments.json:
        print(facts.to_json())
    else:
        print(facts)
        print(_decoding())
        print(where)


def _measure(folder: Path, device: torch.device) -> HardwareFacts:
    with quiet_imports():  # it brings transformers, which showing what is stored can do without
        from airstream.rates.measure import measure

    return measure(folder, device, progress=lambda what: print(f"measuring {what} ...", file=sys.stderr))


def _decoding() -> str:
    """How fast packed weights become numbers: measured each time, in milliseconds."""
    from airstream.codecs.rates import decoding_seconds

    rates = (f"{name} {2 / decoding_seconds(block) / 1e9:.1f}" for name, block in TYPICAL_BLOCKS.items())
    return f"  {'unpacking, each core':<27s}{', '.join(rates)} GB/s of bfloat16"


def _save(folder: Path, device: torch.device, facts: HardwareFacts) -> str:
    """Keep the facts if that is possible; what has been measured is shown either way."""
    try:
        return f"kept in {store.save(folder, device, facts)}; {AGAIN}"
    except OSError as error:
        return f"not kept: {store.store_file()} cannot be written ({error.strerror})"
