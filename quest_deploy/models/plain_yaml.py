"""YAML whose values are as large as its text."""

from __future__ import annotations

from typing import Any

import yaml


def load_yaml(text: bytes | str) -> Any:
    """The content of a YAML text; raise yaml.YAMLError where it is none, or has aliases: ten lines
    of them stand for more than any memory holds.
    """
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError(f"expected no aliases, found *{token.value}; write its value out")
    return yaml.safe_load(text)
