"""A text encoder: a tokenizer and a graph for a padded batch.

A text model made ready to run: its features found by a trial run, its backend chosen.

A tokenizer as transformers publishes it, safe to call from many threads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch

from embedcache.arrays import Array, Ints
from embedcache.encoders.backends import Backend, Exportable, Graph, batch_size, make_graph
from embedcache.encoders.base import Fingerprint, ItemShape, Modality
from embedcache.encoders.image import check_names
from embedcache.encoders.image_features import native_features
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import PathError, SettingError

Tokenize: TypeAlias = Callable[[Sequence[str]], list[Ints]]
"""Texts -> (T,) int64 token ids each, special tokens included, cut at the model's longest input."""

IDS, MASK = "input_ids", "attention_mask"
"""The names of the graph's inputs, both (B, T) int64; the mask is 1 on tokens and 0 on padding."""


class TextEncoder:
    """A frozen model of texts, of any family.

    Args:
        graph: gives the features, each with the batch as first axis; token features still padded.
        tokenize: called from many threads at once.
        features: name -> shape of one item, the default first; `(-1, D)` is cut to each text's own tokens.
        fingerprint: all that decides the output.
        pad_id: the token that fills short texts up.
        settings: how many texts one `encode` call should get.
    """

    modality: Modality = "text"

    def __init__(
        self,
        *,
        graph: Graph,
        tokenize: Tokenize,
        features: Mapping[str, ItemShape],
        fingerprint: Fingerprint,
        pad_id: int,
        settings: EncoderSettings,
    ) -> None:
        self.features = features
        self.fingerprint = fingerprint
        self.batch_size = batch_size(settings, cpu=64, other=512)
        self._graph = graph
        self._tokenize = tokenize
        self._pad_id = pad_id

    def prepare(self, items: Sequence[str]) -> list[Array]:
        """Turn texts into (T,) int64 token ids, cut at the model's longest input."""
        return list(self._tokenize(items)) if items else []

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Give the named features of each text, float32, not normalized; no padding is left in them."""
        check_names(names, self.features)
        if not prepared:
            return {name: [] for name in names}
        outputs = self._graph(pad(prepared, self._pad_id), names)
        return {name: self._items(name, outputs[name], prepared) for name in names}

    def _items(self, name: str, output: Array, prepared: Sequence[Array]) -> list[Array]:
        if self.features[name][0] != -1:
            return list(output)
        return [tokens_TD[: len(ids)] for tokens_TD, ids in zip(output, prepared, strict=True)]


def pad(ids: Sequence[Array], pad_id: int) -> dict[str, Ints]:
    """Put token ids of several lengths, at least one, into one (B, T) array, filled up on the right, and mask it."""
    lengths = np.array([len(row) for row in ids])
    num_tokens = int(lengths.max())
    padded = np.full((len(ids), num_tokens), pad_id, dtype=np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    mask = np.arange(num_tokens) < lengths[:, None]
    return {IDS: padded, MASK: mask.astype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class TextGraph:
    """What a text encoder needs of its model.

    Args:
        graph: runs it.
        backend: what runs it.
        features: name -> shape of one item: the model's own in its order, then those asked for that it can give.
    """

    graph: Graph
    backend: Backend
    features: Mapping[str, ItemShape]


def text_graph(
    module: torch.nn.Module, *, settings: EncoderSettings, weights: str, what: Mapping[str, Any], pad_id: int
) -> TextGraph:
    """Make a text model ready to run.

    Args:
        module: takes token ids and mask, gives a dict of tensors: its own features, and for each block asked for the
            same named `layerN.`; those called `tokens` are (B, T, D).
        settings: device, precision, backend and the names of features asked for.
        weights: the hash of all weights.
        what: JSON values that, with the weights, decide the model; `name` starts the name of an exported file.
        pad_id: the token that fills short texts up.
    """
    example = _texts((5, 9), pad_id)
    with torch.inference_mode():
        outputs = module.eval()(**{name: torch.from_numpy(array) for name, array in example.items()})
    shapes = {name: _item_shape(output) for name, output in outputs.items()}
    asked = [name for name in settings.features if name in shapes]
    features = {name: shapes[name] for name in [*native_features(shapes), *asked]}
    exportable = Exportable(
        module=module,
        example=example,
        other=_texts((7, 1, 14), pad_id),
        outputs=tuple(features),
        axes={
            **{name: {0: "batch", 1: "tokens"} for name in (IDS, MASK)},
            **{name: {0: "batch", 1: "tokens"} if shape[0] == -1 else {0: "batch"} for name, shape in features.items()},
        },
        what=what,
    )
    graph, backend = make_graph(exportable, settings, weights)
    return TextGraph(graph=graph, backend=backend, features=features)


def _texts(lengths: tuple[int, ...], pad_id: int) -> dict[str, Ints]:
    return pad([np.arange(2, length + 2, dtype=np.int64) for length in lengths], pad_id)


def _item_shape(output: torch.Tensor) -> ItemShape:
    width = int(output.shape[-1])
    return (-1, width) if output.ndim == 3 else (width,)


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
