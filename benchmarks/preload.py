"""What the processes of a benchmark need, imported once for all of them; what is not installed is left out."""

from contextlib import suppress
from importlib import import_module

NAMES = (
    "accelerate",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torchvision.transforms.v2",
    "torch._dynamo",  # every optimizer imports it
    "trainer.trainer",
)
for name in NAMES:
    with suppress(ImportError):
        import_module(name)
