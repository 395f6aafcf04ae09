"""Whether a loss is not finite because of norm layers' running statistics, and what to say of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainer.exact.batch_norm import is_held
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.moving_buffers import preserved_buffers


def is_finite_without_them(whole: ModelAndLoss, loss: Callable[[], Tensor]) -> bool:
    """True if a batch's `loss` in eval mode becomes finite once norm layers take the batch's own statistics.

    That is how the layers work in training. Statistics and modes are put back.
    """
    layers = [layer for _, layer in whole.named_norm_layers() if not is_held(layer)]
    if not layers:
        return False
    with preserved_buffers(whole, norms=True):
        for layer in layers:
            layer.training = True
        try:
            return bool(loss().isfinite())
        except ValueError:
            # torch's, of a batch that has one value for each channel.
            return False
        finally:
            for layer in layers:
                layer.training = False


def describe(whole: ModelAndLoss) -> str:
    """The reason and the remedy, naming the layer whose statistics move slowest."""
    slowest, name = min(
        (layer.momentum or 0.0, name)
        for name, layer in whole.named_norm_layers()
        if not is_held(layer)
    )
    return (
        f"the data are not at fault but the running statistics of BatchNorm: with those of each batch, as in training, "
        f'the loss is finite. At momentum {slowest:g} (layer "{name}") they follow the batches too slowly, or the '
        f"batches change too fast; set batch_norm.momentum=0.1 or more, batch_norm.recalibrate=20 for exact "
        f"statistics before each evaluation, or lower optimizer.lr"
    )
