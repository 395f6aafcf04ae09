"""A metric's result as columns of a row: one number, one for each class, or one for each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# More would bury the others.
MAX_CLASSES = 100
# In detection's results: which class each value of a vector belongs to.
CLASS_IDS = "classes"
# What detection gives where values by class were not asked for.
NOT_MEASURED = -1


@dataclass
class Columns:
    """`values` by name, and the names of what is left out, with the reasons."""

    values: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, result: Any, classes: Sequence[str]) -> None:
        """Add what a metric called `name` has computed."""
        if isinstance(result, Mapping):
            ids = result.get(CLASS_IDS)
            labels = _class_labels(ids, classes)
            for key, value in result.items():
                if key != CLASS_IDS and not _is_not_measured(key, value):
                    self._add_value(f"{name}_{_safe(str(key))}", value, labels)
            return
        self._add_value(name, result, list(classes))

    def _add_value(self, name: str, value: Any, labels: Sequence[str]) -> None:
        if isinstance(value, int | float):
            self.values[name] = float(value)
            return
        if not isinstance(value, Tensor):
            self.left_out[name] = f"is a {type(value).__name__}"
            return
        if value.numel() == 1:
            self.values[name] = float(value)
            return
        if value.dim() != 1 or len(value) != len(labels):
            self.left_out[name] = f"has the shape {tuple(value.shape)}"
            return
        if len(labels) > MAX_CLASSES:
            self.left_out[name] = f"has values of {len(labels)} classes"
            return
        for label, number in zip(labels, value.tolist(), strict=True):
            self.values[f"{name}_{_safe(label)}"] = float(number)


def _class_labels(ids: Any, classes: Sequence[str]) -> list[str]:
    """The names of the classes that a result speaks of: those that it names by id, else all."""
    if not isinstance(ids, Tensor):
        return list(classes)
    labels = []
    for class_id in ids.reshape(-1).tolist():
        is_known = 0 <= class_id < len(classes)
        labels.append(classes[class_id] if is_known else str(class_id))
    return labels


def _is_not_measured(key: Any, value: Any) -> bool:
    if not str(key).endswith("_per_class") or not isinstance(value, Tensor):
        return False
    return value.dim() == 0 and value.item() == NOT_MEASURED


def _safe(label: str) -> str:
    """A slash would make a group of columns in W&B."""
    return label.replace("/", "_")
