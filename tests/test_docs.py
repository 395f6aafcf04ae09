"""The pages say what is so: their code is the examples', their links lead somewhere, their commands and keys exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, mlp
from tests.test_architecture import LEVELS
from trainer import MicroBatch, Run
from trainer.__main__ import COMMANDS
from trainer.config.fields import ComponentSection
from trainer.config.schema import SECTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = [
    README,
    CONTRIBUTING,
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "from").glob("*.md")),
]  # what describes the present, not a past decision

# A mark, then the block: <!-- examples/extending/lookahead.py -->
EXAMPLE = re.compile(r"<!-- (examples/\S+\.py) -->\n```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)\)")
PATH = re.compile(
    r"(?<![\w/.])((?:configs|launch|examples|benchmarks|tests|docs)/[\w./-]*\w)"
)
MODULE = re.compile(r"python -m ((?:benchmarks|examples)\.[\w.]+)")
COMMAND = re.compile(r"(?:-m trainer|(?<!\w)lockstep) ([a-z]+)")
CLOSED_SECTIONS = [
    name
    for name, section in SECTIONS.items()
    if not issubclass(section, ComponentSection)
]
KEY = re.compile(
    rf"(?<![\w./])({'|'.join(CLOSED_SECTIONS)})\.(?!py\b)([a-z_]+)(?=[=`:\s])"
)

PYTHON_OBJECTS = {
    "run": Run,
    "batch": MicroBatch,
}  # what an observer calls by a section's name


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_extending_shows_the_examples_as_they_are() -> None:
    shown = dict(EXAMPLE.findall((DOCS / "extending.md").read_text()))
    files = {
        page_name(file) for file in (ROOT / "examples" / "extending").glob("[a-z]*.py")
    }
    assert shown.keys() == files
    for name, text in shown.items():
        assert text == (ROOT / name).read_text(), (
            f"docs/extending.md shows another {name}"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page_name(page)} links {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = DOCS / "README.md"
    listed = [
        (DOCS / target).resolve() for target in LINK.findall(contents.read_text())
    ]
    assert set(listed) == {README, *DOCS.rglob("*.md")} - {contents}
    assert len(listed) == len(set(listed))


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 110
    assert max(len(line) for line in lines) <= 120


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_files_modules_and_commands_exist(page: Path) -> None:
    text = page.read_text()
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{page_name(page)} names {path}"
    for module in MODULE.findall(text):
        place = Path(ROOT, *module.split("."))
        is_program = place.with_suffix(".py").is_file()
        is_program_folder = (place / "__main__.py").is_file()
        assert is_program or is_program_folder, f"{page_name(page)} runs {module}"
    for block in code_blocks(page, "sh"):
        for command in COMMAND.findall(block):
            assert command in COMMANDS, f"{page_name(page)} runs {command}"


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_keys_exist(page: Path) -> None:
    for section, name in KEY.findall(page.read_text()):
        keys = {field.name for field in dataclasses.fields(SECTIONS[section])}
        if section in PYTHON_OBJECTS:
            keys |= {
                *dir(PYTHON_OBJECTS[section]),
                *PYTHON_OBJECTS[section].__annotations__,
            }
        assert name in keys, f"{page_name(page)} names {section}.{name}"


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_python_is_python(page: Path) -> None:
    for block in code_blocks(page, "python"):
        compile(block, page_name(page), "exec")


def test_the_rooms_are_those_that_the_layering_knows() -> None:
    table = re.findall(
        r"^\| `(\w+)(?:/|\.py)` \|", CONTRIBUTING.read_text(), re.MULTILINE
    )
    assert sorted(table) == sorted(LEVELS)
    assert [LEVELS[room] for room in table] == sorted(LEVELS.values()), (
        "the table is in the order of the layers"
    )
    code_map = README.read_text().partition("## The code")[2].partition("## More")[0]
    for room in LEVELS:
        assert re.search(rf"\b{room}(/|\.py)", code_map), (
            f"the README's map lacks {room}"
        )


def test_the_readme_without_yaml(tmp_path: Path) -> None:
    """Its lines, on a small net, with nothing sent or drawn."""
    (block,) = code_blocks(README, "python")
    quiet = f'{{"run": {{"dir": {str(tmp_path)!r}, "figures": False}}, "wandb": {{"mode": "disabled"}}, '
    program = block.replace("settings = {", f"settings = {quiet}")
    data = Points(ignored=False)

    def fit() -> None:
        exec(program, {"net": mlp().float(), "train": data, "val": data})

    on_ranks(1, fit)
    assert (tmp_path / "run" / "summary.json").is_file()
