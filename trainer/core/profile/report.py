"""What a profile says in words: where a step's time goes, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.schema import Config
from trainer.core.profile.trace import StepTimes, TracedStep

# Shares of a step from which on there is something to say; docs/profile.md lists them.
NOTABLE = 0.1
MOSTLY_IDLE = 0.3
MOSTLY_MEMORY = 0.6
UNEVEN = 0.1  # between ranks


@dataclass(frozen=True, kw_only=True)
class StepProfile(StepTimes):
    """A step that nothing slows down: `seconds` was measured without the profiler.

    In `held_up` of these seconds, spread over the parts, the process had something to compute and no core to do it on;
    known without a GPU only.
    """

    held_up: float
    traced: TracedStep

    def share(self, part: str) -> float:
        value: float = getattr(self, part)
        return value / self.seconds if self.seconds else 0.0


def combine(
    seconds: float, loading: float, on_core: float, traced: TracedStep
) -> StepProfile:
    """The profile of a step that takes `seconds`, of which it waits `loading` for samples, without the profiler.

    `on_core` are the seconds of a step in which the training thread ran. The profiler lengthens what the host does,
    hardly what a GPU does. So a GPU's parts are taken as they were traced, and the host has what is left; without a
    GPU, all parts but the loader's shrink alike.
    """
    if traced.has_device:
        loading = traced.loading
        on_device = traced.products + traced.others + traced.communication
        host = max(seconds - loading - on_device, 0.0)
        scale = 1.0
    else:
        scale = _ratio(seconds - loading, traced.seconds - traced.loading)
        host = traced.host * scale
    parts = {
        "products": traced.products * scale,
        "others": traced.others * scale,
        "communication": traced.communication * scale,
    }
    total = loading + host + sum(parts.values())
    # Where it waits for samples or other processes, a thread needs no core.
    busy = total - loading - parts["communication"]
    held_up = 0.0 if traced.has_device else max(busy - on_core, 0.0)
    return StepProfile(
        seconds=total,
        loading=loading,
        host=host,
        held_up=held_up,
        traced=traced,
        **parts,
    )


def _ratio(value: float, whole: float) -> float:
    return max(value, 0.0) / whole if whole > 0 else 0.0


def table(profiles: Sequence[StepProfile], samples: float) -> list[str]:
    """Where a step's time goes: on rank 0, in lines. `samples` are those of a step, over all ranks."""
    profile = profiles[0]
    traced = profile.traced
    of_operators = "on the device" if traced.has_device else "on the CPU"
    host = "the device waits for the host" if traced.has_device else "between operators"
    names = {
        "loading": "waiting for data",
        "products": f"convolutions and matrix products, {of_operators}",
        "others": f"other operators, {of_operators}",
        "communication": "exchange between processes, beside nothing else",
        "host": host,
    }
    pace = samples / profile.seconds if profile.seconds else 0.0
    lines = [f"a step takes {_milliseconds(profile.seconds)}: {pace:,.0f} samples/s"]
    for part, name in names.items():
        if part == "communication" and len(profiles) == 1:
            continue
        seconds = _milliseconds(getattr(profile, part))
        lines.append(f"  {profile.share(part):4.0%}  {seconds:>9}  {name}")
    if traced.largest:
        largest = [f"{name} {share:.0%}" for name, share in traced.largest]
        lines.append(f"of the operators' time: {', '.join(largest)}")
    if traced.has_device:
        lines.append(
            f"{traced.launches:,.0f} kernels a step; the host waits for the device {traced.host_waits:.1f} times"
        )
    slower = _ratio(traced.seconds, profile.seconds)
    lines.append(f"under the profiler a step took {slower:.1f} × as long")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"


def advice(profiles: Sequence[StepProfile], config: Config, device: str) -> list[str]:
    """What to change, the largest share of a step first; one line each. Never empty."""
    found: list[tuple[float, str]] = []
    for share, text in (
        _of_loading(profiles, config),
        _of_communication(profiles),
        _of_cores(profiles),
        _of_host(profiles[0], config, device),
        _of_memory(profiles[0], config, device),
    ):
        if text:
            found.append((share, text))
    lines = [text for _, text in sorted(found, key=lambda item: -item[0])]
    return lines or [_of_arithmetic(profiles[0], config, device)]


def _of_loading(profiles: Sequence[StepProfile], config: Config) -> tuple[float, str]:
    shares = [profile.share("loading") for profile in profiles]
    share = max(shares)
    if share < NOTABLE:
        return share, ""
    rank = shares.index(share)
    where = f" on rank {rank}" if share - min(shares) > UNEVEN else ""
    workers = config.data.workers
    if not workers:
        remedy = (
            "samples are loaded between the steps: set data.workers to a few processes"
        )
    else:
        remedy = f"raise data.workers ({workers}) if cores are left, or load less: smaller files, fewer transforms"
    cache = ""
    if config.data.name == "folder" and config.data.cache != "decoded":
        cache = "; data.cache=decoded keeps its images decoded"
    return share, (
        f"waiting for data takes {share:.0%} of a step{where}: {remedy}{cache}"
    )


def _of_communication(profiles: Sequence[StepProfile]) -> tuple[float, str]:
    shares = [profile.share("communication") for profile in profiles]
    share = shares[0]
    if len(profiles) == 1 or max(shares) < NOTABLE:
        return share, ""
    low, high = min(shares), max(shares)
    if high - low > UNEVEN:
        slow = shares.index(low)
        return high, (
            f"the exchange takes {low:.0%} to {high:.0%} of a step: the others wait for rank {slow}, which computes or "
            f"loads for longer; see whether it has the same device, cores and disk to itself"
        )
    return share, (
        f"the exchange between processes takes {share:.0%} of a step: more samples a process (batch.size), or fewer "
        f"processes, would hide it; between machines, see that NCCL or gloo uses the fast network (docs/multi-gpu.md)"
    )


def _of_cores(profiles: Sequence[StepProfile]) -> tuple[float, str]:
    shares = [profile.share("held_up") for profile in profiles]
    share = max(shares)
    if share < NOTABLE:
        return share, ""
    where = f" on rank {shares.index(share)}" if len(profiles) > 1 else ""
    return share, (
        f"for {share:.0%} of a step{where} there was no core to compute on: other programs, or more processes, loader "
        f"processes and threads (OMP_NUM_THREADS) than cores; all other shares are blurred by it"
    )


def _of_host(profile: StepProfile, config: Config, device: str) -> tuple[float, str]:
    # A thread that is kept from its core is between operators, too, and nothing here helps it.
    share = profile.share("host") - profile.share("held_up")
    if share < MOSTLY_IDLE:
        return share, ""
    remedies = []
    if config.batch.fuse == 1 and _accumulates(config):
        remedies.append("batch.fuse=auto runs several micro-batches at once")
    remedies.append("a larger batch.micro_size gives each operator more to do")
    if not config.train.compile:
        remedies.append("train.compile=true makes fewer, larger kernels")
        if device == "cuda" and not config.train.cuda_graphs:
            remedies.append("train.cuda_graphs=true launches a micro-batch at once")
    elif device == "cuda" and config.train.compile is True and not _is_bitwise(config):
        remedies.append("train.compile=reduce-overhead records CUDA graphs")
    text = ", ".join(remedies)
    if not profile.traced.has_device:
        return share, f"Python between operators takes {share:.0%} of a step: {text}"
    waits = ""
    if profile.traced.host_waits >= 1:
        waits = (
            f"; it also waits for the device {profile.traced.host_waits:.0f} times a step: look in the model and the "
            f"loss for .item(), .tolist(), boolean masks and copies to the CPU"
        )
    return share, (
        f"the {device} waits {share:.0%} of a step for the host to launch work: {text}{waits}"
    )


def _accumulates(config: Config) -> bool:
    return (config.batch.micro_size or config.batch.size) < config.batch.size


def _of_memory(profile: StepProfile, config: Config, device: str) -> tuple[float, str]:
    computing = profile.products + profile.others
    share = profile.share("others")
    if not profile.traced.has_device or share < NOTABLE:
        return share, ""
    if profile.others < MOSTLY_MEMORY * computing:
        return share, ""
    remedies = []
    if not config.train.compile:
        remedies.append("train.compile=true joins such operators")
    if config.train.precision in ("fp32", "fp64"):
        remedies.append("train.precision=bf16 halves what is moved")
    if not config.train.channels_last:
        remedies.append("train.channels_last=true suits convolutions of images")
    text = ", ".join(remedies) or "fewer or smaller activations"
    return share, (
        f"operators bound by memory (norms, activations, pooling, copies, the update) take {share:.0%} of a step: "
        f"{text}"
    )


def _of_arithmetic(profile: StepProfile, config: Config, device: str) -> str:
    share = profile.share("products") + profile.share("others")
    text = f"computing takes {share:.0%} of a step: nothing else holds it up"
    faster = []
    if device == "cuda" and config.train.precision == "fp32":
        faster.append("train.precision=bf16")
        if not config.train.tf32:
            faster.append("train.tf32=true")
    if (
        device == "cuda"
        and not config.train.cudnn_benchmark
        and not _is_bitwise(config)
    ):
        faster.append("train.cudnn_benchmark=true for convolutions")
    return f"{text}; faster kernels: {', '.join(faster)}" if faster else text


def _is_bitwise(config: Config) -> bool:
    return config.run.reproducibility == "bitwise"
