"""No kernel reads or writes beside its memory, whatever the bytes: watched by the address sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import airstream

KERNELS = Path(airstream.__file__).parent / "codecs"
FUZZ = Path(__file__).with_name("fuzz_kernels.c")
SANITIZED = ("cc", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and what feeds them, in one copy each: a loader picks among several before there is a sanitizer."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    if subprocess.run([*SANITIZED, folder / "empty.c", "-o", folder / "empty"], capture_output=True).returncode:
        pytest.skip("the C compiler has no sanitizers")
    sources = [FUZZ, KERNELS / "blocks.c", KERNELS / "lossless.c"]
    subprocess.run([*SANITIZED, "-w", "-DEVERY_WIDTH=", *sources, "-o", folder / "program"], check=True)
    return folder / "program"


def test_any_bytes_stay_within_bounds(program: Path) -> None:
    done = subprocess.run([program, "1500"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100  # else hostile blocks were never met
