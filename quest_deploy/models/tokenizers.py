"""How long a prompt may be: as many tokens as the text encoder has positions for; what is longer is
cut there, as diffusers does.
"""

from __future__ import annotations

import logging
from inspect import signature
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

_SUFFIXES = ("", "_2", "_3")
TOKENIZERS = tuple(f"tokenizer{suffix}" for suffix in _SUFFIXES)
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tokenizer.model",),
)
"""The files that hold a vocabulary, one set for each kind of tokenizer."""
_LEAST_BYTES = 3
"""What is smaller holds no vocabulary, such as "{}"."""
logger = logging.getLogger(__name__)


def check_tokenizer(folder: Path) -> None:
    """Raise InputError where ``folder`` holds no vocabulary: transformers would make an empty
    tokenizer, to which all prompts are the same.
    """

    def there(name: str) -> bool:
        path = folder / name
        return path.is_file() and path.stat().st_size >= _LEAST_BYTES

    if any(all(map(there, names)) for names in _VOCABULARIES):
        return
    part = next((names for names in _VOCABULARIES if any(map(there, names))), ())
    missing = ", ".join(name for name in part if not there(name))
    raise InputError(
        f"{folder}: expected a tokenizer's vocabulary, tokenizer.json or vocab.json and "
        f"merges.txt, and {missing or 'all of them'} is missing or empty; get the model again"
    )


def bound_tokenizers(pipeline: Any) -> None:
    """Let each tokenizer of a pipeline pad and cut to no more tokens than its text encoder takes:
    many a tokenizer_config.json says no length, which transformers takes for 10^30. One without
    positions of its own (T5), or with many (Gemma), takes what the pipeline gives it.
    """
    encode = getattr(pipeline, "encode_prompt", None)
    given = None if encode is None else signature(encode).parameters.get("max_sequence_length")
    usual = None if given is None else given.default
    for suffix in _SUFFIXES:
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        places = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if tokenizer is not None:
            bounds = (x for x in (places, usual) if x is not None)
            tokenizer.model_max_length = min([tokenizer.model_max_length, *bounds])


def tell_cut(pipeline: Any, prompts: list[str]) -> None:
    """Warn, once for all of them, of prompts that will be cut."""
    tokenizers = [getattr(pipeline, f"tokenizer{suffix}", None) for suffix in _SUFFIXES]
    of_pipeline = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    long = [
        prompt
        for prompt in prompts
        if any(len(t(prompt).input_ids) > t.model_max_length for t in of_pipeline)
    ]
    if long:
        logger.warning(
            "%d of %d prompts are longer than %d tokens and are cut there, such as %r",
            len(long),
            len(prompts),
            min(tokenizer.model_max_length for tokenizer in of_pipeline),
            long[0],
        )
