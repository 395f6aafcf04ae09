"""Operations that CUDA refuses in bitwise mode, found by watching a forward and backward on any device.

From the documentation of `torch.use_deterministic_algorithms`, torch 2.11 to 2.14. Not listed: what torch's own
functions replace on CUDA by other operations (`F.interpolate` bilinear and trilinear, `F.pad` replicate), and
`torch.cumsum`, which torch 2.11 still documents as refused, though its CUDA library holds no such message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

NEAREST = 'use mode="nearest" or "bilinear" without antialias'
ZEROS = 'pad with "zeros" or "replicate"'
OWN_POOLING = "use trainer.components.pooling.AdaptiveAvgPool2d in its place: the same values and state_dict"
OTHER = "replace it"

# Operation as autograd runs it → its public name, and what to do.
REFUSED: dict[str, tuple[str, str]] = {
    "_adaptive_avg_pool2d_backward": ("torch.nn.AdaptiveAvgPool2d", OWN_POOLING),
    "_adaptive_avg_pool3d_backward": ("torch.nn.AdaptiveAvgPool3d", OTHER),
    "adaptive_max_pool2d_backward": ("torch.nn.AdaptiveMaxPool2d", "use MaxPool2d"),
    "adaptive_max_pool3d_backward": ("torch.nn.AdaptiveMaxPool3d", "use MaxPool3d"),
    "avg_pool3d_backward": ("torch.nn.AvgPool3d", "use a strided mean or convolution"),
    "fractional_max_pool2d_backward": ("torch.nn.FractionalMaxPool2d", "use MaxPool2d"),
    "fractional_max_pool3d_backward": ("torch.nn.FractionalMaxPool3d", "use MaxPool3d"),
    "max_unpool2d": ("torch.nn.MaxUnpool2d", "use an upsampling or a ConvTranspose2d"),
    "max_unpool3d": ("torch.nn.MaxUnpool3d", "use an upsampling or a ConvTranspose3d"),
    "upsample_linear1d_backward": ("linear interpolation", NEAREST),
    "upsample_bicubic2d_backward": ("bicubic interpolation", NEAREST),
    "_upsample_bilinear2d_aa_backward": (
        "bilinear interpolation with antialias",
        NEAREST,
    ),
    "_upsample_bicubic2d_aa_backward": (
        "bicubic interpolation with antialias",
        NEAREST,
    ),
    "reflection_pad1d_backward": ("torch.nn.ReflectionPad1d", ZEROS),
    "reflection_pad2d_backward": ("torch.nn.ReflectionPad2d", ZEROS),
    "reflection_pad3d_backward": ("torch.nn.ReflectionPad3d", ZEROS),
    "nll_loss2d_forward": (
        "a pixel-wise cross-entropy or NLL loss",
        "use loss.name=cross_entropy, or flatten the pixels to (N·H·W, C)",
    ),
    "_ctc_loss_backward": ("torch.nn.CTCLoss", OTHER),
    "grid_sampler_2d_backward": ("torch.nn.functional.grid_sample", OTHER),
    "grid_sampler_3d_backward": ("torch.nn.functional.grid_sample", OTHER),
    "put_": ("torch.Tensor.put_", "use index_put_"),
    "histc": ("torch.histc", "use torch.bucketize and torch.bincount"),
    "index_reduce": ("torch.Tensor.index_reduce", "use index_add"),
    "index_reduce_": ("torch.Tensor.index_reduce_", "use index_add_"),
    "median.dim": ("torch.median with a dimension", "use torch.sort"),
    "nanmedian.dim": ("torch.nanmedian with a dimension", "use torch.sort"),
}
# Deterministic from torch 2.14 on.
if torch.__version__ < "2.14":  # by version, not by letter
    REFUSED["max_pool3d_with_indices_backward"] = (
        "torch.nn.MaxPool3d",
        "use torch 2.14, or a strided convolution",
    )
# Refused with some arguments only.
CONDITIONAL: dict[str, tuple[str, str, Callable[[tuple[Any, ...]], bool]]] = {
    "bincount": (
        "torch.bincount with weights",
        "use index_add",
        lambda args: len(args) > 1 and args[1] is not None,
    ),
    "scatter_reduce": (
        'scatter_reduce with reduce="prod"',
        OTHER,
        lambda args: "prod" in args,
    ),
    "scatter_reduce_": (
        'scatter_reduce_ with reduce="prod"',
        OTHER,
        lambda args: "prod" in args,
    ),
    "_embedding_bag_dense_backward": (
        'torch.nn.EmbeddingBag with mode="max"',
        'use mode="sum" or "mean"',
        lambda args: len(args) > 7 and args[7] == 2,
    ),
}


class RefusedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what is run in its context. `messages` names each refused operation, where it is, and what to do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        # Those whose forward is running, the innermost last.
        self._layers: list[str] = []
        # Operation of a forward → names of the layers that called it.
        self._layers_of: dict[str, list[str]] = {}
        self._refusals: dict[str, tuple[str, str]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).removeprefix("aten.")  # such as median.dim
        packet, _, _ = name.partition(".")
        if self._layers:
            layers = self._layers_of.setdefault(packet, [])
            if self._layers[-1] not in layers:
                layers.append(self._layers[-1])
        refusal = REFUSED.get(name) or REFUSED.get(packet)
        if refusal is None and packet in CONDITIONAL:
            public_name, remedy, applies = CONDITIONAL[packet]
            refusal = (public_name, remedy) if applies(args) else None
        if refusal is not None:
            self._refusals[packet] = refusal
        return function(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and know in which layer of the model each operation of a forward is."""
        handles: list[RemovableHandle] = []
        for name, layer in self._model.named_modules():
            handles.append(
                layer.register_forward_pre_hook(self._entered(name or "the model"))
            )
            handles.append(layer.register_forward_hook(self._left, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str) -> Callable[..., None]:
        return lambda *_: self._layers.append(name)

    def _left(self, *_: Any) -> None:
        self._layers.pop()

    def messages(self) -> list[str]:
        """One line for each refused operation."""
        lines = []
        for packet, (public_name, remedy) in sorted(self._refusals.items()):
            forward = packet.removesuffix("_backward")
            layers: list[str] = []
            for name in (forward, f"{forward}_with_indices", packet):
                layers += self._layers_of.get(name, [])
            place = (
                f" (in {', '.join(dict.fromkeys(layers))})"
                if layers
                else " (in the loss or metrics)"
            )
            lines.append(f"{public_name}{place}: {remedy}")
        return lines
