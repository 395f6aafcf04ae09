"""One thread a process: the parent must hold no thread pool when it forks, and cores are few and shared."""

import os
import tempfile

# Where a user's programs keep what they remember: no test may write to, or depend on, the real one.
STATE = tempfile.TemporaryDirectory(prefix="lockstep-state-")
os.environ["XDG_STATE_HOME"] = STATE.name
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_ERROR_REPORTING"] = "false"
for launcher in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(launcher, None)

import torch  # noqa: E402 - reads the environment
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")
