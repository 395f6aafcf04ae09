"""Before a run on several processes: do all ranks run the same thing on the same thing?

A difference that breaks what a run promises is an error that names the rank and its machine. The others are in
`environment.json`, which describes every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.evaluation_sets import key_of_set
from trainer.config.schema import Config
from trainer.data.datasets import Datasets
from trainer.data.sampler import DrawnOrder
from trainer.errors import ConfigError, DataError, LockstepError
from trainer.exact.plan import Plan
from trainer.process.machine import describe_rank
from trainer.process.ranks import Ranks
from trainer.storage.fingerprint import quick_fingerprint
from trainer.storage.run_directory import changed_keys, is_free

RankFacts = dict[str, Any]

# Ranks that differ in these do not train the same model. NumPy draws the order of the samples.
SAME_ALWAYS = ("torch", "numpy", "nccl")
# These decide which kernels run, and so the last bits of a result.
SAME_BITWISE = ("torchvision", "cuda", "cudnn", "device", "instructions", "machine")
# These decide which pixels a GPU decodes.
SAME_DECODER = ("device", "cuda", "torchvision", "torchcodec")
LARGEST_CLOCK_SKEW = 10.0  # seconds; a larger one is worth a note
# What differs between any two machines, or says nothing of how they compute.
OF_EACH_MACHINE = (
    "rank",
    "host",
    "clock",
    "clock_skew",
    "free_disk",
    "shares_run_directory",
)

# A resumed run may change it, and all ranks must agree: else some would wait for others for ever.
SAME_ON_ALL_RANKS = ("train.parallel",)
# Keys of the config for where a machine has its files. What the files hold is compared where it matters.
OF_EACH_DISK = ("data.root", "data.cache_dir", "model.weights")


def check_ranks(config: Config, ranks: Ranks) -> list[RankFacts]:
    """What each rank runs on, in rank order, on every rank. A collective.

    Raises `ConfigError` if the ranks have different configs, `LockstepError` if they could not train the same model,
    or, in bitwise mode, not to the same bits.
    """
    ranks.barrier()  # all read their clocks at about the same time
    own = describe_rank(ranks.device, Path(config.run.dir))
    own["config"] = _hash(_binding_keys(config))
    of_ranks = ranks.gather([own])
    _check_configs(config, ranks, [values.pop("config") for values in of_ranks])
    clocks = [values.pop("clock") for values in of_ranks]
    facts: list[RankFacts] = []
    for rank, values in enumerate(of_ranks):
        facts.append(
            {"rank": rank, **values, "clock_skew": round(clocks[rank] - clocks[0], 3)}
        )
    _check_alike(
        facts,
        SAME_ALWAYS,
        "the ranks of a run compute the same only with the same version",
    )
    if config.data.decode == "device":
        _check_alike(
            facts,
            SAME_DECODER,
            "data.decode=device needs the same on every rank, or images would depend on who decodes them",
        )
    if config.run.reproducibility == "bitwise":
        _check_alike(
            facts,
            SAME_BITWISE,
            "run.reproducibility=bitwise needs the same on every rank",
        )
    return facts


def check_data(data: Datasets, ranks: Ranks) -> None:
    """Raise `DataError` unless every rank has the same samples, as far as can be told at once. A collective."""
    if ranks.count == 1:
        return
    own: dict[str, tuple[int, str]] = {}
    for name, part in (("train", data.train), *data.evaluated().items()):
        own[name] = len(part), quick_fingerprint(part)
    of_ranks = ranks.gather([own])
    of_main = of_ranks[0]
    for rank, of_rank in enumerate(of_ranks):
        for name in sorted({*of_rank, *of_main}):
            here = of_rank.get(name)
            on_main = of_main.get(name)
            if here != on_main:
                raise DataError(
                    f"the {name} samples of {data.name} on rank {rank} ({ranks.machines[rank]}) are not those of rank "
                    f"0 ({ranks.machines[0]}): {_count(here)} and {_count(on_main)}; give every machine the same "
                    f"files in the same folders"
                )


def check_order(plan: Plan, ranks: Ranks, *, epoch: int) -> None:
    """Raise `ConfigError` unless all ranks take the same samples in `epoch`. A collective where a sampler is set.

    Those of Lockstep's own are compared once, for what they read; a function of the user's in every epoch.
    """
    order = plan.order
    if not isinstance(order, DrawnOrder) or (epoch and not order.is_own_code):
        return
    digest = ranks.on_each(lambda: order_digest(plan, epoch))
    of_ranks = ranks.gather([digest])
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[0]:
            raise ConfigError(
                "data.sampler",
                f"gives other samples for epoch {epoch} on rank {rank} ({ranks.machines[rank]}) than on rank 0 "
                f"({ranks.machines[0]}); give every machine the same files, and let a function depend on its "
                f"arguments alone",
            )


def order_digest(plan: Plan, epoch: int = 0) -> str | None:
    """The SHA-256 of an epoch's sample ids; None where no sampler chooses them."""
    if plan.order is None:
        return None
    return hashlib.sha256(plan.permutation(epoch).astype("<i8").tobytes()).hexdigest()


def notes_on(facts: Sequence[RankFacts]) -> list[str]:
    """A line for each difference between ranks that is allowed and that a person may want to know of."""
    notes = []
    for name in facts[0]:
        if name in OF_EACH_MACHINE:
            continue
        other = _first_different(facts, name)
        if other is not None:
            place = f"rank {other['rank']} ({other['host']})"
            values = f"{other[name]} on {place}, {facts[0][name]} on rank 0"
            notes.append(f"the ranks differ in {name}: {values}")
    for values_of_rank in facts:
        skew = values_of_rank["clock_skew"]
        if abs(skew) > LARGEST_CLOCK_SKEW:
            rank, host = values_of_rank["rank"], values_of_rank["host"]
            notes.append(
                f"the clock of rank {rank} ({host}) is {skew:+.0f} s off rank 0's"
            )
    return notes


def compute_alike(facts: Sequence[RankFacts]) -> bool:
    """True if all ranks run on the same hardware and software: what they compute is then equal to the last bit."""
    return all(_first_different(facts, name) is None for name in SAME_BITWISE)


def _binding_keys(config: Config) -> dict[str, Any]:
    """The keys that all ranks must share, with their values: nearly all but those that a resumed run may change."""
    changes = changed_keys({}, config.to_dict(digests=True))
    keys = {}
    for name, (_, value) in changes.items():
        is_of_disk = name in OF_EACH_DISK or key_of_set(name) == "root"
        is_bound = name in SAME_ON_ALL_RANKS or not is_free(name)
        if is_bound and not is_of_disk:
            keys[name] = value
    return keys


def _check_configs(config: Config, ranks: Ranks, hashes: list[str]) -> None:
    if len(set(hashes)) == 1:
        return
    configs = ranks.gather([_binding_keys(config)])
    for rank, other in enumerate(configs):
        for name, (of_main, value) in changed_keys(configs[0], other).items():
            raise ConfigError(
                name,
                f"is {value} on rank {rank} ({ranks.machines[rank]}) and {of_main} on rank 0 ({ranks.machines[0]}); "
                f"give every process the same config",
            )


def _check_alike(facts: Sequence[RankFacts], names: Sequence[str], reason: str) -> None:
    for name in names:
        other = _first_different(facts, name)
        if other is not None:
            raise LockstepError(
                f"{name} is {other.get(name)} on rank {other['rank']} ({other['host']}) and {facts[0].get(name)} on "
                f"rank 0 ({facts[0]['host']}); {reason}"
            )


def _first_different(facts: Sequence[RankFacts], name: str) -> RankFacts | None:
    """The first rank's facts that differ from rank 0's in `name`."""
    for values in facts:
        if values.get(name) != facts[0].get(name):
            return values
    return None


def _hash(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, default=str).encode()
    ).hexdigest()


def _count(part: tuple[int, str] | None) -> str:
    return "none" if part is None else f"{part[0]:,} samples"
