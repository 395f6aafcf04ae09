"""`data.decode=device`: which files the device is given, what is refused by name, what a run says of its decoder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ImageOps import exif_transpose
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from tests import device_decoders
from tests.device_decoders import device_that_decodes
from tests.distributed.small import config, header_of
from tests.distributed.test_device_decoding import BATCH_TRANSFORMS, make_images
from tests.distributed.test_on_device import Pictures
from tests.image_damage import encode
from trainer import ConfigError, DataError, Predictor, Trainer
from trainer.commands import evaluate
from trainer.core.decoding_notes import DecodingNotes
from trainer.core.preflight import check_ranks
from trainer.data.batches import MicroBatch, Request
from trainer.data.decoding import decode, read_for_device
from trainer.data.device_decoders import FileDecoder, file_decoder, try_out
from trainer.data.device_decoding import DecodedImages
from trainer.data.image_list import JpegFile, turned_upright
from trainer.errors import LockstepError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
RIGHT = encode(PICTURE, "JPEG")
FILES = {
    "444": (encode(PICTURE, "JPEG", subsampling=0), True),
    "422": (encode(PICTURE, "JPEG", subsampling=1), True),
    "420": (encode(PICTURE, "JPEG", subsampling=2), True),
    "progressive": (encode(PICTURE, "JPEG", progressive=True), True),
    "with more behind its end": (RIGHT + b"more", True),
    "grey": (encode(PICTURE.convert("L"), "JPEG"), False),
    "CMYK": (encode(PICTURE.convert("CMYK"), "JPEG"), False),
    "RGB": (encode(PICTURE, "JPEG", keep_rgb=True), False),
    "PNG": (encode(PICTURE, "PNG"), False),
    "GIF": (encode(PICTURE, "GIF"), False),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_images(root)
    return root


def make(root: Path, directory: Path, **changes: Any) -> Trainer:
    keys = {
        "data__name": "folder",
        "data__root": str(root / "images"),
        "data__decode": "device",
        "data__batch_transforms": BATCH_TRANSFORMS,
        "data__val_transforms": [{"name": "Resize", "size": [12, 12]}],
        "run__resume": "auto",
        "batch__size": 8,
    }
    return Trainer(config(directory, **(keys | changes)))


@pytest.mark.parametrize("name", FILES)
def test_the_device_is_given_common_jpeg_files(tmp_path: Path, name: str) -> None:
    content, is_common = FILES[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    image = read_for_device(path)
    assert isinstance(image, JpegFile) == is_common
    if isinstance(image, JpegFile):
        assert image.data.numpy().tobytes() == content
        assert (image.height, image.width) == (24, 40)
    else:
        assert torch.equal(image, decode(path))


@pytest.mark.parametrize("content", [b"", RIGHT[:100], b"\xff\xd8\xff\xd9", b"text"])
def test_a_bad_file_is_what_it_is_on_the_cpu(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    errors = []
    for read in (decode, read_for_device):
        with pytest.raises(DataError) as error:
            read(path)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    path.write_bytes(RIGHT)
    with pytest.raises(DataError, match=r"data\.max_pixels=100"):
        read_for_device(path, max_pixels=100)


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(io.BytesIO(encode(PICTURE, "PNG", exif=exif))) as image:
        expected = pil_to_tensor(exif_transpose(image))
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert torch.equal(turned_upright(pixels, orientation), expected)


def test_a_decoder_is_tried_on_a_picture() -> None:
    def swapped(files: list[Tensor]) -> list[Tensor]:
        return [image.flip(0) for image in device_decoders.decode(files)]

    def turning(files: list[Tensor]) -> list[Tensor]:
        return [turned_upright(image, 6) for image in device_decoders.decode(files)]

    assert not try_out(device_decoders.decode)
    assert try_out(turning)
    with pytest.raises(ValueError, match="off by"):
        try_out(swapped)


def test_where_nothing_decodes_it_is_said_why() -> None:
    def broken(files: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("built without nvJPEG\nand more")

    with pytest.raises(ConfigError, match=r"this run is on cpu; set data\.decode=cpu"):
        file_decoder(torch.device("cpu"))
    found: list[tuple[str, Callable[..., Any]]] = [("torchcodec", broken)]
    with (
        patch("torch.version.cuda", "13.0"),
        patch("trainer.data.device_decoders.device_name", lambda device: "H"),
        patch("trainer.data.device_decoders.cuda_decoders", lambda device: found),
    ):
        with pytest.raises(ConfigError, match=r"\(torchcodec: built without nvJPEG\)"):
            file_decoder(torch.device("cuda", 0))
        # The next one is tried.
        found.append(("torchvision", device_decoders.decode))
        decoder = file_decoder(torch.device("cuda", 0))
    assert decoder.name.startswith("nvJPEG on H (torchvision ")
    assert not decoder.turns


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data__train_transforms": [{"name": "RandomHorizontalFlip"}]}, "train_tr"),
        ({"data__batch_transforms": []}, "decode: device gives images of several"),
        ({"data__batch_transforms": BATCH_TRANSFORMS[1:]}, "RandomResizedCrop"),
        ({"data__on_device": True}, "on_device"),
        ({"data__cache": 1.0}, "cache"),
        ({"data__decode_short_side": 100}, "decode_short_side"),
        ({"data__short_side": 100}, "short_side"),
        ({"data__collate": "lists"}, "collate"),
        ({"data__name": "digits", "data__root": None}, "decode: device decodes"),
        ({"data__decode": "gpu"}, "decode"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused_by_name(
    root: Path, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    with device_that_decodes(), pytest.raises(ConfigError) as error:
        make(root, tmp_path, **changes)
    assert f"data.{key}" in str(error.value) or f" {key}" in str(error.value)


def test_a_run_says_what_decoded_its_images(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with device_that_decodes():
        trainer = make(root, tmp_path, train__stop_after=1)
        assert (
            "a stand-in; others on the CPU" in header_of(trainer, tmp_path)["decoding"]
        )
        trainer.fit()
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["device_decoder"] == device_decoders.NAME
    another = FileDecoder("another", device_decoders.decode, turns=False)
    with device_that_decodes(lambda device: another):
        make(root, tmp_path).fit()
    assert (
        "decoded by a stand-in before, and are by another now"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"data\.decode"):
        make(root, tmp_path, data__decode="cpu").fit()

    # What is evaluated and predicted is decoded by the CPU, so no device is needed.
    evaluate.main([str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    values = [line.split() for line in lines if "(logged as" in line]
    assert values
    for _, value, _, _, logged in values:
        assert value == logged.removesuffix(")")
    files = sorted((root / "images/val/light").iterdir())
    assert len(list(Predictor(tmp_path / "run").predict(files))) == len(files)


def test_what_the_device_cannot_decode_the_cpu_does(root: Path, tmp_path: Path) -> None:
    with device_that_decodes():
        run = make(root, tmp_path).run
    paths = run.data.train.paths  # type: ignore[attr-defined]
    ids = [i for i, path in enumerate(paths) if "1.jpg" in path or "progr" in path]
    calls = []

    def watched(files: list[Tensor]) -> list[Tensor]:
        calls.append(len(files))
        return [image // 2 for image in device_decoders.decode(files)]

    decoder = FileDecoder("watched", watched, turns=False)
    with device_that_decodes(lambda device: decoder):
        loader = make(root, tmp_path).run.train_loader
        calls.clear()
        batch = loader.load_here(Request(0, 0, np.array(ids)))
    assert isinstance(batch, MicroBatch)
    assert calls == [len(ids), *[1] * len(ids)]
    for sample_id, image in zip(ids, batch.inputs.images, strict=True):
        whole, _ = run.data.train[sample_id]
        expected = whole if "progr" in paths[sample_id] else whole // 2
        assert torch.equal(image, expected)


def test_an_epoch_says_how_many_images_the_device_did_not_decode(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with device_that_decodes():
        trainer = make(root, tmp_path, train__epochs=2, batch_norm__recalibrate=2)
        trainer.fit()
    lines = " ".join(capsys.readouterr().out.split())
    # Of each class a grey JPEG file and a PNG file, and a progressive one. The second epoch's line would be the same.
    assert lines.count("the device did not decode") == 1
    assert (
        "epoch 1: of 26 images the device did not decode 6: 4 are of kinds that it is not given, 2 are JPEG files that"
        in lines
    )


def test_a_note_is_of_all_ranks_and_only_where_it_is_news() -> None:
    of_rank = {0: DecodedImages(20, 0, 0), 1: DecodedImages(20, 3, 1)}
    of_rank[2] = of_rank[4] = DecodedImages(19, 3, 1)
    of_rank[3] = DecodedImages(20, 0, 2)
    decoding = SimpleNamespace(take_decoded=of_rank.__getitem__)
    loader = SimpleNamespace(
        dataset=SimpleNamespace(reads_files=True), train_decoding=decoding
    )
    ranks = SimpleNamespace(gather=lambda items: items * 3)
    run: Any = SimpleNamespace(ranks=ranks, train_loader=loader)
    notes = DecodingNotes(run)
    found = [notes.take_note(epoch) for epoch in range(5)]
    assert not found[0] and not found[2]
    assert "epoch 2: of 60 images the device did not decode 12: 9 " in found[1]
    assert "epoch 4: of 60 images the device did not decode 6: 6 are JPEG" in found[3]
    assert "epoch 5: of 57 images the device did not decode 12" in found[4]
    loader.dataset.reads_files = False
    assert not notes.take_note(1)


@pytest.mark.parametrize("decoding", ["cpu", "device"])
def test_ranks_must_have_the_same_decoder(tmp_path: Path, decoding: str) -> None:
    class TwoRanks:
        device = torch.device("cpu")
        machines = ("here", "there")
        rank = 0

        def barrier(self) -> None: ...

        def gather(self, facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [*facts, {**facts[0], "torchcodec": "0.15.9"}]

    settings = config(tmp_path, data__decode=decoding)
    if decoding == "cpu":  # all versions decode alike
        assert len(check_ranks(settings, TwoRanks())) == 2  # type: ignore[arg-type]
        return
    with pytest.raises(LockstepError, match=r"torchcodec is 0\.15\.9 on rank 1"):
        check_ranks(settings, TwoRanks())  # type: ignore[arg-type]


def test_a_damaged_file_ends_the_run_by_name(root: Path, tmp_path: Path) -> None:
    changes = {"data__root": str(root / "bad"), "train__log_every": 1}
    with (
        device_that_decodes(),
        pytest.raises(DataError, match=r"light/(cut|no_t|text)"),
    ):
        make(root, tmp_path, **changes).fit()


def test_images_of_several_sizes_of_any_data_set_are_cropped_there(
    tmp_path: Path,
) -> None:
    keys = {
        "batch__size": 12,
        "data__val_transforms": [{"name": "Resize", "size": [8, 8]}],
    }
    crop = [{"name": "RandomResizedCrop", "size": 8}]
    trainer = Trainer(
        config(tmp_path, data__batch_transforms=crop, model__width=2, **keys),
        train_data=Pictures(30),
        val_data=Pictures(9),
    )
    loader = trainer.run.train_loader
    together = loader.peek(range(12)).inputs
    for sample_id in range(12):
        alone = loader.peek([sample_id]).inputs
        assert torch.equal(together[sample_id], alone[0])
    with pytest.raises(ConfigError, match=r"data\.decode: device decodes the image"):
        Trainer(
            config(
                tmp_path, data__batch_transforms=crop, data__decode="device", **keys
            ),
            train_data=Pictures(30),
            val_data=Pictures(9),
        )
