"""The floor plan holds: imports point down, what is private to transformers is touched once, nothing is long."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import airstream

ROOT = Path(airstream.__file__).parent

FLOORS: list[list[str]] = [
    ["errors", "extras"],
    [
        "units",
        "foreign",
        "forks",
        "importing",
        "probe",
        "figures",
        "notebook",
        "allocations",
        "growth",
        "codecs",
        "codecs.*",
        "checkpoint.impostors",
    ],
    ["checkpoint.foreign", "checkpoint.foreign_json", "disk_space", "stats", "status"],
    [
        "checkpoint.descriptors",
        "checkpoint.jobs",
        "checkpoint.files",
        "checkpoint.gguf_split",
        "checkpoint.index",
        "checkpoint.config_file",
        "checkpoint.hub_errors",
        "checkpoint.generation_file",
        "checkpoint.beside",
        "cache",
        "checkpoint",
        "rates",
        "rates.facts",
        "row_numbers",
        "heap",
        "kernels",
        "scales",
    ],
    ["checkpoint.described", "checkpoint.unpickle", "checkpoint.archive", "checkpoint.pickles", "checkpoint.write"],
    ["checkpoint.gather", "checkpoint.formats", "checkpoint.gguf", "checkpoint.adapter_files"],
    ["checkpoint.gguf_outline"],
    ["checkpoint.reader", "checkpoint.hub", "rates.cards", "rates.machine", "rates.effort"],
    ["checkpoint.locate"],
    ["backend.base", "compat", "compat.*", "hardware", "rates.store", "pieces"],
    ["backend.*", "tensors", "footprint", "ring", "order"],
    ["expansion", "moves"],
    ["tracing"],
    ["layout"],
    ["slab", "config", "rates.*", "predict", "checkpoint.imagined"],
    ["plan", "plan.*", "fill", "turns", "region"],
    ["streamer", "profiling", "profiling.*"],
    ["model.*", "report", "machine"],
    ["live", "prepare"],
    ["auto", "demo.*", "landscape", "table_text", "repacking", "repacking.*"],
    ["table", "verification", "verification.*"],
    ["pictures"],
    [""],  # the package itself: its public names, looked up when they are first asked for
    ["cli.*"],
    ["__main__"],
]
"""From the ground up. A module imports from lower floors, or from its own package on its own floor."""

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 60


def name_of(file: Path) -> str:
    """`checkpoint.reader` for airstream/checkpoint/reader.py; a package has the name of its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES: Mapping[str, ast.Module] = {
    name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ROOT.rglob("*.py"))
}
EVERY_MODULE = pytest.mark.parametrize("module", TREES, ids=lambda name: name or "airstream")


def floor_of(module: str) -> int:
    """The number of its floor: named itself, or with its package."""
    package = module.partition(".")[0]
    for pattern in (module, f"{package}.*"):
        for number, patterns in enumerate(FLOORS):
            if pattern in patterns:
                return number
    raise AssertionError(f"{module!r} has no floor: give it one in FLOORS")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run; what is under `if TYPE_CHECKING:` never does."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if is_type_checking(node):
            assert isinstance(node, ast.If)
            for other in node.orelse:
                yield from (other, *statements(other))
        else:
            yield from statements(node)


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of airstream that `module` imports, at once or later."""
    found = set[str]()
    for node in statements(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("airstream.") in TREES else str(node.module) for name in inside}
    ours = {name for name in found if name.partition(".")[0] == "airstream"}
    return frozenset(name.removeprefix("airstream").removeprefix(".") for name in ours)


# ------------------------------------------------------------------------------------------------------------ imports


def test_the_scan_sees_imports() -> None:
    """Else the tests below would pass for the wrong reason."""
    assert len(TREES) > 30
    assert {"checkpoint.reader", "fill", "order", "ring", "errors"} <= imports_of("streamer")
    assert "auto" in imports_of(""), "an import in a function counts"
    assert "cache" in imports_of("demo.model"), "`from airstream import cache` names a module"
    assert "checkpoint.reader" not in imports_of("backend.base"), "an import for type checking only does not count"


@EVERY_MODULE
def test_imports_point_down(module: str) -> None:
    floor, package = floor_of(module), module.partition(".")[0]
    for target in imports_of(module):
        beside = target.partition(".")[0] == package and floor_of(target) == floor
        assert floor_of(target) < floor or beside, f"{module} (floor {floor}) imports {target} ({floor_of(target)})"


def test_there_is_no_import_cycle() -> None:
    order = tuple(TopologicalSorter({module: imports_of(module) for module in TREES}).static_order())
    assert set(order) == set(TREES)


def test_every_entry_of_the_floor_plan_exists() -> None:
    for pattern in (pattern for patterns in FLOORS for pattern in patterns):
        assert pattern in TREES or any(module.startswith(pattern[:-1]) for module in TREES), pattern


# ------------------------------------------------------------------------------- what is private to transformers


def imported_names(module: str, top: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything imported from the package `top`, for type checking or not."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == top:
            yield from ((str(node.module), alias.name) for alias in node.names)


COMPAT = [module for module in TREES if module.partition(".")[0] == "compat"]
SEMI_PRIVATE = {
    name for module in COMPAT for where, name in imported_names(module, "transformers") if where != "transformers"
}
OTHERS = pytest.mark.parametrize("module", [module for module in TREES if module not in COMPAT], ids=str)


def test_compat_wraps_something() -> None:
    assert {"WeightConverter", "get_model_conversion_mapping"} <= SEMI_PRIVATE


@OTHERS
def test_only_compat_imports_what_is_private_to_transformers(module: str) -> None:
    for where, name in imported_names(module, "transformers"):
        assert not name.startswith("_"), f"{module} imports {name} from {where}"
        assert name not in SEMI_PRIVATE, f"{module} imports {name} from {where}: compat wraps it"
        assert "._" not in where


@functools.cache
def private_names_of_airstream() -> set[str]:
    """Every name with an underscore that airstream itself defines, on a class, an object or a module."""
    names = set[str]()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            names.add(node.attr)
    return {name for name in names if name.startswith("_")}


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@OTHERS
def test_only_compat_touches_private_attributes_of_transformers(module: str) -> None:
    """torch's are allowed where there is no public way; `nn.Module`'s tables of parameters, a tensor's count of
    changes, and what an operator says it changes, have been there forever.
    """
    allowed = private_names_of_airstream() | {"_parameters", "_buffers", "_version", "_schema"}
    for node in (node for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)):
        assert node.attr not in SEMI_PRIVATE, f"{module}:{node.lineno} touches {ast.unparse(node)}"
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        of_others = private and not ast.unparse(node).startswith(("torch.", "sys."))
        assert not of_others or node.attr in allowed, f"{module}:{node.lineno} touches {ast.unparse(node)}"


# -------------------------------------------------------------------------------------------- importing does nothing


@EVERY_MODULE
def test_a_module_only_defines(module: str) -> None:
    """Nothing is called for its effect when a module is imported."""
    if module == "__main__":
        return
    for node in TREES[module].body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        definition = isinstance(
            node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
        )
        assert docstring or definition or is_type_checking(node), f"{module}:{node.lineno} {ast.unparse(node)[:80]}"


def run_python(code: str) -> str:
    """What it prints, to either stream."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def test_importing_the_package_is_silent_and_cheap() -> None:
    code = "import sys, airstream; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run_python(code) == "[]\n"


def test_importing_everything_is_silent() -> None:
    names = [f"airstream.{module}" for module in TREES if module not in ("", "__main__")]
    imports = f"    [importlib.import_module(name) for name in {names}]"
    quietly = "import importlib, threading\nfrom airstream.importing import quiet_imports\nwith quiet_imports():\n"
    assert run_python(f"{quietly}{imports}\nprint(threading.active_count())") == "1\n", "as the public names are"


def test_every_public_name_is_there() -> None:
    for name in airstream.__all__:
        assert getattr(airstream, name) is not None
    assert set(airstream.__all__) <= set(dir(airstream))
    with pytest.raises(AttributeError, match="no attribute 'AutoModle'"):
        airstream.AutoModle  # noqa: B018
    raised = {name for name in vars(airstream.errors) if name.endswith("Error")}
    assert raised <= set(airstream.__all__), "an error that cannot be caught by its public name"


# -------------------------------------------------------------------------------------------------------- line budget


@EVERY_MODULE
def test_no_module_is_long(module: str) -> None:
    file = ROOT.joinpath(*module.split(".")) if module else ROOT
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@EVERY_MODULE
def test_no_function_is_long(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {num_lines} lines"


@EVERY_MODULE
def test_every_module_says_what_it_knows(module: str) -> None:
    assert TREES[module].body == [] or ast.get_docstring(TREES[module])
