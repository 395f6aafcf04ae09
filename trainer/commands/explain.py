"""Take the first step of a config apart: a lesson on what training does.

lockstep explain configs/lessons/patterns.yaml
lockstep explain configs/digits.yaml model.name=resnet18 --all
lockstep explain configs/digits.yaml --json

Batch, loss, graph, gradients, update and BatchNorm are shown, with the numbers of a real step. Two steps are trained
in memory, and nothing is written.
"""

from __future__ import annotations

import json

from trainer.commands.arguments import CommandParser, load_config
from trainer.errors import ConfigError
from trainer.process import launcher


def main(arguments: list[str]) -> None:
    """Explain the first step of a config, in text or as JSON."""
    parser = CommandParser("explain", __doc__)
    parser.add_config()
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of the lesson",
    )
    parser.add_argument(
        "--all", action="store_true", help="print every row of long tables"
    )
    options = parser.parse(arguments)
    if launcher.world_size() > 1:
        raise ConfigError(
            "explain", "takes a step apart on one process; start it without a launcher"
        )
    config = load_config(options)

    from trainer.commands.explain_output import MOST_ROWS, print_lesson
    from trainer.inspection.explain import Dissection

    report = Dissection(config).report()
    if options.json:
        print(json.dumps(report))
    else:
        print_lesson(report, None if options.all else MOST_ROWS)
