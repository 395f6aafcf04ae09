"""Keys that a config sets and that change nothing in this run: the header says so, one line for each reason.

Left out is what depends on the number of processes, since a config is written for any, and `wandb` where it is
disabled, which the header says anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.nn.modules.batchnorm import _BatchNorm

from trainer.components.parameter_groups import named_by_model
from trainer.config.fields import declared_keys
from trainer.config.schema import SECTIONS, Config
from trainer.core.cuda_keys import has_tf32
from trainer.core.run import Run
from trainer.data.folder import ImageFolder
from trainer.data.rows import Rows
from trainer.exact.batch_norm import is_held, norm_layers
from trainer.process.cuda_graph import recorder_for

STATISTICS = (
    "batch_norm.momentum",
    "batch_norm.momentum_per",
    "batch_norm.recalibrate",
    "batch_norm.recalibrate_at",
)


class Rule(NamedTuple):
    """`keys` change nothing in a run of which `applies` is true."""

    keys: tuple[str, ...]
    applies: Callable[[Run], bool]
    reason: str


def _has_no_batch_norm(run: Run) -> bool:
    is_sync = run.config.batch_norm.mode == "sync"  # also for layers that keep nothing
    has_other = any(isinstance(layer, _BatchNorm) for layer in run.module.modules())
    return not norm_layers(run.module) and not (is_sync and has_other)


def _has_frozen_batch_norm(run: Run) -> bool:
    if run.config.model.unfreeze:
        return False
    return all(map(is_held, norm_layers(run.module)))


def _is_head_unused(run: Run) -> bool:
    config = run.config
    is_replaced_or_loaded = bool(run.weights_note)
    is_told_apart = (
        config.model.freeze is not None
        or config.optimizer.backbone_lr is not None
        or config.optimizer.layer_decay != 1
    )
    return not is_replaced_or_loaded and not is_told_apart


def _has_one_micro_batch(run: Run) -> bool:
    return len(run.plan.step(0).micro_batches) == 1


def _is_in_memory(run: Run) -> bool:
    loaders = [run.train_loader, *(part.loader for part in run.evaluation_sets)]
    return not any(loader.dataset.draws for loader in loaders)


def _has_no_rows(run: Run) -> bool:
    dataset: Any = run.data.train
    while not isinstance(dataset, Rows):
        dataset = getattr(dataset, "dataset", None)  # of a part of another
        if dataset is None:
            return True
    return False


def has_image_files(run: Run) -> bool:
    """True if any of the run's samples is an image file that Lockstep itself decodes."""
    evaluated = run.data.evaluated().values()
    return any(map(_has_files, [run.data.train, *evaluated]))


def _has_files(dataset: Any) -> bool:
    while dataset is not None and not isinstance(dataset, ImageFolder):
        dataset = getattr(dataset, "dataset", None)  # of a part of another
    return dataset is not None


def _is_never_averaged(run: Run) -> bool:
    section = run.config.ema
    last_update = run.plan.total_steps // section.every * section.every
    return last_update <= section.start


def _ends_before(steps: int | None, run: Run) -> bool:
    return steps is not None and steps > run.plan.total_steps


# The first rule that applies to a key is the one that is shown.
RULES = (
    Rule(
        ("run.resume_changes",),
        lambda run: run.config.run.resume == "never",
        "run.resume=never resumes nothing",
    ),
    Rule(
        ("data.workers", "data.prefetch"),
        lambda run: run.config.data.on_device and _is_in_memory(run),
        "the data are in memory, and lie on the device (data.on_device)",
    ),
    Rule(
        ("data.prefetch",),
        lambda run: run.config.data.workers == 0,
        "there are no loader processes (data.workers=0)",
    ),
    Rule(
        ("data.cache_dir",),
        lambda run: run.config.data.cache != "decoded",
        "no images are kept in files (data.cache is not decoded)",
    ),
    Rule(
        ("data.split_seed",),
        lambda run: run.config.data.val_fraction is None,
        "nothing is split (data.val_fraction=null)",
    ),
    Rule(
        ("data.max_bad",),
        lambda run: run.quarantine is None,
        "the first bad sample ends the run (data.bad_samples=stop)",
    ),
    Rule(
        ("data.bad_samples", "data.max_bad"),
        _is_in_memory,
        "the data are in memory and not transformed, so no sample can be bad",
    ),
    Rule(
        ("data.decode_short_side",),
        lambda run: not has_image_files(run),
        "no sample is an image file that Lockstep decodes",
    ),
    Rule(
        ("data.columns",),
        _has_no_rows,
        "the samples are no rows with named columns",
    ),
    Rule(
        ("data.epoch_samples",),
        lambda run: (
            not run.config.data.sampler and run.plan.samples == len(run.data.train)
        ),
        "it is the number of training samples",
    ),
    Rule(
        ("early_stop.metric", "early_stop.min_delta", "early_stop.mode"),
        lambda run: run.config.early_stop.patience is None,
        "there is no early stopping (early_stop.patience=null)",
    ),
    Rule(
        ("ema.start", "ema.every", "ema.warmup", "ema.evaluate"),
        lambda run: run.config.ema.decay is None,
        "there is no average (ema.decay=null)",
    ),
    Rule(
        ("ema.decay", "ema.start", "ema.every", "ema.warmup"),
        _is_never_averaged,
        "no step of the run updates the average (ema.start, ema.every)",
    ),
    Rule(
        ("ema.evaluate",),
        lambda run: run.evaluator is None,
        "there are no validation data",
    ),
    Rule(
        ("batch.eval_size", "train.evaluate_every", "train.evaluate_every_steps"),
        lambda run: not run.evaluation_sets,
        "there are no validation data",
    ),
    Rule(
        ("batch_norm.mode", *STATISTICS),
        _has_no_batch_norm,
        "the model has no layer with running statistics, such as BatchNorm",
    ),
    Rule(
        STATISTICS,
        _has_frozen_batch_norm,
        "no running statistics are updated: they are frozen",
    ),
    Rule(
        ("batch_norm.recalibrate_at",),
        lambda run: run.config.batch_norm.recalibrate == 0,
        "nothing is recalibrated (batch_norm.recalibrate=0)",
    ),
    Rule(
        ("batch_norm.momentum_per",),
        _has_one_micro_batch,
        "a step is one micro-batch (batch.micro_size)",
    ),
    Rule(
        ("batch.fuse",),
        lambda run: run.config.batch.fuse != "auto" and _has_one_micro_batch(run),
        "a step is one micro-batch (batch.micro_size)",
    ),
    Rule(
        ("model.head",),
        _is_head_unused,
        "no weights are loaded, it has as many outputs as the data has classes, and nothing treats it apart",
    ),
    Rule(
        ("optimizer.no_weight_decay",),
        lambda run: not named_by_model(run.module),
        "the model has no no_weight_decay() that names a parameter",
    ),
    Rule(
        ("optimizer.no_weight_decay",),
        lambda run: (
            run.config.optimizer.no_weight_decay == "ignore"
            and run.config.optimizer.decay_norm_and_bias
        ),
        "auto spares nothing either (optimizer.decay_norm_and_bias=true)",
    ),
    Rule(
        ("schedule.warmup_start",),
        lambda run: run.config.schedule.warmup == 0,
        "there is no warmup (schedule.warmup=0)",
    ),
    Rule(
        ("schedule.per",),
        lambda run: (
            run.config.schedule.name == "constant" and run.config.schedule.warmup == 0
        ),
        "the learning rate is constant",
    ),
    Rule(
        ("train.max_steps",),
        lambda run: _ends_before(run.config.train.max_steps, run),
        "the epochs (train.epochs) end before",
    ),
    Rule(
        ("train.stop_after",),
        lambda run: _ends_before(run.config.train.stop_after, run),
        "the run ends before",
    ),
    Rule(
        ("train.mix",),
        lambda run: run.forward.mix is not None and run.forward.mix.is_idle,
        "neither mixup nor cutmix is above 0, or else prob or off_after is 0",
    ),
    Rule(
        ("train.mix",),
        lambda run: all(
            end - start == 1 for start, end in run.plan.step(0).micro_batches
        ),
        "a micro-batch is one sample (batch.micro_size), which has no partner",
    ),
    Rule(
        ("train.evaluate_every_steps",),
        lambda run: _ends_before(run.config.train.evaluate_every_steps, run),
        "the run ends before",
    ),
    Rule(
        ("train.checkpoint_every", "train.checkpoint_every_epochs"),
        lambda run: run.config.train.keep_checkpoints == 0,
        "no checkpoint is kept (train.keep_checkpoints=0)",
    ),
    Rule(
        ("train.tf32",),
        lambda run: not has_tf32(run.config, run.ranks.device),
        "nothing here can be rounded to TF32, which is for fp32 products on GPUs from Ampere on",
    ),
    Rule(
        ("train.cudnn_benchmark",),
        lambda run: run.ranks.device.type != "cuda",
        "there is no cuDNN on this device",
    ),
    Rule(
        ("train.cuda_graphs",),
        lambda run: recorder_for(run.ranks.device) is None,
        "there are no CUDA graphs on this device",
    ),
    Rule(
        ("train.channels_last",),
        lambda run: all(tensor.dim() != 4 for tensor in run.module.parameters()),
        "the model has no convolution of images",
    ),
)


def keys_without_effect(run: Run) -> list[str]:
    """A line for each rule that applies to keys whose values are not their defaults."""
    unexplained = _changed_keys(run.config)
    lines = []
    for rule in RULES:
        keys = [key for key in rule.keys if key in unexplained]
        if keys and rule.applies(run):
            unexplained -= set(keys)
            verb = "has" if len(keys) == 1 else "have"
            lines.append(f"{', '.join(keys)} {verb} no effect: {rule.reason}")
    if run.config.metrics and not run.evaluation_sets:
        lines.append("metrics have no effect: there are no validation data")
    return lines


def _changed_keys(config: Config) -> set[str]:
    """The keys whose values are not their defaults."""
    changed = set()
    for section, cls in SECTIONS.items():
        for name, key in declared_keys(cls).items():
            if getattr(getattr(config, section), name) != key.default:
                changed.add(f"{section}.{name}")
    return changed
