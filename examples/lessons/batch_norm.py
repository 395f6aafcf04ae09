"""BatchNorm under gradient accumulation, drawn: runs/batch_norm_lesson/figures/*.png.

python -m examples.lessons.batch_norm [key=value …]      configs/lessons/batch_norm.yaml, nine times over

`running_statistics.png`: a step of 64 samples cut into M = 1, 4, 16 micro-batches, under both settings of
batch_norm.momentum_per. With `micro_batch`, PyTorch's own behaviour, every micro-batch ages the statistics, so a finer
cut forgets their start (0 and 1) faster; with `step` a step ages them alike however it is cut.
`switches.png`: validation under other values of batch.eval_size. Without running statistics what a net makes of an
image depends on the images beside it; affine=false only takes a scale and a shift away.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn

from examples.lessons.style import BLUE, DPI, FAINT, GREY, INK, SMALL, TITLE, VERMILION
from trainer import LockstepError, Observer, Run, Step, Trainer, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIG = Path("configs/lessons/batch_norm.yaml")
CUTS = {1: 64, 4: 16, 16: 4}  # micro-batches of a step: their size
COLOURS = {1: INK, 4: BLUE, 16: VERMILION}
SETTINGS = ("micro_batch", "step")
EVAL_SIZES = (1, 2, 4, 16, 64, 256)

Floats = npt.NDArray[np.float64]


def net(
    num_classes: int,
    in_channels: int,
    affine: bool = True,
    track_running_stats: bool = True,
) -> nn.Sequential:
    """Two convolutions with BatchNorm, `(N, in_channels, 8, 8)` → `(N, num_classes)`.

    Args:
        affine: whether each channel is scaled and shifted by parameters after it is normalised.
        track_running_stats: whether validation normalises by running statistics, or by those of its own batch.
    """

    def norm(channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(
            channels, affine=affine, track_running_stats=track_running_stats
        )

    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        norm(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


class FirstNormLayer(Observer):
    """Records the first norm layer's running mean and variance after each step, averaged over channels."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float]] = []

    def begin(self, run: Run) -> None:
        self.layer = next(
            module
            for module in run.module.modules()
            if isinstance(module, nn.BatchNorm2d)
        )

    def step(self, step: Step) -> None:
        mean, variance = self.layer.running_mean, self.layer.running_var
        assert mean is not None
        assert variance is not None
        self.history.append((float(mean.mean()), float(variance.mean())))


def running_statistics(overrides: list[str]) -> Figure:
    figure = _figure(8.4, 5.6)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, setting in enumerate(SETTINGS):
        for cuts, size in CUTS.items():
            name = f"M{cuts}_{setting}"
            more = [
                "train.epochs=1",
                f"run.name={name}",
                f"batch.micro_size={size}",
                f"batch_norm.momentum_per={setting}",
            ]
            observer = FirstNormLayer()
            config = load(CONFIG, ["run.figures=false", *overrides, *more])
            Trainer(config, observers=[observer]).fit()
            for row, values in enumerate(np.array(observer.history).T):
                style: dict[str, Any] = {"color": COLOURS[cuts], "linewidth": 1.5}
                panels[row, column].plot(
                    np.arange(1, len(values) + 1), values, label=f"M = {cuts}", **style
                )
        _style(panels[0, column], f"momentum_per = {setting}")
        _style(panels[1, column])
        panels[1, column].set_xlabel("step", fontsize=SMALL, color=INK)
    for row, name in enumerate(("running mean", "running variance")):
        panels[row, 0].set_ylabel(name, fontsize=SMALL, color=INK)
    panels[0, 1].legend(frameon=False, fontsize=SMALL, labelcolor=INK)
    return figure


def switches(overrides: list[str]) -> Figure:
    figure = _figure(6.4, 3.4)
    axes = figure.subplots()
    colours = {
        "model.affine=true": INK,
        "model.affine=false": BLUE,
        "model.track_running_stats=false": VERMILION,
    }
    for switch, colour in colours.items():
        settings = [
            *overrides,
            "run.figures=false",
            f"run.name={switch.removeprefix('model.').replace('=', '_')}",
            switch,
        ]
        Trainer(load(CONFIG, settings)).fit()
        losses = []
        for size in EVAL_SIZES:
            trainer = Trainer(load(CONFIG, [*settings, f"batch.eval_size={size}"]))
            trainer.load_best()
            losses.append(trainer.evaluate()["loss"])
        label = (
            "both switches on"
            if switch == "model.affine=true"
            else switch.removeprefix("model.")
        )
        axes.plot(
            EVAL_SIZES,
            losses,
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=label,
        )
    _style(axes, "validation loss")
    axes.set_xscale("log", base=2)
    axes.set_xticks(EVAL_SIZES, [str(size) for size in EVAL_SIZES])
    axes.set_xlabel(
        "samples of one validation forward (batch.eval_size)", fontsize=SMALL, color=INK
    )
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, title: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=TITLE, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=SMALL)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)


def main(overrides: list[str]) -> int:
    try:
        runs = Path(load(CONFIG, overrides).run.dir) / "batch_norm_lesson"
        folder = runs / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        for draw in (running_statistics, switches):
            draw([*overrides, f"run.dir={runs}"]).savefig(
                folder / f"{draw.__name__}.png"
            )
            print(f"drawn    {folder / draw.__name__}.png")
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
