"""How a model is called with a batch's inputs, and which of its outputs a loss of scores takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import ConfigError

# What libraries call the one output that a loss takes.
SCORES = ("logits", "out")
# By model: the names that its forward takes, and whether it takes nothing by position.
_parameters: WeakKeyDictionary[nn.Module, tuple[frozenset[str], bool]] = (
    WeakKeyDictionary()
)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`; `model(**inputs)` if they are a dict whose keys are all names of the forward's parameters."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Mapping):
        return model(inputs)
    return model(**inputs) if takes_by_name(model, inputs) else model(inputs)


def takes_by_name(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    """True if the entries of `inputs` are arguments of the model's forward, each by its name."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if inner not in _parameters:
        _parameters[inner] = _named_parameters(inner)
    names, takes_only_names = _parameters[inner]
    if not all(isinstance(key, str) for key in inputs):
        return False
    return takes_only_names or (bool(inputs) and names.issuperset(inputs))


def _named_parameters(model: nn.Module) -> tuple[frozenset[str], bool]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # of a compiled program, say
        return frozenset(), False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = frozenset(p.name for p in parameters if p.kind in by_name)
    kinds = {p.kind for p in parameters}
    takes_any_name = inspect.Parameter.VAR_KEYWORD in kinds
    takes_position = kinds - {
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    return names, takes_any_name and not takes_position


def scores_of(output: Any) -> Any:
    """The tensor of scores of a library's output: its `logits` (transformers) or `out` (torchvision); else as it is.

    Raises `ConfigError` for one with auxiliary scores, which would go into no loss.
    """
    values = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    scores = []
    for name in SCORES:
        if isinstance(values.get(name), Tensor):
            scores.append(values[name])
    if len(scores) != 1:
        return output
    for name, value in values.items():
        if str(name).startswith("aux") and value is not None:
            raise ConfigError(
                "loss.name",
                f'the model gives "{name}" besides its scores, which this loss would leave out; build the model '
                f"without it (model.aux_loss=false in torchvision), or name a Task of your own",
            )
    return scores[0]
