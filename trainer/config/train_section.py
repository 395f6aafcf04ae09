"""How a run is trained: the section `train`, and what its key `mix` holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.fields import Section, key, read_section
from trainer.errors import ConfigError

MAX_PROFILED_STEPS = 100


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
