"""What befalls the files of a run: damage, a directory that goes away, a second owner, a stranger's config."""

from __future__ import annotations

import random
import shutil
import signal
from itertools import product
from pathlib import Path

import yaml

from benchmarks.faults.scene import Failed, Scene

IMAGES = (
    "run.name=digits",
    "run.reproducibility=bitwise",
    "run.resume=auto",
    "run.figures=false",
    "run.timeout=60",
    "data.name=folder",
    "batch.size=8",
    "batch.micro_size=2",
    "model.width=4",
    "train.epochs=2",
    "wandb.mode=disabled",
)
SIDE = 16
COUNTS = {"train": 16, "val": 4}  # images of a class


def damaged_run(scene: Scene) -> str:
    """A stop half-way, after which a random file of the run is damaged."""
    running = scene.start()
    scene.wait_for_checkpoint(running, scene.draw.uniform(0, 0.6))
    running.send(signal.SIGTERM)
    scene.end(running)
    damage_file(scene.draw.choice(_files(scene.run)), scene.draw)
    return scene.go_on()


def damaged_best(scene: Scene) -> str:
    """One bit of best/ is flipped after the end: the same figures, or a refusal."""
    scene.end(scene.start())
    right = scene.end(scene.command("evaluate", str(scene.run)))
    if right.status:
        raise Failed("wrong", f"not evaluated: {right.errors}")
    damage_file(scene.draw.choice(_files(scene.run / "best")), scene.draw, "flip")
    end = scene.end(scene.command("evaluate", str(scene.run)))
    if end.status:
        end.sentence()
        return "refused"
    if _figures(end.output) != _figures(right.output):
        raise Failed("wrong", f"other figures: {end.output}")
    return "survived"


def directory_deleted(scene: Scene) -> str:
    """The run's directory is deleted while it trains: one message, and nothing is written where it was."""
    running = scene.start("train.epochs=200")
    scene.wait_for_checkpoint(running, scene.draw.uniform(0, 0.3))
    _take_away(scene)
    end = scene.end(running)
    # Where it is deleted just before a checkpoint, that cannot be written.
    if end.status != 1 or str(scene.run) not in end.sentence():
        raise Failed("wrong", f"status {end.status}: {end.errors}")
    if scene.run.exists():
        raise Failed("wrong", "it wrote where its directory had been")
    return scene.go_on()


def directory_moved(scene: Scene) -> str:
    """The run's directory is moved away while it trains, and back before it is started again."""
    running = scene.start()
    scene.wait_for_checkpoint(running, scene.draw.uniform(0, 0.3))
    moved = _take_away(scene)
    end = scene.end(running)
    if end.status:  # else it had ended before
        end.sentence()
    moved.rename(scene.run)
    return scene.go_on()


def _take_away(scene: Scene) -> Path:
    moved = scene.run.with_name("moved")
    scene.run.rename(moved)
    return moved


def two_starts(scene: Scene) -> str:
    """The same run is started twice at once: one has the directory, the other is refused."""
    pair = [scene.start(ranks=1), scene.start(ranks=1)]
    ends = [scene.end(running) for running in pair]
    refused = [end for end in ends if end.status]
    for end in refused:
        end.sentence()
    if len(refused) == len(ends):
        raise Failed("wrong", f"nobody trained: {refused[0].errors}")
    return scene.check_hashes(ends[0])


def stranger(scene: Scene) -> str:
    """A run directory from elsewhere names os.system as its model: refused, and nothing is executed."""
    scene.end(scene.start("train.epochs=1"))
    mark = scene.directory / "executed"
    file = scene.run / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["model"] = {"name": "os.system", "command": f"touch {mark}"}
    file.write_text(yaml.safe_dump(tree))
    if scene.draw.random() < 0.5:
        shutil.copy(file, scene.run / "best" / "config.yaml")
    commands = {
        "evaluate": [str(scene.run)],
        "replay": [str(scene.run), "--step", "1"],
        "predict": [str(scene.run), str(scene.directory / "none.png")],
    }
    name = scene.draw.choice(sorted(commands))
    end = scene.end(scene.command(name, *commands[name]))
    if mark.exists():
        raise Failed("wrong", f"{name} executed the command")
    if end.status == 0:
        raise Failed("wrong", f"{name} took the model: {end.output}")
    end.sentence()
    return "refused"


def damaged_image(scene: Scene) -> str:
    """One image of a folder is damaged: one message that names it; once it is mended, the run ends as undisturbed."""
    root = scene.directory / "images"
    make_images(root)
    images = sorted(root.rglob("*.png"))
    image = scene.draw.choice(images)
    whole = image.read_bytes()
    damage_file(image, scene.draw, scene.draw.choice(["flip", "cut"]))
    changes = [f"data.root={root}", f"data.workers={scene.draw.choice([0, 1])}"]
    scene.settings = [*scene.settings, *changes]
    end = scene.end(scene.start())
    if end.status == 0:
        raise Failed("wrong", f"{image.name} was taken as it is")
    if image.name not in end.sentence():
        raise Failed("wrong", f"{image.name} is not named: {end.errors}")
    image.write_bytes(whole)
    return scene.go_on()


def quarantined_image(scene: Scene) -> str:
    """The same with data.bad_samples=quarantine: left out, listed, and the same run on 1 and 2 processes."""
    root = scene.directory / "images"
    make_images(root)
    image = scene.draw.choice(sorted((root / "train").rglob("*.png")))
    damage_file(image, scene.draw, scene.draw.choice(["flip", "cut"]))
    changes = [f"data.root={root}", "data.bad_samples=quarantine"]
    scene.settings = [*scene.settings, *changes]
    hashes = []
    for ranks in (1, 2):
        name = f"quarantine{ranks}"
        end = scene.end(scene.start(f"run.name={name}", ranks=ranks))
        if end.status:
            raise Failed("wrong", f"it ended: {end.errors}")
        listed = (scene.directory / name / "bad_samples.txt").read_text()
        if image.name not in listed:
            raise Failed("wrong", f"{image.name} is not listed: {listed}")
        hashes.append(scene.hashes(name))
    if hashes[0] != hashes[1]:
        raise Failed("wrong", f"not the same on 1 and 2 processes: {hashes}")
    return "survived"


def make_images(root: Path) -> None:
    """Two classes of random PNG files, always the same."""
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    for part, label in product(COUNTS, ("ants", "bees")):
        directory = root / part / label
        directory.mkdir(parents=True)
        for number in range(COUNTS[part]):
            pixels = draw.integers(256, size=(SIDE, SIDE, 3), dtype=numpy.uint8)
            path = directory / f"{part}_{label}_{number:02}.png"
            Image.fromarray(pixels).save(path)


def damage_file(path: Path, draw: random.Random, damage: str = "") -> None:
    """Flip one bit of a file, cut it short, or remove it."""
    content = bytearray(path.read_bytes())
    damage = damage or draw.choice(["flip", "cut", "remove"])
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _files(directory: Path) -> list[Path]:
    files = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.stat().st_size:
            files.append(path)
    return files


def _figures(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip().startswith("val/")]
