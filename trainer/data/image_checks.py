"""What is asked of an image file before a decoder sees it: whole chunks of a PNG, and a bearable size.

Decoders allocate what a header asks for, so the sizes are read here. Of PNG files, Pillow does not look at the
checksums of the pixels, and torchvision's decoder kills the process where libpng finds an error.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import Literal

from trainer.errors import first_line

PNG_START = b"\x89PNG"
PNG_SIGNATURE = PNG_START + b"\r\n\x1a\n"
# All that the pixels depend on. Pillow would also heed orientations in text chunks and the frames of an animation,
# and refuse long texts and colour profiles; torchvision, whose pixels are the reference, does none of this.
PNG_CHUNKS_OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
PNG_CHUNKS_OF_GAMMA = (b"gAMA", b"sRGB", b"cHRM", b"iCCP")
PNG_HEADER_END = 33  # 8 bytes of signature, 25 of the first chunk
PNG_COLOR_TYPE = 25  # the byte of the file that says what a pixel is
PNG_PALETTE = 3  # pixels are indices into PLTE

JPEG_START = b"\xff\xd8"
# The markers that begin a frame: all from C0 to CF but tables (C4, CC) and an extension (C8).
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# The markers without a length: those of restarts, of the image's start and one that stands for nothing.
JPEG_BARE = frozenset([*range(0xD0, 0xD9), 0x01])

JPEG_COMMON_FRAMES = (0xC0, 0xC2)  # baseline and progressive
JPEG_FRAME_OF_THREE = 15  # bytes of a frame of three channels
# Of the brightness, across and down: the colours have one sample where it has so many.
JPEG_LUMA_SAMPLING = (0x11, 0x12, 0x21, 0x22, 0x41)
JPEG_APP14 = 0xEE  # holds what Adobe says of the colours, in so many bytes
JPEG_ADOBE = 12
ADOBE = b"Adobe"
JPEG_END = b"\xff\xd9"

JPEG_APP1 = 0xE1  # holds EXIF data, or XMP
JPEG_SCAN = 0xDA  # the pixels come next
EXIF_HEADER = 6  # bytes before the data: "Exif" and two zeros
TIFF_MARK = 42  # in bytes 2 and 3 of every TIFF file
TIFF_ENTRY = 12  # bytes
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright

GIF_START = b"GIF8"
WEBP_START = b"RIFF"
WEBP_KIND = b"WEBP"  # from byte 8 on
WEBP_SIDE = 0x3FFF  # 14 bits


class Unusable(Exception):
    """Why a file gives no image. The text goes on from the file's name: "is an animation of 2 images, …"."""

    @classmethod
    def damaged(cls, reason: str) -> Unusable:
        return cls(f"cannot be decoded ({reason}); remove or replace the file")

    @classmethod
    def animation(cls, images: int) -> Unusable:
        return cls(
            f"is an animation of {images} images, not one; remove or replace the file"
        )


def check_size(size: tuple[int, int] | None, max_pixels: int | None) -> None:
    """Raise `Unusable` if an image of `(width, height)` has more than `max_pixels` pixels. None: nothing is known."""
    if size is None or max_pixels is None:
        return
    width, height = size
    if width * height > max_pixels:
        raise Unusable(
            f"has {width:,} × {height:,} pixels, more than data.max_pixels={max_pixels:,}; "
            f"set data.max_pixels={width * height} if there is memory for it, or make the image smaller"
        )


def size_from_header(data: memoryview) -> tuple[int, int] | None:
    """`(width, height)` of a JPEG, WebP or GIF file; None if the header does not say.

    Raises `Unusable` for a GIF file that is damaged or an animation.
    """
    if data[:2] == JPEG_START:
        return _jpeg_size(data)
    if data[:4] == WEBP_START and data[8:12] == WEBP_KIND:
        return _webp_size(data)
    if data[:4] == GIF_START:
        return _gif_size(data)
    return None


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    for marker, start, _ in _jpeg_segments(data):
        # A frame begins with a byte for its precision, and two each for height and width.
        if marker in JPEG_FRAMES and start + 5 <= len(data):
            height = _big_endian(data, start + 1, 2)
            width = _big_endian(data, start + 3, 2)
            return width, height
    return None


def _big_endian(data: memoryview | bytes, start: int, length: int) -> int:
    return int.from_bytes(data[start : start + length], "big")


def _little_endian(data: memoryview, start: int, length: int) -> int:
    return int.from_bytes(data[start : start + length], "little")


def _jpeg_segments(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """The marker of each segment with a length, and where its content begins and ends."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:
            position += 1  # bytes between segments, which decoders skip
        elif marker in JPEG_BARE:
            position += 2
        else:
            # The length counts its own two bytes, and not those of the marker.
            length = _big_endian(data, position + 2, 2)
            start = position + 4
            position += 2 + length
            yield marker, start, position


def jpeg_orientation(data: memoryview) -> int:
    """How a JPEG file is turned, by EXIF in its first APP1 segment; 1 is upright.

    No other segment is looked at, nor XMP: TorchCodec and torchvision do neither.
    """
    for marker, start, end in _jpeg_segments(data):
        if marker == JPEG_SCAN:
            break
        if marker == JPEG_APP1:
            return _exif_orientation(data[start + EXIF_HEADER : end])
    return 1


def is_common_jpeg(data: memoryview) -> bool:
    """True for a JPEG file of the kind that any decoder knows: 8 bits, YCbCr, baseline or progressive, and with an end.

    Others are decoded by the CPU's libraries: grey and CMYK ones, those of rare sampling, those cut short.
    """
    is_common = False
    for marker, start, end in _jpeg_segments(data):
        content = data[start:end]
        if marker in JPEG_FRAMES:
            is_common_kind = marker in JPEG_COMMON_FRAMES
            is_common = is_common_kind and _is_common_frame(content)
        elif marker == JPEG_APP14 and content[:5] == ADOBE:
            # The transform, without which the three channels are RGB.
            has_transform = len(content) >= JPEG_ADOBE
            if not has_transform or content[JPEG_ADOBE - 1] != 1:
                return False
        elif marker == JPEG_SCAN:
            has_end = JPEG_END in bytes(data[end:])
            return is_common and has_end
    return False


def _is_common_frame(frame: memoryview) -> bool:
    """Of the content of a frame's segment: precision, height, width, and three bytes for each channel."""
    if len(frame) != JPEG_FRAME_OF_THREE or frame[0] != 8 or frame[5] != 3:
        return False
    channels = frame[6:]
    names = list(channels[0::3])
    # The factor across in the upper half of a byte, that of height in the lower.
    luma, blue, red = channels[1::3]
    is_common_sampling = luma in JPEG_LUMA_SAMPLING and blue == red == 0x11
    return names == [1, 2, 3] and is_common_sampling


def _exif_orientation(data: memoryview) -> int:
    """The orientation in EXIF data, which is a TIFF file; 1 where there is none."""
    start_of_file = bytes(data[:2])
    order: Literal["little", "big"] = "little" if start_of_file == b"II" else "big"

    def number(start: int, length: int) -> int:
        return int.from_bytes(data[start : start + length], order)

    if start_of_file not in (b"II", b"MM") or number(2, 2) != TIFF_MARK:
        return 1
    table = number(4, 4)
    entries = number(table, 2)
    for entry in range(entries):
        start = table + 2 + entry * TIFF_ENTRY
        if start + TIFF_ENTRY > len(data):
            break
        if number(start, 2) == ORIENTATION:
            # After the tag: its type in 2 bytes, its count in 4.
            return number(start + 8, 2)
    return 1


def _webp_size(data: memoryview) -> tuple[int, int] | None:
    # Up to where the longest of the three headers below has its size.
    if len(data) < 30:
        return None
    match bytes(data[12:16]):
        # Extended, lossless, lossy: 24, 14 and 14 bits for each side, the first two less one.
        case b"VP8X":
            width = _little_endian(data, 24, 3) + 1
            height = _little_endian(data, 27, 3) + 1
        case b"VP8L":
            bits = _little_endian(data, 21, 4)
            width = (bits & WEBP_SIDE) + 1
            height = (bits >> 14 & WEBP_SIDE) + 1
        case b"VP8 ":
            width = _little_endian(data, 26, 2) & WEBP_SIDE
            height = _little_endian(data, 28, 2) & WEBP_SIDE
        case _:
            return None
    return width, height


def _gif_size(data: memoryview) -> tuple[int, int]:
    """By Pillow, for an image may be larger than the canvas that the header announces, and many may follow."""
    from PIL.GifImagePlugin import GifImageFile

    try:
        image = GifImageFile(io.BytesIO(data))
        with image:
            size, images = image.size, image.n_frames
    except Exception as error:
        # Anything: see `_decode_by_pillow`.
        raise Unusable.damaged(first_line(error)) from error
    if images > 1:
        raise Unusable.animation(images)
    return size


def png_size(file: bytes) -> tuple[int, int]:
    """`(width, height)` of a PNG file that `png_of_pixels` gave. Raises `Unusable` unless it begins with its header."""
    if file[12:16] != b"IHDR" or len(file) < PNG_HEADER_END:
        raise Unusable.damaged("its first chunk is not IHDR")
    width = _big_endian(file, 16, 4)
    height = _big_endian(file, 20, 4)
    return width, height


def png_of_pixels(data: memoryview) -> bytes:
    """The PNG file with all that its pixels depend on and nothing else.

    Raises `Unusable` if any chunk is cut short or its checksum is wrong.
    """
    if data[:8] != PNG_SIGNATURE:
        raise Unusable.damaged("its first bytes are not those of a PNG file")
    parts: list[bytes | memoryview] = [PNG_SIGNATURE]
    kinds = set()
    for kind, chunk in _png_chunks(data):
        # Of an orientation after the pixels torchvision knows nothing.
        is_orientation = kind == b"eXIf" and b"IDAT" not in kinds
        if kind in PNG_CHUNKS_OF_PIXELS or is_orientation:
            parts.append(chunk)
            kinds.add(kind)
    needed = [b"IHDR", b"IDAT"]
    if len(data) > PNG_COLOR_TYPE and data[PNG_COLOR_TYPE] == PNG_PALETTE:
        needed.append(b"PLTE")
    for kind in needed:
        if kind not in kinds:
            raise Unusable.damaged(f"it has no {kind.decode()} chunk")
    parts.append(b"\0\0\0\0IEND\xae\x42\x60\x82")
    return b"".join(parts)


def png_with_gamma(image: bytes, source: memoryview) -> bytes:
    """A PNG `image` that has none, with the gamma of another PNG file."""
    gamma = []
    for kind, chunk in _png_chunks(source):
        if kind == b"IDAT":
            break
        if kind in PNG_CHUNKS_OF_GAMMA:
            gamma.append(chunk)
    header, rest = image[:PNG_HEADER_END], image[PNG_HEADER_END:]
    return b"".join([header, *gamma, rest])


def _png_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The type of each chunk before the end mark, and the chunk with its length and checksum."""
    start = len(PNG_SIGNATURE)
    # Besides its data, a chunk has 4 bytes each for its length, its type and its checksum.
    while start + 12 <= len(data):
        end = start + 12 + _big_endian(data, start, 4)
        if end > len(data):
            raise Unusable.damaged("it is cut short")
        # Of type and data, not of the length.
        checked = data[start + 4 : end - 4]
        if zlib.crc32(checked) != _big_endian(data, end - 4, 4):
            raise Unusable.damaged("a checksum in it is wrong")
        kind = bytes(checked[:4])
        if kind == b"IEND":
            return
        yield kind, data[start:end]
        start = end
