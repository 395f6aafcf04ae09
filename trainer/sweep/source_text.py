"""Values of a sweep's YAML that YAML reads as another thing than was written; W&B's server would read them so, too."""

from __future__ import annotations

from typing import Any

import yaml

from trainer.config.yaml_text import NULLS, is_text_key, refuse_misread_number
from trainer.errors import ConfigError

TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"


def check_source(text: str) -> None:
    """Raise `ConfigError`, naming the parameter, for a value that needs quotes. `text` is valid YAML."""
    document = yaml.compose(text, yaml.SafeLoader)
    for name, node in _entries(document):
        if name == "parameters":
            _check_parameters(node, "")


def _check_parameters(parameters: yaml.Node, prefix: str) -> None:
    for name, spec in _entries(parameters):
        for key, node in _entries(spec):
            if key == "parameters":
                _check_parameters(node, f"{prefix}{name}.")
            elif key == "value":
                _check_scalar(f"{prefix}{name}", node)
            elif key == "values" and isinstance(node, yaml.SequenceNode):
                for item in node.value:
                    _check_scalar(f"{prefix}{name}", item)


def _check_scalar(name: str, node: yaml.Node) -> None:
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return
    key = f"parameters.{name}"
    text = node.value
    if node.tag == TIMESTAMP_TAG:
        raise ConfigError(key, f"{text} is a date in YAML; put it in quotes")
    if not is_text_key(name):
        refuse_misread_number(key, text)
        return
    value = yaml.safe_load(text)
    if text not in NULLS and str(value) != text:
        raise ConfigError(
            key, f"{text} is {value} to YAML, and {name} is text; put it in quotes"
        )


def _entries(node: yaml.Node | None) -> list[tuple[str, Any]]:
    """The keys and value nodes of a mapping; nothing for anything else."""
    if not isinstance(node, yaml.MappingNode):
        return []
    return [(str(key.value), value) for key, value in node.value]
