"""A descent drawn: train what a config describes, then animate its path over the loss, in <run>/figures/descent.gif.

python -m examples.lessons.descent                                       y = x² from x = 1
python -m examples.lessons.descent configs/lessons/own_optimizer.yaml    64 weights, in the plane their path lies in

One parameter is drawn over its curve. More are drawn in the plane of the path's two principal directions (Li et al.,
2018, "Visualizing the loss landscape of neural nets", section 7); the loss is that of all training samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from examples.lessons.style import BLUE, DPI, FAINT, GREY, INK, SMALL, TITLE, VERMILION
from trainer import LockstepError, Observer, Run, Step, Trainer, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARABOLA = Path("configs/lessons/parabola.yaml")
FRAMES_PER_SECOND = 8
END_FRAMES = 16  # for which the last picture stays
CELLS = 61  # points along a side of the surface

Floats = npt.NDArray[np.float64]


class Walk(Observer):
    """Records the weights before the first step and after each."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def begin(self, run: Run) -> None:
        self.parameters = list(run.module.parameters())
        self._record()

    def step(self, step: Step) -> None:
        self._record()

    def _record(self) -> None:
        self.weights.append(
            parameters_to_vector(self.parameters).detach().cpu().double()
        )


def losses(trainer: Trainer, weights: Tensor) -> Floats:
    """The mean loss over the training samples at each of some weights `(n, parameters)`; the model's are put back."""
    parameters = list(trainer.module.parameters())
    original = parameters_to_vector(parameters).detach().clone()
    batch = trainer.run.train_loader.peek(range(len(trainer.run.data.train)))
    values = []
    trainer.module.eval()
    with torch.no_grad():
        for row in weights.to(original):
            vector_to_parameters(row, parameters)
            _, loss = trainer.run.forward(trainer.module, batch, None)
            values.append(float(loss.total / loss.weight))
        vector_to_parameters(original, parameters)
    return np.array(values)


def over_a_curve(axes: Axes, trainer: Trainer, path: Tensor) -> Floats:
    """Draw the loss of one parameter over its values; returns the path's points, `(steps + 1, 2)`."""
    reach = 1.25 * path.abs().max().clamp(min=1e-3)
    values = torch.linspace(float(-reach), float(reach), 201, dtype=torch.float64)
    axes.plot(
        values.numpy(), losses(trainer, values.unsqueeze(1)), color=BLUE, linewidth=1.6
    )
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_xlabel("parameter", fontsize=SMALL, color=INK)
    axes.set_ylabel("loss", fontsize=SMALL, color=INK)
    return np.column_stack([path[:, 0].numpy(), losses(trainer, path)])


def over_a_surface(axes: Axes, trainer: Trainer, path: Tensor) -> Floats:
    """Draw the loss in the plane where most of the path lies; returns the path's points, `(steps + 1, 2)`."""
    from matplotlib.colors import LogNorm

    end = path[-1]
    directions = torch.linalg.svd(path - end, full_matrices=False).Vh[:2]
    points = (path - end) @ directions.T
    low, high = points.amin(0), points.amax(0)
    margin = 0.25 * (high - low).max().clamp(min=1e-6)
    left, bottom = (low - margin).tolist()
    right, top = (high + margin).tolist()
    across = torch.linspace(left, right, CELLS)
    up = torch.linspace(bottom, top, CELLS)
    grid = torch.cartesian_prod(up, across).flip(1).double()
    surface = losses(trainer, end + grid @ directions).reshape(CELLS, CELLS)
    highest = max(float(surface.max()), 1e-30)
    # A loss may be 0, which no logarithmic scale shows.
    lowest = max(float(surface.min()), 1e-6 * highest)
    levels = np.geomspace(lowest, 1.001 * highest, 25)
    contours = axes.contourf(
        across, up, surface, levels=levels, norm=LogNorm(), cmap="Blues", extend="min"
    )
    bar = axes.figure.colorbar(
        contours,
        ax=axes,
        ticks=levels[::6],
        format="%.2g",
        shrink=0.85,
        extendrect=True,
    )
    bar.minorticks_off()
    bar.set_label("mean loss of the training samples", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=GREY, labelcolor=INK)
    axes.set_xlabel("first principal direction of the path", fontsize=SMALL, color=INK)
    axes.set_ylabel("second", fontsize=SMALL, color=INK)
    on_the_plane: Floats = points.numpy()
    return on_the_plane


def animate(trainer: Trainer, walk: Walk, to: Path) -> None:
    """Write the GIF: a frame for the start and for each step."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = torch.stack(walk.weights)
    figure = Figure(
        figsize=(5.6, 4.2), dpi=0.75 * DPI, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    draw_loss = over_a_curve if path.shape[1] == 1 else over_a_surface
    points = draw_loss(axes, trainer, path)
    draw = _pen(axes, points, losses(trainer, path))
    draw(0)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # else the axes move from frame to frame
    last = len(points) - 1
    frames = [*range(len(points)), *[last] * END_FRAMES]
    animation = FuncAnimation(figure, draw, frames=frames)
    to.parent.mkdir(parents=True, exist_ok=True)
    animation.save(to, writer=PillowWriter(fps=FRAMES_PER_SECOND))


def _pen(axes: Axes, points: Floats, heights: Floats) -> Callable[[int], list[Any]]:
    """What draws the path up to a step."""
    (line,) = axes.plot(
        [], [], color=VERMILION, linewidth=1.4, marker="o", markersize=2.5
    )
    (head,) = axes.plot(
        [], [], color=VERMILION, marker="o", markersize=8, markeredgecolor="white"
    )
    title = axes.set_title(" ", loc="left", fontsize=TITLE, color=INK)

    def draw(step: int) -> list[Any]:
        line.set_data(*points[: step + 1].T)
        head.set_data(*points[step : step + 1].T)
        title.set_text(f"step {step} · loss {heights[step]:.4g}")
        return [line, head, title]

    return draw


def main(arguments: list[str]) -> int:
    """Train what a config describes, by default the parabola, with `key=value` overrides."""
    overrides = [argument for argument in arguments if "=" in argument]
    config_files = [Path(argument) for argument in arguments if "=" not in argument]
    config_file = config_files[0] if config_files else PARABOLA
    try:
        config = load(config_file, overrides)
        walk = Walk()
        trainer = Trainer(config, observers=[walk])
        trainer.fit()
        if trainer.ranks.is_main:
            gif = Path(config.run.dir) / config.run.name / "figures" / "descent.gif"
            animate(trainer, walk, gif)
            print(f"drawn    {gif}")
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
