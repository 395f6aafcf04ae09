"""Other people's code in a run: what observers see, and state that survives a resume on another process count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp, state
from trainer import ConfigError, LockstepError, Observer, Trainer, WeightedSum
from trainer.config.component_lists import ObserverConfig
from trainer.core.metrics import Row
from trainer.core.run import Run
from trainer.data.batches import MicroBatch
from trainer.exact.plan import Step
from trainer.reporting.jsonl import read_rows

SAMPLES = 56  # two steps of 28 an epoch, two epochs


class Recorder(Observer):
    """Notes every call; of the first step also the losses and the gradient."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.loss: list[tuple[float, float]] = []
        self.first_gradient: list[Tensor] = []

    def begin(self, run: Run) -> None:
        self.calls.append("begin")
        self.module = run.module

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        self.calls.append(f"micro_batch {step.number}.{batch.first}")
        if step.number == 1:
            self.loss.append((float(loss.total), float(loss.weight)))

    def gradient(self, step: Step) -> None:
        self.calls.append(f"gradient {step.number}")
        if step.number == 1:
            self.first_gradient = [
                p.grad.clone() for p in self.module.parameters() if p.grad is not None
            ]

    def step(self, step: Step) -> None:
        self.calls.append(f"step {step.number}")

    def row(self, row: Row) -> None:
        row["mine/calls"] = float(row["step"])

    def epoch(self, step: Step, row: Row) -> None:
        self.calls.append(f"epoch {step.epoch} {'val/loss' in row}")

    def end(self, summary: Mapping[str, Any]) -> None:
        self.calls.append(f"end {summary['steps']}")


def record(
    directory: Path, **changes: Any
) -> tuple[list[str], list[tuple[float, float]], list[Tensor], list[str]]:
    recorder = Recorder()
    settings = config(directory, batch__micro_size=14, train__epochs=1, **changes)
    data = Points(SAMPLES, ignored=False)
    Trainer(
        settings, model=mlp(), train_data=data, val_data=data, observers=[recorder]
    ).fit()
    rows = read_rows(directory / "run" / "metrics.jsonl")
    columns = sorted({name for row in rows for name in row if name.startswith("mine/")})
    assert all(row["mine/calls"] == row["step"] for row in rows)
    return recorder.calls, recorder.loss, recorder.first_gradient, columns


def test_an_observer_sees_every_step_on_one_process_and_several(tmp_path: Path) -> None:
    ((calls, losses, gradient, columns),) = on_ranks(1, record, tmp_path / "1")
    steps = [
        f"micro_batch {n}.{i}" if i < 2 else f"{('gradient', 'step')[i - 2]} {n}"
        for n in (1, 2)
        for i in range(4)
    ]
    assert calls == ["begin", *steps, "epoch 0 True", "end 2"]
    assert columns == ["mine/calls"]

    # The gradient of the mean loss, by plain PyTorch.
    data = Points(SAMPLES, ignored=False)
    trainer = Trainer(config(tmp_path), model=mlp(), train_data=data, val_data=data)
    ids = trainer.plan.permutation(0)[:28]
    net = mlp().double()
    loss = nn.functional.cross_entropy(net(data.points[ids]), data.labels[ids])
    loss.backward()  # type: ignore[no-untyped-call]
    expected = [p.grad for p in net.parameters()]
    assert sum(total for total, _ in losses) / sum(
        weight for _, weight in losses
    ) == pytest.approx(loss.item(), 1e-12)
    for actual, by_hand in zip(gradient, expected, strict=True):
        assert torch.allclose(actual, by_hand, rtol=1e-12, atol=1e-15)

    results = on_ranks(2, record, tmp_path / "2")
    for rank, (calls, _, on_two, _) in enumerate(results):
        steps = [
            f"micro_batch 1.{rank}",
            "gradient 1",
            "step 1",
            f"micro_batch 2.{rank}",
            "gradient 2",
            "step 2",
        ]
        assert calls == ["begin", *steps, "epoch 0 True", "end 2"]
        for actual, by_hand in zip(on_two, expected, strict=True):
            assert torch.allclose(actual, by_hand, rtol=1e-12, atol=1e-15)


class Average(Observer):
    """An exponential moving average of the weights, and a count."""

    def begin(self, run: Run) -> None:
        self.model = run.module
        self.average = AveragedModel(run.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.count = 0

    def step(self, step: Step) -> None:
        self.average.update_parameters(self.model)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.average.load_state_dict(state["average"])
        self.count = state["count"]


class AveragingTrainer(Trainer):
    """A subclass with state of its own."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.average = AveragedModel(
            self.module, multi_avg_fn=get_ema_multi_avg_fn(0.5)
        )

    def train_step(self, step: Step) -> None:
        super().train_step(step)
        self.average.update_parameters(self.module)


def average(
    directory: Path, how: str, max_steps: int | None = None
) -> dict[str, Tensor]:
    settings = config(
        directory,
        batch__micro_size=7,
        run__reproducibility="bitwise",
        run__resume="auto",
        train__max_steps=max_steps,
    )
    data = Points(SAMPLES, ignored=False)
    parts = {"model": mlp(), "train_data": data, "val_data": data}
    if how == "subclass":
        trainer: Any = AveragingTrainer(settings, **parts)
        trainer.fit()
        return dict(trainer.average.state_dict())
    if how == "config":
        named = ObserverConfig(name=f"{__name__}.Average")
        trainer = Trainer(replace(settings, observers=(named,)), **parts)
    else:
        trainer = Trainer(settings, observers=[Average()], **parts)
    trainer.fit()
    (observer,) = trainer.observers
    assert observer.count == (max_steps or 4)
    return dict(observer.average.state_dict())


@pytest.mark.parametrize("how", ["observer", "config", "subclass"])
def test_state_of_ones_own_survives_a_resume_on_another_number_of_processes(
    tmp_path: Path, how: str
) -> None:
    (reference,) = on_ranks(1, average, tmp_path / "straight", how)
    on_ranks(2, average, tmp_path / "cut", how, max_steps=1)
    on_ranks(3, average, tmp_path / "cut", how, max_steps=3)
    (resumed,) = on_ranks(1, average, tmp_path / "cut", how)
    assert resumed.keys() == reference.keys()
    assert all(torch.equal(resumed[name], reference[name]) for name in reference)
    fresh = AveragedModel(mlp().double()).state_dict()
    assert not torch.equal(reference["module.0.weight"], fresh["module.0.weight"])


class Local(Observer):
    """Keeps what only its own rank knows: the loss of its micro-batches."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def micro_batch(
        self, step: Step, batch: MicroBatch, output: Any, loss: WeightedSum
    ) -> None:
        self.total = self.total + float(loss.total)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: Any) -> None:
        self.total = state["total"]


def test_state_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    def fit(directory: Path) -> str:
        data = Points(SAMPLES, ignored=False)
        settings = config(directory, batch__micro_size=14)
        try:
            Trainer(
                settings,
                model=mlp(),
                train_data=data,
                val_data=data,
                observers=[Local()],
            ).fit()
        except LockstepError as error:
            return str(error)
        return ""

    assert on_ranks(1, fit, tmp_path / "1") == [""]
    for message in on_ranks(2, fit, tmp_path / "2"):
        assert "the state of Local on rank 1 is not that of rank 0" in message


def test_a_resume_says_which_state_it_did_not_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Points(SAMPLES, ignored=False)

    def fit(observers: list[Observer], max_steps: int) -> str:
        settings = config(
            tmp_path,
            batch__micro_size=14,
            run__resume="auto",
            train__max_steps=max_steps,
        )
        Trainer(
            settings, model=mlp(), train_data=data, val_data=data, observers=observers
        ).fit()
        return " ".join(capsys.readouterr().out.split())

    assert "starts afresh" not in fit([Average()], 1)
    text = fit([Local()], 2)
    assert "Local starts afresh" in text
    assert "the checkpoint's state of Average is left out" in text


@pytest.mark.parametrize("wrong", [Recorder, object(), lambda step: None])
def test_what_is_no_observer_is_refused(tmp_path: Path, wrong: Any) -> None:
    data = Points(SAMPLES, ignored=False)
    with pytest.raises(
        ConfigError,
        match=r"observers: .*(is a class|is not a subclass of trainer\.Observer)",
    ):
        Trainer(
            config(tmp_path),
            model=mlp(),
            train_data=data,
            val_data=data,
            observers=[wrong],
        )


def test_an_object_without_state_is_refused_by_name(tmp_path: Path) -> None:
    data = Points(SAMPLES, ignored=False)
    wrong: Any = {"counter": object()}
    with pytest.raises(
        ConfigError, match=r"stateful\.counter: object has no state_dict"
    ):
        Trainer(
            config(tmp_path),
            model=mlp(),
            train_data=data,
            val_data=data,
            stateful=wrong,
        )


def trainer_of(directory: Path, cls: type[Trainer] = Trainer, **more: Any) -> Trainer:
    data = Points(SAMPLES, ignored=False)
    settings = config(directory, batch__micro_size=14, run__resume="auto")
    return cls(settings, model=mlp(), train_data=data, val_data=data, **more)


def saved_states(directory: Path) -> set[str]:
    """The names of the stateful objects in the newest checkpoint."""
    checkpoints = directory / "run" / "checkpoints"
    newest = checkpoints / (checkpoints / "last").read_text().strip()
    return set(json.loads((newest / "state.json").read_text()).get("stateful", []))


class Counter:
    """The least that has a state."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


class CountingTrainer(Trainer):
    """State before and after `Trainer.__init__` and in `fit`, private, shared with an observer; and what is none."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.early = Counter()
        super().__init__(*args, **more)
        self._private = Counter()
        self.head = self.module[-1]  # type: ignore[index]
        self.net = self.module
        self.average_class = AveragedModel
        self.observer = Average()
        self.observers.add(self.observer)

    def fit(self) -> dict[str, Any]:
        self.late = Counter()
        return super().fit()

    def train_step(self, step: Step) -> None:
        super().train_step(step)
        for counter in (self.early, self._private, self.late):
            counter.count += 1


def test_every_object_of_a_subclass_is_saved_once_and_the_model_with_itself_alone(
    tmp_path: Path,
) -> None:
    trainer_of(tmp_path, CountingTrainer).fit()
    assert saved_states(tmp_path) == {"early", "private", "observer", "late"}
    resumed: Any = trainer_of(tmp_path, CountingTrainer)
    resumed.fit()
    assert [resumed.early.count, resumed._private.count, resumed.late.count] == [
        4,
        4,
        4,
    ]
    assert resumed.observer.count == 4


def test_an_object_passed_by_name_and_kept_as_an_attribute_is_one(
    tmp_path: Path,
) -> None:
    class Keeping(Trainer):
        def __init__(self, *args: Any, stateful: Any, **more: Any) -> None:
            super().__init__(*args, stateful=stateful, **more)
            self.counter = stateful["passed"]

    trainer_of(tmp_path, Keeping, stateful={"passed": Counter(3)}).fit()
    assert saved_states(tmp_path) == {"passed"}


@pytest.mark.parametrize(
    "how",
    ["observer", "observer in another case", "second observer", "attribute", "file"],
)
def test_two_objects_of_one_name_are_refused_before_training(
    tmp_path: Path, how: str
) -> None:
    """On a resume, one would be given the other's state."""

    class Model(Trainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.model = Counter()

    class Keeping(Trainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.counter = Counter()

    cases: dict[str, tuple[type[Trainer], dict[str, Any], str]] = {
        "observer": (
            Trainer,
            {"stateful": {"Average": Counter()}, "observers": [Average()]},
            "Average: a checkpoint",
        ),
        "observer in another case": (
            Trainer,
            {"stateful": {"average": Counter()}, "observers": [Average()]},
            r"stateful\.Average: .* state of a Counter under this name \(average\)",
        ),
        "second observer": (
            Trainer,
            {"stateful": {"Average-2": Counter()}, "observers": [Average(), Average()]},
            r"stateful\.Average-2",
        ),
        "attribute": (
            Keeping,
            {"stateful": {"counter": Counter()}},
            r"stateful\.counter: .*needs another",
        ),
        "file": (Model, {}, '"model" names a file that every checkpoint has'),
    }
    cls, more, message = cases[how]
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, cls, **more).fit()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_class_is_no_stateful_object(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stateful\.counter: Counter is a class"):
        trainer_of(tmp_path, stateful={"counter": Counter})


class Loading(Average):
    """Notes whether its state is loaded after `begin`."""

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.loads = 0
        self.first_bias = run.module.state_dict()["0.bias"].clone()

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.loads += 1


def test_state_is_loaded_once_and_after_begin_which_sees_the_restored_model(
    tmp_path: Path,
) -> None:
    trainer = trainer_of(tmp_path, observers=[Loading()])
    trainer.fit()
    resumed = trainer_of(tmp_path, observers=[observer := Loading()])
    resumed.fit()
    assert (observer.loads, observer.count) == (1, 4)
    assert torch.equal(observer.first_bias, trainer.module.state_dict()["0.bias"])
    resumed.start()
    assert observer.loads == 0, "begun anew, not restored anew"
    resumed.end_loading()


METHODS = [
    "begin",
    "micro_batch",
    "gradient",
    "step",
    "row",
    "epoch",
    "end",
    "state_dict",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_an_observer_on_one_rank_ends_all(
    tmp_path: Path, method: str, rank: int
) -> None:
    def fit(directory: Path) -> str:
        observer = Average()
        trainer = trainer_of(directory, observers=[observer])

        def fail(*_: Any) -> None:
            raise RuntimeError("broken on this rank") from KeyError("its cause")

        if trainer.ranks.rank == rank:
            setattr(Average, method, fail)
        try:
            trainer.fit()
        except Exception as error:
            if trainer.ranks.rank == rank:
                assert isinstance(error.__cause__, KeyError), (
                    "the observer's own error, with what caused it"
                )
            return str(error)
        return ""

    messages = on_ranks(2, fit, tmp_path)
    assert messages[rank] == "broken on this rank"
    # Rank 0 has written its summary by then, and nothing is left to do together.
    if method != "end":
        assert messages[1 - rank]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "train/loss",
            0.0,
            r'Writing\.row changes "train/loss"; add a column under a name of its own',
        ),
        ("lr", None, r'Writing\.row changes "lr"'),
        (
            "mine/tensor",
            torch.ones(()),
            r'Writing\.row gives "mine/tensor" a Tensor; give it a number',
        ),
        ("mine/text", "high", r'Writing\.row gives "mine/text" a str'),
    ],
)
def test_an_observer_adds_columns_of_numbers_and_changes_none(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    class Writing(Observer):
        def row(self, row: Row) -> None:
            row[name] = value
            if value is None:
                del row[name]

    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, observers=[Writing()]).fit()


def test_of_columns_that_differ_between_ranks_rank_0_is_written(tmp_path: Path) -> None:
    class Writing(Observer):
        def begin(self, run: Run) -> None:
            self.rank = run.ranks.rank

        def row(self, row: Row) -> None:
            row["mine/rank"] = float(self.rank)

    on_ranks(
        2,
        lambda directory: trainer_of(directory, observers=[Writing()]).fit() and None,
        tmp_path,
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["mine/rank"] for row in rows] == [0.0] * len(rows)


def test_a_loop_of_ones_own_takes_the_same_steps(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "own")
    with trainer.run.settings():
        trainer.start()
        for step in trainer.plan.steps():
            trainer.train_step(step)
        row = trainer.measure(step)
        metrics = trainer.evaluate()
        trainer.end_loading()
        with pytest.raises(
            LockstepError,
            match=r"fit\(\) opens the run directory.*use measure\(\) and evaluate\(\)",
        ):
            trainer.log(step)
    reference = trainer_of(tmp_path / "fit")
    reference.fit()
    *_, logged = read_rows(tmp_path / "fit" / "run" / "metrics.jsonl")
    assert metrics["loss"] == logged["val/loss"]
    assert row["step"] == logged["step"]
    weights = state(trainer)
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in state(reference).items()
    )


def test_a_step_before_start_says_what_to_call(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(LockstepError, match=r"call start\(\) once before"):
        trainer.train_step(trainer.plan.step(0))


def test_training_data_alone_is_enough(tmp_path: Path) -> None:
    """Without validation data the best model is that of the least training loss."""
    trainer = Trainer(
        config(tmp_path, batch__micro_size=14),
        model=mlp(),
        train_data=Points(SAMPLES, ignored=False),
    )
    summary = trainer.fit()
    assert summary["best_metric"] == "train/loss"
    assert summary["best"] is not None
    weights = state(trainer)
    trainer.load_best()
    assert state(trainer).keys() == weights.keys()
