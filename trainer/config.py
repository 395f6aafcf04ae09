"""Typed dataclasses ← YAML ← `key=value`. Every key is declared here once: type, default, meaning, unit.

A section that names a component (`data`, `model`, `loss`, `optimizer`, `schedule`) keeps the keys it does not
declare in `args`: they are the component's own arguments, checked against its signature when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from trainer.errors import ConfigError, nearest
from trainer.typed import component_arguments, key, read_section, show, type_name

DEFAULT_CONFIG = Path("configs/digits.yaml")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = key("run", "the run's directory is <run.dir>/<run.name>; an earlier run there is moved aside")
    dir: str = key("runs", "where runs are kept")
    seed: int = key(0, "decides initial weights, sample order, augmentation and dropout", least=0)
    resume: Literal["never", "auto"] = key("never", "auto goes on from the run's newest complete checkpoint")
    resume_changes: Literal["refuse", "allow"] = key(
        "refuse", "what to do when a resumed run's config differs in a key that changes the run"
    )
    reproducibility: Literal["standard", "bitwise"] = key(
        "standard", "how equal runs on other process counts are: in their mathematics, or bit for bit"
    )
    figures: bool = key(True, "draw the run's PNG figures at its end")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = key("digits", "digits, folder, cifar10, mnist, fake, or an import path to a map-style dataset")
    root: str | None = key(None, "folder that holds the data set, where it has files")
    workers: int = key(0, "loader processes of each rank; 0 loads in the rank itself", least=0)
    prefetch: int = key(4, "micro-batches each loader process keeps ready", least=1)
    train_transforms: list[dict[str, Any]] = key(
        [], "torchvision v2 transforms of training images, in order: {name: RandomCrop, size: 32}"
    )
    val_transforms: list[dict[str, Any]] = key([], "the same for validation images")
    mean: list[float] | None = key(None, "subtracted from each channel of the image scaled to [0, 1]")
    std: list[float] | None = key(None, "divides each channel after the mean is subtracted")
    args: dict[str, Any] = component_arguments()


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    size: int = key(64, "samples of one optimizer update, over all processes", unit="samples", least=1)
    micro_size: int | None = key(
        None,
        "samples that are never split: one BatchNorm statistic; null = batch.size",
        unit="samples",
        least=1,
    )
    eval_size: int = key(256, "samples of one validation forward", unit="samples", least=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = key("small_cnn", "small_cnn, a torchvision model, or an import path to a class or function")
    num_classes: int | None = key(None, "outputs of the model; null = as many as the data has classes", least=1)
    args: dict[str, Any] = component_arguments()


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig:
    mode: Literal["micro", "sync", "frozen"] = key(
        "micro", "normalise over a micro-batch, over all processes (GPU only), or by fixed statistics"
    )
    momentum: float | None = key(None, "momentum of the running statistics; null = the model's own", least=0)
    momentum_per: Literal["micro_batch", "step"] = key(
        "micro_batch", "step: a step of M micro-batches ages the statistics as much as one update would"
    )
    recalibrate: int = key(
        0,
        "compute exact statistics over this many steps' samples instead of running ones",
        unit="steps",
        least=0,
    )
    recalibrate_at: Literal["evaluation", "end"] = key("evaluation", "before each evaluation, or at the end only")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    name: str = key("cross_entropy", "cross_entropy, mse, bce_with_logits, or an import path to a Task")
    args: dict[str, Any] = component_arguments()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = key("sgd", "sgd, adam, adamw, or an import path to a torch.optim.Optimizer")
    lr: float = key(0.1, "learning rate, before the schedule's factor", least=0)
    decay_norm_and_bias: bool = key(True, "apply weight_decay to biases and to the weights of norm layers too")
    args: dict[str, Any] = component_arguments()


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = key("step", "step, multi_step, cosine, one_cycle, polynomial, constant, plateau, or an import path")
    per: Literal["epoch", "step"] = key("epoch", "when the learning rate changes, and the unit of durations")
    warmup: float = key(0.0, "linear warmup, raised every step", unit="epochs or steps, as schedule.per", least=0)
    warmup_start: float = key(0.0, "factor of the learning rate at which warmup begins", least=0)
    args: dict[str, Any] = component_arguments()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = key(10, "passes over the training data", unit="epochs", least=1)
    max_steps: int | None = key(None, "end after this many steps, if epochs do not end sooner", unit="steps", least=1)
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = key(
        "fp32", "bf16 and fp16: autocast over fp32 weights; fp64: everything"
    )
    compile: bool = key(False, "compile the model with torch.compile")
    max_grad_norm: float | None = key(None, "clip the whole step's gradient to this L2 norm", least=0)
    find_unused_parameters: bool = key(False, "allow parameters that get no gradient in some steps")
    log_every: int = key(50, "steps from one logged row to the next", unit="steps", least=1)
    evaluate_every: int = key(1, "epochs from one evaluation to the next", unit="epochs", least=1)
    checkpoint_every: int | None = key(
        None, "steps from one checkpoint to the next, besides each epoch's end", unit="steps", least=1
    )
    keep_checkpoints: int = key(2, "newest checkpoints that are kept", least=1)


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    metric: str = key("val/loss", "the logged value that decides which model is best")
    mode: Literal["min", "max"] = key("min", "whether less or more is better")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = key(
        "auto", "auto: online where a W&B login is found, else offline"
    )
    project: str = key("lockstep", "W&B project")
    entity: str | None = key(None, "W&B user or team; null = your default")
    group: str | None = key(None, "W&B group of the run")
    tags: list[str] = key([], "W&B tags of the run")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Every part receives its own section of it and nothing more."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch_norm: BatchNormConfig = field(default_factory=BatchNormConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    best: BestConfig = field(default_factory=BestConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        micro_size = self.batch.micro_size
        if micro_size is not None and micro_size > self.batch.size:
            raise ConfigError("batch.micro_size", f"{micro_size} is more than batch.size={self.batch.size}; lower it")
        if self.run.reproducibility == "bitwise" and self.batch_norm.mode == "sync":
            raise ConfigError(
                "batch_norm.mode",
                "sync takes its statistics over whatever the processes hold at once, which "
                "run.reproducibility=bitwise cannot allow; use batch_norm.mode=micro",
            )
        if self.batch_norm.momentum is not None and self.batch_norm.momentum > 1:
            raise ConfigError("batch_norm.momentum", f"{self.batch_norm.momentum} is more than 1")

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """The config that nested mappings (as `to_dict` gives) describe; keys left out keep their defaults."""
        sections = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, section in tree.items():
            if name not in sections:
                raise ConfigError(str(name), f"no such section{nearest(str(name), sections)}")
            values[name] = read_section(sections[name], name, section)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of plain values; a component's arguments stand beside the section's own keys."""
        tree = asdict(self)
        for section in tree.values():
            section.update(section.pop("args", {}))
        return tree


def load(path: Path | None, overrides: Sequence[str]) -> Config:
    """Read `path` (defaults alone where it is None), lay the `key=value` overrides over it, check everything.

    Values of the file may use OmegaConf's interpolations, `${oc.env:NAME}` among them. In an override `None` is null
    too: that is how W&B's agent writes it.
    Raises `ConfigError` with the key, where it came from and the nearest valid one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    lines: dict[str, str] = {}
    tree: Any = {}
    if path is not None:
        text = _read(path)
        try:
            lines = {k: f"{path}, line {line}" for k, line in _lines(yaml.compose(text, yaml.SafeLoader), "")}
            tree = OmegaConf.create(text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(str(path), f"is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        for override in overrides:
            name, equals, _ = override.partition("=")
            if not equals or not name:
                raise ConfigError(override, "an override is written key=value, as in optimizer.lr=0.01")
            lines[name] = "the command line"
        laid_over = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
        merged = OmegaConf.merge(tree or {}, OmegaConf.create(_none_is_null(laid_over)))
        plain = OmegaConf.to_container(merged, resolve=True)
        return Config.from_dict(plain)  # type: ignore[arg-type]  # keys are checked there
    except ConfigError as error:
        raise _with_origin(error, lines) from None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        name = str(getattr(error, "full_key", "") or path or "command line")
        raise _with_origin(ConfigError(name, str(error).splitlines()[0]), lines) from None


def command_line(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split `[CONFIG.yaml] [key=value …]`; without a CONFIG the default one is meant."""
    paths = [argument for argument in arguments if "=" not in argument]
    for extra in paths:
        if extra.startswith("-"):
            raise ConfigError(extra, "no such option; keys are set as key=value, and --help lists them")
    if len(paths) > 1:
        raise ConfigError(paths[1], f"one config at a time, and {paths[0]} is given already")
    path = Path(paths[0]) if paths else DEFAULT_CONFIG
    return path, [argument for argument in arguments if "=" in argument]


def section_keys(section: str) -> list[str]:
    """The keys that a section declares itself, a component's arguments aside; none where there is no such section."""
    cls = get_type_hints(Config).get(section)
    return [item.name for item in fields(cls) if "arguments" not in item.metadata] if cls else []


def help_text() -> str:
    """Every key with its type, default, meaning and unit."""
    out = []
    for section in fields(Config):
        cls = get_type_hints(Config)[section.name]
        hints = get_type_hints(cls)
        out.append(f"\n{section.name}")
        for item in fields(cls):
            if "arguments" in item.metadata:
                out.append("  …  any further key is an argument of the component that `name` names")
                continue
            default = item.default_factory() if callable(item.default_factory) else item.default
            unit = f" [{item.metadata['unit']}]" if item.metadata["unit"] else ""
            out.append(f"  {section.name}.{item.name}={show(default)}  ({type_name(hints[item.name])})")
            out.append(f"      {item.metadata['meaning']}{unit}")
    return "\n".join(out)


def _none_is_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _none_is_null(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_none_is_null(inner) for inner in value]
    return None if value == "None" else value


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise ConfigError(str(path), f"cannot read this config ({error.strerror}){near}") from None


def _lines(node: yaml.Node | None, prefix: str) -> list[tuple[str, int]]:
    """The dotted keys of a YAML document with their line numbers."""
    found = []
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            dotted = f"{prefix}{name.value}"
            found.append((dotted, name.start_mark.line + 1))
            found += _lines(value, f"{dotted}.")
    return found


def _with_origin(error: ConfigError, lines: Mapping[str, str]) -> ConfigError:
    """The error, saying where its key, one within it, or the nearest one above it, was set."""
    within = [name for name in lines if name.startswith(f"{error.key}.")]
    name = error.key if error.key in lines else next(iter(within), error.key)
    while name and name not in lines:
        name = name.rpartition(".")[0]
    return ConfigError(error.key, f"{error.message} ({lines[name]})") if name else error
