"""Image files as tensors: each looked at first, then decoded by the library that `trainer.data.decoders` has for it."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.decoders import (
    COLOR,
    GREY,
    decoder,
    grey_of_right_png,
    ignore_warnings_of_pillow,
    whole_files,
)
from trainer.data.image_checks import (
    GIF_START,
    JPEG_START,
    ORIENTATION,
    PNG_START,
    WEBP_KIND,
    WEBP_START,
    Unusable,
    check_size,
    is_common_jpeg,
    jpeg_orientation,
    png_of_pixels,
    png_size,
    png_with_gamma,
    size_from_header,
)
from trainer.data.image_list import JpegFile
from trainer.data.names import printable
from trainer.errors import DataError, data_error, first_line, may_pass

IMAGE_TYPES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
)
# How files begin, and what Pillow calls their kind.
STARTS = {
    JPEG_START + b"\xff": "JPEG",
    PNG_START: "PNG",
    GIF_START: "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
AVIF = (b"ftypavif", b"ftypavis")  # from byte 4 on
# An extended WebP file says in byte 20 what it has besides pixels.
WEBP_EXTENDED = b"VP8X"
WEBP_HAS_EXIF = 0x08  # bits of that byte
WEBP_IS_ANIMATED = 0x02
# What turns a JPEG file upright, by EXIF's orientation: names of Pillow's `Image.Transpose`.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# The modes of PNG files without colour, of which Pillow and libpng make the same grey.
GREY_MODES = ("1", "L", "LA", "I;16")


def decode(
    path: Path,
    channels: int = 3,
    max_pixels: int | None = None,
    short_side: int | None = None,
) -> Tensor:
    """The image file, uint8 `(channels, H, W)`, in colour (3) or grey (1), turned upright by its EXIF data.

    A JPEG file whose shorter side is at least twice `short_side` is decoded at a half, a quarter or an eighth of its
    size, whichever is the smallest that is not below `short_side`.

    Raises `DataError` if it cannot be decoded, is an animation or has more than `max_pixels` pixels. No file, however
    damaged, ends the process.
    """
    with _naming(path):
        data = _read(path)
        size = size_from_header(data.numpy().data)
        check_size(size, max_pixels)
        kind = _kind(data)
        if kind == "JPEG" and _is_shrunk(size, short_side):
            return _decode_by_pillow(data, kind, channels, max_pixels, short_side)
        return _decode_in_full(data, kind, channels, max_pixels)


def read_for_device(path: Path, max_pixels: int | None = None) -> JpegFile | Tensor:
    """A JPEG file of a common kind, not yet decoded; of any other image file what `decode` gives, in colour.

    Raises `DataError` as `decode` does, but for what only decoding can tell of a JPEG file.
    """
    with _naming(path):
        data = _read(path)
        content = data.numpy().data
        size = size_from_header(content)
        check_size(size, max_pixels)
        kind = _kind(data)
        if kind == "JPEG" and size is not None and is_common_jpeg(content):
            width, height = size
            return JpegFile(data, height, width, jpeg_orientation(content))
        return _decode_in_full(data, kind, COLOR, max_pixels)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which file it is that it is of no use."""
    try:
        yield
    except Unusable as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and may_pass(cause):
            raise data_error(
                f"{printable(path)} cannot be read now ({cause})", cause
            ) from None
        raise DataError(f"{printable(path)} {error}") from None


def _read(path: Path) -> Tensor:
    # Not torchvision's `read_file`, which takes no name that is not UTF-8.
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unusable.damaged("it is no regular file")
            return torch.from_numpy(np.fromfile(file, dtype=np.uint8))
    except OSError as error:
        raise Unusable.damaged(error.strerror or str(error)) from error


def _open_at_once(path: str, flags: int) -> int:
    """Also a pipe into which nobody writes, for which `open` would wait."""
    return os.open(path, flags | os.O_NONBLOCK)


def _kind(data: Tensor) -> str:
    """What Pillow calls a file of this kind. Raises `Unusable` for one that is not read."""
    head = data[:12].numpy().tobytes()
    if head[4:12] in AVIF:
        return "AVIF"
    if head[:4] == WEBP_START and head[8:12] == WEBP_KIND:
        return "WEBP"
    for start, kind in STARTS.items():
        if head.startswith(start):
            return kind
    if not head:
        raise Unusable.damaged("it is empty")
    raise Unusable.damaged("it does not begin as an image file of a kind that is read")


def _is_shrunk(size: tuple[int, int] | None, short_side: int | None) -> bool:
    """True for a JPEG file large enough to be decoded at a half of its size, or less."""
    return short_side is not None and size is not None and min(size) >= 2 * short_side


def _decode_in_full(
    data: Tensor, kind: str, channels: int, max_pixels: int | None
) -> Tensor:
    decode_whole = decoder(kind, channels)
    if decode_whole is None or (kind == "WEBP" and _is_for_pillow(data)):
        return _decode_by_pillow(data, kind, channels, max_pixels)
    if kind == "PNG":
        # Nothing but whole chunks that the pixels depend on gets to libpng.
        file = png_of_pixels(data.numpy().data)
        check_size(png_size(file), max_pixels)
        data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    return _as_bytes(decode_whole(data))  # a 16-bit PNG is decoded as uint16


def _as_bytes(image: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import to_dtype

    pixels: Tensor = to_dtype(image, torch.uint8, scale=True)
    return pixels


def _is_for_pillow(data: Tensor) -> bool:
    """True for a WebP file that is an animation, whose images are counted, or turned, which torchvision leaves."""
    head = data[:21].numpy().tobytes()
    if len(head) < 21 or head[12:16] != WEBP_EXTENDED:
        return False
    flags = head[20]
    return bool(
        flags & WEBP_IS_ANIMATED or (flags & WEBP_HAS_EXIF and _is_turned(data))
    )


def _is_turned(data: Tensor) -> bool:
    """Whether a WebP file is to be turned upright."""
    try:
        with _open(io.BytesIO(data.numpy().data), "WEBP") as image:
            return bool(image.getexif().get(ORIENTATION, 1) != 1)
    except Exception:
        # A damaged file, of which the decoder says what is wrong.
        return False


def _decode_by_pillow(
    data: Tensor,
    kind: str,
    channels: int,
    max_pixels: int | None,
    short_side: int | None = None,
) -> Tensor:
    content = data.numpy().data
    file = png_of_pixels(content) if kind == "PNG" else content
    try:
        with whole_files, _open(io.BytesIO(file), kind) as image:
            check_size(image.size, max_pixels)
            images = getattr(image, "n_frames", 1)
            if images > 1:
                raise Unusable.animation(images)
            if kind == "JPEG":
                _set_up_jpeg(image, channels, short_side)
            return _pixels(image, data, channels)
    except Unusable:
        raise
    except Exception as error:
        # Anything: Pillow's decoders raise whatever a damaged file leads to.
        raise Unusable.damaged(first_line(error)) from error


def _open(file: io.BytesIO, kind: str) -> Any:
    """Pillow's image, its pixels not yet decoded. Unlike `Image.open` with no limit but data.max_pixels."""
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    ignore_warnings_of_pillow()
    if kind not in Image.OPEN:
        Image.init()
    # Of several images in one JPEG file, as cameras write them, the first is the photograph.
    open_file = JpegImageFile if kind == "JPEG" else Image.OPEN[kind][0]
    try:
        return open_file(file, "")
    except (SyntaxError, IndexError, TypeError, struct.error):
        # What a reader raises for a file that is not of its kind.
        reason = f"it is damaged, or of a kind of {kind} that this Pillow does not read"
        raise Unusable.damaged(reason) from None


def _set_up_jpeg(image: Any, channels: int, short_side: int | None) -> None:
    """Let libjpeg make the image smaller, if that is asked for, and grey, as other libraries have it do."""
    is_made_grey = channels == GREY and image.mode == "RGB"
    size = image.size if short_side is None else (short_side, short_side)
    image.draft("L" if is_made_grey else image.mode, size)


def _pixels(image: Any, data: Tensor, channels: int) -> Tensor:
    """A PIL image's pixels, uint8 `(channels, H, W)`. Transparency is dropped, as the other libraries do."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    image = _turned_upright(image, data)
    if image.format == "PNG" and channels == 1 and image.mode not in GREY_MODES:
        return _grey_of_png(image, data)
    if image.mode.startswith("I;16"):
        grey = _as_bytes(pil_to_tensor(image).to(torch.uint16))
        return grey.expand(channels, -1, -1).clone()
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, whose range is not that of brightness"
        )
    # Of no use without an alpha channel, and Pillow warns of it.
    image.info.pop("transparency", None)
    mode = "L" if channels == 1 else "RGB"
    of_mode = image if image.mode == mode else image.convert(mode)
    pixels: Tensor = pil_to_tensor(of_mode)
    return pixels


def _turned_upright(image: Any, data: Tensor) -> Any:
    """The PIL image of a file, turned; it is copied only if it is to be turned."""
    from PIL import Image
    from PIL.ImageOps import exif_transpose

    if image.format != "JPEG":
        exif_transpose(image, in_place=True)
        return image
    turn = TURNS.get(jpeg_orientation(data.numpy().data))
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _grey_of_png(image: Any, data: Tensor) -> Tensor:
    """The grey that libpng makes of a PNG file's colours: it heeds the file's gamma, which Pillow does not.

    What decodes it gets a right file, written of what Pillow has decoded.
    """
    image.info.clear()
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=0)
    whole = png_with_gamma(file.getvalue(), data.numpy().data)
    data_of_grey = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    return _as_bytes(grey_of_right_png()(data_of_grey))
