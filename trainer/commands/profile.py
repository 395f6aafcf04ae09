"""See where the time of a config's steps goes, and what to change.

lockstep profile configs/cifar10.yaml batch.size=256
lockstep profile configs/cifar10.yaml --steps 20
torchrun --nproc_per_node 2 -m trainer profile configs/cifar10.yaml

Some steps are trained in memory, without evaluations, checkpoints and the proof. What is found is printed, and written
with the trace into profile/ of DIR. `train.profile` does the same within a run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import CommandParser, load_config, whole_number
from trainer.config.train_section import MAX_PROFILED_STEPS
from trainer.errors import ConfigError
from trainer.process.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainer.core.profile.observer import ProfileObserver
    from trainer.reporting.console import Console
    from trainer.trainer import Trainer

STEPS = 10  # traced, where nobody says how many


def main(arguments: list[str]) -> None:
    """Train until the profile is complete, on any number of processes."""
    parser = CommandParser("profile", __doc__)
    parser.add_config()
    parser.add_argument(
        "--steps",
        type=whole_number(least=1),
        metavar="K",
        help=f"how many steps to trace; default: train.profile, else {STEPS}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to make the folder profile; default: here",
    )
    options = parser.parse(arguments)
    config = load_config(options)
    steps = options.steps or config.train.profile or STEPS
    if steps > MAX_PROFILED_STEPS:
        raise ConfigError(
            "--steps", f"{steps} is more than {MAX_PROFILED_STEPS}; 10 say enough"
        )
    _check_folder(options.out)

    from trainer.core.try_out import explained
    from trainer.reporting.console import Console
    from trainer.trainer import Trainer

    trainer = Trainer(config)
    keep_freed_memory(trainer.ranks.device.type)
    console = Console(active=trainer.ranks.is_main)
    profile = _observer(trainer, steps, options.out, console)
    trainer.observers.add(profile)
    with trainer.run.settings(), explained(trainer.run, lambda: (trainer.fuse, 1)):
        trainer.try_out()
        try:
            _train(trainer, profile)
        finally:
            profile.close()
    trainer.ranks.close()


def _check_folder(path: Path) -> None:
    """Raise `ConfigError` where no folder can be made, before anything is trained."""
    existing = next(
        parent for parent in (path, *path.absolute().parents) if parent.exists()
    )
    if not existing.is_dir():
        raise ConfigError("--out", f"{existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError("--out", f"{existing} cannot be written; name another folder")


def _observer(
    trainer: Trainer, steps: int, directory: Path, console: Console
) -> ProfileObserver:
    from trainer.core.profile.observer import ProfileObserver
    from trainer.core.profile.windows import find_windows, steps_needed

    windows = find_windows(trainer.plan, None, steps_done=0, count=steps)
    if windows is None:
        raise ConfigError(
            "--steps",
            f"{steps} needs {steps_needed(steps)} steps of training, and the run has "
            f"{trainer.plan.total_steps}; lower it, or raise train.epochs or train.max_steps",
        )
    return ProfileObserver(windows, directory, console.note)


def _train(trainer: Trainer, profile: ProfileObserver) -> None:
    """Train up to the profile's last step, and read what a run would log where it would."""
    trainer.start()
    try:
        for step in trainer.plan.steps(0, profile.last_step):
            trainer.train_step(step)
            if trainer.timetable.is_logged(step):
                trainer.measure(step)
        trainer.finite.check(trainer.progress)
    finally:
        trainer.end_loading()
