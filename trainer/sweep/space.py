"""A sweep's parameters as W&B's YAML describes them, and the values that trials get from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.fields import show
from trainer.config.yaml_text import is_text_key
from trainer.errors import ConfigError, nearest
from trainer.exact.seeding import numpy_generator

Values = dict[str, Any]  # one trial's value of each parameter, by dotted name

# What each distribution takes. With q_ before its name, values are rounded to multiples of q.
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "log_uniform": ("min", "max"),  # exponents of e
    "log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
    "log_normal": ("mu", "sigma"),
    "q_uniform": ("min", "max", "q"),
    "q_log_uniform": ("min", "max", "q"),
    "q_log_uniform_values": ("min", "max", "q"),
    "q_normal": ("mu", "sigma", "q"),
    "q_log_normal": ("mu", "sigma", "q"),
}
OPTIONAL = ("probabilities", "q")
KEYS = (
    "value",
    "values",
    "probabilities",
    "distribution",
    "min",
    "max",
    "mu",
    "sigma",
    "q",
)


@dataclass(frozen=True)
class Parameter:
    """One parameter: a list of `choices`, or a `law` over numbers whose two `bounds` are W&B's min and max.

    Of a normal law, `bounds` are the mean and the deviation, of a log-normal one those of the logarithm.
    """

    name: str
    law: str
    choices: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] | None = None
    bounds: tuple[float, float] = (0.0, 0.0)
    q: float | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value. A normal law has none; three deviations around its mean stand in."""
        if "normal" not in self.law:
            return self.bounds
        mean, deviation = self.bounds
        low, high = mean - 3 * deviation, mean + 3 * deviation
        return (
            (math.exp(low), math.exp(high)) if self.law == "log_normal" else (low, high)
        )

    def draw(self, seed: int, trial: int) -> Any:
        """The value of a trial: a function of the seed, the parameter's name and the trial's number alone."""
        generator = numpy_generator(seed, f"sweep/{self.name}", trial)
        if self.choices:
            index = generator.choice(len(self.choices), p=self.probabilities)
            return self.choices[int(index)]
        first, second = self.bounds
        if self.law == "int_uniform":
            return int(generator.integers(int(first), int(second), endpoint=True))
        if self.law == "log_uniform":
            logarithm = generator.uniform(math.log(first), math.log(second))
            return self.round(math.exp(logarithm))
        if self.law == "normal":
            return self.round(generator.normal(first, second))
        if self.law == "log_normal":
            return self.round(generator.lognormal(first, second))
        return self.round(generator.uniform(first, second))

    def round(self, number: float) -> Any:
        """The multiple of q nearest to a number, an integer if q is one. Without q, the number."""
        if self.law == "int_uniform":
            return int(number)
        if self.q is None:
            return float(number)
        multiple = round(number / self.q) * self.q
        if isinstance(multiple, int):
            return multiple
        return float(f"{multiple:.12g}")  # 0.3, not 0.30000000000000004

    def list_values(self) -> list[Any]:
        """All values, for a grid. Raises `ConfigError` if there is no end of them."""
        if self.choices:
            return list(self.choices)
        low, high = self.bounds
        if self.law == "int_uniform":
            return list(range(int(low), int(high) + 1))
        if self.law == "uniform" and self.q is not None:
            # 1e-9: a quotient may fall just short of a whole number.
            count = int((high - low) / self.q + 1e-9) + 1
            return [self.round(low + i * self.q) for i in range(count)]
        raise ConfigError(
            f"parameters.{self.name}",
            f"a grid needs values, and {self.law} has no end of them",
        )

    def list_extremes(self) -> list[Any]:
        """The values that a config is most likely to refuse."""
        return list(self.choices) or [self.round(bound) for bound in self.range]


def grid(parameters: list[Parameter]) -> Iterator[Values]:
    """Every combination, the last parameter changing fastest."""
    names = [parameter.name for parameter in parameters]
    for point in itertools.product(
        *(parameter.list_values() for parameter in parameters)
    ):
        yield dict(zip(names, point, strict=True))


def read_parameters(tree: Any, prefix: str = "") -> list[Parameter]:
    """The parameters of a sweep's `parameters:`, nested ones by their dotted names."""
    if not isinstance(tree, Mapping) or not tree:
        raise ConfigError(
            f"parameters.{prefix}".rstrip("."),
            "must name each parameter and its values",
        )
    parameters: list[Parameter] = []
    for name, spec in tree.items():
        dotted = f"{prefix}{name}"
        if not isinstance(spec, Mapping):
            raise ConfigError(
                f"parameters.{dotted}",
                f"needs value, values or a distribution, and is {show(spec)}",
            )
        if "parameters" in spec:
            _refuse_other_keys(
                f"parameters.{dotted}", spec, ("parameters",), "a section of parameters"
            )
            parameters += read_parameters(spec["parameters"], f"{dotted}.")
        else:
            parameters.append(_read_parameter(dotted, f"parameters.{dotted}", spec))
    return parameters


def _read_parameter(name: str, key: str, spec: Mapping[str, Any]) -> Parameter:
    distribution = _read_distribution(key, spec)
    keys = DISTRIBUTIONS[distribution]
    _refuse_other_keys(
        key, spec, (*keys, "distribution"), f"{distribution} takes {', '.join(keys)}"
    )
    for required in keys:
        if required not in spec and required not in OPTIONAL:
            raise ConfigError(
                f"{key}.{required}",
                "is missing; give value, values, or a distribution with its bounds",
            )
    if distribution == "constant":
        return Parameter(name, "constant", (_refuse_text_number(key, spec["value"]),))
    if "values" in keys:
        return _read_choices(name, key, spec)
    return _read_numbers(name, key, spec, distribution)


def _read_distribution(key: str, spec: Mapping[str, Any]) -> str:
    """The distribution that the description names, or that its other keys imply."""
    whole_bounds = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    default = "int_uniform" if whole_bounds else "uniform"
    if "value" in spec:
        default = "constant"
    elif "values" in spec:
        default = "categorical"
    distribution = str(spec.get("distribution", default))
    if distribution not in DISTRIBUTIONS:
        suggestion = nearest(distribution, DISTRIBUTIONS)
        raise ConfigError(
            f"{key}.distribution",
            f"{distribution} is not one of {', '.join(DISTRIBUTIONS)}{suggestion}",
        )
    if distribution == "int_uniform" and not whole_bounds:
        raise ConfigError(f"{key}.min", "int_uniform needs whole bounds, min and max")
    return distribution


def _refuse_other_keys(
    key: str, spec: Mapping[str, Any], keys: tuple[str, ...], explanation: str
) -> None:
    """Refuse a key that is not W&B's, or that would do nothing."""
    for other in spec:
        if other not in (*KEYS, "parameters"):
            raise ConfigError(
                f"{key}.{other}", f"no such key{nearest(str(other), KEYS)}"
            )
        if other not in keys:
            raise ConfigError(f"{key}.{other}", f"does nothing here: {explanation}")


def _read_numbers(
    name: str, key: str, spec: Mapping[str, Any], distribution: str
) -> Parameter:
    """A distribution over numbers, between bounds or around a mean."""
    low_name, high_name = DISTRIBUTIONS[distribution][:2]
    low = read_number(f"{key}.{low_name}", spec[low_name])
    high = read_number(f"{key}.{high_name}", spec[high_name])
    q = None
    if distribution.startswith("q_"):
        q = read_number(f"{key}.q", spec.get("q", 1))
    if low_name == "min" and low > high:
        raise ConfigError(f"{key}.min", f"{low} is more than max={high}")
    if high_name == "sigma" and high <= 0:
        raise ConfigError(f"{key}.sigma", f"{high} is not more than 0")
    if q is not None and q <= 0:
        raise ConfigError(f"{key}.q", f"{q} is not more than 0")
    law = distribution.removeprefix("q_")
    try:
        if law == "log_uniform":
            # From here on, both log-uniform laws are one.
            low, high = math.exp(low), math.exp(high)
        elif law == "log_uniform_values":
            law = "log_uniform"
        parameter = Parameter(name, law, bounds=(low, high), q=q)
        least, _ = parameter.range
    except OverflowError:
        raise ConfigError(
            key, "its bounds are exponents of e, and one is too large for a number"
        ) from None
    if law.startswith("log") and least <= 0:
        raise ConfigError(
            f"{key}.{low_name}", f"{least} has no logarithm; it must be more than 0"
        )
    return parameter


def _read_choices(name: str, key: str, spec: Mapping[str, Any]) -> Parameter:
    values = spec["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key}.values", f"{show(values)} is not a list of values")
    choices = tuple(_refuse_text_number(key, value) for value in values)
    probabilities = spec.get("probabilities")
    if probabilities is None:
        return Parameter(name, "categorical", choices)
    if not isinstance(probabilities, list):
        probabilities = [probabilities]
    shares = [read_number(f"{key}.probabilities", share) for share in probabilities]
    total = sum(shares)
    is_one_for_each = len(shares) == len(values) and min(shares) >= 0
    if not is_one_for_each or not math.isclose(total, 1, abs_tol=1e-6):
        raise ConfigError(
            f"{key}.probabilities", f"must be {len(values)} numbers that add up to 1"
        )
    # Divided by their sum, because NumPy allows less of an error than a YAML with six digits has.
    scaled = tuple(share / total for share in shares)
    return Parameter(name, "categorical", choices, scaled)


def read_number(key: str, value: Any) -> float:
    """A finite number. Raises `ConfigError` for anything else."""
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return value
    if value is None:
        raise ConfigError(key, "is missing")
    raise ConfigError(key, f"{show(_refuse_text_number(key, value))} is not a number")


def _refuse_text_number(key: str, value: Any) -> Any:
    """The value. Raises `ConfigError` for a number that YAML reads as text, such as 1e-4."""
    name = key.removeprefix("parameters.").removesuffix(".values")
    if not isinstance(value, str) or "e" not in value.lower() or is_text_key(name):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    mantissa, _, exponent = value.lower().partition("e")
    if "." not in mantissa:
        mantissa += ".0"
    yaml_number = f"{mantissa}e{int(exponent):+d}"
    raise ConfigError(
        key,
        f"YAML reads {value} as text, not as the number {number}; write {yaml_number}",
    )
