"""Whole runs with the real client and a loopback server: what the server receives, and what its failures cost."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.wandb_server import WandbServer
from tests.distributed.ranks import on_ranks
from tests.distributed.small import Images, Points, config, conv_net, mlp
from trainer import LockstepError, Trainer
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.exact.plan import Step
from trainer.process.signals import stop_run
from trainer.reporting.jsonl import read_rows
from trainer.reporting.wandb import client
from trainer.reporting.wandb.sync import send_missing

ONLINE = {
    "wandb__mode": "auto",
    "wandb__init_timeout": 60,
    "wandb__finish_timeout": 60,
    "run__resume": "auto",
}
# Where the server is away.
SHORT_START = ONLINE | {"wandb__init_timeout": 2}
SHORT_END = ONLINE | {"wandb__finish_timeout": 2}
SHORT = SHORT_START | {"wandb__finish_timeout": 2}


class Pausing(Trainer):
    """Waits for the file `go` after its second epoch; removes the file `waiting` to say so."""

    def end_epoch(self, step: Step) -> None:
        super().end_epoch(step)
        if (
            step.epoch == 1
            and (waiting := self.journal.directory.parent / "waiting").exists()
        ):
            waiting.unlink()
            until = time.monotonic() + 120
            while not (waiting.parent / "go").exists() and time.monotonic() < until:
                time.sleep(0.02)


class Dying(Trainer):
    """Is killed together with the client's service, as when a node fails, after the last step but one."""

    def log(self, step: Step) -> None:
        super().log(step)
        if step.number == self.plan.total_steps - 1:
            self.finish_saving()
            time.sleep(0.5)  # until the client has written its rows to the disk
            os.kill(os.getpid(), signal.SIGKILL)


class StoppedTwice(Trainer):
    """Is stopped at W&B: by the SIGTERM of the agent above it, and after its first step by the client in it."""

    def _introduce(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super()._introduce()

    def train_step(self, step: Step) -> None:
        super().train_step(step)
        client_asked.wait(30)


class Revealing(Trainer):
    """Fails with secrets in its message."""

    def train_step(self, step: Step) -> None:
        raise RuntimeError("no from-the-environment, under-a-key, http://me:login@host")


class Diverging(Trainer):
    """Its weights become NaN in step 3."""

    def train_step(self, step: Step) -> None:
        super().train_step(step)
        if step.number == 3:
            torch.nn.init.constant_(next(self.module.parameters()), torch.nan)


client_asked = threading.Event()


@pytest.fixture(scope="module", autouse=True)
def _imported_before_the_ranks_are_forked() -> None:
    """By the one worker that runs this file: it takes a second and a half."""
    importlib.import_module("wandb.sdk.launch")


def train_stopped(settings: Config, server: WandbServer) -> Any:
    """`train`, in which the client's wish to stop is also noted."""

    def stop() -> None:
        stop_run()
        client_asked.set()

    setattr(client, "stop_run", stop)  # noqa: B010
    return train(settings, server, StoppedTwice)


@pytest.fixture
def server() -> Any:
    with WandbServer() as running:
        yield running
    assert running.backend.unknown == []


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tmp_path` as the home directory, without a W&B login: whatever the client writes stays there."""
    for name in [
        name
        for name in os.environ
        if name.startswith("WANDB_") and name != "WANDB_ERROR_REPORTING"
    ]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path


def train(
    settings: Config,
    server: WandbServer,
    kind: type[Trainer] = Trainer,
    *,
    images: bool = False,
    online: bool = True,
) -> Any:
    """Train in this process, a rank; returns its output, its error message, and the seconds it took."""
    server.let_go()
    os.environ |= server.environment if online else {"WANDB_MODE": "offline"}
    output = io.StringIO()
    message = ""
    start = time.monotonic()
    model = conv_net() if images else mlp()
    train_data = Images(60) if images else Points(60, ignored=False)
    val_data = Images(30) if images else Points(30, ignored=False)
    with contextlib.redirect_stdout(output):
        try:
            kind(settings, model=model, train_data=train_data, val_data=val_data).fit()
        except Exception as error:
            message = str(error)
    return output.getvalue(), message, time.monotonic() - start


def send(run: Path, server: WandbServer) -> str:
    server.let_go()
    os.environ |= server.environment
    return send_missing(run)


def received_rows(server: WandbServer, run: str | None = None) -> list[dict[str, Any]]:
    """The rows of the only run, without the client's own columns, figures and histograms."""
    (name,) = server.backend.runs if run is None else (run,)
    rows = []
    for row in server.backend.history(name):
        if "epoch" in row:
            rows.append(
                {key: value for key, value in row.items() if not key.startswith("_")}
            )
    return rows


def steps_with(server: WandbServer, run: str, name: str) -> list[int]:
    """The steps of the rows that have a value of that name."""
    return [row["step"] for row in server.backend.history(run) if name in row]


def metrics_rows(directory: Path) -> list[dict[str, float]]:
    return read_rows(directory / "run" / "metrics.jsonl")


def test_one_run_receives_everything(home: Path, server: WandbServer) -> None:
    settings = config(
        home,
        **ONLINE,
        batch__micro_size=14,
        run__figures=True,
        optimizer__decay_norm_and_bias=False,
        train__epochs=3,
        wandb__name="a name",
        wandb__group="g",
        wandb__job_type="j",
        wandb__tags=["t"],
        wandb__notes="n",
        wandb__entity="somebody",
        wandb__project="things",
        wandb__log_model="best",
        wandb__log_histograms_every=4,
    )
    (output, error, _), _ = on_ranks(2, train, settings, server, images=True)
    assert (error, "W&B" in output) == ("", False)
    ((run_id, run),) = server.backend.runs.items()
    assert received_rows(server) == metrics_rows(home)
    rows = metrics_rows(home)
    assert {
        "train/loss",
        "lr",
        "lr/0",
        "lr/1",
        "grad_norm",
        "samples_per_second",
        "data_wait",
    } <= rows[0].keys()
    assert all(0 <= row["data_wait"] <= 1 for row in rows if "data_wait" in row)
    epochs = [row for row in rows if "val/loss" in row]
    losses = [row["val/loss"] for row in epochs]
    assert len(epochs) == 3
    assert [row["best/val/loss"] for row in epochs] == list(
        itertools.accumulate(losses, min)
    )

    fields = {
        name: run["fields"].get(name)
        for name in ("displayName", "groupName", "jobType", "tags", "notes")
    }
    assert list(fields.values()) == ["a name", "g", "j", ["t"], "n"]
    assert (run["fields"]["entity"], run["project"], run["state"]) == (
        "somebody",
        "things",
        "finished",
    )
    assert run["config"]["optimizer"]["lr"] == 0.1
    assert {"requirements.txt", "wandb-metadata.json"} <= run["files"].keys()
    assert steps_with(server, run_id, "figures/batch") == [0]
    assert {"figures/curves", "figures/predictions", "figures/confusion_matrix"} <= run[
        "summary"
    ].keys()
    (table,) = (
        json.loads(data) for name, data in run["files"].items() if "per_class" in name
    )
    assert table["columns"][:5] == ["class", "precision", "recall", "f1", "support"]
    assert sum(row[4] for row in table["data"]) == 30
    assert steps_with(server, run_id, "gradients/0.weight") == [4, 8]
    histogram = next(
        row["weights/0.weight"]
        for row in server.backend.history(run_id)
        if "weights/0.weight" in row
    )
    assert sum(histogram["values"]) == conv_net()[0].weight.numel()

    model = next(a for a in server.backend.artifacts if a["type"] == "model")
    best = json.loads((home / "run" / "best" / "metrics.json").read_text())
    assert set(model["aliases"]) == {"best", "latest", f"epoch-{best['epoch']}"}
    assert model["files"].keys() == {"model.safetensors", "metrics.json", "config.yaml"}
    assert (
        model["files"]["model.safetensors"]
        == (home / "run" / "best" / "model.safetensors").read_bytes()
    )
    assert model["metadata"]["val/loss"] == best["val/loss"]
    assert model["metadata"]["config"]["optimizer"]["lr"] == 0.1


def test_no_secret_leaves_the_machine(
    home: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_ROOT", "from-the-environment")
    tree = config(home, **ONLINE, wandb__log_model="best").to_dict()
    tree["data"] |= {
        "root": "${oc.env:SECRET_ROOT}",
        "url": "https://me:inside-a-url@host/${data.root}",
    }
    tree["wandb"]["notes"] = "see https://me:in-the-notes@host"
    (home / "config.yaml").write_text(json.dumps(tree))
    overrides = ["data.api_key=under-a-key", "data.more={password: in-a-mapping}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "config.yaml", *overrides])
    settings = load(home / "config.yaml", overrides)
    assert settings.data.root == "from-the-environment"
    ((_, error, _),) = on_ranks(1, train, settings, server)
    assert error == ""
    received = repr(server.backend.runs) + repr(server.backend.artifacts)
    assert "data.api_key=<redacted>" in received
    for secret in (
        "from-the-environment",
        "inside-a-url",
        "under-a-key",
        "in-a-mapping",
        "in-the-notes",
    ):
        assert secret not in received
    written = load(home / "run" / "config.yaml", []).data
    assert (written.root, written.args) == (settings.data.root, settings.data.args)
    for file in home.rglob("*"):
        if file.is_file() and file != home / "config.yaml":
            assert b"from-the-environment" not in file.read_bytes(), file


@pytest.mark.parametrize("kind", ["down", "hang", "500", "401"])
def test_an_outage_costs_no_row(
    home: Path, server: WandbServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server fails in the middle of a run, and comes back after its end."""
    if kind == "500":  # whose rows are to be partly received
        monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    settings = config(home, **SHORT_END, train__epochs=4, wandb__log_model="best")
    (home / "waiting").touch()
    breaking = threading.Thread(
        target=break_when_waiting, args=(home, server, kind), daemon=True
    )
    breaking.start()
    ((output, error, seconds),) = on_ranks(1, train, settings, server, Pausing)
    breaking.join(60)
    assert error == ""
    assert seconds < 90
    (note,) = [
        line for line in output.splitlines() if "W&B" in line and "trainer sync" in line
    ]
    assert f"python -m trainer sync {home / 'run'}" in note
    assert len(metrics_rows(home)) == 4 * 3 + 4
    assert len(received_rows(server)) < len(metrics_rows(home))
    if kind == "down":
        server.start()
    server.fault("")
    assert on_ranks(1, send, home / "run", server)[0].startswith("sent ")
    ((_, run),) = server.backend.runs.items()
    assert received_rows(server) == metrics_rows(home)
    assert (run["state"], run["rewritten"], run["config"]["optimizer"]["lr"]) == (
        "finished",
        0,
        0.1,
    )
    assert [set(a["aliases"]) >= {"best"} for a in server.backend.artifacts] == [True]
    assert on_ranks(1, send, home / "run", server) == ["nothing is left to send"]


def break_when_waiting(directory: Path, server: WandbServer, kind: str) -> None:
    while (directory / "waiting").exists():
        time.sleep(0.02)
    if kind == "500":
        server.wait_for_step(next(iter(server.backend.runs)), 6)
    if kind == "down":
        server.stop()
    else:
        server.fault(kind)
    (directory / "go").touch()


def test_a_stop_at_wandb_reaches_a_run_twice_and_is_one(
    home: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "stopped")
    server.backend.run("stopped")["stop"] = True
    ((_, error, _),) = on_ranks(1, train_stopped, config(home, **ONLINE), server)
    assert error.startswith("stopped by signal 15 after step 1; a checkpoint is kept")
    assert (home / "run" / "checkpoints" / "last").read_text() == "step_00000001\n"


@pytest.mark.parametrize("kind", ["down", "hang", "500", "401"])
def test_a_server_that_is_down_at_the_start(
    home: Path, server: WandbServer, kind: str
) -> None:
    server.stop() if kind == "down" else server.fault(kind)
    ((output, error, seconds),) = on_ranks(1, train, config(home, **SHORT), server)
    assert error == ""
    assert seconds < 60
    assert output.count("W&B is out of reach") == output.count("trainer sync") == 1
    server.start() if kind == "down" else server.fault("")
    assert on_ranks(1, send, home / "run", server) == ["sent 1 offline session"]
    assert received_rows(server) == metrics_rows(home)


def test_after_a_short_outage_nothing_is_missing(
    home: Path, server: WandbServer
) -> None:
    settings = config(home, **ONLINE, train__epochs=3)
    (home / "waiting").touch()

    def away_for_a_second() -> None:
        break_when_waiting(home, server, "down")
        time.sleep(1)
        server.start()

    breaking = threading.Thread(target=away_for_a_second, daemon=True)
    breaking.start()
    ((output, error, _),) = on_ranks(1, train, settings, server, Pausing)
    breaking.join(60)
    assert (error, "W&B" in output) == ("", False)
    assert received_rows(server) == metrics_rows(home)


@pytest.mark.parametrize(
    "online", [(True, True), (False, False), (False, True), (True, False)]
)
def test_a_killed_run_continues_as_the_same_run(
    home: Path, server: WandbServer, online: tuple[bool, bool]
) -> None:
    """A run killed two rows after its checkpoint and resumed has every row once, in order, online or not."""
    settings = config(home, **ONLINE, train__epochs=3)
    with pytest.raises((EOFError, AssertionError)):
        on_ranks(1, train, settings, server, Dying, online=online[0])
    assert (home / "run" / "checkpoints" / "last").read_text() == "step_00000006\n"
    ((_, error, _),) = on_ranks(1, train, settings, server, online=online[1])
    assert error == ""
    (answer,) = on_ranks(1, send, home / "run", server)
    assert (answer == "nothing is left to send") == online[1]
    (run,) = server.backend.runs.values()
    assert [row["step"] for row in received_rows(server)] == [
        row["step"] for row in metrics_rows(home)
    ]
    assert (run["rewritten"], run["state"]) == (0, "finished")


def test_a_failure_is_reported_without_secrets(
    home: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_ROOT", "from-the-environment")
    tree = config(home, **ONLINE, wandb__alerts=True).to_dict()
    tree["data"] |= {"root": "http://${oc.env:SECRET_ROOT}/", "api_key": "under-a-key"}
    (home / "config.yaml").write_text(json.dumps(tree))
    ((_, error, _),) = on_ranks(
        1, train, load(home / "config.yaml", []), server, Revealing
    )
    assert error.startswith(
        "no from-the-environment, under-a-key, http://me:login@host"
    )
    (run,) = server.backend.runs.values()
    ((_, text),) = run["alerts"]
    assert (
        text
        == run["summary"]["failure"]
        == "RuntimeError: no <redacted>, <redacted>, http://<redacted>@host"
    )


def test_strict_turns_the_warning_into_an_error(
    home: Path, server: WandbServer
) -> None:
    server.fault("403")
    ((_, error, _),) = on_ranks(
        1, train, config(home, **SHORT_START, wandb__strict=True), server
    )
    assert error.startswith("W&B is out of reach") and "403" in error


def test_a_run_that_fails_sends_an_alert(home: Path, server: WandbServer) -> None:
    settings = config(home, **ONLINE, wandb__alerts=True)
    ((_, error, _),) = on_ranks(1, train, settings, server, Diverging)
    assert "is not finite" in error
    (run,) = server.backend.runs.values()
    assert run["state"] == "failed"
    ((title, text),) = run["alerts"]
    assert title == "run failed" and "is not finite" in text
    assert len(received_rows(server)) == len(metrics_rows(home))


def test_sync_refuses_a_run_that_is_in_use(home: Path, server: WandbServer) -> None:
    ((_, error, _),) = on_ranks(1, train, config(home, **ONLINE), server, online=False)
    assert error == ""
    from trainer.storage.run_directory import lock

    with (
        lock(home / "run"),
        pytest.raises(LockstepError, match="another process is training"),
    ):
        send_missing(home / "run")
