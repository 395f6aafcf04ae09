"""Parameters and their values, what is checked before the first trial, and a local sweep that is killed and goes on."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats

from trainer.config.load import load
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.sweep.check import check
from trainer.sweep.description import Hyperband, Sweep, read_sweep
from trainer.sweep.pictures import importances, parallel_coordinates
from trainer.sweep.search import next_values, rungs_reached, should_stop
from trainer.sweep.space import Parameter, grid, read_parameters
from trainer.sweep.store import Store, Trial
from trainer.sweep.table import table

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
START = ["${env}", "${interpreter}", "${program}", "run.figures=false", "wandb.mode=disabled"]


def write(directory: Path, parameters: dict[str, Any], *shared: str, **more: Any) -> Path:
    tree = {
        "program": "train.py",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": parameters,
        "command": [*START, f"run.dir={directory}", *shared, "${args_no_hyphens}"],
    }
    file = directory / "small.yaml"
    file.write_text(yaml.safe_dump({**tree, **more}))
    return file


def one(**spec: Any) -> Parameter:
    (parameter,) = read_parameters({"x": spec})
    return parameter


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("spec", "law"),
    [
        ({"min": 0.5, "max": 2.5}, stats.uniform(0.5, 2)),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}, stats.loguniform(1e-4, 1)),
        ({"distribution": "log_uniform", "min": -3, "max": 1}, stats.loguniform(math.exp(-3), math.e)),
        ({"distribution": "normal", "mu": 2.0, "sigma": 3.0}, stats.norm(2, 3)),
        ({"distribution": "log_normal", "mu": 0.5, "sigma": 0.7}, stats.lognorm(0.7, scale=math.exp(0.5))),
    ],
)
def test_draws_follow_their_law(spec: dict[str, Any], law: Any) -> None:
    drawn = [one(**spec).draw(0, trial) for trial in range(800)]
    assert stats.kstest(drawn, law.cdf).pvalue > 1e-3
    assert all(type(value) is float for value in drawn)


def test_draws_of_whole_rounded_and_weighted_values() -> None:
    whole = [one(min=2, max=4).draw(0, trial) for trial in range(300)]
    assert set(whole) == {2, 3, 4} and {type(value) for value in whole} == {int}
    rounded = {one(distribution="q_uniform", min=32, max=96, q=32).draw(0, trial) for trial in range(100)}
    assert rounded == {32, 64, 96} and {type(value) for value in rounded} == {int}
    assert one(distribution="q_uniform", min=0.1, max=0.4, q=0.1).grid() == [0.1, 0.2, 0.3, 0.4]
    weighted = Counter(one(values=[None, "a"], probabilities=[0.9, 0.1]).draw(0, trial) for trial in range(1000))
    assert weighted[None] == pytest.approx(900, abs=40)


def test_a_draw_depends_on_seed_name_and_trial_alone() -> None:
    a, b = read_parameters({"a": {"min": 0.0, "max": 1.0}, "b": {"min": 0.0, "max": 1.0}})
    drawn = {(p.name, seed, trial): p.draw(seed, trial) for p in (a, b) for seed in (0, 1) for trial in (0, 1)}
    assert len(set(drawn.values())) == 8
    assert a.draw(1, 1) == drawn["a", 1, 1]


def test_a_grid_is_every_combination_of_nested_and_dotted_parameters() -> None:
    tree = {
        "optimizer": {"parameters": {"lr": {"values": [1, 2]}, "nesterov": {"value": True}}},
        "b.c": {"min": 5, "max": 6},
    }
    points = list(grid(read_parameters(tree)))
    assert [tuple(point.values()) for point in points] == [(1, True, 5), (1, True, 6), (2, True, 5), (2, True, 6)]
    assert list(points[0]) == ["optimizer.lr", "optimizer.nesterov", "b.c"]


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("optimizer.lr=1e-05", ("optimizer", "lr"), 1e-5),
        ("optimizer={'lr': 1e-05, 'betas': [0.9, 0.99]}", ("optimizer", "betas"), [0.9, 0.99]),
        ("optimizer={'lr': 1e-05}", ("optimizer", "lr"), 1e-5),
        ("train.max_grad_norm=None", ("train", "max_grad_norm"), None),
        ("train={'max_grad_norm': None}", ("train", "max_grad_norm"), None),
        ("optimizer.nesterov=True", ("optimizer", "nesterov"), True),
        ("data.root=None", ("data", "root"), None),
    ],
)
def test_values_as_the_agent_writes_them(argument: str, key: tuple[str, str], value: Any) -> None:
    tree = load(ROOT / "configs" / "digits.yaml", ["train.max_grad_norm=1", argument]).to_dict()
    assert tree[key[0]][key[1]] == value
    assert type(tree[key[0]][key[1]]) is type(value)
    assert tree["optimizer"]["momentum"] == 0.9  # what is nested is laid over its section, not put in its place


# ---------------------------------------------------------------- the check


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_can_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert isinstance(check(read_sweep(file), []), Config)


@pytest.mark.parametrize(
    ("parameters", "more", "message"),
    [
        ({"optimizer.lrr": {"value": 1}}, {}, 'optimizer.lrr: SGD has no such argument; did you mean "lr"'),
        ({"optimiser.lr": {"value": 1}}, {}, 'optimiser: no such section; did you mean "optimizer"'),
        ({"train.epoch": {"value": 1}}, {}, 'train.epoch: no such key; did you mean "epochs"'),
        ({"schedule.gama": {"value": 1}}, {}, 'schedule.gama: step has no such argument; did you mean "gamma"'),
        ({"model.widht": {"value": 1}}, {}, 'model.widht: small_cnn has no such argument; did you mean "width"'),
        ({"train.epochs": {"min": 0.5, "max": 2.5}}, {}, "parameters.train.epochs: a grid needs values"),
        ({"train.epochs": {"values": [1, 2.5]}}, {}, "train.epochs: 2.5 is not an integer"),
        ({"optimizer.lr": {"values": [0.1, -1]}}, {}, "optimizer.lr: -1.0 is less than 0"),
        ({"optimizer.lr": {"values": ["1e-3"]}}, {}, "YAML reads 1e-3 as text, not as the number 0.001; write 1.0e-3"),
        ({"optimizer.lr": {"vals": [1]}}, {}, 'optimizer.lr.vals: no such key; did you mean "values"'),
        ({"optimizer.lr": {"min": 1.0}}, {}, "optimizer.lr.max: is missing"),
        (
            {"optimizer.lr": {"value": 1, "values": [1, 2]}},
            {},
            "optimizer.lr.values: does nothing here: constant takes",
        ),
        ({"optimizer.lr": {"min": 1.0, "max": 2.0, "q": 0.1}}, {}, "optimizer.lr.q: does nothing here: uniform takes"),
        (
            {"optimizer": {"parameters": {"lr": {"value": 1}}, "value": 1}},
            {},
            "parameters.optimizer.value: does nothing",
        ),
        ({"optimizer.lr": {"distribution": "beta", "a": 1, "b": 2}}, {}, "beta is not one of constant, categorical"),
        ({"optimizer.lr": {"distribution": "constant"}}, {}, "optimizer.lr.value: is missing"),
        ({"optimizer.lr": {"distribution": "log_uniform", "min": 0, "max": 1000}}, {}, "too large for a number"),
        ({"optimizer.lr": {"values": [1, 2], "probabilities": [-1, 2]}}, {}, "must be 2 numbers that add up to 1"),
        ({"run.name": {"values": ["a", "b"]}}, {}, "parameters.run.name: every trial has its own"),
        ({"optimizer.lr": {"value": 1}}, {"command": ["${args_no_hyphens}", "${program}"]}, "comes after ${program}"),
        ({"optimizer.lr": {"value": 1}}, {"metric": {"goal": "maximize"}}, "metric.name: is missing"),
        ({"optimizer.lr": {"value": 1}}, {"metric": {"name": "val/acc"}}, 'did you mean "val/accuracy"'),
        ({"optimizer.lr": {"value": 1}}, {"methd": "grid"}, 'methd: no such key of a sweep; did you mean "method"'),
        ({"optimizer.lr": {"min": 0.1, "max": 0.2}}, {"method": "random"}, "run_cap: is missing"),
        ({"optimizer.lr": {"value": 1}}, {"command": ["python", "${program}", "${args}"]}, "args_no_hyphens"),
        (
            {"optimizer.lr": {"value": 1}},
            {"early_terminate": {"type": "hyperband", "min_iter": 50}},
            "a trial logs val/accuracy 15 times",
        ),
    ],
)
def test_what_no_trial_could_take_is_told_before_the_first(
    tmp_path: Path, parameters: dict[str, Any], more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        check(read_sweep(write(tmp_path, parameters, **more)), [])
    assert message in str(caught.value)
    assert str(tmp_path / "small.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- search


def bowl(tmp_path: Path, method: str) -> Sweep:
    parameters = {"optimizer.lr": {"min": 0.0, "max": 1.0}, "optimizer.momentum": {"values": [0.0, 0.9]}}
    return read_sweep(write(tmp_path, parameters, method=method, run_cap=30, metric={"name": "val/loss"}))


def search(sweep: Sweep, seed: int) -> list[Trial]:
    """Trials one by one, each with the value `(lr - 0.3)²`, more without momentum."""
    trials: list[Trial] = []
    while (values := next_values(sweep, seed, trials)) is not None:
        value = (values["optimizer.lr"] - 0.3) ** 2 + (values["optimizer.momentum"] == 0)
        trials.append(Trial(len(trials), values, "done", value))
    return trials


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_the_same_seed_gives_the_same_trials(tmp_path: Path, method: str) -> None:
    if method == "bayes":
        pytest.importorskip("optuna")
    sweep = bowl(tmp_path, method)
    first, again, other = (search(sweep, seed) for seed in (1, 1, 2))
    assert len(first) == 30
    assert first == again != other
    assert next_values(sweep, 1, first[:17]) == first[17].values  # also where it goes on after a kill


@pytest.mark.parametrize(("goal", "target", "trials"), [("maximize", 0.5, 2), ("minimize", 0.2, 1), ("maximize", 1, 3)])
def test_a_target_that_is_reached_ends_the_sweep(tmp_path: Path, goal: str, target: float, trials: int) -> None:
    metric = {"name": "val/accuracy", "goal": goal, "target": target}
    sweep = read_sweep(write(tmp_path, {"optimizer.lr": {"values": [0.2, 0.5, 0.9]}}, metric=metric))
    ended: list[Trial] = []
    while (values := next_values(sweep, 0, ended)) is not None:
        ended.append(Trial(len(ended), values, "done", values["optimizer.lr"]))
    assert len(ended) == trials


def test_a_bound_that_leaves_one_value_is_that_value(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    parameters = {"optimizer.lr": {"min": 0.1, "max": 0.1}, "optimizer.momentum": {"min": 0.0, "max": 0.9}}
    sweep = read_sweep(write(tmp_path, parameters, method="bayes", run_cap=2))
    assert (next_values(sweep, 0, []) or {})["optimizer.lr"] == 0.1


def test_bayes_without_optuna_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="bayes needs Optuna"):
        next_values(bowl(tmp_path, "bayes"), 0, [])


def test_a_sweep_of_any_name_is_a_group_of_its_project(tmp_path: Path) -> None:
    file = write(tmp_path, {"optimizer.lr": {"value": 1}}, name="x: [y", project="2024")
    command = read_sweep(file).trial_command([], {"optimizer.lr": 1}, [])
    section = load(None, [word for word in command if word.startswith("wandb.")]).wandb
    assert (section.group, section.project) == ("x: [y", "2024")


@pytest.mark.parametrize("length", [0, 30, 70, 300])
def test_a_long_reason_gives_way_to_the_numbers(tmp_path: Path, length: int) -> None:
    console = Console(width=80, file=io.StringIO(), force_jupyter=False)
    trials = [Trial(7, {"optimizer.lr": 0.25, "optimizer.momentum": 0.9}, "failed", 0.125, "R" * length, 12.0)]
    console.print(table(bowl(tmp_path, "random"), trials))
    assert isinstance(console.file, io.StringIO)
    heading, row = console.file.getvalue().splitlines()
    assert heading.split() == ["trial", "state", "val/loss", "optimizer.lr", "optimizer.momentum", "time"]
    assert row.split()[:7] == ["7", "failed", "0.125", "0.25", "0.9", "12", "s"]


def test_a_damaged_state_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "sweep.sqlite").write_text("no database, but text of some length")
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(tmp_path, {})


def test_bayes_comes_closer_than_chance(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    late = {m: np.median([t.value for t in search(bowl(tmp_path, m), 3)[15:]]) for m in ("random", "bayes")}
    assert late["bayes"] < 0.2 * late["random"]


def test_early_stopping_keeps_the_best_at_each_rung(tmp_path: Path) -> None:
    sweep, band = bowl(tmp_path, "random"), Hyperband(2, 2)
    assert [rungs_reached(band, n) for n in range(10)] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    before = [Trial(i, {}, "done", curve=[float(i), float(i)]) for i in range(4)]  # losses: 0 is best
    for loss, stops in ((0.5, False), (1.5, True), (2.5, True), (math.nan, True)):
        trial = Trial(9, {}, curve=[loss, loss])
        assert should_stop(sweep, band, trial, [*before, trial]) is stops
    ahead = Trial(9, {}, curve=[9.0] * 4)
    assert not should_stop(sweep, band, ahead, [*before, ahead])  # nobody else came to the second rung


def test_importance_finds_the_parameter_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = bowl(tmp_path, "random")
    trials = search(sweep, 0)
    for without_optuna in (False, True):
        if without_optuna:
            monkeypatch.setitem(sys.modules, "optuna", None)
        method, shares = importances(sweep, trials)
        assert ("rank" in method) or not without_optuna
        assert shares["optimizer.momentum"] > 2 * shares["optimizer.lr"]
    parallel_coordinates(sweep, trials, tmp_path / "trials.png")
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- whole sweeps


def test_a_sweep_goes_on_only_as_what_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path, {"seed": 0, "method": "grid"})
    store.save(Trial(0, {"a": None, "b": [1, 2]}, "running"))
    with pytest.raises(ConfigError, match="another sweep is running"):
        Store(tmp_path, {"seed": 0, "method": "grid"})
    store.close()
    with pytest.raises(ConfigError, match="in: seed; name it otherwise"):
        Store(tmp_path, {"seed": 1, "method": "grid"})
    assert Store(tmp_path, {"seed": 0, "method": "grid"}).trials() == [
        Trial(0, {"a": None, "b": [1, 2]}, "interrupted")
    ]


def start(file: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "sweep", str(file), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def states(directory: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(directory / "sweep.sqlite") as connection:
        return connection.execute("SELECT state, reason FROM trials ORDER BY number").fetchall()


def running_in(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={directory}" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its second trial is cut off by a SIGKILL of the sweep and goes on from its checkpoint; a third one fails."""
    file = write(tmp_path, {"optimizer.lr": {"values": [0.05, 0.02, 1e30]}}, "train.epochs=8", "train.log_every=2")
    directory = tmp_path / "small"
    second = directory / "small-001" / "metrics.jsonl"
    sweep = start(file)
    deadline = time.monotonic() + 120
    while not (second.exists() and second.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.05)
    assert running_in(directory)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    assert [state for state, _ in states(directory)] == ["done", "running"]
    said = (directory / "small-000.log").read_bytes()

    output, _ = start(file).communicate(timeout=120)
    (first, _), (again, _), (failed, reason) = states(directory)
    assert (first, again, failed) == ("done", "done", "failed"), output
    assert reason.startswith("the loss is")
    assert not running_in(directory)
    assert "resumed after step" in (directory / "small-001.log").read_text()
    steps = [json.loads(line)["step"] for line in second.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 8 * 23
    assert "3 trials: 2 done, 1 failed" in output
    page = (directory / "sweep.html").read_text()
    assert "data:image/png;base64" in page and "the loss is" in page
    assert (directory / "small-000.log").read_bytes() == said  # what was done is not done again
