"""Score samples from cached vectors by a linear head or by the cosine with prompts. Both are one product per item."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from safetensors.torch import load_file

from embedcache.arrays import Array, Floats, Ints, check_finite, normalize, read_npy
from embedcache.curate.settings import ScoreSettings
from embedcache.dataset import keytable
from embedcache.dataset.inputs import to_inputs
from embedcache.dataset.vectors import Vectors
from embedcache.encoders.views import open_feature_encoder
from embedcache.errors import CorruptError, DataError, PathError, SettingError, one_line, summary
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.processes import torch_device
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.base import project
from embedcache.provenance import check_table_output, digest_file
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import ScoreOptions

_LAYER = re.compile(r"(?:(.*)\.)?weights?")
_NUMBERS = re.compile(r"\d+")
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """A score `vector @ weights + bias`."""

    weights_P: Array  # float64
    bias: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """Scores of the samples of a cache. A sample has the highest score of its items.

    Args:
        cache: the cache.
        path: the written table.
        name: column of the scores.
        modality: modality of the scored items.
        feature: the scored feature.
        source: what the score is, as JSON values.
        scores_S: (S,) a score per sample, NaN without a valid item.
        rows_S: (S,) row of the item with this score, -1 without one.

    Example:
        >>> report = embedcache.score_samples("cache", "yaks.parquet", modality="text", prompt=("yak",))
        >>> report.path.name, report.name, report.feature
        ('yaks.parquet', 'score', 'open_toy/mean')
    """

    cache: Cache
    path: Path
    name: str
    modality: str
    feature: str
    source: Mapping[str, Any]
    scores_S: Floats
    rows_S: Ints

    __repr__ = summary

    def line(self) -> str:
        """Describe the scores in one line."""
        low, middle, high = self.quantiles(0.0, 0.5, 1.0)
        scored = int(np.isfinite(self.scores_S).sum())
        return (
            f"{self.path}: {self.name} of {scored:,} of {self.num_samples:,} samples, from {low:.4g} to {high:.4g}, "
            f"half of them above {middle:.4g}"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples, without removed ones."""
        return len(self.cache) - len(self.cache.removed)

    def quantiles(self, *fractions: float) -> list[float]:
        """Return quantiles of the scores."""
        values: list[float] = np.nanquantile(self.scores_S, fractions).tolist()
        return values

    def to_json(self) -> dict[str, Any]:
        """Return the scored feature, the source of the score, and quantiles of the scores, as JSON values."""
        return {
            "cache": str(self.cache.path),
            "scores": str(self.path),
            "score": self.name,
            "modality": self.modality,
            "feature": self.feature,
            **self.source,
            "num_samples": self.num_samples,
            "num_scored": int(np.isfinite(self.scores_S).sum()),
            "quantiles": dict(zip(map(str, _QUANTILES), self.quantiles(*_QUANTILES), strict=True)),
        }


def score(
    cache: AnyPath,
    out: AnyPath,
    settings: ScoreSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["ScoreOptions"],
) -> ScoreReport:
    """Score the samples of a cache, and write the table that `curate select --method score` reads.

    One pass over the chunks, N P products. Memory: a chunk, and 20 bytes per item.

    Args:
        cache: path or URL of the cache.
        out: a `.parquet` file.
        settings: the head or the prompts, and which items are scored.
        progress: progress in items.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        SettingError: neither or both of a head and prompts are given, or prompts without an encoder for them.
        PathError: a file does not exist, or the output must not be written.
        CorruptError, DataError: the file of the head cannot be read, or its width differs from the feature's.
        UnknownNameError, UnfinishedError, FingerprintError: see `Vectors`.

    Example:
        >>> report = embedcache.score_samples("cache", "zebras.parquet", modality="text", prompt=("zebra",))
        >>> report.num_samples
        600
    """
    out = Path(out)
    progress = to_progress(progress)
    settings = merge_settings(ScoreSettings, settings, options)
    check_table_output("scores", out)

    vectors = Vectors(cache, settings.modality, settings.feature, settings.run, device=settings.device)
    if settings.weights is not None:
        head = read_head(settings.weights, vectors.width, fold_layers=settings.fold_layers)
    else:
        head = LinearHead(weights_P=_prompt_direction(vectors, settings))
    scores_S, rows_S = _score_samples(vectors, head, settings, progress)

    # The source of a score is recorded, so that two tables can be told apart.
    if settings.weights is None:
        source: dict[str, Any] = {"prompts": list(settings.prompts), "negative": list(settings.negative)}
    else:
        source = {"weights": str(settings.weights), "weights_sha256": digest_file(settings.weights)}
    source |= {
        "normalized": settings.normalize,
        "run": None if settings.run is None else str(settings.run),
        "run_weights": None if vectors.run is None else vectors.run.info.weights,
    }

    report = ScoreReport(
        cache=vectors.cache,
        path=out,
        name=settings.column,
        modality=vectors.modality,
        feature=vectors.feature.name,
        source=source,
        scores_S=scores_S,
        rows_S=rows_S,
    )
    about = {"method": "score", **report.to_json()}
    keytable.write(out, [vectors.cache], {report.name: scores_S}, "scores", about)
    return report


def best_per_sample(num_samples: int, samples_N: Ints, values_N: Floats) -> tuple[Floats, Ints]:
    """Return the highest value of each sample and its position: (S,) each. Ties go to the first position.

    A sample without a value has NaN and position -1.
    """
    best_S = np.full(num_samples, -1, np.int64)

    # Sorted by sample, then from the highest value, so the first of each sample is its best.
    order = np.lexsort((np.arange(len(values_N)), -values_N, samples_N))
    samples, first = np.unique(samples_N[order], return_index=True)
    best_S[samples] = order[first]
    highest_S = np.full(num_samples, np.nan, values_N.dtype)
    highest_S[samples] = values_N[order[first]]
    return highest_S, best_S


def _score_samples(
    vectors: Vectors, head: LinearHead, settings: ScoreSettings, progress: Progress
) -> tuple[Floats, Ints]:
    """Return the score of each sample and the row of the item that has it."""
    item_samples = vectors.cache.items(vectors.modality, columns=["sample"])["sample"].to_numpy()
    rows = [np.empty(0, np.int64)]
    scores = [np.empty(0, np.float32)]
    stored = ((rows_B, inputs.values) for rows_B, inputs in vectors.feature.blocks())

    # Products are summed in float64, so that a score does not depend on the division into blocks.
    progress.start("scoring", len(vectors.rows), noun(vectors.modality))
    for rows_B, vectors_BP in vectors.blocks() if settings.normalize else stored:
        scores_B = (vectors_BP.astype(np.float64) @ head.weights_P + head.bias).astype(np.float32)
        check_finite(scores_B, f"scores of {vectors.feature.name}", rows=rows_B)
        rows.append(rows_B)
        scores.append(scores_B)
        progress.advance(len(rows_B))
    progress.finish()

    rows_N = np.concatenate(rows)
    scores_N = np.concatenate(scores)
    scores_S, best_S = best_per_sample(vectors.cache.info.num_samples, item_samples[rows_N], scores_N)
    return scores_S, np.where(best_S < 0, -1, rows_N[best_S])


def _prompt_direction(vectors: Vectors, settings: ScoreSettings) -> Array:
    """Return the mean direction of the prompts less the mean direction of the negative prompts: (P,) float64."""
    prompts = [*settings.prompts, *settings.negative]
    encoded_MP = _encode_prompts(vectors, prompts, str(torch_device(settings.device))).astype(np.float64)
    direction_P: Array = normalize(encoded_MP[: len(settings.prompts)].mean(axis=0)).astype(np.float64)
    if settings.negative:
        direction_P -= normalize(encoded_MP[len(settings.prompts) :].mean(axis=0))
    return direction_P


def _encode_prompts(vectors: Vectors, prompts: list[str], device: str) -> Floats:
    """Encode prompts into the space of the vectors: (M, P) float32, rows of length 1."""
    if vectors.run is None and vectors.modality != "text":
        raise SettingError(f"prompt: expected --run RUN to compare {noun(vectors.modality)} with, got none")

    # The encoder must be the one whose features the run was trained on, or the prompts lie in another space.
    pair = None if vectors.run is None else vectors.run.pair
    source: Any = vectors.feature if vectors.run is None else vectors.run.input("text")
    name = vectors.feature.name if vectors.run is None else source.feature
    encoder = open_feature_encoder(
        source.spec, modality="text", feature=name, fingerprint=source.fingerprint, device=device
    )

    parts = []
    for values in encoder.batches(len(prompts), lambda rows: encoder.prepare(prompts[rows])):
        inputs = to_inputs(values)
        parts.append(normalize(inputs.values) if pair is None else project(pair.tower("text"), inputs, device=device))
    return np.concatenate(parts)


def read_head(path: Path, width: int, *, fold_layers: bool = False) -> LinearHead:
    """Read a linear head of one output. Nothing in the file is executed.

    Args:
        path: `.npy` of `width` weights, or one more with the bias last. Or `.safetensors`, `.pt` or `.pth` with tensors
            `weight` and optionally `bias`, as `torch.nn.Linear` names them.
        width: P, the width of the vectors.
        fold_layers: multiply several layers into one, which is right if there is no activation between them.

    Raises:
        PathError: the file does not exist, or has another suffix.
        CorruptError: the file cannot be read.
        DataError: its tensors are not a linear head of this width. The message contains their shapes.
    """
    if path.suffix not in (".npy", ".safetensors", ".pt", ".pth") or not path.is_file():
        raise PathError(f"weights: expected a .npy, .safetensors or .pth file that exists, got {path}")

    layers = [_read_array(path, width)] if path.suffix == ".npy" else _read_layers(path)
    if len(layers) > 1 and not fold_layers:
        raise DataError(f"{path}: expected one layer, got {len(layers)}; --fold-layers multiplies linear ones")

    # Several linear layers without activations are one: (W2 (W1 x + b1) + b2).
    weights, bias = layers[0]
    for weight, layer_bias in layers[1:]:
        if weight.shape[1] != len(weights):
            raise DataError(f"{path}: expected a layer of {len(weights)} inputs, got a weight of {weight.shape}")
        weights = weight @ weights
        bias = weight @ bias + layer_bias

    if weights.shape != (1, width):
        raise DataError(f"{path}: expected {width:,} weights for these vectors, got shape {weights.shape}")
    check_finite(np.append(weights, bias), f"the head {path}")
    return LinearHead(weights_P=weights[0], bias=float(bias[0]))


def _read_array(path: Path, width: int) -> tuple[Array, Array]:
    """Return the weights of one layer and its bias. An additional last number is the bias."""
    values = np.atleast_2d(read_npy(path).squeeze()).astype(np.float64)
    has_bias = values.shape == (1, width + 1)
    return (values[:, :-1], values[:, -1]) if has_bias else (values, np.zeros(len(values)))


def _read_layers(path: Path) -> list[tuple[Array, Array]]:
    """Return the weights and biases of the linear layers in a file, in the order of the numbers in their names."""
    try:
        is_safe = path.suffix == ".safetensors"
        stored: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors have no common base class
        raise CorruptError(f"{path}: expected a file of tensors, got an error: {one_line(error)}") from error

    # Checkpoints of some trainers have the weights one level down.
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    tensors = {
        name: value.detach().double().numpy() for name, value in state.items() if isinstance(value, torch.Tensor)
    }

    layers = []
    names = [name for name in tensors if _LAYER.fullmatch(name)]
    for name in sorted(names, key=lambda name: [int(number) for number in _NUMBERS.findall(name)]):
        weight = np.atleast_2d(tensors[name])
        bias_name = re.sub(r"weights?$", "bias", name)
        layers.append((weight, np.atleast_1d(tensors.get(bias_name, np.zeros(len(weight))))))
    if not layers or any(weight.ndim != 2 or bias.shape != weight.shape[:1] for weight, bias in layers):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items()) or "no tensors"
        raise DataError(f"{path}: expected tensors weight (1, P) and bias (1,), got {shapes}")
    return layers
