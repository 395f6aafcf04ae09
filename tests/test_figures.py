"""Figures: they show exactly their input, their files are complete, and no global state changes."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from torch import Tensor

from trainer.components.schedule import build_schedule
from trainer.config.model_sections import ScheduleConfig
from trainer.reporting.figures.confusion import draw_confusion_matrix
from trainer.reporting.figures.curves import draw_curves
from trainer.reporting.figures.drawing import rates_by_step
from trainer.reporting.figures.images import (
    PredictionGroup,
    draw_batch_grid,
    draw_predictions,
    draw_saliency,
)
from trainer.reporting.figures.overlays import on_one_size, with_boxes, with_classes
from trainer.reporting.figures.style import DPI


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test writes, in order."""
    written: list[Figure] = []
    save = Figure.savefig

    def save_and_record(figure: Figure, path: Path, **options: Any) -> None:
        save(figure, path, **options)
        written.append(figure)

    monkeypatch.setattr(Figure, "savefig", save_and_record)
    return written


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def panels(figure: Figure) -> dict[str, dict[str, Any]]:
    """The lines of each panel by their labels, the panels by their titles."""
    lines_by_title = {}
    for axes in figure.axes:
        lines_by_title[axes.get_title(loc="left")] = {
            str(line.get_label()): line for line in axes.lines
        }
    return lines_by_title


def random_images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_curves_show_every_row_in_its_panel(
    figures: list[Figure], tmp_path: Path
) -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "epoch": 1, "train/loss": 3.0, "lr": 0.1, "train/accuracy": 0.1},
        {
            "step": 2,
            "epoch": 1,
            "train/loss": math.nan,
            "lr": 0.1,
            "train/accuracy": 0.2,
        },
        {
            "step": 2,
            "epoch": 1,
            "train/epoch_loss": 2.5,
            "val/loss": 2.6,
            "val/accuracy": 0.3,
            "val/mae": 7.0,
        },
        {
            "step": 3,
            "epoch": 2,
            "train/loss": 2.0,
            "lr": 0.05,
            "samples_per_second": 1e6,
        },
        {"step": 4, "epoch": 2, "train/loss": 1.0, "lr": 0.05},
        {"step": 4, "epoch": 2, "train/epoch_loss": 1.5, "val/loss": math.inf},
    ]
    draw_curves(rows, tmp_path / "curves.png")
    lines = panels(figures[0])
    assert list(lines) == ["loss", "accuracy", "mae", "learning rate"]
    assert list(lines["loss"]) == ["train", "train, epoch", "val"]
    train = lines["loss"]["train"]
    np.testing.assert_array_equal(train.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(train.get_ydata(), [3, math.nan, 2, 1])
    # A single point beside a gap is visible only as a mark.
    assert list(train.get_markevery()) == [0]
    np.testing.assert_array_equal(lines["loss"]["train, epoch"].get_ydata(), [2.5, 1.5])
    np.testing.assert_array_equal(lines["loss"]["val"].get_ydata(), [2.6, math.nan])
    np.testing.assert_array_equal(lines["accuracy"]["val"].get_xdata(), [2])
    (rate,) = lines["learning rate"].values()
    np.testing.assert_array_equal(rate.get_ydata(), [0.1, 0.1, 0.05, 0.05])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 5, "epoch": 1, "train/loss": 2.0, "lr": 0.1}],
        [
            {
                "step": 5,
                "epoch": 1,
                "train/loss": math.nan,
                "val/$x_{$": -math.inf,
                "lr": 0.0,
            }
        ],
        [
            {"step": 10**6 * i, "epoch": i, "train/loss": 1e9 * i, "lr": 1e-6 * i}
            for i in range(9)
        ],
    ],
)
def test_curves_of_next_to_nothing(
    rows: list[dict[str, float]], tmp_path: Path
) -> None:
    draw_curves(rows, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[1] == 7.5 * DPI


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 3), (64, 8), (70, 8)])
def test_batch_grid_shows_each_pixel_in_its_place(
    figures: list[Figure], tmp_path: Path, count: int, columns: int
) -> None:
    images = random_images(count, 1, 8, 8).round()
    labels = [f"${i}_$" for i in range(count)]
    draw_batch_grid(images, labels, tmp_path / "batch.png")
    axes = figures[0].axes[0]
    assert texts(figures[0]) == labels[:64]
    assert len(axes.images) == min(count, 64)
    assert len({image.get_extent()[0] for image in axes.images}) == columns
    pixels = imread(tmp_path / "batch.png")[..., :3]
    for picture, label, image in zip(axes.images, axes.texts, images, strict=False):
        left, right, bottom, top = DPI * np.array(picture.get_extent())
        x, y = DPI * np.array(label.get_position())
        assert x == pytest.approx((left + right) / 2)
        assert y < top
        inside = pixels[
            round(top) + 1 : round(bottom) - 1, round(left) + 1 : round(right) - 1
        ]
        # No pixel is blended with its neighbour.
        assert set(inside.ravel()) <= {0.0, 1.0}
        centres = (np.arange(8) + 0.5) / 8
        ys = (top + centres * (bottom - top)).astype(int)
        xs = (left + centres * (right - left)).astype(int)
        np.testing.assert_array_equal(pixels[np.ix_(ys, xs)][..., 0], image[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_colour_grey_and_other_channels(
    figures: list[Figure], tmp_path: Path, dtype: torch.dtype
) -> None:
    for channels, expected_shape in (
        (3, (5, 7, 3)),
        (1, (5, 7)),
        (2, (5, 7)),
        (5, (5, 7)),
    ):
        images = random_images(2, channels, 5, 7).to(dtype)
        images[0, 0, 0, 0] = math.nan
        images[0, 0, 0, 1] = 1.5
        draw_batch_grid(images, ["a", "b"], tmp_path / "batch.png")
        picture = np.asarray(figures[-1].axes[0].images[1].get_array())
        image = images[1].double()
        np.testing.assert_array_equal(
            picture, image.permute(1, 2, 0) if channels == 3 else image[0]
        )
        assert picture.shape == expected_shape


def test_large_and_oblong_images_keep_their_shape(
    figures: list[Figure], tmp_path: Path
) -> None:
    draw_batch_grid(random_images(3, 3, 224, 112), ["a"] * 3, tmp_path / "tall.png")
    draw_predictions(
        [group_of(random_images(2, 3, 50, 400), "aa", "aa", [0, 1])],
        tmp_path / "wide.png",
    )
    for figure, ratio in zip(figures, (0.5, 8.0), strict=True):
        left, right, bottom, top = figure.axes[0].images[0].get_extent()
        assert (right - left) / (bottom - top) == pytest.approx(ratio)
        box = figure.axes[0].get_window_extent()
        x0, x1 = figure.axes[0].get_xlim()
        y0, y1 = figure.axes[0].get_ylim()
        assert box.width / (x1 - x0) == pytest.approx(box.height / (y0 - y1))


def group_of(
    images: Tensor,
    predicted: Sequence[str],
    true: Sequence[str],
    confidence: Sequence[float],
) -> PredictionGroup:
    return PredictionGroup("", images, predicted, confidence, true)


def test_right_and_wrong_predictions_differ_in_colour(
    figures: list[Figure], tmp_path: Path
) -> None:
    predicted = ["cat", "d$g_$", "x" * 99]
    true = ["cat", "cat", "x" * 99]
    group = group_of(random_images(3, 3, 8, 8), predicted, true, [0.987, 0.5, 1.0])
    draw_predictions([group], tmp_path / "p.png")
    first, second, third = figures[0].axes[0].texts
    assert first.get_text() == "cat · 99 %\ntrue: cat"
    assert second.get_text() == "d$g_$ · 50 %\ntrue: cat"
    assert (
        third.get_text().startswith("xxxx")
        and "x…xxxxxx · 100 %\ntrue: xxxx" in third.get_text()
    )
    assert first.get_color() == third.get_color() != second.get_color()
    assert third.get_window_extent().width <= (1.8 + 0.12) * DPI


def test_groups_stand_apart_and_nothing_overlaps(
    figures: list[Figure], tmp_path: Path
) -> None:
    names = ["n" * 60] * 6
    wrong = PredictionGroup("Wrong", random_images(6, 1, 8, 8), names, [0.5] * 6, names)
    right = PredictionGroup(
        "Right: " + "r" * 60, random_images(1, 1, 16, 8), names[:1], [0.5], names[:1]
    )
    draw_predictions([wrong, right], tmp_path / "p.png")
    axes = figures[0].axes[0]
    boxes = [artist.get_window_extent() for artist in (*axes.texts, *axes.images)]
    assert len(boxes) == 7 + 7 + 2
    for box, other in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.98, 0.9).overlaps(other)
    whole = figures[0].bbox
    for box in boxes:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1


def test_a_map_lies_over_its_own_image(figures: list[Figure], tmp_path: Path) -> None:
    images = random_images(2, 3, 10, 10)
    maps = torch.zeros(2, 10, 10)
    maps[1, 2, 3] = 1
    draw_saliency(group_of(images, "ab", "ab", [1, 1]), maps, tmp_path / "s.png")
    for image, picture, heat in zip(
        images, figures[0].axes[0].images, maps, strict=True
    ):
        pair = np.asarray(picture.get_array())
        np.testing.assert_array_equal(pair[:, :10], image.double().permute(1, 2, 0))
        coloured = np.ptp(pair[:, 11:], axis=-1) > 1e-6
        np.testing.assert_array_equal(coloured, heat > 0)


def test_confusion_matrix_rows_are_true_classes(
    figures: list[Figure], tmp_path: Path
) -> None:
    matrix = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    draw_confusion_matrix(matrix, ["a", "$b_$", "c"], tmp_path / "c.png")
    axes = figures[0].axes[0]
    assert len({text.get_position() for text in axes.texts}) == len(axes.texts) == 9
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == str(matrix[row, column])
    shares = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "$b_$", "c"]
    assert axes.get_title(loc="left") == "15 samples · accuracy 0.8667"


@pytest.mark.parametrize(
    ("size", "numbers", "names"),
    [(2, 4, 2), (20, 400, 20), (21, 0, 21), (1000, 0, None)],
)
def test_confusion_matrix_of_any_size(
    figures: list[Figure], tmp_path: Path, size: int, numbers: int, names: int | None
) -> None:
    matrix = 123_456 * np.eye(size, dtype=np.int64)
    draw_confusion_matrix(
        matrix, [f"class number {i}" for i in range(size)], tmp_path / "c.png"
    )
    axes = figures[0].axes[0]
    assert len(axes.texts) == numbers
    assert names is None or len(axes.get_xticks()) == names
    cell = axes.get_window_extent().width / size
    assert cell >= 1  # every class has a pixel
    assert all(text.get_window_extent().width <= cell for text in axes.texts[:1])
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()[:2]]
    assert boxes[0].x1 <= boxes[1].x0


def test_numbers_stand_out_from_their_cells(
    figures: list[Figure], tmp_path: Path
) -> None:
    for share in (1, 10, 29, 31, 60, 100):
        matrix = np.array([[share, 100 - share], [0, 1]])
        draw_confusion_matrix(matrix, ["a", "b"], tmp_path / "c.png")
        axes = figures[-1].axes[0]
        image, text = axes.images[0], axes.texts[0]
        cell = np.array(image.cmap(image.norm(share / 100))[:3])
        assert (
            abs(luminance(cell) - luminance(np.array(to_rgb(text.get_color())))) > 0.25
        )


def luminance(colour: np.ndarray[Any, Any]) -> float:
    """Perceived lightness in [0, 1], near enough: the square root of the linear luminance."""
    return float(np.sqrt((0.2126, 0.7152, 0.0722) @ colour**2.2))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curves.png"
    draw_curves([], path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    before = path.read_bytes()

    def fail(self: Figure, target: Path, **_: Any) -> None:
        target.write_bytes(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves([], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.filterwarnings("error")
def test_class_names_in_other_scripts_are_drawn_in_a_font_that_has_them(
    figures: list[Figure], tmp_path: Path
) -> None:
    """U+1D81 is in a font that comes with Matplotlib, and no font need be there that has the second."""
    names = ["Löwe", "\u1d81", "猫"]
    draw_confusion_matrix(np.eye(3, dtype=np.int64), names, tmp_path / "c.png")
    labels = [text for text in figures[0].findobj(Text) if text.get_text() == "\u1d81"]
    assert labels
    assert all("STIXGeneral" in text.get_fontfamily() for text in labels)
    draw_confusion_matrix(np.eye(1, dtype=np.int64), ["a"], tmp_path / "d.png")
    assert all(
        "STIXGeneral" not in text.get_fontfamily() for text in figures[1].findobj(Text)
    )


def test_no_global_state(tmp_path: Path) -> None:
    settings, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    draw_curves([{"step": 1, "epoch": 1, "train/loss": 1.0}], tmp_path / "a.png")
    draw_batch_grid(random_images(2, 1, 8, 8), ["a", "b"], tmp_path / "b.png")
    draw_confusion_matrix(np.eye(2, dtype=np.int64), ["a", "b"], tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_losses_of_many_sizes_have_a_logarithmic_axis(
    figures: list[Figure], tmp_path: Path
) -> None:
    def rows(*losses: float) -> list[dict[str, float]]:
        values = enumerate(losses, start=1)
        return [{"step": i, "train/loss": v, "train/mae": v} for i, v in values]

    scales = []
    for losses in ((8.0, 1.0, 0.1), (2.0, 1.5, 1.0), (1.0, 0.1, -0.5)):
        draw_curves(rows(*losses), tmp_path / "c.png")
        loss, mae, _ = figures[-1].axes
        scales.append(loss.get_yscale())
        assert mae.get_yscale() == "linear"
    assert scales == ["log", "linear", "linear"]


def test_an_epochs_mean_stands_in_its_middle_and_its_evaluation_at_its_end(
    figures: list[Figure], tmp_path: Path
) -> None:
    rows: list[dict[str, float]] = [
        {"step": 10 * epoch, "train/epoch_loss": 1.0, "val/loss": 2.0}
        for epoch in (1, 2, 3)
    ]
    draw_curves(rows, tmp_path / "c.png")
    lines = panels(figures[0])["loss"]
    np.testing.assert_array_equal(lines["train, epoch"].get_xdata(), [5, 15, 25])
    np.testing.assert_array_equal(lines["val"].get_xdata(), [10, 20, 30])


def test_the_schedule_is_drawn_step_by_step_where_the_rows_follow_it(
    figures: list[Figure], tmp_path: Path
) -> None:
    schedule = build_schedule(
        ScheduleConfig(name="step", args={"step_size": 2, "gamma": 0.5}),
        total_steps=12,
        steps_per_epoch=3,
        history=[],
        mode="min",
    )
    rows: list[dict[str, float]] = [{"step": 5, "lr": 0.1}, {"step": 10, "lr": 0.05}]
    rates = rates_by_step(rows, schedule)
    assert rates == [(step, 0.1 if step <= 6 else 0.05) for step in range(1, 11)]
    draw_curves(rows, tmp_path / "c.png", rates=rates)
    (line,) = panels(figures[0])["learning rate"].values()
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_ydata()) == [rate for _, rate in rates]
    # After a resume with another rate.
    assert rates_by_step([*rows, {"step": 12, "lr": 0.3}], schedule) is None


def test_boxes_and_classes_are_drawn_where_they_are() -> None:
    image = torch.zeros(1, 40, 80)
    picture = with_boxes(image, [(torch.tensor([[10.0, 5, 30, 25]]), "#FF0000")])
    assert picture.shape == (3, 80, 160)
    rows, columns = (picture[0] == 1).any(1), (picture[0] == 1).any(0)
    assert rows.nonzero().flatten()[[0, -1]].tolist() == [10, 49]
    assert columns.nonzero().flatten()[[0, -1]].tolist() == [20, 59]
    classes = torch.zeros(40, 80, dtype=torch.long)
    classes[3:5, 7] = 2
    drawn = with_classes(image, classes, shows_first=False)
    assert torch.equal(drawn.sum(0) > 0, classes > 0)
    assert (with_classes(image, classes, shows_first=True).sum(0) > 0).all()
    several = on_one_size([drawn, torch.zeros(3, 10, 90)])
    assert several.shape == (2, 3, 40, 90)
    assert (several[1, :, 10:] == 1).all() and (several[0, :, :, 80:] == 1).all()
