"""What the server of `tests/programs.py` imports before it forks programs."""

import gc
import importlib
import os
import sys
import threading

NAMES = (
    "torch",
    "torch._dynamo",  # every optimizer imports it
    "torch.distributed.nn",
    "torchvision",
    "accelerate",
    "sklearn.datasets",
    "sklearn.model_selection",
    "matplotlib.backends.backend_agg",
    "rich.console",
    "trainer.trainer",
    "trainer.commands.check",
)
for name in NAMES:
    importlib.import_module(name)

assert os.environ["OMP_NUM_THREADS"] == "1"
assert threading.active_count() == 1, "a process with threads must not fork"
# The trainer asks whether it is imported, to know whether a run has begun.
assert "wandb" not in sys.modules
from trainer.process.machine import package_versions  # noqa: E402 - after the libraries

package_versions()  # remembered: a program need not read the packages' metadata again
gc.collect()
# Else each fork's garbage collection copies the pages of every imported object.
gc.freeze()
