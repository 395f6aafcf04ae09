"""Where the time of traced steps went, from the events of torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from trainer.core.profile.intervals import (
    Intervals,
    contains,
    intersect,
    length,
    subtract,
    union,
)
from trainer.core.profile.phases import RANGE, WAITING

# Convolutions and matrix products: all else that a step computes is bound by memory, not by arithmetic.
PRODUCT = re.compile(
    r"convolution|conv\d|gemm|attention|matmul|lstm|gru|rnn"
    r"|(?<![a-z])(?:add|b|badd)?mm(?![a-z])|(?<![a-z])linear(?![a-z0-9])|triton_tem"
)
# Operators of torch or of a package, and code made by torch.compile; not the spans around them.
OPERATOR = re.compile(
    r"(?!autograd::|torch::autograd|c10d::|FSDP::)\w+::|## Call CompiledFx"
)
COLLECTIVE = re.compile(r"nccl|gloo:|rccl|xccl", re.IGNORECASE)
COPY = ("Memcpy", "Memset")
WAITS_FOR_DEVICE = re.compile(r"(?:cuda|hip|xpu)\w*Synchronize$")
MICROSECONDS = 1e-6
LARGEST = 5  # operators that are named

Kind = Literal["phase", "operator", "collective", "exchange", "kernel", "copy", "wait"]


class Span(NamedTuple):
    """An event of a trace: a `collective` runs on the device, an `exchange` on the host.

    Seconds; `own` without the operators within, `on_device` of the kernels that it launched."""

    kind: Kind
    name: str
    start: float
    end: float
    own: float = 0.0
    on_device: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where the time of one step goes, on one rank: seconds of five parts, which add up to `seconds`.

    With a GPU, `products`, `others` and `communication` are the device's, and `host` is the time in which it waited for
    the host to launch something. Without, `host` is the time that no operator took: Python, mostly. Communication
    counts where nothing was computed meanwhile.
    """

    seconds: float
    loading: float
    products: float
    others: float
    communication: float
    host: float


@dataclass(frozen=True, kw_only=True)
class TracedStep(StepTimes):
    """A step under the profiler.

    `launches` are the kernels of a step, `host_waits` how often the host waited for the device. `largest` has the
    operators that took most, with their shares of the operators' time.
    """

    has_device: bool
    launches: float
    host_waits: float
    largest: list[tuple[str, float]]


def spans_of(events: Iterable[Any]) -> list[Span]:
    """The events of a `torch.profiler.profile` that matter here."""
    spans = []
    for event in events:
        kind = _kind(event)
        if kind is None:
            continue
        on_device = sum(kernel.duration for kernel in event.kernels)
        spans.append(
            Span(
                kind,
                event.name,
                event.time_range.start * MICROSECONDS,
                event.time_range.end * MICROSECONDS,
                event.self_cpu_time_total * MICROSECONDS,
                on_device * MICROSECONDS,
            )
        )
    return spans


def _kind(event: Any) -> Kind | None:
    name = event.name
    if event.device_type.name != "CPU":
        if event.is_user_annotation or name.startswith(RANGE):
            return None  # the device's copy of a range
        if COLLECTIVE.search(name):
            return "collective"
        return "copy" if name.startswith(COPY) else "kernel"
    if name.startswith(RANGE):
        return "phase"
    if COLLECTIVE.match(name):
        # Those that are not are the launch of one.
        return "exchange" if event.is_async else None
    if WAITS_FOR_DEVICE.match(name):
        return "wait"
    return "operator" if OPERATOR.match(name) else None


def measure(spans: Sequence[Span], steps: int) -> TracedStep:
    """One step of the `steps` that were traced, on average: what lies within the ranges of their phases."""
    phases = _of_kinds(spans, "phase")
    start = min(span.start for span in phases)
    end = max(span.end for span in phases)
    spans = [span for span in spans if span.end > start and span.start < end]
    waiting = {RANGE + phase.name for phase in WAITING}
    loading = _union(span for span in phases if span.name in waiting)
    window = [(start, end)]
    kernels = _of_kinds(spans, "kernel")
    has_device = bool(kernels)
    if has_device:
        computing = _union(_of_kinds(spans, "kernel", "copy"))
        computing = intersect(computing, window)
    else:
        operators = _union(_of_kinds(spans, "operator"))
        computing = intersect(operators, window)
        # What loads samples in this process is no part of the model.
        computing = subtract(computing, loading)
    # Each moment counts once: a collective counts where nothing computes, and what is left is idle.
    collectives = _union(_of_kinds(spans, "collective" if has_device else "exchange"))
    communicating = subtract(intersect(collectives, window), computing)
    idle = subtract(subtract(window, computing), communicating)
    if has_device:
        waiting_for_data = intersect(idle, loading)
    else:
        communicating = subtract(communicating, loading)
        waiting_for_data = loading
    host = subtract(idle, waiting_for_data)
    largest, product_share = _operators(spans, loading, has_device=has_device)
    computed = length(computing) / steps
    return TracedStep(
        seconds=(end - start) / steps,
        loading=length(waiting_for_data) / steps,
        products=computed * product_share,
        others=computed * (1 - product_share),
        communication=length(communicating) / steps,
        host=length(host) / steps,
        has_device=has_device,
        launches=len(kernels) / steps,
        host_waits=len(_of_kinds(spans, "wait")) / steps,
        largest=largest,
    )


def _of_kinds(spans: Sequence[Span], *kinds: str) -> list[Span]:
    return [span for span in spans if span.kind in kinds]


def _union(spans: Iterable[Span]) -> Intervals:
    return union((span.start, span.end) for span in spans)


def _operators(
    spans: Sequence[Span], loading: Intervals, *, has_device: bool
) -> tuple[list[tuple[str, float]], float]:
    """The operators that took most time, with their shares of all operators'; and the share of products."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        if span.kind != "operator":
            continue
        if has_device:
            seconds[span.name] += span.on_device
        elif not contains(loading, span.start):
            seconds[span.name] += span.own
    total = sum(seconds.values())
    if not total:
        return [], 0.0
    products = 0.0
    shares = []
    for name, value in seconds.items():
        shares.append((name, value / total))
        if PRODUCT.search(name):
            products += value
    shares.sort(key=lambda item: -item[1])
    return shares[:LARGEST], products / total
