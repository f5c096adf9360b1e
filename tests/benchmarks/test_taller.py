"""A model of more layers than there is disk for is an ordinary checkpoint."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from airstream import AutoModel, repack
from benchmarks import taller
from benchmarks.checkpoints import Shape, write_checkpoint


@pytest.mark.skipif(sys.platform != "linux", reason="links between files as Linux has them")
@pytest.mark.parametrize("codec", [None, "int4"])
def test_a_taller_model_has_the_layers_of_a_smaller_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str | None
) -> None:
    """By links between files, which not every file system has: here they are copies, of whole blocks that lie alike."""

    def copy(descriptor: int, request: int, asked: bytes) -> None:
        source, offset, nbytes, target = struct.unpack("qQQQ", asked)
        assert request == taller.CLONE_RANGE
        assert not offset % 4096
        assert not nbytes % 4096
        assert not target % 4096
        os.pwrite(descriptor, os.pread(source, nbytes, offset), target)

    monkeypatch.setattr(taller.fcntl, "ioctl", copy)
    write_checkpoint(tmp_path / "given", Shape(256, 512, 2, 1000, 8, 2))
    repack(tmp_path / "given", tmp_path / "small", codec=codec, progress=False)
    taller.write_taller(tmp_path / "small", tmp_path / "tall", 5)
    ids = torch.arange(5, 12)[None]
    with AutoModel.from_pretrained(tmp_path / "tall", progress=False) as model:
        streamed = model(ids).logits
        layers = model.model.layers
        assert len(layers) == 5
    if codec is None:
        resident = AutoModelForCausalLM.from_pretrained(tmp_path / "tall", dtype="auto")
        assert torch.equal(streamed, resident(ids).logits)
