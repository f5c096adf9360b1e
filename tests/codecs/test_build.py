"""The kernel compiles without a word: whoever installs airstream sees what the compiler says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from airstream import codecs

COMPILER = shutil.which("gcc") or shutil.which("clang")


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler that has -Wall")
def test_the_compiler_has_nothing_to_say() -> None:
    source = Path(str(codecs.__file__)).with_name("blocks.c")
    command = [str(COMPILER), "-Wall", "-fsyntax-only", str(source)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
