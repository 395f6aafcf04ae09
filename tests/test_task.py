"""Losses and metrics against torch's own means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    IGNORED,
    Images,
    Points,
    config,
    conv_net,
    fitted,
    mlp,
    state,
)
from trainer import Task, Trainer, WeightedSum
from trainer.components.targets import largest_class
from trainer.components.task import (
    NegativeLogLikelihood,
    as_task,
    as_weighted_sum,
    build_task,
)
from trainer.components.torch_losses import REFUSED
from trainer.config.model_sections import LossConfig
from trainer.errors import ConfigError, DataError


def task(name: str, num_classes: int | None = None, **args: Any) -> Task:
    return build_task(LossConfig(name=name, args=args), num_classes).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    )


def labels(*shape: int, ignored: bool = False) -> Tensor:
    all_labels = torch.randint(5, shape, generator=torch.Generator().manual_seed(7))
    if not ignored:
        return all_labels
    is_ignored = torch.rand(shape, generator=torch.Generator().manual_seed(8)) < 0.3
    return torch.where(is_ignored, -7, all_labels)


WEIGHTS = [0.1, 2.0, 1.0, 0.0, 5.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("shape", [(11,), (3, 4, 6)])
def test_cross_entropy_is_torchs_mean(
    smoothing: float, weights: Any, ignored: bool, shape: tuple[int, ...]
) -> None:
    output, targets = draw(shape[0], 5, *shape[1:]), labels(*shape, ignored=ignored)
    options: dict[str, Any] = {"ignore_index": -7} if ignored else {}
    ours = task(
        "cross_entropy", 5, label_smoothing=smoothing, class_weights=weights, **options
    )
    total, weight = ours.loss_sum(output, targets)
    torch_weights = (
        None if weights is None else torch.tensor(weights, dtype=torch.float64)
    )
    theirs = nn.CrossEntropyLoss(torch_weights, label_smoothing=smoothing, **options)(
        output, targets
    )
    assert float(total / weight) == pytest.approx(float(theirs), rel=1e-12)
    counted = targets != -7
    accuracy, count = ours.metric_sums(output, targets)["accuracy"]
    assert int(accuracy) == int((output.argmax(1) == targets)[counted].sum())
    assert int(count) == int(counted.sum())


def test_soft_targets() -> None:
    output, targets = draw(9, 5), draw(9, 5).softmax(1)
    total, weight = task("cross_entropy").loss_sum(output, targets)
    assert float(total / weight) == pytest.approx(
        float(nn.functional.cross_entropy(output, targets)), rel=1e-12
    )
    accuracy, _ = task("cross_entropy").metric_sums(output, targets)["accuracy"]
    assert int(accuracy) == int((output.argmax(1) == targets.argmax(1)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 7), (40, 1), (0, 7), (3, 7, 5, 4)])
def test_the_largest_class_is_torchs_argmax(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Of equals the first, and NaN above all."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(-1, 2, shape, generator=generator).to(dtype)
    odd = few.clone()
    odd[few == -1] = -math.inf
    is_nan = torch.rand(shape, generator=generator) < 0.1
    for scores in (few, odd, few.masked_fill(is_nan, math.nan)):
        assert torch.equal(largest_class(scores), scores.argmax(1))


def test_no_label_is_ignored_unless_asked() -> None:
    """torch would leave out -100 by default, and divide by too many."""
    with pytest.raises(DataError, match="target -100 is out of bounds"):
        task("cross_entropy").loss_sum(draw(2, 5), torch.tensor([1, -100]))


def test_top_k() -> None:
    output, targets = draw(50, 5), labels(50)
    sums = task("cross_entropy", top_k=[2, 9]).metric_sums(output, targets)
    assert list(sums) == list(task("cross_entropy", top_k=[2, 9]).metrics)
    by_hand = sum(
        int(label) in row.argsort(descending=True)[:2].tolist()
        for row, label in zip(output, targets, strict=True)
    )
    assert int(sums["top2_accuracy"][0]) == by_hand
    assert int(sums["top9_accuracy"][0]) == 50


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mse", nn.MSELoss()),
        ("bce_with_logits", nn.BCEWithLogitsLoss()),
        ("torch.nn.SmoothL1Loss", nn.SmoothL1Loss()),
    ],
)
@pytest.mark.parametrize("shape", [(8, 1), (8, 3), (4, 2, 3, 3)])
def test_losses_between_equal_shapes(
    name: str, theirs: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    output, targets = draw(*shape), draw(*shape).sigmoid()
    ours = task(name)
    total, weight = ours.loss_sum(output, targets)
    assert float(total / weight) == pytest.approx(
        float(theirs(output, targets)), rel=1e-12
    )
    if "mae" in ours.metrics:
        error, count = ours.metric_sums(output, targets)["mae"]
        assert float(error / count) == pytest.approx(
            float((output - targets).abs().mean()), rel=1e-12
        )


def test_a_column_against_a_row_is_no_table() -> None:
    """(8, 1) against (8,) would broadcast to (8, 8) and train nonsense."""
    output, targets = draw(8, 1), draw(8)
    total, weight = task("mse").loss_sum(output, targets)
    assert weight == 8
    assert float(total) == pytest.approx(
        float(((output[:, 0] - targets) ** 2).sum()), rel=1e-12
    )
    with pytest.raises(
        ConfigError,
        match=r"loss\.name: the model gives \(8, 3\) for targets of shape \(8,\)",
    ):
        task("mse").loss_sum(draw(8, 3), targets)


def test_what_cross_entropy_cannot_use_is_said() -> None:
    with pytest.raises(
        DataError, match=r"target 3 is out of bounds: the model gives 3 classes, 0 to 2"
    ):
        task("cross_entropy").loss_sum(draw(2, 3), torch.tensor([0, 3]))
    with pytest.raises(
        ConfigError,
        match=r"loss\.name: cross_entropy needs one tensor of scores, .* gives a dict",
    ):
        task("cross_entropy").loss_sum({"out": draw(2, 3)}, torch.tensor([0, 2]))


SIGNS = torch.tensor(
    [
        [1.0, -1.0],
        [-1.0, -1.0],
        [1.0, 1.0],
        [-1.0, 1.0],
        [1.0, -1.0],
        [1.0, 1.0],
        [-1.0, 1.0],
    ]
)
LABEL_SETS = torch.tensor(
    [
        [3, 0, -1, 1, 1],
        [2, -1, 0, 0, 0],
        [4, 3, 2, 1, 0],
        [-1, 1, 1, 1, 1],
        [0, 1, -1, 2, 2],
    ]
)
CLASS_WEIGHTS = torch.tensor(WEIGHTS, dtype=torch.float64)
SMALL_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
ABOVE_ZERO = (draw(7, 3) > 0).double()


def absolute_error(output: Tensor, targets: Tensor) -> float:
    return float((output - targets).abs().mean())


def share_of(hits: Tensor) -> float:
    return float(hits.double().mean())


def right_class(output: Tensor, targets: Tensor) -> float:
    return share_of(output.argmax(1) == targets)


def right_signs(output: Tensor, targets: Tensor) -> float:
    return share_of((output > 0) == (targets > 0))


def right_halves(output: Tensor, targets: Tensor) -> float:
    return share_of((output > 0.5) == (targets > 0.5))


# A loss, an output and its targets, the metric beside it, and that metric by hand.
Case = tuple[nn.Module, Tensor, Tensor, str, Callable[[Tensor, Tensor], float] | None]
TORCH_LOSSES: list[Case] = [
    (nn.L1Loss(), draw(7, 3), draw(7, 3).sin(), "mae", absolute_error),
    (nn.MSELoss(), draw(7, 3), draw(7, 3).sin(), "mae", absolute_error),
    (nn.SmoothL1Loss(beta=0.3), draw(7, 3), draw(7, 3).sin(), "mae", absolute_error),
    (
        nn.HuberLoss(delta=0.3),
        draw(7, 2, 3),
        draw(7, 2, 3).sin(),
        "mae",
        absolute_error,
    ),
    (
        nn.PoissonNLLLoss(),
        draw(7, 3),
        draw(7, 3).exp(),
        "mae",
        lambda o, t: absolute_error(o.exp(), t),
    ),
    (
        nn.PoissonNLLLoss(log_input=False, full=True),
        draw(7, 3).exp(),
        draw(7, 3).abs(),
        "mae",
        absolute_error,
    ),
    (
        nn.KLDivLoss(),
        draw(7, 3).log_softmax(1),
        draw(7, 3).sin().softmax(1),
        "mae",
        None,
    ),
    (
        nn.KLDivLoss("batchmean"),
        draw(7, 3).log_softmax(1),
        draw(7, 3).sin().softmax(1),
        "mae",
        None,
    ),
    (
        nn.KLDivLoss(log_target=True),
        draw(7, 3).log_softmax(1),
        draw(7, 3).sin().log_softmax(1),
        "mae",
        None,
    ),
    (nn.BCELoss(), draw(7, 3).sigmoid(), ABOVE_ZERO.flip(0), "accuracy", right_halves),
    (
        nn.BCELoss(SMALL_WEIGHTS),
        draw(7, 3).sigmoid(),
        ABOVE_ZERO.flip(0),
        "accuracy",
        right_halves,
    ),
    (nn.BCEWithLogitsLoss(), draw(7, 3), ABOVE_ZERO.flip(0), "accuracy", right_signs),
    (
        nn.BCEWithLogitsLoss(SMALL_WEIGHTS, pos_weight=SMALL_WEIGHTS * 3),
        draw(7, 3),
        ABOVE_ZERO,
        "accuracy",
        None,
    ),
    (nn.SoftMarginLoss(), draw(7, 2), SIGNS, "accuracy", right_signs),
    (nn.HingeEmbeddingLoss(margin=0.4), draw(7, 2).abs(), SIGNS, "", None),
    (
        nn.MultiLabelSoftMarginLoss(),
        draw(7, 3),
        ABOVE_ZERO.flip(0),
        "accuracy",
        right_signs,
    ),
    (
        nn.MultiLabelSoftMarginLoss(SMALL_WEIGHTS),
        draw(7, 3),
        ABOVE_ZERO,
        "accuracy",
        None,
    ),
    (nn.MultiLabelMarginLoss(), draw(5, 5), LABEL_SETS, "", None),
    (nn.MultiMarginLoss(), draw(7, 5), labels(7), "accuracy", right_class),
    (
        nn.MultiMarginLoss(p=2, margin=0.7, weight=CLASS_WEIGHTS),
        draw(7, 5),
        labels(7),
        "accuracy",
        right_class,
    ),
    (nn.CrossEntropyLoss(), draw(7, 5), labels(7), "accuracy", right_class),
    (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        draw(7, 5, 4),
        labels(7, 4),
        "accuracy",
        right_class,
    ),
    (nn.CrossEntropyLoss(), draw(7, 5), draw(7, 5).sin().softmax(1), "accuracy", None),
    (
        nn.CrossEntropyLoss(CLASS_WEIGHTS),
        draw(7, 5),
        draw(7, 5).sin().softmax(1),
        "accuracy",
        None,
    ),
    (
        nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=-7),
        draw(9, 5),
        labels(9, ignored=True),
        "accuracy",
        None,
    ),
    (
        nn.CrossEntropyLoss(ignore_index=-7, label_smoothing=0.2),
        draw(9, 5),
        labels(9, ignored=True),
        "accuracy",
        None,
    ),
    (nn.NLLLoss(), draw(7, 5).log_softmax(1), labels(7), "accuracy", right_class),
    (
        nn.NLLLoss(CLASS_WEIGHTS),
        draw(7, 5, 4).log_softmax(1),
        labels(7, 4),
        "accuracy",
        right_class,
    ),
    (
        nn.NLLLoss(CLASS_WEIGHTS, ignore_index=-7),
        draw(9, 5).log_softmax(1),
        labels(9, ignored=True),
        "accuracy",
        None,
    ),
]


@pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss:UserWarning"
)
@pytest.mark.parametrize(
    "case", TORCH_LOSSES, ids=[str(case[0]) for case in TORCH_LOSSES]
)
@pytest.mark.parametrize("reduction", ["as given", "sum"])
def test_a_loss_of_torch_is_its_mean_over_micro_batches_of_any_size(
    case: Case, reduction: str
) -> None:
    loss, output, targets, metric, measure = case
    expected = float(loss(output, targets))
    original: Any = copy.deepcopy(loss)
    if reduction == "sum" and original.reduction == "mean":
        original.reduction = "sum"
    before = original.reduction
    ours = as_task(original).double()
    assert original.reduction == before  # it was copied
    assert ours.metrics == ((metric,) if metric else ())

    totals: dict[str, list[float]] = {
        name: [0.0, 0.0] for name in ("loss", *ours.metrics)
    }
    for part in ([0, 1, 2], [3], list(range(4, len(output)))):
        sums = {
            "loss": ours.loss_sum(output[part], targets[part]),
            **ours.metric_sums(output[part], targets[part]),
        }
        assert sums.keys() == totals.keys()
        for name, pair in sums.items():
            assert isinstance(pair, WeightedSum)
            totals[name][0] += float(pair.total)
            totals[name][1] += float(pair.weight)
    means = {name: total / weight for name, (total, weight) in totals.items()}
    assert means["loss"] == pytest.approx(expected, rel=1e-12)
    if measure is not None:
        assert means[metric] == pytest.approx(measure(output, targets), rel=1e-12)


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_a_loss_of_torch_by_its_import_path() -> None:
    """The commonest loss of all was taken for a regression."""
    output, targets = draw(7, 5), labels(7)
    ours = task("torch.nn.CrossEntropyLoss", 5, weight=WEIGHTS, label_smoothing=0.1)
    total, weight = ours.loss_sum(output, targets)
    theirs = nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1)(output, targets)
    assert float(total / weight) == pytest.approx(float(theirs), rel=1e-12)
    shares = ours.probabilities(output)
    assert shares is not None and torch.equal(shares, output.softmax(1))
    log_shares = task("torch.nn.NLLLoss").probabilities(output.log_softmax(1))
    assert log_shares is not None and torch.allclose(log_shares, shares, rtol=1e-12)
    total, weight = task(
        "torch.nn.BCEWithLogitsLoss", pos_weight=[1.0, 2.0, 3.0]
    ).loss_sum(draw(7, 3), ABOVE_ZERO)
    theirs = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double())(
        draw(7, 3), ABOVE_ZERO
    )
    assert float(total / weight) == pytest.approx(float(theirs), rel=1e-12)
    batch_mean = task("torch.nn.KLDivLoss", reduction="batchmean")
    assert batch_mean.loss_sum(draw(7, 3), draw(7, 3).softmax(1))[1] == 7
    # torch's old arguments say the same as `reduction`, and would overrule it.
    assert task("torch.nn.MSELoss", size_average=True).loss_sum(
        torch.ones(4), torch.zeros(4)
    ) == (4, 4)


class Focal(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class Inner(nn.Module):
    """Passes the reduction on and does not keep it."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.inner = nn.L1Loss(reduction=reduction)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = self.inner(output, targets)
        return result


class MeanOrSum(nn.Module):
    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).mean()


class Learned(nn.MSELoss):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_losses_of_ones_own() -> None:
    for arguments in ({}, {"reduction": "mean"}, {"reduction": "sum"}):
        total, weight = task(f"{__name__}.Inner", **arguments).loss_sum(
            torch.ones(4, 2), torch.zeros(4, 2)
        )
        assert (float(total), weight) == (8.0, 8)
    # Not torch's cross-entropy any more.
    with pytest.raises(ConfigError, match="is no sum over samples"):
        task(f"{__name__}.Focal").loss_sum(draw(7, 5), labels(7))
    with pytest.raises(
        ConfigError,
        match=r"loss\.name: MeanOrSum has no `reduction`.*write a trainer\.Task",
    ):
        as_task(MeanOrSum())
    learned = Learned()
    (parameter,) = as_task(learned).parameters()
    # The run trains the caller's own, as it does with a model.
    assert parameter is next(learned.parameters())


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nn.CosineEmbeddingLoss(), "compares two outputs"),
        (nn.MarginRankingLoss(), "compares two outputs"),
        (nn.TripletMarginLoss(), "compares three outputs"),
        (nn.TripletMarginWithDistanceLoss(), "compares three outputs"),
        (nn.GaussianNLLLoss(), "needs a variance"),
        (nn.CTCLoss(), "needs the lengths"),
        (
            nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5]),
            "is a layer with weights of its own",
        ),
    ],
)
def test_a_loss_of_more_than_an_output_and_its_targets_is_refused_by_name(
    loss: nn.Module, reason: str
) -> None:
    name = type(loss).__name__
    for refused in (lambda: as_task(loss), lambda: task(f"torch.nn.{name}")):
        with pytest.raises(
            ConfigError,
            match=rf"^loss\.name: torch\.nn\.{name} {reason}.*write a trainer\.Task",
        ):
            refused()


@pytest.mark.filterwarnings("ignore:`NLLLoss2d` has been deprecated:FutureWarning")
def test_every_loss_of_torch_is_either_a_task_or_refused() -> None:
    supported = {type(row[0]).__name__ for row in TORCH_LOSSES}
    assert supported | REFUSED.keys() >= set(torch.nn.modules.loss.__all__) - {
        "NLLLoss2d"
    }
    assert isinstance(as_task(nn.NLLLoss2d()), NegativeLogLikelihood)  # type: ignore[attr-defined]


def test_what_is_given_as_a_task() -> None:
    assert as_task("mse").metrics == ("mae",)
    ours = build_task(LossConfig(name="cross_entropy"), 5)
    assert as_task(ours) is ours
    for loss, message in (
        (
            nn.CrossEntropyLoss,
            r"CrossEntropyLoss is a class; give an object of it, CrossEntropyLoss\(…\)",
        ),
        (
            nn.functional.mse_loss,
            "mse_loss is a function; give a trainer.Task or a loss such as torch.nn.Cross",
        ),
        (3, "3 is a int; give a trainer.Task"),
    ):
        with pytest.raises(ConfigError, match=f"^task: {message}"):
            as_task(loss)
    with pytest.raises(
        ConfigError, match=r"loss\.reduction: \"none\" is not one of mean, sum"
    ):
        as_task(nn.MSELoss(reduction="none"))
    with pytest.raises(ConfigError, match=r"loss\.weight: 5 weights for 4 classes"):
        as_task(nn.CrossEntropyLoss(CLASS_WEIGHTS), 4)


def test_a_pair_is_a_weighted_sum_and_a_mean_is_not() -> None:
    pair = (torch.tensor(3.0), 4)
    assert as_weighted_sum(pair) == WeightedSum(*pair) == pair
    for value, message in (
        (
            torch.tensor(3.0),
            r"loss_sum returned a Tensor; return trainer\.WeightedSum\(total, weight\)",
        ),
        ((torch.ones(3), 3), r"returned a tensor \(3,\) as the total; sum it"),
        ((1.5, 3), "returned a float as the total"),
        (
            (torch.tensor(3.0), 2.0),
            "returned a float as the weight; give an int or a 0-dim tensor",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            as_weighted_sum(value)


def test_the_weight_of_ignored_targets_selects_nothing() -> None:
    """A selection's length is known to the host only once the device is done: a wait in every micro-batch."""
    targets = labels(9, ignored=True)
    output = draw(9, 5)
    weigh = task("cross_entropy", ignore_index=-7, class_weights=WEIGHTS)
    with torch.profiler.profile() as profile:
        _, weight = weigh.loss_sum(output, targets)
    assert float(weight) == pytest.approx(
        float(CLASS_WEIGHTS[targets[targets != -7]].sum()), rel=1e-12
    )
    assert "aten::nonzero" not in {event.key for event in profile.key_averages()}


def test_positive_weights() -> None:
    output, targets = draw(6, 3), (draw(6, 3) > 0).double()
    total, weight = task("bce_with_logits", pos_weight=[1.0, 2.0, 3.0]).loss_sum(
        output, targets
    )
    theirs = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double())(
        output, targets
    )
    assert float(total / weight) == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cross_entropi", {}, 'did you mean "cross_entropy"'),
        (
            "cross_entropy",
            {"label_smoothing": 1.5},
            "loss.label_smoothing: 1.5 is not in",
        ),
        (
            "cross_entropy",
            {"class_weights": [1.0]},
            "loss.class_weights: 1 weights for 5 classes",
        ),
        ("cross_entropy", {"ignore": 3}, 'did you mean "ignore_index"'),
        ("math.sqrt", {}, "loss"),
    ],
)
def test_mistakes(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task(name, 5, **args)
    assert message in str(caught.value)


def trained(
    directory: Path, task: Any, **changes: Any
) -> tuple[dict[str, Tensor], str]:
    """A short run's weights, and the loss's name in its config."""
    settings = config(directory, train__epochs=1, batch__micro_size=5, **changes)
    trainer = fitted(settings, mlp(), train_data=Points(), val_data=Points(), task=task)
    assert trainer.progress.best is not None
    return state(trainer), trainer.config.loss.name


def test_a_loss_of_torch_trains_as_the_short_name_does(tmp_path: Path) -> None:
    """On one process and on two, whose micro-batches count different numbers of targets."""
    best = {"best__metric": "val/accuracy", "best__mode": "max"}
    ignored = {"loss__ignore_index": IGNORED}
    ((expected, name),) = on_ranks(1, trained, tmp_path / "a", None, **best, **ignored)
    assert name == "cross_entropy"
    given = nn.CrossEntropyLoss(ignore_index=IGNORED)
    by_name = {"loss__name": "torch.nn.CrossEntropyLoss", **ignored}
    for number, (ranks, task, more) in enumerate(
        [(1, given, {}), (2, given, {}), (2, None, by_name)]
    ):
        weights, name = on_ranks(
            ranks, trained, tmp_path / str(number), task, **best, **more
        )[0]
        assert name.endswith("CrossEntropyLoss")
        for key, tensor in expected.items():
            assert torch.allclose(weights[key], tensor, rtol=1e-10, atol=1e-12)


def refusal(directory: Path, task: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(
            config(directory),
            model=conv_net(),
            train_data=Images(),
            val_data=Images(),
            task=task,
        )
    return str(caught.value)


def test_a_class_or_a_function_as_a_task_is_one_clear_error(tmp_path: Path) -> None:
    assert on_ranks(1, refusal, tmp_path, nn.CrossEntropyLoss)[0].startswith(
        "task: CrossEntropyLoss is a class; give"
    )
    assert on_ranks(1, refusal, tmp_path, nn.functional.mse_loss)[0].startswith(
        "task: mse_loss is a function; give"
    )
