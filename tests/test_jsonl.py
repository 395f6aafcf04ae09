"""metrics.jsonl: rows read back exactly, after a resume and after a crash too."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import LockstepError
from trainer.reporting.jsonl import MetricsFile, read_rows


def rows_of(*steps):
    return [{"step": step, "train/loss": step / 3} for step in steps]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, rows, **opening):
    file = MetricsFile(path, **opening)
    for row in rows:
        file.log(row)
    file.close()
    return file


@given(
    st.lists(
        st.dictionaries(st.text(), st.floats() | st.integers(), max_size=4), max_size=5
    )
)
def test_any_row_reads_back_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, rows)
    for original, restored in zip(rows, read_rows(path), strict=True):
        assert list(restored) == list(original)
        # NaN is not equal to itself.
        assert list(map(repr, restored.values())) == list(map(repr, original.values()))


def test_nan_and_infinities_are_kept(path):
    write(path, [{"step": 1, "train/loss": math.nan, "grad_norm": math.inf}])
    assert path.read_text() == '{"step": 1, "train/loss": NaN, "grad_norm": Infinity}\n'
    (row,) = read_rows(path)
    assert math.isnan(row["train/loss"]) and row["grad_norm"] == math.inf


def test_a_row_is_on_disk_once_it_is_logged(path):
    file = MetricsFile(path)
    file.log({"step": 1})
    assert path.read_text() == '{"step": 1}\n'
    file.log({"step": 2})
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    file.close()


def test_a_new_run_starts_empty(path):
    write(path, rows_of(1, 2))
    assert write(path, []).rows == 0
    assert read_rows(path) == []


def test_a_resumed_run_keeps_the_rows_its_checkpoint_counted(path):
    assert write(path, rows_of(10, 20, 20, 30, 40)).rows == 5
    # Two rows were written after step 20, one counted.
    resumed = write(path, rows_of(21, 31), keep_rows=3)
    assert resumed.rows == 5
    assert read_rows(path) == rows_of(10, 20, 20, 21, 31)
    assert write(path, [], keep_rows=99).rows == 5
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_torn_last_line_is_dropped(path):
    write(path, rows_of(1, 2))
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert read_rows(path) == rows_of(1, 2)
    write(path, rows_of(3), keep_rows=3)
    assert read_rows(path) == rows_of(1, 2, 3)


def test_a_resume_without_its_file_starts_one(path):
    assert write(path, rows_of(7), keep_rows=3).rows == 1
    assert read_rows(path) == rows_of(7)


def test_the_error_names_a_line_that_is_no_row(path):
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(LockstepError, match="line 2"):
        read_rows(path)
