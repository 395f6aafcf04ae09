"""Models with unusual tensors: moved as they are meant, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.small import CLASSES, Points, config, header_of
from trainer import ConfigError, Trainer
from trainer.components.dtypes import cast

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


class Complex(nn.Module):
    """Points through a complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))
        self.register_buffer("phase", torch.randn(8, dtype=torch.complex64))
        self.phase: Tensor
        self.head = nn.Linear(8, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        hidden = points.to(self.matrix.dtype) @ self.matrix * self.phase
        result: Tensor = self.head(hidden.abs())
        return result


class Shared(nn.Module):
    """One buffer in two modules, and a buffer and a parameter whose rows are one in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        table = torch.arange(3.0)
        self.first.register_buffer("table", table)
        self.second.register_buffer("table", table)
        self.weight = nn.Parameter(torch.ones(1, 3).expand(2, 3))
        self.register_buffer("rows", torch.ones(1, 3).expand(2, 3))
        self.rows: Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_move_changes_nothing_but_dtype_and_device(dtype: torch.dtype) -> None:
    model = Complex()
    before = model.matrix.detach().clone()
    cast(model, dtype, torch.device("cpu"))
    assert model.matrix.dtype == model.phase.dtype == dtype.to_complex()
    assert model.head.weight.dtype == dtype
    assert torch.equal(model.matrix, before.to(dtype.to_complex()))

    shared = Shared()
    cast(shared, dtype, torch.device("cpu"))
    assert shared.first.table is shared.second.table
    with torch.no_grad():
        shared.weight[0] = 0
        shared.rows[0] = 0
    assert shared.weight.sum() == shared.rows.sum() == 3


def test_a_complex_model_trains_as_in_a_plain_loop(tmp_path: Path) -> None:
    data = Points(32, ignored=False)
    model, plain = Complex(), Complex()
    settings = config(
        tmp_path,
        batch__size=32,
        train__epochs=4,
        train__precision="fp32",
        optimizer__lr=0.1,
        optimizer__momentum=0.0,
    )
    Trainer(settings, model=model, train_data=data, task=nn.CrossEntropyLoss()).fit()

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain(data.points.float()), data.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert model.matrix.is_complex()
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), *mlp())
    first, second = model[0], model[1]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    second.weight.data = first.weight.data
    return model


class OwnDtype(nn.Linear):
    """A layer that computes in the dtype that it was made with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16)).to(x.dtype)


def test_layers_with_a_dtype_of_their_own_are_named(tmp_path: Path) -> None:
    torch.manual_seed(3)
    own = OwnDtype(6, CLASSES, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(6, 6), own)
    settings = config(tmp_path, train__precision="fp32")
    trainer = Trainer(settings, model=model, train_data=Points(ignored=False))
    note = 'makes float32 of all floating parameters and buffers, also of "1.weight"'
    assert note in header_of(trainer, tmp_path)["note"]
    with pytest.raises(ConfigError, match=rf"{note}.* x.to\(self.weight.dtype\)"):
        trainer.fit()


def a_buffer_of_weights() -> nn.Module:
    model = mlp()
    first = model[0]
    assert isinstance(first, nn.Linear)
    model.register_buffer("initial", first.weight.data)
    return model


def scripted() -> nn.Module:
    return torch.jit.script(mlp())


def with_a_traced_part() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(6, 6), torch.ones(1, 6)), mlp())  # type: ignore[no-untyped-call]


def without_a_counter() -> nn.Module:
    norm = nn.BatchNorm1d(6)
    norm.num_batches_tracked = None
    return nn.Sequential(norm, mlp())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_a_counter, 'norm layer "0" keeps running statistics and has no'),
        (tied_by_data, '"0.weight" and "1.weight" share their memory'),
        (a_buffer_of_weights, '"0.weight" and "initial" share their memory'),
        (scripted, "it is TorchScript"),
        (with_a_traced_part, '"0" is TorchScript'),
        (Complex, 'train.precision: fp64 makes complex128 of "matrix"'),
    ],
)
def test_what_would_train_as_something_else_is_refused(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(config(tmp_path), model=make(), train_data=Points())
