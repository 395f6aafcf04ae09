"""Does a model draw from `random` or NumPy's global generator? Only then are they seeded: it takes 15 µs a micro-batch.

Its code says so before it draws for the first time, so a layer drop that begins in the fifth epoch is keyed as well.
What the code does not say, the first forwards show.
"""

from __future__ import annotations

import dis
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import nn

from trainer.errors import ConfigError
from trainer.exact.fuse import REMEDY
from trainer.exact.seeding import seed_host_generators

# Few: watching costs 100 µs a forward, because reading NumPy's state copies it.
FORWARDS_TO_WATCH = 4
FUNCTIONS = 2_000  # read at most
# Their code draws from torch's generators alone.
READ_NO_FURTHER = ("torch", "torchvision", "trainer", "numpy", "random", "builtins")
GENERATOR_MODULES = ("random", "numpy.random")
# Called when a model is built, before any step.
AT_BUILDING = ("__init__", "reset_parameters", "init_weights", "_init_weights")


class HostDraws:
    """The draws of one model and its loss from the host's generators that are not torch's.

    `are_made` is true once a model is known to draw from them, or its code mentions them. Where it is false and there
    are no `forwards_to_watch`, `begin` and `end` need not be called.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.are_made = any(map(mentions_host_generators, modules))
        self.forwards_to_watch = 0 if self.are_made else FORWARDS_TO_WATCH

    def begin(self, value: int) -> Any:
        """Before the forward of a micro-batch: seed the generators by its key if it may draw from them.

        What this returns is for `end`.
        """
        if self.are_made:
            seed_host_generators(value)
            return None
        self.forwards_to_watch -= 1
        states_before = host_states()
        seed_host_generators(value)
        return states_before, host_states()

    def end(self, watched: Any) -> None:
        """After a forward: note whether it drew; where it did not, leave the generators as they were before."""
        if watched is None:
            return
        states_before, states_at_begin = watched
        if is_same_state(host_states(), states_at_begin):
            python_state, numpy_state = states_before
            random.setstate(python_state)
            np.random.set_state(numpy_state)
        else:
            self.are_made = True

    def refused(self) -> AbstractContextManager[None]:
        """A context for the forward of several micro-batches, to none of which a draw would belong.

        Raises `ConfigError` if there is one.
        """
        if self.are_made or self.forwards_to_watch:
            return _refused_draws()
        return nullcontext()


@contextmanager
def _refused_draws() -> Iterator[None]:
    states = host_states()
    yield
    if not is_same_state(states, host_states()):
        raise ConfigError(
            "batch.fuse",
            "the model or the loss draws from `random` or `numpy.random` for several micro-batches at once; draw from "
            f"torch with the samples as first dimension, or {REMEDY}",
        )


def host_states() -> tuple[Any, Any]:
    """The states of `random` and of NumPy's global generator."""
    return random.getstate(), np.random.get_state()


def is_same_state(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    """True if nothing was drawn between two calls of `host_states`."""
    (python_first, numpy_first), (python_second, numpy_second) = first, second
    # NumPy's is (kind, array, position, whether a second normal draw is kept, that draw).
    return (
        python_first == python_second
        and numpy_first[2:] == numpy_second[2:]
        and np.array_equal(numpy_first[1], numpy_second[1])
    )


# ---------------------------------------------------------------- what the code says


def mentions_host_generators(module: nn.Module) -> bool:
    """True if code that the module's calls can reach mentions `random` or `numpy.random`.

    Followed are the methods of its parts, and the functions that they name, in other files, too.
    """
    functions = list(_methods_of(module))
    seen: set[int] = set()
    while functions and len(seen) < FUNCTIONS:
        function = functions.pop()
        if id(function.__code__) in seen:
            continue
        seen.add(id(function.__code__))
        for value in _values_named_in(function.__code__, function):
            if _is_host_generator(value):
                return True
            functions += _functions_of(value)
    return False


def _methods_of(module: nn.Module) -> Iterator[FunctionType]:
    classes: dict[type, None] = {}
    for part in module.modules():
        for kind in type(part).__mro__:
            classes[kind] = None
        for value in vars(part).values():
            yield from _functions_of(value)
            if not isinstance(value, type):
                classes[type(value)] = None
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for hook in hooks.values():
                yield from _functions_of(hook)
    for kind in classes:
        yield from _functions_of(kind)


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions that a call of `value` may run: itself, or a class's methods."""
    if isinstance(value, partial):
        value = value.func
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if _package(value) in READ_NO_FURTHER:
        return
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, type):
        for name, member in vars(value).items():
            if name not in AT_BUILDING and not isinstance(member, type):
                yield from _functions_of(member)


def _package(value: Any) -> str:
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


def _values_named_in(code: CodeType, function: FunctionType) -> Iterator[Any]:
    """What the names in a function's code stand for: globals, enclosed variables, imports, attributes of modules."""
    names = list(code.co_names)
    known: list[Any] = [*_closure_values(function)]
    for name in names:
        if name in function.__globals__:
            known.append(function.__globals__[name])
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _values_named_in(constant, function)
    if any(name in ("numpy", *GENERATOR_MODULES) for name in names):
        known += _imports_within(code)
    for value in known:
        yield value
        if isinstance(value, ModuleType) and value.__name__ not in GENERATOR_MODULES:
            for name in names:
                attribute = vars(value).get(name)
                if attribute is not None:
                    yield attribute


def _closure_values(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _imports_within(code: CodeType) -> Iterator[Any]:
    """The modules that a function imports itself."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME" and instruction.argval in sys.modules:
            yield sys.modules[instruction.argval]


def _is_host_generator(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__ in GENERATOR_MODULES
    owner = getattr(value, "__self__", None)
    return isinstance(owner, random.Random | np.random.RandomState)
