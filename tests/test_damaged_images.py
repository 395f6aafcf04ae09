"""Damaged image files end in a message that names them: never the process, and never in wrong pixels unseen."""

from __future__ import annotations

import os
import random
import re
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from tests.image_damage import (
    damage,
    encode,
    image_files,
    png,
    with_right_checksums,
)
from tests.programs import SERVER
from trainer.data.decoding import decode, read_for_device
from trainer.data.image_checks import is_common_jpeg
from trainer.errors import DataError

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding:DeprecationWarning"
)

# Of each file. For a longer search: LOCKSTEP_IMAGE_DAMAGES=20000 pytest -n0 tests/test_damaged_images.py
DAMAGES = int(os.environ.get("LOCKSTEP_IMAGE_DAMAGES", "120"))
SHORT = 64  # every length below, once
SHORT_SIDE = 8  # to which a JPEG file may be made smaller while it is decoded
MOST_PIXELS = 1_000_000
MOST_SECONDS = 5.0  # of the processor, for one file
MOST_GIB = 1.0  # more than before, for all of them


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tiff", "avif", "gif"])
def test_no_damaged_file_ends_the_process_or_goes_unnamed(
    tmp_path: Path, kind: str
) -> None:
    # Each in a process of its own, which tells what it is about to decode.
    reports, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(
        target=decode_damaged, args=(kind, DAMAGES, tmp_path, sender)
    )
    process.start()
    sender.close()
    report = ""
    try:
        while reports.poll(60):
            report = reports.recv()
    except EOFError:
        process.join()
    process.kill()
    assert (report, process.exitcode) == ("done", 0)


def decode_damaged(kind: str, count: int, folder: Path, reports: Connection) -> None:
    torch.set_num_threads(1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, file in image_files().items():
        if not name.endswith(kind):
            continue
        path = folder / name
        path.write_bytes(file)
        right = {channels: decode(path, channels) for channels in (1, 3)}
        for number in range(count):
            reports.send(f"{name}, damage {number}")
            draws = random.Random(f"{name} {number}")
            is_short = number < SHORT
            damaged = file[:number] if is_short else damage(file, draws)
            sealed = kind == "png" and draws.random() < 0.5
            path.write_bytes(with_right_checksums(damaged) if sealed else damaged)
            channels = draws.choice((1, 3, 3))
            short_side = draws.choice((None, None, SHORT_SIDE))
            start = time.process_time()
            try:
                image = decode(path, channels, MOST_PIXELS, short_side)
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert image.dtype == torch.uint8 and len(image) == channels
                if kind == "png" and not sealed:
                    assert torch.equal(image, right[channels])
            assert time.process_time() - start < MOST_SECONDS
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert growth < MOST_GIB * 2**20  # KiB
    reports.send("done")


@pytest.mark.parametrize("name", sorted(image_files()))
def test_an_image_larger_than_allowed_is_refused_before_it_is_decoded(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(image_files()[name])
    assert decode(path, max_pixels=24 * 40).shape in ((3, 24, 40), (3, 40, 24))
    with pytest.raises(DataError) as caught:
        decode(path, max_pixels=24 * 40 - 1)
    assert str(caught.value) == (
        f"{path} has 40 × 24 pixels, more than data.max_pixels=959; "
        f"set data.max_pixels=960 if there is memory for it, or make the image smaller"
    )


def test_no_memory_is_asked_for_what_a_header_announces(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png((30_000, 30_000, 8, 2, 0), b""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"has 30,000 × 30,000 pixels, more than data"):
        decode(path, max_pixels=100_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 200 * 2**10


GREY, COLOR, PALETTE, GREY_ALPHA, COLOR_ALPHA = 0, 2, 3, 4, 6
VALUES = {GREY: 1, COLOR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOR_ALPHA: 4}
BITS = {GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}


@pytest.mark.parametrize("extra", ["nothing", "gamma", "transparency", "orientation"])
@pytest.mark.parametrize("color_type", VALUES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_png_files_have_the_pixels_that_torchvision_gives(
    tmp_path: Path, color_type: int, extra: str
) -> None:
    draws = np.random.default_rng(0)
    width, height = 37, 19
    for bits in BITS.get(color_type, (8, 16)):
        row = 1 + -(-width * bits * VALUES[color_type] // 8)
        rows = draws.integers(0, 256, (height, row), dtype=np.uint8)
        rows[:, 0] = draws.integers(0, 5, height)  # the filter
        chunks = []
        if color_type == PALETTE:
            # Shorter than the numbers of the pixels.
            palette = draws.integers(0, 256, 3 * (2**bits * 3 // 4), dtype=np.uint8)
            chunks.append((b"PLTE", palette.tobytes()))
        if extra == "gamma":
            chunks.insert(0, (b"gAMA", (45455).to_bytes(4, "big")))
        if extra == "transparency" and color_type in (GREY, COLOR, PALETTE):
            length = {GREY: 2, COLOR: 6, PALETTE: 2}[color_type]
            chunks.append((b"tRNS", bytes([0, 1] * (length // 2))))
        if extra == "orientation":
            tag = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
            exif = b"MM\0*\0\0\0\x08\0\x01" + tag + b"\0\0\0\0"
            chunks.append((b"eXIf", exif))
        file = png((width, height, bits, color_type, 0), rows.tobytes(), *chunks)
        # Of 16 bits Pillow keeps 8 of each colour before they become one grey.
        levels = 8 if bits == 16 and color_type in (COLOR, COLOR_ALPHA) else 0
        assert_decoded_as_by_torchvision(tmp_path / "a.png", file, levels)


@pytest.mark.parametrize("separate", [False, True])
def test_the_still_image_of_an_animated_png_is_decoded(
    tmp_path: Path, separate: bool
) -> None:
    still, other = (Image.new("RGB", (5, 4), color) for color in ("red", "blue"))
    options = {"append_images": [other], "default_image": separate}
    file = encode(still, "PNG", save_all=True, **options)
    assert_decoded_as_by_torchvision(tmp_path / "a.png", file)
    assert decode(tmp_path / "a.png")[:, 0, 0].tolist() == [255, 0, 0]


def assert_decoded_as_by_torchvision(path: Path, file: bytes, levels: int = 0) -> None:
    """With all the same bits in colour, and at most `levels` apart in grey."""
    path.write_bytes(file)
    content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    for channels, mode in ((3, ImageReadMode.RGB), (1, ImageReadMode.GRAY)):
        expected = decode_image(content, mode, apply_exif_orientation=True)
        expected = to_dtype(expected, torch.uint8, scale=True)
        difference = decode(path, channels).int() - expected.int()
        assert difference.abs().max() <= (levels if channels == 1 else 0)


@pytest.mark.parametrize("name", ["a.gif", "lossless.webp", "RGB.jpg", "RGB.png"])
def test_every_kind_gives_one_channel_where_one_is_asked_for(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(image_files()[name])
    assert len(decode(tmp_path / name, 1)) == 1


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    # Somebody who may write keeps a reader from waiting for one.
    writer = os.open(path, os.O_RDWR)
    try:
        for read in (decode, read_for_device):
            with pytest.raises(DataError, match="it is no regular file"):
                read(path)
    finally:
        os.close(writer)


@pytest.mark.parametrize("kind", ["jpg", "bmp", "tiff"])
def test_a_file_that_ends_too_soon_is_refused_in_any_program(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many a program lets Pillow fill in grey, for images of its own."""
    path = tmp_path / f"image.{kind}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match=re.escape(path.name)):
        decode(path, short_side=16)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_jpeg_file_that_ends_within_its_adobe_segment_is_no_common_one() -> None:
    # A segment of 14 bytes, of which the transform is missing.
    data = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00"
    assert not is_common_jpeg(memoryview(data))
