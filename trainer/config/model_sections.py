"""What is trained, by which loss, and how it is updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.fields import ComponentSection, Section, key
from trainer.config.optimizer_groups import check_group
from trainer.errors import ConfigError


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
