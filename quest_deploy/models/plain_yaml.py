"""YAML whose values are as large as its text, read in a time that grows with it."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 100
"""Levels of a text. PyYAML's time grows with the square of them, and no configuration has ten."""
_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def load_yaml(text: bytes | str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is none, has more than ``DEEPEST`` levels, or has aliases: ten lines of
            them stand for more than any memory holds.
    """
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > DEEPEST:
            line = token.start_mark.line + 1
            raise yaml.YAMLError(f"expected at most {DEEPEST} levels, found more in line {line}")
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError(f"expected no aliases, found *{token.value}; write its value out")
    return yaml.safe_load(text)
