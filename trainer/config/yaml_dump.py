"""Values as YAML that OmegaConf, W&B and YAML's own readers all read back alike."""

from __future__ import annotations

import re
from typing import Any

import yaml

# PyYAML takes 1e5 and inf for text and would leave them bare; OmegaConf reads numbers.
NUMBER_TO_OTHERS = re.compile(r"[-+]?(\.?[0-9][0-9_.]*[eE][-+]?[0-9]+|inf|nan)", re.I)
FLOAT_TAG = "tag:yaml.org,2002:float"
TEXT_TAG = "tag:yaml.org,2002:str"
# Line breaks to YAML, which come back as a space unless they are written as escapes.
RARE_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that some reader would take for a number."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if RARE_LINE_BREAKS.search(text) else None
    return dumper.represent_scalar(TEXT_TAG, text, style=style)


_Dumper.add_implicit_resolver(FLOAT_TAG, NUMBER_TO_OTHERS, list("-+.0123456789iInN"))
_Dumper.add_representer(str, _represent_text)


def to_yaml(value: Any, **options: Any) -> str:
    """`value` as YAML; `options` are those of `yaml.dump`. Raises `yaml.YAMLError` for what YAML cannot write."""
    text: str = yaml.dump(value, Dumper=_Dumper, **options)
    return text
