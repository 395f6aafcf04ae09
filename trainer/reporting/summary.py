"""The facts that open and close a run: the console's header, and what `summary.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainer.components.compiling import describe_compile
from trainer.components.learning_rates import describe_layers
from trainer.components.models import count_parameters
from trainer.components.optimizer import named_state
from trainer.components.parameter_groups import describe_groups
from trainer.components.schedule import Schedule
from trainer.config.run_sections import BestConfig
from trainer.config.train_section import TrainConfig
from trainer.core.cuda_keys import describe_tf32
from trainer.core.early_stop import describe_early_stop
from trainer.core.evaluated_weights import describe_average
from trainer.core.graphs.refusal import describe_graphs
from trainer.core.loader_limits import loader_note
from trainer.core.no_effect import has_image_files, keys_without_effect
from trainer.core.proof.prove import Proof
from trainer.core.run import Run
from trainer.core.whole_step import describe_scope
from trainer.data.sampler import DrawnOrder
from trainer.exact.determinism import describe_settings
from trainer.exact.exchange_cost import describe_exchange
from trainer.exact.model_and_loss import ModelAndLoss
from trainer.exact.plan import Plan
from trainer.exact.shards import blocks_in
from trainer.process.device import device_name
from trainer.process.levels import ranks_per_machine
from trainer.storage import bad_samples
from trainer.storage.checkpoint import Progress
from trainer.storage.sha256 import tensors_sha256

Fact = tuple[str, str]  # a line of the header: its name and its text

MAX_LISTED_RANKS = 8
MAX_LISTED_GROUPS = 12


def header(
    run: Run,
    schedule: Schedule,
    fuse: int,
    fuse_note: str,
    *,
    directory: Path,
    proof: Proof,
    optimizer: Optimizer,
) -> list[Fact]:
    """What a person wants to see before a run begins. A fact without text is left out."""
    facts = [
        ("run", str(directory)),
        *(("config", note) for note in run.config.notes),
        *_facts_of_model(run),
        *_facts_of_data(run),
        ("batch", batch_arithmetic(run.plan, fuse)),
        ("mix", "" if run.forward.mix is None else run.forward.mix.describe()),
        *_facts_of_length(run, schedule, optimizer),
        *_facts_of_devices(run),
        ("fuse", f"1: {fuse_note}" if fuse_note else ""),
        ("bitwise", describe_settings() if run.bitwise else ""),
        ("exchange", _describe_exchange(run)),
        ("bad samples", _describe_quarantine(run)),
        ("note", run.data.note),
        ("note", run.inputs_note),
        ("note", run.sharding_note),
        ("note", loader_note(run.config)),
        ("note", schedule.note(run.plan.total_steps)),
        *(("note", line) for line in keys_without_effect(run)),
        *proof.facts(),
    ]
    return [(name, text) for name, text in facts if text]


def _facts_of_model(run: Run) -> list[Fact]:
    return [
        ("model", f"{run.config.model.name} · {_describe_parameters(run)}"),
        ("weights", run.weights_note),
        ("note", run.dtypes_note),
        ("loss", _describe_loss(run)),
        ("metrics", _describe_metrics(run)),
    ]


def _facts_of_data(run: Run) -> list[Fact]:
    return [
        ("data", _describe_data(run)),
        ("decoding", _describe_decoding(run)),
        ("images", run.data.images),
        ("on device", run.device_note),
        ("batch transforms", _describe_batch_transforms(run)),
        ("sampler", _describe_sampler(run.plan)),
    ]


def _facts_of_length(run: Run, schedule: Schedule, optimizer: Optimizer) -> list[Fact]:
    """How the weights are updated, how often, and how the run is judged on the way."""
    config = run.config
    return [
        ("optimizer", _describe_optimizer(run)),
        *(("optimizer", line) for line in _describe_groups(run, optimizer)),
        ("schedule", schedule.describe()),
        ("length", _describe_length(run.plan, config.train.stop_after)),
        ("evaluation", _describe_evaluations(config.train)),
        ("best", _describe_best(config.best)),
        ("average", describe_average(config)),
        ("early stop", describe_early_stop(config.early_stop)),
    ]


def _facts_of_devices(run: Run) -> list[Fact]:
    config = run.config
    device = device_name(run.ranks.device)
    return [
        ("device", f"{run.ranks.count} × {device} · {config.train.precision}"),
        ("compile", describe_compile(config.train.compile, run.ranks.device.type)),
        ("graphs", describe_graphs(run)),
        ("tf32", describe_tf32(config, run.ranks.device)),
        ("parallel", _describe_parallel(run)),
        ("figures", _describe_figures(run)),
    ]


def _describe_length(plan: Plan, stop_after: int | None) -> str:
    length = f"{plan.total_steps:,} steps · {plan.steps_per_epoch:,} an epoch"
    if stop_after is None or stop_after >= plan.total_steps:
        return length
    return f"{length} · stops after step {stop_after:,} (train.stop_after)"


def _describe_exchange(run: Run) -> str:
    if not run.bitwise:
        return ""
    return describe_exchange(run.plan, ranks_per_machine(run.ranks.machines))


def _describe_quarantine(run: Run) -> str:
    if run.quarantine is None:
        return ""
    limit = f"left out, up to {run.config.data.max_bad} (data.max_bad)"
    count = len(run.quarantine)
    return f"{limit}; {count} so far" if count else limit


def _describe_optimizer(run: Run) -> str:
    section = run.config.optimizer
    layers = describe_layers(section, run.module, run.config.model.head)
    decay = f" · layer_decay {section.layer_decay:g}: {layers}" if layers else ""
    return f"{section.name} · lr {section.lr:g}{decay}"


def _describe_evaluations(section: TrainConfig) -> str:
    """Only for evaluations within epochs: those at their ends are what one expects."""
    if section.evaluate_every_steps is None:
        return ""
    every = section.evaluate_every
    epochs = "each epoch" if every == 1 else f"every {every:,} epochs"
    return f"every {section.evaluate_every_steps:,} steps, and after {epochs}"


def _describe_groups(run: Run, optimizer: Optimizer) -> list[str]:
    whole = ModelAndLoss(run.module, run.task)
    lines = list(describe_groups(run.config.optimizer, optimizer, whole))
    if len(lines) <= MAX_LISTED_GROUPS:
        return lines
    return [*lines[:MAX_LISTED_GROUPS], f"and {len(lines) - MAX_LISTED_GROUPS} more"]


def _describe_parallel(run: Run) -> str:
    """Only for parameters that are shared out."""
    if run.config.train.parallel == "ddp":
        return ""
    if not run.is_sharded:
        return "fsdp changes nothing here: one process holds the whole model"
    parts = (
        f"fsdp: parameters, gradients and optimizer state in {run.ranks.count} parts"
    )
    count = len(blocks_in(run.module))
    if count:
        return f"{parts}, gathered in {count} blocks and a rest"
    return (
        f"{parts}, gathered all at once: the model has no large blocks "
        f"(docs/multi-gpu.md)"
    )


def _describe_figures(run: Run) -> str:
    if not run.is_sharded or not run.config.run.figures:
        return ""
    return (
        "no saliency maps, and no predictions but a classifier's: with train.parallel=fsdp no process can run the "
        "model by itself"
    )


def _describe_best(best: BestConfig) -> str:
    return f"{'highest' if best.mode == 'max' else 'lowest'} {best.metric}"


def _describe_parameters(run: Run) -> str:
    total, trained = count_parameters(run.module)
    if trained == total:
        return f"{total:,} parameters"
    return f"{total:,} parameters, {trained:,} trained"


def _describe_loss(run: Run) -> str:
    """Only for a loss that is trained or compares samples: what most losses are is in the config."""
    parameters = ModelAndLoss(run.module, run.task).trained_loss_parameters()
    count = sum(parameter.numel() for parameter in parameters.values())
    facts = [describe_scope(run)]
    if count:
        facts.append(f"{count:,} parameters, trained with the model's")
    text = " · ".join(filter(None, facts))
    return f"{run.config.loss.name} · {text}" if text else ""


def _describe_sampler(plan: Plan) -> str:
    order = plan.order
    return order.description if isinstance(order, DrawnOrder) else ""


def _describe_metrics(run: Run) -> str:
    """Those that are computed over whole evaluations."""
    parts = []
    for item in run.metrics.named:
        parts.append(f"val/{item.name} ({type(item.metric).__name__})")
    return " · ".join(parts)


def _describe_data(run: Run) -> str:
    data = run.data
    parts = [data.name, f"{len(data.train):,} train"]
    for phase, dataset in data.evaluated().items():
        parts.append(f"{len(dataset):,} {phase}")
    if data.classes:
        parts.append(f"{len(data.classes)} classes")
    return " · ".join(parts)


def _describe_decoding(run: Run) -> str:
    decoder = run.train_loader.device_decoder
    if decoder:
        return f"JPEG files to train on: {decoder}; others on the CPU (data.decode)"
    side = run.config.data.decode_short_side
    if side is None or not has_image_files(run):
        return ""
    return f"JPEG files decoded smaller, no shorter side below {side:,} pixels (data.decode_short_side)"


def _describe_batch_transforms(run: Run) -> str:
    transforms = run.train_loader.batch_transforms
    return "" if transforms is None else transforms.describe()


def batch_arithmetic(plan: Plan, fuse: int = 1) -> str:
    """A full step in numbers: `64 = 8 × 8 on 3 processes: 3+3+2`; `, up to 2 at once` if one forward runs several."""
    step = plan.step(0)
    count = len(step.micro_batches)
    sizes = {stop - start for start, stop in step.micro_batches}
    larger, smaller = max(sizes), min(sizes)  # at most one apart
    if larger == smaller:
        cut = f"{step.size} = {count} × {larger}"
    else:
        cut = f"{step.size} in {count} of {larger} or {smaller}"
    return f"{cut} on {_describe_shares(plan)}{_describe_fuse(plan, fuse)}"


def _describe_shares(plan: Plan) -> str:
    """How many micro-batches of a full step each process runs."""
    if plan.ranks == 1:
        return "1 process"
    shares = [stop - start for start, stop in plan.step(0).ranks]
    if len(shares) > MAX_LISTED_RANKS:
        return f"{plan.ranks} processes: {shares[0]} to {shares[-1]} each"
    return f"{plan.ranks} processes: {'+'.join(map(str, shares))}"


def _describe_fuse(plan: Plan, fuse: int) -> str:
    step = plan.step(0)
    largest = 1
    for rank in range(plan.ranks):
        for start, stop in plan.groups(step, rank, fuse):
            largest = max(largest, stop - start)
    return f", up to {largest} at once" if largest > 1 else ""


def summary(
    run: Run,
    progress: Progress,
    optimizer: Optimizer,
    proof: Proof,
    average: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What `summary.json` holds."""
    whole = ModelAndLoss(run.module, run.task)
    optimizer_state, _ = named_state(optimizer, whole)
    of_loss = whole.trained_loss_parameters()
    hashes = {"loss_sha256": tensors_sha256(of_loss)} if of_loss else {}
    if average:
        hashes["ema_sha256"] = tensors_sha256(dict(average))
    stopped: dict[str, Any] = {}
    # Only a run that `train.stop_after` has stopped, or that ended by `stopped_by`, has steps left here.
    if progress.step < run.plan.total_steps:
        stopped["planned_steps"] = run.plan.total_steps
        if progress.stopped_by:
            stopped["stopped_by"] = progress.stopped_by
    # Elsewhere the epoch says it.
    is_within_epochs = run.config.train.evaluate_every_steps is not None
    best_step = {"best_step": progress.best_step} if is_within_epochs else {}
    values = {
        "best": progress.best,
        "best_epoch": progress.best_epoch,
        **best_step,
        "best_metric": run.config.best.metric,
        "steps": progress.step,
        **stopped,
        "samples_seen": progress.samples_seen,
        "world_size": run.ranks.count,
        "seconds": progress.seconds,
        "weights_sha256": tensors_sha256(dict(run.module.named_parameters())),
        "buffers_sha256": tensors_sha256(dict(run.module.named_buffers())),
        "optimizer_sha256": tensors_sha256(optimizer_state),
        **hashes,
        "proof": proof.to_dict(),
    }
    if run.precision.skips_overflow or run.config.train.non_finite == "skip":
        values["skipped_steps"] = progress.skipped_steps
    if run.quarantine is not None:
        values["bad_samples"] = len(run.quarantine)
    return values


def _describe_bad(values: dict[str, Any]) -> str:
    count = values.get("bad_samples", 0)
    return f" · {count:,} left out as bad: {bad_samples.FILE}" if count else ""


def closing(values: dict[str, Any], directory: Path) -> list[Fact]:
    """What a person wants to see when a run is over, from the `values` of `summary.json`."""
    best = "none"
    if values["best"] is not None:
        best = f"{values['best_metric']} {values['best']:.4f} in epoch {values['best_epoch']}"
        if "best_step" in values:
            best += f", step {values['best_step']:,}"
    steps = f"{values['steps']:,} steps"
    if "planned_steps" in values:
        steps = (
            f"{values['steps']:,} of {values['planned_steps']:,} steps, stopped by train.stop_after; "
            f"run.resume=auto goes on"
        )
    if "stopped_by" in values:
        steps = f"{values['steps']:,} of {values['planned_steps']:,} steps"
    minutes, seconds = divmod(values["seconds"], 60)
    elapsed = f"{minutes:.0f} min {seconds:.1f} s" if minutes else f"{seconds:.1f} s"
    samples = f"{values['samples_seen']:,} samples{_describe_bad(values)}"
    facts = [
        ("best", best),
        *_describe_test(values),
        ("elapsed", elapsed),
        ("trained", f"{steps} · {samples}"),
    ]
    if "stopped_by" in values:
        facts.append(("ended by", values["stopped_by"]))
    facts += [
        ("weights", values["weights_sha256"][:16]),
        ("files", str(directory)),
    ]
    return facts


def _describe_test(values: dict[str, Any]) -> list[Fact]:
    metrics = []
    for name, value in values.items():
        if name.startswith("test/"):
            metrics.append(f"{name.removeprefix('test/')} {value:.4f}")
    if not metrics:
        return []
    return [
        ("test", f"{' · '.join(metrics)} (weights of step {values['test_step']:,})")
    ]
