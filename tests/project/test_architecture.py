"""The house holds: imports point down, what is private to transformers is touched once, nothing is long."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import airstream

ROOT = Path(airstream.__file__).parent

FLOORS = """
    errors
    reporting
    system codecs
    transfer demo
    checkpoint rates
    compat
    footprint
    layout
    plan
    streaming loading profiling
    model capacity repacking
    verification
    auto
    airstream
    cli
    __main__
"""
"""The folders of the house, from the ground up. A folder imports from lower floors and from itself; those on one floor
never import each other. `airstream` is the package itself: its public names, looked up when they are first asked for.
"""

FLOOR_OF = {folder: number for number, floor in enumerate(FLOORS.split("\n")) for folder in floor.split()}

LONGEST_CHAIN = 16
"""Modules of which each imports the next, at most. Whoever looks for what a module stands on reads no more of them."""

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 50
"""Without the docstring."""

MAX_PARAMETERS = 8
PUBLIC_FUNCTIONS = ("from_pretrained",)
"""They have a parameter for everything that a user may ask."""


def name_of(file: Path) -> str:
    """`transfer.reader` for airstream/transfer/reader.py; a package has the name of its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES: Mapping[str, ast.Module] = {
    name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ROOT.rglob("*.py"))
}
EVERY_MODULE = pytest.mark.parametrize("module", TREES, ids=lambda name: name or "airstream")


def folder_of(module: str) -> str:
    return module.partition(".")[0] or "airstream"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of airstream that `module` imports: at once, later, or only to name types."""
    found = set[str]()
    for node in ast.walk(TREES[module]):
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
    assert {"transfer.machinery", "streaming.fill", "layout.ring", "errors"} <= imports_of("streaming.streamer")
    assert "auto" in imports_of(""), "an import in a function counts"
    assert "system.cache" in imports_of("demo.model"), "`from airstream.system import cache` names a module"
    assert "profiling.profile" in imports_of("model.streamed"), "an import for type checking alone counts"


@EVERY_MODULE
def test_imports_point_down(module: str) -> None:
    folder = folder_of(module)
    for target in imports_of(module):
        beside = folder_of(target) == folder
        assert beside or FLOOR_OF[folder_of(target)] < FLOOR_OF[folder], f"{module} imports {target}"


def test_there_is_no_import_cycle() -> None:
    order = tuple(TopologicalSorter({module: imports_of(module) for module in TREES}).static_order())
    assert set(order) == set(TREES)


@functools.cache
def longest_chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports that begins with `module`, of which it is a part."""
    return (module, *max((longest_chain(target) for target in sorted(imports_of(module))), key=len, default=()))


def test_no_chain_of_imports_is_long() -> None:
    """Every import counts, in functions and for type checking alone, too."""
    assert longest_chain("errors") == ("errors",)
    assert longest_chain("auto")[-1] in [module for module in TREES if not imports_of(module)], "it goes to the ground"
    chain = max(map(longest_chain, TREES), key=len)
    shown = " > ".join(module or "airstream" for module in chain)
    assert len(chain) <= LONGEST_CHAIN, f"a chain of {len(chain)} modules, of which each imports the next: {shown}"


def test_the_floors_are_the_folders_and_what_the_docs_draw() -> None:
    assert set(FLOOR_OF) == {folder_of(module) for module in TREES}
    design = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    (drawn,) = re.findall(r"^## Floors$.*?^```\n(.*?)^```$", design, re.MULTILINE | re.DOTALL)
    floors = [re.split(r" {2,}", line)[0].split() for line in drawn.splitlines() if not line.startswith(" ")]
    assert floors[::-1] == [floor.split() for floor in FLOORS.split("\n") if floor]


# -------------------------------------------------------------------------------------------------------------- tests

TESTS = ROOT.parent / "tests"
OTHER_TESTS = {"benchmarks", "end_to_end", "matrix", "project"}
"""Folders of tests of no one folder of airstream; `stand_ins` has what stands in for devices, models and files."""


def test_tests_lie_in_folders_that_mirror_the_house() -> None:
    files = [file.relative_to(TESTS) for file in TESTS.rglob("*.py")]
    tested = {file.parent.as_posix() for file in files if file.name.startswith("test_")}
    folders = {folder_of(module) for module in TREES if "." in module}
    assert tested == folders | OTHER_TESTS | {"stand_ins"}
    assert {file.name for file in files if len(file.parts) == 1} == {"__init__.py", "conftest.py"}
    assert all((TESTS / folder / "__init__.py").exists() for folder in tested), "files may have the same name"


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
    modules = "import importlib, threading\nfrom airstream.system.importing import quiet_imports\n"
    quietly = f"{modules}with quiet_imports():\n"
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
            first = node.body[0]
            is_documented = ast.get_docstring(node) is not None and first.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            num_lines -= first.end_lineno - first.lineno + 1 if is_documented else 0
            assert num_lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {num_lines} lines"


@EVERY_MODULE
def test_no_function_takes_much(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef) and node.name not in PUBLIC_FUNCTIONS:
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            taken = [name for name in names if name not in ("self", "cls")]
            assert len(taken) <= MAX_PARAMETERS, f"{module}.{node.name} takes {len(taken)} parameters"


@EVERY_MODULE
def test_every_module_says_what_it_knows(module: str) -> None:
    assert TREES[module].body == [] or ast.get_docstring(TREES[module])


def definitions(
    node: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The public functions, classes and methods of a module, each with its name in it."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.ClassDef) and not each.name.startswith("_"):
            yield f"{prefix}{each.name}", each
            if isinstance(each, ast.ClassDef):
                yield from definitions(each, f"{prefix}{each.name}.")


@EVERY_MODULE
def test_every_public_name_has_a_docstring(module: str) -> None:
    """Of its own, or, for a method, of what it overrides."""
    there = importlib.import_module(f"airstream.{module}".rstrip(".")) if module != "__main__" else None
    for name, node in definitions(TREES[module]):
        is_method = isinstance(node, ast.FunctionDef) and "." in name
        overridden = inspect.getdoc(functools.reduce(getattr, name.split("."), there)) if is_method else None
        assert ast.get_docstring(node) or overridden, f"{module}:{node.lineno} {name}"
