"""`train.cuda_graphs` with graphs on the CPU: the bits of eager, or eager with a reason."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import on_ranks
from tests.distributed.small import (
    CLASSES,
    HASHES,
    IGNORED,
    Images,
    Points,
    config,
    header_of,
    mlp,
    rows_of,
)
from tests.recorded_graphs import GraphsOnCpu, graphs_on_cpu
from trainer import Config, ConfigError, Observer, Trainer
from trainer.core.graphs.exchange import RefuseExchange
from trainer.core.no_effect import keys_without_effect
from trainer.exact import exchange
from trainer.exact.plan import Step
from trainer.process.cuda_graph import CudaRecorder

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, and a buffer that follows the inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        )
        self.register_buffer("mean", torch.zeros(()))
        self.mean: Tensor

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(images.mean().detach(), alpha=0.1)
        result: Tensor = self.layers(images) + self.mean
        return result


def run(
    directory: Path,
    model: nn.Module,
    data: Any,
    *,
    graphs: bool,
    observers: Sequence[Observer] = (),
    **changes: Any,
) -> tuple[dict[str, Any], Trainer, list[str]]:
    """What a run logs and ends with, its trainer, and the notes of its console."""
    settings: dict[str, Any] = {
        "run__name": "graphs" if graphs else "eager",
        "run__proof": "off",
        "train__cuda_graphs": graphs,
        "train__epochs": 3,
        "batch__micro_size": 7,
    }
    notes: list[str] = []
    settings |= changes
    trainer = Trainer(
        config(directory, **settings),
        model=model,
        train_data=data,
        observers=observers,
    )
    if trainer.graphs is not None:
        report = trainer.graphs.report
        trainer.graphs.report = lambda note: report(notes.append)  # type: ignore[method-assign]
    summary = trainer.fit()
    result: dict[str, Any] = {name: summary[name] for name in HASHES}
    result["rows"] = rows_of(directory / str(settings["run__name"]))
    return result, trainer, notes


def replayed(
    directory: Path,
    make_model: Callable[[], nn.Module],
    make_data: Callable[[], Any],
    **changes: Any,
) -> tuple[int, list[str]]:
    """The recordings of a run that replays micro-batches with the bits of eager to its end, and its notes."""
    expected, _, _ = run(directory, make_model(), make_data(), graphs=False, **changes)
    with graphs_on_cpu() as graphs:
        result, trainer, notes = run(
            directory, make_model(), make_data(), graphs=True, **changes
        )
    assert result == expected
    assert trainer.graphs is not None
    assert not trainer.graphs.reason
    assert trainer.graphs.replays > 0
    return graphs.recordings, notes


SAME: list[dict[str, Any]] = [
    # Steps of 28 samples in four micro-batches, and a last one of 19 in three, of 7, 6 and 6.
    {},
    {"batch__micro_size": 28},
    {"train__precision": "bf16", "train__max_grad_norm": 0.1},
    {"run__reproducibility": "bitwise", "batch_norm__momentum_per": "step"},
    {
        "train__non_finite": "skip",
        "optimizer__name": "adamw",
        "optimizer__momentum": None,
    },
    {"train__channels_last": True, "ema__decay": 0.9},
]


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_replays_have_the_bits_of_eager(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    recordings, notes = replayed(tmp_path, Net, Images, **changes)
    assert recordings >= 1
    assert len(notes) == 1
    assert "are replayed from step" in notes[0]


def test_weights_that_depend_on_targets_are_those_of_each_batch(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"loss__ignore_index": IGNORED, "train__log_every": 2}
    replayed(tmp_path, mlp, Points, **changes)


def test_what_is_thawed_is_recorded_anew(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model__freeze": ["layers.0"],
        "model__unfreeze": {2: ["layers.0"]},
        "train__epochs": 5,
    }
    recordings, _ = replayed(tmp_path, Net, Images, **changes)
    assert recordings >= 2


class Unsteady(nn.Module):
    """Does in its forward, besides computing, what no replay does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers: Any = mlp()
        self.calls = 0
        self.rate = 1.0
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.count: Tensor
        if kind == "hook":
            self.get_submodule("layers.0").register_forward_hook(lambda *_: None)

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.layers(points) * self.rate
        if not self.training:
            return result
        match self.kind:
            case "attribute":
                self.calls += 1
                return result * (1 + 0.1 * (self.calls % 3))
            case "buffer":
                self.count = self.count + 1
            case "item":
                return result * (1 + 0.1 * (result.detach().mean().item() > 0))
            case "global":
                return result * RATE[0]
            case "sparse":
                table = nn.functional.embedding(
                    torch.arange(4), self.layers[2].weight, sparse=True
                )
                return result + table.sum() * 1e-3
        return result


class Random(nn.Module):
    """Draws on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = mlp()

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.layers(points) * (1 + 0.1 * random.random())
        return result


RATE = [1.0]


class RaisesRate(Observer):
    """Changes a model's attribute, or a global variable, after each step or from the third epoch on."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def begin(self, run: Any) -> None:
        self._model = run.module
        RATE[0] = 1.0

    def step(self, step: Step) -> None:
        if self._kind == "observer":
            self._model.rate = 1 + 0.01 * step.number
        if step.epoch == 1 and step.last_in_epoch:
            RATE[0] = 1.5


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("attribute", {}, "each forward changes calls, and a replay would not"),
        ("buffer", {}, "each forward changes count, and a replay would not"),
        ("random", {}, "may draw from `random`"),
        ("item", {}, "the recording failed: RuntimeError: operation not permitted"),
        ("hook", {}, "a hook of layers.0 would not run in a replay"),
        ("global", {}, "a replay gives the loss other bits (since the last"),
        ("observer", {"train__epochs": 16}, "keeps changing: rate"),
        ("", {"batch__fuse": 4}, "batch.fuse runs several micro-batches"),
    ],
)
def test_what_no_replay_does_stays_eager(
    tmp_path: Path, kind: str, changes: dict[str, Any], reason: str
) -> None:
    observers, data = [RaisesRate(kind)], Points(ignored=False)
    model, other = [Random() if kind == "random" else Unsteady(kind) for _ in range(2)]
    expected, _, _ = run(
        tmp_path, model, data, graphs=False, observers=observers, **changes
    )
    with graphs_on_cpu():
        result, trainer, notes = run(
            tmp_path, other, data, graphs=True, observers=observers, **changes
        )
    assert result == expected
    assert trainer.graphs is not None
    assert reason in trainer.graphs.reason
    assert f": {trainer.graphs.reason}" in notes[-1]
    assert "eager from step" in notes[-1]


@pytest.mark.parametrize(
    ("operation", "dtype", "what"),
    [
        ("aten.native_batch_norm.default", torch.float64, "the loss"),
        (
            "aten.convolution_backward.default",
            torch.float64,
            "the gradient of layers.0.weight",
        ),
        ("aten.add_.Tensor", torch.int64, "buffer layers.1.num_batches_tracked"),
    ],
)
def test_a_replay_with_other_bits_is_not_trusted(
    tmp_path: Path, operation: str, dtype: torch.dtype, what: str
) -> None:
    def spoil(name: str, results: list[Tensor]) -> None:
        for tensor in results:
            if name == operation and tensor.dtype == dtype and tensor.numel():
                tensor.view(-1)[:1].add_(1)

    expected, _, _ = run(tmp_path, Net(), Images(), graphs=False)
    with graphs_on_cpu(GraphsOnCpu(spoil)):
        result, trainer, _ = run(tmp_path, Net(), Images(), graphs=True)
    assert result == expected
    assert trainer.graphs is not None
    assert trainer.graphs.replays == 0
    assert trainer.graphs.reason == f"a replay gives {what} other bits"


class Unrepeatable(nn.Module):
    """Gives other bits at each call, as sums in no fixed order do."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.layers = mlp()

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.layers(points) * (1 + next(CALLS) % 3 * self.size)
        return result


CALLS = itertools.count()


@pytest.mark.parametrize(
    ("size", "replays", "last"),
    [
        (1e-14, True, "are replayed from step"),
        (1e-7, False, "and not by rounding alone"),
    ],
)
def test_what_has_no_bits_of_its_own_is_compared_up_to_rounding(
    tmp_path: Path, size: float, replays: bool, last: str
) -> None:
    with graphs_on_cpu():
        _, trainer, notes = run(
            tmp_path, Unrepeatable(size), Points(ignored=False), graphs=True
        )
    assert "eager gives the loss other bits each time" in notes[0]
    assert last in notes[1]
    assert trainer.graphs is not None
    assert (trainer.graphs.replays > 0) is replays


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train__precision": "fp16"}, "fp16 scales the loss"),
        ({"train__mix": {"mixup": 0.2}}, "train.mix draws"),
    ],
)
def test_the_header_says_what_is_known_before(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    settings = config(tmp_path, train__cuda_graphs=True, **changes)
    with graphs_on_cpu():
        trainer = Trainer(settings, model=Net(), train_data=Images())
        assert reason in header_of(trainer, tmp_path)["graphs"]
    assert trainer.graphs is not None
    assert trainer.graphs.reason


def test_a_cpu_has_no_graphs_and_says_so(tmp_path: Path) -> None:
    settings = config(tmp_path, train__cuda_graphs=True)
    trainer = Trainer(settings, model=mlp(), train_data=Points())
    assert trainer.graphs is None
    assert "graphs" not in header_of(trainer, tmp_path)
    assert keys_without_effect(trainer.run) == [
        "train.cuda_graphs has no effect: there are no CUDA graphs on this device"
    ]


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs: .*train\.compile"):
        Config.from_dict({"train": {"cuda_graphs": True, "compile": True}})


class Generator:
    """Stands for a device's generator, by the name of its state."""

    state = "recording"

    def clone_state(self) -> str:
        return "untouched"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


def test_a_failed_recording_leaves_stream_and_generator_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch itself leaves both behind: its own stream as the current one, and a generator that cannot draw."""
    asked: list[dict[str, Any]] = []
    streams: list[str] = []

    @contextmanager
    def graph(_: Any, **words: Any) -> Iterator[None]:
        asked.append(words)
        yield

    generator = Generator()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the run's")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(
        "trainer.process.cuda_graph.default_generator", lambda _: generator
    )
    recorder = CudaRecorder(torch.device("cuda", 0))
    results, _ = recorder.record(lambda: "results")
    assert (results, streams, generator.state) == ("results", [], "recording")
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 / 0)
    assert (streams, generator.state) == (["the run's"], "untouched")
    # Both share memory, and other threads may use the device.
    assert asked[0]["pool"] is None
    assert asked[1]["pool"] is not None
    assert asked[1]["capture_error_mode"] == "thread_local"


@pytest.mark.parametrize(
    ("dtype", "is_exact"), [(torch.float32, False), (torch.float64, True)]
)
def test_a_rate_in_fp32_updates_to_other_bits(
    dtype: torch.dtype, is_exact: bool
) -> None:
    """Why updates are not recorded: CUDA's fused kernels read a rate that is a tensor in fp32 alone."""

    def updated(rate: float | Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        weights = nn.Parameter(torch.randn(1000, generator=draw))
        weights.grad = torch.randn(1000, generator=draw)
        torch.optim.AdamW([weights], lr=rate, weight_decay=0.05, fused=True).step()
        return weights.detach()

    rates = [1e-3 * number / 50 for number in range(1, 50)]
    equal = [
        torch.equal(updated(r), updated(torch.tensor(r, dtype=dtype))) for r in rates
    ]
    assert all(equal) is is_exact


def test_what_is_compiled_within_a_model_is_recorded_compiled() -> None:
    """torch compiles nothing within most modes that see operations."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda tensor: tensor.sin() + 1, backend=backend)
    with RefuseExchange():
        function(torch.ones(2))
    assert compiled


# ---------------------------------------------------------------- processes, and a resume


def on_one_of(directory: Path, mode: str, graphs: bool) -> tuple[dict[str, Any], int]:
    with graphs_on_cpu():
        result, trainer, _ = run(
            directory, Net(), Images(), graphs=graphs, run__reproducibility=mode
        )
    return result, 0 if trainer.graphs is None else trainer.graphs.replays


def test_two_processes_replay_in_bitwise_mode(tmp_path: Path) -> None:
    ((expected, _),) = on_ranks(1, on_one_of, tmp_path / "1", "bitwise", graphs=False)
    for result, replays in on_ranks(
        2, on_one_of, tmp_path / "2", "bitwise", graphs=True
    ):
        assert result == expected
        assert replays > 0


def spoilt_on_one_of(directory: Path, graphs: bool) -> tuple[dict[str, Any], str]:
    """A run whose gradients are sent in several buckets; the backward of each replay gives other bits."""

    def spoil(name: str, results: list[Tensor]) -> None:
        if name == "aten.convolution_backward.default":
            results[0].view(-1)[:1].add_(1)

    exchange.BUCKET_BYTES, exchange.LAST_BUCKET_BYTES = 500, 100
    with graphs_on_cpu(GraphsOnCpu(spoil)):
        result, trainer, _ = run(
            directory,
            Net(),
            Images(),
            graphs=graphs,
            run__reproducibility="bitwise",
            batch__micro_size=14,
        )
    return result, "" if trainer.graphs is None else trainer.graphs.reason


def test_two_processes_distrust_a_replay_while_gradients_are_sent(
    tmp_path: Path,
) -> None:
    """A micro-batch for each process: eager sends its gradients while its backward goes on."""
    ((expected, _),) = on_ranks(1, spoilt_on_one_of, tmp_path / "1", graphs=False)
    for result, reason in on_ranks(2, spoilt_on_one_of, tmp_path / "2", graphs=True):
        assert result == expected
        assert reason == "a replay gives the gradient of layers.0.weight other bits"


def test_a_resume_may_replay_what_was_eager(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"run__resume": "auto", "run__name": "run"}
    expected, _, _ = run(tmp_path / "whole", Net(), Images(), graphs=False, **changes)
    run(tmp_path, Net(), Images(), graphs=False, train__max_steps=3, **changes)
    with graphs_on_cpu():
        result, trainer, _ = run(tmp_path, Net(), Images(), graphs=True, **changes)
    assert result == expected
    assert trainer.graphs is not None
    assert trainer.graphs.replays > 0
