"""Who may import whom: imports point downwards, read from the source of every file.

An import within a function or under `TYPE_CHECKING` counts, too: a file that needs another one's types depends on it.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).parents[1]

# Each line may import from the lines above it; rooms of one line know nothing of each other.
LAYERS = [
    ["errors"],
    ["config"],
    ["process"],
    ["exact"],
    ["data", "components"],
    ["storage"],
    ["core"],
    ["reporting"],
    ["trainer"],
    ["inspection"],
    ["sweep"],
    ["commands"],
]
LEVELS = {room: level for level, layer in enumerate(LAYERS) for room in layer}
# The package's own front doors may import from any room.
ENTRIES = {"__init__", "__main__"}


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 2:
        parts.pop()
    return ".".join(parts)


def source_files(package: str) -> dict[str, Path]:
    """Module name → file, of every file of a package."""
    files = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        files[module_name(file)] = file
    return files


TRAINER_FILES = source_files("trainer")


def imported_modules(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; of `from a import b`, `a.b` where that is a file of ours."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                modules.add(submodule if submodule in TRAINER_FILES else node.module)
    return modules


def trainer_imports(file: Path) -> set[str]:
    modules = set()
    for module in imported_modules(file):
        if module == "trainer":
            modules.add("trainer.__init__")
        elif module.startswith("trainer."):
            modules.add(module)
    return modules


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", TRAINER_FILES)
def test_imports_point_downwards(module: str) -> None:
    own = room(module)
    if own in ENTRIES:
        return
    assert own in LEVELS, f"{own}: a new room needs its place in LAYERS"
    for imported in trainer_imports(TRAINER_FILES[module]):
        other = room(imported)
        assert other not in ENTRIES, (
            f"{module} imports the package's front door: import from the file itself"
        )
        assert other == own or LEVELS[other] < LEVELS[own], (
            f"{module} imports {imported}, which is above or beside it"
        )


def test_no_files_import_each_other() -> None:
    graph = {
        module: trainer_imports(file)
        for module, file in TRAINER_FILES.items()
        if room(module) not in ENTRIES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = " → ".join(error.args[1])
        pytest.fail(f"a circle of imports: {cycle}")


def test_config_knows_the_errors_alone() -> None:
    for module, file in TRAINER_FILES.items():
        if room(module) == "config":
            assert {room(imported) for imported in trainer_imports(file)} <= {
                "config",
                "errors",
            }, module


@pytest.mark.parametrize("own", ["exact", "data"])
def test_no_loop_console_or_tracker_below_the_core(own: str) -> None:
    for module, file in TRAINER_FILES.items():
        if room(module) == own:
            rooms = {room(imported) for imported in trainer_imports(file)}
            assert not rooms & {"core", "reporting", "trainer"}, module
            assert not {name.split(".")[0] for name in imported_modules(file)} & {
                "wandb",
                "rich",
                "matplotlib",
            }, module


def test_the_package_knows_nothing_of_what_uses_it() -> None:
    for module, file in TRAINER_FILES.items():
        packages = {imported.split(".")[0] for imported in imported_modules(file)}
        assert not packages & {"tests", "benchmarks", "examples", "train"}, module


@pytest.mark.parametrize("package", ["benchmarks", "examples"])
def test_nothing_but_tests_imports_tests(package: str) -> None:
    for module, file in source_files(package).items():
        assert "tests" not in {
            imported.split(".")[0] for imported in imported_modules(file)
        }, module


def test_examples_use_public_names() -> None:
    for module, file in source_files("examples").items():
        assert trainer_imports(file) <= {"trainer.__init__"}, module
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "trainer":
                assert {alias.name for alias in node.names} <= set(trainer.__all__), (
                    module
                )
