"""A process of one peer: it imports the peer's libraries once, then forks the ranks of each task from itself.

`python -m benchmarks.peers.worker ADAPTER FD` talks with the director of the rounds through a connection at that file
descriptor. A request is a task, or goes on to all ranks of a task. An answer is a list, one of each rank.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib import import_module
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peers.job import END, Job, Task, Turns
from trainer.process.local_ranks import free_port, rank_variables

# By the digits and by every optimizer: imported before the ranks are forked.
NEEDED_BY_ALL = ("sklearn.datasets", "sklearn.model_selection", "torch._dynamo")


def main(adapter: str, descriptor: int) -> None:
    """Serve requests until the director closes the connection."""
    director: Connection[Any, Any] = Connection(descriptor)
    module = import_module(f"benchmarks.peers.adapters.{adapter}")
    for name in NEEDED_BY_ALL:
        import_module(name)
    director.send({name: version(name) for name in module.PACKAGES})
    ranks: dict[bool, Ranks] = {}  # of the lean task and of the one as used
    while True:
        try:
            as_used, request = director.recv()
        except EOFError:
            return
        if isinstance(request, Task):
            ranks[as_used] = Ranks.forked(module, request)
        else:
            ranks[as_used].send(request)
        director.send(ranks[as_used].answers())
        if request == END:
            ranks[as_used].wait()


class Ranks:
    """The processes that run one task."""

    def __init__(self) -> None:
        self._processes: list[int] = []
        self._connections: list[Connection[Any, Any]] = []

    @classmethod
    def forked(cls, module: ModuleType, task: Task) -> Ranks:
        """`task.workload.ranks` processes, each of which trains with the adapter `module`."""
        ranks = cls()
        port = free_port()
        for rank in range(task.workload.ranks):
            ours, theirs = Pipe()
            process = os.fork()
            if process == 0:
                _run(module, task, rank, port, theirs)
            theirs.close()
            ranks._processes.append(process)
            ranks._connections.append(ours)
        return ranks

    def send(self, request: Any) -> None:
        for connection in self._connections:
            connection.send(request)

    def answers(self) -> list[Any]:
        """One of each rank; a text is a failure."""
        answers = []
        for connection in self._connections:
            try:
                answers.append(connection.recv())
            except (EOFError, ConnectionError):
                answers.append("its process ended without a word")
        if any(isinstance(answer, str) for answer in answers):
            for process in self._processes:
                os.kill(process, signal.SIGKILL)
            self.wait()
        return answers

    def wait(self) -> None:
        for process in self._processes:
            os.waitpid(process, 0)
        self._processes, self._connections = [], []


def _run(module: ModuleType, task: Task, rank: int, port: int, connection: Any) -> None:
    """Train in this process, with its own output in a file, and end it."""
    try:
        directory = Path(task.directory)
        directory.mkdir(parents=True, exist_ok=True)
        os.chdir(directory)
        printed = os.open(f"printed-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        count = task.workload.ranks
        if count > 1:
            os.environ |= rank_variables(rank, count, port)
            os.environ["TORCHELASTIC_RUN_ID"] = "peers"  # so that Lightning joins these
        import torch

        torch.set_num_threads(1)
        module.train(Job(task, rank, Turns(connection)))
        connection.send("the training ended before its last turn")
    except BaseException as error:
        traceback.print_exc()
        first_line = str(error).partition("\n")[0]
        connection.send(f"{type(error).__name__}: {first_line}")
    finally:
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
