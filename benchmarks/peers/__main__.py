"""The time of a step beside other trainers: the same net, weights, samples, order and optimizer, on the CPU.

python -m benchmarks.peers                                          three workloads, about six minutes
python -m benchmarks.peers --quick                                  few rounds, about two minutes
python -m benchmarks.peers --save docs/results/peers.md             the tables, and a chart beside them
python -m benchmarks.peers --only lockstep --only fabric            some, and always the raw loop

The peers' packages go into an environment of their own, made at the first start and kept in a cache. Each peer runs in
processes of its own, in turn with the others, lean and as its guide shows it. What counts is the ratio to the raw loop
round by round. In the end all weights are compared with the raw loop's: a peer that computes something else is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers.environment import peers_python
from benchmarks.peers.job import WORKLOADS
from benchmarks.peers.report import RAW, Report, Table
from benchmarks.peers.rounds import Failed, Peer, Rounds, run_rounds
from benchmarks.step_time import machine
from trainer.process.exit import report_error

# The file in `adapters/`, and the name in a table.
PEERS = {
    RAW: "raw loop",
    "lockstep": "Lockstep",
    "fabric": "Lightning Fabric's guide",
    "timm_script": "timm's script, its manner",
    "accelerate_guide": "Accelerate's guide",
    "ignite_engine": "Ignite",
    "pytorch_accelerated_trainer": "pytorch-accelerated",
    "hf_trainer": "HF Trainer",
    "lightning_trainer": "Lightning",
}
ROUNDS, QUICK_ROUNDS = 15, 4


def main(arguments: Sequence[str]) -> int:
    """Run the rounds; returns the exit status, 1 if a peer failed or ended with other weights."""
    options = _options(arguments)
    names = [name for name in PEERS if name == RAW or name in (options.only or PEERS)]
    report = Report(machine(1), PEERS)
    try:
        python = peers_python(options.environment)
        with TemporaryDirectory(prefix="peers-") as directory:
            peers = {name: Peer(python, name) for name in names}
            try:
                _run(peers, report, Path(directory), options)
            finally:
                for peer in peers.values():
                    peer.end()
    except Exception as error:
        return report_error(error)
    if options.save:
        report.save(options.save)
    return report.exit_status


def _run(
    peers: dict[str, Peer], report: Report, directory: Path, options: argparse.Namespace
) -> None:
    for name in list(peers):
        try:
            report.versions |= peers[name].answer()
        except Failed as failure:
            report.absent[name] = str(failure)
            peers.pop(name).end()
    print(report.head(), end="\n\n", flush=True)
    for index, workload in enumerate(WORKLOADS):
        rounds = Rounds(options.rounds, workload)
        outcomes, failures = run_rounds(peers, rounds, directory / str(index))
        report.tables.append(Table(workload, outcomes, failures))
        print(report.table(-1), end="\n\n", flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument("--rounds", type=int, help=f"of each (default: {ROUNDS})")
    parser.add_argument("--only", action="append", choices=list(PEERS))
    parser.add_argument("--environment", type=Path, help="the folder of the cache")
    parser.add_argument("--save", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
