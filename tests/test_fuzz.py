"""No config leads to a traceback: it runs, or it is refused in a message that names a key that there is."""

from __future__ import annotations

import json
import os
import random
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from tests.distributed.ranks import on_ranks
from tests.fuzzing import BASE, draw_overrides
from trainer import Trainer
from trainer.config.load import load
from trainer.config.schema import SECTIONS
from trainer.errors import ConfigError, DataError, LockstepError

pytestmark = pytest.mark.filterwarnings("ignore")

SEED = 12
COUNT = 300
# Each was a traceback, or named no key.
TEXTS = [
    *("train=[1,2]", "wandb=[1]", "data.train_transforms={a: 1}", "observers={a: 1}"),
    *("model[name]=.", "model.name=.", "model.name=..x", "loss.name=a..b", ".train=1"),
    *("[]=1", "model]=1", "train.=1", "loss.ignore_index=[1,2]", "data.image_size=1"),
    *("data.image_size=[1,1]", "data.mean=[.nan]", "optimizer.lr=.inf", "run.name=\0"),
    *(
        "optimizer.lr=1e300",
        "run.name=\ud800",
        "train.epochs=\ud800",
        "run.timeout=.inf",
    ),
    *("schedule.warmup=1e308", "schedule.gamma=1e308", "train.epochs=&a [*a]"),
    *("model.unfreeze={²: backbone}", "data.name=torch.utils.data.TensorDataset"),
    *("model.weights=/etc/passwd", "data.val_transforms=[{name: Grayscale}]"),
]
FILES = [
    *("train: [1, 2]", "train: &a [*a]", "model: &a {x: *a}", "[" * 5000, "\0", "- 1"),
    *("? [1]\n: 2", "observers: [{name: 1}]", "null: 1", "<<: 1", "%YAML 9"),
]


def outcome(path: Path, overrides: Any, keys: Sequence[str]) -> str:
    """What is wrong with the end of a run: nothing, a traceback, or an error without a key."""
    try:
        Trainer(load(path, overrides)).fit()
    except ConfigError as error:
        section = error.key.partition(".")[0].partition("[")[0]
        is_key = section in SECTIONS or section == "observers"
        return "" if is_key or error.key in keys else f"no such key: {error}"
    except (DataError, LockstepError):
        return ""
    except BaseException:
        return traceback.format_exc()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return ""


def outcomes(directory: Path, cases: Sequence[Any]) -> list[tuple[str, str]]:
    """The cases that end badly, each with its end. A case is a file's text or overrides."""
    os.chdir(directory)
    base = Path("base.yaml")
    base.write_text(yaml.safe_dump(BASE))
    bad = []
    for case in cases:
        path, overrides, keys = base, case, [str(case)]
        if isinstance(case, str) and case in FILES:
            path, overrides = Path("bad.yaml"), _base_texts()
            path.write_text(case)
            keys = [str(path)]
        elif isinstance(case, str):
            overrides = [case]
        result = outcome(path, overrides, keys)
        if result:
            bad.append((ascii(case), result))
    return bad


def _base_texts() -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in BASE.items()]


def report(bad: list[tuple[str, str]]) -> str:
    return "\n".join(f"{case}\n{result}" for case, result in bad)


@pytest.mark.parametrize("cases", [TEXTS, FILES], ids=["command line", "files"])
def test_what_once_ended_in_a_traceback(cases: list[str], tmp_path: Path) -> None:
    (bad,) = on_ranks(1, outcomes, tmp_path, cases)
    assert not bad, report(bad)


def test_random_configs(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    cases = [draw_overrides(draw) for _ in range(COUNT)]
    (bad,) = on_ranks(1, outcomes, tmp_path, cases)
    assert not bad, report(bad)
