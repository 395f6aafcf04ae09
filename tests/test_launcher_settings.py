"""What a launcher asks for besides the config is refused: a run is a function of its config."""

from __future__ import annotations

import pytest

from trainer import ConfigError
from trainer.process.launcher_settings import (
    SETTINGS,
    check_launcher_settings,
    check_world_size,
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "instead"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "set train.precision instead"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "set batch.size and batch.micro_size instead",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "set train.compile=true instead"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "start plain processes"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "start plain processes"),
        ("ACCELERATE_USE_FSDP", "true", "set train.parallel=fsdp"),
    ],
)
def test_another_decider_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, instead: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        ConfigError,
        match=f'{variable}: the launcher asks for "{value.lower()}".*{instead}',
    ):
        check_launcher_settings("fp32")


def test_values_that_change_nothing_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launcher_settings("fp32")
    for setting in SETTINGS:
        for value in ("", setting.neutral[0].upper()):
            monkeypatch.setenv(setting.variable, value)
            check_launcher_settings("fp32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what the config says too
    check_launcher_settings("bf16")


def test_processes_that_did_not_join_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_world_size(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(
        ConfigError, match="WORLD_SIZE: 2 processes were launched, and 1 joined"
    ):
        check_world_size(1)
