"""Run a sweep, described in W&B's YAML, on this machine without a server.

lockstep sweep configs/sweeps/grid.yaml --check              only see whether its trials can run
lockstep sweep configs/sweeps/grid.yaml                      the same command continues a sweep that was stopped
lockstep sweep configs/sweeps/random.yaml --parallel 4 train.epochs=30
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from trainer.commands.arguments import CommandParser, whole_number
from trainer.errors import LockstepError


def _parse(arguments: list[str]) -> Namespace:
    """The command's options. Raises `ConfigError`."""
    parser = CommandParser("sweep", __doc__)
    parser.add_argument(
        "file", metavar="SWEEP.yaml", type=Path, help="method, metric and parameters"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check every key and value, and train nothing",
    )
    parser.add_argument(
        "--parallel",
        metavar="N",
        type=whole_number(least=1),
        default=1,
        help="trials that run at once (default: 1)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=whole_number(least=0),
        default=0,
        help="draws the trials' values (default: 0)",
    )
    parser.add_overrides("changes a key of every trial's config")
    return parser.parse(arguments)


def main(arguments: list[str]) -> None:
    """Run the sweep's trials, or check them; overrides hold for every trial."""
    options = _parse(arguments)

    from trainer.sweep.check import check
    from trainer.sweep.description import read_sweep
    from trainer.sweep.goal import goal_note, with_goal
    from trainer.sweep.results import write_results
    from trainer.sweep.runner import LocalSweep
    from trainer.sweep.table import LiveTable

    sweep = read_sweep(options.file)
    config = check(sweep, options.overrides)
    sweep = with_goal(sweep, config)
    if note := goal_note(sweep):
        print(note)
    if options.check:
        print(
            f"{sweep.file}: every parameter exists and takes its values, and {sweep.metric} is logged"
        )
        return
    directory = Path(config.run.dir) / sweep.name
    local = LocalSweep(
        sweep,
        directory,
        shared=options.overrides,
        seed=options.seed,
        parallel=options.parallel,
    )
    try:
        with LiveTable(sweep) as table:
            local.run(table.show)
    finally:
        write_results(sweep, local.study, directory)
    if local.trials and all(trial.state == "failed" for trial in local.trials):
        raise LockstepError(
            "every trial of the sweep failed; the first one's reason is in the table above"
        )
