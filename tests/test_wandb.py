"""The real W&B client, offline or with a loopback server that refuses it; each test in a process of its own."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.wandb_server import WandbServer
from trainer.config.run_sections import WandbConfig
from trainer.errors import ConfigError
from trainer.reporting.wandb.run import start_wandb

REPOSITORY = Path(__file__).parents[1]
PREAMBLE = """
import json, sys, time
from pathlib import Path
from trainer.config.run_sections import WandbConfig
from trainer.reporting.wandb.run import start_wandb

notes = []
def start(mode="auto", run_id=None, name="first"):
    section = WandbConfig(mode=mode, project="things", group="g", tags=["t"])
    return start_wandb(section, run_name=name, directory=Path("run"), config={"optimizer": {"lr": 0.1}},
                       run_id=run_id, note=notes.append)
def report(**facts):
    Path("facts.json").write_text(json.dumps({"notes": notes, "imported": "wandb" in sys.modules, **facts}))
"""


@pytest.fixture
def run(tmp_path):
    """Run a script in `tmp_path`, which is its home too; returns what it reported and what it printed."""

    def run_script(script, **environment):
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("WANDB_", "NETRC"))
        }
        home = {
            "HOME": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path),
            "WANDB_ERROR_REPORTING": "false",
        }
        process = subprocess.run(
            [sys.executable, "-c", PREAMBLE + script],
            cwd=tmp_path,
            env={**inherited, **home, "PYTHONPATH": str(REPOSITORY), **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(
            (tmp_path / "facts.json").read_text()
        ), process.stdout + process.stderr

    return run_script


def records(path: Path):
    """The records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    position = 7
    parts = []
    while position + 7 <= len(data):
        # A block's end too short for a record's header.
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def rows(path: Path):
    for record in records(path):
        if record.HasField("history"):
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            yield {
                name: value for name, value in items.items() if not name.startswith("_")
            }


@pytest.mark.fresh_process  # imports W&B's client, and no torch
def test_an_offline_run_and_its_resumption(run, tmp_path):
    facts, printed = run(
        """
first = start()
first.log({"step": 10, "train/loss": 0.1, "lr": 1e-05})
first.log({"step": 20, "train/loss": float("nan")})
import wandb, numpy
wandb.Image(numpy.zeros((4, 4, 3), dtype="uint8")).image.save("figure.png")
first.log_figures(20, {"curves": Path("figure.png")})
first.finish()
again = start(run_id=first.id, name="again")
again.log({"step": 15, "val/loss": 2})
again.finish(status=1, failure="no luck")
report(ids=[first.id, again.id], described=first.describe())
"""
    )
    assert facts["notes"] == []
    assert printed == ""
    assert facts["ids"][0] == facts["ids"][1]
    assert facts["described"] == "offline (nobody is logged in), files in run/wandb"

    first, again = sorted(
        (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime
    )
    logged = list(rows(first))
    assert logged[0] == {"step": 10, "train/loss": 0.1, "lr": 1e-05}
    assert logged[1]["step"] == 20 and math.isnan(logged[1]["train/loss"])
    assert len(logged) == 3 and "figures/curves" in logged[2]
    assert len(list(first.parent.glob("files/media/images/figures/*.png"))) == 1
    # An older step is a value like any other.
    assert list(rows(again)) == [{"step": 15, "val/loss": 2}]

    (started,) = [record.run for record in records(first) if record.HasField("run")]
    assert (started.run_id, started.display_name) == (facts["ids"][0], "first")
    assert (started.project, started.run_group, list(started.tags)) == (
        "things",
        "g",
        ["t"],
    )
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["optimizer"] == {"lr": 0.1}
    metrics = [record.metric for record in records(first) if record.HasField("metric")]
    assert [(m.name or m.glob_name, m.step_metric) for m in metrics][:2] == [
        ("step", ""),
        ("*", "step"),
    ]
    exits = [
        [r.exit.exit_code for r in records(path) if r.HasField("exit")]
        for path in (first, again)
    ]
    assert exits == [[0], [1]]


@pytest.mark.fresh_process  # what a start imports
@pytest.mark.parametrize(
    ("mode", "environment"),
    [
        ("disabled", {}),
        ("auto", {"WANDB_MODE": "disabled"}),
        ("disabled", {"WANDB_MODE": "online"}),
    ],
)
def test_a_disabled_one_does_not_import_wandb(run, tmp_path, mode, environment):
    facts, _ = run(f"assert start({mode!r}) is None\nreport()", **environment)
    assert not facts["imported"]
    assert not (tmp_path / "run").exists()


@pytest.mark.fresh_process  # imports W&B's client, and no torch
def test_mode_auto_follows_the_environment(run):
    facts, printed = run(
        """
online = None
try:
    start("online")
except Exception as error:
    online = str(error)
one = start()
report(described=one.describe(), online=online)
one.finish()
""",
        WANDB_MODE="offline",
    )
    assert facts["described"] == "offline (WANDB_MODE), files in run/wandb"
    assert facts["online"].startswith("wandb.mode: online needs a W&B login")
    assert printed == ""


def test_an_unknown_mode_in_the_environment_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ConfigError) as error:
        start_wandb(
            WandbConfig(),
            run_name="x",
            directory=tmp_path,
            config={},
            run_id=None,
            note=print,
        )
    assert error.value.key == "WANDB_MODE"


@pytest.mark.fresh_process  # imports W&B's client, and no torch
def test_a_server_that_refuses_leaves_the_run_offline(run):
    with WandbServer() as server:
        server.fault("403")
        facts, printed = run(
            """
one = start("online", run_id="kept1")
one.log({"step": 1})
report(described=one.describe(), id=one.id)
one.finish()
""",
            **server.environment,
        )
    assert facts["described"] == "offline, files in run/wandb"
    assert facts["id"] == "kept1"
    (note,) = facts["notes"]
    assert "403" in note and "python -m trainer sync run" in note
    assert printed == ""


def test_a_client_that_cannot_start_is_reported(tmp_path):
    (tmp_path / "run").write_text("in the way")
    notes = []
    one = start_wandb(
        WandbConfig(mode="offline"),
        run_name="x",
        directory=tmp_path / "run",
        config={},
        run_id=None,
        note=notes.append,
    )
    assert one is None
    assert len(notes) == 1 and "did not start" in notes[0]
