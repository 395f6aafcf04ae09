"""Every library that decodes image files gives the same pixels, and which of them is there matters to no run."""

from __future__ import annotations

import io
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.image_damage import encode, image_files
from trainer.data import decoders
from trainer.data.decoding import decode
from trainer.errors import DataError

LIBRARIES = ["torchcodec", "torchvision", "pillow"]
FILES = image_files()


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Each test asks anew which libraries there are."""
    forget()
    yield
    forget()


def forget() -> None:
    for function in (
        decoders.decoder,
        decoders.decoder_name,
        decoders.grey_of_right_png,
        decoders._torchcodec,
        decoders._torchvision,
    ):
        getattr(function, "cache_clear", lambda: None)()


def leave(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `library` be the best one that is there."""
    if library == "torchcodec":
        if decoders._torchcodec() is None:
            pytest.skip("torchcodec is not installed")
        return
    monkeypatch.setattr(decoders, "_torchcodec", lambda: None)
    if library == "pillow":
        monkeypatch.setattr(decoders, "_torchvision", lambda: None)
    elif decoders._torchvision() is None:
        pytest.skip("torchvision decodes no images")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    leave(request.param, monkeypatch)
    return str(request.param)


def pixels_by_pillow(file: bytes, channels: int) -> torch.Tensor:
    """The pixels of a file, by a few lines of Pillow's own; of JPEG files in grey, libjpeg's own."""
    with Image.open(io.BytesIO(file)) as image:
        if channels == 1 and image.format == "JPEG" and image.mode == "RGB":
            image.draft("L", image.size)
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    array = np.array(upright.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_library_gives_the_same_pixels_and_no_warning(
    tmp_path: Path, library: str, channels: int
) -> None:
    assert decoders.decoder_name() == library
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, file in FILES.items():
            is_grey_of_colors = channels == 1 and name in (
                "RGB.png",
                "RGBA.png",
                "P.png",
                "turned.png",
            )
            if is_grey_of_colors and library == "pillow":
                continue  # Pillow does not heed gamma
            (tmp_path / name).write_bytes(file)
            image = decode(tmp_path / name, channels)
            if is_grey_of_colors:
                continue  # compared with libpng's in test_damaged_images.py
            assert torch.equal(image, pixels_by_pillow(file, channels)), name


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_what_pillow_warns_of_is_no_damage(
    tmp_path: Path, library: str, kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description that lies at the end, of which the last is missing"
    path = tmp_path / "short"
    path.write_bytes(encode(smooth(40, 24), kind, exif=exif.tobytes()[:-50]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = decode(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(path), image)
    assert not said


def smooth(width: int, height: int) -> Image.Image:
    across = np.linspace(0, 255, width)
    down = np.linspace(0, 255, height)[:, None]
    planes = np.broadcast_arrays(across, down, (across + down) / 2)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def segment(content: bytes) -> bytes:
    """An APP1 segment of a JPEG file."""
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content


def with_segments(*contents: bytes) -> bytes:
    file = encode(smooth(40, 24), "JPEG")
    return file[:2] + b"".join(map(segment, contents)) + file[2:]


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


XMP = (
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description "
    b'tiff:Orientation="6"/></x:xmpmeta>'
)
# Orientations that Pillow by itself would see, and those that damage it.
JPEG_FILES = {
    **{f"turned {turn}": with_segments(exif(turn)) for turn in range(10)},
    "XMP alone": with_segments(XMP),
    "XMP, then EXIF": with_segments(XMP, exif(6)),
    "EXIF, then XMP": with_segments(exif(3), XMP),
    "no EXIF in it": with_segments(b"Exif\0\0nothing of the kind"),
    "EXIF cut short": with_segments(exif(6)[:-9]),
    "EXIF of one byte": with_segments(b"E"),
    "two images": encode(
        smooth(40, 24), "MPO", save_all=True, append_images=[smooth(40, 24)]
    ),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", JPEG_FILES)
def test_each_library_turns_a_jpeg_as_the_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG_FILES[name])
    images = {}
    libraries = ["pillow", *(["torchvision"] if decoders._torchvision() else [])]
    for library in [*libraries, *(["torchcodec"] if decoders._torchcodec() else [])]:
        with monkeypatch.context() as changes:
            forget()
            leave(library, changes)
            images[library] = decode(path)
            # What is made smaller goes to Pillow.
            shape = decode(path, short_side=12).shape
            assert shape[1:] == tuple(side // 2 for side in images[library].shape[1:])
        forget()
    assert all(torch.equal(image, images["pillow"]) for image in images.values())


def test_grey_of_a_colour_png_without_a_library_for_it_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave("pillow", monkeypatch)
    (tmp_path / "a.png").write_bytes(FILES["RGB.png"])
    with pytest.raises(DataError, match=r"a\.png is .* install torchcodec"):
        decode(tmp_path / "a.png", 1)


def raise_at_import(error: Exception) -> Any:
    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("torchcodec"):
                raise error

    return Finder()


@pytest.mark.parametrize(
    "unfit",
    [
        ImportError("No module named torchcodec"),
        OSError("libcudart.so.13: cannot open shared object file"),
        RuntimeError("Could not load libtorchcodec"),
        "an earlier version",
    ],
    ids=str,
)
def test_a_torchcodec_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfit: Exception | str
) -> None:
    for name in [name for name in sys.modules if name.startswith("torchcodec")]:
        monkeypatch.delitem(sys.modules, name)
    if isinstance(unfit, Exception):
        monkeypatch.setattr(sys, "meta_path", [raise_at_import(unfit), *sys.meta_path])
    else:
        package, module = types.ModuleType("torchcodec"), types.ModuleType("decoders")
        package.decoders = module  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchcodec", package)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    assert decoders.decoder_name() in ("torchvision", "pillow")
    (tmp_path / "a.jpg").write_bytes(FILES["RGB.jpg"])
    assert torch.equal(
        decode(tmp_path / "a.jpg"), pixels_by_pillow(FILES["RGB.jpg"], 3)
    )


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((640, 480), None, (640, 480)),
        ((640, 480), 241, (640, 480)),  # a half would be less
        ((640, 480), 240, (320, 240)),
        ((641, 483), 240, (321, 242)),
        ((640, 480), 121, (320, 240)),
        ((640, 480), 64, (160, 120)),
        ((640, 480), 60, (80, 60)),
        ((480, 640), 1, (60, 80)),  # an eighth is the least
    ],
)
def test_a_jpeg_is_made_smaller_and_never_below_the_short_side(
    tmp_path: Path,
    size: tuple[int, int],
    short_side: int | None,
    expected: tuple[int, int],
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(smooth(*size), "JPEG", quality=95))
    image = decode(path, short_side=short_side)
    assert image.shape == (3, expected[1], expected[0])
    # Of a smooth image, whatever makes it smaller gives nearly the same.
    smaller = np.asarray(smooth(*expected)).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - smaller).mean() < 3


def test_what_is_made_smaller_is_turned_upright_and_of_the_asked_channels(
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    for mode in ("RGB", "CMYK", "L"):
        path.write_bytes(encode(smooth(64, 48).convert(mode), "JPEG", exif=exif))
        assert decode(path, 1, short_side=20).shape == (1, 32, 24)
        color = decode(path, 3, short_side=20)
        assert color.shape == (3, 32, 24)
        if mode == "RGB":
            # Its left side, which is dark, is on top.
            assert color[0, 0].float().mean() < 40
            assert color[0, -1].float().mean() > 200
    other = tmp_path / "a.png"
    other.write_bytes(encode(smooth(64, 48), "PNG"))
    assert decode(other, short_side=20).shape == (3, 48, 64)


def test_the_pixel_limit_is_that_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(smooth(64, 48), "JPEG"))
    with pytest.raises(
        DataError, match=r"has 64 × 48 pixels, more than data\.max_pixels=3,000"
    ):
        decode(path, max_pixels=3000, short_side=8)
