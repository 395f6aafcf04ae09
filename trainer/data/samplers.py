"""Which training samples an epoch takes: `data.sampler` and `data.epoch_samples` → the plan's `Order`.

An order is a pure function of the config, of what the data set says of its samples, and of the epoch. So it is the
same on any number of processes, and a resumed run needs nothing but its step number. Draws come from a Philox
generator keyed by the seed, the sampler and the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.config.data_section import DataConfig
from trainer.config.registry import build, resolve
from trainer.data.datasets import Datasets
from trainer.data.sampler import (
    KEY,
    DrawnOrder,
    SamplerSource,
    check_count,
    check_flag,
    check_ids,
)
from trainer.data.sampler_function import FunctionOrder
from trainer.data.sampler_weights import read_values, sample_weights
from trainer.errors import ConfigError
from trainer.exact.plan import Ids
from trainer.exact.seeding import numpy_generator


def build_order(section: DataConfig, data: Datasets, seed: int) -> DrawnOrder | None:
    """The order that `data.sampler` describes; None where each epoch is a permutation of all training samples.

    Raises `ConfigError` for a wrong name or argument, and where a sampler needs what the data set does not tell.
    """
    arguments = dict(section.sampler)
    if not arguments and section.epoch_samples is None:
        return None
    name = arguments.pop("name", "random" if not arguments else None)
    if not isinstance(name, str):
        raise ConfigError(
            f"{KEY}.name",
            f"is missing; write {{name: balanced}}, or one of {', '.join(SAMPLERS)}",
        )
    if section.epoch_samples is not None:
        if "samples" in arguments:
            raise ConfigError(
                "data.epoch_samples", f"is given as {KEY}.samples, too; leave one out"
            )
        arguments["samples"] = section.epoch_samples
    source = SamplerSource(data.train, data.classes, seed)
    target = resolve(KEY, name, SAMPLERS)
    if name not in SAMPLERS:
        if section.epoch_samples is not None:
            raise ConfigError(
                "data.epoch_samples",
                f"is what {name} decides, by how many ids it gives; leave it out",
            )
        return FunctionOrder(name, target, arguments, source)
    order: DrawnOrder = build(KEY, target, arguments, source)
    return order


def random(
    source: SamplerSource, replacement: bool = False, samples: int | None = None
) -> DrawnOrder:
    """`samples` of all (by default as many as there are), as `torch.utils.data.RandomSampler` draws them.

    With `replacement` each is drawn from all. Without, no sample comes again before all others have come.
    """
    wanted = source.samples if samples is None else samples
    count = check_count("samples", wanted)
    if check_flag("replacement", replacement):
        generator = _generator(source, "random")

        def draw(epoch: int) -> Ids:
            return generator(epoch).integers(source.samples, size=count)

        return DrawnOrder(
            count, draw, f"random · {count:,} samples an epoch, with replacement"
        )
    everything = np.arange(source.samples)

    def shuffle(epoch: int) -> Ids:
        return _shuffled(source.seed, epoch, everything, count)

    return DrawnOrder(count, shuffle, f"random · {count:,} samples an epoch")


def subset(
    source: SamplerSource,
    *,
    ids: Any = None,
    fraction: float | None = None,
    first: int | None = None,
    seed: int | None = None,
    samples: int | None = None,
) -> DrawnOrder:
    """Only some samples: those with `ids` (a list, or a file of them), the `first` n, or a random `fraction` of all.

    The fraction is drawn once, by `seed` (by default `run.seed`), and is the same in every epoch.
    """
    given = [ids is not None, fraction is not None, first is not None]
    if sum(given) != 1:
        raise ConfigError(KEY, "subset takes one of ids, fraction and first")
    if seed is not None and fraction is None:
        raise ConfigError(f"{KEY}.seed", "draws a fraction; leave it out")
    if ids is not None:
        values = read_values("ids", ids) if isinstance(ids, str) else ids
        chosen = check_ids(f"{KEY}.ids", "holds", values, source.samples)
        if len(np.unique(chosen)) < len(chosen):
            raise ConfigError(f"{KEY}.ids", "holds an id twice; give each once")
    elif first is not None:
        chosen = np.arange(check_count("first", first, source.samples))
    else:
        seed_of_fraction = source.seed if seed is None else seed
        chosen = _fraction(source, fraction, seed_of_fraction)
    wanted = len(chosen) if samples is None else samples
    count = check_count("samples", wanted)
    described = f"subset · {len(chosen):,} of {source.samples:,} samples"
    if count != len(chosen):
        described += f", {count:,} an epoch"

    def shuffle(epoch: int) -> Ids:
        return _shuffled(source.seed, epoch, chosen, count)

    return DrawnOrder(count, shuffle, described)


def _fraction(source: SamplerSource, fraction: Any, seed: Any) -> Ids:
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not is_number or not 0 < fraction <= 1:
        raise ConfigError(f"{KEY}.fraction", f"{fraction} is not above 0 and up to 1")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{KEY}.seed", f"{seed} is not a whole number")
    count = max(1, round(fraction * source.samples))
    generator = numpy_generator(seed, "sampler/subset")
    # The first of a permutation: a larger fraction of the same seed contains a smaller one.
    chosen = generator.permutation(source.samples)[:count]
    return np.sort(chosen)


def balanced(
    source: SamplerSource, replacement: bool = True, samples: int | None = None
) -> DrawnOrder:
    """As many samples of each class, to within one; which classes have the one more changes with the epoch.

    With `replacement` an epoch has `samples` samples, by default as many as there are: of a class with fewer than its
    share each comes once before any comes again. Without it no sample comes twice, and an epoch has by default as many
    of each class as the smallest one has.
    """
    classes, by_class = _ids_by_class(source)
    sizes = [len(ids) for ids in by_class]
    least = min(sizes)
    most = source.samples  # by default
    if not check_flag("replacement", replacement):
        most = least * len(classes)
    count = check_count("samples", most if samples is None else samples)
    if not replacement and count > most:
        name = source.class_name(int(classes[sizes.index(least)]))
        raise ConfigError(
            f"{KEY}.samples",
            f"{count:,} samples of {len(classes)} classes would take some of {name} twice, which has {least:,}; "
            f"set at most {most:,}, or replacement: true",
        )
    generator = _generator(source, "balanced")

    def draw(epoch: int) -> Ids:
        draws = generator(epoch)
        share, left = divmod(count, len(classes))
        shares = np.full(len(classes), share)
        with_one_more = draws.permutation(len(classes))[:left]
        shares[with_one_more] += 1
        parts = []
        for ids, size in zip(by_class, shares, strict=True):
            parts.append(_passes(draws, ids, int(size)))
        return draws.permutation(np.concatenate(parts))

    of_each = _shares(count, len(classes))
    return DrawnOrder(
        count,
        draw,
        f"balanced · {count:,} samples an epoch, {of_each} of each of {len(classes)} classes",
    )


def _ids_by_class(source: SamplerSource) -> tuple[Ids, list[Ids]]:
    """The class ids that samples have, in order, and the sample ids of each."""
    labels = source.labels
    by_label = np.argsort(labels, kind="stable")
    # Those below 0, of no class, come first.
    without_class = np.count_nonzero(labels < 0)
    by_label = by_label[without_class:]
    classes, starts = np.unique(labels[by_label], return_index=True)
    if not len(classes):
        raise ConfigError(f"{KEY}.name", "balances classes, and no sample has one")
    return classes, np.split(by_label, starts[1:])


def _shares(count: int, classes: int) -> str:
    share, left = divmod(count, classes)
    return f"{share:,} or {share + 1:,}" if left else f"{share:,}"


def weighted(
    source: SamplerSource,
    *,
    weights: Any = None,
    file: str | None = None,
    attribute: str | None = None,
    replacement: bool = True,
    samples: int | None = None,
) -> DrawnOrder:
    """`samples` samples (by default as many as there are), each drawn in proportion to its weight.

    The weights are `weights` of classes, a list by class id or a mapping by class name, or one for each sample: in a
    `file`, or in an `attribute` of the data set. With `replacement` as `torch.utils.data.WeightedRandomSampler`;
    without it, one sample after the other is drawn from those that are left.
    """
    values = sample_weights(source, weights, file, attribute)
    generator = _generator(source, "weighted")
    has_weight = int(np.count_nonzero(values))
    default = source.samples if samples is None else samples
    if check_flag("replacement", replacement):
        count = check_count("samples", default)
        bounds = np.cumsum(values)

        def draw(epoch: int) -> Ids:
            points = generator(epoch).random(count) * bounds[-1]
            ids: Ids = np.searchsorted(bounds, points, side="right")
            return ids

        described = "with replacement"
    else:
        default = has_weight if samples is None else samples
        count = check_count("samples", default, has_weight)

        def draw(epoch: int) -> Ids:
            draws = generator(epoch)
            # The order of exponential clocks is that of draws without replacement (Efraimidis and Spirakis, 2006).
            clocks = -np.log1p(-draws.random(source.samples))
            with np.errstate(divide="ignore"):
                clocks = np.where(values > 0, clocks / values, np.inf)
            # The heavy ones come first, so they are shuffled.
            chosen = np.argsort(clocks, kind="stable")[:count]
            return draws.permutation(chosen)

        described = "without replacement"
    return DrawnOrder(
        count, draw, f"weighted · {count:,} samples an epoch, {described}"
    )


def repeated(
    source: SamplerSource, repeats: int = 3, samples: int | None = None
) -> DrawnOrder:
    """Each sample `repeats` times in a row, augmented anew each time (Hoffer et al., 2020, "Augment your batch").

    An epoch has all samples, or `samples` in all, each still `repeats` times: with as many as there are samples, it is
    as long as without repeats, as in DeiT (Touvron et al., 2021).
    """
    times = check_count("repeats", repeats)
    most = times * source.samples
    count = check_count("samples", most if samples is None else samples, most)
    distinct = math.ceil(count / times)
    everything = np.arange(source.samples)

    def draw(epoch: int) -> Ids:
        chosen = _shuffled(source.seed, epoch, everything, distinct)
        return np.repeat(chosen, times)[:count]

    return DrawnOrder(
        count,
        draw,
        f"repeated · {count:,} samples an epoch: {distinct:,}, each {times} times",
    )


SAMPLERS: dict[str, Callable[..., DrawnOrder]] = {
    "random": random,
    "subset": subset,
    "balanced": balanced,
    "weighted": weighted,
    "repeated": repeated,
}


def _generator(
    source: SamplerSource, name: str
) -> Callable[[int], np.random.Generator]:
    return lambda epoch: numpy_generator(source.seed, f"sampler/{name}", epoch)


def _shuffled(seed: int, epoch: int, ids: Ids, count: int) -> Ids:
    """`count` of `ids`, none again before all others; as the plan without a sampler orders them, if that is all."""
    draws = numpy_generator(seed, "order", epoch)
    positions = _passes(draws, np.arange(len(ids)), count)
    return ids[positions]


def _passes(draws: np.random.Generator, ids: Ids, count: int) -> Ids:
    """`count` ids in random order, of which none comes again before all others have come."""
    passes = math.ceil(count / len(ids))
    if passes == 0:
        return ids[:0]
    in_order = [draws.permutation(ids) for _ in range(passes)]
    return np.concatenate(in_order)[:count]
