"""The benchmarks run, take turns as they say, and leave no line out. Nothing here judges a time."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models import mobilenet_v3_small

from benchmarks import fuse, loops, resnet, scale, step_time
from benchmarks.gpu import recipe
from benchmarks.gpu.check import Answer, Check, Setting, T, Unanswered
from benchmarks.gpu.checks import CHECKS, check_named
from benchmarks.gpu.isolation import Failure, run_isolated
from benchmarks.gpu.report import Report, row_of
from benchmarks.processes import allow_fork
from benchmarks.subjects import first_digits, fitted, settings
from benchmarks.timing import LOCKSTEP, InterleavedTrainer, Rounds, quartiles
from tests.device_decoders import device_that_decodes, stand_in
from tests.distributed.ranks import on_ranks
from tests.distributed.small import largest_difference, state
from tests.programs import run_program
from tests.recorded_graphs import graphs_on_cpu
from tests.test_configs import image_folder
from trainer.exact.refused import RefusedOperations

ROOT = Path(__file__).parents[1]

MODULES = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"
)

LOOPS = [
    "raw",
    LOCKSTEP,
    *step_time.VARIANTS,
    *(name for name, _, _ in step_time.PEERS),
]


def run(module: str, *arguments: str) -> str:
    result = run_program(["-m", f"benchmarks.{module}", *arguments], timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_step_time_prints_and_saves_every_line(tmp_path: Path) -> None:
    printed = run(
        "step_time",
        "--steps",
        "2",
        "--rounds",
        "2",
        "--save",
        str(tmp_path / "new" / "table.md"),
    )
    saved = (tmp_path / "new" / "table.md").read_text()
    assert printed.strip() == saved.strip()
    tables = [part.splitlines() for part in saved.split("\n\n") if part.startswith("|")]
    assert len(tables) == len(step_time.workloads())
    absent = [name for name, _, package in step_time.PEERS if not find_spec(package)]
    for table in tables:
        rows = {
            cells[0]: cells[1:]
            for line in table[2:]
            if (cells := [c.strip() for c in line.strip("|").split("|")])
        }
        assert list(rows) == LOOPS
        for name, (microseconds, ratio, spread, cpu_ratio) in rows.items():
            if name in absent:
                assert microseconds == "not installed"
            else:
                assert (
                    min(
                        float(microseconds),
                        float(ratio),
                        float(spread.split()[0]),
                        float(cpu_ratio),
                    )
                    > 0
                )
    for fact in ("torch", "accelerate", "Python", "1 thread"):
        assert fact in saved


@pytest.mark.slow
def test_fuse_prints_and_saves_every_line(tmp_path: Path) -> None:
    printed = run(
        "fuse",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--save",
        str(tmp_path / "new" / "table.md"),
    )
    saved = (tmp_path / "new" / "table.md").read_text()
    assert printed.strip() == saved.strip()
    for workload, _ in fuse.subjects():
        assert f"## {workload.name}" in saved
    for name in (fuse.BASE, *(f"fuse={k}" for k in fuse.FUSED)):
        assert saved.count(f"| {name} |") == len(fuse.subjects())


def test_rounds_interleave_and_fit_is_whole(tmp_path: Path) -> None:
    """Each loop makes its steps in its turn, and the interrupted run ends as one that nothing interrupts."""

    def interleaved(
        directory: Path,
    ) -> tuple[list[str], dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
        events: list[str] = []

        def loop(name: str) -> Iterator[None]:
            while True:
                events.append(name)
                yield

        class Counted(InterleavedTrainer):
            def train_step(self, step: object) -> None:
                super().train_step(step)  # type: ignore[arg-type]
                events.append("o")

        rounds = Rounds(count=2, steps=3)
        model, data = step_time.mlp, first_digits(64 * rounds.total_steps)
        plain = fitted(settings(directory / "plain"), model, data)
        torch.manual_seed(0)
        trainer = Counted(
            settings(directory / "interleaved"), model=model(), train_data=data
        )
        seconds = trainer.fit_with({"a": loop("a"), "b": loop("b")}, rounds)
        return (
            events,
            {name: len(times) for name, times in seconds.items()},
            state(trainer),
            state(plain),
        )

    ((events, counts, ours, plain),) = on_ranks(1, interleaved, tmp_path)
    assert (
        "".join(events) == "aaabbb" + "ooo" + "bbbaaa" + "ooo" + "aaabbb" + "ooo" + "o"
    )
    assert counts == {"a": 2, "b": 2, LOCKSTEP: 2}
    assert largest_difference(ours, plain) == 0


def test_every_loop_trains(tmp_path: Path) -> None:
    """Two epochs of each loop bring the loss down: none of them saves time by leaving the work out."""

    def losses(directory: Path) -> dict[str, float]:
        from trainer.process.ranks import Ranks

        ranks, data = Ranks("fp32"), first_digits(640)
        inputs, targets = data.images.float() / 255, data.targets
        result = {}
        for name, loop, package in [("raw", loops.raw, "torch"), *step_time.PEERS]:
            if find_spec(package):
                model = step_time.mlp()
                sgd = {"lr": 0.05, "momentum": 0.9}
                work = loops.Work(lambda model=model: model, data, 64, 8, sgd, ranks)  # type: ignore[misc]
                steps = loop(work)
                for _ in range(20):
                    next(steps)
                result[name] = float(
                    torch.nn.functional.cross_entropy(model(inputs), targets)
                )
                assert int(model[2].num_batches_tracked) == 20 * 8 + 1  # type: ignore[arg-type, index, union-attr]
        return result

    (reached,) = on_ranks(1, losses, tmp_path)
    assert {"raw", "Accelerate's guide"} <= reached.keys()
    assert all(loss < 0.5 for loss in reached.values()), reached


def test_quartiles_are_of_each_rounds_own_ratio() -> None:
    clocks = [torch.tensor([t, 2 * t]).numpy() for t in (1.0, 10.0, 100.0)]
    seconds = {
        "raw": clocks,
        LOCKSTEP: [clocks[0] * 2, clocks[1] * 1.5, clocks[2] * 1.1],
    }
    assert quartiles(seconds, LOCKSTEP, "raw")[1].tolist() == pytest.approx([1.5, 1.5])


def gpu(
    *arguments: str,
    without: tuple[str, ...] = (),
    tmp_path: Path | None = None,
    hide: bool = True,
) -> tuple[int, str, str]:
    """Exit status and output of the GPU report where a GPU is hidden, and where some packages are not installed."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide else {})
    if tmp_path is not None:
        (tmp_path / "sitecustomize.py").write_text(NOT_INSTALLED.format(without))
        paths = (tmp_path, ROOT)
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


# Python imports a module of this name when it starts, in every process.
NOT_INSTALLED = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_installed(name, path=None, target=None):
    return None if name.split(".")[0] in {!r} else find_spec(name, path, target)
PathFinder.find_spec = staticmethod(find_installed)  # some call it on an object
"""


@pytest.mark.fresh_process
@pytest.mark.slow
def test_gpu_report_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    """Every check that can run does, without what a machine with a GPU may lack, and both files say the same."""
    absent = ("wandb", "omegaconf", "matplotlib", "sklearn")
    status, printed, errors = gpu(
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "new"),
        without=absent,
        tmp_path=tmp_path,
    )
    assert status == 0, printed + errors
    (saved,) = (tmp_path / "new").glob("*.json")
    report = json.loads(saved.read_text())
    rows = {row["name"]: row for row in report["checks"]}
    assert list(rows) == [check.name for check in CHECKS]
    for check in CHECKS:
        row = rows[check.name]
        expected = ("pass", "open") if check.is_correctness else ("rehearsed", "open")
        assert row["result"] in expected, row
        assert f"{check.name}: {row['text']}" in printed
        assert (
            f"**{row['result']}**: {row['text']}"
            in saved.with_suffix(".md").read_text()
        )
    assert "only a GPU can answer" in rows["host-waits"]["text"]
    assert rows["hashes-resnet18"]["result"] == "pass"
    assert rows["resnet50"]["values"]["raw_images_per_second"] > 0
    assert report["machine"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.fresh_process
@pytest.mark.slow
def test_gpu_report_says_what_is_not_installed(tmp_path: Path) -> None:
    lacking = gpu("--list", without=("accelerate", "rich"), tmp_path=tmp_path)
    assert lacking[0] == 2
    assert "nothing runs without: accelerate, rich;" in lacking[2]
    assert lacking[2].count("\n") == 1
    status, printed, _ = gpu(
        *("--device", "cpu", "--only", "jpeg", "--only", "tiny-net"),
        without=("torchvision",),
        tmp_path=tmp_path,
    )
    assert status == 0
    assert "- rehearsed tiny-net:" in printed
    assert "- open jpeg: torchvision, which decodes images, is not inst" in printed


def test_without_a_gpu_one_line_says_so() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    printed = run_program(["-m", "benchmarks.gpu"], env=environment)
    assert printed.returncode == 0
    assert printed.stdout.startswith("no CUDA GPU here")
    assert printed.stdout.count("\n") == 1


class AsOnGpu(Setting):
    """The CPU, in the place of a GPU, with a rehearsal's sizes."""

    @property
    def on_gpu(self) -> bool:
        return True

    def pick(self, full: T, quick: T, rehearsal: T) -> T:
        return rehearsal


def answer_as_on_gpu(name: str, directory: Path) -> Answer:
    allow_fork()
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.max_memory_allocated = lambda *_: 1000  # type: ignore[assignment]
    Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[assignment, method-assign]
    with (
        device_that_decodes(),
        patch("benchmarks.gpu.device_decoding.file_decoder", stand_in),
        graphs_on_cpu(),
    ):
        return check_named(name).answer(AsOnGpu("cpu", False, directory))


@pytest.mark.parametrize(
    ("name", "passed", "text"),
    [
        ("copy-overlap", None, "% of the shorter one is hidden: copies "),
        ("memory-resnet18", None, "1.0000 × the raw loop's (0 and 0 MiB), within"),
        ("max-pool-backward", True, "the same in 4 of 4"),
        ("backward", True, "by the engine alone: 8 gradients, the same bits"),
        ("jpeg", None, " by the GPU"),
        (
            "device-decoding",
            True,
            "a stand-in: 0 of 3 images differ alone, 1 are refused",
        ),
        ("device-decoding-pace", None, " decoded by the GPU, 2 workers"),
        ("graphs-two-processes", True, "micro-batches were replayed; largest"),
        ("host-waits", False, "torch does not report a wait that is there"),
    ],
)
def test_what_only_a_gpu_answers_is_put_in_words(
    name: str, passed: bool | None, text: str, tmp_path: Path
) -> None:
    (answer,) = on_ranks(1, answer_as_on_gpu, name, tmp_path)
    assert answer.passed is passed
    assert text in answer.text
    json.dumps(answer.values)


@pytest.mark.parametrize(
    ("folders", "data"),
    [
        (["cifar-10-batches-py"], {}),
        (["train", "test"], {"data.name": "folder", "data.val_folder": "test"}),
    ],
)
def test_the_recipe_takes_cifar_10_as_it_lies_there(
    folders: list[str], data: dict[str, str], tmp_path: Path
) -> None:
    images, own = tmp_path / "images", tmp_path / "own"
    setting = Setting("cpu", False, own, images)
    with pytest.raises(Unanswered, match="images has neither cifar-10-batches-py nor"):
        recipe.cifar10_fast(setting)
    for folder in folders:
        (images / folder).mkdir(parents=True)
    assert recipe.data_of(setting) == {"data.root": str(images), **data}


def hang(pid_file: Path) -> None:
    if os.fork() == 0:
        pid_file.write_text(str(os.getpid()))
    time.sleep(60)


def fail() -> None:
    raise ValueError("of its own\nand more")


def end_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_check_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    """An error, a crash and a hang are a row each; a hang's processes are ended."""
    log, pid_file = tmp_path / "log", tmp_path / "pid"
    results = {
        "fail": run_isolated(fail, limit=60, log=log),
        "end_by_signal": run_isolated(end_by_signal, limit=60, log=log),
        "hang": run_isolated(hang, pid_file, limit=10, log=log),
    }
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 180
    while is_running(pid):  # a kill takes a moment on a busy machine
        assert time.monotonic() < deadline
        time.sleep(0.05)
    texts = {}
    for name, result in results.items():
        check = Check(name, "?", lambda _: Answer(""), True, 1)
        row = row_of(check, result, 0.0, on_gpu=True)
        assert row.breaks_promise
        texts[name] = row.text
    assert texts == {
        "fail": "ValueError: of its own",
        "end_by_signal": "its process ended with SIGSEGV",
        "hang": "not done within 10 s",
    }


@pytest.mark.parametrize(
    ("is_correctness", "result", "broken"),
    [
        (True, Answer("", passed=False), True),
        (True, Answer("", passed=True), False),
        (True, Unanswered("no package"), False),
        (False, Failure("slow"), False),
    ],
)
def test_only_a_check_of_correctness_breaks_the_promise(
    is_correctness: bool, result: object, broken: bool, tmp_path: Path
) -> None:
    check = Check("name", "?", lambda _: Answer(""), is_correctness, 1)
    report = Report({"device": "H", "torch": "2"}, {"device": "cuda"}, tmp_path)
    report.add(row_of(check, result, 1.0, on_gpu=True))
    assert report.rows[0].breaks_promise == broken
    assert ("not correct or not known to be: name" in report.summary()) == broken
    (page,) = tmp_path.glob("*-gpu-h-torch-2.md")
    assert report.summary() in page.read_text()


def test_the_readme_says_whether_a_gpu_was_tried() -> None:
    results = [*(ROOT / "docs" / "results").glob("*-gpu-*.md")]
    says_none = "No GPU has been tried yet" in (ROOT / "README.md").read_text()
    assert says_none == (not results)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_own_resnets_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    own = getattr(resnet, name)(num_classes=7).eval()
    theirs = getattr(torchvision.models, name)(num_classes=7).eval()
    state = theirs.state_dict()
    assert len(state) == len(own.state_dict())
    own.load_state_dict(dict(zip(own.state_dict(), state.values(), strict=True)))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(own(images), theirs(images))
    watch = RefusedOperations(own)
    with watch.watching():
        own.train()(images).sum().backward()
    assert not watch.messages()  # CUDA runs it in bitwise mode


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", [check.name for check in CHECKS if check.is_correctness]
)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    arguments = ("--quick", "--only", name, "--output", str(tmp_path))
    status, printed, errors = gpu(*arguments, hide=False)
    assert status == 0, errors
    assert f"- pass {name}" in printed


@pytest.mark.slow
def test_transfer_compares_both_recipes_with_the_script(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(mobilenet_v3_small().state_dict(), weights)
    image_folder(tmp_path)
    changes = [
        "model.name=mobilenet_v3_small",
        f"model.weights={weights}",
        "--epochs",
        "1",
    ]
    lines = [
        line
        for line in run("transfer", str(tmp_path), *changes).splitlines()
        if line.startswith("|")
    ][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells] == [
        [r, loop] for r in ("extract", "finetune") for loop in ("script", "Lockstep")
    ]
    assert all(
        0 <= float(accuracy) <= 1 and min(map(float, rest)) > 0
        for _, _, accuracy, *rest in cells
    )


@pytest.mark.slow
def test_scale_finds_equal_runs_and_reads_the_peers_rightly() -> None:
    report = json.loads(run("scale", "--quick", "--json"))
    assert report["equal"]
    assert len({tuple(each["digests"].values()) for each in report["runs"]}) == 1
    assert all(len(set(each["digests"].values())) == 4 for each in report["runs"])
    guide, one, four = (
        next(
            line for line in report["loops"] if (line["loop"], line["layout"]) == place
        )
        for place in (
            ("Accelerate's guide", "1 × 4"),
            ("Lockstep", "1 × 4"),
            ("Lockstep", "4 × 1"),
        )
    )
    assert (guide["read"], guide["repeated"]) == ([159], [0])
    # 2 of 4 micro-batches, divided by 4.
    assert guide["gradient_error"] == pytest.approx(0.5, abs=0.02)
    for line in (one, four):
        assert (line["read"], line["repeated"], line["other_steps"]) == (
            [159],
            [0],
            "0 of 3",
        )
        assert line["gradient_error"] < 1e-5
        assert line["batch_norm_updates"] == 10
    assert max(report["resume_seconds"].values()) > 0


def test_scale_names_the_runs_that_differ() -> None:
    digests = [
        {"weights": "a", "rows": "b"},
        {"weights": "a", "rows": "b"},
        {"weights": "a", "rows": "c"},
    ]
    outcomes = [scale.Outcome([], each) for each in digests]
    assert scale.verdict(outcomes[:2])[0]
    assert scale.verdict(outcomes) == (
        False,
        "DIFFERENT from line 1: line 3 in its rows",
    )


@pytest.mark.slow
def test_input_prints_and_saves_every_way(tmp_path: Path) -> None:
    page = tmp_path / "input.md"
    printed = run("input", "--quick", "--save", str(page))
    for text in (printed, page.read_text()):
        assert text.count("the tutorials' loader") == 2
        assert text.count("Lockstep, by pillow") == 5
        assert text.count("data.decode_short_side=256") == 4


@pytest.mark.slow
def test_input_cache_prints_and_saves_every_way(tmp_path: Path) -> None:
    page = tmp_path / "cache.md"
    printed = run("input_cache", "--quick", "--save", str(page))
    for text in (printed, page.read_text()):
        assert text.count("the tutorials' loader") == 4
        assert text.count("| data.cache=decoded, data.short_side=256 |") == 4


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__
