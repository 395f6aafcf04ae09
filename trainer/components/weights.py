"""Pretrained weights, torchvision's by name or those of a file, and a line that says what was loaded.

A file is safetensors, an index of several, or what `torch.save` writes: a state dict, alone or in a checkpoint. Names
with a wrapper's prefix are recognised (see `weight_names`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from trainer.components.heads import find_head, fit_head
from trainer.components.state_files import FILE_TYPES, read_state_dicts
from trainer.components.weight_names import match_names
from trainer.config.model_sections import ModelConfig
from trainer.errors import ConfigError, LockstepError, first_few, nearest

SERVER_TIMEOUT = 20.0  # seconds that a server may be silent during a download
# Within it, one process goes before the others.
MainFirst = Callable[[], AbstractContextManager[None]]


def torchvision_weights(section: ModelConfig) -> Any | None:
    """The torchvision weights that `model.weights` names; None if it names a file or nothing."""
    name = section.weights
    if name is None or _is_file(name):
        return None
    from torchvision import models

    try:
        choices = models.get_model_weights(section.name)
    except ValueError:
        raise ConfigError(
            "model.weights",
            f'"{name}" names weights of a torchvision model, which {section.name} is not; give a file '
            f"({', '.join(FILE_TYPES)})",
        ) from None
    if name not in choices.__members__:
        names = list(choices.__members__)
        raise ConfigError(
            "model.weights",
            f'{section.name} has {", ".join(names)}, not "{name}"; set one of them or a file '
            f"({', '.join(FILE_TYPES)}){nearest(name, names)}",
        )
    return choices[name]


def weights_file(section: ModelConfig, main_first: MainFirst) -> Path | None:
    """The file with the weights of `model.weights`, downloaded once per machine if it is not there."""
    if section.weights is None:
        return None
    weights = torchvision_weights(section)
    if weights is None:
        return Path(section.weights).expanduser()
    file_name = Path(urlparse(weights.url).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", file_name)
    download(weights.url, path, main_first)
    return path


def download(url: str, path: Path, main_first: MainFirst) -> None:
    """Download `url` to `path`, completely or not at all. If the file is there, the network is not used."""
    with main_first():
        if path.is_file():
            return
        # Torchvision puts the start of the SHA-256 there.
        _, dash, digest = path.stem.rpartition("-")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _timeout(SERVER_TIMEOUT):
                torch.hub.download_url_to_file(
                    url, str(path), hash_prefix=digest if dash else None, progress=False
                )
        except (OSError, RuntimeError) as error:
            message = (
                f"{path} is missing and cannot be downloaded ({error}); download {url} elsewhere and put it there, "
                f"or set model.weights to a file"
            )
            # An `OSError` is the network's or the disk's.
            if isinstance(error, OSError):
                raise LockstepError(f"model.weights: {message}") from None
            raise ConfigError("model.weights", message) from None


def start_from_weights(
    path: Path | None,
    model: nn.Module,
    section: ModelConfig,
    outputs: int | None,
    seed: int,
) -> str:
    """Load the weights of `path` into `model`, give it a head of `outputs` outputs, and say so in one line.

    Without weights, a head is replaced only if `model.head` names it: what a last layer is for, its author knows.
    """
    if section.weights_key is not None and path is None:
        raise ConfigError(
            "model.weights_key", "does nothing without model.weights, a file"
        )
    if path is None and section.head is None:
        return ""
    head = find_head(model, section.head)
    notes: list[str] = []
    if path is not None:
        notes.append(load_weights(model, path, head, section.weights_key))
    if outputs is not None and fit_head(model, head, outputs, seed):
        notes.append(f"new head {head} with {outputs} outputs")
    return " · ".join(notes)


def load_weights(
    model: nn.Module, path: Path, head: str, key: str | None = None
) -> str:
    """Load a file's tensors into `model`, and say in one line what was loaded.

    `key` is `model.weights_key`. Tensors of the head that do not fit keep their initial values. Raises `ConfigError`,
    naming them, if other tensors are missing or have another shape.
    """
    own = model.state_dict()
    match = match_names(read_state_dicts(path), own, str(path), key)
    source = match.tensors
    fitting = {}
    for name, tensor in own.items():
        if name in source and source[name].shape == tensor.shape:
            fitting[name] = source[name]
    unused = sorted(source.keys() - own.keys())
    new: list[str] = []
    misfits: list[str] = []
    for name in own.keys() - fitting.keys():
        # Files from before PyTorch 0.4.1 have none.
        is_counter = name.endswith("num_batches_tracked")
        if name.startswith(f"{head}."):
            new.append(name)
        elif name in source or not is_counter:
            misfits.append(name)
    if misfits:
        in_order = [name for name in own if name in misfits]
        _refuse(path, in_order, unused, source, own)
    model.load_state_dict(fitting, strict=False)
    notes = [f"{len(fitting)} of {len(own)} tensors of {path.name}"]
    if match.note:
        notes.append(match.note)
    if new:
        notes.append(f"new: {first_few(sorted(new), 3)}")
    if unused:
        notes.append(f"{len(unused)} not used: {first_few(unused, 3)}")
    return " · ".join(notes)


def _refuse(
    path: Path,
    misfits: list[str],
    unused: list[str],
    source: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> NoReturn:
    names = [f"{name} (another shape)" if name in source else name for name in misfits]
    message = f"{path} lacks {len(names)} of the model's {len(own)} tensors: {first_few(names, 3)}"
    if unused:
        message += (
            f"; it has {len(unused)} that the model lacks: {first_few(unused, 3)}"
        )
    fitting = sum(
        1 for name in own if name in source and source[name].shape == own[name].shape
    )
    raise ConfigError(
        "model.weights",
        f"{message}; {fitting} fit by name and shape, at best. Name the model that it was made for",
    )


def _is_file(name: str) -> bool:
    return name.endswith(FILE_TYPES) or "/" in name


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Sockets opened within it fail after so many seconds of silence: torch.hub has no argument for that."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
