"""Train one step of a run again, on one process, and take it apart.

lockstep replay runs/digits --step 120
lockstep replay runs/digits --step 120 --json

Loss by sample, layers' outputs, BatchNorm statistics, gradients and updates are shown and kept in RUN/replay/. The
step is reached from the nearest checkpoint before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import CommandParser, whole_number
from trainer.process.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainer.inspection.replay import Replay

# A replay sends nothing, and each micro-batch is run by itself, as the hooks that take the step apart need it.
OVERRIDES = [
    "wandb.mode=disabled",
    "run.figures=false",
    "data.workers=0",
    "train.compile=false",
    "train.cuda_graphs=false",
    "batch.fuse=1",
]


def main(arguments: list[str]) -> None:
    """Replay step `--step`, write it to `RUN/replay/step_…/`, and print it as tables or as JSON."""
    parser = CommandParser("replay", __doc__)
    parser.add_run()
    parser.add_trust()
    parser.add_argument(
        "--step",
        metavar="K",
        type=whole_number(least=0),
        required=True,
        help="the step to replay; the first is 1",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    parser.add_overrides("changes a key of the run's config")
    options = parser.parse(arguments)

    from trainer.commands.replay_output import print_replay
    from trainer.core.trust import read_trusted_config
    from trainer.inspection.replay import replay
    from trainer.trainer import Trainer

    config = read_trusted_config(
        options.run, [*OVERRIDES, *options.overrides], options.trust
    )

    def make_trainer() -> Trainer:
        trainer = Trainer(config)
        keep_freed_memory(trainer.ranks.device.type)
        return trainer

    result = replay(make_trainer, options.run, options.step)
    directory = options.run / "replay" / f"step_{result.step:08d}"
    values = _write(result, directory)
    if options.json:
        print(json.dumps(values))
    else:
        print_replay(result, options.run, directory)


def _write(result: Replay, directory: Path) -> dict[str, Any]:
    """Write `replay.json` and, of samples that are images, `images.png`; returns what the JSON file holds."""
    from trainer.inspection.replay import loss_rank
    from trainer.reporting.figures.images import draw_batch_grid
    from trainer.storage.files import write_json

    directory.mkdir(parents=True, exist_ok=True)
    images, result.images = result.images, None  # pixels do not belong into JSON
    values = asdict(result)
    write_json(directory / "replay.json", values)
    if images is not None:
        order = sorted(range(len(images)), key=lambda i: loss_rank(result.samples[i]))
        labels = [_label(result.samples[i]) for i in order]
        draw_batch_grid(images[order], labels, directory / "images.png")
    return values


def _label(sample: Mapping[str, Any]) -> str:
    label = f"{sample['id']} · {sample['target']}"
    return label if sample["loss"] is None else f"{label} · {sample['loss']:.3g}"
