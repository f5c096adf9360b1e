"""Files and folders that may not be read: one error, with the path and what changes that. Root may read everything, so
the system's refusals are stand-ins.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import AirstreamError, AutoModel, CheckpointError, repack, verify
from tests.conftest import WriteTiny, stream

Deny = Callable[[Path, str], None]


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Deny:
    """`deny(path, "open")`: opening it is refused; "list": listing it; "enter": whatever is in it."""

    def refuse(path: Path, what: str) -> None:
        functions = {"open": ("open",), "list": ("scandir", "listdir"), "enter": ("stat", "open")}[what]
        for function in functions:
            monkeypatch.setattr(os, function, refusing(getattr(os, function), path, what == "enter"))

    return refuse


def refusing(real: Callable[..., Any], path: Path, inside: bool) -> Callable[..., Any]:
    def call(name: Any = ".", *args: Any, **kwargs: Any) -> Any:
        given = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
        if given.startswith(f"{path}/") if inside else given == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), given)
        return real(name, *args, **kwargs)

    return call


@pytest.fixture
def folder(tiny: WriteTiny, tmp_path: Path) -> Path:
    shutil.copytree(tiny("llama-sharded", torch.float32), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("x")
    return tmp_path / "m"


def use(folder: Path) -> None:
    with stream(folder) as model:
        model.tokenizer  # noqa: B018 - it is read when somebody asks


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00002-of-00008.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read(folder: Path, deny: Deny, name: str) -> None:
    deny(folder / name, "open")
    with pytest.raises(CheckpointError, match=rf"{name}' cannot be read: Permission denied\. chmod -R u\+rX .*{name}"):
        use(folder)
    assert any(f"{name}' cannot be read: Permission denied" in fault for fault in verify(folder, progress=False).faults)


DOORS: dict[str, Callable[[Path], Any]] = {
    "load": use,
    "plan": lambda folder: AutoModel.plan(folder, device="cpu"),
    "verify": lambda folder: verify(folder, progress=False),
    "repack": lambda folder: repack(folder, folder.parent / "out", progress=False),
}


@pytest.mark.parametrize("what", ["list", "enter"])
@pytest.mark.parametrize("door", DOORS)
def test_a_folder_that_may_not_be_read(folder: Path, deny: Deny, door: str, what: str) -> None:
    deny(folder, what)
    with pytest.raises(AirstreamError, match=rf"{folder}.*cannot be read: Permission denied\. chmod -R u\+rX {folder}"):
        DOORS[door](folder)
    assert not (folder.parent / "out").exists()
