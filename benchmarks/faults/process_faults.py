"""What befalls the processes of a run: signals, kills, stops, a full disk, a gradient that is NaN."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from benchmarks.faults.program import Fault
from benchmarks.faults.scene import Failed, Running, Scene

OPERATIONS = 60  # more than a run's file operations
STEPS = 24
SHORT_TIMEOUT = 4  # of a run that is to notice that it hangs
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def stop_signal(scene: Scene) -> str:
    """One or two stop signals, to one rank or all: a checkpoint is kept."""
    running = scene.start()
    scene.wait_for_checkpoint(running, scene.draw.uniform(0, 0.5))
    ranks = scene.draw.choice([None, [0], [len(running.ranks) - 1]])
    for _ in range(scene.draw.choice([1, 2])):
        running.send(scene.draw.choice(STOP_SIGNALS), ranks)
        time.sleep(scene.draw.choice([0.0, 0.02, 0.2]))
    end = scene.end(running)
    if end.status and "stopped by signal" not in end.errors:
        raise Failed("wrong", f"status {end.status}, but no word: {end.errors}")
    return scene.go_on()


def kill(scene: Scene) -> str:
    """SIGKILL to one rank or all, at a random time; where one is left, it says so."""
    running = scene.start()
    if scene.draw.random() < 0.8:
        scene.wait_for_checkpoint(running)
    time.sleep(scene.draw.uniform(0, 0.8))
    to_one = scene.draw.random() < 0.5
    killed = scene.draw.randrange(len(running.ranks))
    running.send(signal.SIGKILL, [killed] if to_one else None)
    scene.end(running)
    return scene.go_on()


def kill_at_file_operation(scene: Scene) -> str:
    """SIGKILL before one of the run's operations on files."""
    fault = Fault("kill", scene.draw.randrange(1, OPERATIONS))
    scene.end(scene.start(fault=fault))
    return scene.go_on()


def full_disk(scene: Scene) -> str:
    """From one of the run's operations on files, no write succeeds."""
    fault = Fault("full", scene.draw.randrange(1, OPERATIONS))
    scene.end(scene.start(fault=fault))
    return scene.go_on()


def nan_stop(scene: Scene) -> str:
    """A NaN gradient with train.non_finite=stop: one message, and nothing of it is kept."""
    step = scene.draw.randrange(1, STEPS + 1)
    end = scene.end(scene.start(fault=Fault("nan", step)))
    if end.status != 1 or f"step {step}" not in end.sentence():
        raise Failed("wrong", f"status {end.status} after NaN in step {step}: {end}")
    return scene.go_on()


def nan_skip(scene: Scene) -> str:
    """The same with train.non_finite=skip: the step is left out, and it is the same run on 1 and 2 processes."""
    step = scene.draw.randrange(1, STEPS + 1)
    hashes = []
    for ranks in (1, 2):
        changes = ["train.non_finite=skip", f"run.name=skip{ranks}"]
        end = scene.end(scene.start(*changes, ranks=ranks, fault=Fault("nan", step)))
        if end.status != 0:
            end.sentence()
            return "refused"
        hashes.append(scene.hashes(f"skip{ranks}"))
    if hashes[0] != hashes[1] or hashes[0] == scene.expected:
        raise Failed("wrong", f"NaN in step {step} left out: {hashes}")
    return "survived"


def loader_killed(scene: Scene) -> str:
    """A loader process is killed: one message, or nothing where all was loaded."""
    running = _start_with_loader(scene)
    for pid in running.loader_processes()[:1]:
        _send(pid, signal.SIGKILL)
    end = scene.end(running)
    if end.status not in (0, 1):
        raise Failed("wrong", f"status {end.status} after a loader process was killed")
    if end.status:
        end.sentence()
    return scene.go_on()


def loader_stuck(scene: Scene) -> str:
    """A loader process is stopped: the watchdog ends the run and says where it waits."""
    running = _start_with_loader(scene)
    stopped = running.loader_processes()[:1]
    for pid in stopped:
        _send(pid, signal.SIGSTOP)
    end = scene.end(running, patience=60)
    for pid in stopped:
        _send(pid, signal.SIGKILL)
    if end.status:
        end.sentence()
    return scene.go_on()


def rank_stopped(scene: Scene) -> str:
    """A rank is stopped: the others end within run.timeout, with one message."""
    running = scene.start(f"run.timeout={SHORT_TIMEOUT}", ranks=2)
    scene.wait_for_checkpoint(running, scene.draw.uniform(0, 0.3))
    stopped = scene.draw.randrange(2)
    other = running.ranks[1 - stopped]
    running.send(signal.SIGSTOP, [stopped])
    scene.wait_for(running, lambda: not other.is_alive())
    has_ended = not other.is_alive()
    running.send(signal.SIGKILL, [stopped])
    end = scene.end(running)
    if not has_ended:
        raise Failed("hang", f"the other rank still waits: {end.errors}")
    if other.exitcode:
        end.sentence()
    return scene.go_on()


def _start_with_loader(scene: Scene) -> Running:
    changes = ["data.workers=1", f"run.timeout={SHORT_TIMEOUT}"]
    running = scene.start(*changes)
    scene.wait_for_checkpoint(running, scene.draw.uniform(0, 0.3))
    return running


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
