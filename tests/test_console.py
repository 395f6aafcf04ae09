"""The console: aligned columns, whole lines, right times, and no output from ranks other than the main one."""

from __future__ import annotations

import doctest
import io
import math
import re
import subprocess
import sys
from timeit import repeat

import pytest

from trainer.reporting import console as console_module
from trainer.reporting import formats, progress_bar
from trainer.reporting.console import Console

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FACTS = [("model", "my [bold]net[/bold] :smile:"), ("run", "runs/digits")]
LONG = "runs/" + "a_long_name/" * 20
ROW = {
    "train/loss": 0.03124,
    "train/accuracy": 0.98321,
    "val/loss": 0.0455,
    "val/accuracy": 1.0,
    "lr": 1e-4,
}


class Clock:
    """A clock that stands still until `now` is changed."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stdout that says it is a terminal, so many columns wide."""

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.columns, self._monkeypatch = columns, monkeypatch

    def console(self, *, active: bool = True) -> Console:
        """A console whose stdout is this terminal."""
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            self._monkeypatch.delenv(name, raising=False)
        self._monkeypatch.setenv("TERM", "xterm-256color")
        self._monkeypatch.setenv("COLUMNS", str(self.columns))
        self._monkeypatch.setattr(sys, "stdout", self)
        return Console(active=active)

    def isatty(self) -> bool:
        return True

    def new_lines(self) -> list[str]:
        """The lines since the last call, without control codes."""
        text = ANSI.sub("", self.getvalue()).replace("\r", "\n")
        self.seek(0)
        self.truncate()
        return [line.rstrip() for line in text.split("\n") if line.strip()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "monotonic", clock)
    monkeypatch.setattr(progress_bar, "monotonic", clock)
    return clock


@pytest.fixture(params=[80, 120])
def terminal(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Terminal:
    return Terminal(request.param, monkeypatch)


def whole_run(console: Console, clock: Clock) -> None:
    """Every call, with wide numbers: 100 epochs of 100,000 steps, resumed at epoch 2."""
    console.header([*FACTS, ("path", LONG)])
    console.begin(10_000_000, 100_000, 200_000)
    for epoch in range(3, 31):
        console.log(
            {
                "train/loss": 1234.5,
                "train/accuracy": 0.5,
                "lr": 1.25e-5,
                "samples_per_second": 123456.7,
            }
        )
        for step in range(10):
            clock.now += 20
            console.advance(100_000 * (epoch - 1) + 10_000 * (step + 1))
        console.epoch(
            epoch,
            100,
            {**ROW, "train/mean_iou": 0.5, "val/mean_iou": 0.5},
            4000.0,
            epoch == 5,
        )
    console.note("kept [red]7[/red]")
    console.summary(FACTS)
    console.close()


def test_inactive_says_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_run(Console(active=False), clock)
    assert capsys.readouterr() == ("", "")


def test_inactive_says_nothing_on_a_terminal(clock: Clock, terminal: Terminal) -> None:
    whole_run(terminal.console(active=False), clock)
    assert terminal.getvalue() == ""


def test_plain_lines(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    whole_run(Console(active=True), clock)
    out, err = capsys.readouterr()
    lines = out.split("\n")
    assert err == ""
    assert "\x1b" not in out and "\r" not in out
    assert lines[:4] == [
        "model  my [bold]net[/bold] :smile:",
        "run    runs/digits",
        f"path   {LONG}",
        "",
    ]
    assert lines[-4:] == [
        "",
        "model  my [bold]net[/bold] :smile:",
        "run    runs/digits",
        "",
    ]
    assert "kept [red]7[/red]" in lines


def test_terminal_shows_no_markup_and_wraps_nothing(
    clock: Clock, terminal: Terminal
) -> None:
    whole_run(terminal.console(), clock)
    raw = terminal.getvalue()
    # The cursor is hidden, and shown again.
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1
    lines = terminal.new_lines()
    assert max(map(len, lines)) <= terminal.columns
    assert "model  my [bold]net[/bold] :smile:" in lines
    assert "kept [red]7[/red]" in lines
    assert "│ model  my [bold]net[/bold] :smile: │" in lines
    assert (
        "".join(line.split()[-1] for line in lines[2:6] if "long_name" in line) == LONG
    )
    epoch_lines = [line for line in lines if re.match(r" *\d+/100  ", line)]
    assert len(epoch_lines) == 28
    assert all(
        line.endswith("1:06:40") or line.endswith("1:06:40  ★") for line in epoch_lines
    )


def test_epoch_columns_stay_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=True)
    console.epoch(1, 10, ROW, 1.26, False)
    console.epoch(
        2, 10, {"train/loss": 1e-5, "train/accuracy": 1e-5, "lr": 0.05}, 61.0, False
    )
    console.epoch(
        10, 10, {**ROW, "train/loss": math.nan, "val/loss": 98765.4321}, 3661.0, True
    )
    assert capsys.readouterr().out.split("\n") == [
        "       ────── loss ──────  ──── accuracy ────",
        "epoch     train       val     train       val        lr      time",
        " 1/10    0.0312    0.0455    0.9832    1.0000     1e-04     1.3 s",
        " 2/10   1.0e-05         –    0.0000         –      0.05      1:01",
        "10/10       nan   98765.4    0.9832    1.0000     1e-04   1:01:01  ★",
        "",
    ]


def test_a_metric_logged_later_gets_a_column_and_a_heading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(active=True)
    console.epoch(1, 3, {"train/mae": 0.5, "train/loss": 1.0}, 1.0, False)
    console.epoch(
        2,
        3,
        {"train/mae": 0.5, "train/loss": 1.0, "val/top5_accuracy": 0.25},
        1.0,
        False,
    )
    console.epoch(3, 3, {"train/mae": 0.5, "train/loss": 1.0}, 1.0, False)
    assert capsys.readouterr().out.split("\n")[3:] == [
        "",
        "       ─ loss ─  ─ mae ──  top5_accuracy",
        "epoch     train     train            val        lr      time",
        "  2/3    1.0000    0.5000         0.2500         –     1.0 s",
        "  3/3    1.0000    0.5000              –         –     1.0 s",
        "",
    ]


def test_a_narrow_terminal_leaves_out_whole_metrics(terminal: Terminal) -> None:
    row = {
        f"{phase}/{name}": 0.5
        for phase in ("train", "val")
        for name in ("mae", "mse", "loss", "r2", "bias")
    }
    terminal.console().epoch(1, 1, row, 1.0, False)
    names, phases, line = terminal.new_lines()
    fits = {80: 2, 120: 4}[terminal.columns]
    assert re.findall(r"\w+", names) == ["loss", "mae", "mse", "r2", "bias"][:fits]
    assert phases.split() == ["epoch", *["train", "val"] * fits, "lr", "time"]
    assert line.split() == ["1/1", *["0.5000"] * 2 * fits, "–", "1.0", "s"]


def test_the_bar_has_two_lines_however_narrow(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (20, 40, 60, 80):
        terminal = Terminal(columns, monkeypatch)
        console = terminal.console()
        console.begin(10_000_000, 100_000, 9_000_000)
        terminal.new_lines()
        console.log(
            {
                "train/loss": 1234.5,
                "train/accuracy": 0.5,
                "lr": 1.25e-5,
                "samples_per_second": 1e6,
            }
        )
        console.advance(9_999_999)
        frame = terminal.new_lines()
        assert len(frame) == 2 and max(map(len, frame)) <= columns
        console.epoch(100, 100, ROW, 1.0, True)
        assert max(map(len, terminal.new_lines())) <= columns
        console.close()


def test_times_after_a_resume_count_this_session_only(
    clock: Clock, terminal: Terminal
) -> None:
    console = terminal.console()
    console.begin(total_steps=1000, steps_per_epoch=100, first_step=500)
    assert "epoch  5/10" in terminal.new_lines()[0]
    clock.now += 40  # a slow first step: compiling
    console.advance(501)
    assert terminal.new_lines()[0].endswith(" 50 %  0:40  eta –")
    console.log({"train/loss": 0.5, "lr": 0.0004, "samples_per_second": 12345.6})
    clock.now += 20
    console.advance(521)  # a step a second, 479 to go
    bar, numbers = terminal.new_lines()
    assert bar.startswith("epoch  6/10  ━━━") and bar.endswith(" 52 %  1:00  eta 7:59")
    assert numbers == "loss 0.5000  step 521/1,000  lr 4e-04  samples/s 12,346"
    clock.now += 479
    console.advance(1000)
    assert terminal.new_lines()[0].endswith("100 %  8:59  eta 0:00")
    console.close()


def test_the_bar_is_drawn_by_time(clock: Clock, terminal: Terminal) -> None:
    console = terminal.console()
    console.begin(10_000, 100, 0)
    terminal.new_lines()
    drawings = []
    for step in range(1, 1001):  # a second in steps of a millisecond
        clock.now += 0.001
        console.advance(step)
        console.log({"train/loss": 0.5})
        drawings.append(bool(terminal.new_lines()))
    assert 9 <= sum(drawings) <= 11
    console.close()


def test_plain_progress_only_in_a_long_epoch(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(active=True)
    console.begin(1000, 100, 0)
    console.log({"train/loss": 0.5})
    for step in range(1, 101):  # 100 s
        clock.now += 1
        console.advance(step)
    assert [
        line.split(f"{' ' * 2}step")[0] for line in capsys.readouterr().out.splitlines()
    ] == [
        "epoch  1/10    3 %  0:31  eta 16:09  loss 0.5000",
        "epoch  1/10    6 %  1:01  eta 15:39  loss 0.5000",
        "epoch  1/10    9 %  1:31  eta 15:09  loss 0.5000",
    ]
    console.epoch(1, 10, ROW, 100.0, False)
    for epoch in range(1, 5):  # short epochs need no line between theirs
        for step in range(25):
            clock.now += 1
            console.advance(100 * epoch + step + 1)
        console.epoch(epoch + 1, 10, ROW, 25.0, False)
    assert "eta" not in capsys.readouterr().out


def test_closing_twice_and_after_an_exception(clock: Clock, terminal: Terminal) -> None:
    console = terminal.console()
    console.close()
    console.begin(10, 5, 0)
    with pytest.raises(KeyError):
        try:
            console.advance(1)
            raise KeyError
        finally:
            console.close()
            console.close()
    assert sys.stdout is terminal  # no longer redirected through the bar
    terminal.new_lines()
    clock.now += 100
    console.advance(7)  # late calls draw nothing
    assert terminal.new_lines() == []


def test_ascii_stdout_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    Console(active=True).epoch(1, 1, ROW, 1.0, True)
    assert output.getvalue().endswith(b"1.0 s  ?\n")


def test_advance_is_cheap(terminal: Terminal) -> None:
    console = terminal.console()
    console.begin(1000, 100, 0)
    console.advance(1)
    console._next_drawing += 1000
    fastest = min(repeat(lambda: console.advance(2), number=10_000, repeat=20)) / 10_000
    console.close()
    assert fastest < 1e-6


def test_number_formats() -> None:
    assert doctest.testmod(formats).failed == 0
    values = (
        0.0,
        -0.5,
        99.99994,
        99.99999,
        999999.4,
        1234567.0,
        1e-12,
        math.nan,
        -math.inf,
        -123456.7,
        1e300,
    )
    assert all(len(formats.format_metric("loss", value)) <= 8 for value in values)


@pytest.mark.fresh_process  # its output is a pipe, and it imports no torch
def test_a_closed_pipe_is_no_traceback() -> None:
    """`train.py | head -1`."""
    code = (
        "from trainer.process.exit import exit_process, report_error\n"
        "try:\n    while True: print('row', flush=True)\nexcept Exception as error: exit_process(report_error(error))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"stopped: nothing reads its output any more\n"
    assert process.returncode == 141
