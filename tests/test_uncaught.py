"""A mistake in a program of one's own ends as in a command: one message from one rank, and its exit status."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.programs import Program
from trainer.errors import ConfigError, Stopped
from trainer.process import uncaught
from trainer.process.uncaught import UncaughtErrors, report_uncaught_errors

PROGRAM = """
import sys
from trainer import Trainer, load
SETTINGS = ["wandb.mode=disabled", "run.figures=false", "run.dir={folder}"]
Trainer(load("configs/digits.yaml", SETTINGS + sys.argv[1:])).fit()
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # While the config is read, and when torch has set its own hook.
        ("optimizer.lr=-1", "optimizer.lr: -1.0 is less than 0"),
        ("model.depth=3", "model.depth: small_cnn has no such argument"),
        ("wandb.some_api_key=very-secret", "wandb.some_api_key: no such key"),
    ],
)
def test_ranks_report_a_mistake_once(
    override: str, message: str, tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(folder=tmp_path / "runs"))
    program = Program([script, override], ranks=2)
    ended = program.wait(240)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1
    assert "very-secret" not in ended.stderr


class HookBefore:
    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []

    def __call__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        self.errors.append(error)


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> HookBefore:
    hook = HookBefore()
    monkeypatch.setattr(sys, "excepthook", hook)
    return hook


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), KeyboardInterrupt(), MemoryError()]
)
def test_other_errors_are_left_to_the_hook_before(
    error: BaseException, before: HookBefore
) -> None:
    report_uncaught_errors()
    report_uncaught_errors()
    sys.excepthook(type(error), error, None)
    assert before.errors == [error]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a.b", "is wrong"), 2, "error: a.b: is wrong\n"),
        (Stopped("stopped", 15), 143, "stopped\n"),
    ],
)
def test_the_status_and_the_message_are_those_of_the_error(
    error: Exception,
    status: int,
    message: str,
    before: HookBefore,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report_uncaught_errors()
    with pytest.raises(SystemExit) as leaving:
        sys.excepthook(type(error), error, None)
    assert leaving.value.code == status
    assert capsys.readouterr().err == message
    assert before.errors == []


def test_a_prompt_goes_on(
    before: HookBefore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    error = ConfigError("a.b", "is wrong")
    UncaughtErrors()(ConfigError, error, None)
    assert capsys.readouterr().err == "error: a.b: is wrong\n"


@pytest.mark.parametrize(
    ("error", "is_recorded"),
    [
        (ConfigError("a.b", "is wrong"), True),
        (ValueError("a defect"), True),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_failed_trial_of_a_sweep_is_recorded(
    error: BaseException,
    is_recorded: bool,
    before: HookBefore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[BaseException] = []
    monkeypatch.setattr(uncaught, "record_failure", recorded.append)
    with suppress(SystemExit):
        UncaughtErrors()(type(error), error, None)
    assert recorded == ([error] if is_recorded else [])
