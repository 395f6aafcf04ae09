"""`train.profile`: which steps it looks at, where it says their time goes, and that it changes nothing."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import on_ranks
from tests.distributed.small import HASHES, Points, config, mlp
from trainer import ConfigError, LockstepError, Observer, Trainer
from trainer.__main__ import main
from trainer.core.observers import Observers
from trainer.core.profile.begin import add_profile
from trainer.core.profile.intervals import (
    Intervals,
    contains,
    intersect,
    length,
    subtract,
    union,
)
from trainer.core.profile.observer import ProfileObserver
from trainer.core.profile.report import StepProfile, advice, combine, table
from trainer.core.profile.trace import OPERATOR, PRODUCT, Span, TracedStep, measure
from trainer.core.profile.windows import WARM_UP_STEPS, find_windows
from trainer.core.timetable import Timetable
from trainer.exact.plan import Plan
from trainer.process.activity import activity

ROOT = Path(__file__).parents[1]
SLEEP = 0.004


class SlowPoints(Points):
    """Each sample takes `SLEEP` seconds, on the ranks that are slow."""

    def __init__(self, samples: int, *, is_slow: bool = True) -> None:
        super().__init__(samples, ignored=False)
        self.is_slow = is_slow

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.is_slow:
            time.sleep(SLEEP)
        return super().__getitem__(i)


class Failing(Observer):
    def __init__(self, fail_after: int) -> None:
        self.fail_after = fail_after

    def step(self, step: Any) -> None:
        if step.number == self.fail_after:
            raise LockstepError("as told")


def moments(intervals: Intervals) -> set[int]:
    """The whole numbers in them: all there is, where bounds are whole."""
    return {m for start, end in intervals for m in range(int(start), int(end))}


def test_intervals_are_sets_of_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sets = []
        for _ in range(2):
            pairs = torch.randint(0, 20, (4, 2), generator=generator).sort(1).values
            raw = [(float(a), float(b)) for a, b in pairs.tolist()]
            assert moments(union(raw)) == moments(raw)
            sets.append(union(raw))
        first, second = sets
        assert moments(subtract(first, second)) == moments(first) - moments(second)
        assert moments(intersect(first, second)) == moments(first) & moments(second)
        assert length(first) == len(moments(first))
        for moment in range(20):
            assert contains(first, moment) == (moment in moments(first))


@pytest.mark.parametrize("every", [None, 7])
@pytest.mark.parametrize("count", [3, 5, 6, 8, 9])
def test_nothing_is_evaluated_or_saved_within_a_window(
    tmp_path: Path, every: int | None, count: int
) -> None:
    section = config(tmp_path, train__epochs=4, train__checkpoint_every=every).train
    plan = Plan(samples=100, batch_size=12, micro_size=12, ranks=1, epochs=4, seed=0)
    timetable = Timetable(section, plan, has_validation=True)
    windows = find_windows(plan, timetable, steps_done=2, count=count)
    longest = 9 if every is None else 7
    # The profiler starts a step before those that count.
    longest -= 1
    if count > longest:
        assert windows is None
        return
    assert windows is not None
    for (first, last), after in (
        (windows.timed, 2 + WARM_UP_STEPS),
        (windows.traced, windows.timed[1] + 1),
    ):
        assert last - first + 1 == count
        assert first > after
        begin = first if first == windows.timed[0] else first - 1
        for number in range(begin, last):
            step = plan.step(number - 1)
            assert not timetable.is_evaluated(step)
            assert not timetable.is_checkpointed(step)


def test_products_are_told_from_other_operators() -> None:
    products = "aten::mm aten::addmm aten::bmm aten::convolution_backward aten::linear aten::cudnn_convolution"
    others = "aten::add_ aten::comm aten::native_batch_norm aten::to aten::upsample_bilinear2d aten::_foreach_mul_"
    assert all(PRODUCT.search(name) for name in products.split())
    assert not any(PRODUCT.search(name) for name in others.split())


def test_operators_are_told_from_what_stands_around_them() -> None:
    operators = ["aten::relu", "torchvision::nms", "fsdp::all_gather_copy_in"]
    around = [
        "autograd::engine::evaluate_function: MmBackward0",
        "torch::autograd::AccumulateGrad",
        "c10d::allreduce_",
        "FSDP::pre_forward (0)",
        "MmBackward0",
        "Optimizer.step#SGD.step",
    ]
    assert all(OPERATOR.match(name) for name in operators)
    assert not any(OPERATOR.match(name) for name in around)


def phase(name: str, start: float, end: float) -> Span:
    return Span("phase", f"lockstep: {name}", start, end)


def test_a_trace_of_a_gpu_is_added_up() -> None:
    """Two steps in 20 s: 6 s of products and 2 of others, 3 of exchange of which 1 is hidden, 2 s of loading."""
    spans = [
        Span("operator", "aten::mm", -2, -1, own=1, on_device=9),  # of a step before
        Span("kernel", "gemm", -2, -1),
        phase("the loader", 0, 3),
        phase("forward and backward", 3, 15),
        phase("the end of the step", 15, 20),
        Span("operator", "aten::mm", 3, 4, own=1, on_device=6),
        Span("operator", "aten::relu", 4, 5, own=1, on_device=2),
        Span("kernel", "gemm", 1, 7),  # 2 s of loading are hidden behind the one before
        Span("kernel", "relu", 8, 10),
        Span("collective", "ncclDevKernel_AllReduce", 9, 12),
        Span("exchange", "gloo:all_reduce", 0, 20),  # a vote on the host
        Span("wait", "cudaStreamSynchronize", 13, 14),
    ]
    traced = measure(spans, steps=2)
    assert traced.has_device
    assert (traced.seconds, traced.loading) == (10, 0.5)
    assert (traced.products, traced.others) == (3, 1)
    assert traced.communication == 1
    assert traced.host == 10 - 0.5 - 4 - 1
    assert (traced.launches, traced.host_waits) == (1, 0.5)
    # Without the profiler a step took 7 s: what a GPU does stays, and the host has the rest.
    profile = combine(7, 3, 1, traced)
    assert profile.seconds == 7
    assert profile.host == 7 - 0.5 - 4 - 1


def test_a_trace_of_a_cpu_is_added_up() -> None:
    spans = [
        phase("the loader", 0, 2),
        phase("forward and backward", 2, 8),
        phase("the exchange of gradients", 8, 10),
        Span("operator", "aten::stack", 0, 1, own=1),  # of the loader
        Span("operator", "aten::linear", 2, 5, own=1),
        Span("operator", "aten::addmm", 3, 5, own=2),
        Span("operator", "aten::tanh", 6, 7, own=1),
        Span("exchange", "gloo:all_reduce", 4, 9),
    ]
    traced = measure(spans, steps=1)
    assert not traced.has_device
    assert (traced.loading, traced.products, traced.others) == (2, 3, 1)
    assert traced.communication == 3  # 5 to 6 and 7 to 9
    assert traced.host == 1
    # Half of what is not the loader's was the profiler's.
    profile = combine(2 + 4, 2, 1, traced)
    parts = (profile.products, profile.others, profile.communication, profile.host)
    assert parts == (1.5, 0.5, 1.5, 0.5)
    # 2.5 s were neither the loader's nor the exchange's, and the thread ran for 1 s.
    assert profile.held_up == 1.5


def step_profile(
    *, has_device: bool = True, on_core: float | None = None, **parts: float
) -> StepProfile:
    parts = (
        dict.fromkeys(("loading", "products", "others", "communication", "host"), 0.0)
        | parts
    )
    seconds = sum(parts.values())
    traced = TracedStep(
        seconds=seconds,
        has_device=has_device,
        launches=100,
        host_waits=3,
        largest=[],
        **parts,
    )
    on_core = seconds if on_core is None else on_core
    return combine(seconds, parts["loading"], on_core, traced)


@pytest.mark.parametrize(
    ("profile", "changes", "said", "unsaid"),
    [
        (
            step_profile(products=9, host=1),
            {"train__precision": "fp32"},
            ["bf16", "train.tf32=true", "train.cudnn_benchmark=true"],
            "reduce-overhead",
        ),
        (
            step_profile(products=9, host=1),
            {"train__precision": "bf16", "run__reproducibility": "bitwise"},
            ["nothing else holds it up"],
            "train.",
        ),
        (
            step_profile(products=4, host=6),
            {"train__compile": True},
            ["train.compile=reduce-overhead"],
            "train.compile=true",
        ),
        (
            step_profile(loading=5, products=5),
            {"data__name": "folder", "data__workers": 3},
            ["raise data.workers (3)", "data.cache=decoded"],
            "set data.workers",
        ),
    ],
)
def test_advice_names_only_keys_that_can_help(
    tmp_path: Path,
    profile: StepProfile,
    changes: dict[str, Any],
    said: list[str],
    unsaid: str,
) -> None:
    (line,) = advice([profile], config(tmp_path, **changes), "cuda")
    assert all(text in line for text in said)
    assert unsaid not in line


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ([step_profile(loading=4, products=6)], ["waiting for data takes 40%"]),
        (
            [step_profile(products=4, host=6)],
            ["the cuda waits 60% of a step for the host", ".item()"],
        ),
        (
            [step_profile(products=4, host=6, has_device=False)],
            ["Python between operators takes 60%"],
        ),
        ([step_profile(products=2, others=8)], ["bound by memory", "take 80%"]),
        (
            [step_profile(products=7, communication=3)] * 2,
            ["the exchange between processes takes 30%"],
        ),
        (
            [
                step_profile(products=5, communication=5),
                step_profile(products=9, communication=1),
            ],
            ["10% to 50%", "the others wait for rank 1"],
        ),
        (
            [step_profile(products=10), step_profile(products=5, loading=5)],
            ["waiting for data takes 50% of a step on rank 1"],
        ),
        (
            [step_profile(products=9, host=1, has_device=False, on_core=7)],
            ["for 30% of a step there was no core"],
        ),
        ([step_profile(products=9, others=1)], ["computing takes 100%"]),
    ],
)
def test_advice_names_what_holds_a_step_up(
    tmp_path: Path, profiles: list[StepProfile], said: list[str]
) -> None:
    lines = advice(profiles, config(tmp_path), "cuda")
    assert len(lines) == 1
    for text in said:
        assert text in lines[0]
    assert len(table(profiles, samples=10)) >= 6


def test_advice_leaves_out_a_cache_that_is_there(tmp_path: Path) -> None:
    loading = [step_profile(loading=4, products=6)]
    folder = config(tmp_path, data__name="folder")
    assert "data.cache" in advice(loading, folder, "cpu")[0]
    cached = config(
        tmp_path,
        data__name="folder",
        data__cache="decoded",
        data__cache_dir=str(tmp_path),
    )
    (line,) = advice(loading, cached, "cpu")
    assert "data.cache" not in line


def profiled(directory: Path, rank_is_slow: list[bool], **changes: Any) -> list[Any]:
    """A run on as many ranks; each returns its hashes, the profile of every rank, and the first advice."""
    settings = config(
        directory,
        run__proof="off",
        batch__micro_size=4,
        batch__size=8,
        train__precision="fp32",
        train__epochs=1,
        train__log_every=10,
        **changes,
    )

    return on_ranks(len(rank_is_slow), _profile_on_rank, settings, rank_is_slow)


def _profile_on_rank(settings: Any, rank_is_slow: list[bool]) -> Any:
    rank = int(os.environ.get("RANK", "0"))
    data = SlowPoints(36 * 8, is_slow=rank_is_slow[rank])
    trainer = Trainer(settings, model=mlp(), train_data=data)
    summary = trainer.fit()
    profiles: list[StepProfile] = []
    for observer in trainer.observers:
        if isinstance(observer, ProfileObserver):
            profiles = observer.profiles
    said = advice(profiles, trainer.config, "cpu") if profiles else []
    return {name: summary[name] for name in HASHES}, profiles, said


def test_a_run_is_the_same_with_it_and_its_loader_is_found_out(tmp_path: Path) -> None:
    ((hashes, none, _),) = profiled(tmp_path / "plain", [True])
    ((profiled_hashes, profiles, said),) = profiled(
        tmp_path / "profiled", [True], train__profile=5
    )
    assert hashes == profiled_hashes
    assert not none
    (profile,) = profiles
    assert profile.loading > 8 * SLEEP
    assert "waiting for data" in said[0]
    directory = tmp_path / "profiled" / "run" / "profile"
    assert "advice: waiting for data takes" in (directory / "profile.txt").read_text()
    with gzip.open(directory / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # Two micro-batches in each of five steps.
    assert names.count("lockstep: the loader") == 10
    assert "aten::addmm" in names


def test_the_slow_rank_of_two_is_named_and_the_other_waits(tmp_path: Path) -> None:
    results = profiled(tmp_path, [False, True], train__profile=5)
    (hashes, profiles, said), (other_hashes, other_profiles, _) = results
    assert hashes == other_hashes
    assert profiles == other_profiles
    fast, slow = profiles
    assert slow.loading > 4 * SLEEP > fast.loading
    assert fast.communication > slow.communication
    assert any("on rank 1" in line for line in said)
    assert any("the others wait for rank 1" in line for line in said)


def test_a_run_that_fails_while_it_is_traced_leaves_no_profiler_behind(
    tmp_path: Path,
) -> None:
    settings = config(
        tmp_path, run__proof="off", batch__size=4, train__profile=5, train__epochs=1
    )
    data = Points(36 * 4, ignored=False)
    failing = Trainer(
        settings, model=mlp(), train_data=data, observers=[Failing(fail_after=17)]
    )
    with pytest.raises(LockstepError, match="as told"):
        failing.fit()
    assert activity.listener is None
    Trainer(settings, model=mlp(), train_data=data).fit()
    assert (tmp_path / "run" / "profile" / "trace.json.gz").is_file()


def test_a_session_that_is_too_short_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, run__proof="off", train__profile=5)
    Trainer(settings, model=mlp(), train_data=Points(ignored=False)).fit()
    assert "it needs a session of 13 steps or more" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()


def test_a_run_that_ends_before_its_profile_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        tmp_path, run__proof="off", batch__size=4, train__profile=5, train__epochs=1
    )
    stopping = Failing(fail_after=17)
    data = Points(36 * 4, ignored=False)
    with pytest.raises(LockstepError, match="as told"):
        Trainer(settings, model=mlp(), train_data=data, observers=[stopping]).fit()
    assert (
        "no profile: the run ended before step 21 was done (steps "
        in capsys.readouterr().out
    )


def test_a_trace_too_large_to_look_at_is_refused(tmp_path: Path) -> None:
    config(tmp_path, train__profile=100)
    with pytest.raises(ConfigError, match=r"train\.profile: 101 is more than 100"):
        config(tmp_path, train__profile=101)


def test_the_command_prints_and_keeps_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "profile",
        str(ROOT / "configs/digits.yaml"),
        f"run.dir={tmp_path / 'runs'}",
        "batch.micro_size=64",
        "train.epochs=1",
    ]
    assert main([*command, "--out", str(tmp_path), "--steps=3"]) == 0
    report = (tmp_path / "profile" / "profile.txt").read_text()
    assert report in capsys.readouterr().out
    assert "convolutions and matrix products" in report
    assert not (tmp_path / "runs").exists()
    assert main([*command, "--steps=10"]) == 2
    said = capsys.readouterr().err
    assert "10 needs 31 steps of training, and the run has 23" in said


def test_a_place_that_is_no_folder_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        command = ["profile", str(ROOT / "configs/digits.yaml"), "--out", str(out)]
        assert main(command) == 2
        assert f"--out: {file} is a file; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"train__max_steps": 4}, "a session of 13 steps or more, and this one has 4"),
        ({"train__max_steps": 18}, "lower train.profile to 3"),
        ({"train__checkpoint_every": 1}, "make both rarer (train.evaluate_every"),
    ],
)
def test_what_helps_where_no_steps_can_be_profiled(
    changes: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    settings = config(tmp_path, train__epochs=1, train__profile=5, **changes)
    plan = Plan(
        samples=400,
        batch_size=12,
        micro_size=12,
        ranks=1,
        epochs=1,
        seed=0,
        max_steps=settings.train.max_steps,
    )
    timetable = Timetable(settings.train, plan, has_validation=True)
    observer, line = add_profile(
        Observers([]),
        SimpleNamespace(config=settings, plan=plan),  # type: ignore[arg-type]
        timetable,
        steps_done=0,
        directory=tmp_path,
        note=print,
    )
    assert observer is None
    assert advice in line
