"""Run `python train.py …` and its like as real processes, forked from one that has imported torch.

Importing torch, torchvision and accelerate takes most of a short program's time, so one server process imports them
once a session and forks itself for every program. A program gets its own arguments, environment, working directory
and files for its output, as if a shell had started it. Tests of the start itself (a launcher, what `--help` imports)
start a fresh interpreter instead, and are marked `fresh_process`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from io import FileIO, TextIOWrapper
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

from trainer.process.local_ranks import rank_environments

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
# Seconds from SIGTERM to SIGKILL for the ranks that outlive a failed one; torchrun's own.
KILL_DELAY = 30.0


def run_program(
    arguments: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 240,
    ranks: int = 1,
) -> CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)` returns.

    `arguments` begin with a script, with `-m MODULE` or with `-c CODE`. `env` replaces the whole environment.
    With several `ranks`, each runs the program in the environment that torchrun would give it; they share the output.

    Raises `subprocess.TimeoutExpired` after `timeout` seconds, with all processes killed.
    """
    return Program(arguments, env=env, cwd=cwd, ranks=ranks).wait(timeout)


class Program:
    """A program that runs: what `subprocess.Popen` is for a fresh interpreter. `pids` has one for each rank."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        ranks: int = 1,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        environment = dict(os.environ if env is None else env)
        if environment.get("OMP_NUM_THREADS") != "1":
            raise ValueError(
                "the server read OMP_NUM_THREADS=1 when it imported torch: start a fresh process"
            )
        self._directory = tempfile.TemporaryDirectory()
        self._output = Path(self._directory.name, "stdout")
        self._errors = Path(self._directory.name, "stderr")
        self._output.touch()
        self._errors.touch()
        self._processes = []
        for variables in rank_environments(environment, ranks):
            work = (
                self.arguments,
                variables,
                str(cwd),
                str(self._output),
                str(self._errors),
            )
            self._processes.append(SERVER.Process(target=_become_program, args=work))
        # Where it does not run yet. A benchmark that was imported may have named what its own server imports.
        SERVER.set_forkserver_preload(["tests.preload"])
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def exit_statuses(self) -> list[int | None]:
        """Of each rank: negative where a signal ended it, None where it runs."""
        return [process.exitcode for process in self._processes]

    def output(self) -> str:
        """What it has written to stdout so far."""
        return self._output.read_text()

    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._errors.read_text()

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def send_signal(self, number: int) -> None:
        """To every rank, as a launcher passes its own signal on."""
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self, timeout: float) -> CompletedProcess[str]:
        """The program's end: its output, and the status of the first rank that failed, or 0.

        A failed rank ends the others, as under torchrun. Raises `subprocess.TimeoutExpired`, with all ranks killed.
        """
        try:
            status = self._wait_for_ranks(time.monotonic() + timeout)
            return CompletedProcess(
                self.arguments,
                status,
                self._output.read_text(),
                self._errors.read_text(),
            )
        except TimeoutError:
            output, errors = self._output.read_text(), self._errors.read_text()
            raise TimeoutExpired(self.arguments, timeout, output, errors) from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()

    def _wait_for_ranks(self, deadline: float) -> int:
        running = {process.sentinel: process for process in self._processes}
        status = 0
        while running:
            sentinels = multiprocessing.connection.wait(
                list(running), max(0.0, deadline - time.monotonic())
            )
            if not sentinels:
                raise TimeoutError
            for sentinel in sentinels:
                assert isinstance(sentinel, int)
                process = running.pop(sentinel)
                process.join()
                if process.exitcode and not status:
                    status = process.exitcode
                    deadline = min(deadline, time.monotonic() + KILL_DELAY)
                    for other in running.values():
                        other.terminate()
        return status


def _become_program(
    arguments: list[str],
    environment: dict[str, str],
    cwd: str,
    output: str,
    errors: str,
) -> None:
    """In the forked process: run the program, and end as an interpreter of its own would."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _redirect(output, 1)
    _redirect(errors, 2)
    # Of loader processes: the default, not the server's own.
    multiprocessing.set_start_method(None, force=True)
    # The server's own streams were opened for other files, perhaps for a terminal: these are as at a program's start.
    sys.stdout = sys.__stdout__ = TextIOWrapper(
        FileIO(1, "w", closefd=False), encoding="utf-8"
    )
    sys.stderr = sys.__stderr__ = TextIOWrapper(
        FileIO(2, "w", closefd=False), encoding="utf-8", line_buffering=True
    )
    status = 0
    try:
        _execute(arguments, environment)
    except SystemExit as leaving:
        status = _exit_status(leaving)
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as leaving:
            status = _exit_status(leaving)
    # multiprocessing ends its processes without the functions registered with atexit; a program's own have to run.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _redirect(path: str, descriptor: int) -> None:
    # Appending, or ranks would write over one another's lines.
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, descriptor)
    os.close(file)


def _execute(arguments: list[str], environment: dict[str, str]) -> None:
    """Run a script, `-m MODULE` or `-c CODE` as `__main__`, with the module search path that Python gives it."""
    extra = [
        path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path
    ]
    installed = [path for path in sys.path if path not in ("", str(ROOT))]
    match arguments:
        case ["-m", module, *_]:
            sys.argv = arguments[1:]
            sys.path = [str(Path.cwd()), *extra, *installed]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *_]:
            sys.argv = ["-c", *arguments[2:]]
            sys.path = ["", *extra, *installed]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *_]:
            sys.argv = arguments
            sys.path = [str(Path(script).resolve().parent), *extra, *installed]
            runpy.run_path(script, run_name="__main__")


def _exit_status(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return (leaving.code or 0) & 0xFF
    print(leaving.code, file=sys.stderr)
    return 1
