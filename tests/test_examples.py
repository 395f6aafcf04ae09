"""What docs/bring-your-own.md and docs/extending.md show, run for real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from examples.bring_your_own.task import Segmentation
from examples.extending import contrastive, gan
from examples.extending.averaged_weights import AveragedWeights
from examples.extending.focal_loss import FocalLoss
from examples.extending.gan import GanTrainer
from examples.extending.lookahead import LookaheadTrainer
from examples.extending.swa import StochasticWeightAverage
from examples.extending.time_limit import TimeLimit
from examples.extending.update_size import UpdateSize
from tests.distributed.ranks import on_ranks
from tests.distributed.small import largest_difference, state
from tests.programs import run_program
from trainer import Config, ConfigError, Task, Trainer
from trainer.components.task import build_task
from trainer.config.load import load
from trainer.config.model_sections import LossConfig
from trainer.reporting.jsonl import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "bring_your_own" / "discs.yaml"


def discs(directory: Path, *more: str) -> tuple[float, Any]:
    overrides = [
        "wandb.mode=disabled",
        "run.figures=false",
        f"run.dir={directory}",
        *more,
    ]
    trainer = Trainer(load(CONFIG, overrides))
    return float(trainer.fit()["best"]), state(trainer)


def test_the_project_learns(tmp_path: Path) -> None:
    assert (
        on_ranks(
            1, discs, tmp_path, "train.epochs=3", "data.samples=400", "model.width=8"
        )[0][0]
        > 0.5
    )


def test_the_project_is_the_same_run_on_two_processes(tmp_path: Path) -> None:
    """Its loss divides by a weight of its own and its metric by a union, each over all processes."""
    short = ["train.max_steps=4", "data.samples=80", "train.precision=fp64"]
    ((best, weights),) = on_ranks(1, discs, tmp_path / "one", *short)
    for other_best, other_weights in on_ranks(2, discs, tmp_path / "two", *short):
        assert other_best == pytest.approx(best, rel=1e-9)
        assert largest_difference(other_weights, weights) < 1e-9


def test_its_loss_and_metric_by_hand() -> None:
    output = torch.tensor([[2.0, -1.0, 0.5, -3.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    total, weight = Segmentation(disc_weight=3.0).loss_sum(output, targets)
    losses = nn.BCEWithLogitsLoss(reduction="none")(output, targets)[0]
    assert float(total / weight) == pytest.approx(
        float(3 * losses[:2].sum() + losses[2:].sum()) / 8, rel=1e-12
    )
    intersection, union = Segmentation().metric_sums(output, targets)["iou"]
    assert (int(intersection), int(union)) == (1, 3)


class Bare(Task):
    """A task without a constructor, which is what most need."""


def test_a_task_needs_no_constructor() -> None:
    assert isinstance(build_task(LossConfig(name=f"{__name__}.Bare"), 10), Bare)


def test_python_use_in_ten_lines(tmp_path: Path) -> None:
    """Run in another directory, as a project that installed the package would be."""
    path = ROOT / "examples" / "bring_your_own" / "python_use.py"
    body = [line for line in path.read_text().split('"""\n', 1)[1].splitlines() if line]
    assert len(body) <= 10
    short = path.read_text().replace('"epochs": 3', '"max_steps": 2')
    assert short != path.read_text()
    short = short.replace("settings = {", 'settings = {"wandb": {"mode": "disabled"}, ')
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    result = run_program(["-c", short], cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "val/iou" in result.stdout
    assert (tmp_path / "runs" / "run" / "summary.json").is_file()


# ---------------------------------------------------------------- docs/extending.md


def digits(
    directory: Path, *more: str, trainer: type[Trainer] = Trainer, observers: Any = ()
) -> Trainer:
    """A run of the default config, which has BatchNorm, as a Trainer that has trained."""
    overrides = [
        "wandb.mode=disabled",
        "run.figures=false",
        f"run.dir={directory}",
        "train.log_every=1",
        *more,
    ]
    a_trainer = trainer(
        load(ROOT / "configs" / "digits.yaml", overrides), observers=observers
    )
    a_trainer.fit()
    return a_trainer


def test_the_update_size_by_hand(tmp_path: Path) -> None:
    def fit() -> None:
        plain_descent = [
            "train.max_steps=1",
            "optimizer.momentum=0",
            "optimizer.weight_decay=0",
        ]
        start = Trainer(load(ROOT / "configs" / "digits.yaml", plain_descent))
        length = nn.utils.parameters_to_vector(start.module.parameters()).norm()
        digits(tmp_path, *plain_descent, observers=[UpdateSize()])
        row, epoch_row = read_rows(tmp_path / "digits" / "metrics.jsonl")
        assert row["update_size"] == pytest.approx(
            row["lr"] * row["grad_norm"] / float(length), rel=1e-4
        )
        assert epoch_row["update_size"] == row["update_size"]

    on_ranks(1, fit)


def test_the_update_size_is_measured_every_so_often(tmp_path: Path) -> None:
    """Named in the config, as docs/extending.md shows it."""

    def fit() -> None:
        name = "examples.extending.update_size.UpdateSize"
        digits(tmp_path, "train.max_steps=5", f"observers=[{{name: {name}, every: 2}}]")
        sizes = [
            row.get("update_size")
            for row in read_rows(tmp_path / "digits" / "metrics.jsonl")
        ][:5]
        assert sizes[0] is None
        assert sizes[1] == sizes[2] != sizes[3] == sizes[4]

    on_ranks(1, fit)


def averaged(
    directory: Path, max_steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """The averaged weights, the model's, and the loss of the averaged ones."""
    settings = [
        "run.reproducibility=bitwise",
        "run.resume=auto",
        f"train.max_steps={max_steps}",
    ]
    observer = AveragedWeights(decay=0.5)
    trainer = digits(directory, *settings, observers=[observer])
    row = read_rows(directory / "digits" / "metrics.jsonl")[-1]
    return (
        dict(observer.average.module.state_dict()),
        state(trainer),
        row["val/averaged_loss"],
    )


def test_averaged_weights_are_the_same_after_a_resume_on_other_processes(
    tmp_path: Path,
) -> None:
    ((reference, weights, loss),) = on_ranks(1, averaged, tmp_path / "straight", 5)
    on_ranks(2, averaged, tmp_path / "cut", 2)
    for average, others, other_loss in on_ranks(3, averaged, tmp_path / "cut", 5):
        assert all(torch.equal(others[name], weights[name]) for name in weights)
        names = [name for name, _ in digits_net().named_parameters()]
        assert all(torch.equal(average[name], reference[name]) for name in names)
        assert other_loss == loss
    (checkpoint,) = (tmp_path / "cut" / "digits" / "checkpoints").glob("step_*5")
    straight = tmp_path / "straight" / "digits" / "checkpoints" / checkpoint.name
    for file in (
        "AveragedWeights.safetensors",
        "AveragedWeights.json",
    ):  # with BatchNorm's whole statistics
        assert (checkpoint / file).read_bytes() == (straight / file).read_bytes()


def digits_net() -> nn.Module:
    return Trainer(load(ROOT / "configs" / "digits.yaml")).module


def standard_average(directory: Path, max_steps: int) -> dict[str, Tensor]:
    """The averaged model as the last checkpoint keeps it, in standard mode and fp64."""
    settings = [
        "train.precision=fp64",
        "run.resume=auto",
        f"train.max_steps={max_steps}",
    ]
    observer = AveragedWeights(decay=0.5)
    digits(directory, *settings, observers=[observer])
    return dict(observer.state_dict())


def test_averaged_weights_keep_the_whole_statistics_in_standard_mode(
    tmp_path: Path,
) -> None:
    """There each rank holds its share of BatchNorm's statistics, which differs from that of the others."""
    (reference,) = on_ranks(1, standard_average, tmp_path / "straight", 4)
    on_ranks(2, standard_average, tmp_path / "cut", 2)
    for average in on_ranks(3, standard_average, tmp_path / "cut", 4):
        assert largest_difference(average, reference) < 1e-11


def test_averaged_weights_by_hand(tmp_path: Path) -> None:
    """(w₁ + w₂) / 2 after two steps with a decay of 0.5, since the first update is a copy."""

    def fit() -> None:
        observer = AveragedWeights(decay=0.5)
        first = state(digits(tmp_path / "1", "train.max_steps=1"))
        second = state(
            digits(tmp_path / "2", "train.max_steps=2", observers=[observer])
        )
        assert isinstance(observer.average, AveragedModel)
        for name, average in observer.average.module.named_parameters():
            assert torch.allclose(
                average, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-8
            )

    on_ranks(1, fit)


def with_swa(directory: Path, *more: str) -> tuple[dict[str, float], bytes]:
    """Two steps an epoch, of which the last two epochs are averaged."""
    settings = [
        *("batch.size=720", "batch.micro_size=180", "train.epochs=3", "run.proof=off"),
        *("run.reproducibility=bitwise", "run.resume=auto", *more),
    ]
    observer = StochasticWeightAverage(start_epoch=2)
    digits(directory, *settings, observers=[observer])
    row = read_rows(directory / "digits" / "metrics.jsonl")[-1]
    file = directory / "digits" / "swa.safetensors"
    return row, file.read_bytes() if file.exists() else b""


def test_stochastic_weight_averaging_by_hand(tmp_path: Path) -> None:
    ((row, file),) = on_ranks(1, with_swa, tmp_path / "1")
    on_ranks(1, with_swa, tmp_path / "cut", "train.stop_after=5")
    for other_row, other_file in on_ranks(2, with_swa, tmp_path / "cut"):
        assert other_row["swa/loss"] == row["swa/loss"] and other_file == file

    checkpoints = sorted((tmp_path / "1" / "digits" / "checkpoints").glob("step_*"))
    second, third = (load_file(path / "model.safetensors") for path in checkpoints)
    data = Trainer(load(ROOT / "configs" / "digits.yaml")).run
    net = data.module
    for name, parameter in net.named_parameters():
        parameter.data.copy_((second[name] + third[name]) / 2)
    ids = data.plan.permutation(0)
    batches = [ids[first : first + 256] for first in range(0, len(ids), 256)]
    update_bn([data.train_loader.peek(batch).inputs for batch in batches], net)
    weights = load_file(tmp_path / "1" / "digits" / "swa.safetensors")
    for name, value in net.state_dict().items():
        assert torch.allclose(weights[name], value, rtol=1e-5, atol=1e-7)
    net.load_state_dict(weights)
    metrics = data.evaluate()
    assert row["swa/loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert row["swa/accuracy"] == pytest.approx(metrics["accuracy"], rel=1e-6)
    assert row["swa/loss"] != row["val/loss"]


def test_a_time_limit(tmp_path: Path) -> None:
    def fit() -> None:
        trainer = digits(tmp_path, observers=[TimeLimit(minutes=0)])
        assert trainer.progress.stopped_by == "the limit of 0 minutes"
        assert trainer.progress.step == 1

    on_ranks(1, fit)


def test_focal_loss_by_hand() -> None:
    output = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([0, 2])
    total, weight = FocalLoss(gamma=0.0).loss_sum(output, targets)
    assert float(total) == pytest.approx(
        float(F.cross_entropy(output, targets, reduction="sum")), rel=1e-12
    )
    assert weight == 2
    probability = output.softmax(1)[torch.arange(2), targets]
    expected = -((1 - probability) ** 2 * probability.log()).sum()
    assert float(FocalLoss().loss_sum(output, targets)[0]) == pytest.approx(
        float(expected), rel=1e-12
    )
    right, count = FocalLoss().metric_sums(output, targets)["accuracy"]
    assert (int(right), count) == (1, 2)


def test_focal_loss_trains(tmp_path: Path) -> None:
    def fit() -> None:
        name = "examples.extending.focal_loss.FocalLoss"
        digits(tmp_path, "train.max_steps=20", f"loss.name={name}", "loss.gamma=1.5")
        rows = read_rows(tmp_path / "digits" / "metrics.jsonl")
        assert rows[-1]["val/accuracy"] > 0.5
        assert rows[19]["train/loss"] < rows[0]["train/loss"] / 2

    on_ranks(1, fit)


def looked_ahead(
    directory: Path, max_steps: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    settings = [
        "run.reproducibility=bitwise",
        "run.resume=auto",
        f"train.max_steps={max_steps}",
    ]
    trainer = digits(directory, *settings, trainer=LookaheadTrainer)
    assert isinstance(trainer, LookaheadTrainer)
    return state(trainer), [slow.detach() for slow in trainer.slow]


def test_lookahead_is_the_same_run_after_a_resume_on_other_processes(
    tmp_path: Path,
) -> None:
    ((reference, slow),) = on_ranks(1, looked_ahead, tmp_path / "straight", 7)
    on_ranks(3, looked_ahead, tmp_path / "cut", 6)
    for weights, slow_weights in on_ranks(2, looked_ahead, tmp_path / "cut", 7):
        assert all(torch.equal(weights[name], reference[name]) for name in reference)
        assert all(
            torch.equal(one, other)
            for one, other in zip(slow_weights, slow, strict=True)
        )


def test_lookahead_by_hand(tmp_path: Path) -> None:
    def fit() -> None:
        start = [parameter.detach().clone() for parameter in digits_net().parameters()]
        plain = digits(tmp_path / "plain", "train.max_steps=5")
        ahead = digits(
            tmp_path / "ahead", "train.max_steps=5", trainer=LookaheadTrainer
        )
        weights = zip(
            start, plain.module.parameters(), ahead.module.parameters(), strict=True
        )
        for before, fast, slow in weights:
            assert torch.allclose(slow, (before + fast) / 2, rtol=1e-5, atol=1e-7)

    on_ranks(1, fit)


def test_lookahead_runs_as_a_program(tmp_path: Path) -> None:
    overrides = [
        "wandb.mode=disabled",
        "run.figures=false",
        f"run.dir={tmp_path}",
        "train.max_steps=2",
    ]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    done = run_program(
        ["-m", "examples.extending.lookahead", *overrides], env=environment, ranks=2
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits" / "summary.json").is_file()


# ---------------------------------------------------------------- a loss of a whole step, and two optimizers


def of_example(
    directory: Path,
    settings: Mapping[str, object],
    trainer: type[Trainer],
    **changes: object,
) -> tuple[dict[str, Tensor], Any]:
    """The state after a run of an example, its loss's and a second optimizer's too, and the best metric."""
    overrides = {
        **settings,
        "run.dir": str(directory),
        "run.figures": False,
        "run.resume": "auto",
        "wandb.mode": "disabled",
        "batch.size": 64,
        "batch.micro_size": 16,
        **changes,
    }
    a_trainer = trainer(load(ROOT / "configs" / "digits.yaml", overrides))
    summary = a_trainer.fit()
    tensors = state(a_trainer)
    for name, tensor in a_trainer.run.task.state_dict().items():
        tensors[f"loss/{name}"] = tensor.clone()
    if isinstance(a_trainer, GanTrainer):
        for number, values in a_trainer.second_optimizer.state_dict()["state"].items():
            for name, tensor in values.items():
                tensors[f"second_optimizer/{number}.{name}"] = tensor.clone()
    return tensors, summary["best"]


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [(contrastive.SETTINGS, Trainer), (gan.SETTINGS, GanTrainer)],
    ids=["contrastive", "gan"],
)
def test_it_is_the_same_run_on_two_processes_and_after_a_resume(
    tmp_path: Path, settings: Mapping[str, object], trainer: type[Trainer]
) -> None:
    """Cut within the second epoch, of 22 steps."""
    bits = {"run.reproducibility": "bitwise"}

    def run(name: str, steps: int) -> tuple[dict[str, Tensor], Any]:
        changes = {**bits, "train.max_steps": steps}
        return of_example(tmp_path / name, settings, trainer, **changes)

    ((reference, best),) = on_ranks(1, run, "straight", 24)
    on_ranks(1, run, "cut", 23)
    for tensors, other_best in on_ranks(2, run, "cut", 24):
        assert other_best == best
        for name, tensor in reference.items():
            assert torch.equal(tensors[name], tensor), name


def test_the_gan_in_standard_mode(tmp_path: Path) -> None:
    changes = {"train.max_steps": 3, "train.precision": "fp64"}

    def run(name: str) -> dict[str, Tensor]:
        return of_example(tmp_path / name, gan.SETTINGS, GanTrainer, **changes)[0]

    (reference,) = on_ranks(1, run, "one")
    for tensors in on_ranks(2, run, "two"):
        # Its gradient before the BatchNorm is rounding noise.
        tensors["0.bias"] = reference["0.bias"]
        assert largest_difference(tensors, reference) < 1e-9


def test_both_networks_of_the_gan_learn(tmp_path: Path) -> None:
    """The discriminator tells real images from made ones, and the generator's images come to fool it more often."""

    def fit() -> list[dict[str, Any]]:
        changes = {"train.epochs": 6, "optimizer.lr": 0.002}
        of_example(tmp_path, gan.SETTINGS, GanTrainer, **changes)
        return read_rows(tmp_path / "gan" / "metrics.jsonl")

    (rows,) = on_ranks(1, fit)
    epochs = [row for row in rows if "val/fooled" in row]
    assert epochs[-1]["val/recognized"] > 0.5
    fooled = [row["train/fooled"] for row in rows if "train/fooled" in row]
    assert max(fooled[5:]) > min(fooled) + 0.1


def test_views_find_their_partners(tmp_path: Path) -> None:
    def fit() -> list[dict[str, Any]]:
        of_example(tmp_path, contrastive.SETTINGS, Trainer, **{"train.epochs": 2})
        return read_rows(tmp_path / "contrastive" / "metrics.jsonl")

    (rows,) = on_ranks(1, fit)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert rows[-1]["val/partner"] > 0.1


def test_several_optimizers_in_a_config_are_refused_with_the_way_out() -> None:
    several = [{"name": "adam"}, {"name": "sgd"}]
    for attempt in (
        lambda: load(ROOT / "configs" / "digits.yaml", {"optimizer": several}),
        lambda: Config.from_dict({"optimizer": several}),
    ):
        with pytest.raises(ConfigError, match=r"optimizer.*docs/extending\.md"):
            attempt()
