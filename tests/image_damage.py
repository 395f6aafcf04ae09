"""Image files of every kind that is read, and ways to damage them."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

PNG_HEAD = 8  # bytes of a PNG's signature


def image_files() -> dict[str, bytes]:
    """Small right files by name, whose ending is their kind."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    # Partly smooth, so that lossy kinds have something to keep.
    pixels[..., 0] = np.arange(40) * 6
    image = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {}
    for mode in ("RGB", "RGBA", "P", "L", "1"):
        files[f"{mode}.png"] = encode(image.convert(mode), "PNG")
    files["16_bits.png"] = encode(
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"
    )
    files["turned.png"] = encode(image, "PNG", exif=turned)
    for mode in ("RGB", "CMYK"):
        files[f"{mode}.jpg"] = encode(image.convert(mode), "JPEG", exif=turned)
    files["progressive.jpg"] = encode(image, "JPEG", progressive=True)
    files["lossy.webp"] = encode(image, "WEBP")
    files["lossless.webp"] = encode(image.convert("RGBA"), "WEBP", lossless=True)
    files["turned.webp"] = encode(image, "WEBP", exif=turned)
    files["a.bmp"] = encode(image, "BMP")
    files["palette.bmp"] = encode(image.convert("P"), "BMP")
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_deflate"):
        files[f"{compression}.tiff"] = encode(image, "TIFF", compression=compression)
    files["fax.tiff"] = encode(image.convert("1"), "TIFF", compression="group4")
    files["a.avif"] = encode(image, "AVIF", exif=turned)
    files["a.gif"] = encode(image.convert("P"), "GIF")
    return files


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(
    header: tuple[int, int, int, int, int], rows: bytes, *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG file of a `header` (width, height, bits, colour type, interlacing), filtered `rows` and `extra` chunks."""
    width, height, bits, color_type, interlacing = header
    chunks = [
        (
            b"IHDR",
            struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, interlacing),
        ),
        *extra,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        file += struct.pack(">I", len(content)) + kind + content
        file += struct.pack(">I", checksum)
    return file


def damage(file: bytes, draws: random.Random) -> bytes:
    """The file cut short, with bytes lost or overwritten, or with some bits flipped, half the time in its header."""
    content = bytearray(file)
    way = draws.choice(("cut", "lost", "overwritten", "bits", "bits", "bits"))
    if way == "cut":
        return bytes(content[: draws.randrange(len(content))])
    last = 64 if draws.random() < 0.5 else len(content)
    if way == "bits":
        for _ in range(draws.choice((1, 1, 1, 2, 8))):
            content[draws.randrange(last)] ^= 1 << draws.randrange(8)
        return bytes(content)
    start = draws.randrange(last)
    end = start + draws.randrange(1, 9)
    replacement = b""
    if way == "overwritten":
        replacement = draws.choice((b"\0", b"\xff")) * len(content[start:end])
    content[start:end] = replacement
    return bytes(content)


def with_right_checksums(file: bytes) -> bytes:
    """A PNG file in which each chunk's checksum is made to fit, as a program at fault would write it."""
    content = bytearray(file)
    start = PNG_HEAD
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if end > len(content):
            break
        checksum = zlib.crc32(content[start + 4 : end - 4])
        content[end - 4 : end] = checksum.to_bytes(4, "big")
        start = end
    return bytes(content)
