"""Products with weights as they are stored are those of their numbers in float64, as close as float32 comes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from airstream.codecs import products, team
from airstream.codecs.block_types import BLOCK_TYPES, GRID_TYPES, BlockType
from airstream.codecs.decode import decode_with_torch
from airstream.codecs.lossless_pack import choose_block, encode
from airstream.codecs.products import FEW, RowFormat, StoredRows, format_of_blocks, make_dense, multiply
from airstream.compat.packed_linear import NF4_LEVELS
from airstream.errors import CheckpointError
from tests.stand_ins.tiny_gguf import random_blocks

Weight = tuple[StoredRows, torch.Tensor]
"""A weight as it is stored, and its numbers in float32."""

TORCH_THREADS = team.torch_threads

ROWS = 37
"""Neither a multiple of threads nor of vectors."""


@pytest.fixture(autouse=True, params=["threads of torch", "threads of its own"])
def several_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights are shared, too, by either kind of threads."""
    monkeypatch.setattr(team, "MIN_SHARE", 1)
    if request.param == "threads of its own":
        monkeypatch.setattr(team, "torch_threads", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def of_blocks(name: str) -> Weight:
    block, columns = BLOCK_TYPES[name], 512
    raw = torch.from_numpy(random_blocks(name, (ROWS, columns // block.elements * block.nbytes))).contiguous()
    numbers = torch.empty(ROWS * columns)
    decode_with_torch(numbers, raw.view(-1), block)
    how = format_of_blocks(block, columns)
    assert how is not None
    return StoredRows(how, ROWS, raw), numbers.view(ROWS, columns)


def of_lossless(name: str) -> Weight:
    numbers = (torch.randn(ROWS, 192) * 0.02).to(torch.bfloat16)
    numbers[3, 5], numbers[7, 100] = 1e30, -1e-30  # outside of any window
    block = choose_block(numbers.view(-1), 192, (name,))
    assert block is not None
    how = format_of_blocks(block, 192)
    assert how is not None
    return StoredRows(how, ROWS, encode(numbers.view(-1), block)), numbers.float()


def of_bf16(columns: int) -> Weight:
    numbers = torch.randn(ROWS, columns).to(torch.bfloat16)
    return StoredRows(RowFormat("bf16", columns, 2 * columns), ROWS, numbers), numbers.float()


def of_int8(dtype: torch.dtype) -> Weight:
    numbers = torch.randint(-128, 128, (ROWS, 96), dtype=torch.int8)
    scales = torch.rand(ROWS).to(dtype)
    return StoredRows(RowFormat("int8", 96, 96, 96), ROWS, numbers, scales), numbers.float() * scales.float()[:, None]


def of_int4(dtype: torch.dtype) -> Weight:
    numbers = torch.randint(0, 16, (ROWS, 256), dtype=torch.uint8)
    scales = torch.rand(ROWS, 256 // 64).to(dtype)
    packed = numbers[:, ::2] | numbers[:, 1::2] << 4
    exact = (numbers.float() - 8).view(ROWS, -1, 64) * scales.float()[:, :, None]
    return StoredRows(RowFormat("int4", 256, 128, 64), ROWS, packed, scales), exact.view(ROWS, 256)


def of_nf4() -> Weight:
    numbers = torch.randint(0, 16, (ROWS, 192), dtype=torch.uint8)
    scales = torch.rand(ROWS, 3)
    packed = numbers[:, ::2] << 4 | numbers[:, 1::2]
    exact = NF4_LEVELS[numbers.int()].view(ROWS, 3, 64) * scales[:, :, None]
    return StoredRows(RowFormat("nf4", 192, 96, 64), ROWS, packed, scales, NF4_LEVELS), exact.view(ROWS, 192)


def of_fp8() -> Weight:
    finite = torch.tensor([byte for byte in range(256) if byte & 127 != 127], dtype=torch.uint8)
    numbers = finite.repeat(2 * ROWS)[: ROWS * 256].view(ROWS, 256)
    scales = torch.rand(2, 8)
    exact = numbers.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(32, 0)[:ROWS].repeat_interleave(32, 1)
    return StoredRows(RowFormat("fp8", 256, 256, 32), ROWS, numbers, scales), exact


WEIGHTS: dict[str, Callable[[], Weight]] = {
    **{name: lambda name=name: of_blocks(name) for name in BLOCK_TYPES if not name.startswith((*GRID_TYPES, "TQ"))},
    **{name: lambda name=name: of_lossless(name) for name in ("bf16x12", "bf16x11")},
    **{f"bf16-{columns}": lambda columns=columns: of_bf16(columns) for columns in (1, 31, 64, 333)},
    **{f"int8-{dtype}": lambda dtype=dtype: of_int8(dtype) for dtype in (torch.float32, torch.bfloat16)},
    **{f"int4-{dtype}": lambda dtype=dtype: of_int4(dtype) for dtype in (torch.float32, torch.bfloat16)},
    "nf4": of_nf4,
    "fp8": of_fp8,
}
BY_WEIGHT = pytest.mark.parametrize("kind", WEIGHTS)


@BY_WEIGHT
def test_rows_are_made_dense_to_the_bit(kind: str) -> None:
    weight, numbers = WEIGHTS[kind]()
    for dtype in (torch.float32, torch.bfloat16):
        for first in (0, 5):
            out = torch.full((ROWS - first - 1, numbers.shape[1]), -7.0, dtype=dtype)
            make_dense(weight, first, out)
            assert torch.equal(out, numbers[first:-1].to(dtype))


def at_the_end(weight: StoredRows, dtype: torch.dtype, beyond: int) -> tuple[StoredRows, torch.Tensor]:
    """`weight`, whose rows lie in the memory of what they are to become, or reach beyond it, and that."""
    nbytes = weight.rows * weight.format.columns * dtype.itemsize
    stored = weight.numbers.view(torch.uint8).view(-1)
    memory = torch.empty(nbytes + beyond, dtype=torch.uint8)
    there = memory[nbytes + beyond - stored.numel() :].copy_(stored)
    return replace(weight, numbers=there), memory[:nbytes].view(dtype).view(weight.rows, -1)


@BY_WEIGHT
@pytest.mark.parametrize("beyond", [0, 64, 4032])
def test_rows_are_made_dense_where_they_lie(kind: str, beyond: int) -> None:
    weight, numbers = WEIGHTS[kind]()
    for dtype in (torch.float32, torch.bfloat16):
        there, out = at_the_end(weight, dtype, beyond)
        make_dense(there, 0, out)
        assert torch.equal(out, numbers.to(dtype))


def test_many_rows_are_made_dense_where_they_lie() -> None:
    numbers = torch.randint(-128, 128, (3000, 512), dtype=torch.int8)
    scales = torch.rand(3000)
    there, out = at_the_end(StoredRows(RowFormat("int8", 512, 512, 512), 3000, numbers, scales), torch.bfloat16, 0)
    make_dense(there, 0, out)
    assert torch.equal(out, (numbers.float() * scales[:, None]).bfloat16())


def test_rows_that_would_be_written_over_are_refused() -> None:
    weight, numbers = of_fp8()
    memory = torch.empty(numbers.numel() * 2, dtype=torch.uint8)
    before = replace(weight, numbers=memory[: numbers.numel()])
    with pytest.raises(ValueError, match="before the numbers in whose place they are"):
        make_dense(before, 0, memory.view(torch.bfloat16).view(numbers.shape))


@BY_WEIGHT
@pytest.mark.parametrize("count", [1, 3, FEW, FEW + 1, 40])
def test_products_are_those_of_the_numbers(kind: str, count: int) -> None:
    weight, numbers = WEIGHTS[kind]()
    vectors = torch.randn(count, numbers.shape[1])
    exact = vectors.double() @ numbers.double().t()
    room = 1e-6 * (vectors.double().abs() @ numbers.double().abs().t()) + 1e-30
    assert ((multiply(weight, vectors).double() - exact).abs() <= room).all()


@pytest.mark.parametrize("count", [1, FEW + 8])
def test_they_are_at_least_as_close_as_torchs_own(count: int) -> None:
    weight, numbers = of_bf16(333)
    vectors = torch.randn(count, 333).to(torch.bfloat16)
    exact = vectors.double() @ numbers.double().t()
    own = torch.nn.functional.linear(vectors, numbers.to(torch.bfloat16))
    mine = multiply(weight, vectors).to(torch.bfloat16)
    assert (mine.double() - exact).abs().mean() <= 1.01 * (own.double() - exact).abs().mean()


@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 40])
def test_a_bias_is_added_before_rounding(count: int) -> None:
    """Added to what is rounded already, it would be rounded twice: 1.4 times the error."""
    weight, numbers = of_bf16(320)
    bias = torch.randn(len(numbers), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) * 8
    vectors = torch.randn(count, 320, generator=torch.Generator().manual_seed(count)).to(torch.bfloat16)
    truth = vectors.double() @ numbers.double().t() + bias.double()
    found = multiply(weight, vectors, bias)
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).abs().mean() <= 1.02 * (truth.to(torch.bfloat16).double() - truth).abs().mean()


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    weight, _ = of_bf16(333)
    vectors, out = torch.randn(2, 333), torch.empty(2, ROWS, 333)
    torch.set_num_threads(1)
    alone = multiply(weight, vectors)
    make_dense(weight, 0, out[0])
    torch.set_num_threads(threads)
    assert torch.equal(multiply(weight, vectors), alone)
    make_dense(weight, 0, out[1])
    assert torch.equal(out[0], out[1])


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP on Linux")
def test_torch_has_threads_to_compute_with() -> None:
    assert TORCH_THREADS() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of the process by /proc")
def test_no_thread_stays_behind_that_torch_has_not() -> None:
    weight, _ = of_bf16(333)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # which starts torch's
    multiply(weight, torch.ones(1, 333))
    before = set(Path("/proc/self/task").iterdir())
    for _ in range(20):
        multiply(weight, torch.ones(1, 333))
    assert set(Path("/proc/self/task").iterdir()) <= before


def test_fp8_that_is_no_number_stays_so() -> None:
    numbers = torch.full((1, 32), 0x7F, dtype=torch.uint8)
    numbers[0, 1] = 0xFF
    out = torch.empty(1, 32)
    make_dense(StoredRows(RowFormat("fp8", 32, 32, 32), 1, numbers, torch.ones(1, 1)), 0, out)
    assert out.isnan().all()


def test_a_damaged_block_is_told() -> None:
    weight, _ = of_lossless("bf16x12")
    raw = weight.numbers.clone()
    block = weight.format.block
    assert block is not None
    slots = block.nbytes - 8 - block.elements - block.elements // 2
    assert slots
    raw.view(-1, block.nbytes)[[30, 33, 36], -slots:] = 255  # of a number that is not there
    damaged = StoredRows(weight.format, ROWS, raw)
    for _ in range(20):  # whoever comes first
        with pytest.raises(CheckpointError, match=r"row 30 .* is damaged"):
            multiply(damaged, torch.ones(1, 192))
    with pytest.raises(CheckpointError, match=r"row 33 .* is damaged"):
        make_dense(damaged, 31, torch.empty(5, 192))


def test_sizes_that_do_not_go_together_are_told() -> None:
    weight, _ = of_bf16(64)
    with pytest.raises(ValueError, match="rows"):
        multiply(StoredRows(weight.format, ROWS + 1, weight.numbers), torch.ones(1, 64))


def test_groups_that_kernels_do_not_take_are_told() -> None:
    for columns, group in ((48, 24), (96, 64)):
        with pytest.raises(ValueError, match="no multiples of 32"):
            multiply(
                StoredRows(RowFormat("int8", columns, columns, group), 1, torch.zeros(columns, dtype=torch.uint8)),
                torch.ones(1, columns),
            )


def test_what_has_no_kernel_is_not_multiplied() -> None:
    assert format_of_blocks(BLOCK_TYPES["IQ2_S"], 512) is None  # looks numbers up in a table of another package
    assert format_of_blocks(BLOCK_TYPES["Q4_K"], 128) is None  # half a block
    assert format_of_blocks(BlockType("no such type", 32, 18), 32) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork of a process with threads
def test_a_fork_does_not_wait_for_threads_of_the_parent() -> None:
    weight, _ = of_bf16(333)
    vectors = torch.randn(1, 333)
    before = multiply(weight, vectors)
    if (pid := os.fork()) == 0:
        os._exit(0 if torch.equal(multiply(weight, vectors), before) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_the_dtype_of_panels_is_one_that_kernels_write() -> None:
    assert products.panel_dtype(torch.float16) == torch.float32
    assert products.panel_dtype(torch.bfloat16) in (torch.float32, torch.bfloat16)
