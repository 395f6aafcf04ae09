"""Maps of what a prediction rests on: against their definition by hand, for any model, and without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import CLASSES, Images, Points, config, conv_net, mlp
from trainer import Trainer
from trainer.components.task import CrossEntropy, Regression
from trainer.reporting.figures.saliency_maps import compute_saliency
from trainer.storage.files import tensors_sha256

IMAGES = Images(3).points.float()


def two_convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(54, CLASSES),
    )  # fmt: skip


def test_grad_cam_of_the_last_convolution() -> None:
    model = two_convolutions()
    maps = compute_saliency(CrossEntropy(), model, IMAGES)
    features = model[:4](IMAGES).detach().requires_grad_()
    output = model[4:](features)
    output.amax(1).sum().backward()
    assert features.grad is not None
    cam = torch.relu((features.grad.mean((2, 3), keepdim=True) * features).sum(1)).detach()
    expected = F.interpolate(cam[:, None], (5, 5), mode="bilinear")[:, 0]
    assert maps is not None and (cam.amax((1, 2)) > 0).all()
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True))


@pytest.mark.parametrize("model", [conv_net().eval(), nn.Sequential(nn.Flatten(), nn.Linear(50, CLASSES))])
def test_input_gradient_where_there_is_no_stack_of_feature_maps(model: nn.Module) -> None:
    maps = compute_saliency(CrossEntropy(), model, IMAGES)
    inputs = IMAGES.clone().requires_grad_()
    model(inputs).amax(1).sum().backward()
    assert inputs.grad is not None and maps is not None
    expected = inputs.grad.abs().amax(1)
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True))


def test_it_leaves_no_trace_and_works_on_frozen_models() -> None:
    model = nn.Sequential(two_convolutions()[:3], nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(54, CLASSES))
    model[1].eval().requires_grad_(False)
    before, modes = tensors_sha256(model.state_dict()), [m.training for m in model.modules() if m is not model[1]]
    drawn = torch.get_rng_state()
    first = compute_saliency(CrossEntropy(), model, IMAGES)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    second = compute_saliency(CrossEntropy(), model, IMAGES)
    assert first is not None and second is not None and torch.equal(first, second)
    assert tensors_sha256(model.state_dict()) == before and torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for m in model.modules() if m is not model[1]] == modes
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


class Hidden(nn.Module):
    """Answers from which no gradient comes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)[:, :CLASSES]


def test_left_out_where_it_cannot_be_done() -> None:
    assert compute_saliency(CrossEntropy(), Hidden(), IMAGES) is None
    assert compute_saliency(Regression(F.mse_loss), two_convolutions(), IMAGES) is None
    assert compute_saliency(CrossEntropy(), two_convolutions()[:3], IMAGES) is None  # a map of classes


def drawn(directory: Path, name: str, wanted: bool, reproducibility: str) -> tuple[object, ...]:
    settings = config(
        directory, run__name=name, run__figures=wanted, run__reproducibility=reproducibility, batch__micro_size=7
    )
    trainer = Trainer(settings, model=conv_net(), train_data=Images(), val_data=Images(40))
    summary = trainer.fit()
    held = tensors_sha256(trainer.module.state_dict())
    figures = sorted(path.stem for path in (directory / name).glob("figures/*.png"))
    return held, summary["weights_sha256"], summary["buffers_sha256"], figures


@pytest.mark.parametrize(("ranks", "reproducibility"), [(1, "standard"), (2, "bitwise")])
def test_figures_change_nothing_of_a_run(tmp_path: Path, ranks: int, reproducibility: str) -> None:
    *without, none = on_ranks(ranks, drawn, tmp_path, "without", False, reproducibility)[0]
    *with_them, names = on_ranks(ranks, drawn, tmp_path, "with", True, reproducibility)[0]
    assert with_them == without
    assert (none, names) == ([], ["batch", "confusion_matrix", "curves", "predictions", "saliency"])


def test_points_have_no_pictures_and_ignored_targets_no_place_in_the_matrix(tmp_path: Path) -> None:
    def run() -> list[str]:
        settings = config(tmp_path, run__figures=True, loss__ignore_index=-1)
        Trainer(settings, model=mlp(), train_data=Points(), val_data=Points()).fit()
        return sorted(path.stem for path in tmp_path.glob("run/figures/*.png"))

    assert on_ranks(1, run)[0] == ["confusion_matrix", "curves"]
