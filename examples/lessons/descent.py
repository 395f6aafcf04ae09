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

from trainer import Trainer, load
from trainer.config.load import command_line
from trainer.exact.plan import Step
from trainer.process.exit import exit_process, report_error
from trainer.reporting.figures.style import BLUE, DPI, FAINT, GREY, INK, SMALL, TITLE, VERMILION
from trainer.storage.run_directory import run_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARABOLA = Path("configs/lessons/parabola.yaml")
FRAMES_PER_SECOND, HELD = 8, 16  # frames that the last picture stays
CELLS = 61  # points along a side of the surface

Floats = npt.NDArray[np.float64]


class Walk(Trainer):
    """A trainer that remembers its weights after each step."""

    def fit(self) -> dict[str, Any]:
        self.path = [self._weights()]
        return super().fit()

    def train_step(self, step: Step) -> None:
        super().train_step(step)
        self.path.append(self._weights())

    def _weights(self) -> Tensor:
        return parameters_to_vector(self.module.parameters()).detach().cpu().double()


def losses(trainer: Trainer, weights: Tensor) -> Floats:
    """The mean loss over the training samples at each of some weights `(n, parameters)`; the model's are put back."""
    parameters = list(trainer.module.parameters())
    kept = parameters_to_vector(parameters).detach().clone()
    batch = trainer.run.train_loader.peek(range(len(trainer.run.data.train)))
    found = []
    trainer.module.eval()
    with torch.no_grad():
        for row in weights.to(kept):
            vector_to_parameters(row, parameters)
            _, loss = trainer.run.forward(trainer.module, batch, None)
            found.append(float(loss.total / loss.weight))
        vector_to_parameters(kept, parameters)
    return np.array(found)


def over_a_curve(axes: Axes, trainer: Trainer, path: Tensor) -> Floats:
    """Draw the loss of one parameter; the path's points, `(steps + 1, 2)`."""
    reach = 1.25 * path.abs().max().clamp(min=1e-3)
    places = torch.linspace(float(-reach), float(reach), 201, dtype=torch.float64)
    axes.plot(places.numpy(), losses(trainer, places.unsqueeze(1)), color=BLUE, linewidth=1.6)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_xlabel("parameter", fontsize=SMALL, color=INK)
    axes.set_ylabel("loss", fontsize=SMALL, color=INK)
    return np.column_stack([path[:, 0].numpy(), losses(trainer, path)])


def over_a_surface(axes: Axes, trainer: Trainer, path: Tensor) -> Floats:
    """Draw the loss around the path, in the plane where most of it lies; the path's points, `(steps + 1, 2)`."""
    from matplotlib.colors import LogNorm

    end = path[-1]
    directions = torch.linalg.svd(path - end, full_matrices=False).Vh[:2]
    points = (path - end) @ directions.T
    low, high = points.amin(0), points.amax(0)
    margin = 0.25 * (high - low).max().clamp(min=1e-6)
    across, up = (torch.linspace(float(a - margin), float(b + margin), CELLS) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(up, across).flip(1).double()
    surface = losses(trainer, end + grid @ directions).reshape(CELLS, CELLS)
    highest = max(float(surface.max()), 1e-30)
    levels = np.geomspace(max(float(surface.min()), 1e-6 * highest), 1.001 * highest, 25)  # a loss may be 0
    drawn = axes.contourf(across, up, surface, levels=levels, norm=LogNorm(), cmap="Blues", extend="min")
    bar = axes.figure.colorbar(drawn, ax=axes, ticks=levels[::6], format="%.2g", shrink=0.85, extendrect=True)
    bar.minorticks_off()
    bar.set_label("mean loss of the training samples", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=GREY, labelcolor=INK)
    axes.set_xlabel("first principal direction of the path", fontsize=SMALL, color=INK)
    axes.set_ylabel("second", fontsize=SMALL, color=INK)
    drawn_points: Floats = points.numpy()
    return drawn_points


def animate(trainer: Walk, to: Path) -> None:
    """Write the GIF: a frame for the start and for each step."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = torch.stack(trainer.path)
    figure = Figure(figsize=(5.6, 4.2), dpi=0.75 * DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    points = (over_a_curve if path.shape[1] == 1 else over_a_surface)(axes, trainer, path)
    draw = _pen(axes, points, losses(trainer, path))
    draw(0)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once
    frames = [*range(len(points)), *[len(points) - 1] * HELD]
    animation = FuncAnimation(figure, draw, frames=frames)
    to.parent.mkdir(parents=True, exist_ok=True)
    animation.save(to, writer=PillowWriter(fps=FRAMES_PER_SECOND))


def _pen(axes: Axes, points: Floats, heights: Floats) -> Callable[[int], list[Any]]:
    """What draws the path up to a step."""
    (line,) = axes.plot([], [], color=VERMILION, linewidth=1.4, marker="o", markersize=2.5)
    (head,) = axes.plot([], [], color=VERMILION, marker="o", markersize=8, markeredgecolor="white")
    title = axes.set_title(" ", loc="left", fontsize=TITLE, color=INK)

    def draw(step: int) -> list[Any]:
        line.set_data(*points[: step + 1].T)
        head.set_data(*points[step : step + 1].T)
        title.set_text(f"step {step} · loss {heights[step]:.4g}")
        return [line, head, title]

    return draw


def main(arguments: list[str]) -> int:
    try:
        path, overrides = command_line(arguments)
        named = any("=" not in argument for argument in arguments)
        config = load(path if named else PARABOLA, overrides)
        trainer = Walk(config)
        trainer.fit()
        if trainer.ranks.is_main:
            gif = run_path(config.run) / "figures" / "descent.gif"
            animate(trainer, gif)
            print(f"drawn    {gif}")
        trainer.ranks.close()
    except Exception as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
