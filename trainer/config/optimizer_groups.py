"""`optimizer.groups`: options of some of the parameters, told by a pattern of their names."""

from __future__ import annotations

import math
import re
from typing import Any

from trainer.config.fields import show
from trainer.errors import ConfigError


def check_group(key: str, group: dict[str, Any]) -> None:
    """Raise `ConfigError` unless one of `optimizer.groups` has a pattern, and options that a group can have."""
    pattern = group.get("match")
    if not isinstance(pattern, str):
        raise ConfigError(
            f"{key}.match",
            f"{show(pattern)} is not text; write a regular expression: {{match: head, lr: 0.01}}",
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{key}.match", f'"{pattern}" is no regular expression: {error}'
        ) from None
    if len(group) == 1:
        raise ConfigError(key, "gives no option beside match, such as weight_decay: 0")
    if "params" in group:
        raise ConfigError(f"{key}.params", "is what match finds; leave it out")
    rate = group.get("lr", 0)
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not is_number or not 0 <= rate < math.inf:
        raise ConfigError(f"{key}.lr", f"{show(rate)} is not a number, 0 or more")
