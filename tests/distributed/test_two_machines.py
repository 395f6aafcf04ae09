"""Two machines on one: namespaces of their own for network, host name and disks, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs import run_program

ROOT = Path(__file__).parents[2]
SHORT = [
    # Made up: no import of scikit-learn in each of the processes.
    "data.name=fake",
    "data.size=640",
    "data.val_size=64",
    "data.image_size=8",
    "data.num_classes=10",
    "train.max_steps=20",
    "train.checkpoint_every=5",
    "run.figures=false",
]
SHORT += ["wandb.mode=disabled", "run.resume=auto", "run.timeout=60"]


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address. `hosts` is its /etc/hosts."""

    namespace: str
    name: str
    address: str
    hosts: Path
    disk: Path

    def start(self, rank: int, *arguments: str) -> subprocess.Popen[str]:
        """Train as one rank of two, with a disk that only this machine has, mounted at the other's path, too."""
        launcher = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
        }
        rendezvous = {"MASTER_ADDR": "node0", "MASTER_PORT": "29517"}
        script = (
            f"hostname {self.name} && mount --bind {self.hosts} /etc/hosts && mount --bind {self.disk} /mnt && "
            f"exec {sys.executable} train.py {' '.join(arguments)} run.dir=/mnt/runs"
        )
        return subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.namespace,
                "unshare",
                "--uts",
                "--mount",
                "sh",
                "-c",
                script,
            ],
            cwd=ROOT,
            env={**os.environ, **launcher, **rendezvous, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines that reach each other as node0 and node1; each takes its own name for a loopback address."""
    unique = f"ls{os.getpid()}"
    pair = []
    for number in range(2):
        disk = tmp_path / f"disk{number}"
        disk.mkdir()
        hosts = tmp_path / f"hosts{number}"
        address = f"10.77.0.{number + 1}"
        other = f"10.77.0.{2 - number} node{1 - number}"
        # As Debian writes its own name.
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n{other}\n")
        pair.append(
            Machine(f"{unique}-{number}", f"node{number}", address, hosts, disk)
        )
    try:
        for machine in pair:
            ip("netns", "add", machine.namespace)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            pair[0].namespace,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            pair[1].namespace,
        )
        for machine in pair:
            ip(
                "-n",
                machine.namespace,
                "address",
                "add",
                f"{machine.address}/24",
                "dev",
                "eth0",
            )
            ip("-n", machine.namespace, "link", "set", "eth0", "up")
            ip("-n", machine.namespace, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        remove(pair)
        pytest.skip("needs root, and network namespaces")
    yield pair
    remove(pair)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def remove(pair: list[Machine]) -> None:
    for machine in pair:
        subprocess.run(
            ["ip", "netns", "del", machine.namespace], check=False, capture_output=True
        )


def run(machines: list[Machine], *arguments: str) -> list[tuple[int, str]]:
    """Exit status and output of a rank on each machine."""
    processes = [
        machine.start(rank, *SHORT, *arguments) for rank, machine in enumerate(machines)
    ]
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.mark.fresh_process  # each machine starts its own interpreter
def test_two_machines_with_nothing_shared_resume_and_train(
    machines: list[Machine],
) -> None:
    """Their own names lead to loopback addresses, which gloo would give each other. Only the first has a checkpoint."""
    runs = machines[0].disk / "runs"
    before = ["train.py", *SHORT, f"run.dir={runs}", "train.stop_after=10"]
    assert run_program(before, ranks=2).returncode == 0
    results = run(machines)
    assert [status for status, _ in results] == [0, 0], results
    assert "resumed after step 10" in results[0][1]
    directory = runs / "digits"
    assert json.loads((directory / "summary.json").read_text())["steps"] == 20
    ranks = json.loads((directory / "environment.json").read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == ["node0", "node1"]
    assert [rank["shares_run_directory"] for rank in ranks] == [True, False]
    assert list(machines[1].disk.iterdir()) == []
