"""A model's head, its last layer: how to find it and fit it to the number of classes. Names of modules."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from trainer.errors import ConfigError, nearest
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu

# Where models keep it; elsewhere, the last layer defined.
HEAD_NAMES = ("fc", "_fc", "classifier", "head", "heads")
# Packages of models whose output comes from more than one layer, and what those models do.
WITHOUT_HEAD = {
    "torchvision.models.detection": "detects objects",
    "torchvision.models.segmentation": "segments images",
    "torchvision.models.optical_flow": "computes optical flow",
}


def find_head(model: nn.Module, name: str | None) -> str:
    """The dotted name of the model's last linear or convolutional layer; or `name`, which is `model.head` if it is set.

    Raises `ConfigError` if the model has no such module, or no single head.
    """
    modules = {
        module_name: module
        for module_name, module in model.named_modules()
        if module_name
    }
    if name is not None:
        if name not in modules:
            raise ConfigError(
                "model.head",
                f'the model has no module "{name}"{nearest(name, modules)}',
            )
        return name
    for package, verb in WITHOUT_HEAD.items():
        if type(model).__module__.startswith(package):
            raise ConfigError(
                "model.name",
                f"{type(model).__name__} {verb} and has no one head for classes; name a classifier, or set model.head",
            )
    layers: list[str] = [
        dotted
        for dotted, module in modules.items()
        if isinstance(module, nn.Linear | _ConvNd)
    ]
    if not layers:
        raise ConfigError(
            "model.head",
            "the model has no linear or convolutional layer; name its head",
        )
    heads = [layer for layer in layers if layer.partition(".")[0] in HEAD_NAMES]
    return (heads or layers)[-1]


def fit_head(model: nn.Module, head: str, outputs: int, seed: int) -> bool:
    """Replace the model's head by one with `outputs` outputs, unless it has as many; True if it was replaced.

    The new weights are drawn by `seed` alone. Raises `ConfigError` if the head is not an `nn.Linear`.
    """
    old = model.get_submodule(head)
    if head_outputs(model, head) == outputs:
        return False
    if not isinstance(old, nn.Linear):
        raise ConfigError(
            "model.head",
            f'"{head}" is a {type(old).__name__}, and only a Linear can be replaced; name one, or let the model take '
            f"num_classes",
        )
    with preserved_cpu_generators():
        seed_cpu(key(seed, "head"))
        new = nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    model.set_submodule(head, new.to(old.weight.device, old.weight.dtype))
    return True


def head_outputs(model: nn.Module, head: str) -> int | None:
    """How many outputs the head has; None if it is not a single layer."""
    layer = model.get_submodule(head)
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, _ConvNd) else None


def parent_names(name: str) -> list[str]:
    """The dotted names of the modules around a module or parameter, the innermost first; not the model's own, ""."""
    parts = name.split(".")
    parents = []
    while len(parts) > 1:
        parts.pop()
        parents.append(".".join(parts))
    return parents
