"""`train.tf32`, `train.cudnn_benchmark` and the modes of `train.compile`, as far as a CPU can tell."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from tests.distributed.ranks import on_ranks
from tests.distributed.small import HASHES, Points, config, header_of, mlp
from trainer import Config, ConfigError, Trainer
from trainer.components.compiling import compile_model, keep_results_of_graphs
from trainer.core.cuda_keys import describe_tf32
from trainer.core.no_effect import keys_without_effect
from trainer.exact.determinism import run_settings
from trainer.exact.tf32 import Tf32, tf32_in_use

TORCHS_OWN = Tf32(convolutions=True, matmul=False)


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize(
    ("policy", "used"),
    [
        (None, TORCHS_OWN),
        (True, Tf32(convolutions=True, matmul=True)),
        (False, Tf32(convolutions=False, matmul=False)),
    ],
)
def test_bitwise_rounds_to_tf32_where_standard_does(
    bitwise: bool, policy: bool | None, used: Tf32
) -> None:
    assert tf32_in_use() == TORCHS_OWN
    with run_settings(bitwise=bitwise, compiled=False, tf32=policy):
        assert tf32_in_use() == used
        # Code within may read the older names: torch fails where they differ from the newer ones.
        assert torch.backends.cudnn.allow_tf32 == used.convolutions
        assert torch.backends.cuda.matmul.allow_tf32 == used.matmul
    assert tf32_in_use() == TORCHS_OWN
    assert torch.get_float32_matmul_precision() == "highest"


def set_by_newer_names() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = "ieee"


def set_by_older_names() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False


SETTERS = [set_by_newer_names, set_by_older_names]


def test_a_process_gets_its_own_settings_back() -> None:
    def settings_come_back() -> None:
        for setter, bitwise, policy in product(SETTERS, [False, True], [None, True]):
            setter()
            before = tf32_in_use()
            assert before == Tf32(convolutions=False, matmul=True)
            with run_settings(bitwise=bitwise, compiled=False, tf32=policy):
                is_left = not bitwise and policy is None
                assert is_left == (tf32_in_use() == before)
            assert tf32_in_use() == before

    on_ranks(1, settings_come_back)


@pytest.mark.parametrize("enabled", [False, True])
def test_cudnn_benchmark_goes_for_the_run_alone(
    monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not enabled)
    with run_settings(bitwise=False, compiled=False, cudnn_benchmark=enabled):
        assert torch.backends.cudnn.benchmark == enabled
    assert torch.backends.cudnn.benchmark != enabled


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("cudnn_benchmark", True, "by timing them"),
        ("compile", "max-autotune", "by timing them"),
        ("compile", "reduce-overhead", "have not been shown to give the same bits"),
    ],
)
def test_bitwise_refuses_what_may_choose_otherwise(
    name: str, value: Any, reason: str
) -> None:
    train = {name: value}
    Config.from_dict({"train": train})
    with pytest.raises(ConfigError, match=rf"train\.{name}: .*{reason}"):
        Config.from_dict({"run": {"reproducibility": "bitwise"}, "train": train})


def test_default_is_another_word_for_true() -> None:
    assert Config.from_dict({"train": {"compile": "default"}}).train.compile is True
    with pytest.raises(ConfigError, match=r"not a boolean .* or default"):
        Config.from_dict({"train": {"compile": "reduce_overhead"}})


@pytest.mark.parametrize("mode", [True, "reduce-overhead", "max-autotune"])
def test_the_mode_is_torchs(monkeypatch: pytest.MonkeyPatch, mode: bool | str) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **words: asked.append(words))
    compile_model(nn.Linear(1, 1), mode, bitwise=False, device=torch.device("cpu"))
    assert asked == [{"dynamic": None, "mode": None if mode is True else mode}]


class FailingOnce(torch.autograd.Function):
    """Its backward fails as one that torch.compile compiles when it first runs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise no_python_headers()


def no_python_headers() -> Exception:
    output = "In file included from main.cpp:2:\nx.h:7:10: fatal error: Python.h: No such file\ncompilation terminated."
    return CppCompileError(["g++", "main.cpp"], output)


def no_compiler() -> Exception:
    return InductorError(InvalidCxxCompiler(), None)


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_what_torch_compile_lacks_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """It was a traceback of 40 lines. Nothing is compiled here: the errors are those of torch."""

    def compile_in_vain(model: nn.Module, **_: Any) -> None:
        def call(inputs: Tensor) -> Tensor:
            if fails == "forward":
                raise no_compiler()
            return FailingOnce.apply(model.forward(inputs))  # type: ignore[no-any-return]

        model._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_in_vain)
    settings = config(tmp_path, run__proof="off", train__compile=True)
    trainer = Trainer(settings, model=mlp(), train_data=Points(ignored=False))
    with pytest.raises(ConfigError) as caught:
        trainer.fit()
    reason = "No working C++ compiler" if fails == "forward" else "Python.h: No such"
    text = str(caught.value)
    assert text.startswith("train.compile: ") and reason in text
    assert "train.compile=false" in text


class _GraphedLinear(torch.autograd.Function):
    """A linear layer as a CUDA graph would run it: each result is written where the one before it stands."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, memory: Any) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.memory = memory
        memory["output"].copy_(inputs @ weight.T)
        result: Tensor = memory["output"].view(memory["output"].shape)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        memory = ctx.memory
        torch.matmul(gradients[0].T, inputs, out=memory["gradient"])
        return None, memory["gradient"].view(memory["gradient"].shape), None


@pytest.mark.parametrize("is_kept", [False, True])
def test_results_of_graphs_outlive_the_next_replay(is_kept: bool) -> None:
    """Two micro-batches are added up, and both outputs read afterwards: wrong unless they have their own memory."""
    model = nn.Linear(3, 2, bias=False)
    memory = {"output": torch.zeros(4, 2), "gradient": torch.zeros(2, 3)}
    batches = [torch.randn(4, 3), torch.randn(4, 3)]
    expected = [batch @ model.weight.T for batch in batches]
    (expected[0].sum() + expected[1].square().sum()).backward()  # type: ignore[no-untyped-call]
    gradient = model.weight.grad
    model.weight.grad = None

    model._compiled_call_impl = lambda inputs: _GraphedLinear.apply(
        inputs, model.weight, memory
    )
    if is_kept:
        keep_results_of_graphs(model)
    outputs = []
    for batch, power in zip(batches, (1, 2), strict=True):
        output = model(batch)
        output.pow(power).sum().backward()
        outputs.append(output)
    are_right = [torch.equal(*pair) for pair in zip(outputs, expected, strict=True)]
    assert are_right == [is_kept, True]
    assert model.weight.grad is not None
    assert gradient is not None
    assert torch.allclose(model.weight.grad, gradient) == is_kept


def test_a_cpu_computes_the_same_with_the_keys_and_says_so(tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> tuple[list[str], dict[str, Any]]:
        settings = config(
            tmp_path, run__name=name, run__proof="off", train__epochs=1, **changes
        )
        data = Points(ignored=False)
        trainer = Trainer(settings, model=mlp(), train_data=data)
        notes = keys_without_effect(trainer.run)
        assert "tf32" not in header_of(trainer, tmp_path)
        summary = trainer.fit()
        return notes, {name: summary[name] for name in HASHES}

    notes, hashes = run("plain")
    assert not notes
    notes, other = run("keys", train__tf32=True, train__cudnn_benchmark=False)
    assert [note.partition(" has no effect")[0] for note in notes] == [
        "train.tf32",
        "train.cudnn_benchmark",
    ]
    assert other == hashes


@pytest.mark.parametrize(
    ("changes", "capability", "line"),
    [
        ({"tf32": True}, 8, "in convolutions and matrix products"),
        ({"tf32": False}, 9, "nowhere"),
        ({}, 8, ""),
        ({"tf32": True}, 7, ""),
        ({"tf32": True, "precision": "fp64"}, 9, ""),
    ],
)
def test_the_header_says_what_is_rounded(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    capability: int,
    line: str,
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (capability, 0)
    )
    device = torch.device("cuda", 0)
    settings = Config.from_dict({"train": changes})
    assert describe_tf32(settings, device) == line
    assert describe_tf32(settings, torch.device("cpu")) == ""
    bitwise = Config.from_dict(
        {"run": {"reproducibility": "bitwise"}, "train": changes}
    )
    expected = "in convolutions" if not changes else line
    assert describe_tf32(bitwise, device) == expected
