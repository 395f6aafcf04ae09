"""Typed values from YAML and the command line; every mistake one message with key, origin and nearest name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.load import command_line, help_text, load
from trainer.config.registry import build, resolve
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.storage.run_directory import config_yaml


def error(*overrides: str, text: str = "", directory: Path | None = None) -> str:
    path = None
    if directory is not None:
        path = directory / "a.yaml"
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=1", 'optimzer: no such section; did you mean "optimizer"? (the command line)'),
        ("run.sed=1", 'run.sed: no such key; did you mean "seed"? (the command line)'),
        ("train.epochs=many", "train.epochs: many is not an integer (the command line)"),
        ("train.epochs=2.5", "train.epochs: 2.5 is not an integer (the command line)"),
        ("train.epochs=true", "train.epochs: true is not an integer (the command line)"),
        ("train.compile=1", "train.compile: 1 is not a boolean (true or false) (the command line)"),
        ("optimizer.lr=fast", "optimizer.lr: fast is not a number (the command line)"),
        ("data.mean=0.5", "data.mean: 0.5 is not a list of numbers (the command line)"),
        ("batch.size=0", "batch.size: 0 is less than 1, the least it may be (the command line)"),
        (
            "train.precision=fp31",
            'train.precision: fp31 is not one of fp32, bf16, fp16, fp64; did you mean "fp32"? (the command line)',
        ),
        ("train=3", "train: is a section of keys, not 3 (the command line)"),
        ("batch.micro_size=100", "batch.micro_size: 100 is more than batch.size=64; lower it (the command line)"),
        ("=3", "=3: an override is written key=value, as in optimizer.lr=0.01"),
        ("run.name=${oc.env:NO_SUCH_NAME}", "run.name: "),
        ("batch.size=[", "batch.size: [ is not valid YAML: "),
        (
            "train.max_grad_norm=0",
            "train.max_grad_norm: 0 leaves nothing of a gradient; null does not clip (the command line)",
        ),
        ("data.std=[1,0]", "data.std: [1.0, 0.0] is not all above 0: channels are divided by it (the command line)"),
    ],
)
def test_a_mistake_is_one_message(override: str, message: str) -> None:
    text = error(override)
    assert text.startswith(message) if message.endswith(": ") else text == message
    assert "\n" not in text


def test_a_mistake_in_a_file_is_found_by_its_line(tmp_path: Path) -> None:
    text = "run:\n  name: a\ntrain:\n  epochs: 3\n  epoch: 4\n"
    assert "a.yaml, line 5)" in error(text=text, directory=tmp_path)
    assert "is not valid YAML" in error(text="run: [", directory=tmp_path)
    for name, message in (("b.yaml", "cannot read this config"), ("aa.yaml", 'did you mean "a.yaml"')):
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name, [])
        assert message in str(caught.value)


@pytest.mark.parametrize("text", [b"- a\n- b", b"some text", b"42", b"\xff\xfe\x00"])
def test_a_file_that_is_no_mapping_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: (is no mapping|cannot read .*: it is no text)"):
        load(tmp_path / "a.yaml", [])
    (tmp_path / "a.yaml").write_text("# nothing but a comment\n")
    assert load(tmp_path / "a.yaml", []) == Config()


def test_types_from_the_command_line() -> None:
    config = load(
        None,
        ["optimizer.lr=1e-4", "data.mean=[0.5,1]", "train.max_steps=null", "run.name=7", "optimizer.betas=[0.9,0.99]"],
    )
    assert config.optimizer.lr == 1e-4
    assert config.data.mean == [0.5, 1.0]
    assert config.train.max_steps is None
    assert config.run.name == "7"
    assert config.optimizer.args == {"betas": [0.9, 0.99]}


def test_the_command_line_is_laid_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_NAME", "from-the-environment")
    (tmp_path / "c.yaml").write_text(
        "run: {name: '${oc.env:SOME_NAME}', seed: 3}\noptimizer: {lr: 0.5, momentum: 0.9}\n"
    )
    config = load(tmp_path / "c.yaml", ["run.seed=4", "optimizer.nesterov=true"])
    assert (config.run.name, config.run.seed) == ("from-the-environment", 4)
    assert config.optimizer.args == {"momentum": 0.9, "nesterov": True}


@given(
    st.builds(
        lambda lr, epochs, mean, args: Config.from_dict(
            {"optimizer": {"lr": lr, **args}, "train": {"epochs": epochs}, "data": {"mean": mean}}
        ),
        st.floats(0, 1e6),
        st.integers(1, 10**9),
        st.none() | st.lists(st.floats(-10, 10), max_size=3),
        st.dictionaries(st.sampled_from(["momentum", "betas", "eps"]), st.floats(0, 1) | st.booleans()),
    )
)
def test_a_written_config_reads_back_the_same(config: Config) -> None:
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(yaml.safe_load(config_yaml(config))) == config


def test_help_names_every_key_with_default_and_meaning() -> None:
    text = help_text()
    for section, keys in Config().to_dict().items():
        for key in keys:
            assert f"  {section}.{key}=" in text
    assert "batch.micro_size=null  (integer|null)" in text


def test_command_line() -> None:
    assert command_line(["a=1"]) == (Path("configs/digits.yaml"), ["a=1"])
    assert command_line(["x.yaml", "a=1"]) == (Path("x.yaml"), ["a=1"])
    with pytest.raises(ConfigError, match="no such option"):
        command_line(["--epochs"])
    with pytest.raises(ConfigError, match="one config at a time"):
        command_line(["a.yaml", "b.yaml"])


@pytest.mark.fresh_process  # what a start imports
def test_help_and_config_errors_need_no_torch() -> None:
    code = "import sys, train; train.main({!r}); sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["train.epoch=3"]):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], check=False, capture_output=True)
        assert done.returncode == 0


def takes(first: int, size: int, padding: int = 0) -> tuple[int, int, int]:
    if padding < 0:
        raise ValueError("padding must not be negative")
    return first, size, padding


def test_components_are_called_with_their_section() -> None:
    assert build("data", takes, {"size": 3}, 1) == (1, 3, 0)
    assert build("data", takes, {"padding": 2}, 1, size=4, unwanted=5) == (1, 4, 2)
    for arguments, message in (
        ({"size": 3, "pading": 1}, 'data.pading: takes has no such argument; did you mean "padding"?'),
        ({"padding": 1}, "data.size: takes needs this argument"),
        ({"size": 3, "first": 1}, "data.first: takes has no such argument"),
        ({"size": 3, "padding": -1}, "padding must not be negative"),
    ):
        with pytest.raises(ConfigError) as caught:
            build("data", takes, arguments, 1)
        assert message in str(caught.value)


def test_names_are_short_or_import_paths() -> None:
    known = {"sgd": 1}
    assert resolve("optimizer", "sgd", known) == 1
    assert resolve("optimizer", "math.sqrt", known)(9) == 3
    for name, message in (
        ("sdg", 'optimizer.name: "sdg" is not one of sgd, nor an import path; did you mean "sgd"?'),
        ("no_such_module.X", 'cannot import "no_such_module"'),
        ("math.sqr", '"math" has no "sqr"; did you mean "sqrt"?'),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve("optimizer", name, known)
        assert message in str(caught.value)
