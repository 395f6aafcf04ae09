"""`train.profile` on a GPU: what the trace says must fit the step's time."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.check import Answer, Setting
from benchmarks.subjects import fitted, patterns, settings
from trainer.components.models import small_cnn
from trainer.core.profile.observer import ProfileObserver

STEPS = 5
# A step measured without the profiler, and the device's time in it measured with it, differ by as much.
TOLERANCE = 0.3


def profile_of_a_run(setting: Setting) -> Answer:
    """The parts of a step add up to it, and a GPU's are its kernels'."""
    config = settings(
        setting.directory, batch__size=64, train__epochs=1, train__profile=STEPS
    )
    trainer = fitted(config, partial(small_cnn, 10), patterns(64 * 30))
    observers = [o for o in trainer.observers if isinstance(o, ProfileObserver)]
    (profile,) = observers[0].profiles
    traced = profile.traced
    parts = {
        name: getattr(profile, name)
        for name in ("loading", "products", "others", "communication", "host")
    }
    shares = ", ".join(f"{name} {profile.share(name):.0%}" for name in parts)
    measured = observers[0].seconds
    adds_up = abs(sum(parts.values()) - measured) <= TOLERANCE * measured
    sees_kernels = traced.has_device == setting.on_gpu
    if setting.on_gpu:
        sees_kernels = sees_kernels and traced.launches > 10 and traced.products > 0
    return Answer(
        f"a step of {1000 * measured:.2f} ms: {shares}; {traced.launches:.0f} kernels",
        {"seconds": measured, **parts, "launches": traced.launches},
        passed=adds_up and sees_kernels,
    )
