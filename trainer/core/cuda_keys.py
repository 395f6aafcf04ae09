"""What the keys for CUDA come to on the run's device."""

from __future__ import annotations

import torch

from trainer.config.schema import Config
from trainer.exact.tf32 import POLICIES

AMPERE = 8  # the compute capability from which on there is TF32


def has_tf32(config: Config, device: torch.device) -> bool:
    """True if products of the run can be rounded to TF32 on this device."""
    if device.type != "cuda" or config.train.precision == "fp64":
        return False
    is_of_nvidia = torch.version.hip is None
    return not is_of_nvidia or torch.cuda.get_device_capability(device)[0] >= AMPERE


def describe_tf32(config: Config, device: torch.device) -> str:
    """A line for the header, where fp32 products may be rounded and the config says so or the run is bitwise."""
    policy = config.train.tf32
    is_set = policy is not None or config.run.reproducibility == "bitwise"
    if not is_set or not has_tf32(config, device):
        return ""
    chosen = POLICIES[policy]
    if chosen.matmul:
        return "in convolutions and matrix products"
    return "in convolutions" if chosen.convolutions else "nowhere"
