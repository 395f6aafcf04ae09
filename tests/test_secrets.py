"""Secrets of a config, of the command line and of the environment: nothing that is printed or written shows one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer import ConfigError, Trainer, load
from trainer.__main__ import main
from trainer.config.schema import Config
from trainer.config.secrets import redacted_message, redacted_output
from trainer.reporting.console import Console
from trainer.sweep.description import read_sweep
from trainer.sweep.study import Trial
from trainer.sweep.table import format_line, list_cells

SECRET = "sk-'quoted'-4711"

CODE = """
from torch import nn, optim

def refuse(token, **others):
    raise ValueError(f"no access with {token!r}, {others}")

class Refuses(nn.Module):
    def __init__(self, token, **others):
        refuse(token)

class RefusingOptimizer(optim.SGD):
    def __init__(self, params, lr, token):
        refuse(token)

class Fails(nn.Module):
    def __init__(self, num_classes, token=""):
        super().__init__()
        self.token = token
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images):
        raise ZeroDivisionError(f"with {self.token}")
"""

BASE = ["run.figures=false", "wandb.mode=disabled", "train.max_steps=2"]


@pytest.fixture(scope="module", autouse=True)
def code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("packages")
    (directory / "secretive_code.py").write_text(CODE)
    sys.path.insert(0, str(directory))
    yield
    sys.path.remove(str(directory))


def config_file(directory: Path, text: str) -> str:
    path = directory / "config.yaml"
    path.write_text(f"run: {{dir: {directory}, name: run}}\n{text}")
    return str(path)


def assert_hidden(output: Any) -> None:
    for text in (output.out, output.err):
        assert SECRET not in text
        assert "4711" not in text
    assert "<redacted>" in output.err + output.out


SECTIONS = {
    "model": 'model: {name: secretive_code.refuse, token: "SECRET"}',
    "optimizer": 'optimizer: {name: secretive_code.RefusingOptimizer, token: "SECRET"}',
    "loss": 'loss: {name: secretive_code.Refuses, token: "SECRET"}',
    "data": 'data: {name: secretive_code.refuse, token: "SECRET"}',
    "nested": 'data: {name: secretive_code.refuse, token: {a: ["SECRET"]}}',
    "transform": 'data: {train_transforms: [{name: secretive_code.refuse, token: "SECRET"}]}',
    "schedule": 'schedule: {name: secretive_code.refuse, token: "SECRET"}',
    "observer": 'observers: [{name: secretive_code.refuse, token: "SECRET"}]',
    "environment": 'model: {name: secretive_code.refuse, token: x, other: "${oc.env:HIDDEN_OTHER}"}',
    "traceback": 'model: {name: secretive_code.Fails, token: "SECRET"}',
    "broken file": 'model: {token: "SECRET"',
    "broken flow": 'model: {name: small_cnn}\nmodel token: "SECRET": x',
}


@pytest.mark.parametrize("name", SECTIONS)
def test_no_error_prints_a_secret(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HIDDEN_OTHER", SECRET)
    path = config_file(tmp_path, SECTIONS[name].replace("SECRET", SECRET))
    assert main(["train", path, *BASE]) == (1 if name == "traceback" else 2)
    output = capsys.readouterr()
    assert "4711" not in output.err + output.out
    assert "error: " in output.err or "Traceback" in output.err
    assert "<redacted>" in output.err or "broken" in name


@pytest.mark.parametrize("name", ["model", "nested"])
def test_the_error_itself_hides_it_from_who_prints_it(name: str) -> None:
    """As in a notebook, where Python prints the error."""
    section, _, rest = SECTIONS[name].replace("SECRET", SECRET).partition(": ")
    import yaml

    config = Config.from_dict({section: yaml.safe_load(rest)})
    with pytest.raises(ConfigError) as error:
        Trainer(config)
    assert "4711" not in str(error.value)
    assert "<redacted>" in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "a", "b", f"model.token={SECRET}"],
        ["evaluate", "nowhere", f"--model.token={SECRET}", f"x {SECRET}"],
        ["train", f"model.token=[{SECRET}"],
        ["train", f"run.token={SECRET}", f"{SECRET}.yaml"],
    ],
)
def test_a_mistake_on_the_command_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert "4711" not in output.err.replace(f"[{SECRET}", "")
    assert output.err.startswith("error: ")


def test_a_refused_resume_and_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What no process has remembered: the secrets and logins of an earlier one are in the checkpoint alone.
    first = "num_classes: 10, token: earlier-secret-4711"
    code = tmp_path / "resumed_code.py"
    code.write_text(
        "from trainer.components.models import small_cnn\n"
        "def build(num_classes, token, url=''): return small_cnn(num_classes, width=2)\n"
    )
    sys.path.insert(0, str(tmp_path))
    text = f"model: {{name: resumed_code.build, {first}, url: 'http://me:4711@host/a'}}"
    assert main(["train", config_file(tmp_path, text), *BASE]) == 0
    from trainer.config import secrets

    secrets._secrets.clear()
    text = "model: {name: resumed_code.build, num_classes: 10, token: later-secret-4711, url: 'http://me:4711@host/b'}"
    again = [config_file(tmp_path, text), *BASE, "run.resume=auto"]
    assert main(["train", *again]) == 2
    output = capsys.readouterr()
    assert_hidden(output)
    assert "model.token was <redacted> and is <redacted>" in output.err
    assert main(["train", config_file(tmp_path, text), *BASE, "run.name=other"]) == 0
    secrets._secrets.clear()
    capsys.readouterr()
    main(["compare", str(tmp_path / "run"), str(tmp_path / "other")])
    output = capsys.readouterr()
    assert_hidden(output)
    assert "model.token: <redacted> | <redacted>" in output.out
    sys.path.remove(str(tmp_path))
    for run in ("run", "other"):
        assert_private(tmp_path / run, 0o600)


def assert_private(run: Path, mode: int) -> None:
    state = next(run.glob("checkpoints/step_*/state.json"))
    for file in (run / "config.yaml", run / "best/config.yaml", state):
        assert file.stat().st_mode & 0o777 == mode, file


def test_files_without_a_secret_follow_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN_WIDTH", "hidden")
    monkeypatch.setenv("SOME_PLACE", str(tmp_path))
    before = os.umask(0o027)
    try:
        overrides = ["run.name=run", "run.dir=${oc.env:SOME_PLACE}", *BASE]
        Trainer(load("configs/digits.yaml", overrides)).fit()
    finally:
        os.umask(before)
    assert_private(tmp_path / "run", 0o640)


def test_a_place_from_the_environment_is_shown_here_and_sent_to_nobody(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SOME_PLACE", str(tmp_path / "place"))
    monkeypatch.setenv("SOME_KEY", SECRET)
    load(
        None,
        ["run.dir=${oc.env:SOME_PLACE}", "data.note=${oc.env:SOME_KEY}"],
    )
    text = f"{tmp_path}/place/run with {SECRET} of http://me:{SECRET}@host"
    shown = f"{tmp_path}/place/run with <redacted> of http://<redacted>@host"
    assert redacted_output(text) == shown
    assert redacted_message(text) == shown.replace(f"{tmp_path}/place", "<redacted>")
    console = Console(active=True)
    console.header([("run", text)])
    console.note(text)
    console.summary([("files", text)])
    assert_hidden(capsys.readouterr())


def test_a_sweep_over_secrets_shows_none(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "program: train.py\nmethod: grid\nmetric: {name: val/loss, goal: minimize}\n"
        "command: ['${env}', python, '${program}', '${args_no_hyphens}']\n"
        f'parameters: {{model.token: {{values: ["{SECRET}", "{SECRET}2"]}}, optimizer.lr: {{values: [1, 2]}}}}\n'
    )
    sweep = read_sweep(file)
    trial = Trial(0, {"model.token": SECRET, "optimizer.lr": 1})
    trial.state = "running"
    for text in (format_line(sweep, trial), " ".join(list_cells(sweep, trial))):
        assert "4711" not in text
        assert "<redacted>" in text
