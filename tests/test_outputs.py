"""Outputs of any structure: in the run's dtype after autocast, kept without a graph, and one message otherwise."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from trainer import Task, WeightedSum
from trainer.components.task import build_task
from trainer.config.model_sections import LossConfig
from trainer.core.forward import Forward
from trainer.core.metrics import detach
from trainer.core.precision import Precision
from trainer.data.batches import MicroBatch
from trainer.errors import ConfigError
from trainer.exact.plan import Plan
from trainer.exact.structures import map_tensors, tensors_in

CPU = torch.device("cpu")
STEP = Plan(samples=8, batch_size=8, micro_size=8, ranks=1, epochs=1, seed=0).step(0)


class Pair(NamedTuple):
    scores: Tensor
    name: str


@dataclasses.dataclass
class Result:
    scores: Tensor
    hidden: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    scores: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As that of Hugging Face: a dict whose items are attributes as well."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


def model_output(scores: Tensor) -> ModelOutput:
    output = ModelOutput()
    output["scores"] = scores
    return output


STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda o: o),
    "dict": (lambda t: {"scores": t, "n": 3}, lambda o: o["scores"]),
    "nested": (lambda t: {"a": [None, (t,)]}, lambda o: o["a"][1][0]),
    "tuple": (lambda t: (t, "x"), lambda o: o[0]),
    "list": (lambda t: [t], lambda o: o[0]),
    "namedtuple": (lambda t: Pair(t, "x"), lambda o: o.scores),
    "dataclass": (lambda t: Result(Result(t)), lambda o: o.scores.scores),  # type: ignore[arg-type]
    "frozen": (Frozen, lambda o: o.scores),
    "ModelOutput": (model_output, lambda o: o.scores),
    "object": (lambda t: SimpleNamespace(scores=t), lambda o: o.scores),
    "distribution": (lambda t: Normal(t, torch.ones_like(t)), lambda o: o.loc),
}


class Wrapped(nn.Module):
    """Scores `(N, 3)` of 16 numbers, in a structure."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


class ByStructure(Task):
    def __init__(self, get: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.get = get

    def loss_sum(self, output: Any, targets: Tensor) -> WeightedSum:
        return WeightedSum((self.get(output) ** 2 * 1e5).sum(), len(targets))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_part_of_an_output_leaves_autocasts_dtype(
    structure: str, precision: str
) -> None:
    """Else a loss is rounded in bf16, and infinite in fp16."""
    wrap, get = STRUCTURES[structure]
    forward = Forward(ByStructure(get), Precision(precision, CPU), CPU, 0)
    model = Wrapped(wrap)
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    batch = MicroBatch(0, inputs, torch.zeros(8))
    with torch.autocast(
        "cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ):
        scores = model.layer(inputs)
    expected = float((scores.float() ** 2 * 1e5).sum())
    for output in (
        forward(model, batch, STEP)[0],
        forward(model, batch, None)[0],
        forward.predict(model, batch),
    ):
        assert type(output) is type(wrap(scores))
        assert get(output).dtype == torch.float32
        assert get(output).requires_grad
        assert not get(detach(output)).requires_grad
    loss = forward(model, batch, STEP)[1].total
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_structures_are_copied_and_never_changed() -> None:
    tensor = torch.zeros(2)
    inner = SimpleNamespace(t=tensor)
    inner.itself = inner
    value = {"a": [tensor, 1], "b": inner, "c": "text", "model": nn.Linear(2, 2)}
    changed = map_tensors(lambda t: t + 1, value)
    assert len(list(tensors_in(value))) == 2
    assert value["a"][0] is tensor and inner.t is tensor  # type: ignore[index]
    assert float(changed["a"][0].sum()) == float(changed["b"].t.sum()) == 2
    assert changed["model"] is value["model"]
    assert map_tensors(lambda t: t, value) is value


# ---------------------------------------------------------------- one message


class Sums(Task):
    """A task of one's own, whose mistakes come from torch."""

    metrics = ("error",)

    def loss_sum(self, output: Any, targets: Any) -> WeightedSum:
        return WeightedSum((output - targets).square().sum(), len(targets))


def message_of(task: Task, model: nn.Module, inputs: Tensor, targets: Any) -> str:
    forward = Forward(task, Precision("fp32", CPU), CPU, 0)
    with pytest.raises(ConfigError) as caught:
        forward(model, MicroBatch(0, inputs, targets), STEP)
    return str(caught.value)


def test_an_error_of_torch_is_one_message_with_shapes_and_dtypes() -> None:
    points, images = torch.ones(8, 4), torch.ones(8, 1, 6, 6)
    ids = torch.zeros(8, dtype=torch.int32)
    ours = build_task(LossConfig(), 3)
    message = message_of(Sums(), nn.Linear(4, 3), points, ids)
    assert message.startswith(
        "loss.name: Sums.loss_sum failed on the model's output (8, 3) float32 with the data set's targets (8,) int32: "
        "RuntimeError: The size of tensor a (3) must match"
    )
    assert f"({__file__}, line " in message
    message = message_of(Sums(), nn.Linear(4, 3), points, [ids])
    assert "targets list of (8,) int32: TypeError" in message
    message = message_of(ours, nn.Linear(4, 3), points, torch.zeros(5).long())
    assert (
        "(8, 3) float32 with the data set's targets (5,) int64: ValueError" in message
    )
    message = message_of(ours, nn.Conv2d(3, 4, 3), images, ids)
    assert message.startswith(
        "model.name: Conv2d failed on inputs (8, 1, 6, 6) float32: RuntimeError: Given groups=1"
    )


def test_a_defect_of_the_users_program_keeps_its_traceback() -> None:
    class Broken(Sums):
        def loss_sum(self, output: Any, targets: Any) -> WeightedSum:
            return self.nothing  # type: ignore[no-any-return]

    class OutOfMemory(Sums):
        def loss_sum(self, output: Any, targets: Any) -> WeightedSum:
            raise torch.OutOfMemoryError

    batch = MicroBatch(0, torch.ones(8, 4), torch.zeros(8))
    for task, kind in ((Broken(), AttributeError), (OutOfMemory(), RuntimeError)):
        with pytest.raises(kind) as caught:
            Forward(task, Precision("fp32", CPU), CPU, 0)(nn.Linear(4, 3), batch, STEP)
        assert not isinstance(caught.value, ConfigError)
