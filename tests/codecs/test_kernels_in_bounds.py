"""No kernel reads or writes beside its memory, whatever the bytes: watched by the address sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import airstream

KERNELS = Path(airstream.__file__).parent / "codecs"
SOURCES = ("blocks.c", "checksums.c", "lossless.c", "products.c", "team.c")
SANITIZED = ("cc", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, in one copy each: a loader picks among several before there is a sanitizer."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    if subprocess.run([*SANITIZED, "empty.c", "-o", "empty"], cwd=folder, capture_output=True).returncode:
        pytest.skip("the C compiler has no sanitizers")
    sources = [KERNELS / source for source in SOURCES]
    subprocess.run([*SANITIZED, "-w", "-DEVERY_WIDTH=", "-c", *sources], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", ["kernels", "products"])
def test_any_bytes_stay_within_bounds(folder: Path, name: str) -> None:
    """What feeds them counts hostile blocks that they have met."""
    source, program = Path(__file__).with_name(f"fuzz_{name}.c"), folder / name
    objects = [Path(kernel).with_suffix(".o") for kernel in SOURCES]
    subprocess.run([*SANITIZED, "-w", source, *objects, "-o", program], cwd=folder, check=True)
    done = subprocess.run([program, "1500"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 100
