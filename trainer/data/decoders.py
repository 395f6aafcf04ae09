"""The libraries that decode image files: TorchCodec where it is there, else torchvision, else Pillow.

Each is asked only for what all of them give bit for bit (`tests/test_decoders.py` compares them), so no run depends on
which of them a machine has. `trainer.data.decoding` looks at a file before it gets here.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from trainer.data.image_checks import Unusable
from trainer.errors import first_line

COLOR, GREY = 3, 1  # channels
Decode = Callable[[Tensor], Tensor]
DecodeFiles = Callable[[list[Tensor]], list[Tensor]]
PILLOWS_MODULES = re.compile(r"PIL\.")

# What each library decodes here, by kind and channels; Pillow decodes the rest.
# TorchCodec decodes AVIF files, too, but tells their size only by decoding them.
BY_TORCHCODEC = {
    ("JPEG", COLOR),
    ("JPEG", GREY),
    ("PNG", COLOR),
    ("WEBP", COLOR),
    ("GIF", COLOR),
}
# Where libpng finds an error in a file, torchvision ends the process, so it gets none but right PNG files.
BY_TORCHVISION = BY_TORCHCODEC - {("PNG", COLOR)}


@cache
def decoder(kind: str, channels: int) -> Decode | None:
    """What decodes a whole file of `kind`, uint8 `(bytes,)`, to uint8 or uint16 `(channels, H, W)`; None: Pillow does.

    It raises `Unusable` for a damaged file.
    """
    wanted = kind, channels
    if wanted in BY_TORCHCODEC and _torchcodec() is not None:
        return _with_torchcodec(kind, channels)
    if wanted in BY_TORCHVISION:
        return _with_torchvision(channels)
    return None


@cache
def grey_of_right_png() -> Decode:
    """What makes grey of a PNG file's colours by its gamma, as libpng does. The file must be right.

    Raises `Unusable` where no library does it.
    """
    by_torchvision = _with_torchvision(GREY)
    if _torchcodec() is not None:
        return _with_torchcodec("PNG", GREY)
    if by_torchvision is not None:
        return by_torchvision
    raise Unusable(
        "is a PNG file in colour, made grey by TorchCodec; install torchcodec"
    )


def cuda_decoders(device: torch.device) -> list[tuple[str, DecodeFiles]]:
    """What may decode several JPEG files in colour on a GPU, and its package. Whether it does is to be tried."""
    found: list[tuple[str, DecodeFiles]] = []
    torchcodec = _torchcodec()
    if torchcodec is not None:
        decode = partial(torchcodec.decode_jpeg, mode="RGB", device=device)
        found.append(("torchcodec", decode))
    if _torchvision() is not None and hasattr(torch.ops.image, "decode_jpegs_cuda"):
        operator = torch.ops.image.decode_jpegs_cuda
        found.append(("torchvision", lambda files: operator(files, COLOR, device)))
    return found


@cache
def decoder_name() -> str:
    """The library that decodes JPEG files here, for the record of what a run was trained with."""
    if _torchcodec() is not None:
        return "torchcodec"
    return "pillow" if _torchvision() is None else "torchvision"


def ignore_warnings_of_pillow() -> None:
    """Let Pillow say nothing of files that it decodes, such as that their EXIF data have an end too soon.

    Nothing is wrong with the pixels then. Each loader process would say it anew, and with `python -W error` the image
    would be taken for a damaged one. Not by `catch_warnings`, which threads that decode would take from one another.
    """
    if not any(entry[3] == PILLOWS_MODULES for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=PILLOWS_MODULES.pattern)


class _WholeFiles:
    """A context in which Pillow refuses a file that ends too soon, also where the program has it fill in grey.

    `ImageFile.LOAD_TRUNCATED_IMAGES` belongs to the process, and the program's own images may need it. Several threads
    may be within the context: the last to leave puts the setting back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._before = False

    def __enter__(self) -> None:
        from PIL import ImageFile

        with self._lock:
            if not self._threads:
                self._before = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        from PIL import ImageFile

        with self._lock:
            self._threads -= 1
            if not self._threads:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


whole_files = _WholeFiles()


@cache
def _torchcodec() -> Any:
    """TorchCodec's decoders; None where it is not installed, before 0.16, or made for another torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchcodec import decoders
    except (ImportError, OSError, RuntimeError, AttributeError):
        # All but the first from a library that does not load: its wheels for CUDA need a torch for CUDA.
        return None
    return decoders if hasattr(decoders, "decode_jpeg") else None


def _with_torchcodec(kind: str, channels: int) -> Decode:
    decode_kind = getattr(_torchcodec(), f"decode_{kind.lower()}")
    options: dict[str, Any] = {"mode": "RGB" if channels == COLOR else "GRAY"}
    if kind == "PNG":
        # 16 bits are brought to 8 in one place for all libraries, for they round differently.
        options["output_dtype"] = "auto"
    return _naming_damage(lambda data: decode_kind(data, **options))


@cache
def _torchvision() -> Any:
    """torchvision's operator for image files; None where it was built without, or has it no more."""
    try:
        import torchvision.io  # noqa: F401 -- which registers it

        return torch.ops.image.decode_image
    except (ImportError, AttributeError, RuntimeError):
        return None


def _with_torchvision(channels: int) -> Decode | None:
    # Not `torchvision.io.decode_image`, which since 0.29 warns in every call that TorchCodec takes its place: here it
    # does, where it is installed.
    operator = _torchvision()
    if operator is None:
        return None
    return _naming_damage(lambda data: operator(data, channels, True))


def _naming_damage(decode: Decode) -> Decode:
    def decode_or_name(data: Tensor) -> Tensor:
        try:
            return decode(data)
        except (RuntimeError, ValueError) as error:
            # Without the library's own file and line.
            reason = re.sub(r"^.*\.cpp:\d+, ", "", first_line(error))
            raise Unusable.damaged(reason) from error

    return decode_or_name
