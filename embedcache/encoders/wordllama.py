"""`wordllama:l2_supercat_256`: a table of one vector a token, in a package of 19 MB; no model hub needed.

Static vectors of a language model's tokens, averaged over a text: fast, and blind to the order of words. The package
is not imported (it sets up logging); its two files are read, and the tests hold every value against it. Two
differences: texts are cut at 512 tokens, and a text without any is read as one unknown token.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import TextEncoder, Tokenizer, max_tokens_option, text_graph
from embedcache.encoders.text_features import mean
from embedcache.encoders.weights import hash_weights, load_weights
from embedcache.errors import MissingExtraError
from embedcache.registry import unknown_name

MAX_TOKENS = 512
POOLING = {"mean": "mean of the vectors of all tokens", "tokens": "the vectors of all tokens"}
_UNKNOWN = 0
_VOCABULARY = 32_000  # of Llama 2


def open_wordllama(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a packaged table. Options: `weights`, a file instead of the package's; `max_tokens` (default 512).

    Raises:
        UnknownNameError: no such model or option.
        MissingExtraError: the package is not installed.
        SettingError: asked for images.
    """
    check_options(spec, ("max_tokens", "weights"))
    check_modality(spec, modality, "text")
    path = _packaged(spec.model)
    module = _Table(int(spec.model.rpartition("_")[2]))
    load_weights(module, Path(spec.options["weights"]).expanduser() if "weights" in spec.options else path)
    weights = hash_weights(module.state_dict())
    name = spec.model.rpartition("_")[0]
    tokenizer = _open_tokenizer(
        path.parents[1] / "tokenizers" / f"{name}_tokenizer_config.json", max_tokens_option(spec) or MAX_TOKENS
    )
    made = text_graph(
        module, settings=settings, weights=weights, what={"name": f"wordllama-{spec.model}"}, pad_id=_UNKNOWN
    )
    return TextEncoder(
        graph=made.graph,
        tokenize=tokenizer,
        features=made.features,
        fingerprint=Fingerprint(
            family="wordllama",
            model=spec.model,
            revision=None,
            weights=weights,
            preprocessing=tokenizer.preprocessing,
            pooling=POOLING,
            backend=made.backend,
            precision=settings.precision,
        ),
        pad_id=_UNKNOWN,
        settings=settings,
    )


class _Table(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(_VOCABULARY, width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens_BTD = self.embedding(input_ids)
        return {"mean": mean(tokens_BTD, attention_mask), "tokens": tokens_BTD}


def _packaged(model: str) -> Path:
    """Find a model's file in the package."""
    package = find_spec("wordllama")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError(
            "the package 'wordllama' is not installed; run: python -m pip install 'embedcache[wordllama]'"
        )
    folder = Path(package.submodule_search_locations[0]) / "weights"
    known = {path.stem: path for path in folder.glob("*_[0-9]*.safetensors")}
    if model not in known:
        raise unknown_name("wordllama model", model, known)
    return known[model]


def _open_tokenizer(path: Path, max_tokens: int) -> Tokenizer:
    import tokenizers

    backend: Any = tokenizers.Tokenizer.from_file(str(path))
    backend.no_padding()
    backend.enable_truncation(max_tokens)

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids or [_UNKNOWN] for found in backend.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer(encode=encode, max_tokens=max_tokens, pad_id=_UNKNOWN)
