"""What a checkpoint or a best model holds at one moment, before it is written: tensors and texts, by file name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.storage.files import make_file
from trainer.storage.host_copies import host_copies
from trainer.storage.sha256 import file_sha256
from trainer.storage.stateful import check_name, split_state, write_tensors

MANIFEST_FILE = "manifest.json"

Tensors = dict[str, Tensor]


@dataclass
class Snapshot:
    """The files of a checkpoint or a best model of step `step`, in the order in which they are written.

    Texts are those of the moment. The tensors are the run's own, wherever they are, and change with its next step. Only
    those of the files `copied` lie on the host, where nothing changes them and no two share memory. `arrive` waits
    until such copies are complete.
    """

    step: int
    files: dict[str, Tensors | str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)  # files for their owner alone
    copied: set[str] = field(default_factory=set)
    arrive: Callable[[], None] = lambda: None

    def add_text(self, file: str, text: str, *, private: bool = False) -> None:
        self.files[file] = text
        if private:
            self.private.add(file)

    def add_json(self, file: str, value: Any) -> None:
        """Add a value as an indented file."""
        self.add_text(file, json.dumps(value, indent=2) + "\n")

    def add_state(self, name: str, state: Mapping[Any, Any]) -> None:
        """Add a state as the files `<name>.safetensors` and `<name>.json`.

        Raises `LockstepError`, naming the object and the key, if it cannot be stored.
        """
        check_name(name)
        tree, tensors = split_state(name, state, copies=False)
        self.files[f"{name}.safetensors"] = tensors
        self.files[f"{name}.json"] = json.dumps(tree)

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """The run's own tensors, by their files and their names there."""
        found = {}
        for file, contents in self.files.items():
            if not isinstance(contents, str) and file not in self.copied:
                for name, tensor in contents.items():
                    found[file, name] = tensor
        return found

    def with_copies(
        self, copies: Mapping[tuple[str, str], Tensor], arrive: Callable[[], None]
    ) -> Snapshot:
        """The same with `copies` in the places of `tensors()`."""
        files = dict(self.files)
        for file, contents in self.files.items():
            if not isinstance(contents, str) and file not in self.copied:
                files[file] = {name: copies[file, name] for name in contents}
        return replace(self, files=files, copied=set(files), arrive=arrive)

    def write(self, directory: Path) -> None:
        """Write every file into an empty directory, and a manifest with their SHA-256."""
        self.arrive()
        for file, contents in self.files.items():
            path = directory / file
            if isinstance(contents, str):
                make_file(path, contents, private=file in self.private)
            elif file in self.copied:
                write_tensors(path, contents)
            else:
                write_tensors(path, host_copies(contents))
        files = {file.name: file_sha256(file) for file in sorted(directory.iterdir())}
        manifest = {"step": self.step, "files": files}
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2))
