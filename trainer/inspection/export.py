"""A predictor as one file that runs without this package: a `torch.export` program, or ONNX."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components.answers import Answer
from trainer.errors import ConfigError, LockstepError
from trainer.inspection.predictor import Predictor, unknown_answer
from trainer.storage.files import new_file

ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript")


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

    def forward(self, images: Tensor) -> Tensor | None:
        answer = self.answer(images)
        return None if answer is None else answer.values

    def answer(self, images: Tensor) -> Answer | None:
        """The answer for `(N, C, H, W)`; None where it is not known."""
        output = self.task.predict(self.model, self.normalize(images))
        return self.task.answer(output)


def export(predictor: Predictor, kind: str, path: Path) -> Path:
    """Write the predictor's `AnsweringModel` to `path` for the CPU, with the names of the classes.

    `kind` is `torch` or `onnx`. Raises `ConfigError` if a package is missing, the run's inputs are no images or its
    answers are not known, and `LockstepError` if the model cannot be exported.
    """
    if kind == "onnx":
        _check_onnx_packages()
    example = _example_images(predictor)
    # A copy: the predictor stays on its device.
    module = copy.deepcopy(AnsweringModel(predictor)).cpu().eval()
    answer = module.answer(example)
    if answer is None:
        raise ConfigError("loss.name", unknown_answer(predictor.config.loss.name))
    description = {
        "answer.json": json.dumps(answer.kind),
        "classes.json": json.dumps(predictor.signature.classes),
    }
    write = _write_onnx if kind == "onnx" else _write_torch
    try:
        with new_file(path) as partial, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about torch's own internals
            write(module, example, description, partial)
    except (OSError, LockstepError):
        raise
    except Exception as error:
        # A tracer may raise anything on a model that it cannot follow.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LockstepError(
            f"{predictor.config.model.name} cannot be exported as {kind}: {reason}"
        ) from error
    return path


def _check_onnx_packages() -> None:
    absent = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            "--export",
            f"onnx needs {' and '.join(absent)}: pip install {' '.join(ONNX_PACKAGES)}",
        )


def _example_images(predictor: Predictor) -> Tensor:
    """Two images to trace the model with: with one, torch.export would fix the batch size at 1."""
    shape = predictor.signature.shape
    dtype = predictor.signature.dtype
    if shape is None or dtype is None:
        raise ConfigError(
            "--export",
            "the run's inputs are no tensors, and an exported program takes one",
        )
    return torch.zeros(2, *shape, dtype=getattr(torch, dtype))


def _write_torch(
    module: AnsweringModel, example: Tensor, description: dict[str, str], path: Path
) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=_any_batch_size())
    torch.export.save(program, path, extra_files=dict(description))


def _write_onnx(
    module: AnsweringModel, example: Tensor, description: dict[str, str], path: Path
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    kind = json.loads(description["answer.json"])
    program: Any = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=_any_batch_size(),
        input_names=["images"],
        output_names=["values" if kind == "values" else "probabilities"],
        verbose=False,
    )
    for name, text in description.items():
        program.model.metadata_props[name.removesuffix(".json")] = text
    program.save(path)


def _any_batch_size() -> dict[str, Any]:
    """The dimensions of `AnsweringModel.forward`'s argument that may vary."""
    return {"images": {0: torch.export.Dim("batch")}}
