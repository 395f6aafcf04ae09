"""Names of files in messages and lists: one line of text that no terminal follows as a command."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from trainer.commands.tables import add_rows, make_table
from trainer.data.bad_samples import BadSample
from trainer.data.decoding import decode
from trainer.data.folder import image_folders
from trainer.data.labelled_images import labelled_images
from trainer.errors import DataError
from trainer.storage.bad_samples import FILE, write
from trainer.storage.contents import file_size

NAMES = {
    "ünï 日本\u3000ö.jpg": "ünï 日本\u3000ö.jpg",
    "two\nlines\x1b[31m\u2028.jpg": r"two\nlines\x1b[31m\u2028.jpg",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_line_of_text(tmp_path: Path, name: str) -> None:
    text = NAMES[name]
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    path = folder / name
    path.write_bytes(b"")
    for read in (decode, file_size):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{folder / text} ")
    write(tmp_path, [BadSample("train", 0, str(path), f"{path} is\nbad")])
    listed = (tmp_path / FILE).read_text()
    assert listed.count("\n") == 2 and "\x1b" not in listed
    (folder / f"{name}.txt").touch()
    *_, note = image_folders(tmp_path, needs_val=False)
    assert note.endswith(f"(train/a/{text}.txt)")


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_class_is_one_line_of_text(tmp_path: Path, name: str) -> None:
    for folder in ("train/a", f"val/{name}"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").touch()
    with pytest.raises(DataError) as caught:
        image_folders(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'val' / NAMES[name]} is a class")


@pytest.mark.parametrize("is_reversed", [False, True])
def test_names_that_are_spelt_like_one_have_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_reversed: bool
) -> None:
    names = [
        "e\u0301.jpg",
        "\u00e9.jpg",
        "a.jpg",
    ]  # the first two are one name to Unicode
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()

    def walk(*_: object, **__: object) -> Iterator[tuple[str, list[str], list[str]]]:
        yield str(folder), [], names[::-1] if is_reversed else names

    monkeypatch.setattr("trainer.data.folder.os.walk", walk)
    images, *_ = image_folders(tmp_path, needs_val=False)
    assert images.paths == [f"train/a/{names[i]}" for i in (2, 0, 1)]
    rows = "".join(f"{path},a\n" for path in images.paths[:: -1 if is_reversed else 1])
    (tmp_path / "labels.csv").write_text(f"path,label\n{rows}")
    labelled, *_ = labelled_images(tmp_path, "labels.csv", needs_val=False)
    assert labelled.paths == images.paths


def test_tables_show_names_as_they_are() -> None:
    output = StringIO()
    table = make_table(["id", "file"])
    names = ["be[old]es/x[copy].jpg", "x[/y].jpg"]
    add_rows(table, enumerate([*names, "two\nlines"]))
    Console(file=output, width=80).print(table)
    lines = [
        line.split(maxsplit=1)[-1].strip()
        for line in output.getvalue().split("\n")
        if line.strip()
    ]
    assert lines[2:] == [*names, "two", "lines"]
