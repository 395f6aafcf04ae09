"""Weights to begin with: torchvision's by name, or a file's; and an account of what was taken from them.

A file is safetensors, or a state dict as `torch.save` writes it (plain, or under "state_dict" or "model"; a prefix
`module.` on every name is dropped). It is read as tensors alone: no code in it can run.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.components.heads import find_head, fit_head
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError, nearest

FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PATIENCE = 20.0  # seconds that a server may be silent
First = Callable[[], AbstractContextManager[None]]  # within it, one process of each machine goes ahead of the others


def torchvision_weights(section: ModelConfig) -> Any | None:
    """The torchvision weights that `model.weights` names; None where it names a file or nothing."""
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
            f"({', '.join(FILES)})",
        ) from None
    if name not in choices.__members__:
        known = list(choices.__members__)
        raise ConfigError(
            "model.weights",
            f'{section.name} has {", ".join(known)}, not "{name}"; set one of them or a file '
            f"({', '.join(FILES)}){nearest(name, known)}",
        )
    return choices[name]


def weights_file(section: ModelConfig, first: First) -> Path | None:
    """The file that holds the weights of `model.weights`, downloaded once for each machine where it must be."""
    if section.weights is None:
        return None
    named = torchvision_weights(section)
    if named is None:
        return Path(section.weights).expanduser()
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(named.url).path).name)
    download(named.url, path, first)
    return path


def download(url: str, path: Path, first: First) -> None:
    """Have `url` at `path`, complete or not at all. Where the file is there, the network is left alone."""
    with first():
        if path.is_file():
            return
        digest = path.stem.rpartition("-")[2] if "-" in path.stem else None  # as torchvision names its files
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _impatient():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                "model.weights",
                f"{path} is missing and cannot be downloaded ({error}); download {url} elsewhere and put it there, "
                f"or set model.weights to a file",
            ) from None


def start_from_weights(
    path: Path | None, model: nn.Module, section: ModelConfig, outputs: int | None, seed: int
) -> str:
    """Give `model` the weights of `path` and a head of `outputs` outputs; returns an account of it in one line.

    Without weights, a head is replaced only where `model.head` names it: what a last layer is for, its author knows.
    """
    if path is None and section.head is None:
        return ""
    head = find_head(model, section.head)
    account = [load_weights(model, path, head)] if path is not None else []
    if outputs is not None and fit_head(model, head, outputs, seed):
        account.append(f"new head {head} with {outputs} outputs")
    return " · ".join(account)


def load_weights(model: nn.Module, path: Path, head: str) -> str:
    """Load a file's tensors into `model`; what fits the head's shape no more is left as it was drawn.

    Returns an account of it in one line. Raises `ConfigError`, naming them, if other tensors are missing or of
    another shape.
    """
    given, own = _read(path), model.state_dict()
    odd = {name for name in own if name not in given or given[name].shape != own[name].shape}
    replaced = {name for name in odd if name.startswith(f"{head}.")}
    wrong = {name for name in odd - replaced if name in given or not name.endswith("num_batches_tracked")}
    unexpected = sorted(given.keys() - own.keys())
    if wrong:
        missing = [name if name not in given else f"{name} (another shape)" for name in own if name in wrong]
        raise ConfigError(
            "model.weights",
            f"{path} lacks {len(wrong)} of the model's {len(own)} tensors: {_first(missing)}"
            + (f"; it has {len(unexpected)} that the model lacks: {_first(unexpected)}" if unexpected else "")
            + "; name the model that it was made for",
        )
    model.load_state_dict({name: given[name] for name in own if name not in odd}, strict=False)
    account = [f"{len(own) - len(odd)} of {len(own)} tensors of {path.name}"]
    account += [f"new: {_first(sorted(replaced))}"] if replaced else []
    account += [f"{len(unexpected)} not used: {_first(unexpected)}"] if unexpected else []
    return " · ".join(account)


def _is_file(name: str) -> bool:
    return name.endswith(FILES) or "/" in name


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or "it is empty").splitlines()[0]
        raise ConfigError(
            "model.weights", f"{path} cannot be read ({reason}); give a {' or '.join(FILES)} file"
        ) from None
    except pickle.UnpicklingError:
        raise ConfigError(
            "model.weights", f"{path} holds more than tensors, which is not read; save the model's state_dict() alone"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(tensor, Tensor) for tensor in tree.values()):
        raise ConfigError("model.weights", f"{path} holds no state dict; save the model's state_dict() alone")
    wrapped = all(name.startswith("module.") for name in tree)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tree.items()}


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


@contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
