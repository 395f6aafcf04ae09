"""Other objects' state in a checkpoint: exact, verified, and refused with a clear error where it cannot be stored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import LockstepError
from trainer.storage import checkpoint
from trainer.storage.checkpoint import Checkpoint, Progress
from trainer.storage.sha256 import file_sha256, raw_bytes
from trainer.storage.snapshot import Snapshot
from trainer.storage.stateful import DTYPES, load_state


def save(directory: Path, stateful: dict[str, dict[Any, Any]]) -> Path:
    """Write a checkpoint with these objects' states."""
    weights = {"w": torch.ones(3)}
    momentum = {"momentum.w": torch.ones(3)}
    content = Checkpoint(weights, momentum, {}, Progress(step=7), {}, stateful)
    return checkpoint.write(directory, checkpoint.take(content), keep=1)


def save_state(directory: Path, name: str, state: dict[Any, Any]) -> None:
    """Write one object's state, for `load_state`."""
    snapshot = Snapshot(step=7)
    snapshot.add_state(name, state)
    snapshot.write(directory)


def round_trip(directory: Path, state: dict[Any, Any]) -> dict[Any, Any]:
    path = save(directory, {"thing": state})
    return checkpoint.load(path).stateful["thing"]


def assert_identical(actual: Any, expected: Any) -> None:
    """Equal in type and in every bit, nested values included."""
    if isinstance(expected, Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert raw_bytes(actual) == raw_bytes(expected)
        return
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)  # the order of keys too
        assert [type(key) for key in actual] == [type(key) for key in expected]
        for key, value in expected.items():
            assert_identical(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    else:
        assert repr(actual) == repr(expected)  # NaN and -0.0 included


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str))
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_tensors_come_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    count = math.prod(shape)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (max(1, count * size),), dtype=torch.uint8
    )
    tensor = (
        raw.view(dtype)[:count].reshape(shape)
        if count > 1
        else torch.ones(shape).to(dtype)
    )
    state = {"tensor": tensor, "strided": torch.stack([tensor, tensor], -1)[..., 0]}
    assert_identical(round_trip(tmp_path, state), state)


def test_every_kind_of_value_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "large": [2**53 + 1, -(2**80), 0],
        "floats": (1 / 3, -0.0, 5e-324, math.inf, -math.inf, math.nan),
        "flags": [True, False, None],
        "text": 'ä\n"\\ \u2028',
        "empty": [{}, [], (), ""],
        "nested": [({"a": [torch.arange(3)]}, torch.tensor(2.0, dtype=torch.bfloat16))],
        "whole-number keys": {0: {"step": torch.tensor(3.0)}, 1: {}, -2: "x"},
        "markers": {"$tensor": "a", "$tuple": [1], "$items": [[1, 2]]},
        "__metadata__": torch.ones(1),
    }
    assert_identical(round_trip(tmp_path, state), state)


def test_equal_paths_of_different_tensors_stay_apart(tmp_path: Path) -> None:
    state = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2), "b'": torch.tensor(3)},
        "a.b'": torch.tensor(4),
        "l": {0: torch.tensor(5), "0": torch.tensor(6)},
        "": {"": torch.tensor(7)},
    }
    assert_identical(round_trip(tmp_path, state), state)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("ab.$'", max_size=3)
    | st.just(torch.arange(2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text("ab.$'", max_size=3) | st.integers(-1, 1), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(state=st.dictionaries(st.text("ab.$'", max_size=3), VALUES, max_size=4))
@settings(max_examples=60)
def test_any_nesting_comes_back(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("state")
    save_state(directory, "thing", state)
    assert_identical(load_state(directory, "thing"), state)


def test_a_module_and_an_optimizer_go_on_where_they_were(tmp_path: Path) -> None:
    """The two commonest `state_dict`s: tied weights, whole-number keys, tuples of betas."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        module[2].weight = module[0].weight
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def update(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.arange(8.0).reshape(4, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = build()
    update(module, optimizer)
    path = save(
        tmp_path,
        {"average": module.state_dict(), "its-optimizer": optimizer.state_dict()},
    )
    stateful = checkpoint.load(path).stateful
    restored, restored_optimizer = build()
    restored.load_state_dict(stateful["average"])
    restored_optimizer.load_state_dict(stateful["its-optimizer"])
    update(module, optimizer)
    update(restored, restored_optimizer)
    assert_identical(dict(restored.state_dict()), dict(module.state_dict()))


def test_a_flat_state_dict_keeps_its_names_in_the_file(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    save_state(tmp_path, "ema", module.state_dict())
    saved = load_file(tmp_path / "ema.safetensors")
    assert saved.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert_identical(saved[name], tensor)


def test_what_is_saved_is_a_copy(tmp_path: Path) -> None:
    weights = torch.ones(4)
    loaded = round_trip(
        tmp_path, {"whole": weights, "half": weights[:2], "same": weights}
    )
    assert_identical(
        loaded, {"whole": torch.ones(4), "half": torch.ones(2), "same": torch.ones(4)}
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.ones(2),
            '"list.0.key" is a numpy.ndarray; a checkpoint holds tensors, numbers',
        ),
        ({1, 2}, '"list.0.key" is a builtins.set'),
        (b"raw", '"list.0.key" is a builtins.bytes'),
        (
            {(1, 2): 3},
            r'"list.0.key" is a dict with the key \(1, 2\), which is neither text nor a whole number',
        ),
        (
            torch.ones(2).to_sparse(),
            '"list.0.key" is a tensor of torch.float32, torch.sparse_coo',
        ),
        (
            torch.ones(2, device="meta"),
            '"list.0.key" is a tensor of .* on meta; a checkpoint holds dense tensors',
        ),
        (
            torch.ones(2, dtype=torch.complex128),
            '"list.0.key" is a tensor of torch.complex128',
        ),
    ],
)
def test_a_value_that_cannot_be_stored_is_named(
    tmp_path: Path, value: Any, message: str
) -> None:
    save(tmp_path, {"ema": {}})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        LockstepError, match=f'the state of "ema" cannot be saved: {message}'
    ):
        save(tmp_path, {"ema": {"list": [{"key": value}]}})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_state_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LockstepError,
        match=r'the state of "ema" cannot be saved: it is a builtins\.list; .* dicts',
    ):
        save_state(tmp_path, "ema", [1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "-dash"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        LockstepError, match="cannot name files in a checkpoint; use letters, digits"
    ):
        save(tmp_path, {name: {}})


@pytest.mark.parametrize("name", ["model", "optimizer", "State", "manifest"])
def test_a_name_of_the_checkpoints_own_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        LockstepError, match=f'"{name}" names a file that every checkpoint has'
    ):
        save(tmp_path, {name: {}})


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LockstepError, match="differ in case only: EMA, ema"):
        save(tmp_path, {"ema": {}, "EMA": {}})


@pytest.mark.parametrize("name", ["ema-1.0_b.safetensors", "ema-1.0_b.json"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_the_manifest_covers_these_files(
    tmp_path: Path, name: str, damage: str
) -> None:
    path = save(tmp_path, {"ema-1.0_b": {"w": torch.ones(2), "n": 1}})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"][name] == file_sha256(path / name)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "flip":
        (path / name).write_bytes(
            content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        )
    with pytest.raises(LockstepError, match=str(path)):
        checkpoint.load(path)


def test_a_checkpoint_without_such_objects_has_no_more_files_than_before(
    tmp_path: Path,
) -> None:
    path = save(tmp_path, {})
    names = [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert sorted(file.name for file in path.iterdir()) == names
    assert "stateful" not in json.loads((path / "state.json").read_text())
    assert checkpoint.load(path).stateful == {}
