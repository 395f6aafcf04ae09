"""What a prediction rests on: Grad-CAM, or the input's gradient where a model has no feature maps for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.components.task import Task
from trainer.exact.modes import preserved_modes
from trainer.exact.seeding import key, keyed_draws


def compute_saliency(task: Task, model: nn.Module, images: Tensor) -> Tensor | None:
    """A map `(N, H, W)` on the CPU for each image of `(N, C, H, W)`, in [0, 1] with a maximum of 1.

    The map is Grad-CAM (Selvaraju et al., 2017) of the predicted class's output, on the last convolution whose output
    has more than one pixel. The first convolution does not count: it may only cut the image into patches. Where there
    is no other, or where Grad-CAM is 0 everywhere, the map is the largest absolute gradient over the image's channels
    (Simonyan et al., 2014).

    None for a model that is not a classifier, and where no gradient reaches the input. The model stays as it is: no
    gradient is kept, no statistic or mode changed, no hook left.
    """
    try:
        # A compiled model would skip the hooks, and compile again for inputs that need a gradient.
        with (
            preserved_modes(model),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            # Of a model that draws in evaluation mode: the same maps each time.
            keyed_draws(key(0, "saliency"), images.device),
            _record_feature_maps(model) as features,
        ):
            model.eval()
            inputs = images.detach().clone().requires_grad_()
            score = _score_of_predictions(task, model, inputs)
            if score is None:
                return None
            last_features = features[1:][-1:]
            input_gradient, *feature_gradients = torch.autograd.grad(
                score, [inputs, *last_features]
            )
    except RuntimeError:
        # No gradient reaches the input, or an operation has no (deterministic) backward.
        return None

    size = images.shape[-2:]
    maps = _scale(input_gradient.abs().amax(1), size)
    for activation, gradient in zip(last_features, feature_gradients, strict=True):
        channel_weights = gradient.mean((2, 3), keepdim=True)
        weighted = channel_weights * activation.detach()
        cam = _scale(weighted.sum(1).relu(), size)
        # A map of zeros says that no feature map speaks for the class.
        speaks = cam.amax((1, 2), keepdim=True) > 0
        maps = torch.where(speaks, cam, maps)
    return maps


def _score_of_predictions(
    task: Task, model: nn.Module, inputs: Tensor
) -> Tensor | None:
    """The sum of the predicted classes' outputs; None for a model that is not a classifier."""
    output = task.predict(model, inputs)
    probabilities = task.probabilities(output)
    if probabilities is None or not isinstance(output, Tensor):
        return None
    if output.shape != probabilities.shape:
        return None
    # Samples do not influence each other in evaluation mode, so the gradient of the sum has that of each.
    return output.gather(1, probabilities.argmax(1, keepdim=True)).sum()


@contextmanager
def _record_feature_maps(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of all convolutions that run in the body, in order, except those of a single pixel."""
    outputs: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        if (
            isinstance(output, Tensor)
            and output.dim() == 4
            and output.shape[2:].numel() > 1
        ):
            outputs.append(output)

    hooks = [
        layer.register_forward_hook(record)
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _scale(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps `(N, h, w)` resized to the images' `size`, each divided by its maximum; on the CPU."""
    resized = F.interpolate(
        maps.cpu().float().unsqueeze(1),
        tuple(size),
        mode="bilinear",
        align_corners=False,
    )
    resized = resized.squeeze(1)
    return resized / resized.amax((1, 2), keepdim=True).clamp(min=1e-30)
