"""This finds the numbers of nf4 as bitsandbytes does on a CPU, which looks for each of them by itself: sooner.

It counts bounds below a number, for many numbers at once. It is used where it gives the bits that the bitsandbytes that
is installed gives, for numbers of all sizes; that is tried once. It refuses to know where numbers come from.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["nf4_numbers"]

NF4_BLOCK = 64
"""Numbers that share a scale: as `four_bit` says, which knows modules besides."""

LEAST_SCALE = 1e-38
"""What bitsandbytes divides by at least: a block may be zeros."""


def nf4_numbers(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`numbers`, packed, two in a byte, and a scale for each block; None if bitsandbytes has to be asked."""
    if numbers.device.type != "cpu" or numbers.numel() % NF4_BLOCK or not numbers.numel() or not _is_as_bitsandbytes():
        return None
    packed, scales = _packed(numbers)
    return None if scales.isnan().any() else (packed, scales)  # whose bits are another one's choice


@cache
def _bounds() -> list[float]:
    """Halfway between neighbours: a number at a bound becomes the lower one."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type("nf4", device="cpu")
    return [float(bound) for bound in (values[:-1] + values[1:]) / 2]


def _packed(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = numbers.reshape(-1, NF4_BLOCK).float()
    scales = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / scales.clamp(min=LEAST_SCALE)).unsqueeze(1)).clamp_(-1, 1).reshape(-1)
    places = torch.full(scaled.shape, len(_bounds()), dtype=torch.uint8, device="cpu")
    for bound in _bounds():  # what is no number is at none of them, and comes last, as bitsandbytes has it
        places -= (scaled <= bound).view(torch.uint8)
    return (places[::2] << 4 | places[1::2]).unsqueeze(1), scales


@cache
def _is_as_bitsandbytes() -> bool:
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator("cpu").manual_seed(0)
    some = torch.randn((32, 4 * NF4_BLOCK), dtype=torch.float32, generator=generator, device="cpu")
    some *= torch.logspace(-44, 38, len(some), dtype=torch.float32, device="cpu").unsqueeze(1)
    some[3] = 0
    some[4, ::7] = torch.nan
    some[5, ::300] = torch.inf
    some[6:20, 1::NF4_BLOCK] = 1.0  # then numbers are what they are divided by their scale, and at bounds
    some[6:20, 2 : 2 + len(_bounds())] = torch.tensor(_bounds(), dtype=torch.float32, device="cpu")
    some[6:20] = some[6:20].clamp(-1, 1)
    for each in (some, some.bfloat16(), some.half()):
        packed, state = quantize_4bit(each, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
        ours, scales = _packed(each)
        if ours.shape != packed.shape or not torch.equal(ours, packed):
            return False
        if scales.shape != state.absmax.shape or not torch.equal(_bits(scales), _bits(state.absmax)):
            return False
    return True


def _bits(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().nan_to_num(nan=-1.0)
