"""A model's head, its last layer: found, and made to fit the classes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from trainer.errors import ConfigError, nearest
from trainer.exact.seeding import key, preserved_cpu_generators, seed_cpu

ENDS = ("fc", "_fc", "classifier", "head", "heads")  # where models keep it; in any other, the last layer defined
HEADLESS = {  # packages of models whose output is more than one layer's, and what they do
    "torchvision.models.detection": "detects objects",
    "torchvision.models.segmentation": "segments images",
    "torchvision.models.optical_flow": "computes optical flow",
}


def find_head(model: nn.Module, given: str | None) -> str:
    """The dotted name of the model's last linear or convolutional layer; `given` is `model.head`, where it is set."""
    if given is not None:
        names = [name for name, _ in model.named_modules() if name]
        if given not in names:
            raise ConfigError("model.head", f'the model has no module "{given}"{nearest(given, names)}')
        return given
    for package, does in HEADLESS.items():
        if type(model).__module__.startswith(package):
            raise ConfigError(
                "model.name",
                f"{type(model).__name__} {does} and has no one head for classes; name a classifier, or set model.head",
            )
    layers: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)]
    if not layers:
        raise ConfigError("model.head", "the model has no linear or convolutional layer; name its head")
    at_end = [name for name in layers if name.partition(".")[0] in ENDS]
    return (at_end or layers)[-1]


def fit_head(model: nn.Module, head: str, outputs: int, seed: int) -> bool:
    """Give the model a new head of `outputs` outputs, drawn by `seed` alone, unless it has as many; whether it did."""
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
    """How many outputs the head has; None where it is no single layer."""
    layer = model.get_submodule(head)
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, _ConvNd) else None
