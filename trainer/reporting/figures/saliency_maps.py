"""What a prediction rests on: Grad-CAM, and the gradient of the input where a model has no feature maps for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.components.task import Task


def saliency(task: Task, model: nn.Module, images: Tensor) -> Tensor | None:
    """A map `(N, H, W)` in [0, 1] for each of `images` `(N, C, H, W)`, as the model sees them; the largest value is 1.

    Grad-CAM (Selvaraju et al., 2017) on the last convolution with more than one place in its output. Where there is
    none, or only one, which may but cut the image in patches, or where nothing there speaks for the class: the
    largest gradient over the image's channels (Simonyan et al., 2014). Both are of the predicted class's output.

    None where it cannot be done: for what is no classifier, and where no gradient comes through. Nothing of the
    model changes: no gradient is kept, no statistic updated, no hook left.
    """
    training = model.training
    model.eval()
    try:
        # A compiled model would not see the hooks, and compile anew for inputs with a gradient.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), _feature_maps(model) as features:
            inputs = images.detach().clone().requires_grad_()
            output = task.predict(model, inputs)
            shares = task.probabilities(output)
            if shares is None or not isinstance(output, Tensor) or output.shape != shares.shape:
                return None
            score = output.gather(1, shares.argmax(1, keepdim=True)).sum()
            seen = [inputs, *features[1:][-1:]]
            pixels, *places = torch.autograd.grad(score, seen)
    except RuntimeError:  # no gradient reaches the input, or an operation has none (none that is deterministic)
        return None
    finally:
        model.train(training)
    maps = _scaled(pixels.abs().amax(1), images.shape[-2:])
    for gradient in places:
        cam = _scaled((gradient.mean((2, 3), keepdim=True) * seen[-1].detach()).sum(1).relu(), images.shape[-2:])
        maps = torch.where(cam.amax((1, 2), keepdim=True) > 0, cam, maps)
    return maps


@contextmanager
def _feature_maps(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of the convolutions that run in the body, in order, those with one place left out."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            found.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _scaled(maps: Tensor, size: torch.Size) -> Tensor:
    """The maps `(N, h, w)` at the images' size, each divided by its largest value; on the CPU."""
    maps = F.interpolate(maps.cpu().float().unsqueeze(1), tuple(size), mode="bilinear", align_corners=False).squeeze(1)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)
