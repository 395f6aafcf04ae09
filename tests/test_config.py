"""Typed values from YAML and the command line; every mistake one message with key, origin and nearest name."""

from __future__ import annotations

import abc
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.config.component_lists import ObserverConfig
from trainer.config.data_section import DataConfig
from trainer.config.load import command_line, help_text, load
from trainer.config.model_sections import (
    BatchNormConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)
from trainer.config.registry import build, build_observers, resolve
from trainer.config.run_sections import BatchConfig, RunConfig
from trainer.config.schema import Config
from trainer.config.secrets import redacted, redacted_arguments, redacted_message
from trainer.config.train_section import TrainConfig
from trainer.config.yaml_file import find_config
from trainer.errors import ConfigError
from trainer.storage.run_directory import check_same_run, config_yaml

ROOT = Path(__file__).parents[1]


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
        (
            "optimzer.lr=1",
            'optimzer: no such section; did you mean "optimizer"? (the command line)',
        ),
        ("run.sed=1", 'run.sed: no such key; did you mean "seed"? (the command line)'),
        (
            "train.epochs=many",
            "train.epochs: many is not an integer (the command line)",
        ),
        ("train.epochs=2.5", "train.epochs: 2.5 is not an integer (the command line)"),
        (
            "train.epochs=true",
            "train.epochs: true is not an integer (the command line)",
        ),
        (
            "train.compile=1",
            "train.compile: 1 is not a boolean (true or false) or default|reduce-overhead|max-autotune (the command "
            "line)",
        ),
        ("optimizer.lr=fast", "optimizer.lr: fast is not a number (the command line)"),
        ("data.mean=0.5", "data.mean: 0.5 is not a list of numbers (the command line)"),
        (
            "batch.size=0",
            "batch.size: 0 is less than 1, the least it may be (the command line)",
        ),
        (
            "train.precision=fp31",
            'train.precision: fp31 is not one of fp32, bf16, fp16, fp64; did you mean "fp32"? (the command line)',
        ),
        ("train=3", "train: is a section of keys, not 3 (the command line)"),
        (
            "batch.micro_size=100",
            "batch.micro_size: 100 is more than batch.size=64; lower it (the command line)",
        ),
        ("=3", "=3: an override is written key=value, as in optimizer.lr=0.01"),
        ("run.name=${oc.env:NO_SUCH_NAME}", "run.name: "),
        ("batch.size=[", "batch.size: [ is not valid YAML: "),
        (
            "train.max_grad_norm=0",
            "train.max_grad_norm: 0 would make every gradient zero; null turns clipping off (the command line)",
        ),
        (
            "data.std=[1,0]",
            "data.std: [1.0, 0.0] is not all above 0: channels are divided by it (the command line)",
        ),
    ],
)
def test_a_mistake_is_one_message(override: str, message: str) -> None:
    text = error(override)
    assert text.startswith(message) if message.endswith(": ") else text == message
    assert "\n" not in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Config(run=RunConfig(reproducibility="bitwize")),  # type: ignore[arg-type]
            'run.reproducibility: bitwize is not one of standard, bitwise; did you mean "bitwise"?',
        ),
        (lambda: OptimizerConfig(lr="0.1"), "optimizer.lr: '0.1' is not a number"),  # type: ignore[arg-type]
        (
            lambda: OptimizerConfig(lr=-1),
            "optimizer.lr: -1.0 is less than 0, the least it may be",
        ),
        (
            lambda: OptimizerConfig(lr=float("nan")),
            "optimizer.lr: .nan is less than 0, the least it may be",
        ),
        (lambda: TrainConfig(epochs=True), "train.epochs: true is not an integer"),
        (lambda: TrainConfig(epochs=2.5), "train.epochs: 2.5 is not an integer"),  # type: ignore[arg-type]
        (
            lambda: TrainConfig(compile=1),
            "train.compile: 1 is not a boolean (true or false) or default|reduce-overhead|max-autotune",
        ),  # type: ignore[arg-type]
        (lambda: BatchConfig(size=torch.tensor(0)), "batch.size: 0 is less than 1"),  # type: ignore[arg-type]
        (lambda: DataConfig(mean=(0.5, "a")), "data.mean: a is not a number"),  # type: ignore[arg-type]
        (lambda: RunConfig(name=object()), "run.name: <object object at"),  # type: ignore[arg-type]
        (
            lambda: LossConfig(args={"weight": len}),
            "loss.weight: <built-in function len> is a builtin_function",
        ),
        (lambda: LossConfig(args=[1]), "loss.args: [1] is not a mapping of arguments"),  # type: ignore[arg-type]
        (
            lambda: OptimizerConfig(args={"lr": 3}),
            "optimizer.lr: is a key of this section",
        ),
        (
            lambda: Config(run={}),
            "run: is a RunConfig, not a mapping; Config.from_dict",
        ),  # type: ignore[arg-type]
        (lambda: Config(run=None), "run: is a RunConfig, not null"),  # type: ignore[arg-type]
        (
            lambda: Config(model=DataConfig()),
            "model: is a ModelConfig, not a DataConfig",
        ),  # type: ignore[arg-type]
        (
            lambda: Config(observers=[{"name": "a.B"}]),
            "observers[0]: is an ObserverConfig",
        ),  # type: ignore[arg-type]
        (lambda: replace(Config().batch, size=0), "batch.size: 0 is less than 1"),
        (
            lambda: replace(Config(), batch=BatchConfig(micro_size=65)),
            "batch.micro_size: 65 is more than batch.size=64",
        ),
        (
            lambda: Config(
                run=RunConfig(reproducibility="bitwise"),
                batch_norm=BatchNormConfig(mode="sync"),
            ),
            "batch_norm.mode: sync takes its statistics",
        ),
        (lambda: Config.from_dict([]), "config: is a mapping of sections, not a list"),  # type: ignore[arg-type]
        (
            lambda: Config.from_dict({"run": object()}),
            "run: is a section of keys, not <object",
        ),
    ],
)
def test_a_config_made_in_python_is_checked_as_yaml_is(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_values_of_python_become_what_yaml_can_write(tmp_path: Path) -> None:
    betas = (0.9, np.float32(0.5))
    config = Config(
        run=RunConfig(dir=tmp_path),  # type: ignore[arg-type]
        data=DataConfig(mean=(0, np.float64(0.25)), std=torch.tensor([1.0])),  # type: ignore[arg-type]
        model=ModelConfig(unfreeze={5: ["a"]}),  # type: ignore[dict-item]
        optimizer=OptimizerConfig(
            lr=np.float64(0.5), args={"betas": betas, "amsgrad": np.bool_(True)}
        ),
        train=TrainConfig(epochs=np.int64(3)),  # type: ignore[arg-type]
    )
    assert config.run.dir == str(tmp_path)
    assert (config.data.mean, config.data.std) == ([0.0, 0.25], [1.0])
    assert (type(config.optimizer.lr), type(config.train.epochs)) == (float, int)
    assert config.optimizer.args == {"betas": [0.9, 0.5], "amsgrad": True}
    assert config.model.unfreeze == {"5": ["a"]}
    assert Config.from_dict(yaml.safe_load(config_yaml(config))) == config


def test_a_mistake_in_a_file_is_found_by_its_line(tmp_path: Path) -> None:
    text = "run:\n  name: a\ntrain:\n  epochs: 3\n  epoch: 4\n"
    assert "a.yaml, line 5)" in error(text=text, directory=tmp_path)
    assert "is not valid YAML" in error(text="run: [", directory=tmp_path)
    for name, message in (
        ("b.yaml", "cannot read this config"),
        ("aa.yaml", 'did you mean "a.yaml"'),
    ):
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name, [])
        assert message in str(caught.value)


@pytest.mark.parametrize("text", [b"- a\n- b", b"some text", b"42", b"\xff\xfe\x00"])
def test_a_file_that_is_no_mapping_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(
        ConfigError, match=r"a\.yaml: (is no mapping|cannot read .*: it is no text)"
    ):
        load(tmp_path / "a.yaml", [])
    (tmp_path / "a.yaml").write_text("# nothing but a comment\n")
    assert load(tmp_path / "a.yaml", []) == Config()


def test_types_from_the_command_line() -> None:
    config = load(
        None,
        [
            "optimizer.lr=1e-4",
            "data.mean=[0.5,1]",
            "train.max_steps=null",
            "run.name=7",
            "optimizer.betas=[0.9,0.99]",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.data.mean == [0.5, 1.0]
    assert config.train.max_steps is None
    assert config.run.name == "7"
    assert config.optimizer.args == {"betas": [0.9, 0.99]}


def test_load_takes_paths_and_overrides_of_several_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("optimizer: {lr: 0.5, momentum: 0.9}\n")
    monkeypatch.chdir(tmp_path)
    expected = Config(optimizer=OptimizerConfig(lr=0.5, args={"momentum": 0.9}))
    for path in ("c.yaml", "./c.yaml", Path("c.yaml"), tmp_path / "c.yaml"):
        assert (
            load(path) == load(path, []) == load(path, ()) == load(path, {}) == expected
        )
    assert load() == load(None) == load(None, []) == Config()
    changed = replace(
        expected,
        optimizer=OptimizerConfig(lr=0.25, args={"momentum": 0.9, "betas": [0.5, 1]}),
    )
    assert load("c.yaml", ["optimizer.lr=0.25", "optimizer.betas=[0.5,1]"]) == changed
    assert (
        load("c.yaml", {"optimizer.lr": np.float64(0.25), "optimizer.betas": (0.5, 1)})
        == changed
    )
    assert load("c.yaml", {"optimizer": {"lr": 0.25, "betas": [0.5, 1]}}) == changed
    assert load(None, {"run.name": "None"}).run.name == "None"
    with pytest.raises(
        ConfigError, match=r"optimizer\.lr: fast is not a number \(the overrides\)"
    ):
        load("c.yaml", {"optimizer.lr": "fast"})
    with pytest.raises(
        ConfigError, match=r"run\.name: <object object .* \(the overrides\)"
    ):
        load(None, {"run.name": object()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "path of a YAML file first, not 3"),
        ((["run.seed=1"],), r"path of a YAML file first, not \['run.seed=1'\]"),
        (({"run": {}},), "Config.from_dict reads a mapping"),
        ((None, "run.seed=1"), "overrides as a list, .* not 'run.seed=1'"),
        ((None, [3]), r"overrides as a list, .* not \[3\]"),
        ((None, None), "overrides as a list, .* not None"),
    ],
)
def test_load_names_an_argument_it_cannot_take(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load(*arguments)


@pytest.mark.fresh_process  # imports the package from another place
def test_the_default_config_comes_with_the_package(tmp_path: Path) -> None:
    """As installed: the package lies elsewhere with its own `configs`, and the current directory has none."""
    package, elsewhere = tmp_path / "site" / "trainer", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "trainer", package)
    shutil.copytree(ROOT / "configs", package / "configs", dirs_exist_ok=True)
    elsewhere.mkdir()
    code = (
        "from trainer.config.load import command_line, help_text, load\n"
        "print(load(*command_line([])).run.name)\n"
        "print(help_text().splitlines()[0])\n"
        "for path, *overrides in (['configs/digits.yaml', 'run.sed=1'], ['configs/digit.yaml'], ['no/digits.yaml']):\n"
        "    try: load(path, overrides)\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    name, usage, mistake, misspelt, unknown = process.stdout.splitlines()
    assert name == "digits"
    assert str(package / "configs" / "digits.yaml") in usage
    assert mistake == 'run.sed: no such key; did you mean "seed"? (the command line)'
    assert (
        misspelt.startswith("configs/digit.yaml: cannot read this config")
        and '"digits.yaml"' in misspelt
    )
    assert unknown.startswith("no/digits.yaml: cannot read this config")


def test_a_config_of_the_checkout_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        find_config("configs/digits.yaml").read_text()
        == (ROOT / "configs" / "digits.yaml").read_text()
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.yaml").write_text("run: {name: mine, sed: 3}")
    assert find_config("configs/digits.yaml") == Path("configs/digits.yaml")
    with pytest.raises(ConfigError, match=r"\(configs/digits\.yaml, line 1\)"):
        load("configs/digits.yaml")


def test_the_command_line_is_laid_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            {
                "optimizer": {"lr": lr, **args},
                "train": {"epochs": epochs},
                "data": {"mean": mean},
            }
        ),
        st.floats(0, 1e6),
        st.integers(1, 10**9),
        st.none() | st.lists(st.floats(-10, 10), max_size=3),
        st.dictionaries(
            st.sampled_from(["momentum", "betas", "eps"]),
            st.floats(0, 1) | st.booleans(),
        ),
    )
)
def test_a_written_config_reads_back_the_same(config: Config) -> None:
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(yaml.safe_load(config_yaml(config))) == config


@given(
    st.text(st.sampled_from("\\${}:ab'\" "), max_size=8),
    st.lists(
        st.dictionaries(
            st.sampled_from(["name", "size"]), st.text(max_size=5) | st.integers()
        ),
        max_size=2,
    ),
)
@example("a", [{"name": "\x85"}, {"name": "a\u2028b"}])  # line breaks to YAML alone
def test_text_that_looks_like_an_interpolation_is_kept_literally(
    text: str, transforms: Any
) -> None:
    config = Config(
        run=RunConfig(name=text),
        data=DataConfig(train_transforms=transforms, args={"a": {"b": [text]}}),
    )
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(yaml.safe_load(config_yaml(config))) == config


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config that takes texts, a list and numbers from the environment: directly, through other keys, decoded."""
    monkeypatch.setenv("HIDDEN", "a-hidden-text")
    monkeypatch.setenv("HIDDEN_LIST", "[a-listed-text, 3]")
    monkeypatch.setenv("NUMBER", "7")
    return {
        "run": {
            "name": "${oc.env:NUMBER}",
            "seed": "${oc.decode:${oc.env:NUMBER}}",
            "dir": "here",
        },
        "data": {
            "root": "${oc.env:HIDDEN}",
            "inner": {
                "url": "http://me:login@host/${data.root}",
                "plain": "${run.dir}",
            },
            "copy": "${data.inner}",
            "decoded": "${oc.decode:${oc.env:HIDDEN}}",
            "listed": "${oc.decode:${oc.env:HIDDEN_LIST}}",
            "listed_within": [{"a": "${oc.env:NO_SUCH_NAME,${oc.env:HIDDEN}}"}],
        },
        "model": {"unfreeze": {5: ["${oc.env:HIDDEN}"]}},
    }


def test_interpolations_are_resolved(tree: dict[str, Any]) -> None:
    config = load(None, tree)
    assert (config.run.name, config.run.seed, config.data.root) == (
        "7",
        7,
        "a-hidden-text",
    )
    arguments = config.data.args
    assert arguments["inner"] == {
        "url": "http://me:login@host/a-hidden-text",
        "plain": "here",
    }
    assert arguments["copy"] == arguments["inner"]
    assert (arguments["decoded"], arguments["listed"]) == (
        "a-hidden-text",
        ["a-listed-text", 3],
    )
    assert arguments["listed_within"] == [{"a": "a-hidden-text"}]


def test_text_from_the_environment_is_written_as_its_reference(
    tree: dict[str, Any],
) -> None:
    config = load(None, tree)
    text = config_yaml(config)
    document = yaml.safe_load(text)
    assert "-text" not in text
    for name in ("root", "copy", "decoded", "listed", "listed_within"):
        assert document["data"][name] == tree["data"][name]
    assert document["data"]["inner"] == {
        "url": "http://me:login@host/${data.root}",
        "plain": "here",
    }
    assert (document["run"]["name"], document["run"]["seed"]) == ("${oc.env:NUMBER}", 7)
    assert Config.from_dict(document) == Config.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    public = str(redacted(config.to_dict()))
    assert "-text" not in public and "login" not in public
    assert (
        redacted_message("no a-hidden-text, a-listed-text")
        == "no <redacted>, <redacted>"
    )


def test_a_change_in_python_keeps_the_other_references(tree: dict[str, Any]) -> None:
    config = load(None, tree)
    run = replace(config.run, name="other")
    data = replace(config.data, root="elsewhere")
    document = replace(config, run=run, data=data).to_dict()
    assert (document["run"]["name"], document["data"]["root"]) == ("other", "elsewhere")
    assert document["data"]["copy"] == "${data.inner}"
    assert (
        replace(config, data=DataConfig()).to_dict()["data"]
        == Config().to_dict()["data"]
    )


def test_a_resumed_run_notices_another_environment(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(None, tree)
    before = config.to_dict(digests=True)  # as a checkpoint holds it
    assert before["data"]["root"] == "${oc.env:HIDDEN} (c0521206)"
    check_same_run(before, config, config.run)
    monkeypatch.setenv("HIDDEN", "another-text")
    with pytest.raises(
        ConfigError, match=r"data\.root was \$\{oc\.env:HIDDEN\} \(c0521206\)"
    ):
        check_same_run(before, load(None, tree), config.run)


def test_secrets_of_a_config_made_in_python_are_kept_out_of_messages() -> None:
    config = Config(
        data=DataConfig(
            args={
                "api_key": "pythons-key",
                "more": [{"apiToken": 123456, "a": "shown"}],
            }
        )
    )
    assert (
        redacted_message("no pythons-key 123456 shown")
        == "no <redacted> <redacted> shown"
    )
    assert redacted(config.to_dict())["data"]["more"] == [
        {"apiToken": "<redacted>", "a": "shown"}
    ]
    arguments = [
        "a.yaml",
        "data.more=[{apiToken: 1}]",
        "data.url=http://a:b@c",
        "optimizer.lr=1e-3",
    ]
    assert redacted_arguments(arguments) == [
        "a.yaml",
        "data.more=[{apiToken: <redacted>}]",
        "data.url=http://<redacted>@c",
        "optimizer.lr=1e-3",
    ]


def test_help_names_every_key_with_default_and_meaning() -> None:
    text = help_text()
    assert "  observers=[]  (list of mappings)" in text
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
        process = subprocess.run(
            [sys.executable, "-c", code.format(arguments)],
            check=False,
            capture_output=True,
        )
        assert process.returncode == 0


def takes(first: int, size: int, padding: int = 0) -> tuple[int, int, int]:
    if padding < 0:
        raise ValueError("padding must not be negative")
    return first, size, padding


def test_components_are_called_with_their_section() -> None:
    assert build("data", takes, {"size": 3}, 1) == (1, 3, 0)
    assert build("data", takes, {"padding": 2}, 1, size=4, unwanted=5) == (1, 4, 2)
    for arguments, message in (
        (
            {"size": 3, "pading": 1},
            'data.pading: takes has no such argument; did you mean "padding"?',
        ),
        ({"padding": 1}, "data.size: takes needs this argument"),
        ({"size": 3, "first": 1}, "data.first: takes has no such argument"),
        ({"size": 3, "padding": -1}, "padding must not be negative"),
    ):
        with pytest.raises(ConfigError) as caught:
            build("data", takes, arguments, 1)
        assert message in str(caught.value)


def test_names_are_short_or_import_paths() -> None:
    short_names = {"sgd": 1}
    assert resolve("optimizer", "sgd", short_names) == 1
    assert resolve("optimizer", "math.sqrt", short_names)(9) == 3
    for name, message in (
        (
            "sdg",
            'optimizer.name: "sdg" is not one of sgd, nor an import path; did you mean "sgd"?',
        ),
        ("no_such_module.X", 'cannot import "no_such_module"'),
        ("math.sqr", '"math" has no "sqr"; did you mean "sqrt"?'),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve("optimizer", name, short_names)
        assert message in str(caught.value)


class Observer(abc.ABC):
    @abc.abstractmethod
    def step(self) -> None: ...


class Counting(Observer):
    def __init__(self, every: int = 1) -> None:
        self.every = every

    def step(self) -> None: ...


def test_observers_are_a_list_of_components(tmp_path: Path) -> None:
    name = f"{__name__}.Counting"
    (tmp_path / "c.yaml").write_text(
        f"observers:\n  - name: {name}\n    every: 3\n  - {{name: {name}}}\n"
    )
    config = load(tmp_path / "c.yaml")
    assert config.observers == (
        ObserverConfig(name=name, args={"every": 3}),
        ObserverConfig(name=name),
    )
    assert config.to_dict()["observers"] == [{"name": name, "every": 3}, {"name": name}]
    assert Config.from_dict(yaml.safe_load(config_yaml(config))) == config
    assert (
        load(None, [f"observers=[{{name: {name}, every: 3}},{{name: {name}}}]"])
        == config
    )
    assert (
        load(tmp_path / "c.yaml", ["observers=[]"])
        == load(tmp_path / "c.yaml", ["observers=null"])
        == Config()
    )
    assert [
        observer.every for observer in build_observers(config.observers, Counting)
    ] == [3, 1]
    without = {
        key: value for key, value in Config().to_dict().items() if key != "observers"
    }
    assert Config.from_dict(without) == Config()  # as written by earlier versions
    check_same_run(without, config, config.run)  # what watches a run does not change it


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "observers=3",
            "observers: 3 is not a list such as [{name: my_package.MyObserver}] (the command line)",
        ),
        (
            "observers=[3]",
            "observers[0]: is a section of keys, not 3 (the command line)",
        ),
        (
            "observers=[{name: a.B},{every: 1}]",
            'observers[1].name: "" is not an import path, nor one of save_predictions; write {name: my_package',
        ),
        (
            "observers=[{name: Counting}]",
            'observers[0].name: "Counting" is not an import path, nor one of save_predictions; write {name: my_',
        ),
        (
            "observers=[{name: [a.B]}]",
            "observers[0].name: [a.B] is not text (the command line)",
        ),
        (
            "observers=[{name: a.B, name: a.C}]",
            "observers: [{name: a.B, name: a.C}] is not valid YAML: while constr",
        ),
    ],
)
def test_a_mistake_in_observers_is_named_by_its_index(
    override: str, message: str
) -> None:
    assert error(override).startswith(message)


def test_a_mistake_in_a_list_is_found_by_its_line(tmp_path: Path) -> None:
    text = "observers:\n  - name: a.B\n  - every: 3\n    name: B\n"
    assert error(text=text, directory=tmp_path).endswith("a.yaml, line 4)")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("no_such_module.X", {}, 'observers[0].name: cannot import "no_such_module"'),
        (
            f"{__name__}.Countin",
            {},
            f'observers[0].name: "{__name__}" has no "Countin"; did you mean "Counting"?',
        ),
        (
            f"{__name__}.Counting",
            {"evry": 3},
            'observers[0].evry: Counting has no such argument; did you mean "every"',
        ),
        (
            f"{__name__}.Observer",
            {},
            "observers[0]: Observer refused its arguments {}: TypeError: Can't instantiate",
        ),
        ("math.pi", {}, "observers[0].name: stands for 3.14159"),
        (
            "builtins.dict",
            {},
            "observers[0].name: builtins.dict gives a dict, which is not a Observer",
        ),
    ],
)
def test_an_observer_that_cannot_be_built_is_named(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_observers(
            [ObserverConfig(name="a.B"), ObserverConfig(name=name, args=arguments)][1:],
            Observer,
        )
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize(
    "key",
    [
        "run.dir",
        "data.root",
        "data.cache_dir",
        "model.weights",
        "data.val.a.root",
        "data.test.folder",
    ],
)
def test_a_path_is_not_empty(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match="is empty, and is to name") as caught:
        load(overrides=[f"{key}='{text}'"])
    assert caught.value.key == key
