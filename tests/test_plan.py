"""The plan: no sample dropped or repeated, micro-batches even, ranks contiguous, nothing dependent on ranks."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.exact.plan import Plan, split_evenly


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    samples = draw(st.integers(1, 200))
    batch_size = draw(st.integers(1, 250))
    micro_size = draw(st.integers(1, batch_size))
    most = math.ceil(min(samples, batch_size) / micro_size)
    return Plan(
        samples=samples,
        batch_size=batch_size,
        micro_size=micro_size,
        ranks=draw(st.integers(1, min(most, 9))),
        epochs=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**40)),
    )


@given(plans())
def test_each_epoch_takes_every_sample_once(plan: Plan) -> None:
    ids_by_epoch: dict[int, list[int]] = {}
    for step in plan.steps():
        for rank in range(plan.ranks):
            for micro_batch in range(*step.ranks[rank]):
                ids_by_epoch.setdefault(step.epoch, []).extend(
                    plan.sample_ids(step, micro_batch).tolist()
                )
    assert sorted(ids_by_epoch) == list(range(plan.epochs))
    assert all(
        sorted(ids) == list(range(plan.samples)) for ids in ids_by_epoch.values()
    )


@given(plans())
def test_micro_batches_are_even_and_no_larger_than_asked(plan: Plan) -> None:
    for step in plan.steps():
        sizes = [stop - start for start, stop in step.micro_batches]
        assert len(sizes) == math.ceil(step.size / plan.micro_size)
        assert sum(sizes) == step.size
        assert max(sizes) <= plan.micro_size
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


@given(plans())
def test_only_an_epochs_last_step_is_short(plan: Plan) -> None:
    steps = list(plan.steps())
    assert (
        len(steps)
        == plan.total_steps
        == plan.epochs * math.ceil(plan.samples / plan.batch_size)
    )
    for step in steps:
        assert step.last_in_epoch == (step.start + step.size == plan.samples)
        assert step.last_in_epoch or step.size == plan.batch_size


@given(plans(), st.integers(1, 9))
def test_samples_and_micro_batches_do_not_depend_on_the_ranks(
    plan: Plan, ranks: int
) -> None:
    assume(ranks <= math.ceil(min(plan.samples, plan.batch_size) / plan.micro_size))
    other = Plan(
        plan.samples, plan.batch_size, plan.micro_size, ranks, plan.epochs, plan.seed
    )
    for one, two in zip(plan.steps(), other.steps(), strict=True):
        assert one.micro_batches == two.micro_batches
        assert (plan.permutation(one.epoch) == other.permutation(two.epoch)).all()
        assert [i for r in two.ranks for i in range(*r)] == list(
            range(len(two.micro_batches))
        )


@given(plans(), st.data())
def test_a_step_is_found_without_those_before_it(
    plan: Plan, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, plan.total_steps - 1))
    assert plan.step(index) == list(plan.steps())[index]
    assert list(plan.steps(index)) == list(plan.steps())[index:]


@given(st.integers(0, 1000), st.integers(1, 50))
def test_split_evenly(count: int, parts: int) -> None:
    ranges = split_evenly(count, parts)
    assert len(ranges) == parts
    assert [i for r in ranges for i in range(*r)] == list(range(count))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(plans())
def test_equal_ranks_all_run_as_many_micro_batches(plan: Plan) -> None:
    shortest = plan.samples - (plan.steps_per_epoch - 1) * plan.batch_size
    assume(plan.ranks <= shortest)
    equal = Plan(
        plan.samples,
        plan.batch_size,
        plan.micro_size,
        plan.ranks,
        plan.epochs,
        plan.seed,
        equal_ranks=True,
    )
    for step in equal.steps():
        assert len({stop - start for start, stop in step.ranks}) == 1
        assert not step.has_idle_rank
        assert all(stop > start for start, stop in step.micro_batches)


def test_the_order_is_new_in_each_epoch_and_for_each_seed() -> None:
    plan = Plan(samples=100, batch_size=10, micro_size=10, ranks=1, epochs=2, seed=1)
    other = Plan(samples=100, batch_size=10, micro_size=10, ranks=1, epochs=2, seed=2)
    assert (plan.permutation(0) != plan.permutation(1)).any()
    assert (plan.permutation(0) != other.permutation(0)).any()


def test_a_window_is_not_judged_by_its_shortened_length() -> None:
    """7 batches by 4 are 2 updates, the last one of 3: not 3 updates, as in some trainers."""
    plan = Plan(samples=7, batch_size=4, micro_size=1, ranks=1, epochs=1, seed=0)
    assert [len(step.micro_batches) for step in plan.steps()] == [4, 3]


def test_max_steps_ends_a_run_sooner_and_never_later() -> None:
    def total(max_steps: int | None) -> int:
        return Plan(10, 4, 4, 1, epochs=2, seed=0, max_steps=max_steps).total_steps

    assert (total(None), total(4), total(100)) == (6, 4, 6)


def test_more_ranks_than_micro_batches_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(
        ConfigError,
        match=r"batch\.micro_size: 4 processes share 2 micro-batches.*micro_size=16",
    ):
        Plan(samples=100, batch_size=64, micro_size=32, ranks=4, epochs=1, seed=0)
    with pytest.raises(
        ConfigError,
        match=r"batch_norm\.mode: sync needs a sample for each of the 4 processes",
    ):
        Plan(
            samples=66,
            batch_size=64,
            micro_size=16,
            ranks=4,
            epochs=1,
            seed=0,
            equal_ranks=True,
        )
