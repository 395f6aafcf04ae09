"""Small models of our own, to begin with and to test with: one for each kind of task."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def conv_block(
    inputs: int,
    outputs: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: type[nn.Module] = nn.ReLU,
) -> list[nn.Module]:
    """A 3 × 3 convolution that keeps the image's size (but for `stride`), BatchNorm and the activation."""
    convolution = nn.Conv2d(
        inputs,
        outputs,
        3,
        stride,
        padding=dilation,
        dilation=dilation,
        bias=False,
    )
    return [convolution, nn.BatchNorm2d(outputs), activation()]


def small_segmenter(
    num_classes: int, in_channels: int = 3, width: int = 16
) -> nn.Sequential:
    """A convolutional net that keeps the image's size, `(N, in_channels, H, W)` → `(N, num_classes, H, W)`."""
    layers: list[nn.Module] = conv_block(in_channels, width)
    for dilation in (2, 4, 8):
        layers += conv_block(width, width, dilation=dilation)
    return nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))


def small_detector(
    num_classes: int, in_channels: int = 3, width: int = 32, image_size: int = 64
) -> nn.Module:
    """torchvision's Faster R-CNN (Ren et al., 2015) on a backbone of four convolutions, for small images.

    Images of any size, resized so that the shorter side has `image_size` pixels. `num_classes` counts the background.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    backbone: Any = _Backbone(in_channels, width)
    return FasterRCNN(  # type: ignore[no-any-return]
        backbone,
        min_size=image_size,
        max_size=4 * image_size,
        image_mean=[0.5] * in_channels,
        image_std=[0.25] * in_channels,
        rpn_anchor_generator=AnchorGenerator(((12, 20, 28),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        box_head=_BoxHead(backbone.out_channels * 25, 4 * width),
        box_predictor=_BoxPredictor(4 * width, num_classes),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=30,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=32,
        box_detections_per_img=20,
    )


class _Backbone(nn.Sequential):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            *conv_block(in_channels, width),
            *conv_block(width, width, stride=2),
            *conv_block(width, 2 * width, stride=2),
            *conv_block(2 * width, 2 * width),
        )
        self.out_channels = 2 * width


class _BoxHead(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inputs, outputs), nn.ReLU())


class _BoxPredictor(nn.Module):
    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(inputs, num_classes)
        self.bbox_pred = nn.Linear(inputs, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)
