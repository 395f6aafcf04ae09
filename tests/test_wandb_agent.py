"""The real `wandb sweep` and `wandb agent` with a server on the loopback, started as users do, by launch/sweep.sh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from benchmarks.wandb_server import WandbServer
from tests.wandb_sweeps import SweepBackend
from trainer.storage.files import is_locked

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="launch/sweep.sh is for Linux"),
    pytest.mark.fresh_process,  # the agent starts launchers, and those the runs
]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer(SweepBackend()) as running:
        yield running
    assert running.backend.unknown == []


@pytest.fixture
def backend(server: WandbServer) -> SweepBackend:
    return cast(SweepBackend, server.backend)


def sweep_file(
    directory: Path, launcher: str, parameters: dict[str, Any], *shared: str
) -> Path:
    overrides = [
        f"run.dir={directory / 'runs'}",
        "run.figures=false",
        "wandb.mode=online",
        # Made up: no import of scikit-learn in each of the processes.
        "data.name=fake",
        "data.size=640",
        "data.val_size=64",
        "data.image_size=8",
        "data.num_classes=10",
        *shared,
    ]
    start = [
        "${env}",
        "accelerate",
        "launch",
        "--config_file",
        f"launch/{launcher}.yaml",
        "${program}",
    ]
    tree = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": parameters,
        "command": [*start, *overrides, "${args_no_hyphens}"],
    }
    file = directory / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def environment(server: WandbServer, directory: Path) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "XDG_"))
    }
    settings = {
        "HOME": str(directory),
        "WANDB_DIR": str(directory),
        "WANDB_ERROR_REPORTING": "false",
        "SWEEP_PAUSE": "1",
    }
    return {
        **inherited,
        **server.environment,
        **settings,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }


def start_agents(
    server: WandbServer, directory: Path, what: str
) -> subprocess.Popen[str]:
    with (directory / "agent.log").open("w") as log:
        return subprocess.Popen(
            ["launch/sweep.sh", what],
            cwd=ROOT,
            env=environment(server, directory),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def processes(directory: Path) -> list[str]:
    """The command lines that name a directory: launchers and ranks of its runs."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if str(directory) in command:
            commands.append(command.replace("\0", " "))
    return commands


def wait_for(condition: Callable[[], Any], directory: Path) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, agent_log(directory)
        time.sleep(0.1)


def agent_log(directory: Path) -> str:
    return (directory / "agent.log").read_text()[-6000:]


def assert_checkpoint(run: Path, directory: Path) -> None:
    assert (run / "checkpoints" / "last").exists(), agent_log(directory)


def test_a_trial_on_two_processes_is_one_run(
    tmp_path: Path, server: WandbServer, backend: SweepBackend
) -> None:
    """The agent ends with the grid. Each trial of more costs 15 s of a core; the test below has several."""
    parameters = {
        "optimizer.lr": {"values": [1e-5]},
        "train.max_grad_norm": {"values": [None]},
    }
    file = sweep_file(
        tmp_path, "cpu", parameters, "train.max_steps=3", "train.log_every=1"
    )
    agent = start_agents(server, tmp_path, str(file))
    assert agent.wait(timeout=240) == 0, (tmp_path / "agent.log").read_text()
    (run,) = backend.runs.values()
    assert (run["state"], len(run["writers"]), run["rewritten"]) == ("finished", 1, 0)
    rows = backend.history(run["name"])
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name == f"digits-{run['name']}"
    assert json.loads((directory / "summary.json").read_text())["world_size"] == 2
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 1e-5
    assert config["train"]["max_grad_norm"] is None


def test_a_trial_stopped_or_failed_leaves_no_process_and_the_sweep_goes_on(
    tmp_path: Path, server: WandbServer, backend: SweepBackend
) -> None:
    parameters = {"optimizer": {"parameters": {"lr": {"values": [0.05, -1.0, 0.01]}}}}
    long = sweep_file(
        tmp_path, "one_gpu", parameters, "train.epochs=5000", "train.log_every=5"
    )
    refused = subprocess.run(
        ["launch/sweep.sh", str(long)],
        cwd=ROOT,
        env=environment(server, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "optimizer.lr: -1.0 is less than 0" in refused.stderr
    assert not backend.sweeps
    subprocess.run(
        ["wandb", "sweep", str(long)],
        env=environment(server, tmp_path),
        check=True,
        capture_output=True,
    )
    ((name, sweep),) = backend.sweeps.items()
    agent = start_agents(server, tmp_path, f"tester/uncategorized/{name}")
    runs, logged = tmp_path / "runs", "metrics.jsonl"
    first, refused_value, last = (f"{name}r{i}" for i in range(3))

    wait_for((runs / f"digits-{first}" / logged).exists, tmp_path)
    assert processes(runs)
    backend.run(first)["stop"] = True  # as early termination and the Stop button do
    wait_for(lambda: len(sweep["runs"]) > 1, tmp_path)
    # The agent starts the next trial once the launcher has ended; the run below it may still be writing.
    wait_for(lambda: not is_locked(runs / f"digits-{first}"), tmp_path)
    assert_checkpoint(runs / f"digits-{first}", tmp_path)

    # The second failed.
    wait_for((runs / f"digits-{last}" / logged).exists, tmp_path)
    assert backend.runs[refused_value]["state"] == "failed"
    assert (
        "optimizer.lr: -1.0 is less than 0"
        in backend.runs[refused_value]["summary"]["failure"]
    )

    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=120) == 143
    wait_for(lambda: not processes(runs), tmp_path)
    assert_checkpoint(runs / f"digits-{last}", tmp_path)


@pytest.mark.slow
def test_a_trial_ends_with_an_agent_that_is_killed(
    tmp_path: Path, server: WandbServer, backend: SweepBackend
) -> None:
    """On both ranks, although the launcher between them and the agent does not notice."""
    file = sweep_file(
        tmp_path,
        "cpu",
        {"optimizer.lr": {"values": [0.05]}},
        "train.epochs=5000",
        "train.log_every=5",
    )
    subprocess.run(
        ["wandb", "sweep", str(file)],
        env=environment(server, tmp_path),
        check=True,
        capture_output=True,
    )
    ((name, _),) = backend.sweeps.items()
    with (tmp_path / "agent.log").open("w") as log:
        agent = subprocess.Popen(
            ["wandb", "agent", f"tester/uncategorized/{name}"],
            cwd=ROOT,
            env=environment(server, tmp_path),
            stdout=log,
            stderr=log,
        )
    runs = tmp_path / "runs"
    wait_for((runs / f"digits-{name}r0" / "metrics.jsonl").exists, tmp_path)
    assert len(processes(runs)) == 3
    agent.kill()
    agent.wait()
    wait_for(lambda: not processes(runs), tmp_path)
    assert_checkpoint(runs / f"digits-{name}r0", tmp_path)
