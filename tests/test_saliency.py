"""Saliency maps: equal to their definition computed by hand, for any model, which they leave unchanged."""

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
from trainer.storage.sha256 import tensors_sha256

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
    cam = torch.relu(
        (features.grad.mean((2, 3), keepdim=True) * features).sum(1)
    ).detach()
    expected = F.interpolate(cam[:, None], (5, 5), mode="bilinear")[:, 0]
    assert maps is not None and (cam.amax((1, 2)) > 0).all()
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True))


@pytest.mark.parametrize(
    "model", [conv_net().eval(), nn.Sequential(nn.Flatten(), nn.Linear(50, CLASSES))]
)
def test_input_gradient_where_there_is_no_stack_of_feature_maps(
    model: nn.Module,
) -> None:
    maps = compute_saliency(CrossEntropy(), model, IMAGES)
    inputs = IMAGES.clone().requires_grad_()
    model(inputs).amax(1).sum().backward()
    assert inputs.grad is not None and maps is not None
    expected = inputs.grad.abs().amax(1)
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True))


def test_it_leaves_no_trace_and_works_on_frozen_models() -> None:
    model = nn.Sequential(
        two_convolutions()[:3],
        nn.BatchNorm2d(6),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    )
    model[1].eval().requires_grad_(False)
    before = tensors_sha256(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    first = compute_saliency(CrossEntropy(), model, IMAGES)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    second = compute_saliency(CrossEntropy(), model, IMAGES)
    assert first is not None and second is not None and torch.equal(first, second)
    assert tensors_sha256(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    for module in model.modules():
        assert not module._forward_hooks
    assert [module.training for module in model.modules()] == modes


class Detached(nn.Module):
    """Its output has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)[:, :CLASSES]


def test_there_is_no_map_where_none_can_be_computed() -> None:
    assert compute_saliency(CrossEntropy(), Detached(), IMAGES) is None
    assert compute_saliency(Regression(F.mse_loss), two_convolutions(), IMAGES) is None
    # A map of classes.
    assert compute_saliency(CrossEntropy(), two_convolutions()[:3], IMAGES) is None


def train(
    directory: Path, name: str, figures: bool, reproducibility: str
) -> tuple[list[str], list[str]]:
    """The digests of a run's final state, and the names of its figures."""
    settings = config(
        directory,
        run__name=name,
        run__figures=figures,
        run__reproducibility=reproducibility,
        batch__micro_size=7,
    )
    trainer = Trainer(
        settings, model=conv_net(), train_data=Images(), val_data=Images(40)
    )
    summary = trainer.fit()
    model_sha256 = tensors_sha256(trainer.module.state_dict())
    digests = [model_sha256, summary["weights_sha256"], summary["buffers_sha256"]]
    return digests, sorted(
        path.stem for path in (directory / name).glob("figures/*.png")
    )


@pytest.mark.parametrize(
    ("ranks", "reproducibility"), [(1, "standard"), (2, "bitwise")]
)
def test_figures_change_nothing_of_a_run(
    tmp_path: Path, ranks: int, reproducibility: str
) -> None:
    digests_without, no_names = on_ranks(
        ranks, train, tmp_path, "without", False, reproducibility
    )[0]
    digests, names = on_ranks(ranks, train, tmp_path, "with", True, reproducibility)[0]
    assert digests == digests_without
    assert no_names == []
    assert names == ["batch", "confusion_matrix", "curves", "predictions", "saliency"]


def test_points_have_no_pictures_and_ignored_targets_no_place_in_the_matrix(
    tmp_path: Path,
) -> None:
    def run() -> list[str]:
        settings = config(tmp_path, run__figures=True, loss__ignore_index=-1)
        Trainer(settings, model=mlp(), train_data=Points(), val_data=Points()).fit()
        return sorted(path.stem for path in tmp_path.glob("run/figures/*.png"))

    assert on_ranks(1, run)[0] == ["confusion_matrix", "curves"]
