"""Stands for nvJPEG: decodes lists of files on the CPU, to Pillow's pixels, which are libjpeg's. It turns none."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from trainer.data.device_decoders import FileDecoder

NAME = "a stand-in"


def decode(files: list[Tensor]) -> list[Tensor]:
    """Raises `RuntimeError`, and gives nothing, if one of the files is progressive or damaged."""
    images = []
    for file in files:
        try:
            with Image.open(io.BytesIO(file.numpy().tobytes())) as image:
                is_progressive = "progressive" in image.info
                pixels: Tensor = pil_to_tensor(image.convert("RGB"))
        except OSError as error:
            raise RuntimeError("nvjpegDecode failed") from error
        if is_progressive:
            raise RuntimeError("nvjpegDecode failed: not supported")
        images.append(pixels)
    return images


def stand_in(device: torch.device) -> FileDecoder:
    return FileDecoder(NAME, decode, turns=False)


@contextmanager
def device_that_decodes(make: object = stand_in) -> Iterator[None]:
    with patch("trainer.data.loading.file_decoder", make):
        yield
