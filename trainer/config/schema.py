"""Every key of a config, declared once: its type, default, meaning, unit and least value.

A section that names a component (`data`, `model`, `loss`, `optimizer`, `schedule`, and each of `metrics`, `observers`
and `trackers`) keeps the keys it does not declare in `args`: they are the component's own arguments, checked against
its signature when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from trainer.config.component_lists import (
    LISTS,
    MetricConfig,
    ObserverConfig,
    TrackerConfig,
    read_list,
)
from trainer.config.evaluation_sets import (
    EvaluationSetConfig,
    key_of_set,
    test_set,
    validation_sets,
)
from trainer.config.fields import (
    ComponentSection,
    Section,
    declared_keys,
    key,
    read_section,
    show,
)
from trainer.config.interpolation import References, escape, resolve, restore_references
from trainer.config.optimizer_groups import check_group
from trainer.config.several_optimizers import refuse_several_optimizers
from trainer.config.sharded_parameters import check_needs_of_shards
from trainer.config.trees import Tree, map_leaves
from trainer.errors import ConfigError, nearest

MAX_PROFILED_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    SECTION = "run"

    name: str = key(
        "run",
        "the run's directory is <run.dir>/<run.name>; an earlier run there is moved aside",
    )
    dir: str = key("runs", "where runs are kept", path=True)
    seed: int = key(
        0,
        "determines initial weights, sample order, augmentation and dropout",
        minimum=0,
    )
    resume: Literal["never", "auto", "continue"] = key(
        "never",
        "auto resumes from the run's newest complete checkpoint; continue also goes on with a run that early_stop or "
        "an observer has ended",
    )
    resume_changes: Literal["refuse", "allow"] = key(
        "refuse",
        "what to do when the config of a resumed run differs in a key that changes the run",
    )
    reproducibility: Literal["standard", "bitwise"] = key(
        "standard",
        "what runs on different process counts share: the mathematics, or every bit",
    )
    proof: Literal["on", "off", "strict"] = key(
        "on",
        "before the first step, try the promise on this model, loss and data: bitwise refuses what breaks it, "
        "standard warns, and strict lets standard refuse, too",
    )
    figures: bool = key(True, "draw the run's PNG figures at its end")
    timeout: float = key(
        1800.0,
        "how long a process may wait for the others, or make no progress itself, before the run ends with an error",
        unit="seconds",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(ComponentSection):
    SECTION = "data"

    name: str = key(
        "digits",
        "digits, folder, cifar10, mnist, fake, shapes, or an import path to a map-style dataset",
    )
    root: str | None = key(
        None, "folder that holds the data set, where it has files", path=True
    )
    cache: float | Literal["decoded"] = key(
        0.0,
        "memory of each process for decoded images of a folder, in GiB; decoded = all of them in files of "
        "data.cache_dir, which every process and every later run maps (docs/cache.md)",
        minimum=0,
    )
    cache_dir: str | None = key(
        None, "folder that holds the files of data.cache=decoded", path=True
    )
    short_side: int | Literal["auto", "full"] = key(
        "auto",
        "larger images of a folder are made so small once they are decoded, before the transforms; full = never; "
        "auto = with data.cache=decoded what the transforms need, else full",
        unit="pixels",
        minimum=1,
    )
    max_pixels: int = key(
        100_000_000,
        "largest image file that is decoded; one that says it is larger is refused before memory is asked for",
        unit="pixels",
        minimum=1,
    )
    decode: Literal["cpu", "device"] = key(
        "cpu",
        "where training images of a folder are decoded: device = JPEG files on the GPU that trains, by nvJPEG, before "
        "data.batch_transforms (docs/on-device.md)",
    )
    decode_short_side: int | None = key(
        None,
        "JPEG files are decoded at a half, a quarter or an eighth of their size where their shorter side stays at "
        "least this long: faster, on other pixels (docs/image-data.md); null = in full",
        unit="pixels",
        minimum=1,
    )
    bad_samples: Literal["stop", "quarantine"] = key(
        "stop",
        "a sample that cannot be read or transformed ends the run, or is left out of it and listed in bad_samples.txt",
    )
    max_bad: int = key(
        10,
        "with data.bad_samples=quarantine: if more samples than this are bad, the run ends",
        unit="samples",
        minimum=1,
    )
    val_fraction: float | None = key(
        None,
        "validate on this share of the training samples, the same of each class where they are known; null = on the "
        "data set's own validation part",
        minimum=0,
    )
    split_seed: int = key(
        0,
        "determines which samples data.val_fraction takes; run.seed does not",
        minimum=0,
    )
    workers: int = key(
        0, "loader processes of each rank; 0 loads in the rank itself", minimum=0
    )
    prefetch: int = key(4, "micro-batches each loader process keeps ready", minimum=1)
    sampler: dict[str, Any] = key(
        {},
        "which training samples an epoch takes: {name: random, subset, balanced, weighted, repeated, or an import path "
        "to a pure function of labels, seed and epoch, with its arguments}; {} = each once (docs/samplers.md)",
    )
    epoch_samples: int | None = key(
        None,
        "length of an epoch, for data.sampler; null = as the sampler has it",
        unit="samples",
        minimum=1,
    )
    train_transforms: list[dict[str, Any]] = key(
        [],
        "torchvision v2 transforms of training images, in order: {name: RandomCrop, size: 32}",
    )
    val_transforms: list[dict[str, Any]] = key([], "the same for validation images")
    batch_transforms: list[dict[str, Any]] = key(
        [],
        "random transforms of whole micro-batches of training images, on the device, after train_transforms: "
        "{name: RandomCrop, size: 32, padding: 4} (docs/on-device.md)",
    )
    on_device: bool = key(
        False,
        "keep all samples, after their transforms, on the device that trains; they must fit there and have one shape",
    )
    val: dict[str, Any] = key(
        {},
        "validation sets by name, each as data unless it says otherwise: {clean: {}, shifted: {root: PATH}}",
    )
    test: dict[str, Any] | None = key(
        None,
        "a set that the best weights are evaluated on once, at the end: {folder: test}",
    )
    columns: list[list[str] | str] | None = key(
        None,
        "of rows with named columns, the input's and the target's: [image, label]; several inputs by name: "
        "[[image, age], label]; null = guessed where there is one of each",
    )
    collate: str | None = key(
        None,
        "what makes a batch of samples: lists (each by itself), or an import path to a function "
        "[(input, target), …] → (inputs, targets); null = as the loss takes them, else torch's default_collate",
    )
    mean: list[float] | None = key(
        None, "subtracted from each channel of the image scaled to [0, 1]"
    )
    std: list[float] | None = key(
        None, "divides each channel after the mean is subtracted"
    )

    def __post_init__(self) -> None:
        if isinstance(self.sampler, str):
            raise ConfigError(
                "data.sampler",
                f"{show(self.sampler)} is a name alone; write {{name: {self.sampler}}}, or data.sampler.name",
            )
        super().__post_init__()
        if self.cache == "decoded" and self.cache_dir is None:
            raise ConfigError(
                "data.cache_dir",
                "is not set; data.cache=decoded needs a folder for the decoded images, on a fast disk with room for "
                "them (docs/cache.md says how much)",
            )
        fraction = self.val_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise ConfigError(
                "data.val_fraction", f"{fraction:g} is not above 0 and below 1"
            )
        if not all(deviation > 0 for deviation in self.std or []):
            raise ConfigError(
                "data.std",
                f"{self.std} is not all above 0: channels are divided by it",
            )
        validation_sets(self.val)
        test_set(self.test)
        # An empty mapping would be no key of a flat list of keys, by which runs are compared.
        sets = {name: entry or {"part": "val"} for name, entry in self.val.items()}
        object.__setattr__(self, "val", sets)


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Section):
    SECTION = "batch"

    size: int = key(
        64,
        "samples of one optimizer update, over all processes",
        unit="samples",
        minimum=1,
    )
    micro_size: int | None = key(
        None,
        "samples that are never split: one BatchNorm statistic; null = batch.size",
        unit="samples",
        minimum=1,
    )
    fuse: int | Literal["auto"] = key(
        1, "micro-batches in one forward, for speed; auto: what memory holds", minimum=1
    )
    eval_size: int = key(
        256, "samples of one validation forward", unit="samples", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_size is not None and self.micro_size > self.size:
            raise ConfigError(
                "batch.micro_size",
                f"{self.micro_size} is more than batch.size={self.size}; lower it",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ComponentSection):
    SECTION = "model"

    name: str = key(
        "small_cnn",
        "small_cnn, resnet9, small_segmenter, small_detector, a torchvision model, or an import path to a class or a "
        "function",
    )
    num_classes: int | None = key(
        None, "outputs of the model; null = as many as the data has classes", minimum=1
    )
    weights: str | None = key(
        None,
        "weights to start from: torchvision's name for them, such as DEFAULT, or a file (or its folder)",
        path=True,
    )
    weights_key: str | None = key(
        None,
        "which of several sets of weights in a file: state_dict_ema, or a prefix of names",
    )
    head: str | None = key(
        None, "dotted name of the last layer; null = found automatically"
    )
    freeze: str | list[str] | None = key(
        None, 'not trained: backbone (all but the head), or [conv1, "layer[12]"]'
    )
    unfreeze: dict[str, Any] = key(
        {}, "from which epoch on frozen parts are trained: {5: [layer4], 10: backbone}"
    )


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig(Section):
    SECTION = "batch_norm"

    mode: Literal["micro", "sync", "frozen"] = key(
        "micro",
        "normalise over a micro-batch, over all processes (GPU only), or by fixed statistics",
    )
    momentum: float | None = key(
        None, "momentum of the running statistics; null = the model's own", minimum=0
    )
    momentum_per: Literal["micro_batch", "step"] = key(
        "micro_batch",
        "step: the M micro-batches of a step together move the statistics as far as one update",
    )
    recalibrate: int = key(
        0,
        "use exact statistics over the samples of this many steps instead of running ones; 0 = off",
        unit="steps",
        minimum=0,
    )
    recalibrate_at: Literal["evaluation", "end"] = key(
        "evaluation", "before each evaluation, or only at the end"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None and self.momentum > 1:
            raise ConfigError("batch_norm.momentum", f"{self.momentum} is more than 1")


@dataclass(frozen=True, kw_only=True)
class LossConfig(ComponentSection):
    SECTION = "loss"

    name: str = key(
        "cross_entropy",
        "cross_entropy, mse, bce_with_logits, detection, or an import path to a Task or a loss of torch.nn; "
        "loss.reduction=mean and sum give the same run, because a step always divides by its number of targets",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ComponentSection):
    SECTION = "optimizer"

    name: str = key(
        "sgd", "sgd, adam, adamw, or an import path to a torch.optim.Optimizer"
    )
    lr: float = key(0.1, "learning rate, before the schedule's factor", minimum=0)
    backbone_lr: float | None = key(
        None,
        "learning rate of everything but the model's head; null = optimizer.lr",
        minimum=0,
    )
    layer_decay: float = key(
        1.0,
        "factor from the learning rate of a layer to that of the layer before it",
        minimum=0,
    )
    decay_norm_and_bias: bool = key(
        True, "apply weight_decay to biases and to the weights of norm layers too"
    )
    no_weight_decay: Literal["auto", "honour", "ignore"] = key(
        "auto",
        "parameters that the model names in no_weight_decay(), as timm's do: auto spares them weight_decay where "
        "decay_norm_and_bias is false, honour always, ignore never",
    )
    groups: list[dict[str, Any]] = key(
        [],
        "options of the parameters in whose names a regular expression is found, those of a later group over those of "
        'an earlier: [{match: "norm|bias", weight_decay: 0}, {match: head, lr: 0.01}]',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, group in enumerate(self.groups):
            check_group(f"optimizer.groups[{index}]", group)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(ComponentSection):
    SECTION = "schedule"

    name: str = key(
        "step",
        "step, multi_step, cosine, one_cycle, polynomial, constant, plateau, or an import path",
    )
    per: Literal["epoch", "step"] = key(
        "epoch", "when the learning rate changes, and the unit of durations"
    )
    warmup: float = key(
        0.0,
        "linear warmup, raised every step",
        unit="epochs or steps, as schedule.per",
        minimum=0,
    )
    warmup_start: float = key(
        0.0, "factor of the learning rate at which warmup begins", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class MixConfig(Section):
    """What `train.mix` holds."""

    SECTION = "train.mix"

    mixup: float = key(0.0, "Beta's parameter for MixUp; 0 = off", minimum=0)
    cutmix: float = key(0.0, "Beta's parameter for CutMix; 0 = off", minimum=0)
    prob: float = key(1.0, "share of the micro-batches that are mixed", minimum=0)
    switch_prob: float = key(
        0.5, "share of CutMix among them, where both are on", minimum=0
    )
    off_after: float = key(
        1.0, "share of the run's steps after which nothing is mixed", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prob", "switch_prob", "off_after"):
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"{self.SECTION}.{name}",
                    f"{getattr(self, name):g} is more than 1, and it is a share",
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    SECTION = "train"

    epochs: int = key(10, "passes over the training data", unit="epochs", minimum=1)
    max_steps: int | None = key(
        None,
        "the run's length in steps, unless the epochs end first; schedules end there too",
        unit="steps",
        minimum=1,
    )
    stop_after: int | None = key(
        None,
        "stop after this step, with a checkpoint; the run's length and schedule stay, and run.resume=auto goes on",
        unit="steps",
        minimum=1,
    )
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = key(
        "fp32", "bf16 and fp16: autocast over fp32 weights; fp64: everything"
    )
    channels_last: bool = key(
        False,
        "store weights and activations of images as (N, H, W, C), which is faster for convolutions",
    )
    compile: bool | Literal["default", "reduce-overhead", "max-autotune"] = key(
        False,
        "compile the model with torch.compile, in one of its modes; true = default (docs/cuda.md)",
    )
    tf32: bool | None = key(
        None,
        "on CUDA, let fp32 products be rounded to TF32, which is faster: true everywhere, false nowhere; null = in "
        "convolutions alone, as torch does (docs/cuda.md)",
    )
    cudnn_benchmark: bool | None = key(
        None,
        "on CUDA, let cuDNN time its algorithms for each new shape and keep the fastest; null = torch's setting, off "
        "unless you changed it",
    )
    cuda_graphs: bool = key(
        False,
        "on CUDA, record the forward and backward of a micro-batch once and replay it, for models whose kernels are "
        "so short that the GPU waits for the host; eager, with a reason, where that cannot be done (docs/cuda.md)",
    )
    parallel: Literal["ddp", "fsdp"] = key(
        "ddp",
        "what several processes share: ddp, the work alone; fsdp, also parameters, gradients and optimizer state, of "
        "which each holds its part, for models that do not fit (docs/multi-gpu.md); on one process it changes nothing",
    )
    max_grad_norm: float | None = key(
        None,
        "clip the gradient of the whole step to this L2 norm; null = no clipping",
        minimum=0,
        infinite=True,
    )
    non_finite: Literal["stop", "skip"] = key(
        "stop",
        "where a loss or gradient is not finite: end the run, or leave the step out; skip waits for the device and "
        "the other processes in every step",
    )
    mix: dict[str, Any] = key(
        {},
        "mixes the images of a micro-batch and the loss of their classes, by {mixup: 0.2, cutmix: 1.0} (Beta's "
        "parameters, 0 = off), prob: 1 (share of micro-batches), switch_prob: 0.5 (share of CutMix), off_after: 1 "
        "(share of the run's steps after which it ends); {} = none (docs/mix.md)",
    )
    find_unused_parameters: bool = key(
        False, "allow parameters that receive no gradient in the first step"
    )
    log_every: int = key(50, "steps between logged rows", unit="steps", minimum=1)
    evaluate_every: int = key(1, "epochs between evaluations", unit="epochs", minimum=1)
    evaluate_every_steps: int | None = key(
        None,
        "steps between evaluations within epochs, in addition to those of train.evaluate_every",
        unit="steps",
        minimum=1,
    )
    checkpoint_every: int | None = key(
        None,
        "steps between checkpoints, in addition to those at the ends of epochs",
        unit="steps",
        minimum=1,
    )
    checkpoint_every_epochs: int = key(
        1,
        "epochs between checkpoints at the ends of epochs; the run's last step always has one",
        unit="epochs",
        minimum=1,
    )
    keep_checkpoints: int = key(
        2,
        "how many of the newest checkpoints to keep; 0 writes one only where the run is stopped before its end",
        minimum=0,
    )
    profile: int | None = key(
        None,
        "trace so many steps with torch's profiler, once each session, and say what holds a step up (docs/profile.md); "
        "null = none",
        unit="steps",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile == "default":
            object.__setattr__(self, "compile", True)  # one name for one thing
        if (self.profile or 0) > MAX_PROFILED_STEPS:
            raise ConfigError(
                f"{self.SECTION}.profile",
                f"{self.profile} is more than {MAX_PROFILED_STEPS}, whose trace is too large to look at; 10 say enough",
            )
        if self.max_grad_norm == 0:
            raise ConfigError(
                "train.max_grad_norm",
                "0 would make every gradient zero; null turns clipping off",
            )
        if self.cuda_graphs and self.compile:
            raise ConfigError(
                "train.cuda_graphs",
                "cannot be combined with train.compile, which has graphs of its own in the mode reduce-overhead; keep "
                "one of them",
            )
        if self.mix:
            read_section(MixConfig, self.mix)  # which checks it


@dataclass(frozen=True, kw_only=True)
class BestConfig(Section):
    SECTION = "best"

    metric: str = key("val/loss", "the logged value that decides which model is best")
    mode: Literal["min", "max"] | None = key(
        None,
        "whether lower or higher values are better; null = as the metric is known: min for a loss, max for accuracy",
    )


@dataclass(frozen=True, kw_only=True)
class EarlyStopConfig(Section):
    SECTION = "early_stop"

    metric: str | None = key(
        None, "the logged value that must get better; null = best.metric"
    )
    patience: int | None = key(
        None,
        "end the run after so many evaluations in a row without a better value; null = never; schedules keep their "
        "length",
        unit="evaluations",
        minimum=1,
    )
    min_delta: float = key(
        0.0, "a value counts as better if it is so by more than this", minimum=0
    )
    mode: Literal["min", "max"] | None = key(
        None, "whether lower or higher values are better; null = as for best.mode"
    )


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    SECTION = "ema"

    decay: float | None = key(
        None,
        "keep an exponential moving average of the weights: average = decay × average + (1 - decay) × weights; null = "
        "none",
        minimum=0,
    )
    start: int = key(
        0,
        "steps before the first update, which copies the weights",
        unit="steps",
        minimum=0,
    )
    every: int = key(1, "steps between updates", unit="steps", minimum=1)
    warmup: bool = key(
        False,
        "after n updates use min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten",
    )
    evaluate: Literal["beside", "instead", "none"] = key(
        "beside",
        "beside: evaluate the average too, as val_ema/…; instead: in place of the weights, as val/…; none: not at all",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None and self.decay >= 1:
            raise ConfigError(
                "ema.decay",
                f"{self.decay:g} is not below 1, and the average would never move; 0.999 is a usual value",
            )


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Section):
    SECTION = "wandb"

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
    log_model: Literal["none", "best"] = key(
        "none", "best: the best model becomes an artifact when the run ends"
    )
    log_histograms_every: int | None = key(
        None,
        "steps between histograms of gradients and weights; null = none",
        unit="steps",
        minimum=1,
    )
    alerts: bool = key(False, "let W&B send an alert when the run fails")
    strict: bool = key(
        False, "stop the run with an error when W&B fails, instead of a warning"
    )
    init_timeout: float = key(
        10, "how long to wait for W&B's server at the start", unit="seconds", minimum=1
    )
    finish_timeout: float = key(
        10,
        "how long to wait at the end for data that is not sent yet",
        unit="seconds",
        minimum=1,
    )


_SECTION_CLASSES = (
    RunConfig,
    DataConfig,
    BatchConfig,
    ModelConfig,
    BatchNormConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    BestConfig,
    EarlyStopConfig,
    EmaConfig,
    WandbConfig,
)
# In the order of --help and config.yaml.
SECTIONS: dict[str, Any] = {cls.SECTION: cls for cls in _SECTION_CLASSES}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Every part of the trainer receives its own section and nothing more.

    Checked however it is made: read from YAML, constructed in Python, or changed by `dataclasses.replace`.
    Raises `ConfigError` naming the key.
    """

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
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    metrics: tuple[MetricConfig, ...] = ()
    observers: tuple[ObserverConfig, ...] = ()
    trackers: tuple[TrackerConfig, ...] = ()
    # How values from the environment were written. A field, so that it survives `dataclasses.replace`.
    references: References = field(default_factory=dict, repr=False, compare=False)
    # What the run's header says of how the config was read.
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_sections()
        self._check_combinations()

    def _check_sections(self) -> None:
        for name, cls in SECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, cls):
                raise ConfigError(name, f"is a {cls.__name__}, not {_describe(value)}")
        for name, cls in LISTS.items():
            self._check_list(name, cls)

    def _check_list(self, name: str, cls: type) -> None:
        items = getattr(self, name)
        article = "an" if cls.__name__[0] in "AEIO" else "a"
        if not isinstance(items, list | tuple):
            raise ConfigError(
                name, f"is a list of {cls.__name__}, not {_describe(items)}"
            )
        for index, item in enumerate(items):
            if not isinstance(item, cls):
                raise ConfigError(
                    f"{name}[{index}]",
                    f"is {article} {cls.__name__}, not {_describe(item)}",
                )
        # A list could be changed unchecked.
        object.__setattr__(self, name, tuple(items))

    def _check_combinations(self) -> None:
        """Check what takes keys of several sections to judge; each section checks its own."""
        if self.batch_norm.mode == "sync":
            self._check_sync()
        if self.train.parallel == "fsdp":
            check_needs_of_shards(lambda key: attrgetter(key)(self))
        fuse = self.batch.fuse
        refusal = self.fuse_refusal()
        if refusal is not None and fuse not in (1, "auto"):
            raise ConfigError(
                "batch.fuse", f"{fuse} {refusal}; use batch.fuse=1, or auto"
            )
        if self.run.reproducibility == "bitwise":
            self._refuse_choice_by_timing()

    def _check_sync(self) -> None:
        # Of the two settings it is reproducibility that a user means to keep, so the message is on the other.
        if self.run.reproducibility == "bitwise":
            raise ConfigError(
                "batch_norm.mode",
                "sync takes its statistics over the samples that all processes run at once, which depends on their "
                "number; run.reproducibility=bitwise needs batch_norm.mode=micro",
            )
        if self.data.bad_samples == "quarantine":
            raise ConfigError(
                "data.bad_samples",
                "quarantine may leave a process without samples in a part of a step, and batch_norm.mode=sync needs "
                "some of every process; use batch_norm.mode=micro, or data.bad_samples=stop",
            )

    def _refuse_choice_by_timing(self) -> None:
        """Bitwise mode takes no kernel that was the fastest this time, nor one whose bits nobody has compared."""
        if self.train.cudnn_benchmark:
            raise ConfigError(
                "train.cudnn_benchmark",
                "cannot be combined with run.reproducibility=bitwise: it chooses algorithms by timing them, and the "
                "choice may change from run to run",
            )
        if self.train.compile == "max-autotune":
            raise ConfigError(
                "train.compile",
                "max-autotune cannot be combined with run.reproducibility=bitwise: it chooses kernels by timing them; "
                "use true",
            )
        if self.train.compile == "reduce-overhead":
            raise ConfigError(
                "train.compile",
                "reduce-overhead cannot be combined with run.reproducibility=bitwise: its CUDA graphs have not been "
                "shown to give the same bits; use true",
            )

    def fuse_refusal(self) -> str | None:
        """Why micro-batches of this run cannot share a forward; None if they can."""
        if self.run.reproducibility == "bitwise":
            return "cannot be combined with run.reproducibility=bitwise, which needs each micro-batch's own gradient"
        if self.batch_norm.mode == "sync":
            return "cannot be combined with batch_norm.mode=sync, whose statistics span micro-batches of all processes"
        if self.train.compile:
            return "cannot be combined with train.compile=true: a compiled model cannot be intercepted layer by layer"
        if self.train.parallel == "fsdp":
            return "cannot be combined with train.parallel=fsdp: its check runs forwards on a process by itself"
        if self.data.collate is not None:
            return (
                f"cannot be combined with data.collate={self.data.collate}: the batch that it makes of several "
                f"micro-batches need not be theirs side by side"
            )
        return None

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """The config that nested mappings describe, as YAML would; keys left out keep their defaults.

        Text may use OmegaConf's interpolations, `${oc.env:NAME}` for example; `\\${` is a literal `${`.
        """
        if not isinstance(tree, Mapping):
            raise ConfigError(
                "config", f"is a mapping of sections, not {_describe(tree)}"
            )
        values: Tree = {}
        resolved, references = resolve(tree, _is_setting)
        for name, section in resolved.items():
            if name in LISTS:
                values[name] = read_list(LISTS[name], section)
            elif name in SECTIONS:
                if name == "optimizer":
                    refuse_several_optimizers(section)
                values[name] = read_section(SECTIONS[name], section)
            elif name == "base":
                raise ConfigError("base", "is read in a YAML file alone")
            else:
                hint = nearest(str(name), [*SECTIONS, *LISTS])
                raise ConfigError(str(name), f"no such section{hint}")
        return cls(**values, references=references)

    def to_dict(self, *, digests: bool = False) -> Tree:
        """Nested mappings that `from_dict` and YAML files read back; a component's arguments stand beside the keys.

        Values from the environment are given as the reference to them, `${oc.env:NAME}`, so that the result may be
        written. With `digests` each is followed by a short digest of its value, for comparison only.
        """
        values: Tree = {}
        for name in SECTIONS:
            values[name] = getattr(self, name).to_dict()
        for name in LISTS:
            values[name] = [item.to_dict() for item in getattr(self, name)]
        document: Tree = map_leaves(values, escape)
        restore_references(document, self.references, digests=digests)
        return document


def _is_setting(path: tuple[Any, ...]) -> bool:
    """True for the path of a key that a section declares; False for what is within a component's arguments."""
    section, *rest = path
    if rest and section == "data" and rest[0] in ("val", "test"):
        inner = key_of_set(".".join(map(str, path))).partition(".")[0]
        return inner in declared_keys(EvaluationSetConfig) and inner != "transforms"
    return (
        bool(rest)
        and rest[0] in keys_of(section)
        and not str(rest[0]).endswith("transforms")
    )


def _describe(value: Any) -> str:
    """A value of the wrong type, in a message."""
    if isinstance(value, Mapping):
        return "a mapping; Config.from_dict reads nested mappings"
    return "null" if value is None else f"a {type(value).__name__}"


def keys_of(section: str) -> list[str]:
    """The keys that the section of this name declares; none if there is no such section."""
    if section not in SECTIONS:
        return []
    return list(declared_keys(SECTIONS[section]))
