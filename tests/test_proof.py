"""The proof finds what would make a run depend on its hardware, finds nothing else, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import unruly
from tests.distributed.small import Images, Points, config, conv_net, mlp
from tests.programs import run_program
from trainer import ConfigError, Trainer
from trainer.core.proof import prove as proving
from trainer.core.proof.generators import generators_in
from trainer.core.proof.noise import noisy_parameters
from trainer.core.proof.state import ModuleState
from trainer.exact.host_draws import mentions_host_generators

MODES = ("standard", "bitwise")


def new_trainer(
    directory: Path,
    model: nn.Module,
    data: Any = None,
    task: Any = None,
    **changes: Any,
) -> Trainer:
    """A trainer of four micro-batches a step."""
    data = Points(ignored=False) if data is None else data
    settings = {"batch__micro_size": 7, "train__epochs": 1, **changes}
    return Trainer(
        config(directory, **settings), model=model, train_data=data, task=task
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("model", "data"),
    [
        (unruly.Net, None),
        (unruly.Dropout, None),
        (unruly.LayerDropByTorch, None),
        (unruly.DrawsFromNumPy, None),
        (unruly.DrawsFromPython, None),
        (unruly.Recurrent, None),
        (unruly.Residual, Images),
        (conv_net, unruly.GlobalNoise),
    ],
)
def test_what_is_right_passes(tmp_path: Path, model: Any, data: Any, mode: str) -> None:
    trainer = new_trainer(
        tmp_path,
        model(),
        data and data(),
        run__reproducibility=mode,
        train__precision="fp32",
    )
    trainer.prove()
    assert trainer.proof.checks == [
        "samples",
        "repeat",
        "processes",
        "moved",
        "rebuild",
    ]
    assert trainer.proof.findings == []
    assert trainer.proof.notes == []


WRONG: list[tuple[str, Any, str, str]] = [
    ("repeat", unruly.NoisyLayer, "from noise on", "rng (numpy's Generator)"),
    (
        "repeat",
        unruly.OwnGenerator,
        "from the model on",
        "generator (torch's Generator)",
    ),
    ("repeat", unruly.Clock, "from the model on", "the loss"),
    ("processes", unruly.MemoryBank, "because the model keeps", "it changes bank"),
    ("processes", unruly.RunningMean, "because the model keeps", "it changes mean"),
    ("processes", unruly.Teacher, "because teacher keeps", "it changes teacher.weight"),
    ("processes", unruly.CarriedState, "because the model keeps", "it changes state"),
]


@pytest.mark.parametrize(("check", "model", "part", "cause"), WRONG)
def test_what_is_wrong_is_named(
    tmp_path: Path, check: str, model: Any, part: str, cause: str
) -> None:
    trainer = new_trainer(tmp_path, model())
    trainer.prove()
    [finding] = trainer.proof.findings
    assert finding.check == check
    assert part in finding.what
    assert cause in finding.what

    trainer = new_trainer(tmp_path, model(), run__reproducibility="bitwise")
    with pytest.raises(ConfigError, match=r"run\.reproducibility") as error:
        trainer.prove()
    assert part in str(error.value)
    assert cause in str(error.value)
    assert finding.remedy in str(error.value)


def test_a_gradient_of_the_loss_alone_is_compared(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, mlp(), task=unruly.GrowingTemperature())
    trainer.prove()
    [finding] = trainer.proof.findings
    assert finding.check == "processes"
    assert "loss/bias" in finding.what


def test_a_loss_that_draws_is_named(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, mlp(), task=unruly.NoisyLoss())
    trainer.prove()
    [finding] = trainer.proof.findings
    assert "from the loss on, which draws from generator" in finding.what


class NoisyTransform:
    """As of a library that keeps a generator in each transform."""

    def __init__(self) -> None:
        self.random_generator = np.random.default_rng(0)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.random_generator.random()


@pytest.mark.parametrize(
    ("data", "settings", "part", "cause"),
    [
        (unruly.OwnNoise, {}, "another input", "dataset.rng (numpy's Generator)"),
        (unruly.NoisyLabels, {}, "another target", "dataset.rng (random's Random)"),
        (
            Images,
            {"data__train_transforms": [{"name": f"{__name__}.NoisyTransform"}]},
            "another input",
            "random_generator (numpy's Generator)",
        ),
    ],
)
def test_data_that_draws_by_itself_is_named(
    tmp_path: Path, data: Any, settings: dict[str, Any], part: str, cause: str
) -> None:
    model = mlp() if data is unruly.NoisyLabels else conv_net()
    trainer = new_trainer(tmp_path, model, data(), **settings)
    trainer.prove()
    [finding] = trainer.proof.findings
    assert finding.check == "samples"
    assert part in finding.what
    assert cause in finding.what


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (unruly.OwnNoise, "another input each time"),
        (unruly.DiffersInWorkers, "in a loader process"),
    ],
)
def test_loader_processes_are_compared_and_used_on(
    tmp_path: Path, data: Any, part: str
) -> None:
    model = conv_net() if data is unruly.OwnNoise else mlp()
    trainer = new_trainer(
        tmp_path,
        model,
        data(),
        data__workers=2,
        loss__ignore_index=-1,
        train__max_steps=2,
    )
    trainer.prove()
    [finding] = trainer.proof.findings
    assert part in finding.what
    batches = trainer.batches
    trainer.start()
    assert trainer.batches is batches  # the processes that the proof has looked at
    trainer.train_step(trainer.plan.step(0))
    trainer.end_loading()


def test_loader_processes_of_right_data_differ_in_nothing(tmp_path: Path) -> None:
    weights = []
    for workers in (0, 2):
        trainer = new_trainer(
            tmp_path,
            unruly.Residual(),
            unruly.GlobalNoise(),
            data__workers=workers,
            train__max_steps=3,
        )
        summary = trainer.fit()
        assert summary["proof"]["findings"] == []
        weights.append(summary["weights_sha256"])
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (unruly.Residual, Images),
        (unruly.OwnGenerator, Points),
        (unruly.MemoryBank, Points),
        (unruly.Teacher, Points),
        (unruly.DrawsFromNumPy, Points),
        (conv_net, unruly.OwnNoise),
    ],
)
def test_it_leaves_no_trace(tmp_path: Path, model: Any, data: Any) -> None:
    """Not even where the model or the data is at fault: weights and buffers are those of a run without the proof."""
    hashes = []
    for proof in ("on", "off"):
        summary = new_trainer(
            tmp_path, model(), data(), run__proof=proof, loss__ignore_index=-1
        ).fit()
        hashes.append([summary[n] for n in ("weights_sha256", "buffers_sha256")])
    assert hashes[0] == hashes[1]


def test_a_finding_is_shown_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = new_trainer(tmp_path, unruly.OwnGenerator()).fit()
    lines = capsys.readouterr().out.splitlines()
    [warning] = [line for line in lines if line.startswith("warning")]
    assert "repeat: a micro-batch run twice" in warning
    assert any(line.startswith("proof") and "1 of them" in line for line in lines)
    kept = json.loads(Path(tmp_path, "run", "summary.json").read_text())["proof"]
    assert kept == summary["proof"]
    assert kept["checks"] == ["samples", "repeat"]
    assert [finding["check"] for finding in kept["findings"]] == ["repeat"]


def test_strict_refuses_in_standard_mode_before_the_run_directory(
    tmp_path: Path,
) -> None:
    trainer = new_trainer(tmp_path, unruly.MemoryBank(), run__proof="strict")
    with pytest.raises(ConfigError, match=r"run\.proof: strict refuses .*\n.*bank"):
        trainer.fit()
    assert not Path(tmp_path, "run").exists()


def test_off_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = new_trainer(
        tmp_path, unruly.MemoryBank(), run__proof="off", run__reproducibility="bitwise"
    )
    assert trainer.fit()["proof"] == {"checks": [], "findings": []}
    assert "off: nothing was tried" in capsys.readouterr().out


def test_a_slow_model_is_tried_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "TIME_LIMIT", 0.0)
    trainer = new_trainer(tmp_path, unruly.Net())
    trainer.prove()
    assert trainer.proof.checks == ["samples"]
    assert [line[:37] for line in trainer.proof.skipped] == [
        "repeat skipped: a micro-batch takes 0",
        "processes skipped: a micro-batch take",
        "moved skipped: a micro-batch takes 0.",
        "rebuild skipped: a micro-batch takes ",
    ]


def test_what_cannot_be_tried_is_left_to_the_first_step(tmp_path: Path) -> None:
    """Here a model needs what an observer gives it once the run begins."""
    trainer = new_trainer(tmp_path, unruly.Net())
    trainer.module.between = None
    trainer.prove()
    assert trainer.proof.checks == ["samples"]
    assert "repeat skipped: TypeError" in trainer.proof.skipped


def test_one_micro_batch_has_nothing_to_part(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, unruly.MemoryBank(), batch__micro_size=28)
    trainer.prove()
    [finding] = trainer.proof.findings
    assert finding.check == "rebuild"
    assert "no checkpoint has bank" in finding.what


def test_a_bias_before_batch_norm_is_noted(tmp_path: Path) -> None:
    for optimizer, notes in (("adam", 1), ("sgd", 0)):
        trainer = new_trainer(
            tmp_path,
            conv_net(),
            Images(),
            optimizer__name=optimizer,
            optimizer__momentum=None,
        )
        trainer.prove()
        assert trainer.proof.findings == []
        assert len(trainer.proof.notes) == notes
        assert all("0.bias is rounding noise" in note for note in trainer.proof.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_rounding_counts_as_noise(dtype: torch.dtype) -> None:
    net = conv_net().to(dtype)
    net(torch.randn(16, 2, 5, 5, dtype=dtype)).square().sum().backward()
    assert noisy_parameters(net) == ["0.bias"]
    net[1].eval()
    net.zero_grad()
    net(torch.randn(16, 2, 5, 5, dtype=dtype)).square().sum().backward()
    assert noisy_parameters(net) == []


def test_a_state_is_put_back_and_its_changes_are_named() -> None:
    model = unruly.CarriedState().double()
    model.list = [torch.zeros(2), {"a": 1}]
    model.register_buffer("count", torch.zeros(1))
    state = ModuleState(model)
    assert state.changes() == []
    model(torch.randn(3, 6, dtype=torch.float64))
    model.list[0] += 1
    model.list[1]["a"] = 2
    model.list.append(3)
    model.count = torch.ones(2)
    model.last.weight.data = model.last.weight.data + 1
    assert sorted(state.changes()) == ["count", "last.weight", "list", "state"]
    state.restore()
    assert state.changes() == []
    assert "state" not in vars(model)
    assert [model.list[0].tolist(), model.list[1:]] == [[0, 0], [{"a": 1}]]


def test_a_state_may_hold_anything() -> None:
    """What cannot be copied or written is left as it is."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Identity())
    model.register_buffer("wide", torch.zeros(1).expand(5))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.parent = [model]
    model.parent.append(model.parent)
    model.function = lambda: model
    model.rng = {"of numpy": np.random.default_rng(0)}
    state = ModuleState(model)
    state.restore()
    assert state.changes() == []
    assert [*generators_in(model)] == ["rng['of numpy']"]


def test_code_says_whether_it_draws_on_the_host() -> None:
    assert mentions_host_generators(unruly.LayerDropLater())
    assert mentions_host_generators(nn.Sequential(unruly.DrawsFromNumPy()))
    for model in (unruly.Dropout(), unruly.LayerDropByTorch(), conv_net()):
        assert not mentions_host_generators(model)


def test_draws_on_the_host_are_refused_where_fused(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, unruly.DrawsFromPython(), batch__fuse=2)
    with pytest.raises(ConfigError, match=r"batch\.fuse: .*draws from `random`"):
        trainer.fit()
    for model in (unruly.DrawsFromPython(), unruly.LayerDropLater()):
        trainer = new_trainer(tmp_path, model, batch__fuse="auto", train__max_steps=2)
        trainer.fit()
        assert trainer.fuse == 1
        assert "random" in trainer.fuse_note


class OneBuffer(Points):
    """Reads every sample into the same memory."""

    def __init__(self) -> None:
        super().__init__(ignored=False)
        self.buffer = torch.empty_like(super().__getitem__(0)[0])

    def __getitem__(self, index: int) -> Any:
        point, target = super().__getitem__(index)
        return self.buffer.copy_(point), target


def test_a_sample_that_the_next_one_overwrites_is_named(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, mlp(), OneBuffer())
    first = int(trainer.plan.permutation(0)[0])
    trainer.prove()
    [finding] = trainer.proof.findings
    assert f"train sample {first} changes when another one is fetched" in finding.what


def test_check_tries_more_samples(tmp_path: Path) -> None:
    data = unruly.LateNoise()
    trainer = new_trainer(tmp_path, mlp(), data, loss__ignore_index=-1)
    data.noisy = {int(trainer.plan.permutation(0)[20])}
    trainer.prove()
    assert trainer.proof.findings == []
    trainer.prove(thorough=True)
    [finding] = trainer.proof.findings
    assert f"train sample {min(data.noisy)} " in finding.what


def test_check_shows_what_the_proof_says(tmp_path: Path) -> None:
    command = ["-m", "trainer", "check", "configs/digits.yaml", f"run.dir={tmp_path}"]
    done = run_program([*command, "wandb.mode=disabled"])
    assert done.returncode == 0, done.stderr
    assert ": samples, repeat" in done.stdout
