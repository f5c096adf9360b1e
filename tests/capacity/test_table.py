"""The table of models, precisions and cards, and the picture: their arithmetic, their formats, the command line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airstream import ArgumentError, AutoModel, BudgetError, Machine, UnsupportedError, plan_table, plot_plan
from airstream.capacity.landscape import Landscape, Spot, survey
from airstream.capacity.map import _apart
from airstream.capacity.plan_table import CARDS
from airstream.capacity.rows import Row
from airstream.capacity.table import FORMATS, Table, as_markdown, as_text
from airstream.cli import main
from airstream.codecs.names import CODEC_NAMES
from airstream.loading.prepare import prepare_for_planning
from airstream.reporting.units import GIB, MIB

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
SMALL = LLAMA_8B | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 32000}
PRECISIONS = ["fp16", *CODEC_NAMES]
MACHINE = Machine(ram="16GiB", disk_gbps=3.5)
DENSE_BYTES = 2 * 8_030_261_248
"""Bytes of all weights of LLAMA_8B."""
EMBEDDINGS = 2 * 128256 * 4096 * 2
"""Bytes of the token embedding and the lm_head of LLAMA_8B."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with nothing but a config, by name."""
    folders = {}
    for name, config in {"llama-8b": LLAMA_8B, "small": SMALL}.items():
        folders[name] = tmp_path_factory.mktemp("configs") / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module")
def table(configs: dict[str, Path]) -> Table:
    return plan_table([configs["llama-8b"]], machine=MACHINE)


def rows_by_place(table: Table) -> dict[tuple[str, str], Row]:
    return {(row.precision, row.card): row for row in table.rows}


def run(*words: Any) -> int:
    return main([str(word) for word in words])


# ------------------------------------------------------------------------------------------------------------ the rows


def test_every_precision_on_every_card(table: Table) -> None:
    assert [(row.precision, row.card) for row in table.rows] == [*itertools.product(PRECISIONS, CARDS)]
    assert {row.model for row in table.rows} == {"llama-8b"}


def test_weights_at_every_precision(table: Table) -> None:
    """8.03 billion of them; the lm_head and the embeddings stay in 16 bits."""
    sixteen, eight, four = (
        next(row for row in table.rows if row.precision == name) for name in ("fp16", "int8", "nf4")
    )
    layers = sixteen.weights_bytes - EMBEDDINGS
    assert sixteen.weights_bytes == pytest.approx(2 * 8.03e9, rel=0.001)
    assert eight.weights_bytes == pytest.approx(EMBEDDINGS + layers / 2, rel=0.002)
    assert four.weights_bytes == pytest.approx(EMBEDDINGS + layers * 4.5 / 16, rel=0.002)


def test_kv_cache_of_a_token_and_of_the_context(table: Table) -> None:
    for row in table.rows:
        assert row.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
        assert row.kv_bytes == row.kv_bytes_per_token * row.context
        assert row.context == 4096


def test_what_fits_needs_no_more_than_the_budget(table: Table) -> None:
    for row in table.rows:
        assert row.needed_bytes > row.weights_bytes + row.kv_bytes
        assert row.vram_budget_bytes == int(0.9 * row.vram_bytes)
        assert (row.verdict == "fits") is (row.needed_bytes <= row.vram_budget_bytes)
    by_place = rows_by_place(table)
    assert [by_place[name, "T4"].verdict for name in ("fp16", "int8", "nf4")] == ["streams", "fits", "fits"]


def test_shares_add_up(table: Table) -> None:
    for row in table.rows:
        assert 0 < row.resident_bytes <= row.vram_budget_bytes
        # What a card multiplies dense stays dense and packed.
        most = row.weights_bytes + (DENSE_BYTES if row.precision in ("int4", "fp8") else 0)
        assert row.resident_bytes + row.hosted_bytes <= 1.01 * most, "small tensors take a little more"
        assert row.verdict == "streams" or row.resident_bytes >= row.weights_bytes


@pytest.mark.parametrize("gpu", ["T4", "RTX 3060 12GB"])
def test_a_row_is_the_plan_for_that_machine(configs: dict[str, Path], table: Table, gpu: str) -> None:
    plan = AutoModel.plan(configs["llama-8b"], machine=replace(MACHINE, gpu=gpu), dtype="float16")
    row = rows_by_place(table)["fp16", gpu]
    assert plan.prediction is not None
    assert (row.decode_seconds, row.bottleneck) == (plan.prediction.decode_seconds, plan.prediction.bottleneck)
    assert row.first_token_seconds == plan.prediction.prefill_seconds
    assert row.hosted_bytes == plan.hosted_bytes


def test_longer_contexts_and_more_sequences_need_more(configs: dict[str, Path]) -> None:
    one, more = (
        plan_table([configs["small"]], ["T4"], machine=MACHINE, max_context=context, max_batch_size=batch).rows[0]
        for context, batch in ((512, 1), (1024, 4))
    )
    assert more.kv_bytes == 8 * one.kv_bytes
    assert more.needed_bytes > one.needed_bytes
    assert (more.context, more.batch_size) == (1024, 4)


def test_a_card_that_is_too_small_is_told_the_least_that_does(configs: dict[str, Path]) -> None:
    options: dict[str, Any] = {"max_context": 8192, "max_batch_size": 8}
    row = plan_table([configs["llama-8b"]], ["2060"], machine=MACHINE, **options).rows[0]
    assert (row.verdict, row.decode_seconds, row.bottleneck, row.resident_bytes) == ("does not fit", None, None, 0)
    assert row.least_vram_bytes is not None
    assert row.least_ram_bytes is not None
    assert row.least_vram_bytes > row.vram_budget_bytes
    options |= {"machine": replace(MACHINE, gpu="2060"), "dtype": "float16"}
    least = {0: row.least_vram_bytes, "cpu": row.least_ram_bytes}
    assert AutoModel.plan(configs["llama-8b"], max_memory=least, **options).tiers["0"].peak_bytes == least[0]
    with pytest.raises(BudgetError):
        AutoModel.plan(configs["llama-8b"], max_memory={**least, 0: least[0] - 1}, **options)


def test_the_same_table_twice(configs: dict[str, Path], table: Table) -> None:
    assert plan_table([configs["llama-8b"]], machine=MACHINE) == table


def test_the_checkpoint_s_own_dtype_has_its_name(configs: dict[str, Path]) -> None:
    rows = plan_table([configs["small"]], ["T4"], machine=MACHINE, dtype="auto").rows
    assert [row.precision for row in rows] == ["bf16", *PRECISIONS[1:]]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((["./not/there"], ["RTX 3091"]), {}, "RTX 3090"),
        ((["./not/there"], ["3080"]), {"machine": Machine(gpu="T4")}, "leave one out"),
        ((["./not/there"], ["3080"]), {"max_memory": "4GiB"}, "alike"),
        ((["./not/there"], ["3080"]), {"max_contxt": 8}, "max_context"),
        (("./not/there", ["3080"]), {}, "lists"),
        ((["./not/there"], "3080"), {}, "lists"),
        (([], ["3080"]), {}, "lists"),
    ],
)
def test_mistakes_are_told_before_anything_is_fetched(
    arguments: tuple[Any, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        plan_table(*arguments, **options)


# --------------------------------------------------------------------------------------------------------- the formats


def test_csv_and_json_have_plain_numbers(table: Table) -> None:
    read = list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))
    assert [int(row["needed_bytes"]) for row in read] == [row.needed_bytes for row in table.rows]
    assert {row["least_vram_bytes"] for row in read} == {""}
    data = json.loads(FORMATS["json"](table))
    assert Table(tuple(Row(**row) for row in data["rows"]), tuple(data["notes"])) == table


def test_markdown_is_a_table_and_what_notebooks_show(table: Table) -> None:
    lines = as_markdown(table).splitlines()
    head, rule, *body, blank, notes = lines
    assert len(body) == len(table.rows)
    assert len({line.count("|") for line in (head, rule, *body)}) == 1
    assert not blank
    assert "16.00 GiB of RAM" in notes
    assert table._repr_markdown_() == as_markdown(table)


def test_text_fits_a_terminal(configs: dict[str, Path], table: Table) -> None:
    assert str(table) == as_text(table)
    refused = plan_table([configs["llama-8b"]], ["RTX 2060"], machine=MACHINE, max_context=8192, max_batch_size=8)
    for shown in (table, refused):
        lines = as_text(shown).splitlines()
        assert max(map(len, lines)) <= 100
        assert sum(line.startswith("llama-8b, ") for line in lines) == len(PRECISIONS), "what repeats stands once"
    assert as_text(refused).count("does not fit: least budgets ") == len(PRECISIONS)


def test_notes_say_what_is_taken_for_granted(table: Table) -> None:
    said = " ".join(table.notes)
    assert all(
        words in said
        for words in ("90%", "14.40 GiB", "3.5 GB/s (given)", "lossless are equal to the bit", "embeddings stay")
    )


# ----------------------------------------------------------------------------------------------------- the command line


def test_table_as_json_and_markdown(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", configs["small"], "--table", "--gpu", "T4, 3090", "--ram", "16GiB", "--context", 512)
    assert run(*words, "--json") == 0
    assert [row["card"] for row in json.loads(capsys.readouterr().out)["rows"]] == len(PRECISIONS) * ["T4", "RTX 3090"]
    assert run(*words, "--format", "markdown") == 0
    assert capsys.readouterr().out.startswith("| model |")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table", "--plot", "x.png"], "--plot has no effect on a table"),
        (["--table", "--json", "--format", "csv"], "--json beside --format"),
        (["--table", "--max-memory", "4GiB"], "alike"),
        (["--table", "--gpu", "RTX 3091"], "RTX 3090"),
        (["--plot", "x.png", "--json"], "--json has no effect on a picture"),
        (["--format", "csv"], "--format has no effect on one plan"),
        (["another/model"], "--table"),
        (["--plot", "x.doc"], ".png"),
        (["--plot", "not/there/x.png"], "there is no folder"),
    ],
)
def test_what_has_no_effect_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "not/there", *words) == 1
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- the picture


CARD = Machine(gpu="3060 12GB", ram="8GiB", disk_gbps=3.5)


@pytest.fixture(scope="module")
def found(configs: dict[str, Path]) -> Landscape:
    asked = prepare_for_planning(configs["llama-8b"], {"max_context": 1024}, CARD)
    return survey(asked.facts, asked.request)


def seconds(spots: Sequence[Spot | None]) -> list[float]:
    return [spot.seconds if spot is not None else float("inf") for spot in spots]


def is_falling(values: Sequence[float]) -> bool:
    """But for a few per cent, where a plan that prefers a resident lm_head has a little less room for layers."""
    return all(right <= 1.05 * left for left, right in itertools.pairwise(values))


def test_more_memory_is_not_slower(found: Landscape) -> None:
    assert all(is_falling(seconds(spots)) for spots in found.spots)
    assert all(is_falling(seconds(spots)) for spots in zip(*found.spots, strict=True))
    assert found.spots[0][0] is None
    last = found.spots[-1][-1]
    assert last is not None
    assert last.disk_bytes == 0


def test_from_some_memory_on_nothing_comes_from_disk(found: Landscape) -> None:
    for spots, enough in zip(found.spots, found.ram_without_disk(), strict=True):
        for size, spot in zip(found.host_bytes, spots, strict=True):
            assert spot is None or enough is not None
            if spot is not None and enough is not None and abs(size / enough - 1) > 0.05:
                assert (spot.disk_bytes == 0) is (size > enough)


def test_the_mark_is_the_plan_of_the_machine(configs: dict[str, Path], found: Landscape) -> None:
    plan = AutoModel.plan(configs["llama-8b"], machine=CARD, max_context=1024)
    assert plan.prediction is not None
    assert found.here is not None
    assert found.here.seconds == pytest.approx(plan.prediction.decode_seconds, rel=0.001)
    assert found.here_bytes == pytest.approx((12 * GIB, 8 * GIB))


@pytest.mark.parametrize("gpu", ["3060 12GB", None])
def test_budgets_that_were_given_are_where_the_mark_is(configs: dict[str, Path], gpu: str | None) -> None:
    machine = replace(CARD, gpu=gpu)
    options: dict[str, Any] = {"max_memory": {"cpu": "8GiB"}, "device": "cpu", "max_context": 1024}
    if gpu:
        options = {"max_memory": {0: "4GiB", "cpu": "8GiB"}, "max_context": 1024}
    asked = prepare_for_planning(configs["llama-8b"], options, machine)
    told: list[float] = []
    found = survey(asked.facts, asked.request, told.append)
    assert found.here_bytes == ((4 * GIB, 8 * GIB) if gpu else (8 * GIB,))
    plan = AutoModel.plan(configs["llama-8b"], machine=machine, **options)
    assert plan.prediction is not None
    assert found.here is not None
    assert found.here.seconds == pytest.approx(plan.prediction.decode_seconds, rel=0.001)
    assert told == sorted(told)  # so much of it is done by and by
    assert (len(told) > 50, told[-1]) == (True, 1.0)
    axes = plot_plan(configs["llama-8b"], machine=machine, **options).axes[0]
    assert any(text.get_text().startswith("4 GiB + 8 GiB: " if gpu else "8 GiB: ") for text in axes.texts)
    assert "all of which is used" in axes.get_xlabel()


@pytest.mark.parametrize("device", ["map", "curve"])
def test_a_picture_is_written_and_no_text_is_over_another(
    configs: dict[str, Path], tmp_path: Path, device: str
) -> None:
    machine = CARD if device == "map" else replace(CARD, gpu=None)
    options = {} if device == "map" else {"device": "cpu"}
    figure = plot_plan(configs["llama-8b"], machine=machine, file=tmp_path / "plan.png", max_context=1024, **options)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert 10_000 < (tmp_path / "plan.png").stat().st_size < MIB
    axes = figure.axes[0]
    texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(axes.texts) >= (5 if device == "map" else 1)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert any("8 GiB: " in text.get_text() for text in axes.texts), "the mark says what the machine gives"


@pytest.mark.parametrize(
    ("gpu", "ram", "marker", "said"),
    [
        (None, "1.35GiB", "*", "1.35 GiB: does not fit"),
        (None, "256MiB", "<", "256 MiB: does not fit"),
        (None, "12GiB", "*", "12 GiB: "),
        (None, "512GiB", ">", "512 GiB: "),
        ("RTX 3060 12GB", "512GiB", "^", "12 GiB + 512 GiB: "),
        ("A100 PCIe 80GB", "16GiB", ">", "80 GiB + 16 GiB: "),
        ("A100 PCIe 80GB", "512GiB", ">", "80 GiB + 512 GiB: "),
        ("RTX 3060 12GB", "256MiB", "v", "12 GiB + 256 MiB: does not fit"),
    ],
)
def test_the_machine_is_on_every_picture(
    configs: dict[str, Path], gpu: str | None, ram: str, marker: str, said: str
) -> None:
    machine = Machine(gpu=gpu, ram=ram, disk_gbps=3.5)
    options = {} if gpu else {"device": "cpu"}
    figure = plot_plan(configs["llama-8b"], machine=machine, max_context=1024, **options)
    figure.canvas.draw()
    axes = figure.axes[0]
    (mark,) = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    (text,) = [text for text in axes.texts if text.get_text().startswith(said)]
    assert mark.get_marker() == marker
    inside, place = axes.get_window_extent(), text.get_window_extent()
    assert inside.x0 <= place.x0 < place.x1 <= inside.x1
    assert inside.y0 <= place.y0 < place.y1 <= inside.y1
    boxes = [each.get_window_extent() for each in axes.texts]
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("ram", ["6GiB", "12GiB"])
def test_a_picture_says_what_the_plan_says(configs: dict[str, Path], ram: str) -> None:
    """Nobody names a context: the plan's own is the picture's, not the one that unlimited memory would have."""
    machine = Machine(ram=ram, disk_gbps=3.5)
    plan = AutoModel.plan(configs["llama-8b"], machine=machine, device="cpu")
    asked = prepare_for_planning(configs["llama-8b"], {"device": "cpu"}, machine)
    found = survey(asked.facts, asked.request)
    assert plan.prediction is not None
    assert found.context == plan.max_context
    assert found.here == Spot(plan.prediction.decode_seconds, plan.read_bytes)
    title = plot_plan(configs["llama-8b"], machine=machine, device="cpu").axes[0].get_title(loc="left")
    assert f"{plan.max_context:,} tokens" in title


def test_a_mark_off_the_curve_says_why(configs: dict[str, Path]) -> None:
    """A budget that leaves the checkpoint in the page cache of this machine: the plan reads from there."""
    machine = Machine(ram="64GiB", disk_gbps=3.5)
    plan = AutoModel.plan(configs["llama-8b"], machine=machine, device="cpu", max_memory="6GiB", max_context=128)
    figure = plot_plan(configs["llama-8b"], machine=machine, device="cpu", max_memory="6GiB", max_context=128)
    assert not plan.direct_io
    assert any(text.get_text().endswith("(page cache)") for text in figure.axes[0].texts)


@pytest.mark.parametrize("name", ["llama-8b", "small"])
@pytest.mark.parametrize("device", ["map", "curve"])
def test_axes_have_ticks_and_little_grey(configs: dict[str, Path], name: str, device: str) -> None:
    machine = CARD if device == "map" else replace(CARD, gpu=None)
    options = {} if device == "map" else {"device": "cpu"}
    axes = plot_plan(configs[name], machine=machine, max_context=128, **options).axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        assert len([tick for tick in axis.get_ticklocs() if low <= tick <= high]) >= 3
    grey = axes.patches[0].get_path().get_extents(axes.patches[0].get_patch_transform())
    low, high = map(math.log, axes.get_xlim())
    assert (math.log(max(grey.x1, grey.x0)) - low) / (high - low) < 0.12


def test_lines_that_are_too_near_to_each_other_are_left_out(configs: dict[str, Path]) -> None:
    row = [10 * 0.98**column for column in range(100)]  # 2 % a column, of which there must be 3.5 between lines
    assert _apart([row] * 10, [2, 2.05, 3, 4.9, 5]) == [2.05, 3, 5]


def test_a_model_that_is_as_fast_anywhere_is_drawn_too(configs: dict[str, Path]) -> None:
    """Four small layers: what memory there is hardly matters, and a host needs more for itself than for weights."""
    machine = Machine(gpu="T4", ram="16GiB", disk_gbps=1000)
    assert plot_plan(configs["small"], machine=machine, max_context=128).axes


def test_plot_on_the_command_line(configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.svg"
    assert run("plan", configs["small"], "--gpu", "T4", "--ram", "16GiB", "--context", 256, "--plot", file) == 0
    assert "</svg>" in file.read_text()
    assert str(file) in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install matplotlib"):
        plot_plan("./not/there")
