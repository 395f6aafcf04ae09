"""Cases of every kind, side by side, and how they ended."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from benchmarks.faults import file_faults, process_faults
from benchmarks.faults.scene import DIGITS, Failed, Scene

OUTCOMES = ("survived", "refused", "traceback", "hang", "wrong")
BAD = ("traceback", "hang", "wrong")
KINDS: dict[str, Callable[[Scene], str]] = {
    "stop signals": process_faults.stop_signal,
    "SIGKILL": process_faults.kill,
    "SIGKILL at a file operation": process_faults.kill_at_file_operation,
    "full disk": process_faults.full_disk,
    "NaN gradient, stop": process_faults.nan_stop,
    "NaN gradient, skip": process_faults.nan_skip,
    "loader process killed": process_faults.loader_killed,
    "loader process stuck": process_faults.loader_stuck,
    "rank stopped": process_faults.rank_stopped,
    "damaged file of the run": file_faults.damaged_run,
    "flipped bit in best/": file_faults.damaged_best,
    "run directory deleted": file_faults.directory_deleted,
    "run directory moved": file_faults.directory_moved,
    "two starts at once": file_faults.two_starts,
    "a stranger's run directory": file_faults.stranger,
    "damaged image": file_faults.damaged_image,
    "damaged image, quarantine": file_faults.quarantined_image,
}
OF_IMAGES = ("damaged image", "damaged image, quarantine")


@dataclass
class Result:
    """Counts by kind and outcome, a line for each case that is not survived, and the seconds it took."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def bad(self) -> int:
        return sum(n for (_, outcome), n in self.counts.items() if outcome in BAD)

    def rows(self) -> list[list[str]]:
        """For each kind: how many were injected, and how many had each outcome; the last row is of all."""
        kinds = [kind for kind in KINDS if any(k == kind for k, _ in self.counts)]
        rows = []
        for kind in kinds:
            values = [self.counts[kind, outcome] for outcome in OUTCOMES]
            rows.append([kind, str(sum(values)), *map(str, values)])
        totals = [
            sum(self.counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES
        ]
        return [*rows, ["all", str(sum(totals)), *map(str, totals)]]


class Campaign:
    """`jobs` cases at a time; the kinds take turns, in an order that the seed shuffles. `tell` is told of each case."""

    def __init__(
        self,
        scratch: Path,
        *,
        seed: int,
        jobs: int,
        kinds: Sequence[str] = tuple(KINDS),
        tell: Callable[[str], None] = print,
    ) -> None:
        self._scratch = scratch
        self._seed = seed
        self._jobs = jobs
        self._kinds = kinds
        self._tell = tell
        self._lock = Lock()
        self._expected: dict[bool, dict[str, str]] = {}
        self.result = Result()

    def run(self, *, minutes: float, cases: int | None) -> Result:
        """As many cases as begin within `minutes`, or so many."""
        started = time.monotonic()
        deadline = started + 60 * minutes
        self._expected = dict(self._undisturbed())
        with ThreadPoolExecutor(self._jobs) as pool:
            pending: set[Future[None]] = set()
            for number, kind in self._order():
                is_enough = number > cases if cases else time.monotonic() > deadline
                if is_enough:
                    break
                pending.add(pool.submit(self._one, number, kind))
                while len(pending) >= self._jobs:
                    over, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in over:
                        future.result()
            for future in pending:
                future.result()
        self.result.seconds = time.monotonic() - started
        return self.result

    def _undisturbed(self) -> Iterator[tuple[bool, dict[str, str]]]:
        """The hashes of the runs that nothing befalls: of digits, and of a folder of images."""
        for has_images in (False, True):
            scene = self._scene(f"undisturbed{has_images}", {}, 0, has_images)
            changes = []
            if has_images:
                file_faults.make_images(scene.directory / "images")
                changes = [f"data.root={scene.directory / 'images'}"]
            end = scene.end(scene.start(*changes, ranks=1))
            if end.status:
                raise SystemExit(f"the undisturbed run failed: {end.errors}")
            yield has_images, scene.hashes()

    def _order(self) -> Iterator[tuple[int, str]]:
        draw = random.Random(self._seed)
        number = 0
        while True:
            for kind in draw.sample(list(self._kinds), len(self._kinds)):
                number += 1
                yield number, kind

    def _scene(
        self, name: str, expected: Mapping[str, str], number: int, has_images: bool
    ) -> Scene:
        directory = self._scratch / name
        directory.mkdir()
        draw = random.Random(f"{self._seed}/{number}")
        settings = file_faults.IMAGES if has_images else DIGITS
        return Scene(directory, dict(expected), draw, settings)

    def _one(self, number: int, kind: str) -> None:
        has_images = kind in OF_IMAGES
        expected = self._expected[has_images]
        scene = self._scene(str(number), expected, number, has_images)
        started = time.monotonic()
        text = ""
        try:
            outcome = KINDS[kind](scene)
        except Failed as failure:
            outcome, text = failure.outcome, failure.text
        except Exception as error:  # the benchmark's own, or a file that is not there
            outcome, text = "wrong", f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        with self._lock:
            self.result.counts[kind, outcome] += 1
            self._tell(f"{number} {kind}: {outcome} · {seconds:.1f} s")
            if outcome in BAD:
                self.result.lines.append(f"{number} {kind}: {outcome}: {text[-1500:]}")
        if outcome not in BAD:
            shutil.rmtree(scene.directory, ignore_errors=True)
