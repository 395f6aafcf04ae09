"""A sweep's parameters as W&B's YAML describes them, and the values that trials get from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.fields import show
from trainer.errors import ConfigError, nearest
from trainer.exact.seeding import numpy_generator

Values = dict[str, Any]  # one trial's value of each parameter, by dotted name

BOUNDS = {  # what each distribution over numbers needs; with q_ before it, values are rounded to multiples of q
    "uniform": ("min", "max"),
    "log_uniform": ("min", "max"),  # exponents of e
    "log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
    "log_normal": ("mu", "sigma"),
}
ROUNDED = ("q_uniform", "q_log_uniform", "q_log_uniform_values", "q_normal", "q_log_normal")
CHOICES = {  # the distributions over given values, and what each takes
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "categorical_w_probabilities": ("values", "probabilities"),
}
DISTRIBUTIONS = (*CHOICES, "int_uniform", *BOUNDS, *ROUNDED)
KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "a", "b", "q")


@dataclass(frozen=True)
class Parameter:
    """One parameter. `choices` where it has a list of values, else `a` and `b`: bounds, or mean and deviation."""

    name: str
    distribution: str
    choices: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] | None = None
    a: float = 0.0
    b: float = 1.0
    q: float | None = None

    @property
    def base(self) -> str:
        return self.distribution.removeprefix("q_")

    @property
    def span(self) -> tuple[float, float]:
        """Least and greatest value; of a normal distribution, three deviations off the mean."""
        low, high = (self.a, self.b) if "normal" not in self.base else (self.a - 3 * self.b, self.a + 3 * self.b)
        return (math.exp(low), math.exp(high)) if self.base in ("log_uniform", "log_normal") else (low, high)

    def draw(self, seed: int, trial: int) -> Any:
        """The value of a trial: a function of the seed, the parameter's name and the trial's number alone."""
        generator = numpy_generator(seed, f"sweep/{self.name}", trial)
        if self.choices:
            return self.choices[int(generator.choice(len(self.choices), p=self.probabilities))]
        if self.base == "int_uniform":
            return int(generator.integers(int(self.a), int(self.b), endpoint=True))
        if self.base == "log_uniform_values":
            return self.rounded(math.exp(generator.uniform(math.log(self.a), math.log(self.b))))
        drawn = generator.normal(self.a, self.b) if "normal" in self.base else generator.uniform(self.a, self.b)
        return self.rounded(math.exp(drawn) if self.base in ("log_uniform", "log_normal") else drawn)

    def rounded(self, value: float) -> Any:
        """The multiple of q nearest to a value: an integer where q is one."""
        if self.q is None:
            return float(value)
        multiple = round(value / self.q) * self.q
        return multiple if isinstance(multiple, int) else float(f"{multiple:.12g}")  # 0.3, not 0.30000000000000004

    def grid(self) -> list[Any]:
        """All values, where there are finitely many."""
        if self.choices:
            return list(self.choices)
        if self.distribution == "int_uniform":
            return list(range(int(self.a), int(self.b) + 1))
        if self.distribution == "q_uniform" and self.q is not None:
            return [self.rounded(self.a + i * self.q) for i in range(int((self.b - self.a) / self.q + 1e-9) + 1)]
        raise ConfigError(f"parameters.{self.name}", f"a grid needs values, and {self.distribution} has no end of them")

    def extremes(self) -> list[Any]:
        """The values that are most likely to be refused."""
        if self.choices:
            return list(self.choices)
        kind = int if self.distribution == "int_uniform" else self.rounded
        return [kind(value) for value in self.span]


def grid(parameters: list[Parameter]) -> Iterator[Values]:
    """Every combination, the last parameter changing fastest."""
    names = [parameter.name for parameter in parameters]
    for point in itertools.product(*(parameter.grid() for parameter in parameters)):
        yield dict(zip(names, point, strict=True))


def read_parameters(tree: Any, prefix: str = "") -> list[Parameter]:
    """The parameters of a sweep's `parameters:`, nested ones by their dotted names."""
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(f"parameters.{prefix}".rstrip("."), "is to name each parameter and its values")
    found: list[Parameter] = []
    for name, spec in tree.items():
        dotted = f"{prefix}{name}"
        if isinstance(spec, Mapping) and "parameters" in spec:
            _takes(f"parameters.{dotted}", spec, ("parameters",), "a section of parameters")
            found += read_parameters(spec["parameters"], f"{dotted}.")
        else:
            found.append(_read(dotted, spec))
    return found


def _read(name: str, spec: Any) -> Parameter:
    key = f"parameters.{name}"
    if not isinstance(spec, Mapping):
        raise ConfigError(key, f"needs value, values or a distribution, and is {show(spec)}")
    for unknown in set(spec) - set(KEYS):
        raise ConfigError(f"{key}.{unknown}", f"no such key{nearest(str(unknown), KEYS)}")
    distribution = _distribution(key, spec)
    if distribution in CHOICES:
        _takes(key, spec, CHOICES[distribution], distribution)
        if distribution == "constant":
            return Parameter(name, "constant", (_plain(key, _given(key, spec, "value")),))
        return _categorical(name, key, spec)
    return _bounded(name, key, spec, distribution)


def _distribution(key: str, spec: Mapping[str, Any]) -> str:
    """The distribution that is named, or that the other keys speak of."""
    whole = all(isinstance(spec.get(bound), int) for bound in ("min", "max"))
    bounded = "int_uniform" if whole else "uniform"
    meant = "constant" if "value" in spec else "categorical" if "values" in spec else bounded
    distribution = spec.get("distribution", meant)
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(
            f"{key}.distribution",
            f"{show(distribution)} is not one of {', '.join(DISTRIBUTIONS)}{nearest(str(distribution), DISTRIBUTIONS)}",
        )
    if distribution == "int_uniform" and not whole:
        raise ConfigError(f"{key}.min", "int_uniform needs whole bounds, min and max")
    return str(distribution)


def _bounded(name: str, key: str, spec: Mapping[str, Any], distribution: str) -> Parameter:
    """A distribution between bounds, or around a mean."""
    first, second = BOUNDS.get(distribution.removeprefix("q_"), ("min", "max"))
    rounds = distribution.startswith("q_")
    _takes(key, spec, (first, second, *(("q",) if rounds else ())), distribution)
    a, b = (number(f"{key}.{bound}", _given(key, spec, bound)) for bound in (first, second))
    q = number(f"{key}.q", spec.get("q", 1)) if rounds else None
    if first == "min" and a > b:
        raise ConfigError(f"{key}.min", f"{a} is more than max={b}")
    if distribution.endswith("log_uniform_values") and a <= 0:
        raise ConfigError(f"{key}.min", f"{a} has no logarithm; it must be more than 0")
    if b <= 0 and first == "mu":
        raise ConfigError(f"{key}.sigma", f"{b} is not more than 0")
    if q is not None and q <= 0:
        raise ConfigError(f"{key}.q", f"{q} is not more than 0")
    parameter = Parameter(name, distribution, a=a, b=b, q=q)
    try:
        parameter.extremes()
    except OverflowError:
        raise ConfigError(key, f"{a} and {b} are exponents of e, and too large for a number") from None
    return parameter


def _given(key: str, spec: Mapping[str, Any], name: str) -> Any:
    if name not in spec:
        raise ConfigError(f"{key}.{name}", "is missing; give value, values, or a distribution with its bounds")
    return spec[name]


def _takes(key: str, spec: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    """Refuse a key that would do nothing."""
    for other in spec:
        if other not in (*names, "distribution"):
            raise ConfigError(f"{key}.{other}", f"does nothing here: {what} takes {', '.join(names)}")


def _categorical(name: str, key: str, spec: Mapping[str, Any]) -> Parameter:
    values, probabilities = _given(key, spec, "values"), spec.get("probabilities")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key}.values", f"{show(values)} is not a list of values")
    if probabilities is not None:
        numbers = isinstance(probabilities, list) and all(
            isinstance(p, int | float) and not isinstance(p, bool) and p >= 0 for p in probabilities
        )
        if not numbers or len(probabilities) != len(values) or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
            raise ConfigError(f"{key}.probabilities", f"must be {len(values)} numbers that add up to 1")
        probabilities = tuple(p / sum(probabilities) for p in probabilities)
    return Parameter(name, "categorical", tuple(_plain(key, value) for value in values), probabilities)


def number(key: str, value: Any) -> float:
    """A finite number, or a `ConfigError`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    _plain(key, value)
    raise ConfigError(key, f"{show(value)} is not a number" if value is not None else "is missing")


def _plain(key: str, value: Any) -> Any:
    """A value, unless it is a number that YAML reads as text."""
    if isinstance(value, str) and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        mantissa, _, exponent = value.lower().partition("e")
        written = f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{int(exponent):+d}"
        raise ConfigError(key, f"YAML reads {value} as text, not as the number {number}; write {written}")
    return value
