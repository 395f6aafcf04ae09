"""What a launcher may not decide: settings in the environment that belong to the config."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.errors import ConfigError
from trainer.process import launcher


@dataclass(frozen=True)
class LauncherSetting:
    """An environment variable of `accelerate launch`, its values that change nothing, and what to do instead."""

    variable: str
    neutral: tuple[str, ...]
    instead: str


SETTINGS = (
    LauncherSetting(
        "ACCELERATE_MIXED_PRECISION", ("no", "fp32"), "set train.precision instead"
    ),
    LauncherSetting(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ("1",),
        "set batch.size and batch.micro_size instead",
    ),
    LauncherSetting(
        "ACCELERATE_DYNAMO_BACKEND", ("no",), "set train.compile=true instead"
    ),
    LauncherSetting(
        "ACCELERATE_USE_DEEPSPEED",
        ("false",),
        "DeepSpeed scales and steps by itself; start plain processes",
    ),
    LauncherSetting(
        "ACCELERATE_USE_MEGATRON_LM",
        ("false",),
        "Megatron-LM scales and steps by itself; start plain processes",
    ),
    LauncherSetting(
        "ACCELERATE_USE_FSDP",
        ("false",),
        "start plain processes, and set train.parallel=fsdp",
    ),
)


def check_launcher_settings(precision: str) -> None:
    """Raise `ConfigError` if the launcher asks for anything besides the config: a run is a function of its config.

    A launcher may repeat the config's own `precision`.
    """
    for setting in SETTINGS:
        value = os.environ.get(setting.variable, "").lower()
        if value and value not in (*setting.neutral, precision):
            raise ConfigError(
                setting.variable,
                f'the launcher asks for "{value}", which the config decides; {setting.instead}',
            )


def check_world_size(joined: int) -> None:
    """Raise `ConfigError` unless every process that was launched has joined the run."""
    launched = launcher.world_size()
    if launched != joined:
        raise ConfigError(
            "WORLD_SIZE",
            f"{launched} processes were launched, and {joined} joined; use launch/*.yaml",
        )
