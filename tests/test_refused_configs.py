"""Every shipped config can be run in bitwise mode on CUDA: known on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import on_ranks
from tests.test_configs import CONFIGS, ROOT, SHORT, substitutes
from trainer import Trainer
from trainer.config.load import load
from trainer.core.refused import refused_operations

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_cuda_refuses_of_a_shipped_config(path: Path, tmp_path: Path) -> None:
    def lines(overrides: list[str]) -> list[str]:
        trainer = Trainer(load(path, overrides))
        with trainer.run.settings():
            return refused_operations(trainer.run)

    overrides = [
        *substitutes(path, tmp_path),
        *SHORT,
        f"run.dir={tmp_path}",
        "run.reproducibility=bitwise",
        "batch.fuse=1",
        "train.compile=false",
    ]
    (refused,) = on_ranks(1, lines, overrides)
    assert refused == []
