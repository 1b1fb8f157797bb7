"""`wordllama:l2_supercat_256`: a table of one vector per token, in a package of 19 MB; no model hub needed.

Static token vectors of a language model, averaged over a text: fast, and blind to word order. The package is not
imported (it configures logging); its two files are read, and the tests compare every value with the package. Two
differences: texts are truncated to 512 tokens, and a text without tokens is read as one unknown token.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import Tokenizer, build_text_encoder
from embedcache.encoders.text_features import mean
from embedcache.encoders.weights import hash_weights, load_weights
from embedcache.errors import MissingExtraError
from embedcache.registry import unknown_name

MAX_TOKENS = 512
POOLING = {"mean": "mean of the vectors of all tokens", "tokens": "the vectors of all tokens"}
_UNKNOWN_ID = 0
_VOCABULARY_SIZE = 32_000  # of Llama 2


def open_wordllama(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a packaged table. Options: `weights`, a file instead of the package's; `max_tokens` (default 512)."""
    check_options(spec, ("max_tokens", "weights"))
    check_modality(spec, modality, "text")
    path = _packaged_weights(spec.model)
    name, _, width = spec.model.rpartition("_")
    module = _TokenTable(int(width))
    load_weights(module, spec.weights or path)
    tokenizer = _open_tokenizer(
        path.parents[1] / "tokenizers" / f"{name}_tokenizer_config.json", spec.int_option("max_tokens") or MAX_TOKENS
    )
    return build_text_encoder(
        module,
        tokenizer,
        fingerprint=Fingerprint(
            family="wordllama",
            model=spec.model,
            weights=hash_weights(module.state_dict()),
            preprocessing=tokenizer.preprocessing,
            pooling=POOLING,
        ),
        settings=settings,
        onnx_key={"name": f"wordllama-{spec.model}"},
    )


class _TokenTable(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(_VOCABULARY_SIZE, width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens_BTD = self.embedding(input_ids)
        return {"mean": mean(tokens_BTD, attention_mask), "tokens": tokens_BTD}


def _packaged_weights(model: str) -> Path:
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
        return [encoding.ids or [_UNKNOWN_ID] for encoding in backend.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer(encode=encode, max_tokens=max_tokens, pad_id=_UNKNOWN_ID)
