"""`python -m benchmarks`, the rounds beside other trainers, and the smaller benchmarks. No time is judged here."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as whole
from benchmarks import evaluation, memory, start, suite, where
from benchmarks.peers import environment
from benchmarks.peers.job import WORKLOADS, Job, Task, Workload
from benchmarks.peers.report import RAW, Report, Table
from benchmarks.peers.rounds import (
    Entry,
    Failed,
    Outcome,
    Peer,
    Rounds,
    run_rounds,
)
from benchmarks.reads import HostReads
from benchmarks.suite import Benchmark
from tests.programs import run_program

# ---------------------------------------------------------------- all of them


def test_a_benchmark_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "benchmarks"
    programs.mkdir()
    (programs / "__init__.py").touch()
    (programs / "bad.py").write_text("raise SystemExit(3)")
    (programs / "good.py").write_text(
        "import sys; print('# Good\\n\\n## More\\n\\n', sys.argv[1:])"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    some = (Benchmark("bad", "?"), Benchmark("absent", "?"), Benchmark("good", "?"))
    data = Benchmark("good", "with images?", needs_data=True)
    monkeypatch.setattr(whole, "BENCHMARKS", some)
    saved = tmp_path / "new" / "page.md"
    assert whole.main(["--quick", "--save", str(saved)]) == 1
    page = saved.read_text()
    assert "| bad | ? | 0 | FAILED, exit status 3 |" in page
    assert "| absent | ? | 0 | left out: it is not in this checkout |" in page
    assert "`python -m benchmarks.good --quick`" in page
    assert "### Good\n" in page and "#### More\n" in page
    assert str(saved) in capsys.readouterr().out
    assert whole.main(["good", "--save", str(saved)]) == 0
    assert whole.main(["godo"]) == 2
    assert 'did you mean "good"' in capsys.readouterr().err
    left_out = suite.run(data, quick=False, data=None)
    assert (left_out.status, left_out.text) == (
        None,
        "--data names no folder of images",
    )
    assert data.arguments(quick=True, data="x") == ["x", "--quick"]


def test_the_list_names_what_there_is() -> None:
    names = [benchmark.name for benchmark in suite.BENCHMARKS]
    assert len(set(names)) == len(names)
    assert {"start", "where", "step_time", "peers", "memory", "evaluation"} <= set(
        names
    )
    for benchmark in suite.BENCHMARKS[:8]:
        assert benchmark.is_here, benchmark


@pytest.mark.slow
@pytest.mark.parametrize("name", ["start", "memory", "evaluation", "where"])
def test_small_benchmarks_print_what_they_save(name: str, tmp_path: Path) -> None:
    saved = tmp_path / "new" / "page.md"
    program = ["-m", f"benchmarks.{name}", "--quick", "--save", str(saved)]
    result = run_program(program, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert saved.read_text().split() == result.stdout.split()
    assert "|--:|" in saved.read_text()


# ---------------------------------------------------------------- peers

TINY = Workload("tiny", "mlp", batch_size=8, cuts=4, ranks=2, steps=2)


@pytest.mark.slow
def test_peers_take_turns_and_end_with_the_same_weights(tmp_path: Path) -> None:
    """Real processes, two ranks each; an adapter that is not there is a failure in a line."""
    python = Path(sys.executable)
    peers = {name: Peer(python, name) for name in (RAW, "lockstep")}
    absent = Peer(python, "of_no_one")
    try:
        for peer in peers.values():
            assert peer.answer() == {"torch": torch.__version__.partition("+")[0]}
        with pytest.raises(Failed, match="its process ended"):
            absent.answer()
        outcomes, failures = run_rounds(peers, Rounds(1, TINY), tmp_path)
        assert not failures
        table = Table(TINY, outcomes, failures)
        assert set(outcomes) == {Entry(n, u) for n in peers for u in (False, True)}
        assert all(outcome.seconds.shape == (1, 2) for outcome in outcomes.values())
        assert all(outcome.seconds.min() > 0 for outcome in outcomes.values())
        assert 0 < outcomes[Entry(RAW, False)].weights.std() < 1
        assert table.difference("lockstep") < 1e-4
        assert table.difference(RAW) == 0
        assert outcomes[Entry(RAW, False)].reads == 0
        assert outcomes[Entry(RAW, True)].reads == 1  # the bar's
    finally:
        for peer in (*peers.values(), absent):
            peer.end()


@pytest.mark.parametrize("workload", [TINY, *WORKLOADS])
def test_ranks_share_the_samples_of_lockstep_s_plan(workload: Workload) -> None:
    """A loader of a rank's own batches, and one whose batches are dealt out in turn, read the same."""
    task = Task(workload, False, 3, "")
    jobs = [Job(task, rank, turns=None) for rank in range(workload.ranks)]  # type: ignore[arg-type]
    dealt = jobs[0].dealt_batches()
    for rank, job in enumerate(jobs):
        assert job.own_batches() == dealt[rank :: workload.ranks]
    of_step = workload.cuts_of_rank
    for step in jobs[0].plan.steps():
        own = slice((step.number - 1) * of_step, step.number * of_step)
        ids = [
            number
            for job in jobs
            for batch in job.own_batches()[own]
            for number in batch
        ]
        assert ids == jobs[0].plan.sample_ids(step, 0, workload.cuts).tolist()
    inputs, targets = next(iter(jobs[0].loader()))
    images, expected = jobs[0].data.batch(torch.tensor(dealt[0]))
    assert torch.equal(inputs, images.float() / 255)
    assert torch.equal(targets, expected)


def outcome(seconds: Sequence[float], weights: Sequence[float]) -> Outcome:
    both_clocks = np.array([seconds, seconds]).T
    return Outcome(both_clocks, 1.5, np.array(weights, np.float32))


def test_a_peer_that_computes_something_else_is_named(tmp_path: Path) -> None:
    outcomes = {
        Entry(RAW, False): outcome([1, 2, 4], [1, -2]),
        Entry(RAW, True): outcome([2, 4, 8], [1, -2]),
        Entry("near", False): outcome([3, 6, 12], [1, -2.00001]),
        Entry("other", False): outcome([1, 2, 4], [1.1, -2]),
    }
    titles = {RAW: "raw", "near": "Near", "other": "Other", "gone": "Gone"}
    report = Report("a machine", titles, {"torch": "2"})
    report.tables = [Table(TINY, {k: outcomes[k] for k in list(outcomes)[:3]}, {})]
    assert report.exit_status == 0
    failures = {Entry("other", True): "ValueError: no"}
    report.tables.append(Table(TINY, outcomes, failures))
    assert report.exit_status == 1
    rows = {
        cells[0]: cells[1:]
        for line in report.table(1).splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert rows["raw"][0] == "1.00" and rows["raw"][3] == "2.00"
    assert rows["Near"][:2] == ["3.00", "3.00 to 3.00"] and rows["Near"][-1] == "5e-06"
    assert rows["Other"][3] == "failed" and rows["Other"][-1] == "**others**, 5e-02"
    assert "Failed: Other, as used: ValueError: no" in report.table(1)
    report.save(tmp_path / "new" / "page.md")
    chart = (tmp_path / "new" / "page.png").read_bytes()
    assert chart.startswith(b"\x89PNG")
    assert "](page.png)" in (tmp_path / "new" / "page.md").read_text()
    report.absent["gone"] = "its process ended"
    assert "Not measured: Gone, its process ended" in report.head()


def test_the_peers_environment_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: Sequence[Any], **_: Any) -> Any:
        words = [str(word) for word in command]
        commands.append(words)
        if "venv" in words:
            (Path(words[-1]) / "site").mkdir(parents=True, exist_ok=True)
        site = commands[0][-1] + "/site\n"
        failed = "--quiet" in words and is_offline
        return subprocess.CompletedProcess(words, int(failed), site, "x\nno such one")

    monkeypatch.setattr(environment.subprocess, "run", run)
    is_offline = True
    with pytest.raises(RuntimeError, match=r"cannot be installed: no such one$"):
        environment.peers_python(tmp_path)
    is_offline = False
    python = environment.peers_python(tmp_path)
    made = len(commands)
    assert environment.peers_python(tmp_path) == python
    assert len(commands) == made
    (home,) = tmp_path.iterdir()
    assert (
        str(Path(torch.__file__).parents[1]) in (home / "site/shared.pth").read_text()
    )
    assert (home / "constraints.txt").read_text().startswith("torch==")
    monkeypatch.setattr(environment, "REQUIREMENTS", ("another",))
    assert environment.peers_python(tmp_path) != python


# ---------------------------------------------------------------- what they measure by


def test_reads_on_the_host_are_counted() -> None:
    x = torch.tensor([1.0, 2.0])
    with HostReads() as reads:
        y = (x * 2).sum()
        y.backward if y.requires_grad else None  # noqa: B018
        assert reads.count == 0
        y.item(), float(y), bool(y > 0), x.tolist()
        assert reads.count == 4
    x.tolist()
    assert reads.count == 4


def test_a_sample_goes_to_the_innermost_part() -> None:
    """CPU time of a function within a step, in a file of a room; what is outside of a run's loop counts for nothing."""
    source = "def spin(end, clock):\n    while clock() < end: pass\n"
    names: dict[str, Any] = {}
    exec(compile(source, "/x/trainer/core/some.py", "exec"), names)

    def _loop() -> None:
        names["spin"](time.process_time() + 0.2, time.process_time)

    samples = where.Samples()
    with samples.taken():
        _loop()
        names["spin"](time.process_time() + 0.1, time.process_time)
    ((loop, part),) = samples.counts
    assert loop == where.LOCKSTEP
    assert part.startswith("trainer/core")
    assert 5 <= samples.counts[loop, part] <= 45


def test_tables_have_ratios_of_each_round(capfd: pytest.CaptureFixture[str]) -> None:
    seconds = {
        name: np.array([[2.0, 1.0], [4.0, 1.0]]) for name in start.programs(Path())
    }
    seconds["train.py --help"] = np.array([[1.0, 0.1], [4.0, 0.1]])
    row = (
        "| `train.py --help` | 2.50 | 0.10 | import torch | 0.75 | 0.50, 1.00 | 0.10 |"
    )
    assert row in start.table(seconds)
    failing = pytest.raises(RuntimeError, match="python -c exit")
    with Path("/dev/null").open("w") as nowhere, failing:
        start.run_once(["-c", "exit(1)"], nowhere.fileno())
    found = {memory.BASE: (100.0, [200.0, 220.0]), "Lockstep": (102.0, [231.0, 231.0])}
    assert "| Lockstep | 102.0 | 1.020 | 231 | 1.10 | 231, 231 |" in memory.table(found)
    with pytest.raises(RuntimeError, match="usual finds"):
        evaluation._refuse_differences({evaluation.BASE: (1, 1), "usual": (1, 0.9)})
