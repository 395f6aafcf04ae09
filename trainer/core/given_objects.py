"""What a program passes to `Trainer`, looked at before anything is built."""

from __future__ import annotations

from torch import nn

from trainer.config.schema import Config
from trainer.errors import ConfigError


def check_given(config: object, model: object) -> None:
    """Raise `ConfigError` unless `config` is a `Config`, and `model` a module or None."""
    if not isinstance(config, Config):
        raise ConfigError(
            "config",
            f"{_describe(config)}; make one by Config.from_dict({{…}}) or trainer.load(path)",
        )
    if model is None or isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        problem = f"{model.__name__} is a class; give an object, {model.__name__}(…)"
    else:
        problem = (
            f"{_describe(model)}; give a torch.nn.Module, or name one in model.name"
        )
    raise ConfigError("model", problem)


def _describe(value: object) -> str:
    name = getattr(value, "__name__", repr(value))
    return f"{name[:60]} is a {type(value).__name__}"
