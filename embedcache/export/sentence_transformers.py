"""The text side for sentence-transformers: transformer, pooling, and the projector as dense layers behind it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders import sentence_transformers as ours
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.weights import model_folder
from embedcache.export.base import TEXTS, Run, Written, check_parity, check_plain, expected, refusal
from embedcache.export.dense import Chain, dense_chain
from embedcache.registry import require

_FORM = "sentence-transformers"
_POOLED = {"mean": "mean", "cls": "cls"}
_CODE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")  # this folder, or OWNER/NAME on the hub
vectors = model.encode(["a red picture", "two dogs on a hill"])
print(vectors.shape)
"""


def write_sentence_transformers(run: Run, folder: Path) -> Written:
    """Write a folder that `SentenceTransformer` opens, and open it there.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        SettingError: the text encoder is no transformer with a pooling, or the projector no chain of dense layers.
        ArtifactError: sentence-transformers computes other vectors.
    """
    library = require("sentence_transformers", extra=_FORM)
    chain = dense_chain(run.pair.text, _FORM)
    check_plain(run.config.text, _FORM)
    modules = [*_encoder(run, library), *_projector(chain, library)]
    model = library.SentenceTransformer(modules=modules, device="cpu")
    with torch.inference_mode():
        model.save(str(folder), create_model_card=False)
    found = library.SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), show_progress_bar=False)
    return Written(
        library=_FORM,
        task="sentence-similarity",
        code=_CODE,
        needs=("sentence-transformers",),
        differences={"text": check_parity(_FORM, found, expected(run, "text"))},
        notes=("The text side alone; `embedcache export transformers` has both.",),
        sides=("text",),
    )


def _encoder(run: Run, library: Any) -> list[Any]:
    """Give the modules of the text encoder that end in the run's feature."""
    spec = EncoderSpec.parse(run.config.text.spec)
    name = "+".join(feature_names(run.config.text.feature))
    if spec.family == "st":
        return _sentences(spec, name, run, library)
    if spec.family == "hf" and name in _POOLED:
        parts = library.sentence_transformer.modules
        max_tokens = int(run.config.text.fingerprint["preprocessing"]["max_tokens"])
        transformer = parts.Transformer(str(model_folder(spec).path), max_seq_length=max_tokens)
        return [transformer, parts.Pooling(transformer.get_embedding_dimension(), pooling_mode=_POOLED[name])]
    raise refusal(_FORM, f"its text feature is {run.config.text.feature}; the pooled one of st, and mean and cls of hf "
                         "can be held")  # fmt: skip


def _sentences(spec: EncoderSpec, name: str, run: Run, library: Any) -> list[Any]:
    folder = ours.find_folder(spec).path
    parts = ours.read_parts(folder)
    model = library.SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = int(run.config.text.fingerprint["preprocessing"]["max_tokens"])
    kept = [module for module in model if type(module).__name__ != "Normalize"]
    default = "dense" if parts.dense else "_".join(parts.pools)
    if name == default:
        return kept
    if name == "_".join(parts.pools):
        return [module for module in kept if type(module).__name__ != "Dense"]
    raise refusal(_FORM, f"its text feature is {name!r}, and the library pools by {default!r}")


def _projector(chain: Chain, library: Any) -> Iterator[Any]:
    parts = library.sentence_transformer.modules
    if chain.is_scaled and chain.layers:
        yield parts.Normalize()
    for layer in chain.layers:
        yield parts.Dense(
            layer.weight_PD.shape[1],
            layer.weight_PD.shape[0],
            bias=layer.bias_P is not None,
            activation_function=layer.activation,
            init_weight=layer.weight_PD,
            init_bias=layer.bias_P,
        )
    yield parts.Normalize()
