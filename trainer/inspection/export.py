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

from trainer.errors import ConfigError, LockstepError
from trainer.inspection.predictor import Predictor
from trainer.storage.files import new_file

ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript")


class Classifier(nn.Module):
    """Images after the validation transforms, `(N, C, H, W)`, → probabilities `(N, classes)`.

    Includes normalisation and the task's softmax, and takes any number of images. Computes in the dtype of the
    weights, so the program of a bf16 or fp16 run computes in fp32.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.normalize = predictor.normalize
        self.model = predictor.module
        self.task = predictor.task

    def forward(self, images: Tensor) -> Tensor | None:
        output = self.task.predict(self.model, self.normalize(images))
        return self.task.probabilities(output)


def export(predictor: Predictor, kind: str, path: Path) -> Path:
    """Write the predictor's `Classifier` to `path` for the CPU, with the names of the classes.

    `kind` is `torch` or `onnx`. Raises `ConfigError` if a package is missing or the run is no classifier of images,
    and `LockstepError` if the model cannot be exported.
    """
    if kind == "onnx":
        _check_onnx_packages()
    example = _example_images(predictor)
    # A copy: the predictor stays on its device.
    classifier = copy.deepcopy(Classifier(predictor)).cpu().eval()
    if classifier(example) is None:
        raise ConfigError(
            "loss.name",
            f"{predictor.config.loss.name} trains no classifier, so there are no probabilities to export",
        )
    classes = json.dumps(predictor.signature.classes)
    write = _write_onnx if kind == "onnx" else _write_torch
    try:
        with new_file(path) as partial, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about torch's own internals
            write(classifier, example, classes, partial)
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
    classifier: Classifier, example: Tensor, classes: str, path: Path
) -> None:
    program = torch.export.export(
        classifier, (example,), dynamic_shapes=_any_batch_size()
    )
    torch.export.save(program, path, extra_files={"classes.json": classes})


def _write_onnx(
    classifier: Classifier, example: Tensor, classes: str, path: Path
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program: Any = torch.onnx.export(
        classifier,
        (example,),
        dynamo=True,
        dynamic_shapes=_any_batch_size(),
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    program.model.metadata_props["classes"] = classes
    program.save(path)


def _any_batch_size() -> dict[str, Any]:
    """The dimensions of `Classifier.forward`'s argument that may vary."""
    return {"images": {0: torch.export.Dim("batch")}}
