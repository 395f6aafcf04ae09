"""Ask the best model of a run about image files, or export the model.

lockstep predict runs/digits images/                    a table; JSON lines if the output is no terminal
lockstep predict runs/digits 'scans/*.png' --top 5
lockstep predict runs/discs images/ --masks masks/      a PNG for each file, with the class of each pixel
lockstep predict runs/detection images/ --json          the boxes in each file, with classes and scores
lockstep predict runs/digits --export onnx              writes runs/digits/best.onnx

The run's data are not needed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from trainer.commands.arguments import CommandParser, one_of, whole_number
from trainer.errors import ConfigError
from trainer.process.exit import end_on_closed_pipe
from trainer.process.terminal import is_terminal

EXPORT_FORMATS = ("torch", "onnx")


def _parse(arguments: list[str]) -> Namespace:
    """The command's options. Raises `ConfigError`."""
    parser = CommandParser("predict", __doc__)
    parser.add_run()
    parser.add_trust()
    parser.add_argument(
        "paths",
        nargs="*",
        default=[],
        metavar="PATH",
        help="an image, a directory, or a glob pattern",
    )
    parser.add_argument(
        "--top",
        metavar="K",
        type=whole_number(least=1),
        default=3,
        help="classes to name for each file (default: 3)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object for each file"
    )
    parser.add_argument(
        "--masks",
        metavar="DIR",
        type=Path,
        help="of a model that classifies pixels: write each file's mask to DIR, as a PNG of class ids",
    )
    parser.add_argument(
        "--export",
        metavar="|".join(EXPORT_FORMATS),
        type=one_of(EXPORT_FORMATS),
        help="write the model to RUN/best.pt2 or RUN/best.onnx, to be used without this package",
    )
    parser.add_overrides("changes a key of the run's config")
    options = parser.parse(arguments)
    if not options.paths and options.export is None:
        raise ConfigError(
            "PATH",
            "is missing: predict RUN PATH…, where a PATH is an image, a directory or a glob",
        )
    return options


def main(arguments: list[str]) -> None:
    """Answer for the files, export the model, or both."""
    options = _parse(arguments)

    end_on_closed_pipe()
    from trainer.commands.predict_output import find_images, print_predictions
    from trainer.inspection.export import ENDINGS, export
    from trainer.inspection.predictor import Predictor

    files = find_images(options.paths)
    predictor = Predictor(options.run, options.overrides, trust=options.trust)
    if options.export is not None:
        # Before the files are read: one that cannot be read must not keep the model from being exported.
        path = options.run / f"best{ENDINGS[options.export]}"
        print(export(predictor, options.export, path), file=sys.stderr)
    if files:
        as_json = options.json or not is_terminal(sys.stdout)
        print_predictions(
            predictor, files, top=options.top, as_json=as_json, masks=options.masks
        )
