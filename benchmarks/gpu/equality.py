"""Runs that must be equal, bit for bit or up to rounding in fp64, and precisions that must learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.check import ON_GPU_ONLY, Answer, Setting, Unanswered
from benchmarks.gpu.speed import CLASSES, width
from benchmarks.processes import on_processes
from benchmarks.subjects import fitted, noise, patterns, settings
from trainer import Config, Trainer
from trainer.components.models import small_cnn
from trainer.exact import exchange, sharding
from trainer.exact.determinism import run_settings
from trainer.exact.shards import whole
from trainer.reporting.jsonl import read_rows
from trainer.storage import checkpoint

EQUAL = 1e-12  # relative, in fp64
SMALL_BUCKETS = 1 << 13, 1 << 10  # bytes, and those of the last one
HASHES = ("weights_sha256", "buffers_sha256", "optimizer_sha256")

State = Mapping[str, Tensor]


# ---------------------------------------------------------------- precision


def learns(setting: Setting, **changes: Any) -> Answer:
    """The loss is halved within three epochs, and the weights stay in fp32."""
    if changes.get("train__compile") and not setting.on_gpu:
        raise Unanswered("compiled on a GPU only")
    trainer = fitted(
        settings(setting.directory, train__epochs=3, **changes),
        partial(small_cnn, 10),
        patterns(setting.pick(1280, 1280, 640)),
    )
    rows = read_rows(setting.directory / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    scaler = trainer.run.precision.scaler
    scale = f", loss scale {scaler.get_scale():.0f}" if scaler else ""
    is_fp32 = all(p.dtype is torch.float32 for p in trainer.module.parameters())
    is_learnt = all(map(math.isfinite, losses)) and losses[-1] < 0.5 * losses[0]
    return Answer(
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}{scale}, weights {'' if is_fp32 else 'NOT '}fp32",
        {"first_loss": losses[0], "last_loss": losses[-1]},
        passed=is_learnt and is_fp32,
    )


# ---------------------------------------------------------------- one process and two


def two_processes(setting: Setting) -> Answer:
    """Two processes that share the device, over gloo, end with the weights and statistics of one."""
    changes = {"batch__micro_size": 8, "train__precision": "fp64"}
    return _compare(
        _end_on(setting, 2, **changes),
        _end_on(setting, 1, **changes),
    )


def bitwise_on_two(setting: Setting) -> Answer:
    """In fp32 and bitwise mode they do so to the last bit."""
    changes = {"batch__micro_size": 8, "run__reproducibility": "bitwise"}
    two, one = _end_on(setting, 2, **changes), _end_on(setting, 1, **changes)
    different = [name for name in one if not torch.equal(two[name], one[name])]
    return Answer(
        f"{len(one) - len(different)} of {len(one)} tensors have the same bits"
        + "".join(f", not {name}" for name in different[:3]),
        {"tensors": len(one), "different": different},
        passed=not different,
    )


def fsdp_on_two(setting: Setting) -> Answer:
    """Two processes that hold a half of the parameters each end as one that holds all."""
    common = {"batch__micro_size": 8, "train__precision": "fp64", "run__proof": "off"}
    return _compare(
        _end_on(setting, 2, train__parallel="fsdp", **common),
        _end_on(setting, 1, **common),
    )


def sync_on_two(setting: Setting) -> Answer:
    """With SyncBatchNorm a micro-batch on each of two processes is one of twice the size on one."""
    if not setting.on_gpu:
        raise Unanswered("torch's SyncBatchNorm runs on a GPU only")
    two = {"batch_norm__mode": "sync", "batch__micro_size": 32}
    one = {"batch__micro_size": 64}
    common = {"batch_norm__momentum_per": "step", "train__precision": "fp64"}
    return _compare(
        _end_on(setting, 2, **two, **common),
        _end_on(setting, 1, **one, **common),
    )


def replayed_on_two(setting: Setting) -> Answer:
    """Two processes that replay micro-batches from graphs, and sum gradients after the backward, end as one does."""
    common = {"batch__micro_size": 8, "train__precision": "fp64"}
    config = settings(setting.directory / "graphs", train__cuda_graphs=True, **common)
    device = setting.device_type
    ends = on_processes(2, _replayed, config, device, device=device)
    eager = _end_on(setting, 1, **common)
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    replays = [count for _, count, _ in ends]
    if not all(replays):
        reasons = " and ".join(reason for _, _, reason in ends)
        return Answer(f"not replayed: {reasons}", {"replays": replays}, passed=False)
    answer = _compare(ends[0][0], eager)
    return Answer(
        f"{replays[0]} and {replays[1]} micro-batches were replayed; {answer.text}",
        answer.values | {"replays": replays},
        passed=answer.passed,
    )


def _replayed(config: Config, device_type: str) -> tuple[State, int, str]:
    """The state at the end of the same run, how many micro-batches this process replayed, and why no more."""
    trainer = _fitted_to_patterns(config, device_type)
    graphs = trainer.graphs
    replays, reason = (0, "") if graphs is None else (graphs.replays, graphs.reason)
    return _on_cpu(trainer), replays, reason


def _end_on(setting: Setting, processes: int, **changes: Any) -> State:
    """The state at the end of a run on so many processes."""
    config = settings(setting.directory / str(processes), **changes)
    device = setting.device_type
    state: State = on_processes(processes, _trained, config, device, device=device)[0]
    return state


def _trained(config: Config, device_type: str) -> State:
    return _on_cpu(_fitted_to_patterns(config, device_type))


def _fitted_to_patterns(config: Config, device_type: str) -> Trainer:
    """21 steps, the last of a single micro-batch, so that one of two ranks has nothing to do in it.

    In bitwise mode even a small net's gradients go in several buckets, during the backward. With fsdp each of its
    layers is gathered by itself.
    """
    # This process is of this run alone.
    exchange.BUCKET_BYTES, exchange.LAST_BUCKET_BYTES = SMALL_BUCKETS
    sharding.SMALL_BYTES = 0
    trainer = fitted(config, partial(small_cnn, 10), patterns(64 * 20 + 5))
    assert trainer.ranks.device.type == device_type
    return trainer


def _on_cpu(trainer: Trainer) -> State:
    state = trainer.module.state_dict()
    return {name: whole(tensor).cpu() for name, tensor in state.items()}


# ---------------------------------------------------------------- one process


def fused(setting: Setting) -> Answer:
    """8 micro-batches in one forward are those 8 one by one, BatchNorm and dropout included."""
    run = partial(
        _end_of,
        setting,
        make_model=with_dropout,
        batch__micro_size=8,
        train__precision="fp64",
    )
    return _compare(run("8", batch__fuse=8), run("1", batch__fuse=1))


def on_device(setting: Setting) -> Answer:
    """A run whose samples lie on the device is the run whose samples are copied, augmented there in both."""
    run = partial(
        _end_of,
        setting,
        make_model=partial(small_cnn, 10),
        batch__micro_size=16,
        train__precision="fp64",
        data__batch_transforms=[
            {"name": "RandomCrop", "size": 8, "padding": 1},
            {"name": "RandomHorizontalFlip"},
        ],
    )
    return _compare(run("there", data__on_device=True), run("copied"))


def sync_batch_norm(setting: Setting) -> Answer:
    """`batch_norm.mode=sync` on one process is `micro`."""
    run = partial(
        _end_of,
        setting,
        make_model=partial(small_cnn, 10),
        batch__micro_size=32,
        train__precision="fp64",
    )
    return _compare(
        run("sync", batch_norm__mode="sync"), run("micro", batch_norm__mode="micro")
    )


def resume(setting: Setting) -> Answer:
    """A run stopped after 7 of 15 steps, and gone on with, ends as one that was not, dropout and all."""
    run = partial(
        _end_of,
        setting,
        make_model=with_dropout,
        batch__micro_size=16,
        train__precision="fp64",
        run__resume="auto",
    )
    run("stopped", train__max_steps=7)
    return _compare(
        run("stopped", train__max_steps=15), run("straight", train__max_steps=15)
    )


def compiled_in(setting: Setting, *, mode: str) -> Answer:
    """Four micro-batches a step, compiled in a mode that records CUDA graphs: the run that nothing compiles."""
    if not setting.on_gpu:
        raise Unanswered("compiled on a GPU only")
    run = partial(
        _end_of,
        setting,
        make_model=partial(small_cnn, 10),
        batch__micro_size=16,
        train__precision="fp64",
        train__max_steps=5,
    )
    return _compare(run(mode, train__compile=mode), run("eager"))


def replayed(setting: Setting, *, mode: str) -> Answer:
    """Four micro-batches a step with BatchNorm and dropout in fp32, replayed from graphs: the bits of eager.

    In standard mode kernels need not have the same bits each time, so there the runs are equal up to rounding, in fp64.
    """
    is_bitwise = mode == "bitwise"
    run = partial(
        _trainer_at_end,
        setting,
        make_model=with_dropout,
        batch__micro_size=16,
        train__precision="fp32" if is_bitwise else "fp64",
        run__reproducibility=mode,
    )
    graphs = run("graphs", train__cuda_graphs=True)
    eager = run("eager").module.state_dict()
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    assert graphs.graphs is not None
    if not graphs.graphs.replays:
        return Answer(
            f"nothing was replayed: {graphs.graphs.reason}",
            {"reason": graphs.graphs.reason},
            passed=False,
        )
    state = graphs.module.state_dict()
    if not is_bitwise:
        return _compare(state, eager)
    different = [name for name in eager if not torch.equal(state[name], eager[name])]
    return Answer(
        f"{graphs.graphs.replays} micro-batches were replayed; {len(different)} of {len(eager)} tensors differ",
        {"replays": graphs.graphs.replays, "different": different},
        passed=not different,
    )


def passing_checkpoint(setting: Setting) -> Answer:
    """A checkpoint that training went on from at once holds the weights of its step: those of a run that ends there."""
    run = partial(
        _end_of,
        setting,
        make_model=partial(small_cnn, 10),
        batch__micro_size=16,
        train__precision="fp64",
    )
    run(
        "passing",
        train__max_steps=15,
        train__checkpoint_every=7,
        train__keep_checkpoints=9,
    )
    path = setting.directory / "passing" / "run" / "checkpoints" / "step_00000007"
    return _compare(checkpoint.load(path).model, run("ends", train__max_steps=7))


def with_dropout() -> nn.Module:
    return nn.Sequential(small_cnn(64), nn.Dropout(0.3), nn.Linear(64, 10))


def _end_of(
    setting: Setting, name: str, make_model: Callable[[], nn.Module], **changes: Any
) -> State:
    """The state at the end of a run in this process."""
    return _trainer_at_end(setting, name, make_model, **changes).module.state_dict()


def _trainer_at_end(
    setting: Setting, name: str, make_model: Callable[[], nn.Module], **changes: Any
) -> Trainer:
    """The trainer of a finished run of 20 steps in this process."""
    config = settings(setting.directory / name, **changes)
    return fitted(config, make_model, patterns(64 * 20))


def _compare(state: State, reference: State) -> Answer:
    """Whether all tensors are equal but for rounding: the largest difference, relative to each tensor's largest."""
    differences = {}
    for name, tensor in reference.items():
        scale = tensor.cpu().abs().max().clamp(min=1e-300)
        difference = (state[name].cpu() - tensor.cpu()).abs().max()
        differences[name] = float(difference / scale)
    worst = max(differences, key=lambda name: differences[name])
    return Answer(
        f"largest relative difference {differences[worst]:.1e}, in {worst}",
        {"largest_relative_difference": differences[worst]},
        passed=differences[worst] <= EQUAL,
    )


# ---------------------------------------------------------------- the same bits, run after run


def same_hashes(
    setting: Setting,
    make_model: Callable[..., nn.Module],
    processes: tuple[int, ...],
    **changes: Any,
) -> Answer:
    """Bitwise runs of a ResNet, each in processes of its own: one hash of weights, buffers and optimizer state."""
    hashes = []
    for index, count in enumerate(processes):
        run = partial(_hashes_of_a_run, setting, make_model, index, changes)
        hashes.append(on_processes(count, run, device=setting.device_type)[0])
    different = [name for name in HASHES if len({each[name] for each in hashes}) > 1]
    on = ", ".join(map(str, processes))
    result = f"DIFFERENT {' and '.join(different)}" if different else "equal"
    return Answer(
        f"runs on {on} processes: {result}, weights {hashes[0]['weights_sha256'][:16]}",
        {"processes": list(processes), "hashes": hashes},
        passed=not different,
    )


def _hashes_of_a_run(
    setting: Setting,
    make_model: Callable[..., nn.Module],
    index: int,
    changes: dict[str, Any],
) -> dict[str, str]:
    batch, steps = setting.pick(64, 64, 4), setting.pick(6, 3, 2)
    config = settings(
        setting.directory / str(index),
        batch__size=batch,
        batch__micro_size=batch // 2,
        run__reproducibility="bitwise",
        **changes,
    )
    torch.manual_seed(0)
    data = noise(steps * batch, setting.pick(224, 128, 32), CLASSES)
    model = make_model(CLASSES, width(setting))
    summary = Trainer(config, model=model, train_data=data).fit()
    return {name: summary[name] for name in HASHES}


def max_pool_backward(setting: Setting) -> Answer:
    """The backward of ResNet's overlapping max pooling, 20 times in bitwise mode: always the same bits."""
    different = []
    cases = [
        (dtype, layout)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    with run_settings(bitwise=True, compiled=False):
        for dtype, layout in cases:
            if not _has_stable_backward(setting, dtype, layout):
                different.append(f"{dtype}, {layout}".replace("torch.", ""))
    if not setting.on_gpu:
        raise Unanswered(ON_GPU_ONLY)
    return Answer(
        f"NOT the same in {'; '.join(different)}"
        if different
        else f"the same in {len(cases)} of {len(cases)}: fp32 and bf16, NCHW and channels_last",
        {"different": different},
        passed=not different,
    )


def _has_stable_backward(
    setting: Setting, dtype: torch.dtype, layout: torch.memory_format
) -> bool:
    images = setting.pick(64, 64, 2)
    # Few distinct values, so that windows share their maxima.
    x = torch.randint(8, (images, 64, 56, 56), device=setting.device).to(dtype)
    x = x.to(memory_format=layout).requires_grad_()
    gradients = []
    for _ in range(setting.pick(20, 20, 2)):
        y = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
        generator = torch.Generator(setting.device).manual_seed(0)
        weight = torch.randn(y.shape, generator=generator, device=setting.device)
        gradients.append(torch.autograd.grad((y * weight).sum(), x)[0])
    return all(torch.equal(each, gradients[0]) for each in gradients)
