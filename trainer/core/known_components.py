"""What a run directory from elsewhere may name without more ado: parts of well-known libraries that only build things.

A library as a whole is no such part: `torch.hub.load` downloads and runs code, `torchvision.datasets.LSUN` unpickles.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from trainer.config.import_paths import Role
from trainer.core.observers import Observer

LIBRARIES = ("trainer", "torch", "torchvision", "timm", "transformers", "torchmetrics")

# Modules whose classes a role may take, and what these must be.
CLASSES: Mapping[Role, tuple[type, tuple[str, ...]]] = {
    "model": (
        nn.Module,
        (
            "torch.nn",
            "torchvision.models",
            "timm.models",
            "transformers.models",
            "trainer",
        ),
    ),
    "loss": (nn.Module, ("torch.nn", "torchvision.ops", "timm.loss", "trainer")),
    "optimizer": (
        Optimizer,
        ("torch.optim", "timm.optim", "transformers.optimization", "trainer"),
    ),
    "data": (Dataset, ("torchvision.datasets",)),
    "transform": (object, ("torchvision.transforms", "timm.data", "trainer.data")),
    # Not those that download a network: of images, texts and both together.
    "metric": (
        nn.Module,
        (
            "torchmetrics.aggregation",
            "torchmetrics.classification",
            "torchmetrics.clustering",
            "torchmetrics.detection",
            "torchmetrics.nominal",
            "torchmetrics.regression",
            "torchmetrics.retrieval",
            "torchmetrics.segmentation",
        ),
    ),
    "observer": (Observer, ("trainer",)),
}
# Modules that are imported to look at what a config names in them.
HARMLESS = (
    "torch.nn",
    "torch.optim",
    "torchvision",
    "timm",
    "transformers",
    "torchmetrics",
    "trainer",
)
# Their files are pickles that are not verified.
UNSAFE = ("torchvision.datasets.lsun",)
# Arguments by which a library runs code, or unpickles, that the config or a server chooses.
UNSAFE_ARGUMENTS = (
    "trust_remote_code",
    "code_revision",
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
    "quantization_config",
    "custom_generate",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "weights_only",
)
WANTED: Mapping[Role, str] = {
    "model": "a torch.nn.Module class, a model builder of torchvision or timm, or from_pretrained of transformers",
    "data": "a data set class of torchvision.datasets",
    "sampler": "a sampler of Lockstep's own",
    "transform": "a class of torchvision.transforms",
    "collate": "a collate function of Lockstep's own",
    "loss": "a trainer.Task or a loss class of torch.nn",
    "optimizer": "a torch.optim.Optimizer class",
    "schedule": "a schedule of Lockstep's own",
    "metric": "a class of torchmetrics for classes, labels, values, boxes or retrieval",
    "observer": "a trainer.Observer class",
}


def is_known(role: Role, target: Any) -> bool:
    """True if `target` is one of the known parts for `role`."""
    if role == "model" and (_is_builder(target) or _is_from_pretrained(target)):
        return True
    if role not in CLASSES or not isinstance(target, type):
        return False
    base, modules = CLASSES[role]
    home = home_of(target)
    if _is_within(home, UNSAFE) or not _is_within(home, modules):
        return False
    return issubclass(target, base) and (role != "transform" or _is_callable(target))


def is_of_kind(role: Role, target: Any) -> bool:
    """True if `target`, of a package that the user trusts, may build what `role` needs.

    A class is known to be of the wrong kind. Of a function only the result tells, which is checked where it is called.
    """
    if not isinstance(target, type):
        return callable(target)
    if role in ("schedule", "sampler"):
        return False
    if role == "collate":
        return False  # a class makes no batch
    if role in ("data", "transform"):
        return True
    base, _ = CLASSES[role]
    return issubclass(target, base)


def is_harmless(module: str) -> bool:
    """True for a module of a library whose import does nothing but define things."""
    return _is_within(module, HARMLESS)


def home_of(target: Any) -> str:
    """The module in which a class or a function was defined, whatever module it was taken from."""
    while isinstance(target, functools.partial):
        target = target.func
    if inspect.ismethod(target) and isinstance(target.__self__, type):
        target = target.__self__  # of Model.from_pretrained, the model
    home = getattr(target, "__module__", None)
    return home if isinstance(home, str) else type(target).__module__


def unsafe_arguments(arguments: Any) -> list[str]:
    """The names of `UNSAFE_ARGUMENTS` that are used anywhere in a component's arguments."""
    found = []
    if isinstance(arguments, Mapping):
        for name, value in arguments.items():
            if (
                name in UNSAFE_ARGUMENTS and value not in (None, False)
            ) or _is_other_source(name, value):
                found.append(str(name))
            found += unsafe_arguments(value)
    elif isinstance(arguments, list):
        for item in arguments:
            found += unsafe_arguments(item)
    return found


def _is_other_source(name: Any, value: Any) -> bool:
    """True for timm's `model_name: hf-hub:someone/model`, which takes weights from anywhere."""
    return name == "model_name" and isinstance(value, str) and ":" in value


def _is_builder(target: Any) -> bool:
    """True for a function that torchvision or timm has registered as building a model."""
    if not inspect.isfunction(target):
        return False
    home = target.__module__
    if home == "trainer.components.models":
        return target.__name__ == "small_cnn"
    if _is_within(home, ("torchvision.models",)):
        from torchvision import models

        builders = [models.get_model_builder(name) for name in models.list_models()]
        return target in (*builders, models.get_model)
    if _is_within(home, ("timm.models",)):
        return _is_timm_builder(target)
    return False


def _is_timm_builder(target: Callable[..., Any]) -> bool:
    timm = import_module(
        "timm"
    )  # may be installed or not, also where types are checked
    if target is timm.create_model:
        return True
    name = target.__name__
    return bool(timm.is_model(name)) and timm.model_entrypoint(name) is target


def _is_from_pretrained(target: Any) -> bool:
    if not inspect.ismethod(target) or target.__name__ != "from_pretrained":
        return False
    owner = target.__self__
    if not isinstance(owner, type) or not _is_within(
        owner.__module__, ("transformers.models",)
    ):
        return False
    is_auto_class = owner.__module__.startswith("transformers.models.auto.modeling")
    return is_auto_class or issubclass(owner, nn.Module)


def _is_callable(target: type) -> bool:
    """True if the objects of a class can be called."""
    return any("__call__" in vars(base) for base in target.__mro__)


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(
        module == package or module.startswith(f"{package}.") for package in packages
    )
