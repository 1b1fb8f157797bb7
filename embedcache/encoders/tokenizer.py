"""A tokenizer as transformers publishes it, safe to call from many threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Ints
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import PathError, SettingError

_NO_LIMIT = 1_000_000
"""Tokenizers without a limit of their own say 1e30."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Texts to token ids.

    Args:
        encode: texts -> token ids, special tokens included, cut at `max_tokens`.
        max_tokens: the longest input, special tokens included.
        pad_id: fills short texts up.
        prefix: put before each text.
        is_lower: whether texts are lowered first.
    """

    encode: Callable[[list[str]], list[list[int]]]
    max_tokens: int
    pad_id: int
    prefix: str = ""
    is_lower: bool = False

    def __call__(self, texts: Sequence[str]) -> list[Ints]:
        """Turn texts into (T,) int64 token ids."""
        given = [self.prefix + text for text in texts]
        rows = self.encode([text.lower() for text in given] if self.is_lower else given)
        return [np.array(ids, dtype=np.int64) for ids in rows]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What a fingerprint says of it."""
        return {"max_tokens": self.max_tokens, "prefix": self.prefix, "lower": self.is_lower}


def open_tokenizer(
    folder: Path, *, max_tokens: int | None, model: torch.nn.Module, prefix: str = "", is_lower: bool = False
) -> Tokenizer:
    """Open the tokenizer in a model's folder.

    Args:
        folder: holds the tokenizer's files.
        max_tokens: the longest input; None: the smaller of what the tokenizer and the model say.
        model: the model, for its longest input.
        prefix: put before each text.
        is_lower: whether to lower texts first.

    Raises:
        PathError: there is no tokenizer in the folder.
        SettingError: nothing says how long an input may be.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PathError(f"no tokenizer in {folder}: {reason}; it needs the model's tokenizer files") from error
    longest = _longest(max_tokens, tokenizer, model, folder)
    return Tokenizer(
        encode=_encode_function(tokenizer, longest),
        max_tokens=longest,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        prefix=prefix,
        is_lower=is_lower,
    )


def max_tokens_option(spec: EncoderSpec) -> int | None:
    """Read the option `max_tokens`.

    Raises:
        SettingError: it is no positive number.
    """
    text = spec.options.get("max_tokens")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SettingError(f"max_tokens={text} in {spec.text}; give a whole number from 1")
    return int(text)


def _encode_function(tokenizer: Any, max_tokens: int) -> Callable[[list[str]], list[list[int]]]:
    if not tokenizer.is_fast:
        lock = Lock()

        def encode_slowly(texts: list[str]) -> list[list[int]]:
            with lock:
                rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
                return rows

        return encode_slowly
    # Truncation is state of the tokenizer: set once here, never from a thread.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def _longest(asked: int | None, tokenizer: Any, model: torch.nn.Module, folder: Path) -> int:
    room = [limit for limit in (tokenizer.model_max_length, num_positions(model)) if limit and limit < _NO_LIMIT]
    if asked is not None:
        positions = num_positions(model)
        if positions is not None and asked > positions:
            raise SettingError(f"max_tokens={asked}, but the model in {folder} reads at most {positions}")
        return asked
    if not room:
        raise SettingError(f"nothing in {folder} says how long a text may be; add the option max_tokens=512, say")
    return int(min(room))


def num_positions(model: torch.nn.Module) -> int | None:
    """How many tokens a model's position table has room for; None where it has no such table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa's relatives count positions from padding_idx + 1.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
