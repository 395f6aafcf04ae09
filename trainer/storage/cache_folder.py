"""The caches of decoded images below a `data.cache_dir`: what each holds, and its removal."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.data.image_store import ABOUT_FILE
from trainer.errors import LockstepError
from trainer.storage.cache_build import is_being_made
from trainer.storage.decoded_cache import read_about

MB = 10**6


@dataclass(frozen=True)
class Cache:
    """One cache: its folder, and what its `about.json` says."""

    path: Path
    about: dict[str, Any]

    def describe(self) -> str:
        """A line: name, images, short side, size, last use, and the root of the files."""
        side = self.about["short_side"]
        size = "whole images" if side is None else f"short side {side}"
        used = datetime.fromtimestamp((self.path / ABOUT_FILE).stat().st_mtime)
        facts = [
            self.path.name,
            f"{self.about['images']:,} images of {self.about['root']}",
            size,
            f"{self.size() / MB:,.1f} MB",
            f"last used {used:%Y-%m-%d %H:%M}",
        ]
        if not self._is_whole():
            facts.append("not complete")
        return " · ".join(facts)

    def clear(self) -> str:
        """Remove it, unless a run makes or uses it now; a line that says what was done."""
        if is_being_made(self.path):
            return f"{self.path.name} is kept: it is being made"
        size = self.size()
        try:
            with (self.path / ABOUT_FILE).open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return f"{self.path.name} is kept: a run uses it"
                shutil.rmtree(self.path)
        except OSError as error:
            raise LockstepError(
                f"{self.path} cannot be removed ({error.strerror})"
            ) from None
        return f"{self.path.name} is removed: {size / MB:,.1f} MB"

    def size(self) -> int:
        """Bytes of its files. What a run that makes it renames meanwhile may be left out."""
        total = 0
        for file in self.path.iterdir():
            with suppress(FileNotFoundError):
                total += file.stat().st_size
        return total

    def _is_whole(self) -> bool:
        chunks: int = -(-self.about["images"] // self.about["chunk_size"])
        return len(list(self.path.glob("[0-9]*.json"))) == chunks


def caches_in(cache_dir: Path) -> Iterator[Cache]:
    """The caches below a folder, by name. Folders that are no cache are passed over."""
    for path in sorted(cache_dir.iterdir()):
        about = read_about(path)
        if about is not None:
            yield Cache(path, about)
