"""Every schedule against the torch scheduler of its name over whole runs; warmup by hand; errors by key."""

import math
import random
import timeit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from trainer.components.schedule import Schedule, build_schedule
from trainer.config.model_sections import ScheduleConfig
from trainer.errors import ConfigError

STEPS_PER_EPOCH = 5
TOTAL = 12 * STEPS_PER_EPOCH
BASE = 0.4


def schedule(
    name="constant", *, total_steps=TOTAL, history=None, mode="min", **section
) -> Schedule:
    keys = {
        key: section.pop(key)
        for key in ("per", "warmup", "warmup_start")
        if key in section
    }
    return build_schedule(
        ScheduleConfig(name=name, args=section, **keys),
        total_steps=total_steps,
        steps_per_epoch=STEPS_PER_EPOCH,
        history=[] if history is None else history,
        mode=mode,
    )


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)


def torch_factors(make_scheduler, *, per: str, total_steps: int) -> list[float]:
    """The factor of every step of a run whose scheduler is stepped after each epoch, or after each step."""
    inner = optimizer()
    scheduler = make_scheduler(inner)
    factors = []
    for index in range(total_steps):
        factors.append(inner.param_groups[0]["lr"] / BASE)
        inner.step()
        last = index + 1 == total_steps
        if not last and (per == "step" or (index + 1) % STEPS_PER_EPOCH == 0):
            scheduler.step()
    return factors


REFERENCES = {
    "step": (
        {"step_size": 7},
        lambda o, total: lr_scheduler.StepLR(o, step_size=7, gamma=0.1),
    ),
    "step, other arguments": (
        {"step_size": 3, "gamma": 0.7},
        lambda o, total: lr_scheduler.StepLR(o, step_size=3, gamma=0.7),
    ),
    "multi_step": (
        {"milestones": [9, 2, 4, 4], "gamma": 0.3},
        lambda o, total: lr_scheduler.MultiStepLR(
            o, milestones=[2, 4, 4, 9], gamma=0.3
        ),
    ),
    "cosine": ({}, lambda o, total: lr_scheduler.CosineAnnealingLR(o, T_max=total)),
    "cosine, not to zero": (
        {"min_factor": 0.05},
        lambda o, total: lr_scheduler.CosineAnnealingLR(
            o, T_max=total, eta_min=0.05 * BASE
        ),
    ),
    "polynomial": (
        {"power": 2.5},
        lambda o, total: lr_scheduler.PolynomialLR(o, total_iters=total, power=2.5),
    ),
    "one_cycle": (
        {},
        lambda o, total: lr_scheduler.OneCycleLR(
            o, max_lr=BASE, total_steps=total, cycle_momentum=False
        ),
    ),
    "one_cycle, linear": (
        {
            "pct_start": 0.45,
            "div_factor": 10,
            "final_div_factor": 50.0,
            "anneal": "linear",
        },
        lambda o, total: lr_scheduler.OneCycleLR(
            o,
            max_lr=BASE,
            total_steps=total,
            pct_start=0.45,
            div_factor=10,
            final_div_factor=50.0,
            anneal_strategy="linear",
            cycle_momentum=False,
        ),
    ),
    "constant": ({}, lambda o, total: lr_scheduler.LambdaLR(o, lambda position: 1.0)),
}


@pytest.mark.parametrize("per", ["epoch", "step"])
@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("total_steps", [TOTAL, 2 * STEPS_PER_EPOCH + 1])
def test_equals_torch_over_a_whole_run(case, per, total_steps):
    arguments, make = REFERENCES[case]
    total = total_steps if per == "step" else math.ceil(total_steps / STEPS_PER_EPOCH)
    expected = torch_factors(lambda o: make(o, total), per=per, total_steps=total_steps)
    ours = schedule(
        case.partition(",")[0], per=per, total_steps=total_steps, **arguments
    )
    assert [ours.factor(k) for k in range(total_steps)] == pytest.approx(
        expected, rel=1e-12, abs=1e-12
    )


def test_polynomial_with_a_floor_by_hand():
    ours = schedule("polynomial", per="step", power=2.0, min_factor=0.1, total_steps=10)
    assert ours.factor(5) == pytest.approx(0.1 + 0.9 * 0.25, abs=1e-15)
    # It stays there past the end.
    assert [ours.factor(10), ours.factor(11)] == [0.1, 0.1]


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("pct_start", [0.0, 0.25, 0.5, 1.0])
def test_one_cycle_of_a_very_short_run_is_defined(total_steps, pct_start):
    ours = schedule(
        "one_cycle", per="step", total_steps=total_steps, pct_start=pct_start
    )
    factors = [ours.factor(k) for k in range(total_steps)]
    assert all(0 < factor <= 1 for factor in factors)


PLATEAU_ARGUMENTS = [
    {},
    {"patience": 0, "factor": 0.5},
    {"patience": 1, "cooldown": 2, "factor": 0.3, "threshold": 0.05},
    {"patience": 2, "cooldown": 1, "factor": 0.5, "min_factor": 0.1},
]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("arguments", PLATEAU_ARGUMENTS)
def test_plateau_equals_torch(arguments, mode):
    inner = optimizer()
    kwargs = {**arguments, "min_lr": arguments.get("min_factor", 0.0) * BASE}
    kwargs.pop("min_factor", None)
    reference = lr_scheduler.ReduceLROnPlateau(inner, mode=mode, eps=0.0, **kwargs)
    history: list[float] = []
    ours = schedule("plateau", history=history, mode=mode, **arguments)
    draw = random.Random(3)
    for evaluation in range(80):
        value = (
            math.nan
            if evaluation == 17
            else draw.choice([1.0, 2.0, 2.1]) + draw.random() * 0.05
        )
        assert ours.factor(evaluation) == pytest.approx(
            inner.param_groups[0]["lr"] / BASE, rel=1e-12
        )
        inner.step()
        reference.step(value)
        history.append(value)
    assert ours.factor(0) < 1  # the learning rate did fall


def test_plateau_follows_a_history_that_a_resume_replaces_or_shortens():
    history = [1.0] * 6
    ours = schedule("plateau", history=history, patience=1, factor=0.5)
    lower = ours.factor(30)
    assert lower == 0.5**2
    history[:] = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # as long as before
    assert ours.factor(30) == 1.0
    history[:] = [1.0] * 6
    assert ours.factor(30) == lower
    del history[2:]
    assert ours.factor(30) == 1.0


def test_warmup_is_linear_in_steps_and_leaves_the_clock_alone():
    ours = schedule("step", step_size=1, gamma=0.5, warmup=2.0, warmup_start=0.2)
    for k in range(10):
        assert ours.factor(k) == pytest.approx(
            (0.2 + 0.8 * (k + 1) / 10) * 0.5 ** (k // 5), rel=1e-15
        )
    assert ours.factor(10) == 0.5**2
    in_steps = schedule(per="step", warmup=3)
    assert [in_steps.factor(k) for k in range(4)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1], rel=1e-15
    )
    half_an_epoch = schedule(warmup=0.5)  # 2.5 steps, rounded to 2
    assert [half_an_epoch.factor(k) for k in range(3)] == [0.5, 1, 1]


cases = [
    (name.partition(",")[0], arguments) for name, (arguments, _) in REFERENCES.items()
]


@given(
    st.sampled_from([*cases, ("plateau", {"patience": 1})]),
    st.sampled_from(["epoch", "step"]),
    st.data(),
)
def test_a_factor_does_not_depend_on_earlier_calls(case, per, data):
    name, arguments = case
    section = {
        "per": "epoch" if name == "plateau" else per,
        "warmup": 1.5,
        "history": [1.0] * 9,
        **arguments,
    }
    order = data.draw(st.lists(st.integers(0, TOTAL - 1), max_size=30))
    ours = schedule(name, **section)
    assert [ours.factor(k) for k in order] == [
        schedule(name, **section).factor(k) for k in order
    ]


def halved_after(position: float, total: float, share: float = 0.5) -> float:
    return 1.0 if position < share * total else 0.5


def test_a_function_named_by_its_import_path():
    name = f"{__name__}.halved_after"
    by_epoch, by_step = (
        schedule(name, share=0.25),
        schedule(name, per="step", share=0.25, total_steps=16),
    )
    assert [by_epoch.factor(k) for k in (0, 14, 15)] == [1.0, 1.0, 0.5]
    assert [by_step.factor(k) for k in (0, 3, 4)] == [1.0, 1.0, 0.5]
    with pytest.raises(ConfigError) as error:
        schedule(name, shares=0.25)
    assert error.value.key == "schedule.shares"
    assert 'did you mean "share"' in error.value.message


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("step", {"step_size": 0}, "schedule.step_size"),
        ("step", {"step_size": 2.5}, "schedule.step_size"),
        ("step", {"step_size": "seven"}, "schedule.step_size"),
        ("step", {"gamma": -0.1}, "schedule.gamma"),
        ("step", {"gamma": math.nan}, "schedule.gamma"),
        ("step", {"stepsize": 3}, "schedule.stepsize"),
        ("step", {"clock": 3}, "schedule.clock"),
        ("multi_step", {}, "schedule.milestones"),
        ("multi_step", {"milestones": 30}, "schedule.milestones"),
        ("multi_step", {"milestones": []}, "schedule.milestones"),
        ("multi_step", {"milestones": [30, -1]}, "schedule.milestones"),
        ("cosine", {"min_factor": -0.1}, "schedule.min_factor"),
        ("cosine", {"min_factor": True}, "schedule.min_factor"),
        ("polynomial", {"power": 0}, "schedule.power"),
        ("one_cycle", {"pct_start": 1.5}, "schedule.pct_start"),
        ("one_cycle", {"div_factor": 0}, "schedule.div_factor"),
        ("one_cycle", {"final_div_factor": -1}, "schedule.final_div_factor"),
        ("one_cycle", {"anneal": "sin"}, "schedule.anneal"),
        ("plateau", {"factor": 1.0}, "schedule.factor"),
        ("plateau", {"patience": -1}, "schedule.patience"),
        ("plateau", {"cooldown": 0.5}, "schedule.cooldown"),
        ("plateau", {"threshold": -1e-4}, "schedule.threshold"),
        ("plateau", {"per": "step"}, "schedule.per"),
        ("constant", {"gamma": 0.1}, "schedule.gamma"),
        ("cosinus", {}, "schedule.name"),
        ("builtins.print", {}, "schedule.name"),
        ("torch.optim.lr_scheduler.StepLR", {"step_size": 3}, "schedule.name"),
    ],
)
def test_a_wrong_argument_is_named_by_its_key(name, arguments, key):
    with pytest.raises(ConfigError) as error:
        schedule(name, **arguments)
    assert error.value.key == key


def test_what_the_header_shows():
    expected = "step: \N{MULTIPLICATION SIGN}0.1 every 7 epochs, warmup 1 epoch"
    assert schedule("step", warmup=1.0).describe() == expected
    assert (
        "warmup 3 steps from"
        in schedule(per="step", warmup=3.0, warmup_start=0.1).describe()
    )
    assert schedule().describe() == "constant"


@pytest.mark.parametrize(
    "name", ["step", "cosine", "one_cycle", "polynomial", "constant", "plateau"]
)
def test_a_factor_costs_next_to_nothing(name):
    ours = schedule(name, warmup=20.0)
    seconds = min(timeit.repeat(lambda: ours.factor(31), number=1000, repeat=5)) / 1000
    assert seconds < 5e-6  # about 0.4e-6; room for a busy machine


def test_a_warmup_that_the_run_does_not_complete_is_noted():
    ours = schedule("cosine", per="step", warmup=16, total_steps=8)
    assert ours.note(8).startswith("the warmup takes 16 steps and the run 8, so")
    assert max(map(ours.factor, range(8))) < 0.5
    complete = schedule(per="step", warmup=8, total_steps=8)
    assert complete.note(8) == ""
    assert complete.factor(7) == 1
