"""A model's answer for one file in words: as a row of a table, and as an object of JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from torch import Tensor

from trainer.components.answers import Answer, AnswerKind

BAR_WIDTH = 12  # columns
MOST_NUMBERS = 8  # of a row
IS_SET = 0.5  # the least probability of a label that holds

ClassName = Callable[[int], str]  # of a class id

# Of the columns after the file's name.
HEADINGS: dict[AnswerKind, tuple[str, ...]] = {
    "class": ("class", "probability", "then"),
    "labels": ("labels", "probabilities"),
    "values": ("values",),
    "class_map": ("classes by their share of the pixels",),
    "boxes": ("objects, the surest first",),
}


@dataclass(frozen=True)
class Candidate:
    """A class, or a label, with its probability or its share of the pixels."""

    name: str
    class_id: int
    share: float

    def to_dict(
        self, key: str = "class", number: str = "probability"
    ) -> dict[str, Any]:
        return {key: self.name, f"{key}_id": self.class_id, number: self.share}

    def to_text(self) -> str:
        return f"{self.name} {100 * self.share:.1f} %"


@dataclass(frozen=True)
class FoundObject:
    """A box (x1, y1, x2, y2) in pixels, its class, and how sure the model is."""

    name: str
    class_id: int
    score: float
    box: list[float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "class": self.name,
            "class_id": self.class_id,
            "score": self.score,
            "box": self.box,
        }

    def to_text(self) -> str:
        corners = ", ".join(f"{side:.0f}" for side in self.box)
        return f"{self.name} {100 * self.score:.0f} % ({corners})"


def describe(answer: Answer, name: ClassName, top: int) -> dict[str, Any]:
    """The answer as plain values. `name` gives a class's name, `top` limits how many classes are listed."""
    match answer.kind:
        case "class":
            candidates = _largest(answer.values, name, top)
            listed = [candidate.to_dict() for candidate in candidates]
            return {**listed[0], "top": listed}
        case "labels":
            candidates = _largest(answer.values.flatten(), name, top)
            return {
                "labels": _names_of_set(answer.values.flatten(), name),
                "top": [candidate.to_dict("label") for candidate in candidates],
            }
        case "values":
            return {"values": answer.values.tolist()}
        case "class_map":
            candidates = _pixel_shares(answer.values, name)
            shares = [candidate.to_dict(number="share") for candidate in candidates]
            _, *shape = answer.values.shape
            return {"shape": shape, "classes": shares}
        case "boxes":
            return {"boxes": [found.to_dict() for found in _objects(answer, name)]}


def row(answer: Answer, name: ClassName, top: int) -> list[Text]:
    """The answer as cells under its kind's `HEADINGS`."""
    match answer.kind:
        case "class":
            likeliest, *others = _largest(answer.values, name, top)
            then = _join(others)
            return [Text(likeliest.name), _draw_bar(likeliest.share), Text(then, "dim")]
        case "labels":
            probabilities = answer.values.flatten()
            labels = ", ".join(_names_of_set(probabilities, name))
            candidates = _largest(probabilities, name, top)
            return [Text(labels or "none"), Text(_join(candidates), "dim")]
        case "values":
            numbers = answer.values.flatten().tolist()
            return [Text(_format_numbers(numbers))]
        case "class_map":
            candidates = _pixel_shares(answer.values, name)
            return [Text(_join(candidates[:top]))]
        case "boxes":
            objects = _objects(answer, name)[:top]
            texts = " · ".join(found.to_text() for found in objects)
            return [Text(texts or "none")]


def _largest(probabilities: Tensor, name: ClassName, top: int) -> list[Candidate]:
    """The likeliest classes, the likeliest first."""
    count = min(top, len(probabilities))
    values, class_ids = probabilities.topk(count)
    candidates = []
    for class_id, value in zip(class_ids.tolist(), values.tolist(), strict=True):
        candidates.append(Candidate(name(class_id), class_id, value))
    return candidates


def _names_of_set(probabilities: Tensor, name: ClassName) -> list[str]:
    """The names of the labels that hold."""
    ids = (probabilities >= IS_SET).nonzero().flatten().tolist()
    return [name(label_id) for label_id in ids]


def _pixel_shares(probabilities: Tensor, name: ClassName) -> list[Candidate]:
    """The classes of a map `(C, H, W)` that some pixel has, the most frequent first."""
    classes = probabilities.argmax(0).flatten()
    counts = classes.bincount(minlength=len(probabilities)).tolist()
    candidates = []
    for class_id, count in enumerate(counts):
        if count:
            share = count / len(classes)
            candidates.append(Candidate(name(class_id), class_id, share))
    return sorted(candidates, key=lambda candidate: -candidate.share)


def _objects(answer: Answer, name: ClassName) -> list[FoundObject]:
    """The objects of one image, the surest first."""
    objects = []
    for *box, score, number in answer.values.tolist():
        class_id = int(number)  # a column of floats, beside the box
        objects.append(FoundObject(name(class_id), class_id, score, box))
    return sorted(objects, key=lambda found: -found.score)


def _format_numbers(numbers: list[float]) -> str:
    text = ", ".join(f"{number:.6g}" for number in numbers[:MOST_NUMBERS])
    more = len(numbers) - MOST_NUMBERS
    return f"{text} and {more} more" if more > 0 else text


def _join(candidates: list[Candidate]) -> str:
    return " · ".join(candidate.to_text() for candidate in candidates)


def _draw_bar(probability: float) -> Text:
    width = round(BAR_WIDTH * probability)
    bar = Text("━" * width, "green")
    bar.append("━" * (BAR_WIDTH - width), "bright_black")
    bar.append(f" {100 * probability:5.1f} %", "default")
    return bar
