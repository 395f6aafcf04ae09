"""No exchange between processes lies within a graph: each process records, compares and replays when it sees fit."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from trainer.core.graphs.layout import NotRecordable

# Of the operators by which torch exchanges tensors.
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class RefuseExchange(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, an exchange raises `NotRecordable` before it begins: other processes may not take part in it now."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True, so that what is compiled within the model runs compiled here, as it does elsewhere."""
        return True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace in NAMESPACES:
            raise NotRecordable(
                "the model or the loss exchanges tensors with other processes within a micro-batch"
            )
        return function(*args, **(kwargs or {}))
