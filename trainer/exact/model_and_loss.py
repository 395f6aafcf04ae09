"""A run's model and its loss, with one namespace for the parameters, buffers and layers of both."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.exact.batch_norm import named_norm_layers

# Before the names of the loss's own tensors. A name in a module has dots and hardly ever a slash.
LOSS_PREFIX = "loss/"


class ModelAndLoss:
    """`model` and `loss` as one. The model's names stay as they are; what the loss shares with it is the model's."""

    def __init__(self, model: nn.Module, loss: nn.Module | None = None) -> None:
        self.model = model
        self.loss = loss

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of both, each once."""
        yield from self.model.named_parameters()
        yield from self.named_loss_parameters()

    def named_loss_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the loss alone has."""
        # Most losses have none, and then the model's need not be gathered.
        if self.loss is None or next(self.loss.parameters(), None) is None:
            return
        of_model = set(self.model.parameters())
        for name, parameter in self.loss.named_parameters():
            if parameter not in of_model:
                yield LOSS_PREFIX + name, parameter

    def trained_loss_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the loss's own parameters that require a gradient."""
        return {name: p for name, p in self.named_loss_parameters() if p.requires_grad}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of both, each once."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers of both, each once."""
        yield from self.model.named_buffers()
        if self.loss is None or next(self.loss.buffers(), None) is None:
            return
        of_model = {id(buffer) for buffer in self.model.buffers()}
        for name, buffer in self.loss.named_buffers():
            if id(buffer) not in of_model:
                yield LOSS_PREFIX + name, buffer

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of both, each once."""
        yield from self.model.named_modules()
        yield from self.named_loss_modules()

    def named_loss_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that the loss alone has."""
        if self.loss is None:
            return
        of_model = set(self.model.modules())
        for name, module in self.loss.named_modules():
            if module not in of_model:
                yield LOSS_PREFIX + name, module

    def modules(self) -> Iterator[nn.Module]:
        """The modules of both, each once."""
        for _, module in self.named_modules():
            yield module

    def named_norm_layers(self) -> list[tuple[str, _NormBase]]:
        """The layers of both that keep running statistics."""
        layers = named_norm_layers(self.model)
        of_loss = [] if self.loss is None else named_norm_layers(self.loss)
        if of_loss:  # seldom, and this is called in the hot loop of `batch.fuse`
            of_model = {layer for _, layer in layers}
            for name, layer in of_loss:
                if layer not in of_model:
                    layers.append((LOSS_PREFIX + name, layer))
        return layers

    def loss_tensors(self) -> list[Tensor]:
        """All parameters and buffers that the loss alone has, each once, persistent or not."""
        tensors: dict[int, Tensor] = {}
        for _, module in self.named_loss_modules():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    tensors[id(tensor)] = tensor
        return list(tensors.values())
