"""WebDataset's shards, tar files of many samples, read by number: an index says where each sample's bytes lie.

python -m examples.formats.tar_shards PATH/train/*.tar        # write the indices once; without them, each start reads
                                                              # through the headers of all shards

In a shard, neighbouring files of one name are one sample: `000017.jpg` and `000017.cls`, which holds the number of its
class as text. Nothing but the standard library, NumPy and Pillow is needed.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
CLASS_TYPE = ".cls"
Index = npt.NDArray[
    np.int64
]  # (samples, 3): where the image begins, its bytes, the class


class TarShards:
    """The samples of `root/train/*.tar` or `root/val/*.tar`: shards in the order of their names, each from its start.

    `paths` and `targets` hold each sample's place and class, by which messages name it and a resume knows it again.
    """

    def __init__(self, root: str, train: bool) -> None:
        folder = Path(root).expanduser() / ("train" if train else "val")
        self.shards = sorted(folder.glob("*.tar"))
        if not self.shards:
            raise ValueError(f"{folder} holds no .tar files")
        indices = [_index_of(shard) for shard in self.shards]
        counts = [len(index) for index in indices]
        self._shard_of = np.repeat(np.arange(len(counts)), counts)
        self._index = np.concatenate(indices)
        self.targets = self._index[:, 2].tolist()
        names = [shard.name for shard in self.shards]
        starts = self._index[:, 0].tolist()
        self.paths = [
            f"{names[shard]}@{start}"
            for shard, start in zip(self._shard_of, starts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        """An image in RGB and its class."""
        start, size, target = self._index[number].tolist()
        # Opened anew: an open file's position would be shared with forked loader processes.
        with self.shards[self._shard_of[number]].open("rb") as file:
            file.seek(start)
            content = file.read(size)
        return Image.open(io.BytesIO(content)).convert("RGB"), target


def _index_of(shard: Path) -> Index:
    """The index beside a shard if it is not older, else one that is made now."""
    path = index_path(shard)
    if path.is_file() and path.stat().st_mtime >= shard.stat().st_mtime:
        index: Index = np.load(path)
        return index
    return make_index(shard)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def make_index(shard: Path) -> Index:
    """Read through a shard's headers. Raises `ValueError` for a sample that lacks its image or its class."""
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            name, _, kind = member.name.partition(".")
            if f".{kind}".lower() in IMAGE_TYPES:
                images[name] = member.offset_data, member.size
            elif f".{kind}" == CLASS_TYPE:
                content = archive.extractfile(member)
                assert content is not None
                classes[name] = int(content.read())
    for name in images.keys() ^ classes.keys():
        raise ValueError(f"{shard}: {name} lacks its image or its {CLASS_TYPE}")
    rows = [(*images[name], classes[name]) for name in images]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        np.save(index_path(Path(argument)), make_index(Path(argument)))
