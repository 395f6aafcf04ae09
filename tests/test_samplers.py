"""Which samples an epoch takes: each sampler against a plain loop, torch's or its definition, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, RandomSampler, Subset, TensorDataset

from tests.distributed.small import SAMPLES, Points, config, header_of, mlp
from trainer import Trainer
from trainer.commands import evaluate
from trainer.config.data_section import DataConfig
from trainer.config.import_paths import import_paths
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.core.known_components import is_known
from trainer.data.batches import MicroBatch, Request
from trainer.data.classes import Relabelled
from trainer.data.datasets import Datasets, FakeImages, ImageArrays
from trainer.data.labels import find_labels
from trainer.data.sampler import DrawnOrder
from trainer.data.samplers import build_order
from trainer.data.samples import KeyedDataset
from trainer.errors import ConfigError, DataError
from trainer.exact.plan import Ids, Plan, count_occurrences
from trainer.exact.seeding import key

# 20 of class a, 5 of b, 1 of c, and 2 of none.
LABELS = [0] * 20 + [1] * 5 + [2] + [-1] * 2
SEED = 11


class Labelled:
    """Samples of which only the labels are known."""

    def __init__(self, labels: Sequence[int] = LABELS) -> None:
        self.targets = list(labels)
        self.weights: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        raise AssertionError("a sampler reads no sample")


def order_of(
    sampler: dict[str, Any], dataset: Any = None, epoch_samples: int | None = None
) -> DrawnOrder:
    section = DataConfig(sampler=sampler, epoch_samples=epoch_samples)
    dataset = Labelled() if dataset is None else dataset
    data = Datasets(dataset, None, ["a", "b", "c"], "test")
    order = build_order(section, data, SEED)
    assert order is not None
    return order


def counts(ids: Ids) -> list[int]:
    """How many of `ids` are of class a, b, c and none."""
    by_label = Counter(LABELS[i] for i in ids)
    return [by_label[label] for label in (0, 1, 2, -1)]


# ---------------------------------------------------------------- against references


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    for sampler in (
        {"name": "balanced"},
        {"name": "weighted", "weights": [1, 2, 3]},
        {"name": "repeated"},
        {"name": "subset", "fraction": 0.5},
        {"name": "random", "replacement": True},
    ):
        once, again = order_of(sampler), order_of(sampler)
        for epoch in (3, 0):
            assert len(once.ids(epoch)) == once.samples
            np.testing.assert_array_equal(once.ids(epoch), again.ids(epoch))
        assert not np.array_equal(once.ids(0), once.ids(1)), sampler


def test_balanced_gives_each_class_its_share_exactly() -> None:
    order = order_of({"name": "balanced"})
    assert order.samples == 28
    larger_shares = set()
    for epoch in range(8):
        of_class = counts(order.ids(epoch))
        assert sorted(of_class[:3]) == [9, 9, 10], "28 = 9 + 9 + 10"
        assert of_class[3] == 0, "a sample without a class is left out"
        larger_shares.add(of_class.index(10))
        # None comes again before all of its class have come.
        by_sample = Counter(order.ids(epoch).tolist())
        assert max(by_sample[i] for i in range(20)) == 1
        assert {by_sample[i] for i in range(20, 25)} <= {1, 2}
    assert larger_shares == {0, 1, 2}
    assert (
        counts(order_of({"name": "balanced", "samples": 300}).ids(0))[:3] == [100] * 3
    )


def test_balanced_without_replacement_is_as_long_as_its_smallest_class_allows() -> None:
    order = order_of({"name": "balanced", "replacement": False}, Labelled(LABELS[:25]))
    ids = order.ids(0)
    assert counts(ids)[:2] == [5, 5]
    assert len(set(ids.tolist())) == 10
    with pytest.raises(
        ConfigError, match="some of b twice, which has 5; set at most 10"
    ):
        order_of(
            {"name": "balanced", "replacement": False, "samples": 11},
            Labelled(LABELS[:25]),
        )


def test_weighted_is_a_plain_loop_over_a_cumulated_weight() -> None:
    """The draws of a Philox generator keyed by seed, purpose and epoch, each put in its place."""
    weights = [2.0, 0.5, 4.0]
    order = order_of({"name": "weighted", "weights": weights, "samples": 500})
    generator = np.random.Generator(
        np.random.Philox(key=key(SEED, "sampler/weighted", 2))
    )
    of_samples = [weights[label] if label >= 0 else 0.0 for label in LABELS]
    expected = []
    for place in generator.random(500) * sum(of_samples):
        chosen, total = 0, of_samples[0]
        while place >= total:
            chosen += 1
            total += of_samples[chosen]
        expected.append(chosen)
    assert order.ids(2).tolist() == expected
    # And in proportion: a chi-square of 2 degrees of freedom is above 13.8 once in a thousand.
    drawn = np.concatenate([order.ids(epoch) for epoch in range(20)])
    shares = np.array([20 * 2.0, 5 * 0.5, 1 * 4.0])
    due = shares / shares.sum() * len(drawn)
    assert (((np.array(counts(drawn)[:3]) - due) ** 2) / due).sum() < 13.8


def test_weighted_without_replacement_draws_as_torch_does() -> None:
    """Each of the pairs of 4 samples as often as `torch.multinomial` without replacement draws it."""
    data = Labelled([0] * 5)
    data.weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0])
    order = order_of(
        {
            "name": "weighted",
            "attribute": "weights",
            "replacement": False,
            "samples": 2,
        },
        data,
    )
    epochs = 4000
    drawn = Counter(tuple(sorted(order.ids(e).tolist())) for e in range(epochs))
    generator = torch.Generator().manual_seed(0)
    rows = data.weights.expand(40_000, 5)
    pairs = torch.multinomial(rows, 2, generator=generator).sort().values
    due = Counter(map(tuple, pairs.tolist()))
    assert drawn.keys() == due.keys()
    chi_square = sum(
        (drawn[pair] - due[pair] / 10) ** 2 / (due[pair] / 10) for pair in due
    )
    assert (
        chi_square < 25
    )  # of 5 degrees of freedom, with the rounding of the reference


@pytest.mark.parametrize("samples", [10, 28, 61])
@pytest.mark.parametrize("replacement", [False, True])
def test_random_takes_as_many_of_each_as_torch_does(
    samples: int, replacement: bool
) -> None:
    order = order_of({"name": "random", "samples": samples, "replacement": replacement})
    torchs = list(
        RandomSampler(
            range(28),
            replacement,
            samples,
            generator=torch.Generator().manual_seed(0),
        )
    )
    ids = order.ids(0).tolist()
    assert len(ids) == len(torchs) == samples
    if not replacement:
        assert sorted(Counter(ids).values()) == sorted(Counter(torchs).values())


def test_all_samples_in_a_subset_are_the_order_without_one() -> None:
    plan = Plan(28, 8, 4, 1, 2, SEED)
    for sampler in (
        {"name": "subset", "first": 28},
        {"name": "subset", "fraction": 1.0},
        {"name": "random"},
    ):
        for epoch in (0, 1):
            np.testing.assert_array_equal(
                order_of(sampler).ids(epoch), plan.permutation(epoch)
            )


def test_a_subset_is_the_same_in_every_epoch(tmp_path: Path) -> None:
    fraction = order_of({"name": "subset", "fraction": 0.25})
    assert fraction.samples == 7
    assert set(fraction.ids(0)) == set(fraction.ids(5))
    other = order_of({"name": "subset", "fraction": 0.25, "seed": 5})
    assert set(other.ids(0)) != set(fraction.ids(0))
    assert sorted(order_of({"name": "subset", "first": 3}).ids(0)) == [0, 1, 2]
    (tmp_path / "ids.txt").write_text("7\n3\n12\n")
    np.save(tmp_path / "ids.npy", [7, 3, 12])
    for ids in ([7, 3, 12], str(tmp_path / "ids.txt"), str(tmp_path / "ids.npy")):
        assert sorted(order_of({"name": "subset", "ids": ids}).ids(1)) == [3, 7, 12]
    longer = order_of({"name": "subset", "first": 3}, epoch_samples=7)
    assert sorted(Counter(longer.ids(0).tolist()).values()) == [2, 2, 3]


def test_repeated_is_deits_sampler_over_all_ranks() -> None:
    """DeiT's `RASampler` repeats a permutation, gives rank r the places r, r + R, …, and ends after n of them."""
    permutation = Plan(28, 8, 4, 1, 1, SEED).permutation(0)
    of_rank = [np.repeat(permutation, 3)[rank::4][: 28 // 4] for rank in range(4)]
    # What the ranks take at once, one after the other.
    expected = np.stack(of_rank, 1).flatten()
    short = order_of({"name": "repeated", "repeats": 3, "samples": 28})
    np.testing.assert_array_equal(short.ids(0), expected)
    whole = order_of({"name": "repeated", "repeats": 3})
    np.testing.assert_array_equal(whole.ids(0), np.repeat(permutation, 3))


# ---------------------------------------------------------------- labels


def test_labels_are_found_without_reading_samples() -> None:
    part = Labelled([0, 1, 1])
    assert find_labels(part).tolist() == [0, 1, 1]  # type: ignore[union-attr]
    assert find_labels(Subset(part, [2, 0])).tolist() == [1, 0]  # type: ignore[union-attr,arg-type]
    parts: list[Any] = [part, part]
    joined: ConcatDataset[Any] = ConcatDataset(parts)
    assert find_labels(joined).tolist() == [0, 1, 1] * 2  # type: ignore[union-attr]
    assert find_labels(Relabelled(part, [5, 3])).tolist() == [5, 3, 3]  # type: ignore[union-attr]
    fake = FakeImages("train", 25, (1, 8, 8), 4)
    assert find_labels(fake).tolist() == [fake[i][1] for i in range(25)]  # type: ignore[union-attr]
    arrays = ImageArrays(torch.zeros(2, 1, 4, 4), torch.tensor([3, 1]))
    assert find_labels(arrays).tolist() == [3, 1]  # type: ignore[union-attr]
    several = ImageArrays(torch.zeros(2, 1, 4, 4), torch.ones(2, 3, dtype=torch.long))
    assert find_labels(several) is None
    assert find_labels(TensorDataset(torch.zeros(3), torch.zeros(3))) is None


def test_occurrences_count_the_earlier_places() -> None:
    ids = np.random.default_rng(0).integers(9, size=50)
    earlier: Counter[int] = Counter()
    expected = []
    for i in ids.tolist():
        expected.append(earlier[i])
        earlier[i] += 1
    occurrences = count_occurrences(ids)
    assert occurrences is not None
    assert occurrences.tolist() == expected
    assert count_occurrences(np.array([4, 2, 9])) is None


class Draws:
    """Samples that are what torch draws for them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return torch.rand(3), index


def test_the_first_occurrence_keeps_the_key_of_epoch_and_sample() -> None:
    keyed = KeyedDataset(Draws(), None, seed=SEED, purpose="train")
    for occurrence, position in ((0, (2, 3)), (1, (2, 3, 1)), (2, (2, 3, 2))):
        drawn, _ = keyed.sample(2, 3, occurrence)
        generator = torch.Generator().manual_seed(key(SEED, "train", *position))
        assert torch.equal(drawn, torch.rand(3, generator=generator))
    request = Request(0, 2, np.array([3, 3]), occurrences=np.array([0, 1]))
    both = keyed[request]
    assert isinstance(both, MicroBatch)
    assert torch.equal(both.inputs[0], keyed.sample(2, 3)[0])
    assert torch.equal(both.inputs[1], keyed.sample(2, 3, 1)[0])


# ---------------------------------------------------------------- a function of one's own


def by_label(labels: Any, seed: int, epoch: int, most: int = 12) -> Any:
    return np.random.default_rng([seed, epoch]).permutation(
        np.flatnonzero(labels == 0)
    )[:most]


def without_labels(samples: int, epoch: int) -> list[int]:
    return [(i + epoch) % samples for i in range(samples)]


def impure(epoch: int) -> Any:
    return np.random.permutation(5)


def sorts_in_place(labels: Any) -> Any:
    labels.sort()
    return [0]


def of_other_length(epoch: int) -> list[int]:
    return [0] * (epoch + 1)


def constant(value: Any) -> Any:
    return value


def test_a_function_of_labels_seed_and_epoch_gives_the_ids() -> None:
    path = f"{__name__}.by_label"
    order = order_of({"name": path, "most": 8})
    expected = by_label(np.array(LABELS), SEED, 3, 8)
    np.testing.assert_array_equal(order.ids(3), expected)
    assert order.samples == 8
    assert order.description == f"{path} · 8 samples an epoch"
    unlabelled = TensorDataset(torch.zeros(4))
    order = order_of({"name": f"{__name__}.without_labels"}, unlabelled)
    assert order.ids(1).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"name": "impure"}, "gives other ids when it is called again for epoch 0"),
        ({"name": "sorts_in_place"}, "read-only"),
        (
            {"name": "constant", "value": [0.5]},
            "float64 .1,., and sample ids are whole",
        ),
        ({"name": "constant", "value": []}, "gives, for epoch 0, no samples"),
        (
            {"name": "constant", "value": [3, 28]},
            "the id 28, and the 28 training samples",
        ),
        ({"name": "constant", "value": None}, "sample ids are whole numbers"),
        ({"name": "constant"}, "needs this argument"),
        ({"name": "constant", "values": [1]}, 'did you mean "value"'),
    ],
)
def test_a_function_that_gives_no_plan_is_refused(
    sampler: dict[str, Any], message: str
) -> None:
    sampler = {**sampler, "name": f"{__name__}.{sampler['name']}"}
    with pytest.raises(ConfigError, match=message) as caught:
        order_of(sampler)
    assert caught.value.key.startswith("data.sampler")


def test_every_epoch_of_a_function_has_the_same_length() -> None:
    order = order_of({"name": f"{__name__}.of_other_length"})
    with pytest.raises(ConfigError, match="2 samples for epoch 1, and 1 for epoch 0"):
        order.ids(1)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("sampler", "key_name", "message"),
    [
        ({"samples": 5}, "name", "is missing; write"),
        ({"name": "balance"}, "name", 'did you mean "balanced"'),
        ({"name": "balanced", "sample": 5}, "sample", 'did you mean "samples"'),
        ({"name": "balanced", "samples": 2.5}, "samples", "2.5 is not a whole number"),
        ({"name": "random", "samples": 10**12}, "", "an epoch of 1,000,000,000,000"),
        ({"name": "repeated", "repeats": 10**9}, "", "an epoch of 28,000,000,000"),
        (
            {"name": "balanced", "replacement": 1},
            "replacement",
            "neither true nor false",
        ),
        ({"name": "subset"}, "", "takes one of ids, fraction and first"),
        (
            {"name": "subset", "first": 29},
            "first",
            "29 is not a whole number from 1 to 28",
        ),
        ({"name": "subset", "fraction": 0}, "fraction", "0 is not above 0"),
        ({"name": "subset", "ids": [3, 3]}, "ids", "holds an id twice"),
        ({"name": "subset", "ids": "none.txt"}, "ids", "cannot be read"),
        ({"name": "weighted"}, "", "takes one of weights, file and attribute"),
        (
            {"name": "weighted", "weights": [1, 2]},
            "weights",
            "2 weights, and the samples'",
        ),
        ({"name": "weighted", "weights": {"d": 2}}, "weights.d", "no such class"),
        (
            {"name": "weighted", "weights": [1, -1, 1]},
            "weights",
            "below 0 or not finite",
        ),
        ({"name": "weighted", "attribute": "hardness"}, "attribute", 'no "hardness"'),
        ({"name": "repeated", "repeats": 0}, "repeats", "0 is not a whole number"),
        (
            {"name": "repeated", "samples": 85},
            "samples",
            "85 is not a whole number from",
        ),
    ],
)
def test_a_wrong_argument_is_one_message(
    sampler: dict[str, Any], key_name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        order_of(sampler)
    assert caught.value.key == f"data.sampler.{key_name}".removesuffix(".")


def test_unknown_labels_are_one_message_with_the_way_out() -> None:
    unlabelled = TensorDataset(torch.zeros(4))
    for sampler in ({"name": "balanced"}, {"name": f"{__name__}.by_label"}):
        with pytest.raises(
            ConfigError, match="give the data set an attribute `targets`"
        ):
            order_of(sampler, unlabelled)


def test_the_length_of_an_epoch_is_said_once() -> None:
    assert order_of({}, epoch_samples=9).samples == 9
    assert order_of({"name": "balanced"}, epoch_samples=9).samples == 9
    with pytest.raises(ConfigError, match="leave one out"):
        order_of({"name": "balanced", "samples": 9}, epoch_samples=9)
    with pytest.raises(ConfigError, match="by how many ids it gives"):
        order_of({"name": f"{__name__}.by_label"}, epoch_samples=9)


# ---------------------------------------------------------------- a run


def test_a_changed_file_of_weights_is_noticed_on_resume(tmp_path: Path) -> None:
    """A run would go on with other samples, and its config would not show it."""
    file = tmp_path / "weights.txt"
    file.write_text("\n".join(["1"] * SAMPLES))

    def fit(**changes: Any) -> dict[str, Any]:
        settings = config(
            tmp_path, data__sampler={"name": "weighted", "file": str(file)}, **changes
        )
        return Trainer(settings, model=mlp(), train_data=Points(ignored=False)).fit()

    fit(train__stop_after=5)
    file.write_text("\n".join(["1"] * (SAMPLES - 1) + ["50"]))
    with pytest.raises(DataError, match="sampler chooses other samples than"):
        fit(run__resume="auto")
    summary = fit(run__resume="auto", run__resume_changes="allow")
    assert summary["samples_seen"] == 2 * SAMPLES


def test_the_header_and_the_paths_of_a_config_name_the_sampler(tmp_path: Path) -> None:
    sampler = {"name": f"{__name__}.without_labels"}
    settings = config(tmp_path, data__sampler=sampler)
    trainer = Trainer(settings, model=mlp(), train_data=Points(ignored=False))
    said = header_of(trainer, tmp_path)["sampler"]
    assert said == f"{sampler['name']} · 103 samples an epoch"
    # What a run from elsewhere may not call unasked.
    names = {(path.role, path.name) for path in import_paths(settings)}
    assert ("sampler", sampler["name"]) in names
    assert not is_known("sampler", without_labels)


class DamagedFirst(Points):
    """Its first sample cannot be read."""

    def __getitem__(self, i: int) -> Any:
        if i == 0:
            raise ValueError("sample 0 is damaged")
        return super().__getitem__(i)


def test_a_sample_that_is_left_out_is_never_read(tmp_path: Path) -> None:
    settings = config(
        tmp_path, data__sampler={"name": "subset", "ids": list(range(1, SAMPLES))}
    )
    data = DamagedFirst(ignored=False)
    summary = Trainer(settings, model=mlp(), train_data=data).fit()
    assert summary["samples_seen"] == 2 * (SAMPLES - 1)


def test_evaluate_needs_no_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data may have no such samples, and a machine no such function."""
    settings = load(
        "configs/digits.yaml",
        {
            "run.dir": str(tmp_path),
            "run.figures": False,
            "wandb.mode": "disabled",
            "train.max_steps": 1,
            "data.sampler": {"name": f"{__name__}.without_labels"},
            "train.mix": {"mixup": 0.2},
        },
    )
    Trainer(settings).fit()
    monkeypatch.delattr(f"{__name__}.without_labels")
    evaluate.main([str(tmp_path / "digits")])
    assert "val/accuracy" in capsys.readouterr().out


def test_a_name_alone_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"write \{name: balanced\}"):
        Config.from_dict({"data": {"sampler": "balanced"}})
