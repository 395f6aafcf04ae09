"""launch/slurm.sh with stand-ins for Slurm's `srun` and `scontrol`: two tasks, a signal, and the same line again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import run_program
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
LAST_PORT = 20000  # the script's ports are this and above

SCONTROL = f"""#!{sys.executable}
import sys
assert sys.argv[1:] == ["show", "hostnames", "localhost,other"], sys.argv
print("localhost\\nother")
"""
# Starts the tasks, passes SIGTERM on to them as Slurm does, and ends with the largest status.
SRUN = f"""#!{sys.executable}
import json, os, signal, subprocess, sys
from pathlib import Path
command = sys.argv[1:]
options = []
while command[0].startswith("--"):
    options.append(command.pop(0))
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
for number in range(int(os.environ["SLURM_NTASKS"])):
    variables = {{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}}
    tasks.append(subprocess.Popen(command, env=os.environ | variables))
Path(os.environ["RECORD"]).write_text(json.dumps([os.getpid(), options]))
sys.exit(max(task.wait() % 256 for task in tasks))
"""


class Job:
    """The script as Slurm's first machine runs it, with two tasks there."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.record = directory / "record.json"
        programs = directory / "programs"
        programs.mkdir(exist_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = {
            "PATH": os.pathsep.join(path),
            "RECORD": str(self.record),
            "ACCELERATE_USE_CPU": "true",
            "SLURM_JOB_ID": str(free_port() - LAST_PORT),
            "SLURM_JOB_NODELIST": "localhost,other",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        self.process = subprocess.Popen(
            ["bash", "launch/slurm.sh", "configs/digits.yaml", *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop(self) -> None:
        """SIGTERM, as before the end of the job's time: to the tasks, and to this shell where the job is cancelled."""
        srun, _ = json.loads(self.record.read_text())
        os.kill(srun, signal.SIGTERM)
        self.process.terminate()

    def wait(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=240)
        return self.process.returncode, output


def free_port() -> int:
    """One of those that the script chooses from."""
    for port in range(LAST_PORT + os.getpid() % 10000, LAST_PORT + 20000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


@pytest.mark.fresh_process  # the script starts its tasks
def test_a_job_goes_on_and_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """With the line of a job before it, of which forked processes do the part."""
    line = [
        f"run.dir={tmp_path}",
        "train.epochs=1000",
        "run.figures=false",
        "wandb.mode=disabled",
        "data.workers=0",
        # Made up: no import of scikit-learn in each of the processes.
        "data.name=fake",
        "data.size=640",
        "data.val_size=64",
        "data.image_size=8",
        "data.num_classes=10",
    ]
    before = ["train.py", "configs/digits.yaml", *line, "train.stop_after=3"]
    assert run_program(before, ranks=2).returncode == 0
    last = tmp_path / "digits/checkpoints/last"
    assert last.read_text() == "step_00000003\n"
    rows = tmp_path / "digits/metrics.jsonl"
    size = rows.stat().st_size
    job = Job(tmp_path, *line)
    wait_until(lambda: rows.stat().st_size > size or job.process.poll() is not None)
    job.stop()
    status, output = job.wait()
    assert status == 143, output
    assert "resumed after step 3" in output
    assert output.count("stopped by signal 15") == 1
    assert int(last.read_text().strip().removeprefix("step_")) > 3
    assert json.loads(job.record.read_text())[1] == ["--cpus-per-task=1", "--wait=120"]
    environment = json.loads((tmp_path / "digits/environment.json").read_text())
    assert len(environment["ranks"]) == 2
