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
from trainer.storage.files import sync

ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript")


class Classifier(nn.Module):
    """Images as the validation transforms leave them, `(N, C, H, W)`, → probabilities `(N, classes)`.

    Normalisation and the task's own reading of the output (softmax) are within; any number of images is taken. It
    computes in the dtype of the weights, bf16 and fp16 runs' too.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.normalize = predictor.normalize
        self.model = predictor.module
        self.task = predictor.task

    def forward(self, images: Tensor) -> Tensor | None:
        return self.task.probabilities(self.task.predict(self.model, self.normalize(images)))


def export(predictor: Predictor, kind: str, path: Path) -> Path:
    """Write the predictor's `Classifier` to `path`, for the CPU, as `torch` or `onnx`; class names go with it."""
    missing = [name for name in ONNX_PACKAGES if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError("--export", f"onnx needs {' and '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")
    shape, dtype = predictor.signature.shape, predictor.signature.dtype
    if shape is None or dtype is None:
        raise ConfigError("--export", "the run's inputs are no tensors, and an exported program takes one")
    classifier = copy.deepcopy(Classifier(predictor)).cpu().eval()  # the predictor stays where it is
    example = torch.zeros(2, *shape, dtype=getattr(torch, dtype))  # of one, a program for one would be made
    if classifier(example) is None:
        raise ConfigError("loss.name", f"{predictor.config.loss.name} makes no classifier, whose output has a meaning")
    partial = path.with_name(f".partial.{path.name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own internals
            (_write_onnx if kind == "onnx" else _write_torch)(classifier, example, predictor, partial)
        sync(partial)
        partial.replace(path)
    except (OSError, LockstepError):
        raise
    except Exception as error:  # whatever a tracer makes of a model it cannot follow
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LockstepError(f"{predictor.config.model.name} cannot be exported as {kind}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_torch(classifier: Classifier, example: Tensor, predictor: Predictor, path: Path) -> None:
    program = torch.export.export(classifier, (example,), dynamic_shapes=_any_number())
    torch.export.save(program, path, extra_files={"classes.json": json.dumps(predictor.signature.classes)})


def _write_onnx(classifier: Classifier, example: Tensor, predictor: Predictor, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program: Any = torch.onnx.export(
        classifier,
        (example,),
        dynamo=True,
        dynamic_shapes=_any_number(),
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    program.model.metadata_props["classes"] = json.dumps(predictor.signature.classes)
    program.save(path)


def _any_number() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch")}}
