"""The list of checks, in the order in which they run: what is most worth knowing first, what takes longest last."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu import (
    augmentation,
    device_decoding,
    equality,
    gradients,
    images,
    memory,
    profiling,
    recipe,
    speed,
    waiting,
)
from benchmarks.gpu.check import Check
from benchmarks.resnet import resnet18, resnet50

# Seconds after which a check is given up.
SHORT, LONG, COMPILED = 60.0, 90.0, 200.0


def _correctness(name: str, question: str, answer: object, limit: float) -> Check:
    return Check(name, question, answer, True, limit)  # type: ignore[arg-type]


def _figure(name: str, question: str, answer: object, limit: float) -> Check:
    return Check(name, question, answer, False, limit)  # type: ignore[arg-type]


CHECKS: list[Check] = [
    _correctness(
        "pixels",
        "Do copies on the side stream give the CPU's pixels?",
        waiting.pixels,
        SHORT,
    ),
    _correctness(
        "batch-transforms",
        "Do batch transforms give the CPU's pixels?",
        augmentation.same_pixels,
        SHORT,
    ),
    _correctness(
        "device-decoding",
        "Does nvJPEG decode near to libjpeg, and a file alone as among others?",
        device_decoding.pixels,
        SHORT,
    ),
    _correctness(
        "on-device",
        "Is a run with data.on_device the run without, in fp64?",
        equality.on_device,
        SHORT,
    ),
    _correctness(
        "host-waits",
        "Does any step make the host wait for the device?",
        waiting.host_waits,
        LONG,
    ),
    _correctness(
        "fp16",
        "Does fp16 learn?",
        partial(equality.learns, train__precision="fp16"),
        SHORT,
    ),
    _correctness(
        "bf16",
        "Does bf16 learn?",
        partial(equality.learns, train__precision="bf16"),
        SHORT,
    ),
    _correctness(
        "two-processes",
        "Do two processes on this device end as one does, in fp64?",
        equality.two_processes,
        SHORT,
    ),
    _correctness(
        "bitwise-two-processes",
        "In bitwise mode, to the last bit?",
        equality.bitwise_on_two,
        SHORT,
    ),
    _correctness(
        "fsdp-two-processes",
        "Do two processes with a half of the parameters each, in fp64?",
        equality.fsdp_on_two,
        SHORT,
    ),
    _correctness(
        "backward",
        "Are gradients by autograd's engine alone those of torch.autograd.backward?",
        gradients.by_the_engine,
        SHORT,
    ),
    _correctness("fused", "Is fuse=8 what fuse=1 is, in fp64?", equality.fused, SHORT),
    _correctness(
        "sync-batch-norm",
        "Is batch_norm.mode=sync on one process what micro is?",
        equality.sync_batch_norm,
        SHORT,
    ),
    _correctness(
        "sync-batch-norm-two-processes",
        "Is it, on two processes, a micro-batch of twice the size?",
        equality.sync_on_two,
        SHORT,
    ),
    _correctness(
        "resume",
        "Does a run that was stopped end as one that was not?",
        equality.resume,
        SHORT,
    ),
    _correctness(
        "passing-checkpoint",
        "Does a checkpoint hold its step, though training goes on while it is written?",
        equality.passing_checkpoint,
        SHORT,
    ),
    _correctness(
        "max-pool-backward",
        "Has the backward of overlapping max pooling the same bits each time?",
        equality.max_pool_backward,
        SHORT,
    ),
    _correctness(
        "hashes-resnet18",
        "Has a bitwise ResNet-18, fp32, one hash, run after run?",
        partial(equality.same_hashes, make_model=resnet18, processes=(1, 1, 2)),
        LONG,
    ),
    _correctness(
        "hashes-resnet50",
        "Has a bitwise ResNet-50, bf16, channels_last?",
        partial(
            equality.same_hashes,
            make_model=resnet50,
            processes=(1, 1),
            train__precision="bf16",
            train__channels_last=True,
        ),
        LONG,
    ),
    _correctness(
        "hashes-tf32",
        "Has a bitwise ResNet-18 with train.tf32=true?",
        partial(
            equality.same_hashes,
            make_model=resnet18,
            processes=(1, 2),
            train__tf32=True,
        ),
        LONG,
    ),
    _correctness(
        "graphs-bitwise",
        "Have replayed micro-batches (train.cuda_graphs) the bits of eager, in bitwise mode?",
        partial(equality.replayed, mode="bitwise"),
        SHORT,
    ),
    _correctness(
        "graphs",
        "In standard mode, are they eager's in fp64?",
        partial(equality.replayed, mode="standard"),
        SHORT,
    ),
    _correctness(
        "graphs-two-processes",
        "Do two processes on this device that replay end as one eager one does, in fp64?",
        equality.replayed_on_two,
        SHORT,
    ),
    _correctness(
        "cudnn-benchmark",
        "Does a run with train.cudnn_benchmark=true learn?",
        partial(equality.learns, train__cudnn_benchmark=True),
        SHORT,
    ),
    _correctness(
        "profile",
        "Do the parts of a profile add up to a step, with kernels in them?",
        profiling.profile_of_a_run,
        SHORT,
    ),
    _figure(
        "resnet50",
        "ResNet-50, bf16, channels_last: what share of the raw loop's images/s?",
        partial(speed.resnet50_against_raw, compiled=False),
        LONG,
    ),
    _figure(
        "resnet18",
        "ResNet-18, bf16: what share of the raw loop's images/s?",
        speed.resnet18_step,
        SHORT,
    ),
    _figure(
        "tiny-net",
        "A net of two layers: what share of the raw loop's images/s?",
        speed.tiny_step,
        SHORT,
    ),
    _figure(
        "memory-resnet50",
        "ResNet-50, bf16, channels_last: peak memory over the raw loop's?",
        partial(memory.peak_memory, make_model=resnet50, side=224),
        SHORT,
    ),
    _figure(
        "memory-resnet18",
        "ResNet-18, bf16, channels_last: peak memory over the raw loop's?",
        partial(memory.peak_memory, make_model=resnet18, side=128),
        SHORT,
    ),
    _figure(
        "copy-overlap",
        "How much of the copies runs beside the computation?",
        waiting.copy_overlap,
        SHORT,
    ),
    _figure(
        "graphs-pace",
        "A launch-bound ResNet-18: how long is a step replayed, and eager?",
        speed.graphs_pace,
        SHORT,
    ),
    _figure("fuse", "How much faster is fuse=8 than fuse=1?", speed.fuse_pace, SHORT),
    *(
        _figure(
            f"bitwise-cost-{precision}-{count}",
            f"ResNet-50, {precision}, M = {count}: bitwise over standard?",
            partial(speed.bitwise_cost, precision=precision, micro_batches=count),
            LONG,
        )
        for precision in ("bf16", "fp32")
        for count in (1, 8)
    ),
    _figure(
        "batch-transforms-pace",
        "How many images a second do batch transforms change?",
        augmentation.pace,
        SHORT,
    ),
    _figure(
        "jpeg",
        "How many JPEGs a second does the CPU decode, and the GPU?",
        images.jpeg_decoding,
        SHORT,
    ),
    _figure(
        "device-decoding-pace",
        "How many images a second does a folder give, decoded on the CPU and on the GPU?",
        device_decoding.pace,
        LONG,
    ),
    _correctness(
        "compiled",
        "Does a compiled model learn?",
        partial(equality.learns, train__compile=True),
        LONG,
    ),
    _figure(
        "cifar10-fast",
        "How long does configs/cifar10_fast.yaml take, and what does it learn?",
        recipe.cifar10_fast,
        COMPILED,
    ),
    *(
        _correctness(
            f"compiled-{mode}",
            f"Is a run with train.compile={mode} the run that nothing compiles, in fp64?",
            partial(equality.compiled_in, mode=mode),
            COMPILED,
        )
        for mode in ("reduce-overhead", "max-autotune")
    ),
    _figure(
        "resnet50-compiled",
        "ResNet-50, bf16, channels_last, compiled: what share of the raw loop's images/s?",
        partial(speed.resnet50_against_raw, compiled=True),
        COMPILED,
    ),
]


def check_named(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)
