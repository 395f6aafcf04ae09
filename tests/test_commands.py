"""The command line: how arguments are read, `--help`, mistakes, and an installed package outside a checkout."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import train
from tests.programs import run_program
from trainer import __main__ as program
from trainer.commands import train as train_command
from trainer.commands.arguments import CommandParser, load_config, one_of, whole_number
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHORT = ["train.max_steps=2", "run.figures=false", "wandb.mode=disabled"]


def parser() -> CommandParser:
    parser = CommandParser("predict", "What it does.")
    parser.add_run()
    parser.add_argument("paths", nargs="*", default=[])
    parser.add_argument("--top", type=whole_number(least=1), default=3)
    parser.add_argument("--kind", type=one_of(("torch", "onnx")))
    parser.add_argument("--json", action="store_true")
    parser.add_overrides("changes a key")
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "a", "b", "--top=2", "--json", "optimizer.lr=1", "data.workers=0"],
        ["optimizer.lr=1", "--json", "run", "--top", "2", "a", "data.workers=0", "b"],
        [
            "--optimizer.lr=1",
            "run",
            "a",
            "--json",
            "b",
            "--data.workers=0",
            "--top",
            "2",
        ],
    ],
)
def test_paths_options_and_overrides_stand_in_any_order(arguments: list[str]) -> None:
    options = parser().parse(arguments)
    assert (options.run, options.paths) == (Path("run"), ["a", "b"])
    assert (options.top, options.kind, options.json) == (2, None, True)
    assert options.overrides == ["optimizer.lr=1", "data.workers=0"]


def test_what_exists_is_a_path_also_with_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "optimizer.lr=0.1"):
        (tmp_path / name).mkdir()
    options = parser().parse(["lr=0.1", "optimizer.lr=0.1", "optimizer.lr=0.2"])
    assert (options.run, options.paths) == (Path("lr=0.1"), ["optimizer.lr=0.1"])
    assert options.overrides == ["optimizer.lr=0.2"]


def config_options(*arguments: str) -> argparse.Namespace:
    parser = CommandParser("check", "What it does.")
    parser.add_config()
    return parser.parse(arguments)


def test_a_config_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optimizer.lr=0.1").mkdir()
    (tmp_path / "a=b.yaml").write_text("run: {name: given}")
    options = config_options("optimizer.lr=0.1", "a=b.yaml")
    assert (options.config, options.overrides) == ("a=b.yaml", ["optimizer.lr=0.1"])
    config = load_config(options)
    assert (config.run.name, config.optimizer.lr) == ("given", 0.1)


def test_an_override_may_be_longer_than_the_name_of_a_file() -> None:
    override = f"data.train_transforms=[{', '.join(['{name: RandomHorizontalFlip, p: 0.5}'] * 50)}]"
    assert parser().parse(["run", override]).overrides == [override]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], 'chek: no such command; did you mean "check"?; --help lists them'),
        (["predict"], "the following arguments are required: RUN"),
        (["predict", "run"], "PATH: is missing: predict RUN PATH…"),
        (["predict", "run", "--jsn"], '--jsn: no such option; did you mean "json"?'),
        (
            ["predict", "run", "--export=onx"],
            '--export: "onx" is not one of torch, onnx; did you mean "onnx"?',
        ),
        (["replay", "run"], "the following arguments are required: --step"),
        (["replay", "run", "--stp=3"], '--stp: no such option; did you mean "step"?'),
        (["replay", "run", "--step"], "--step: expected one argument"),
        (
            ["replay", "run", "--step", "x"],
            '--step: needs a whole number, 0 or more, and got "x"',
        ),
        (["evaluate", "run", "run"], "run: is one argument too many"),
        (
            ["evaluate", "nowhere"],
            "nowhere: is not a run directory: it has no config.yaml",
        ),
        (["compare", "a"], "the following arguments are required: RUN_B"),
        (
            ["compare", "a", "b", "optimizer.lr=1"],
            "optimizer.lr=1: is one argument too many",
        ),
        (["sync"], "the following arguments are required: RUN"),
        (["cache", "list"], "the following arguments are required: DIR\n"),
        (["sync", "--all", "run"], "--all: no such option"),
        (
            ["sweep", "a.yaml", "--parallel", "0"],
            '--parallel: needs a whole number, 1 or more, and got "0"',
        ),
        (["check", "a.yaml", "b.yaml"], "b.yaml: is one argument too many"),
        (["explain", "configs/digit.yaml"], 'did you mean "digits.yaml"'),
        (
            ["train", "--epochs=3"],
            "--epochs: no such option; a key of the config is set as section.key=value",
        ),
        (
            ["train", "train.epoch=3"],
            'train.epoch: no such key; did you mean "epochs"?',
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert program.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def test_each_command_has_help_with_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' own process keeps its handlers.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["/usr/bin/lockstep"])
    assert program.main([]) == 0
    overview = capsys.readouterr().out
    for command in program.COMMANDS:
        try:
            assert program.main([command, "--help"]) == 0
        except SystemExit as exit:
            assert exit.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: lockstep {command} ")
        assert f"\nlockstep {command} " in text
        summary = text.split("\n\n")[1]
        assert summary in overview


def run_python(
    *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.fresh_process  # what a start imports
def test_help_needs_no_torch() -> None:
    code = """if True:
        import sys
        from trainer.__main__ import COMMANDS, main
        for command in COMMANDS:
            try:
                main([command, "--help"])
            except SystemExit:
                pass
        main(["--help"])
        assert not {"torch", "numpy", "wandb", "rich"} & set(sys.modules)
    """
    run_python("-c", code)


def test_train_py_and_the_module_are_one_command_on_several_processes_too(
    tmp_path: Path,
) -> None:
    assert train.main is train_command.main
    done = run_program(
        ["-m", "trainer", "train", f"--run.dir={tmp_path}", *SHORT], ranks=2
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "digits" / "summary.json").read_text())["world_size"]
        == 2
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what `pip install .` installs, with the command in `bin/`."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("trainer", "configs"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    run_python(
        "-c",
        "from setuptools import build_meta; build_meta.build_wheel('dist')",
        cwd=source,
    )
    (wheel,) = (source / "dist").glob("lockstep-*.whl")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    (entry,) = distribution.entry_points
    (site / "bin").mkdir()
    script = f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
    (site / "bin" / entry.name).write_text(script)
    return site


def test_a_wheel_holds_all_packages_the_configs_and_the_licence(site: Path) -> None:
    def files(directory: Path, pattern: str) -> set[Path]:
        return {path.relative_to(directory) for path in directory.rglob(pattern)}

    assert files(site / "trainer", "*.py") == files(ROOT / "trainer", "*.py")
    assert files(site / "trainer/configs", "*.yaml") == files(
        ROOT / "configs", "*.yaml"
    )
    assert (site / "trainer/py.typed").is_file()
    assert len([*site.glob("lockstep-*.dist-info/licenses/LICENSE")]) == 1


@pytest.mark.fresh_process  # imports the package from another place
def test_an_installed_package_needs_no_checkout(site: Path, tmp_path: Path) -> None:
    """Its command is there, and `check` and `train`, in one process to save time, find the default config."""
    usage = run_python(
        site / "bin/lockstep", "train", "--help", cwd=tmp_path, PYTHONPATH=str(site)
    ).stdout
    assert usage.startswith("usage: lockstep train [-h] [CONFIG.yaml] [key=value ...]")
    code = f"""if True:
        import trainer
        from trainer.__main__ import main
        print(trainer.__file__)
        assert main(["check", *{SHORT}]) == main(["train", *{SHORT}]) == 0
    """
    output = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(site)).stdout
    assert output.startswith(str(site))
    assert "this runs: a first step of 64 samples" in output
    assert json.loads((tmp_path / "runs/digits/summary.json").read_text())["steps"] == 2


def test_arguments_for_argparse_name_what_they_take() -> None:
    for convert, text in (
        (whole_number(least=1), "0"),
        (whole_number(least=1), "1.5"),
        (one_of(("a", "b")), "c"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            convert(text)
    assert whole_number(least=0)("0") == 0


def test_a_config_is_one_at_a_time() -> None:
    with pytest.raises(ConfigError, match=r"b\.yaml: is one argument too many"):
        config_options("a.yaml", "optimizer.lr=1", "b.yaml")
