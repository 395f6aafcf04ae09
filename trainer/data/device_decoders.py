"""What decodes JPEG files on a GPU: nvJPEG, by TorchCodec or by torchvision, tried on a picture before it is trusted.

nvJPEG's pixels are near to libjpeg's, and others: which decoder it was is part of what a run is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from trainer.data.decoders import DecodeFiles, cuda_decoders
from trainer.data.image_checks import ORIENTATION
from trainer.data.image_list import turned_upright
from trainer.errors import ConfigError, first_line
from trainer.process.device import device_name

# Of 255 levels: how near a decoder's pixels are to the picture's on average.
TOLERANCE = 4
PICTURE = (16, 32)  # its height and width
TURNED = 6  # EXIF's orientation of it: to be turned by a quarter


@dataclass(frozen=True)
class FileDecoder:
    """What decodes JPEG files, uint8 `(bytes,)` on the host, to uint8 `(3, H, W)` on the device.

    Its `name` says all that its pixels may depend on. `turns` says whether it heeds EXIF's orientation.
    """

    name: str
    decode: DecodeFiles
    turns: bool


def file_decoder(device: torch.device) -> FileDecoder:
    """The decoder for `device`. Raises `ConfigError` where there is none that works."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ConfigError(
            "data.decode",
            f"device needs a GPU of NVIDIA's, and this run is on {device_name(device)}; set data.decode=cpu, whose "
            f"pixels differ a little",
        )
    reasons = []
    for package, decode in cuda_decoders(device):
        try:
            turns = try_out(decode)
        except (RuntimeError, ValueError, TypeError) as error:
            # As of a package that was built without nvJPEG.
            reasons.append(f"{package}: {first_line(error)}")
            continue
        name = f"nvJPEG on {device_name(device)} ({package} {version(package)})"
        return FileDecoder(name, decode, turns)
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise ConfigError(
        "data.decode",
        f"device needs TorchCodec 0.16 or later, or torchvision, with nvJPEG{why}; install torchcodec for this CUDA, "
        f"or set data.decode=cpu, whose pixels differ a little",
    )


def try_out(decode: DecodeFiles) -> bool:
    """Whether `decode` heeds EXIF's orientation. Raises `ValueError` unless what it gives is near to the picture."""
    pixels = _picture()
    [image] = decode([_as_jpeg(pixels)])
    height, width = PICTURE
    turns = tuple(image.shape) == (3, width, height)
    if not turns:
        image = turned_upright(image, TURNED)
    expected = turned_upright(pixels, TURNED)
    if image.shape != expected.shape or image.dtype != torch.uint8:
        raise ValueError(f"it makes {tuple(image.shape)} {image.dtype} of a picture")
    distance = float((image.cpu().int() - expected.int()).abs().float().mean())
    if distance > TOLERANCE:
        raise ValueError(f"its pixels are off by {distance:.0f} levels")
    return turns


def _picture() -> Tensor:
    """uint8 `(3, H, W)`: red grows to the right, green downwards."""
    height, width = PICTURE
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[0] = torch.arange(width) * 7
    pixels[1] = torch.arange(height).unsqueeze(1) * 15
    return pixels


def _as_jpeg(pixels: Tensor) -> Tensor:
    from PIL import Image

    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    file = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    return torch.from_numpy(np.frombuffer(file.getvalue(), dtype=np.uint8).copy())
