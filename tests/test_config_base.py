"""A YAML that builds on others, and keys that are unset: in a file, and on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.load import command_line, load
from trainer.config.schema import Config
from trainer.errors import ConfigError
from trainer.storage.run_directory import config_yaml, read_config

BASE = """
run: {name: base, seed: 3}
data: {name: my_pkg.Set, split: train, train_transforms: [{name: A, size: 3}, {name: B}]}
optimizer: {name: sgd, lr: 0.5, momentum: 0.9}
model: {unfreeze: {5: [a], 9: backbone}}
"""


def write(directory: Path, **files: str) -> Path:
    """Write `NAME.yaml` files; returns the path of the last."""
    path = directory
    for name, text in files.items():
        path = directory / f"{name}.yaml"
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("run: {name: mine}", {"run": {"name": "mine", "seed": 3}}),
        # Another component leaves the base's arguments; the same one keeps them.
        (
            "optimizer: {name: adamw, weight_decay: 0.1}",
            {"optimizer": {"name": "adamw", "lr": 0.5, "weight_decay": 0.1}},
        ),
        (
            "optimizer: {name: torch.optim.SGD, nesterov: true}",
            {"optimizer": {"momentum": 0.9, "nesterov": True}},
        ),
        # A list replaces a list; an empty section says nothing; null stays null.
        (
            "data: {train_transforms: [{name: C}]}\noptimizer:\n",
            {
                "data": {"split": "train", "train_transforms": [{"name": "C"}]},
                "optimizer": {"momentum": 0.9},
            },
        ),
        ("optimizer: {momentum: null}", {"optimizer": {"momentum": None}}),
        # Unset keys have their defaults, or are no arguments any more.
        ("optimizer: {~momentum: , ~lr: }", {"optimizer": {"lr": 0.1}}),
        ("optimizer:\n  ~momentum:\n  nesterov: false\n", {"optimizer": {"lr": 0.5}}),
        (
            "~optimizer:\noptimizer: {name: adamw}",
            {"optimizer": {"name": "adamw", "lr": 0.1}},
        ),
        (
            "model: {unfreeze: {~5: , 7: [b]}}",
            {"model": {"unfreeze": {"7": ["b"], "9": "backbone"}}},
        ),
    ],
)
def test_a_file_is_laid_over_its_base(
    text: str, merged: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    file = write(tmp_path, base=BASE, mine=f"base: base.yaml\n{text}\n")
    config = load(file)
    tree = config.to_dict()
    for section, values in merged.items():
        for key, value in values.items():
            assert tree[section][key] == value
    unset = re.findall(r"~(\w+)", text)
    assert not set(unset) & tree["optimizer"].keys() - {"lr", "name"}
    if "adamw" in text:
        assert "momentum" not in tree["optimizer"]
    # What the run writes builds on nothing.
    assert Config.from_dict(yaml.safe_load(config_yaml(config))) == config
    assert config.notes[0] == f"{file} builds on {tmp_path / 'base.yaml'}"


def test_chains_lists_and_shipped_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    chain = write(
        tmp_path,
        a="run: {name: a, seed: 1}\ntrain: {epochs: 7}\n",
        b="base: a\nrun: {name: b}\n",
        c="optimizer: {name: adamw, betas: [0.8, 0.9]}\nrun: {seed: 2}\n",
        d="base: [b.yaml, c.yaml]\noptimizer: {lr: 0.25}\n",
    )
    write(tmp_path / "deep", e="base: ../d.yaml\n")
    monkeypatch.chdir(tmp_path)
    for file in (chain, Path("deep/e.yaml")):
        config = load(file, ["train.log_every=3"])
        assert (config.run.name, config.run.seed, config.train.epochs) == ("b", 2, 7)
        assert config.optimizer.to_dict()["betas"] == [0.8, 0.9]
        assert (config.optimizer.lr, config.train.log_every) == (0.25, 3)
    for name in ("digits", "digits.yaml", "configs/digits.yaml"):
        config = load(write(tmp_path, f=f"base: {name}\noptimizer: {{~momentum: }}\n"))
        assert (config.run.name, config.batch.micro_size) == ("digits", 8)
        assert config.optimizer.args == {"weight_decay": 0.0005}
    # `null` and references of the environment come through a base as from any file.
    monkeypatch.setenv("A_ROOT", "/secret/place")
    write(tmp_path, a="data: {root: '${oc.env:A_ROOT}'}\nmodel: {weights: null}\n")
    config = load(write(tmp_path, f="base: a\nrun: {name: 'n-${data.root}'}\n"))
    assert (config.data.root, config.run.name) == ("/secret/place", "n-/secret/place")
    assert "/secret" not in config_yaml(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "base: bace.yaml",
            "base: there is no bace.yaml in {d}/, nor among the configs that come with Lockstep; did you mean "
            '"base.yaml"? ({d}/mine.yaml, line 1)',
        ),
        (
            "run: {name: a}\nbase: circle.yaml",
            "base: files build on one another: {d}/mine.yaml → {d}/circle.yaml → {d}/mine.yaml "
            "({d}/circle.yaml, line 1)",
        ),
        (
            "base: mine.yaml",
            "base: files build on one another: {d}/mine.yaml → {d}/mine.yaml ({d}/mine.yaml, line 1)",
        ),
        (
            "base: {a: 1}",
            "base: {{a: 1}} is neither the name of a YAML file nor a list of names, without interpolations "
            "({d}/mine.yaml, line 1)",
        ),
        ("base: '${oc.env:X}'", "base: ${{oc.env:X}} is neither the name of"),
        # Each key's own file and line.
        (
            "base: base.yaml\nrun: {seed: -1}",
            "run.seed: -1 is less than 0, the least it may be ({d}/mine.yaml, line 2)",
        ),
        (
            "base: wrong.yaml\nrun: {seed: 1}",
            "train.epochs: x is not an integer ({d}/wrong.yaml, line 2)",
        ),
        (
            "base: wrong.yaml\ntrain:\n  ~epochs:\n  epocs: 1",
            'train.epocs: no such key; did you mean "epochs"? ({d}/mine.yaml, line 4)',
        ),
        ("base: octal.yaml", "run.seed: 0123 begins with 0"),
        (
            "base: base.yaml\noptimizer: {~momentun: }",
            'optimizer.momentun: is not set in {d}/base.yaml, so it cannot be unset; did you mean "momentum"? '
            "({d}/mine.yaml, line 2)",
        ),
        (
            "optimizer: {~momentum: }",
            "optimizer.momentum: is not set in a base (there is none), so it cannot be unset",
        ),
        (
            "base: base.yaml\ndata: {train_transforms: {a: 1}}",
            "data.train_transforms: {{a: 1}} is laid over",
        ),
    ],
)
def test_a_mistake_in_a_base_is_one_message(
    text: str, message: str, tmp_path: Path
) -> None:
    file = write(
        tmp_path,
        base=BASE,
        circle="base: mine.yaml",
        wrong="train:\n  epochs: x\n",
        octal="\n\nrun: {seed: 0123}\n",
        mine=text,
    )
    with pytest.raises(ConfigError) as caught:
        load(file)
    expected = message.format(d=tmp_path)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    if "octal" in text:
        assert str(caught.value).endswith(f"({tmp_path}/octal.yaml, line 3)")


def test_keys_are_unset_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, base=BASE)
    assert load(file, ["~optimizer.momentum"]).optimizer.args == {}
    assert load(file, {"~optimizer.momentum": None}).optimizer.args == {}
    assert load(file, ["~run"]).run == Config().run
    assert load(file, ["~model.unfreeze.5"]).model.unfreeze == {"9": "backbone"}
    # Later ones win over earlier ones, as with values.
    both = ["optimizer.momentum=0.5", "~optimizer.momentum"]
    assert load(file, both).optimizer.args == {}
    assert load(None, both).optimizer.args == {}
    assert load(file, both[::-1]).optimizer.args == {"momentum": 0.5}
    # Another optimizer leaves the momentum out by itself, and unsetting it as well is no mistake.
    switched = load(file, ["optimizer.name=adamw", "~optimizer.momentum"])
    assert (switched.optimizer.args, switched.notes) == ({}, ())
    for overrides, message in (
        (["~optimizer.momentun"], r'in the file, so .* mean "momentum"\? \(the comma'),
        (["~train.max_steps"], r"train.max_steps: is not set in the file, so it ca"),
        (["~optimizer.momentum=1"], r"~optimizer.momentum: unsets a key, and takes n"),
        (["~data.train_transforms.0"], r"data.train_transforms.0: is not set in the"),
        (["base=digits.yaml"], r"base: is read in a YAML file alone \(the command l"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(file, overrides)
    assert command_line(["a.yaml", "~optimizer.lr"]) == (
        Path("a.yaml"),
        ["~optimizer.lr"],
    )
    assert command_line(["~/a.yaml"]) == (Path("~/a.yaml"), [])


def test_an_item_of_a_list_is_changed_by_its_number(tmp_path: Path) -> None:
    groups = "[{match: a, lr: 0.5}, {match: b, betas: [0.5, 0.6]}]"
    file = write(tmp_path, base=f"{BASE}\nobservers: [{{name: a.B, every: 1}}]")
    file.write_text(file.read_text().replace("lr: 0.5,", f"groups: {groups},"))
    changes = {"optimizer.groups.0.lr": 0.25, "optimizer.groups[1].betas.1": 0.9}
    texts = [f"{name}={value}" for name, value in changes.items()]
    expected = [{"match": "a", "lr": 0.25}, {"match": "b", "betas": [0.5, 0.9]}]
    for overrides in (changes, texts):
        assert load(file, overrides).optimizer.groups == expected
    config = load(file, ["observers[0].every=3", "data.train_transforms.1.p=0.5"])
    assert config.observers[0].args == {"every": 3}
    assert config.data.train_transforms[1] == {"name": "B", "p": 0.5}
    over = write(tmp_path, over="base: base.yaml\noptimizer: {groups: {0: {lr: 7}}}")
    assert load(over).optimizer.groups[0] == {"match": "a", "lr": 7}
    for override, message in (
        (
            "optimizer.groups.2.lr=1",
            r"optimizer.groups\[2\]: there are 2 items, from 0",
        ),
        ("optimizer.groups.0.lr=-1", r"optimizer.groups\[0\].lr: -1 is not .*command"),
        ("optimizer.groups.0.match=0777", None),
    ):
        if message is None:
            assert load(file, [override]).optimizer.groups[0]["match"] == "0777"
            continue
        with pytest.raises(ConfigError, match=message):
            load(file, [override])


def test_a_run_names_no_base(tmp_path: Path) -> None:
    write(tmp_path, config="base: /etc/passwd.yaml\n")
    with pytest.raises(ConfigError, match=r"base: has no place in .*config\.yaml: "):
        read_config(tmp_path)
