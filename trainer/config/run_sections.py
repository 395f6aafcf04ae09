"""A run by itself: its name and promise, its batches, what is kept of it, when it ends, where it is logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, key
from trainer.errors import ConfigError


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
