"""Several micro-batches in one forward: grouped, normalised and drawn for as if each were alone, or refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    Images,
    config,
    conv_net,
    fitted,
    largest_difference,
    state,
)
from trainer import ConfigError, Task, Trainer
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.core.fuse_check import choose_fuse
from trainer.exact.fuse import Fused, _normalize_as_channels, _normalize_one_by_one
from trainer.exact.plan import Plan

# 103 samples in steps of 28: 7 micro-batches of 4; a last step of 19, in 4 of 4 and one of 3.
MICRO = 4


def run(
    directory: Path, make: Callable[[], nn.Module], fuse: int | str, **changes: Any
) -> dict[str, Tensor] | str:
    """The model's state after a run of one epoch; of a run that is refused, why."""
    settings = config(
        directory, batch__micro_size=MICRO, batch__fuse=fuse, train__epochs=1, **changes
    )
    with redirect_stdout(io.StringIO()):
        try:
            return state(
                fitted(settings, make(), train_data=Images(), val_data=Images(20))
            )
        except ConfigError as error:
            return str(error)


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("fuse", [1, 2, 3, 8, 100])
@pytest.mark.parametrize(
    ("size", "micro_size"), [(28, 4), (29, 4), (31, 4), (7, 7), (9, 1), (50, 8)]
)
def test_groups_are_all_micro_batches_in_order_and_of_one_size(
    ranks: int, fuse: int, size: int, micro_size: int
) -> None:
    if ranks > -(-size // micro_size):
        return
    plan = Plan(
        samples=size,
        batch_size=size,
        micro_size=micro_size,
        ranks=ranks,
        epochs=1,
        seed=0,
    )
    step = plan.step(0)
    indices = []
    for rank in range(ranks):
        for first, last in plan.groups(step, rank, fuse):
            assert 1 <= last - first <= fuse
            assert (
                len({stop - start for start, stop in step.micro_batches[first:last]})
                == 1
            )
            indices += range(first, last)
            ids = [
                i for index in range(first, last) for i in plan.sample_ids(step, index)
            ]
            assert plan.sample_ids(step, first, last).tolist() == ids
    assert indices == list(range(len(step.micro_batches)))


def test_few_groups_as_even_as_can_be() -> None:
    # 7 of 4 and one of 3.
    plan = Plan(samples=31, batch_size=31, micro_size=4, ranks=1, epochs=1, seed=0)
    assert plan.groups(plan.step(0), 0, 3) == [(0, 3), (3, 5), (5, 7), (7, 8)]


# ---------------------------------------------------------------- the same mathematics


@pytest.mark.parametrize("normalize", [_normalize_one_by_one, _normalize_as_channels])
@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 3), (12, 5, 2, 2, 2)])
@pytest.mark.parametrize("tracked", [True, False])
def test_both_ways_to_normalise_are_batch_norm_of_each_part(
    normalize: Any, shape: tuple[int, ...], tracked: bool
) -> None:
    torch.manual_seed(0)
    x, grown = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        torch.randn(shape, dtype=torch.float64),
    )
    weight, bias = (
        torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )

    def outcome(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, [x, weight, bias], grown)]

    mean, var = (
        torch.zeros(3, 5, dtype=torch.float64) if tracked else None for _ in range(2)
    )
    actual = outcome(
        normalize(x.chunk(3), mean=mean, var=var, weight=weight, bias=bias, eps=1e-5)
    )
    expected = outcome(
        torch.cat([F.batch_norm(p, None, None, weight, bias, True) for p in x.chunk(3)])
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
    if mean is not None and var is not None:
        for m, v, part in zip(mean, var, x.detach().chunk(3), strict=True):
            flat = part.transpose(0, 1).flatten(1)
            assert torch.allclose(m, flat.mean(1), rtol=1e-12)
            assert torch.allclose(v, flat.var(1), rtol=1e-12)


class Drawing(nn.Module):
    """Layers that draw: modules, functions and a mask by hand; norms of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv1d(4, 4, 1)
        self.norm, self.flat_norm, self.frozen = (
            nn.BatchNorm2d(4),
            nn.BatchNorm1d(4),
            nn.BatchNorm2d(4).eval(),
        )
        self.drops = nn.Sequential(
            nn.Dropout2d(0.2),
            nn.RReLU(),
            nn.Dropout(0.3, inplace=True),
            nn.AlphaDropout(0.1),
        )
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import stochastic_depth

        self.frozen.eval()
        x = self.frozen(torch.tanh(self.norm(self.first(x))))
        x = self.drops(x) + F.batch_norm(x, None, None, training=True)
        x = stochastic_depth(x, 0.3, "row", self.training)
        x = torch.tanh(
            self.flat_norm(self.second(F.dropout1d(x.flatten(2), 0.2, self.training)))
        )
        if self.training:
            x = x * (
                0.5 + torch.rand(len(x), 1, 1, dtype=x.dtype)
            ) + 0.1 * torch.rand_like(x)
            x = x * torch.floor(
                0.9 + torch.rand([x.shape[0], 4, 1], dtype=x.dtype)
            ) + torch.randn((len(x), 1, 1)).to(x)
        return self.head(F.dropout(x.flatten(1), 0.1, self.training))


def test_layers_that_draw_are_not_told_apart(tmp_path: Path) -> None:
    """Every draw is its micro-batch's own, so the masks are those of the run that fuses nothing."""
    (reference,) = on_ranks(1, run, tmp_path / "1", Drawing, 1)
    assert not isinstance(reference, str)
    for fuse in (2, 3, 8, "auto"):
        (weights,) = on_ranks(1, run, tmp_path / str(fuse), Drawing, fuse)
        assert not isinstance(weights, str), weights
        assert largest_difference(weights, reference) < 1e-12


def test_clipping_class_weights_and_autocast(tmp_path: Path) -> None:
    for precision, bound in (("fp64", 1e-12), ("bf16", 0.05), ("fp16", 0.05)):
        changes = {
            "train__precision": precision,
            "train__max_grad_norm": 0.5,
            "loss__class_weights": [1.0, 0.2, 3.0, 0.7],
            "loss__ignore_index": 2,
        }
        (reference,) = on_ranks(
            1, run, tmp_path / f"{precision}1", conv_net, 1, **changes
        )
        (weights,) = on_ranks(
            1, run, tmp_path / f"{precision}3", conv_net, 3, **changes
        )
        assert largest_difference(weights, reference) < bound


# ---------------------------------------------------------------- what is refused


class Odd(nn.Module):
    """A net with one thing in it that several micro-batches cannot share."""

    def __init__(self, odd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body, self.odd = conv_net(), odd

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.odd(x))


def noise(x: Tensor) -> Tensor:
    return x + torch.empty_like(x).normal_()


def noise_before_dropout(x: Tensor) -> Tensor:
    return F.dropout(noise(x), 0.5)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def samples_second(x: Tensor) -> Tensor:
    return F.dropout(x.transpose(0, 1).repeat(8, 1, 1, 1), 0.5)[:2].transpose(0, 1)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (noise, "draws random numbers for several micro-batches"),
        (noise_before_dropout, "draws random numbers for several micro-batches"),
        (
            samples_second,
            "do not give what they give one by one (different: the loss, the gradient",
        ),
        (
            centred,
            "do not give what they give one by one (different: the loss, the gradient",
        ),
    ],
)
def test_what_micro_batches_cannot_share_is_refused(
    tmp_path: Path, odd: Callable[[Tensor], Tensor], message: str
) -> None:
    (refused,) = on_ranks(1, run, tmp_path, lambda: Odd(odd), 2)
    assert isinstance(refused, str)
    assert refused.startswith("batch.fuse: ")
    assert message in refused
    assert refused.endswith("set batch.fuse=1")
    assert not (tmp_path / "run").exists(), (
        "refused before the run directory is touched"
    )
    (automatic,) = on_ranks(1, run, tmp_path, lambda: Odd(odd), "auto")
    assert not isinstance(automatic, str), "auto looks for what works"
    (unfused,) = on_ranks(1, run, tmp_path, lambda: Odd(odd), 1)
    assert not isinstance(unfused, str)


class Contrast(Task):
    """A loss between the samples of a micro-batch."""

    def loss_sum(self, output: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return torch.cdist(output, output).sum(), len(output)


def test_a_loss_between_samples_is_refused(tmp_path: Path) -> None:
    def refused(directory: Path) -> str:
        settings = config(
            directory, batch__micro_size=MICRO, batch__fuse=2, best__metric="val/loss"
        )
        with pytest.raises(ConfigError) as caught:
            fitted(
                settings,
                conv_net(),
                train_data=Images(),
                val_data=Images(20),
                task=Contrast(),
            )
        return str(caught.value)

    assert "the loss" in on_ranks(1, refused, tmp_path)[0]


@pytest.mark.parametrize(
    "other",
    ["run.reproducibility=bitwise", "batch_norm.mode=sync", "train.compile=true"],
)
def test_what_fuse_does_not_go_with(other: str) -> None:
    with pytest.raises(ConfigError, match=other.replace("=", ".")) as caught:
        load(None, ["batch.micro_size=8", "batch.fuse=2", other])
    assert caught.value.key == "batch.fuse"
    assert load(None, ["batch.fuse=auto", other]).fuse_refusal()


def test_values_of_the_key() -> None:
    assert Config().batch.fuse == 1
    assert [
        load(None, [f"batch.fuse={value}"]).batch.fuse for value in ("4", "auto")
    ] == [4, "auto"]
    for value, message in (
        ("0", "0 is less than 1"),
        ("many", "many is not an integer or auto"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(None, [f"batch.fuse={value}"])


# ---------------------------------------------------------------- what fits


class Small(nn.Module):
    """A net that runs out of memory above a number of samples, half-way through its forward or its backward."""

    def __init__(self, most: int, backward: bool) -> None:
        super().__init__()
        self.body, self.most, self.backward = conv_net(momentum=0.3), most, backward
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out = F.dropout(self.body(x), 0.5, self.training)
        if len(x) > self.most and not self.backward:
            raise torch.OutOfMemoryError("simulated")
        if len(x) > self.most:
            out.register_hook(self._fail)
        return out

    def _fail(self, _: Tensor) -> None:
        raise torch.OutOfMemoryError("simulated")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("most", "expected"), [(100, 7), (12, 3), (11, 1)])
def test_auto_takes_what_fits_and_leaves_no_trace_of_its_tries(
    tmp_path: Path, backward: bool, most: int, expected: int
) -> None:
    """7 micro-batches of 4 are tried first, then 3, then 1."""

    def choose(directory: Path) -> tuple[int, float, bool, bool]:
        settings = config(directory, batch__micro_size=MICRO, batch__fuse="auto")
        trainer = Trainer(
            settings,
            model=Small(most, backward),
            train_data=Images(),
            val_data=Images(20),
        )
        before, drawn = state(trainer), torch.get_rng_state()
        fuse, _ = choose_fuse(trainer.run)
        same = torch.equal(torch.get_rng_state(), drawn)
        return (
            fuse,
            largest_difference(state(trainer), before),
            same,
            any(p.grad is not None for p in trainer.module.parameters()),
        )

    assert on_ranks(1, choose, tmp_path) == [(expected, 0.0, True, False)]


def test_auto_leaves_a_margin_of_a_gpus_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the margin has no memory for does not fit, and the batch ahead is there while it is tried."""
    from trainer.core import fuse_check

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda size, **_: size)
        assert fuse_check._margin(torch.device("cuda", 0)) == 4_000
    assert fuse_check._margin(torch.device("cpu")).numel() == 0

    def choose(directory: Path) -> tuple[int, int]:
        settings = config(directory, batch__micro_size=MICRO, batch__fuse="auto")
        trainer = Trainer(
            settings, model=conv_net(), train_data=Images(), val_data=Images(20)
        )
        sizes: list[int] = []
        peek = trainer.run.train_loader.peek

        def count_samples(ids: Any, *args: Any) -> Any:
            sizes.append(len(ids))
            return peek(ids, *args)

        def margin(device: torch.device) -> Tensor:
            if sizes[-1] > 3 * MICRO:
                raise torch.OutOfMemoryError("simulated")
            return torch.empty(0)

        monkeypatch.setattr(trainer.run.train_loader, "peek", count_samples)
        monkeypatch.setattr(fuse_check, "_margin", margin)
        return choose_fuse(trainer.run)[0], sizes.count(3 * MICRO)

    assert on_ranks(1, choose, tmp_path) == [(3, 2)]


def test_auto_on_the_cpu_asks_how_much_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.core import fuse_check

    def choose(directory: Path, room: int) -> tuple[int, int]:
        settings = config(directory, batch__micro_size=MICRO, batch__fuse="auto")
        trainer = Trainer(
            settings, model=conv_net(), train_data=Images(), val_data=Images(20)
        )
        one = fuse_check._memory_of_one(trainer.run, trainer.plan.step(0), 0)
        monkeypatch.setattr(fuse_check, "share_of_main_memory", lambda: room * one)
        return choose_fuse(trainer.run)[0], one

    for room, expected in ((0, 1), (1, 1), (5, 5), (99, 7)):
        ((fuse, one),) = on_ranks(1, choose, tmp_path, room)
        assert fuse == expected
    # Input, three maps of (4, 3, 3), logits; fp64.
    activations = 2 * MICRO * (50 + 4 * 9 * 3 + CLASSES) * 8
    assert 0.5 * activations < one < 2 * activations
    assert fuse_check.share_of_main_memory() > 0


def test_nothing_stays_active_after_a_forward() -> None:
    layer = nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    with Fused(layer, torch.default_generator, [1, 2], 4) as fused:
        layer(x)
    fused.finish()
    assert int(layer.num_batches_tracked) == 2
    whole = nn.BatchNorm1d(3)
    assert torch.equal(layer(x), whole(x))
    assert list(layer.state_dict()) == list(whole.state_dict())
