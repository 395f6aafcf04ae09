"""A run directory from elsewhere: nothing of it is imported, called or followed that the user has not allowed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer import ConfigError, Trainer, load
from trainer.__main__ import main
from trainer.inspection.predictor import Predictor

# A package of the user's: an honest model, a data set, an observer; and things that it took from elsewhere.
PACKAGE = """
import functools
from os import system
from torch.hub import load
from torch import nn
from trainer import Observer

class Net(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

def build(num_classes: int) -> nn.Module:
    return Net(num_classes)

partial_system = functools.partial(system)

class Watcher(Observer):
    pass

class Factor:
    pass
"""
# Imported, it leaves a trace.
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nfrom trainer.components.models import small_cnn as build\n"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Packages that can be imported: `own_code`, and `evil_code`, which leaves `imported` in this directory."""
    directory = tmp_path_factory.mktemp("packages")
    (directory / "own_code.py").write_text(PACKAGE)
    (directory / "evil_code.py").write_text(
        EVIL.format(marker=str(directory / "imported"))
    )
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))


def fit(directory: Path, *changes: str) -> Path:
    overrides = [
        f"run.dir={directory}",
        "run.name=run",
        "run.figures=false",
        "wandb.mode=disabled",
        "train.max_steps=2",
        "train.log_every=1",
        *changes,
    ]
    Trainer(load("configs/digits.yaml", overrides)).fit()
    return directory / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("made"))


@pytest.fixture
def stranger(made: Path, tmp_path: Path) -> Path:
    """A copy of the run: what one downloads."""
    return Path(shutil.copytree(made, tmp_path / "stranger"))


def change(run: Path, /, **sections: Any) -> None:
    """Change both configs of a run; a mapping replaces the whole section."""
    for file in (run / "config.yaml", run / "best" / "config.yaml"):
        tree = yaml.safe_load(file.read_text())
        tree |= sections
        file.write_text(yaml.safe_dump(tree))
    # Whoever changes a run makes it whole again.
    (run / "best" / "manifest.json").unlink(missing_ok=True)


def image(directory: Path) -> Path:
    from PIL import Image

    path = directory / "image.png"
    Image.new("L", (8, 8)).save(path)
    return path


Command = Callable[[Path, Path], list[str]]
COMMANDS: dict[str, Command] = {
    "evaluate": lambda run, _: ["evaluate", str(run)],
    "predict": lambda run, scratch: ["predict", str(run), str(image(scratch))],
    "replay": lambda run, _: ["replay", str(run), "--step", "1"],
}

TOUCH = {"command": "touch MARKER"}
ATTACKS: dict[str, dict[str, Any]] = {
    "another package": {"model": {"name": "evil_code.build"}},
    "a shell": {"model": {"name": "os.system", **TOUCH}},
    "the shell behind it": {"model": {"name": "posix.system", **TOUCH}},
    "python's own": {"model": {"name": "builtins.eval", "source": "1"}},
    "a subprocess": {"model": {"name": "subprocess.run", "args": "id"}},
    "a module within torch": {"model": {"name": "torch.os.system", **TOUCH}},
    "a repository": {
        "model": {"name": "torch.hub.load", "repo_or_dir": "MARKER", "model": "x"}
    },
    "a compiler": {
        "model": {
            "name": "torch.utils.cpp_extension.load",
            "name_": "x",
            "sources": ["MARKER"],
        }
    },
    "a pickle": {"model": {"name": "torch.load", "f": "MARKER", "weights_only": False}},
    "a writer of files": {
        "model": {
            "name": "trainer.storage.files.write_text",
            "path": "MARKER",
            "text": "",
        }
    },
    "a class of another kind": {"model": {"name": "torch.optim.SGD"}},
    "a loss": {"loss": {"name": "os.system", **TOUCH}},
}
# What `predict` does not import, and so does not look at.
FURTHER_ATTACKS: dict[str, dict[str, Any]] = {
    "data": {"data": {"name": "evil_code.build"}},
    "pickled data": {"data": {"name": "torchvision.datasets.LSUN", "root": "MARKER"}},
    "a validation set": {
        "data": {"name": "digits", "val": {"other": {"name": "evil_code.build"}}}
    },
    "a test set": {"data": {"name": "digits", "test": {"name": "os.system", **TOUCH}}},
    "a transform of a validation set": {
        "data": {
            "name": "digits",
            "val": {"other": {"transforms": [{"name": "os.system", **TOUCH}]}},
        }
    },
    "a transform": {
        "data": {
            "name": "digits",
            "val_transforms": [
                {"name": "RandomApply", "transforms": [{"name": "os.system", **TOUCH}]}
            ],
        }
    },
}
REPLAY_ATTACKS: dict[str, dict[str, Any]] = {
    "an optimizer": {"optimizer": {"name": "evil_code.build", "lr": 0.1}},
    "a schedule": {"schedule": {"name": "os.system", **TOUCH}},
    "an observer": {"observers": [{"name": "os.system", **TOUCH}]},
    "a function for an observer": {"observers": [{"name": "torch.hub.load"}]},
}
CASES = [
    *[(command, name, ATTACKS[name]) for command in COMMANDS for name in ATTACKS],
    *[("evaluate", name, attack) for name, attack in FURTHER_ATTACKS.items()],
    *[("replay", name, FURTHER_ATTACKS[name]) for name in FURTHER_ATTACKS],
    *[("replay", name, attack) for name, attack in REPLAY_ATTACKS.items()],
]


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}, {c[1]}" for c in CASES])
def test_nothing_a_stranger_names_is_run(
    case: tuple[str, str, dict[str, Any]],
    stranger: Path,
    packages: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, _, attack = case
    marker = tmp_path / "marker"
    text = yaml.safe_dump(attack).replace("MARKER", str(marker))
    change(stranger, **yaml.safe_load(text))
    assert main(COMMANDS[command](stranger, tmp_path)) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    assert len(output.err.splitlines()) == 1
    assert not marker.exists()
    assert not (packages / "imported").exists()
    assert "evil_code" not in sys.modules


def test_every_name_is_shown_and_one_flag_allows_each(
    stranger: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        stranger,
        model={"name": "evil_code.build"},
        observers=[{"name": "other_code.X"}],
    )
    assert main(["replay", str(stranger), "--step", "1"]) == 2
    error = capsys.readouterr().err
    assert "model.name=evil_code.build, observers[0].name=other_code.X" in error
    assert "--trust evil_code --trust other_code" in error


def test_a_run_made_here_needs_no_flag_and_its_copy_does(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(
        tmp_path, "model.name=own_code.build", "observers=[{name: own_code.Watcher}]"
    )
    for command in COMMANDS.values():
        assert main(command(run, tmp_path)) == 0, capsys.readouterr().err
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for command in COMMANDS.values():
        assert main(command(copy, tmp_path)) == 2
        assert "--trust own_code" in capsys.readouterr().err
    assert main(["predict", str(copy), str(image(tmp_path)), "--trust=own_code"]) == 0
    for command in COMMANDS.values():
        assert main(command(copy, tmp_path)) == 0  # remembered
    capsys.readouterr()
    # A config that was changed since is another one.
    change(copy, observers=[{"name": "own_code.Watcher"}, {"name": "own_code.Watcher"}])
    assert main(["replay", str(copy), "--step", "1"]) == 2
    # And so is that of the run itself; what the user types is the user's own word.
    change(run, model={"name": "os.system", "command": f"touch {tmp_path}/marker"})
    assert main(["evaluate", str(run)]) == 2
    assert not (tmp_path / "marker").exists()


def test_a_name_on_the_command_line_is_the_users_own(
    stranger: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(stranger, data={"name": "evil_code.build"})
    assert main(["evaluate", str(stranger), "data.name=digits"]) == 0
    assert "val/accuracy" in capsys.readouterr().out
    assert "evil_code" not in sys.modules


def test_the_earlier_run_of_a_name_is_known_where_it_went(
    packages: Path, tmp_path: Path
) -> None:
    fit(tmp_path, "model.name=own_code.Net")
    fit(tmp_path, "model.name=small_cnn")
    assert (
        "own_code.Net"
        in yaml.safe_load((tmp_path / "run.1/config.yaml").read_text())["model"]["name"]
    )
    assert main(["evaluate", str(tmp_path / "run.1")]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "own_code.system", "command": "id"}}, "of posix"),
        ({"model": {"name": "own_code.partial_system"}}, "of posix"),
        (
            {"model": {"name": "own_code.load", "repo_or_dir": "x", "model": "y"}},
            "torch.hub",
        ),
        ({"optimizer": {"name": "own_code.Net", "lr": 0.1}}, "torch.optim.Optimizer"),
        ({"observers": [{"name": "own_code.Factor"}]}, "trainer.Observer"),
        ({"schedule": {"name": "own_code.Factor"}}, "schedule"),
        ({"model": {"name": "own_code.Net.__init_subclass__"}}, "torch.nn.Module"),
    ],
)
def test_a_trusted_package_is_no_way_to_what_it_imports(
    changes: dict[str, Any],
    words: str,
    stranger: Path,
    packages: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(stranger, **changes)
    arguments = ["replay", str(stranger), "--step", "1", "--trust", "own_code"]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_what_is_typed_vouches_for_nothing_beside_it(
    stranger: Path, packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mapping is merged with the file's: the name stays the stranger's."""
    change(stranger, model={"name": "os.system", "command": f"touch {tmp_path}/marker"})
    for override in ("model={num_classes: 10}", "model={}", "model.width=2"):
        assert main(["evaluate", str(stranger), override]) == 2
        assert "model.name=os.system" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["os", "posix", "builtins", "subprocess", "no name"])
def test_what_cannot_be_trusted(
    name: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(stranger), "--trust", name]) == 2
    assert capsys.readouterr().err.startswith("error: --trust: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "torchvision.models.resnet18", "num_classes": 10}},
        {"loss": {"name": "torch.nn.CrossEntropyLoss"}},
        {"loss": {"name": "trainer.components.task.CrossEntropy"}},
        {"optimizer": {"name": "torch.optim.RMSprop", "lr": 0.1}},
        {
            "data": {
                "name": "digits",
                "val_transforms": [
                    {"name": "torchvision.transforms.v2.RandomCrop", "size": 8}
                ],
            }
        },
    ],
)
def test_well_known_libraries_need_no_flag(
    changes: dict[str, Any], stranger: Path
) -> None:
    from trainer.core.trust import read_trusted_config

    change(stranger, **changes)
    config = read_trusted_config(stranger)
    for section, values in changes.items():
        assert config.to_dict()[section].items() >= values.items()


def test_arguments_by_which_a_library_runs_code(stranger: Path) -> None:
    from trainer.core.trust import read_trusted_config

    change(
        stranger,
        loss={"name": "torch.nn.CrossEntropyLoss", "trust_remote_code": True},
    )
    with pytest.raises(ConfigError, match=r"loss\.trust_remote_code.*--trust torch"):
        read_trusted_config(stranger)


def test_a_known_name_in_the_run_directory_is_not_the_library(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where one has gone into the directory, and Python looks there first."""
    (stranger / "timm").mkdir()
    (stranger / "timm/__init__.py").write_text("open('marker', 'w')\n")
    change(stranger, model={"name": "timm.create_model", "model_name": "x"})
    # Another test of this process may have imported the library.
    for module in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.chdir(stranger)
    monkeypatch.syspath_prepend(str(stranger))
    assert main(["evaluate", "."]) == 2
    assert "in the run directory itself" in capsys.readouterr().err
    assert not (stranger / "marker").exists()


def test_only_what_a_command_builds_is_looked_at(
    stranger: Path, tmp_path: Path
) -> None:
    change(
        stranger,
        optimizer={"name": "missing_code.X", "lr": 0.1},
        observers=[{"name": "missing_code.Y"}],
    )
    assert main(["evaluate", str(stranger)]) == 0
    change(stranger, data={"name": "missing_code.Z"})
    assert main(COMMANDS["predict"](stranger, tmp_path)) == 0


def test_a_state_directory_that_cannot_be_written_costs_the_flag_alone(
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    run = fit(tmp_path, "model.name=own_code.Net")
    assert "state" not in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 2
    assert main(["evaluate", str(run), "--trust", "own_code"]) == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"path": 1}', '{"made": 3}'])
def test_a_damaged_record_trusts_nothing(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.storage import trusted_runs

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    trusted_runs.remember_made(tmp_path, b"config")
    (record,) = (tmp_path / "state/lockstep/runs").iterdir()
    assert trusted_runs.trust_in(tmp_path, b"config").made_here
    assert not trusted_runs.trust_in(tmp_path, b"other").made_here
    record.write_text(content)
    assert trusted_runs.trust_in(tmp_path, b"config") == trusted_runs.UNKNOWN


# ---------------------------------------------------------------- links


LINKS = [
    "replay",
    "best",
    "best/model.safetensors",
    "best/config.yaml",
    "checkpoints",
    "figures",
    "metrics.jsonl",
    "environment.json",
    ".lock",
    ".partial.best.pt2",
    "wandb",
]


@pytest.mark.parametrize("name", LINKS)
def test_no_command_follows_a_link_out_of_a_run(
    name: str,
    made: Path,
    stranger: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "outside"
    link = stranger / name
    if (made / name).is_dir() or "." not in name:
        target.mkdir()
        shutil.rmtree(link, ignore_errors=True)
    else:
        target.write_text("precious")
        link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))
    before = sorted(tmp_path.rglob("outside*"))
    commands = [command(stranger, tmp_path) for command in COMMANDS.values()]
    commands += [["compare", str(made), str(stranger)], ["sync", str(stranger)]]
    resume = f"run.dir={stranger.parent} run.name=stranger run.resume=auto"
    commands.append(
        ["train", *resume.split(), "run.figures=false", "wandb.mode=disabled"]
    )
    for command in commands:
        assert main(command) == 2, command
        assert f"{stranger / name}: is a link" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("outside*")) == before
    assert not target.is_file() or target.read_text() == "precious"
    assert not target.is_dir() or not any(target.iterdir())


def test_links_within_a_run_and_to_a_run_are_followed(
    stranger: Path, tmp_path: Path
) -> None:
    (stranger / "best").rename(stranger / "kept")
    (stranger / "best").symlink_to("kept")
    logs = stranger / "wandb/run-1/logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/tmp")  # as W&B leaves it
    (logs.parents[1] / "debug-core.log").symlink_to("run-1/logs/debug-core.log")
    (tmp_path / "link").symlink_to(stranger)
    assert main(["evaluate", str(tmp_path / "link")]) == 0


@pytest.mark.parametrize(
    ("name", "status"), [("figures/wandb/a/logs/x", 2), ("wandb/x", 2), ("circle", 0)]
)
def test_what_only_looks_like_a_log_and_what_leads_nowhere(
    name: str, status: int, stranger: Path
) -> None:
    link = stranger / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("circle" if name == "circle" else "/tmp")
    assert main(["evaluate", str(stranger)]) == status


def test_a_new_run_does_not_write_through_the_lock_of_the_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"\.lock: is a link"):
        fit(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_manifest_leads_nowhere_else(stranger: Path, tmp_path: Path) -> None:
    manifest = stranger / "best/manifest.json"
    text = manifest.read_text().replace('"metrics.json"', '"../../secret"')
    manifest.write_text(text)
    (tmp_path / "secret").write_bytes((stranger / "best/metrics.json").read_bytes())
    assert main(["evaluate", str(stranger)]) == 1


def test_predictor_takes_trust(packages: Path, tmp_path: Path) -> None:
    run = fit(tmp_path, "model.name=own_code.Net")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with pytest.raises(ConfigError, match="--trust own_code"):
        Predictor(copy)
    Predictor(copy, trust=["own_code"])


@pytest.mark.parametrize("section", ["model", "loss", "optimizer", "observers"])
def test_a_class_of_another_kind_is_not_made_in_training_either(
    section: str, tmp_path: Path
) -> None:
    """A function may make what is wanted; a class that is none of it is known before."""
    change = f"{section}.name=subprocess.Popen"
    arguments = [f"{section}.args=touch {tmp_path}/marker", f"{section}.shell=true"]
    if section == "observers":
        text = f"name: subprocess.Popen, args: touch {tmp_path}/marker, shell: true"
        change, arguments = f"observers=[{{{text}}}]", []
    with pytest.raises(ConfigError, match="not a subclass of"):
        fit(tmp_path, change, *arguments)
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------- the environment


def test_a_stranger_gets_no_variable(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.core.trust import read_trusted_config

    monkeypatch.setenv("MY_KEY", "key-of-mine")
    reference = "${oc.env:MY_KEY}"
    change(stranger, data={"name": "folder", "root": reference})
    assert read_trusted_config(stranger).data.root == "key-of-mine"
    for section in (
        {"loss": {"name": "cross_entropy", "token": reference}},
        {"model": {"name": "small_cnn", "deep": {"a": [f"https://host/{reference}"]}}},
        {"observers": [{"name": "trainer.Observer", "to": reference}]},
    ):
        copy = Path(shutil.copytree(stranger, stranger.parent / next(iter(section))))
        change(copy, **section)
        with pytest.raises(ConfigError, match=r"is .*\$\{oc\.env:MY_KEY\}") as error:
            read_trusted_config(copy)
        assert "key-of-mine" not in str(error.value)
    read_trusted_config(
        stranger.parent / "loss", [f"loss.token={reference}"]
    )  # the user's own word
    # Of a part that is not built, nothing is asked.
    read_trusted_config(stranger.parent / "observers", imports=["model"])


def test_sync_sends_no_variable_and_to_no_other_server(
    made: Path,
    stranger: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", "key-of-mine")
    assert main(["sync", str(stranger)]) == 0
    (stranger / "wandb").mkdir()
    (stranger / "wandb/settings").write_text("[default]\nbase_url = http://other\n")
    assert main(["sync", str(stranger)]) == 2
    assert "would choose the server" in capsys.readouterr().err
    (stranger / "wandb/settings").unlink()
    for section in (
        {"wandb": {"project": "${oc.env:MY_KEY}"}},
        {"wandb": {}, "run": {"name": "${oc.env:MY_KEY}"}},
    ):
        change(stranger, **section)
        assert main(["sync", str(stranger)]) == 2
        output = capsys.readouterr().err
        assert "${oc.env:MY_KEY}" in output
        assert "key-of-mine" not in output


# ---------------------------------------------------------------- libraries that need not be installed


LIBRARY_FILES = {
    "transformers/__init__.py": "from transformers.models.auto.modeling_auto import AutoModel\n"
    "from transformers.models.auto.tokenization_auto import AutoTokenizer\n",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/modeling_auto.py": "class AutoModel:\n    @classmethod\n"
    "    def from_pretrained(cls, name, **rest): ...\n"
    "    @classmethod\n    def register(cls, name): ...\n",
    "transformers/models/auto/tokenization_auto.py": "class AutoTokenizer:\n    @classmethod\n"
    "    def from_pretrained(cls, name, **rest): ...\n",
    "timm/__init__.py": "from timm.models._factory import create_model, is_model, model_entrypoint\n"
    "from timm.models import resnet18\n",
    "timm/models/__init__.py": "from timm.models._helpers import load_checkpoint\n"
    "def resnet18(**rest): ...\ndef helper(path): ...\n",
    "timm/models/_helpers.py": "def load_checkpoint(model, path): ...\n",
    "timm/models/_factory.py": "def create_model(model_name, **rest): ...\n"
    "def is_model(name): return name == 'resnet18'\n"
    "def model_entrypoint(name):\n    import timm.models\n    return getattr(timm.models, name)\n",
}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Packages with the names and the structure of timm and transformers."""
    for name, text in LIBRARY_FILES.items():
        path = tmp_path / "libraries" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in ("timm", "transformers")
    }
    monkeypatch.syspath_prepend(str(tmp_path / "libraries"))
    yield
    for name in list(sys.modules):
        if name.partition(".")[0] in ("timm", "transformers"):
            del sys.modules[name]
    sys.modules.update(before)


KNOWN = [
    {"name": "timm.create_model", "model_name": "resnet18", "pretrained": True},
    {"name": "timm.models.resnet18"},
    {"name": "transformers.AutoModel.from_pretrained", "a": "org/model"},
]
NOT_KNOWN = [
    {"name": "timm.models.load_checkpoint", "path": "x"},
    {"name": "timm.models.helper", "path": "x"},
    {"name": "transformers.AutoTokenizer.from_pretrained", "a": "x"},
    {"name": "transformers.AutoModel.register", "a": "x"},
]
# Allowed by naming the library.
WITH_FLAG = [
    {"name": "timm.create_model", "model_name": "hf-hub:someone/model"},
    {"name": "timm.create_model", "model_name": "a", "checkpoint_path": "evil.pth"},
    {"name": "timm.create_model", "model_name": "a", "pretrained_cfg": {"url": "x"}},
    {"name": "transformers.AutoModel.from_pretrained", "trust_remote_code": True},
]


def test_models_of_libraries(stranger: Path, libraries: None) -> None:
    from trainer.core.trust import read_trusted_config

    for model in KNOWN:
        change(stranger, model=model)
        read_trusted_config(stranger)
    for model in NOT_KNOWN:
        change(stranger, model=model)
        with pytest.raises(ConfigError, match=r"model\.name: "):
            read_trusted_config(stranger)
        with pytest.raises(ConfigError, match=r"model\.name: "):
            read_trusted_config(stranger, trust=["timm", "transformers"])
    for model in WITH_FLAG:
        change(stranger, model=model)
        with pytest.raises(ConfigError, match="may run code"):
            read_trusted_config(stranger)
        read_trusted_config(stranger, trust=["timm", "transformers"])
