"""Typed dataclasses ← YAML ← `key=value`. Every key is declared here once: type, default, meaning, unit.

A section that names a component (`data`, `model`, `loss`, `optimizer`, `schedule`) keeps the keys it does not
declare in `args`: they are the component's own arguments, checked against its signature when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from trainer.config.fields import component_arguments, key, read_section
from trainer.errors import ConfigError, nearest


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
    cache: float = key(
        0.0,
        "decoded images of a folder that each process keeps in memory; the rest is decoded anew",
        unit="GiB",
        least=0,
    )
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
    fuse: int | Literal["auto"] = key(1, "micro-batches in one forward, for speed; auto: what memory holds", least=1)
    eval_size: int = key(256, "samples of one validation forward", unit="samples", least=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = key("small_cnn", "small_cnn, a torchvision model, or an import path to a class or function")
    num_classes: int | None = key(None, "outputs of the model; null = as many as the data has classes", least=1)
    weights: str | None = key(None, "weights to begin with: a name of torchvision's, such as DEFAULT, or a file")
    head: str | None = key(None, "dotted name of the last layer; null = found by itself")
    freeze: str | list[str] | None = key(None, 'not trained: backbone (all but the head), or [conv1, "layer[12]"]')
    unfreeze: dict[str, Any] = key({}, "what is trained after so many epochs after all: {5: [layer4], 10: backbone}")
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
    name: str = key(
        "cross_entropy",
        "cross_entropy, mse, bce_with_logits, or an import path to a Task or a loss of torch.nn; loss.reduction=mean "
        "and sum are one run, as a step divides by its targets once",
    )
    args: dict[str, Any] = component_arguments()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = key("sgd", "sgd, adam, adamw, or an import path to a torch.optim.Optimizer")
    lr: float = key(0.1, "learning rate, before the schedule's factor", least=0)
    backbone_lr: float | None = key(None, "learning rate of all but the model's head; null = optimizer.lr", least=0)
    layer_decay: float = key(1.0, "factor of the learning rate from a layer to the one before it", least=0)
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
    channels_last: bool = key(False, "keep weights and activations of images as (N, H, W, C), which convolutions like")
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
    name: str | None = key(None, "the run's name in W&B; null = run.name")
    group: str | None = key(None, "W&B group of the run")
    job_type: str | None = key(None, "W&B job type of the run")
    tags: list[str] = key([], "W&B tags of the run")
    notes: str | None = key(None, "W&B notes of the run")
    log_model: Literal["none", "best"] = key("none", "best: the best model becomes an artifact when the run ends")
    log_histograms_every: int | None = key(
        None, "steps from one set of histograms of gradients and weights to the next", unit="steps", least=1
    )
    alerts: bool = key(False, "have W&B send an alert when the run fails")
    strict: bool = key(False, "end the run with an error when W&B fails, instead of a warning")
    init_timeout: float = key(10, "how long a start may wait for W&B's server", unit="seconds", least=1)
    finish_timeout: float = key(10, "how long an end may wait for what is not sent yet", unit="seconds", least=1)


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
        if refused := self.fuse_refusal() if self.batch.fuse not in (1, "auto") else None:
            raise ConfigError("batch.fuse", f"{self.batch.fuse} {refused}; use batch.fuse=1, or auto")
        if self.batch_norm.momentum is not None and self.batch_norm.momentum > 1:
            raise ConfigError("batch_norm.momentum", f"{self.batch_norm.momentum} is more than 1")
        if self.train.max_grad_norm == 0:
            raise ConfigError("train.max_grad_norm", "0 leaves nothing of a gradient; null does not clip")
        if not all(deviation > 0 for deviation in self.data.std or []):
            raise ConfigError("data.std", f"{self.data.std} is not all above 0: channels are divided by it")

    def fuse_refusal(self) -> str | None:
        """Why no two micro-batches of this run can share a forward, if they cannot."""
        if self.run.reproducibility == "bitwise":
            return "cannot be with run.reproducibility=bitwise, which needs each micro-batch's own gradient"
        if self.batch_norm.mode == "sync":
            return "cannot be with batch_norm.mode=sync, whose statistics are of all that the processes run at once"
        if self.train.compile:
            return "cannot be with train.compile=true, whose one piece has no layers to run by micro-batch"
        return None

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


def section_keys(section: str) -> list[str]:
    """The keys that a section declares itself, a component's arguments aside; none where there is no such section."""
    cls = get_type_hints(Config).get(section)
    return [item.name for item in fields(cls) if "arguments" not in item.metadata] if cls else []
