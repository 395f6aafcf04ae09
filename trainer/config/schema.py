"""A whole config, of sections in whose files every key is declared once: its type, default, meaning, unit and bounds.

A section that names a component (`data`, `model`, `loss`, `optimizer`, `schedule`, and each of `metrics`, `observers`
and `trackers`) keeps the keys it does not declare in `args`: they are the component's own arguments, checked against
its signature when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from trainer.config.component_lists import (
    LISTS,
    MetricConfig,
    ObserverConfig,
    TrackerConfig,
    read_list,
)
from trainer.config.data_section import DataConfig
from trainer.config.evaluation_sets import (
    EvaluationSetConfig,
    key_of_set,
)
from trainer.config.fields import (
    declared_keys,
    read_section,
)
from trainer.config.interpolation import References, escape, resolve, restore_references
from trainer.config.model_sections import (
    BatchNormConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from trainer.config.run_sections import (
    BatchConfig,
    BestConfig,
    EarlyStopConfig,
    EmaConfig,
    RunConfig,
    WandbConfig,
)
from trainer.config.several_optimizers import refuse_several_optimizers
from trainer.config.sharded_parameters import check_needs_of_shards
from trainer.config.train_section import TrainConfig
from trainer.config.trees import Tree, map_leaves
from trainer.errors import ConfigError, nearest

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
    if not rest:
        return False
    key = rest[0]
    if section == "data" and key in ("val", "test"):
        in_set = key_of_set(".".join(map(str, path)))
        inner, _, _ = in_set.partition(".")
        return inner in declared_keys(EvaluationSetConfig) and inner != "transforms"
    return key in keys_of(section) and not str(key).endswith("transforms")


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
