"""What a run depends on besides its config: versions, device, processes, code. Kept as `environment.json`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.exact.tf32 import tf32_in_use
from trainer.process.machine import describe_device, package_versions
from trainer.process.ranks import Ranks
from trainer.storage.data_record import DataRecord, plain_values

ENVIRONMENT_FILE = "environment.json"
DEVICE_DECODER = "device_decoder"
GIT_TIMEOUT = 5  # seconds

# `describe` gives the commit and "-dirty"; tags are excluded, since they would replace the commit.
GIT_COMMAND = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def environment(
    ranks: Ranks,
    data: DataRecord,
    *,
    facts_of_ranks: Sequence[Mapping[str, Any]],
    device_decoder: str = "",
) -> dict[str, Any]:
    """Plain values: whatever may change a run's bits, and the fingerprints of its data.

    Rank 0's are at the top; `ranks` has those of every rank, in rank order. `device_decoder` is the name of what
    decodes images on the device, if anything does.
    """
    values: dict[str, Any] = {}
    values |= package_versions()
    values |= describe_device(ranks.device)
    if ranks.device.type == "cuda":
        values["tf32"] = tf32_in_use()._asdict()
        values["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    if device_decoder:
        values[DEVICE_DECODER] = device_decoder
    values["processes"] = ranks.count
    values["threads"] = torch.get_num_threads()
    values["code"] = _git_commit()
    values["data"] = plain_values(data)
    values["ranks"] = [dict(facts) for facts in facts_of_ranks]
    return values


def describe_decoder_change(directory: Path, device_decoder: str) -> str:
    """A note where the run in `directory` was trained on images of another device or decoder; "" where not."""
    if not device_decoder:
        return ""
    try:
        before = json.loads((directory / ENVIRONMENT_FILE).read_text())[DEVICE_DECODER]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if before == device_decoder:
        return ""
    return f"images were decoded by {before} before, and are by {device_decoder} now, whose pixels may differ"


def _git_commit() -> str | None:
    """The commit of the repository around the working directory, with "-dirty" if files have changed since.

    None if there is no repository or no git.
    """
    # Without optional locks, `describe` does not rewrite the index, which another git may be using.
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        process = subprocess.run(
            GIT_COMMAND,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT,
            check=True,
            env=variables,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
