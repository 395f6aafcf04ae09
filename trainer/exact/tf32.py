"""TF32: where CUDA may round the factors of fp32 products to 10 bits of mantissa, to multiply them faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Tf32(NamedTuple):
    """Which products are rounded."""

    convolutions: bool
    matmul: bool


# By `train.tf32`. Where it says nothing, torch's own policy goes.
POLICIES = {
    None: Tf32(convolutions=True, matmul=False),
    True: Tf32(convolutions=True, matmul=True),
    False: Tf32(convolutions=False, matmul=False),
}


@contextmanager
def tf32(policy: bool | None) -> Iterator[None]:
    """A context in which `POLICIES[policy]` goes. The settings before come back at the end."""
    conv, matmul, rnn = _places()
    before = [place.fp32_precision for place in (conv, matmul, rnn)]
    matmul_before = _older_matmul_setting()
    chosen = POLICIES[policy]
    # By the older names, which set the newer ones, too: torch fails to read a setting on which they differ.
    torch.backends.cuda.matmul.allow_tf32 = chosen.matmul
    torch.backends.cudnn.allow_tf32 = chosen.convolutions
    try:
        yield
    finally:
        if matmul_before == "medium":
            torch.set_float32_matmul_precision(matmul_before)
        else:
            torch.backends.cuda.matmul.allow_tf32 = matmul_before == "high"
        torch.backends.cudnn.allow_tf32 = before[0] == "tf32"
        for place, value in zip((conv, matmul, rnn), before, strict=True):
            place.fp32_precision = value


def tf32_in_use() -> Tf32:
    """What goes at the moment."""
    conv, matmul, _ = _places()
    return Tf32(conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32")


def _older_matmul_setting() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None  # the newer names were used, so that one goes by them alone


def _places() -> list[Any]:
    """Where torch keeps the setting of convolutions, matrix products and recurrent layers."""
    cudnn: Any = torch.backends.cudnn
    return [cudnn.conv, torch.backends.cuda.matmul, cudnn.rnn]
