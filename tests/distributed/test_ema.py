"""The average of the weights (`ema`): against torch's own, on any number of processes, stopped and resumed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import CLASSES, Images, config, conv_net, mlp, rows_of
from tests.distributed.small import Points as AllPoints
from trainer import ConfigError, LockstepError, Observer, Run, Step, Task, Trainer
from trainer.config.run_sections import EmaConfig
from trainer.config.schema import Config
from trainer.core.ema import WeightAverage
from trainer.reporting.jsonl import read_rows

SAMPLES = 56  # two steps of 28 an epoch


def images() -> Images:
    return Images(SAMPLES)


def trainer_of(directory: Path, **more: Any) -> Trainer:
    observers = more.pop("observers", ())
    return Trainer(
        config(directory, **more),
        model=conv_net(),
        train_data=images(),
        val_data=images(),
        observers=observers,
    )


class Weights(Observer):
    """Copies the parameters and the running statistics after each step."""

    reads_statistics = True

    def begin(self, run: Run) -> None:
        self.module = run.module
        self.after: list[dict[str, Tensor]] = []

    def step(self, step: Step) -> None:
        state = self.module.state_dict()
        self.after.append({name: value.clone() for name, value in state.items()})


def torchs_average(
    states: list[dict[str, Tensor]], *, start: int, every: int, warmup: bool
) -> dict[str, Tensor]:
    """What torch's `AveragedModel` makes of a net with these states after its steps."""
    net = conv_net().double()
    average = AveragedModel(net)
    for number, state in enumerate(states, start=1):
        net.load_state_dict(state)
        if number > start and number % every == 0:
            updates = int(average.n_averaged)
            decay = min(0.9, (1 + updates) / (10 + updates)) if warmup else 0.9
            average.multi_avg_fn = get_ema_multi_avg_fn(decay)
            average.update_parameters(net)
    averages = {name: p.detach() for name, p in average.module.named_parameters()}
    due = [
        state
        for number, state in enumerate(states, start=1)
        if number > start and number % every == 0
    ]
    for name in ("1.running_mean", "1.running_var"):
        value = due[0][name]
        for updates, state in enumerate(due[1:], start=1):
            decay = min(0.9, (1 + updates) / (10 + updates)) if warmup else 0.9
            value = torch.lerp(value, state[name], 1 - decay)
        averages[name] = value
    return averages


@pytest.mark.parametrize(
    ("start", "every", "warmup"), [(0, 1, False), (3, 2, False), (0, 1, True)]
)
def test_it_is_torchs_average_bit_for_bit(
    tmp_path: Path, start: int, every: int, warmup: bool
) -> None:
    def fit() -> None:
        weights = Weights()
        trainer = trainer_of(
            tmp_path,
            ema__decay=0.9,
            ema__start=start,
            ema__every=every,
            ema__warmup=warmup,
            train__epochs=4,
            observers=[weights],
        )
        trainer.fit()
        expected = torchs_average(
            weights.after, start=start, every=every, warmup=warmup
        )
        actual = trainer._average.tensors()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        for row in read_rows(tmp_path / "run" / "metrics.jsonl"):
            if "val/loss" in row:  # up to the first update, the weights themselves
                is_equal = row["val_ema/loss"] == row["val/loss"]
                assert is_equal == (row["step"] <= start + 1)
        last = weights.after[-1]
        assert not torch.equal(actual["0.weight"], last["0.weight"])

    on_ranks(1, fit)


def run_with_average(directory: Path, **changes: Any) -> dict[str, Any]:
    """What a run with an average leaves: its hashes, its rows, the best model's file and the average."""
    changes = {"ema__decay": 0.7, "best__metric": "val_ema/loss"} | changes
    trainer = trainer_of(directory, batch__micro_size=7, **changes)
    summary = trainer.fit()
    path = directory / "run"
    names = ("weights_sha256", "buffers_sha256", "ema_sha256", "best", "best_epoch")
    return {
        "hashes": [summary[name] for name in names],
        "rows": rows_of(path),
        "best": (path / "best" / "model.safetensors").read_bytes(),
        "average": dict(trainer._average.tensors()),
        "weights": dict(trainer.module.state_dict()),
    }


def test_any_number_of_processes_stopped_or_not_has_the_same_average(
    tmp_path: Path,
) -> None:
    bitwise: dict[str, Any] = {"run__reproducibility": "bitwise", "run__resume": "auto"}
    (one,) = on_ranks(1, run_with_average, tmp_path / "1", **bitwise)
    # After step 2 the checkpoint of an epoch's end, after 1 and 3 those within an epoch.
    on_ranks(2, run_with_average, tmp_path / "cut", **bitwise, train__stop_after=1)
    on_ranks(1, run_with_average, tmp_path / "cut", **bitwise, train__stop_after=3)
    results = on_ranks(3, run_with_average, tmp_path / "cut", **bitwise)
    results += on_ranks(2, run_with_average, tmp_path / "2", **bitwise)
    for other in results:
        assert other["hashes"] == one["hashes"]
        assert other["rows"] == one["rows"]
        assert other["best"] == one["best"]
    evaluated = [row for row in one["rows"] if "val_ema/loss" in row]
    assert len(evaluated) == 2
    assert all(row["val_ema/loss"] != row["val/loss"] for row in evaluated)


@pytest.mark.parametrize(
    "frozen",
    [
        {},
        # The model is prepared anew, and its buffers are other tensors then.
        {"model__freeze": ["0", "1"], "model__unfreeze": {1: ["1"]}},
    ],
)
def test_standard_mode_averages_whole_statistics(
    tmp_path: Path, frozen: dict[str, Any]
) -> None:
    """There each rank holds its share of them, between the steps of updates and evaluations, which are others here."""
    settings: dict[str, Any] = {
        **frozen,
        "ema__every": 3,
        "ema__evaluate": "instead",
        "best__metric": "val/loss",
        "train__epochs": 3,
        "run__proof": "off",
    }
    (one,) = on_ranks(1, run_with_average, tmp_path / "1", **settings)
    for other in on_ranks(3, run_with_average, tmp_path / "3", **settings):
        for kind in ("average", "weights"):
            for name, value in one[kind].items():
                if value.is_floating_point():
                    assert torch.allclose(
                        other[kind][name], value, rtol=1e-11, atol=1e-13
                    )
        for row, other_row in zip(one["rows"], other["rows"], strict=True):
            if "val/loss" in row:
                assert other_row["val/loss"] == pytest.approx(
                    row["val/loss"], rel=1e-11
                )


@pytest.mark.parametrize(
    ("evaluate", "at"), [("beside", ""), ("instead", "evaluation"), ("beside", "end")]
)
def test_the_best_model_is_the_average_that_was_evaluated(
    tmp_path: Path, evaluate: str, at: str
) -> None:
    """Its statistics too, recalibrated for its own weights where the config asks for it."""

    def fit() -> None:
        phase = "val_ema" if evaluate == "beside" else "val"
        recalibration = (
            {"batch_norm__recalibrate": 2, "batch_norm__recalibrate_at": at}
            if at
            else {}
        )
        trainer = trainer_of(
            tmp_path,
            ema__decay=0.5,
            ema__evaluate=evaluate,
            best__metric=f"{phase}/loss",
            **recalibration,
        )
        weights = Weights()
        trainer.observers.add(weights)
        trainer.fit()
        for name, value in trainer.module.state_dict().items():
            if evaluate == "instead" or not name.startswith("1.running"):
                # Evaluating the average has left no trace in the model.
                assert torch.equal(value, weights.after[-1][name]) or at == "end"
        average = trainer._average.tensors()
        row = trainer.load_best()
        best = trainer.module.state_dict()
        assert row["step"] == 4
        assert all(torch.equal(best[name], average[name]) for name in average)
        # As predict and export use it.
        plain = conv_net().double()
        plain.load_state_dict(best)
        plain.eval()
        data = images()
        loss = nn.functional.cross_entropy(plain(data.points), data.labels)
        assert float(loss.detach()) == pytest.approx(row[f"{phase}/loss"], rel=1e-12)
        assert ("val_ema/loss" in row) == (evaluate == "beside")
        if at:  # over all samples, by the average's own weights
            values = plain.get_submodule("0")(data.points).detach()
            mean = values.mean((0, 2, 3))
            assert torch.allclose(average["1.running_mean"], mean, rtol=0, atol=1e-12)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["ema_sha256"]

    on_ranks(1, fit)


class FailsOnAverage(Observer):
    """Fails in the evaluation of the average."""

    def begin(self, run: Run) -> None:
        self.module = run.module

    def evaluation_batch(
        self, evaluation: str, ids: Any, output: Any, targets: Any
    ) -> None:
        if evaluation == "val_ema":
            self.seen = {n: v.clone() for n, v in self.module.state_dict().items()}
            raise LockstepError("no")


def test_an_evaluation_that_fails_leaves_the_weights_as_they_were(
    tmp_path: Path,
) -> None:
    weights = Weights()
    failing = FailsOnAverage()
    trainer = trainer_of(tmp_path, ema__decay=0.9, observers=[weights, failing])
    with pytest.raises(LockstepError, match="no"):
        trainer.fit()
    now = trainer.module.state_dict()
    assert all(
        torch.equal(now[name], value) for name, value in weights.after[-1].items()
    )
    average = trainer._average.tensors()
    assert all(torch.equal(failing.seen[name], average[name]) for name in average)
    assert not torch.equal(now["0.weight"], average["0.weight"])


def test_frozen_parameters_join_when_they_are_thawed(tmp_path: Path) -> None:
    def fit() -> None:
        weights = Weights()
        trainer = trainer_of(
            tmp_path,
            ema__decay=0.9,
            model__freeze=["0"],
            model__unfreeze={1: ["0"]},
            model__head="4",
            observers=[weights],
        )
        trainer.fit()
        frozen = weights.after[1]["0.weight"]
        assert torch.equal(frozen, weights.after[0]["0.weight"])
        third, fourth = (state["0.weight"] for state in weights.after[2:])
        expected = torch.lerp(torch.lerp(frozen, third, 0.1), fourth, 0.1)
        average = trainer._average.tensors()["0.weight"]
        assert torch.allclose(average, expected, rtol=1e-14, atol=0)

    on_ranks(1, fit)


def test_steps_that_fp16_leaves_out_do_not_move_it() -> None:
    """The device counts updates there; the same average as by the host, to rounding, and exact where nothing moves."""
    net = nn.Linear(3, 2)
    cpu = torch.device("cpu")
    section = EmaConfig(decay=0.9, warmup=True)
    by_device = WeightAverage(section, net, Task(), device=cpu, counts_on_device=True)
    by_host = WeightAverage(section, net, Task(), device=cpu)
    by_device.begin()
    by_host.begin()
    draw = torch.Generator().manual_seed(0)
    for skipped in (True, False, False, True, True, False, False):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        before = {name: value.clone() for name, value in by_device.tensors().items()}
        by_device.update(torch.tensor([float(skipped)]))
        if skipped:
            for name, value in by_device.tensors().items():
                assert torch.equal(value, before[name])
            continue
        by_host.update()
        for name, value in by_host.tensors().items():
            assert torch.allclose(
                by_device.tensors()[name], value, rtol=1e-6, atol=1e-7
            )
        if by_host.updates == 1:
            assert torch.equal(by_device.tensors()["weight"], net.weight)
    assert by_device.state_dict()["updates"] == by_host.updates == 4


def test_a_run_in_fp16_averages_the_steps_that_it_made(tmp_path: Path) -> None:
    def fit() -> None:
        weights = Weights()
        trainer = trainer_of(
            tmp_path,
            ema__decay=0.9,
            train__precision="fp16",
            train__epochs=4,
            observers=[weights],
        )
        # So large that the first steps overflow; the scale is halved until they do not.
        trainer.run.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
        skipped = trainer.fit()["skipped_steps"]
        assert 1 <= skipped < 7
        average = trainer._average
        assert average.updates == 8 - skipped
        made = [state["0.weight"] for state in weights.after[skipped:]]
        expected = made[0]
        for state in made[1:]:
            expected = torch.lerp(expected, state, 0.1)
        actual = average.tensors()["0.weight"]
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-8)

    on_ranks(1, fit)


class Poisoned(AllPoints):
    """One sample that is not finite."""

    def __init__(self) -> None:
        super().__init__(SAMPLES, ignored=False)
        self.points[11] = float("nan")


def test_steps_left_out_because_they_are_not_finite_do_not_move_it(
    tmp_path: Path,
) -> None:
    def fit() -> None:
        weights = Weights()
        trainer = Trainer(
            config(tmp_path, ema__decay=0.9, train__non_finite="skip", train__epochs=3),
            model=mlp(),
            train_data=Poisoned(),
            val_data=AllPoints(SAMPLES, ignored=False),
            observers=[weights],
        )
        assert trainer.fit()["skipped_steps"] == 3
        after = [state["0.weight"] for state in weights.after]
        start = mlp().double().state_dict()["0.weight"]
        moved = [
            state
            for before, state in pairwise([start, *after])
            if not torch.equal(before, state)
        ]
        assert len(moved) == 3
        expected = torch.lerp(torch.lerp(moved[0], moved[1], 0.1), moved[2], 0.1)
        average = trainer._average.tensors()["0.weight"]
        assert torch.allclose(average, expected, rtol=1e-14, atol=0)

    on_ranks(1, fit)


class Centred(Task):
    """Cross-entropy, and a weight of the loss's own."""

    metrics = ()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def loss_sum(self, output: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        scaled = output * self.scale
        return nn.functional.cross_entropy(scaled, targets, reduction="sum"), len(
            targets
        )


def test_the_loss_s_own_parameters_are_averaged_with_the_models(tmp_path: Path) -> None:
    def fit() -> None:
        task = Centred()
        trainer = Trainer(
            config(tmp_path, ema__decay=0.5, best__metric="val_ema/loss"),
            model=mlp(),
            train_data=AllPoints(SAMPLES, ignored=False),
            val_data=AllPoints(SAMPLES, ignored=False),
            task=task,
        )
        trainer.fit()
        average = trainer._average.tensors()["loss/scale"]
        assert not torch.equal(average, task.scale)
        logged = trainer.load_best()
        assert torch.equal(task.scale, average)
        assert trainer.evaluate()["loss"] == logged["val_ema/loss"]

    on_ranks(1, fit)


class SwitchedSGD(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema__decay": 1.0}, r"ema\.decay: 1 is not below 1"),
        ({"ema__decay": 0.9, "ema__every": 0}, r"ema\.every"),
        (
            {"best__metric": "val_ema/loss"},
            r'best\.metric: "val_ema/loss" is not logged',
        ),
        (
            {
                "best__metric": "val_ema/loss",
                "ema__decay": 0.9,
                "ema__evaluate": "instead",
            },
            r'best\.metric: "val_ema/loss" is not logged',
        ),
        (
            {"ema__decay": 0.9, "optimizer__name": f"{__name__}.SwitchedSGD"},
            r"ema\.decay: .*SwitchedSGD evaluates an average of its own",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, **changes)


class Phases(Observer):
    """The evaluations that it is told of, and how many samples it saw in each."""

    def __init__(self) -> None:
        self.samples: dict[str, int] = {}
        self.ended: list[str] = []

    def evaluation_batch(
        self, evaluation: str, ids: Any, output: Any, targets: Any
    ) -> None:
        self.samples[evaluation] = self.samples.get(evaluation, 0) + len(ids)

    def evaluation(
        self, evaluation: str, step: Step, metrics: dict[str, float]
    ) -> None:
        self.ended.append(f"{evaluation} {step.number} {sorted(metrics)}")


def test_named_sets_and_a_test_set_are_evaluated_with_the_average(
    tmp_path: Path,
) -> None:
    def fit() -> None:
        phases = Phases()
        trainer = Trainer(
            config(
                tmp_path,
                ema__decay=0.5,
                best__metric="val_ema/other/loss",
                train__evaluate_every_steps=1,
                early_stop__patience=1,
                early_stop__min_delta=10,
            ),
            model=conv_net(),
            train_data=images(),
            val_data={"same": images(), "other": Images(30)},
            test_data=Images(40),
            observers=[phases],
        )
        summary = trainer.fit()
        # Ended by the second evaluation, which is the first epoch's end.
        assert (
            summary["steps"] == 2
            and "early_stop: val_ema/other/loss" in summary["stopped_by"]
        )
        names = ["val/same", "val/other", "val_ema/same", "val_ema/other"]
        assert phases.samples == dict(zip(names, (112, 60, 112, 60), strict=True))
        assert phases.ended == [
            f"{name} {step} ['accuracy', 'loss']" for step in (1, 2) for name in names
        ]
        last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
        average = trainer._average.tensors()
        row = trainer.load_best()
        best = trainer.module.state_dict()
        if row["step"] == 2:
            assert all(torch.equal(best[name], average[name]) for name in average)
        assert trainer.evaluate()["other/loss"] == row["val_ema/other/loss"]
        assert trainer.run.test is not None
        assert trainer.run.test.evaluator.evaluate()["loss"] == last["test/loss"]

    on_ranks(1, fit)


def test_a_named_metric_of_the_average_may_decide(tmp_path: Path) -> None:
    def fit() -> None:
        tree = config(
            tmp_path,
            ema__decay=0.5,
            best__metric="val_ema/f1_score",
            early_stop__patience=9,
        ).to_dict()
        name = "torchmetrics.classification.MulticlassF1Score"
        tree["metrics"] = [{"name": name, "average": "macro"}]
        settings = Config.from_dict(tree)
        parts: dict[str, Any] = {"train_data": images(), "val_data": images()}
        trainer = Trainer(settings, model=conv_net(), **parts)
        assert trainer.config.best.mode == trainer.config.early_stop.mode == "max"
        best = trainer.fit()["best"]
        row = trainer.load_best()
        assert row["val_ema/f1_score"] == best
        assert trainer.evaluate()["f1_score"] == best

    on_ranks(1, fit)
