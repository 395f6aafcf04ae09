"""Parameters and their values, what is checked before the first trial, and a local sweep that is killed and goes on."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from rich.console import Console
from scipy import stats

from tests.full_disk import room_for
from tests.programs import Program
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.errors import ConfigError, LockstepError
from trainer.sweep.check import check
from trainer.sweep.description import Sweep, read_sweep
from trainer.sweep.results import draw_pictures
from trainer.sweep.space import Parameter, grid, read_parameters
from trainer.sweep.study import SweepStudy, Trial, explained_storage
from trainer.sweep.table import build_table

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
START = [
    "${env}",
    "${interpreter}",
    "${program}",
    "run.figures=false",
    "wandb.mode=disabled",
]


def write(
    directory: Path, parameters: dict[str, Any], *shared: str, **more: Any
) -> Path:
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
        (
            {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
            stats.loguniform(1e-4, 1),
        ),
        (
            {"distribution": "log_uniform", "min": -3, "max": 1},
            stats.loguniform(math.exp(-3), math.e),
        ),
        ({"distribution": "normal", "mu": 2.0, "sigma": 3.0}, stats.norm(2, 3)),
        (
            {"distribution": "log_normal", "mu": 0.5, "sigma": 0.7},
            stats.lognorm(0.7, scale=math.exp(0.5)),
        ),
    ],
)
def test_draws_follow_their_law(spec: dict[str, Any], law: Any) -> None:
    drawn = [one(**spec).draw(0, trial) for trial in range(800)]
    assert stats.kstest(drawn, law.cdf).pvalue > 1e-3
    assert all(type(value) is float for value in drawn)


def test_draws_of_whole_rounded_and_weighted_values() -> None:
    whole = [one(min=2, max=4).draw(0, trial) for trial in range(300)]
    assert set(whole) == {2, 3, 4} and {type(value) for value in whole} == {int}
    rounded = {
        one(distribution="q_uniform", min=32, max=96, q=32).draw(0, trial)
        for trial in range(100)
    }
    assert rounded == {32, 64, 96} and {type(value) for value in rounded} == {int}
    assert one(distribution="q_uniform", min=0.1, max=0.4, q=0.1).list_values() == [
        0.1,
        0.2,
        0.3,
        0.4,
    ]
    weighted = Counter(
        one(values=[None, "a"], probabilities=[0.9, 0.1]).draw(0, trial)
        for trial in range(1000)
    )
    assert weighted[None] == pytest.approx(900, abs=40)


def test_a_draw_depends_on_seed_name_and_trial_alone() -> None:
    a, b = read_parameters(
        {"a": {"min": 0.0, "max": 1.0}, "b": {"min": 0.0, "max": 1.0}}
    )
    drawn = {
        (p.name, seed, trial): p.draw(seed, trial)
        for p in (a, b)
        for seed in (0, 1)
        for trial in (0, 1)
    }
    assert len(set(drawn.values())) == 8
    assert a.draw(1, 1) == drawn["a", 1, 1]


def test_a_grid_is_every_combination_of_nested_and_dotted_parameters() -> None:
    tree = {
        "optimizer": {
            "parameters": {"lr": {"values": [1, 2]}, "nesterov": {"value": True}}
        },
        "b.c": {"min": 5, "max": 6},
    }
    points = list(grid(read_parameters(tree)))
    assert [tuple(point.values()) for point in points] == [
        (1, True, 5),
        (1, True, 6),
        (2, True, 5),
        (2, True, 6),
    ]
    assert list(points[0]) == ["optimizer.lr", "optimizer.nesterov", "b.c"]


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("optimizer.lr=1e-05", ("optimizer", "lr"), 1e-5),
        (
            "optimizer={'lr': 1e-05, 'betas': [0.9, 0.99]}",
            ("optimizer", "betas"),
            [0.9, 0.99],
        ),
        ("optimizer={'lr': 1e-05}", ("optimizer", "lr"), 1e-5),
        ("train.max_grad_norm=None", ("train", "max_grad_norm"), None),
        ("train={'max_grad_norm': None}", ("train", "max_grad_norm"), None),
        ("optimizer.nesterov=True", ("optimizer", "nesterov"), True),
        ("data.root=None", ("data", "root"), None),
    ],
)
def test_values_as_the_agent_writes_them(
    argument: str, key: tuple[str, str], value: Any
) -> None:
    tree = load(
        ROOT / "configs" / "digits.yaml", ["train.max_grad_norm=1", argument]
    ).to_dict()
    assert tree[key[0]][key[1]] == value
    assert type(tree[key[0]][key[1]]) is type(value)
    # What is nested is laid over its section, not put in its place.
    assert tree["optimizer"]["momentum"] == 0.9


# ---------------------------------------------------------------- the check


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_can_run(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert isinstance(check(read_sweep(file), []), Config)


@pytest.mark.parametrize(
    ("parameters", "more", "message"),
    [
        (
            {"optimizer.lrr": {"value": 1}},
            {},
            'optimizer.lrr: SGD has no such argument; did you mean "lr"',
        ),
        (
            {"optimiser.lr": {"value": 1}},
            {},
            'optimiser: no such section; did you mean "optimizer"',
        ),
        (
            {"train.epoch": {"value": 1}},
            {},
            'train.epoch: no such key; did you mean "epochs"',
        ),
        (
            {"schedule.gama": {"value": 1}},
            {},
            'schedule.gama: step has no such argument; did you mean "gamma"',
        ),
        (
            {"model.widht": {"value": 1}},
            {},
            'model.widht: small_cnn has no such argument; did you mean "width"',
        ),
        (
            {"train.epochs": {"min": 0.5, "max": 2.5}},
            {},
            "parameters.train.epochs: a grid needs values",
        ),
        (
            {"train.epochs": {"values": [1, 2.5]}},
            {},
            "train.epochs: 2.5 is not an integer",
        ),
        (
            {"optimizer.lr": {"values": [0.1, -1]}},
            {},
            "optimizer.lr: -1.0 is less than 0",
        ),
        (
            {"optimizer.lr": {"values": ["1e-3"]}},
            {},
            "YAML reads 1e-3 as text, not as the number 0.001; write 1.0e-3",
        ),
        (
            {"optimizer.lr": {"vals": [1]}},
            {},
            'optimizer.lr.vals: no such key; did you mean "values"',
        ),
        ({"optimizer.lr": {"min": 1.0}}, {}, "optimizer.lr.max: is missing"),
        (
            {"optimizer.lr": {"value": 1, "values": [1, 2]}},
            {},
            "optimizer.lr.values: does nothing here: constant takes",
        ),
        (
            {"optimizer.lr": {"min": 1.0, "max": 2.0, "q": 0.1}},
            {},
            "optimizer.lr.q: does nothing here: uniform takes",
        ),
        (
            {"optimizer": {"parameters": {"lr": {"value": 1}}, "value": 1}},
            {},
            "parameters.optimizer.value: does nothing",
        ),
        (
            {"optimizer.lr": {"distribution": "beta", "a": 1, "b": 2}},
            {},
            "beta is not one of constant, categorical",
        ),
        (
            {"optimizer.lr": {"distribution": "constant"}},
            {},
            "optimizer.lr.value: is missing",
        ),
        (
            {"optimizer.lr": {"distribution": "log_uniform", "min": 0, "max": 1000}},
            {},
            "too large for a number",
        ),
        (
            {"optimizer.lr": {"values": [1, 2], "probabilities": [-1, 2]}},
            {},
            "must be 2 numbers that add up to 1",
        ),
        (
            {"run.name": {"values": ["a", "b"]}},
            {},
            "parameters.run.name: every trial has its own",
        ),
        (
            {"optimizer.lr": {"value": 1}},
            {"command": ["${args_no_hyphens}", "${program}"]},
            "comes after ${program}",
        ),
        (
            {"optimizer.lr": {"value": 1}},
            {"metric": {"goal": "maximize"}},
            "metric.name: is missing",
        ),
        (
            {"optimizer.lr": {"value": 1}},
            {"metric": {"name": "val/acc"}},
            'did you mean "val/accuracy"',
        ),
        (
            {"optimizer.lr": {"value": 1}},
            {"methd": "grid"},
            'methd: no such key of a sweep; did you mean "method"',
        ),
        (
            {"optimizer.lr": {"min": 0.1, "max": 0.2}},
            {"method": "random"},
            "run_cap: is missing",
        ),
        (
            {"optimizer.lr": {"value": 1}},
            {"command": ["python", "${program}", "${args}"]},
            "args_no_hyphens",
        ),
        (
            {"optimizer.lr": {"value": 1}},
            {"early_terminate": {"type": "hyperband", "min_iter": 50}},
            "a trial logs val/accuracy 15 times",
        ),
    ],
)
def test_what_no_trial_could_take_is_told_before_the_first(
    tmp_path: Path,
    parameters: dict[str, Any],
    more: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        check(read_sweep(write(tmp_path, parameters, **more)), [])
    assert message in str(caught.value)
    assert str(tmp_path / "small.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


F1 = "metrics=[{name: torchmetrics.classification.MulticlassF1Score, average: none}]"


@pytest.mark.parametrize(
    "metric",
    ["val/f1_score", "val/f1_score_3", "val_ema/f1_score", "val/mean_iou", "val/loss"],
)
def test_a_metric_may_be_any_that_a_trial_logs(
    tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parameters = {"optimizer.lr": {"values": [0.1, 0.2]}}
    sweep = read_sweep(write(tmp_path, parameters, metric={"name": metric}))
    check(sweep, [F1, "ema.decay=0.9"])
    if "f1" in metric:
        with pytest.raises(ConfigError, match="is not logged"):
            check(sweep, ["ema.decay=0.9"])


def test_a_metric_of_an_evaluation_without_a_loss_is_not_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parameters = {"optimizer.lr": {"values": [0.1, 0.2]}}
    sweep = read_sweep(write(tmp_path, parameters, metric={"name": "val/loss"}))
    with pytest.raises(ConfigError, match="is not logged"):
        check(sweep, ["loss.name=detection"])


# ---------------------------------------------------------------- search


def bowl(tmp_path: Path, method: str) -> Sweep:
    parameters = {
        "optimizer.lr": {"min": 0.0, "max": 1.0},
        "optimizer.momentum": {"values": [0.0, 0.9]},
    }
    return read_sweep(
        write(
            tmp_path, parameters, method=method, run_cap=30, metric={"name": "val/loss"}
        )
    )


def open_study(sweep: Sweep, directory: Path, seed: int = 0) -> SweepStudy:
    return SweepStudy(
        sweep, directory, seed=seed, identity={"seed": seed, "method": sweep.method}
    )


def search(sweep: Sweep, directory: Path, seed: int, most: int = 1000) -> list[Trial]:
    """Up to `most` trials one by one, each with the value `(lr - 0.3)²`, more without momentum."""
    study = open_study(sweep, directory, seed)
    for _ in range(most):
        trial = study.add_trial()
        if trial is None:
            break
        trial.state = "done"
        trial.value = (trial.values["optimizer.lr"] - 0.3) ** 2 + (
            trial.values["optimizer.momentum"] == 0
        )
        study.save(trial)
    study.close()
    return study.trials


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_the_same_seed_gives_the_same_trials(tmp_path: Path, method: str) -> None:
    sweep = bowl(tmp_path, method)
    first, other = search(sweep, tmp_path / "a", 1), search(sweep, tmp_path / "b", 2)
    assert len(first) == 30
    assert search(sweep, tmp_path / "c", 1, most=17) == first[:17]
    # Also where it goes on after a kill.
    assert search(sweep, tmp_path / "c", 1) == first != other


@pytest.mark.parametrize(
    ("goal", "target", "trials"),
    [("maximize", 0.5, 2), ("minimize", 0.2, 1), ("maximize", 1, 3)],
)
def test_a_target_that_is_reached_ends_the_sweep(
    tmp_path: Path, goal: str, target: float, trials: int
) -> None:
    metric = {"name": "val/accuracy", "goal": goal, "target": target}
    sweep = read_sweep(
        write(tmp_path, {"optimizer.lr": {"values": [0.2, 0.5, 0.9]}}, metric=metric)
    )
    study = open_study(sweep, tmp_path)
    while (trial := study.add_trial()) is not None:
        trial.state, trial.value = "done", trial.values["optimizer.lr"]
        study.save(trial)
    assert len(study.trials) == trials


def test_a_bound_that_leaves_one_value_is_that_value(tmp_path: Path) -> None:
    parameters = {
        "optimizer.lr": {"min": 0.1, "max": 0.1},
        "optimizer.momentum": {"min": 0.0, "max": 0.9},
    }
    sweep = read_sweep(write(tmp_path, parameters, method="bayes", run_cap=2))
    trial = open_study(sweep, tmp_path).add_trial()
    assert trial is not None and trial.values["optimizer.lr"] == 0.1


def test_a_sweep_without_optuna_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "optuna", None)
    sweep = bowl(tmp_path, "random")
    assert isinstance(check(sweep, []), Config)  # W&B runs a sweep without it
    with pytest.raises(
        ConfigError, match=r"needs Optuna: pip install 'lockstep\[sweep\]'"
    ):
        open_study(sweep, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["grid", "bayes"])
def test_values_of_any_type_outlive_a_kill(tmp_path: Path, method: str) -> None:
    choices = [None, True, 1, [0.9, 0.99], "sgd", {"lr": 1e-5}]
    sweep = read_sweep(
        write(tmp_path, {"x": {"values": choices}}, method=method, run_cap=6)
    )
    study = open_study(sweep, tmp_path)
    trials = [study.add_trial() for _ in choices]
    study.close()
    again = open_study(sweep, tmp_path).trials
    assert [json.dumps(trial.values) for trial in again] == [
        json.dumps(trial.values) for trial in trials if trial
    ]
    assert [type(trial.values["x"]) for trial in again] == [
        type(trial.values["x"]) for trial in trials if trial
    ]
    if method == "grid":
        assert [trial.values["x"] for trial in again] == choices


def test_a_value_outside_the_bounds_is_kept(tmp_path: Path) -> None:
    """Rounding takes 17 to 0 and 48, and a normal law has no bounds at all; Optuna's distributions do."""
    parameters = {
        "a": {"distribution": "q_uniform", "min": 5, "max": 17, "q": 16},
        "b": {"distribution": "normal", "mu": 0.0, "sigma": 1.0},
    }
    sweep = read_sweep(write(tmp_path, parameters, method="random", run_cap=1000))
    study = open_study(sweep, tmp_path)
    for parameter in sweep.parameters:
        object.__setattr__(
            parameter,
            "draw",
            lambda seed, trial, name=parameter.name: {"a": 0, "b": 7.5}[name],
        )
    study.add_trial()
    study.close()
    assert [trial.values for trial in open_study(sweep, tmp_path).trials] == [
        {"a": 0, "b": 7.5}
    ]


def test_a_sweep_of_any_name_is_a_group_of_its_project(tmp_path: Path) -> None:
    file = write(tmp_path, {"optimizer.lr": {"value": 1}}, name="x: [y", project="2024")
    command = read_sweep(file).trial_command([], {"optimizer.lr": 1}, [])
    section = load(None, [word for word in command if word.startswith("wandb.")]).wandb
    assert (section.group, section.project) == ("x: [y", "2024")


@pytest.mark.parametrize("length", [0, 30, 70, 300])
def test_a_long_reason_gives_way_to_the_numbers(tmp_path: Path, length: int) -> None:
    console = Console(width=80, file=io.StringIO(), force_jupyter=False)
    trials = [
        Trial(
            7,
            {"optimizer.lr": 0.25, "optimizer.momentum": 0.9},
            "failed",
            0.125,
            "R" * length,
            12.0,
        )
    ]
    console.print(build_table(bowl(tmp_path, "random"), trials))
    assert isinstance(console.file, io.StringIO)
    heading, row = console.file.getvalue().splitlines()
    assert heading.split() == [
        "trial",
        "state",
        "val/loss",
        "optimizer.lr",
        "optimizer.momentum",
        "time",
    ]
    assert row.split()[:7] == ["7", "failed", "0.125", "0.25", "0.9", "12", "s"]


def test_a_damaged_state_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "sweep.sqlite").write_text("no database, but text of some length")
    with pytest.raises(ConfigError, match="cannot be used"):
        open_study(bowl(tmp_path, "random"), tmp_path)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_is_no_fault_of_the_study(tmp_path: Path, is_new: bool) -> None:
    """It was an advice to move the study away, or a traceback of Optuna's in the midst of the sweep."""
    sweep = bowl(tmp_path, "random")
    study = None if is_new else open_study(sweep, tmp_path)
    with (
        pytest.raises(LockstepError, match=r"sweep.sqlite cannot be written \(.*disk"),
        room_for(8000),
    ):
        if study is None:
            open_study(sweep, tmp_path)
        else:
            with explained_storage(study.path):
                study.add_trial()


def test_a_sweep_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "sweep.sqlite") as connection:
        connection.execute("CREATE TABLE sweep (made_of TEXT NOT NULL)")
        connection.execute(
            "CREATE TABLE trials (number INTEGER PRIMARY KEY, state TEXT NOT NULL, value REAL)"
        )
        connection.execute("INSERT INTO trials VALUES (0, 'done', 0.5)")
    before = (tmp_path / "sweep.sqlite").read_bytes()
    with pytest.raises(
        ConfigError, match=r"earlier version of Lockstep.*name this sweep otherwise"
    ):
        open_study(bowl(tmp_path, "random"), tmp_path)
    assert (tmp_path / "sweep.sqlite").read_bytes() == before


def test_a_study_of_another_optuna_is_refused(tmp_path: Path) -> None:
    sweep = bowl(tmp_path, "random")
    open_study(sweep, tmp_path).close()
    with sqlite3.connect(tmp_path / "sweep.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.0.0.a'")
    with pytest.raises(
        ConfigError, match=r"cannot be used \(.*optuna.*name this sweep otherwise"
    ):
        open_study(sweep, tmp_path)


def test_a_directory_of_any_name_holds_its_study(tmp_path: Path) -> None:
    directory = tmp_path / "is it {0} 100%?#"
    assert len(search(bowl(tmp_path, "random"), directory, 0, most=2)) == 2
    assert (directory / "sweep.sqlite").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [
        directory.name
    ]


def test_bayes_comes_closer_than_chance(tmp_path: Path) -> None:
    trials = {
        method: search(bowl(tmp_path, method), tmp_path / method, 3)
        for method in ("random", "bayes")
    }
    late = {
        method: np.median([trial.value for trial in trials[method][15:]])
        for method in trials
    }
    assert late["bayes"] < 0.2 * late["random"]


def hyperband_study(
    directory: Path, goal: str, curves: list[list[float]]
) -> tuple[SweepStudy, list[bool]]:
    """A study of trials that log these values, all that came before each; and which of them fell behind."""
    parameters = {"optimizer.lr": {"min": 0.0, "max": 1.0}}
    metric, band = (
        {"name": "val/loss", "goal": goal},
        {"type": "hyperband", "min_iter": 2, "eta": 2},
    )
    more: dict[str, Any] = {
        "method": "random",
        "run_cap": 30,
        "metric": metric,
        "early_terminate": band,
    }
    study = open_study(read_sweep(write(directory, parameters, **more)), directory)
    behind = []
    for curve in curves:
        trial = study.add_trial()
        assert trial is not None
        trial.curve = curve
        behind.append(study.falls_behind(trial))
    return study, behind


@pytest.mark.parametrize(("goal", "sign"), [("minimize", 1), ("maximize", -1)])
@pytest.mark.parametrize(
    ("loss", "stops"), [(0.5, False), (1.5, True), (2.5, True), (math.nan, True)]
)
def test_early_stopping_keeps_the_best_at_each_rung(
    tmp_path: Path, goal: str, sign: int, loss: float, stops: bool
) -> None:
    curves = [[sign * float(value)] * 2 for value in range(4)]  # 0 is best
    _, behind = hyperband_study(tmp_path, goal, [*curves, [sign * loss] * 2])
    # The first to come to a rung goes on.
    assert behind == [False, True, True, True, stops]


def test_rungs_are_judged_once_each_and_in_order(tmp_path: Path) -> None:
    curves = [[5.0], [5.0, math.nan, 4.0], [9.0, 3.0, math.inf, 8.0, 1.0], [2.0] * 9]
    study, behind = hyperband_study(tmp_path, "minimize", curves)
    assert behind == [False] * 4
    # At 2, 4 and 8 values.
    assert [trial.rungs for trial in study.trials] == [0, 1, 2, 3]
    stored = study.optuna_study.get_trials()[2]
    # The best so far, not the last.
    assert stored.intermediate_values == {2: 3.0, 4: 3.0}
    assert not study.falls_behind(study.trials[2])
    study.close()
    again = open_study(study._sweep, tmp_path)
    assert [trial.rungs for trial in again.trials] == [0, 1, 2, 3]


def test_importance_finds_the_parameter_that_matters(tmp_path: Path) -> None:
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    sweep = bowl(tmp_path, "random")
    search(sweep, tmp_path, 0)
    study = open_study(sweep, tmp_path).optuna_study
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    assert shares["optimizer.momentum"] > 2 * shares["optimizer.lr"]
    pictures = draw_pictures(sweep, study, tmp_path)
    assert [path.name for path in pictures] == [
        "history.png",
        "trials.png",
        "importance.png",
    ]
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error::UserWarning")
def test_pictures_of_trials_with_one_value_say_nothing(tmp_path: Path) -> None:
    sweep = bowl(tmp_path, "random")
    search(sweep, tmp_path, 0, most=1)
    study = open_study(sweep, tmp_path).optuna_study
    assert [path.name for path in draw_pictures(sweep, study, tmp_path)] == [
        "history.png",
        "trials.png",
    ]


# ---------------------------------------------------------------- whole sweeps


def test_a_sweep_goes_on_only_as_what_it_was(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, {"a": {"value": None}, "b": {"value": [1, 2]}}))
    study = open_study(sweep, tmp_path)
    study.add_trial()
    with pytest.raises(ConfigError, match="another sweep is running"):
        open_study(sweep, tmp_path)
    study.close()
    with pytest.raises(ConfigError, match="in: seed; name it otherwise"):
        open_study(sweep, tmp_path, seed=1)
    assert open_study(sweep, tmp_path).trials == [
        Trial(0, {"a": None, "b": [1, 2]}, "interrupted")
    ]


@pytest.mark.parametrize("state", ["done", "stopped", "failed", "interrupted"])
def test_what_became_of_a_trial_outlives_the_sweep(tmp_path: Path, state: Any) -> None:
    sweep = bowl(tmp_path, "bayes")
    study = open_study(sweep, tmp_path)
    for value in (0.25, None):
        trial = study.add_trial()
        assert trial is not None
        trial.state, trial.value, trial.seconds = state, value, 3.5
        trial.reason = "" if state == "interrupted" else "a reason"
        study.save(trial)
    study.close()
    assert open_study(sweep, tmp_path).trials == study.trials


def start(file: Path) -> Program:
    """A sweep, forked; its trials are fresh processes."""
    return Program(["-m", "trainer", "sweep", file])


def states(directory: Path) -> list[tuple[str, str]]:
    """State and reason of each trial in the file of a sweep, which may have been killed."""
    study = optuna.load_study(
        study_name=None, storage=f"sqlite:///{directory / 'sweep.sqlite'}"
    )
    outcomes = [trial.user_attrs.get("outcome", {}) for trial in study.get_trials()]
    return [
        (outcome.get("state", "running"), outcome.get("reason", ""))
        for outcome in outcomes
    ]


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
@pytest.mark.fresh_process  # a sweep's trials are processes that it starts
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its first trial fails; the second is cut off by a SIGKILL of the sweep and goes on from its checkpoint."""
    file = write(
        tmp_path,
        {"optimizer.lr": {"values": [1e30, 0.02]}},
        "train.epochs=8",
        "train.log_every=2",
        # Made up: no import of scikit-learn in each of the processes.
        "data.name=fake",
        "data.size=1472",
        "data.val_size=64",
        "data.image_size=8",
        "data.num_classes=10",
    )
    directory = tmp_path / "small"
    second = directory / "small-001" / "metrics.jsonl"
    sweep = start(file)
    deadline = time.monotonic() + 240
    while not (second.exists() and second.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and sweep.is_running()
        time.sleep(0.05)
    assert running_in(directory)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait(timeout=60)
    assert [state for state, _ in states(directory)] == ["failed", "running"]
    said = (directory / "small-000.log").read_bytes()

    output = start(file).wait(timeout=240).stdout
    assert len(states(directory)) == 2, output
    (failed, reason), (again, _) = states(directory)
    assert (failed, again) == ("failed", "done"), output
    assert reason.startswith("the loss is")
    assert not running_in(directory)
    assert "resumed after step" in (directory / "small-001.log").read_text()
    steps = [json.loads(line)["step"] for line in second.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 8 * 23
    assert "2 trials: 1 done, 1 failed" in output
    page = (directory / "sweep.html").read_text()
    assert "data:image/png;base64" in page and "the loss is" in page
    # What was done is not done again.
    assert (directory / "small-000.log").read_bytes() == said


@pytest.mark.fresh_process
@pytest.mark.slow
def test_a_sweep_needs_no_activated_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command's first word is looked for beside the Python that runs the sweep; one that is nowhere is told of."""
    monkeypatch.setenv("PATH", os.defpath)
    assert shutil.which("accelerate") is None
    file = write(tmp_path, {"optimizer.lr": {"values": [0.05, 0.02]}}, "train.epochs=1")
    tree = yaml.safe_load(file.read_text())
    values = tree["command"][tree["command"].index("${program}") :]

    def sweep_with(launcher: str) -> tuple[int, str]:
        command = ["${env}", launcher, "launch", "--config_file", "launch/one_gpu.yaml"]
        file.write_text(yaml.safe_dump({**tree, "command": [*command, *values]}))
        result = start(file).wait(timeout=240)
        return result.returncode, result.stdout + result.stderr

    status, output = sweep_with("acelerate")
    assert status == 2
    message = output.strip().splitlines()[-1]
    assert message.startswith("error: command: a trial could not start:")
    assert "acelerate" in message
    assert [state for state, _ in states(tmp_path / "small")] == ["interrupted"]
    status, output = sweep_with("accelerate")
    assert status == 0, output
    assert [state for state, _ in states(tmp_path / "small")] == ["done", "done"]
