"""What a run read, kept as `inputs.json` in its directory: the fingerprints of its data, and its weights' file.

Whatever reads the run's data again (a resume, `evaluate`, `replay`) compares them with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.config.run_sections import RunConfig
from trainer.data.datasets import Datasets, MapDataset
from trainer.errors import DataError, LockstepError, data_error, first_few
from trainer.storage.files import write_json
from trainer.storage.fingerprint import Fingerprint, fingerprint

FILE = "inputs.json"
FORMAT = 1  # of what is hashed: fingerprints of two formats do not compare

# Of a file of weights, so many pieces are read, spread evenly: another training changes every one of them.
PIECES = 64
PIECE_SIZE = 2**16  # bytes
MOST_CHANGES = 3  # named one by one


@dataclass(frozen=True)
class DataRecord:
    """Attributes: class names by class id, the fingerprint of each part, and of the file of `model.weights`.

    `order` is the digest of the first epoch's sample ids, where `data.sampler` chooses them.
    `sets` are the named validation sets, as `val/clean`, and `test`; then `val` is None unless there is an unnamed one.
    """

    classes: list[str] | None
    train: Fingerprint
    val: Fingerprint | None
    weights: str | None = None
    order: str | None = None
    sets: dict[str, Fingerprint] = field(default_factory=dict)

    def evaluated(self) -> dict[str, Fingerprint]:
        """By the first part of their metrics' names: `val` or `val/<name>`, and `test`."""
        val = {} if self.val is None else {"val": self.val}
        return val | self.sets


def record_data(
    data: Datasets, weights: Path | None = None, order: str | None = None
) -> DataRecord:
    """The record of a run on `data` that starts from the file `weights`, in the `order` of that digest."""
    sets = {phase: fingerprint(part) for phase, part in data.evaluated().items()}
    return DataRecord(
        classes=data.classes,
        train=fingerprint(data.train),
        val=sets.pop("val", None),
        weights=None if weights is None else file_fingerprint(weights),
        order=order,
        sets=sets,
    )


def write_record(run: Path, record: DataRecord) -> None:
    """Write `inputs.json` into the run directory `run`."""
    write_json(run / FILE, {"format": FORMAT, **asdict(record)})


def read_record(run: Path) -> DataRecord | None:
    """The record in the run directory `run`; None for a run of a version that kept none, or another kind.

    Raises `LockstepError` if it cannot be read.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            return None
        return _record_of(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LockstepError(
            f"{path} cannot be read ({error}); remove it if the data are those of the run"
        ) from error


def _record_of(values: dict[str, Any]) -> DataRecord:
    """The record that was written as `values`. Raises `KeyError` or `TypeError` for what is none."""
    val = values["val"]
    sets = {}
    for phase, fields in values.get("sets", {}).items():
        sets[phase] = Fingerprint(**fields)
    return DataRecord(
        classes=values["classes"],
        train=Fingerprint(**values["train"]),
        val=None if val is None else Fingerprint(**val),
        weights=values["weights"],
        order=values.get("order"),  # unknown to earlier versions
        sets=sets,
    )


def check_same_data(
    run: Path, data: Datasets, section: RunConfig, *, resumes: bool = True
) -> tuple[DataRecord | None, str]:
    """Raise `DataError` if `data` are not those that the run in `run` was trained and validated on.

    Returns the run's record if they are, and None if that is not known. With `run.resume_changes=allow` it returns
    None, and what changed, in one line, instead of raising.
    """
    before = read_record(run)
    if before is None:
        return None, ""
    changes = describe_changes(before, data)
    if not changes:
        return _with_test_set(before, data), ""
    if section.resume_changes == "allow":
        return None, f"the data have changed since the run began: {changes}"
    new_run = "start a new run with run.resume=never, " if resumes else ""
    raise DataError(
        f"the data of {data.name} are not those of the run in {run}: {changes}. Restore them, {new_run}"
        f"or accept the change with run.resume_changes=allow"
    )


def _with_test_set(record: DataRecord, data: Datasets) -> DataRecord:
    """The record, if a test set came or went with that one."""
    sets = dict(record.sets)
    if data.test is None:
        sets.pop("test", None)
    elif "test" not in sets:
        sets["test"] = fingerprint(data.test)
    return replace(record, sets=sets)


def check_same_weights(run: Path, weights: Path | None) -> None:
    """Raise `DataError` if the file of `model.weights` is not the one that the run in `run` began from."""
    before = read_record(run)
    if before is None or before.weights is None or weights is None:
        return
    if file_fingerprint(weights) != before.weights:
        raise DataError(
            f"{weights} is not the file that the run in {run} began from; restore it, or set model.weights to it"
        )


def check_same_order(run: Path, order: str | None, section: RunConfig) -> None:
    """Raise `DataError` if the samples that `data.sampler` chooses are not those that it chose for the run in `run`."""
    before = read_record(run)
    if before is None or before.order is None or order is None:
        return
    if order != before.order and section.resume_changes == "refuse":
        raise DataError(
            f"data.sampler chooses other samples than it did for the run in {run}: its function, or a file that it "
            f"reads, has changed. Restore it, start a new run with run.resume=never, or accept the change with "
            f"run.resume_changes=allow"
        )


def describe_changes(before: DataRecord, data: Datasets) -> str:
    """What differs between the data of a record and `data`, in one line; "" for nothing."""
    changes = [_class_changes(before.classes, data.classes)]
    changes.append(describe_part("train", before.train, data.train, data.classes))
    for phase, was, is_now in pairs_of_sets(before, data):
        # Training never sees a test set: one may be named, or left out, later.
        if phase != "test" or (was is not None and is_now is not None):
            changes.append(describe_part(phase, was, is_now, data.classes))
    return "; ".join(change for change in changes if change)


def pairs_of_sets(
    before: DataRecord, data: Datasets
) -> Iterator[tuple[str, Fingerprint | None, MapDataset | None]]:
    """Each evaluated set of either, as it was and as it is."""
    sets_before = before.evaluated()
    sets_now = data.evaluated()
    for phase in dict.fromkeys([*sets_before, *sets_now]):
        yield phase, sets_before.get(phase), sets_now.get(phase)


def describe_part(
    name: str,
    before: Fingerprint | None,
    dataset: MapDataset | None,
    classes: Sequence[str] | None,
) -> str:
    """What differs between a fingerprint and the samples of a data set, in one line; "" for nothing."""
    if before is None or dataset is None:
        if before is None and dataset is None:
            return ""
        count = before.samples if before is not None else "no"
        count_now = len(dataset) if dataset is not None else "no"
        return f"{count} {name} samples were, {count_now} are"
    now = fingerprint(dataset, before.block_size)
    if now.sha256 == before.sha256:
        return ""
    noun = f"{name} sample" if before.samples == 1 else f"{name} samples"
    if now.samples == before.samples:
        counts = f"{before.samples:,} {noun} as before, of other content or classes"
    else:
        counts = f"{before.samples:,} {noun} were, {now.samples:,} are"
    by_class = _count_changes(before, now, classes)
    return f"{counts}{by_class}{_first_change(before, now, dataset)}"


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and of pieces of it: milliseconds for any size. Raises `DataError` without the file."""
    try:
        size = path.stat().st_size
        sha256 = hashlib.sha256(str(size).encode())
        last = max(0, size - PIECE_SIZE)
        with path.open("rb") as file:
            for index in range(PIECES):
                start = last * index // (PIECES - 1)
                file.seek(start)
                sha256.update(file.read(PIECE_SIZE))
    except OSError as error:
        raise data_error(f"{path} cannot be read ({error.strerror})", error) from None
    return sha256.hexdigest()


def _class_changes(before: list[str] | None, now: list[str] | None) -> str:
    if before is None or now is None or before == now:
        return ""
    if len(before) != len(now):
        return f"{len(before)} classes were, {len(now)} are"
    changes = []
    for index, (was, name) in enumerate(zip(before, now, strict=True)):
        if was != name:
            changes.append(f'class {index} was "{was}" and is "{name}"')
    return first_few(changes, MOST_CHANGES)


def _count_changes(
    before: Fingerprint, now: Fingerprint, classes: Sequence[str] | None
) -> str:
    """The classes whose samples became more or fewer, in parentheses."""
    if before.by_class is None or now.by_class is None:
        return ""
    changes = []
    for target in sorted({*before.by_class, *now.by_class}, key=int):
        count_before = before.by_class.get(target, 0)
        count = now.by_class.get(target, 0)
        if count != count_before:
            name = _class_name(int(target), classes)
            changes.append(f"{name} {count_before:,} → {count:,}")
    return f" ({first_few(changes, MOST_CHANGES)})" if changes else ""


def _class_name(target: int, classes: Sequence[str] | None) -> str:
    if classes and 0 <= target < len(classes):
        return classes[target]
    return f"class {target}"


def _first_change(before: Fingerprint, now: Fingerprint, dataset: MapDataset) -> str:
    """Where the first difference is: a sample, or the block of samples that holds it."""
    block = 0
    for hash_before, hash_now in zip(before.blocks, now.blocks, strict=False):
        if hash_before != hash_now:
            break
        block += 1
    first = block * before.block_size
    if first >= now.samples:
        return ", the last are missing"
    last = min(first + before.block_size, now.samples) - 1
    paths = getattr(dataset, "paths", None)
    name = f" ({paths[first]})" if paths is not None else ""
    if last == first:
        return f", from sample {first}{name} on"
    return f", from between samples {first} and {last}{name} on"


def plain_values(record: DataRecord) -> dict[str, Any]:
    """The fingerprints alone, for `environment.json`."""
    return {
        "train": record.train.sha256,
        "val": None if record.val is None else record.val.sha256,
        **{phase: part.sha256 for phase, part in record.sets.items()},
    }
