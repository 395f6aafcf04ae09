"""The campaign of faults in its short form, and that it tells what should not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import campaign
from benchmarks.faults.__main__ import as_markdown
from benchmarks.faults.campaign import Campaign, Result
from benchmarks.faults.scene import Scene


def run(directory: Path, *kinds: str) -> Result:
    lines: list[str] = []
    cases = Campaign(directory, seed=0, jobs=2, kinds=kinds, tell=lines.append)
    result = cases.run(minutes=0, cases=len(kinds))
    assert len(lines) == len(kinds)
    return result


def test_runs_survive_or_are_refused_in_a_sentence(tmp_path: Path) -> None:
    kinds = ["SIGKILL", "two starts at once", "damaged image"]
    result = run(tmp_path, *kinds)
    assert not result.lines
    assert not result.bad()
    *rows, total = result.rows()
    assert sorted(row[0] for row in rows) == sorted(kinds)
    assert int(total[1]) == len(kinds) == int(total[2]) + int(total[3])
    assert "| two starts at once | 1 | 1 | 0 | 0 | 0 | 0 |" in as_markdown(result, "")


def other_bits(scene: Scene) -> str:
    return scene.check_hashes(scene.end(scene.start("run.seed=1", ranks=1)))


def no_end(scene: Scene) -> str:
    scene.end(scene.start("train.epochs=1000", ranks=1), patience=0.5)
    return "survived"


def no_sentence(scene: Scene) -> str:
    scene.end(scene.start("train.max_steps=1", ranks=1)).sentence()
    return "refused"


def test_what_should_not_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"wrong": other_bits, "hang": no_end, "traceback": no_sentence}
    monkeypatch.setattr(campaign, "KINDS", bad)
    result = run(tmp_path, *bad)
    assert result.counts == {(outcome, outcome): 1 for outcome in bad}
    assert result.bad() == len(result.lines) == 3
