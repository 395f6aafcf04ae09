"""A predictor as one file that runs without this package: a `torch.export` program, or ONNX."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.errors import ConfigError, LockstepError, first_line
from trainer.exact.structures import dtype_name
from trainer.inspection.predictor import Predictor, unknown_answer
from trainer.storage.files import new_file

ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript")
BATCH = "batch"  # the dimension that may vary


class AnsweringModel(nn.Module):
    """Images after the validation transforms, `(N, C, H, W)`, → the values of the task's `Answer`.

    Includes normalisation and the task's softmax or sigmoid, and takes any number of images. Computes in the dtype of
    the weights, so the program of a bf16 or fp16 run computes in fp32.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.normalize = predictor.normalize
        self.model = predictor.module
        self.task = predictor.task

    def forward(self, images: Any) -> Any:
        answer = self.answer(images)
        return None if answer is None else answer.values

    def answer(self, images: Any) -> Answer | None:
        """The answer for `(N, C, H, W)`, or what else the model takes; None where it is not known."""
        output = self.task.predict(self.model, self.normalize(images))
        return self.task.answer(output)


class AnsweringDetector(AnsweringModel):
    """One image `(C, H, W)` → a table of boxes `(K, 6)`: see `Answer`."""

    def answer(self, images: Any) -> Answer | None:
        answer = super().answer([images])
        return None if answer is None else Answer(answer.kind, answer.values[0])


@dataclass(frozen=True)
class _Program:
    """What is traced: a module, what to trace it with, and the dimensions of its argument that may vary."""

    module: AnsweringModel
    example: Any
    dynamic_shapes: dict[str, Any]
    input_names: list[str]


def export(predictor: Predictor, kind: str, path: Path) -> Path:
    """Write the predictor's `AnsweringModel` to `path` for the CPU, with its signature and the names of the classes.

    `kind` is `torch` or `onnx`. The program takes images `(N, C, H, W)`; a dict of tensors, if the run's inputs are
    several by name; or one image `(C, H, W)`, if it is a detector, of the size of the first validation image.

    Raises `ConfigError` if a package is missing, the run's inputs are no tensors or its answers are not known, and
    `LockstepError` if the model cannot be exported.
    """
    if kind == "onnx":
        _check_onnx_packages()
    program = _program(predictor)
    answer = program.module.answer(program.example)
    if answer is None:
        raise ConfigError("loss.name", unknown_answer(predictor.config.loss.name))
    description = {
        "answer.json": json.dumps(answer.kind),
        "classes.json": json.dumps(predictor.signature.classes),
        "signature.json": json.dumps(_signature(program, answer)),
    }
    write = _write_onnx if kind == "onnx" else _write_torch
    try:
        with (
            new_file(path) as partial,
            warnings.catch_warnings(),
            _suppression_of_any_count(),
        ):
            warnings.simplefilter("ignore")  # they are about torch's own internals
            write(program, description, partial)
    except (OSError, LockstepError):
        raise
    except Exception as error:
        # A tracer may raise anything on a model that it cannot follow.
        raise LockstepError(
            f"{predictor.config.model.name} cannot be exported as {kind}: {first_line(error)}"
        ) from error
    return path


def _program(predictor: Predictor) -> _Program:
    # Copies: the predictor stays on its device.
    signature = predictor.signature
    batch: dict[int, Any] = {0: torch.export.Dim(BATCH)}
    if signature.form == "named" and signature.parts:
        # A collate function may pad to the longest sample of a batch, so any side may change.
        is_padded = predictor.config.data.collate is not None
        parts = {}
        shapes: dict[str, dict[int, Any]] = {}
        for name, part in signature.parts.items():
            value = _example(part["shape"], part["dtype"])
            others = range(1, value.dim()) if is_padded else ()
            parts[name] = value
            shapes[name] = batch | dict.fromkeys(others, torch.export.Dim.AUTO)
        module = _on_host(AnsweringModel(predictor))
        return _Program(module, parts, {"images": shapes}, list(parts))
    if signature.shape is None or signature.dtype is None:
        raise ConfigError(
            "--export",
            "the run's inputs are neither tensors nor images, and an exported program takes those",
        )
    images = _example(signature.shape, signature.dtype)
    if signature.form == "list":
        detector = _on_host(AnsweringDetector(predictor))
        return _Program(detector, images[0], {"images": None}, ["image"])
    module = _on_host(AnsweringModel(predictor))
    return _Program(module, images, {"images": batch}, ["images"])


def _on_host(module: AnsweringModel) -> AnsweringModel:
    return copy.deepcopy(module).cpu().eval()


def _example(shape: list[int], dtype: str) -> Tensor:
    """Two rows to trace the model with: with one, torch.export would fix the batch size at 1.

    Ones: a length or a count of 0 may be divided by.
    """
    return torch.ones(2, *shape, dtype=getattr(torch, dtype))


def _signature(program: _Program, answer: Answer) -> dict[str, Any]:
    """What the program takes and gives, as `signature.json` beside it says it; the size of `batch` may vary."""
    values = program.example
    if not isinstance(values, dict):
        values = {program.input_names[0]: values}
    is_batch = program.input_names != ["image"]
    inputs = {name: _describe(value, is_batch) for name, value in values.items()}
    output = _describe(answer.values, is_batch)
    if not is_batch:
        output["shape"][0] = "boxes"
    return {"inputs": inputs, "output": output, "answer": answer.kind}


def _describe(value: Tensor, is_batch: bool) -> dict[str, Any]:
    shape: list[Any] = list(value.shape)
    if is_batch:
        shape[0] = BATCH
    return {"shape": shape, "dtype": dtype_name(value.dtype)}


@contextmanager
def _suppression_of_any_count() -> Iterator[None]:
    """torchvision's suppression of overlapping boxes without its branch for no boxes, which no tracer can follow."""
    from torchvision.ops import boxes as of_boxes

    def batched_nms(
        boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float
    ) -> Tensor:
        # As torchvision's own: boxes of different classes are moved apart, so that they do not overlap.
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        offsets = idxs.to(boxes) * (largest + 1)
        return of_boxes.nms(boxes + offsets[:, None], scores, iou_threshold)  # type: ignore[no-any-return]

    original = of_boxes.batched_nms
    of_boxes.batched_nms = batched_nms
    try:
        yield
    finally:
        of_boxes.batched_nms = original


def _check_onnx_packages() -> None:
    absent = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            "--export",
            f"onnx needs {' and '.join(absent)}: pip install {' '.join(ONNX_PACKAGES)}",
        )


def _write_torch(program: _Program, description: dict[str, str], path: Path) -> None:
    exported = torch.export.export(
        program.module, (program.example,), dynamic_shapes=program.dynamic_shapes
    )
    torch.export.save(exported, path, extra_files=dict(description))


def _write_onnx(program: _Program, description: dict[str, str], path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    kind = json.loads(description["answer.json"])
    output_name = kind if kind in ("values", "boxes") else "probabilities"
    exported: Any = torch.onnx.export(
        program.module,
        (program.example,),
        dynamo=True,
        dynamic_shapes=program.dynamic_shapes,
        input_names=program.input_names,
        output_names=[output_name],
        verbose=False,
    )
    for name, text in description.items():
        exported.model.metadata_props[name.removesuffix(".json")] = text
    exported.save(path)
