"""compressed-tensors checkpoints whose formats are named by their groups, or by nobody, and whose groups differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from airstream.compat.plain_formats import is_plain_int4
from tests.conftest import stream
from tests.stand_ins.comparing import assert_equal
from tests.stand_ins.quantized_models import compressed_weights, write_compressed_groups

pytest.importorskip("compressed_tensors")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the packages of formats
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

OTHERS = "re:.*(q|k|v|o|gate|up)_proj"
FORMATS: Mapping[str, tuple[str | None, str | None]] = {
    "of the groups": (None, "pack-quantized"),
    "of the groups, and dense": ("dense", "pack-quantized"),
    "of the groups, and mixed": ("mixed-precision", "pack-quantized"),
    "none": (None, None),
    "mixed alone": ("mixed-precision", None),
}
"""What a config calls the format, and what its groups do."""


def said(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return settings


def rename_formats(folder: Path, whole: str | None, of_group: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    del settings["format"]
    if whole is not None:
        settings["format"] = whole
    for group in settings["config_groups"].values():
        group["format"] = of_group
    (folder / "config.json").write_text(json.dumps(config))


def scheme(targets: str, num_bits: int, **more: Any) -> dict[str, Any]:
    return {"targets": [targets], "weights": {**compressed_weights(num_bits), **more}}


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("case", FORMATS)
def test_a_format_that_is_not_named_is_inferred_as_transformers_does(tmp_path: Path, case: str, num_bits: int) -> None:
    write_compressed_groups(tmp_path, {"group_0": scheme("Linear", num_bits)})
    rename_formats(tmp_path, *FORMATS[case])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with stream(tmp_path) as model:
        assert_equal(model, reference)
    assert is_plain_int4(said(tmp_path)) == (num_bits == 4), "kernels take it"


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize(
    "first",
    [scheme("re:.*down_proj", 8), scheme("re:.*down_proj", 4, group_size=64), scheme("re:.*down_proj", 2)],
    ids=["8 bits", "4 bits in other groups", "2 bits"],
)
def test_each_weight_is_made_dense_by_the_scheme_that_targets_it(
    tmp_path: Path, first: dict[str, Any], is_named: bool
) -> None:
    write_compressed_groups(tmp_path, {"group_0": first, "group_1": scheme(OTHERS, 4)})
    if not is_named:
        rename_formats(tmp_path, "mixed-precision", None)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with stream(tmp_path) as model:
        assert_equal(model, reference)


def test_numbers_that_are_not_packed_yet_are_in_no_words(tmp_path: Path) -> None:
    write_compressed_groups(tmp_path, {"group_0": scheme("Linear", 4)})
    rename_formats(tmp_path, None, None)
    assert is_plain_int4(said(tmp_path))
    assert not is_plain_int4(said(tmp_path) | {"quantization_status": "frozen"})
