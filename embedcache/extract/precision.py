"""The precision of new features: the named one, or the fastest on this device, if vectors agree with float32."""

import gc
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from embedcache.arrays import Array, Floats, blocks, normalize
from embedcache.devices import AUTO, Precision, torch_device
from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import DataError
from embedcache.extract.feature_writer import CpuGate, FeatureWriter, choose_features
from embedcache.extract.loop import load_items
from embedcache.extract.settings import ExtractJob
from embedcache.modalities import noun
from embedcache.progress import Progress
from embedcache.sources.base import Source
from embedcache.store.cache import Cache
from embedcache.store.group import EncoderGroup, find_group
from embedcache.store.layout import encoder_path

AGREEMENT_COSINE = 0.999
"""Cosine from which two vectors of an item agree: float16 on disk costs 1e-6, another summation order about as much.

Below it, a precision is not chosen by `auto`, and an item that is encoded again has drifted.
"""

FAULT_COSINE = 0.99
"""Cosine below which a precision is refused, as the device computes wrong values: an overflow, or a faulty kernel."""

_NUM_MEASURED = {"image": 64, "text": 64}
_NUM_LONG = 4  # recordings, videos and point clouds


@dataclass(frozen=True, kw_only=True)
class MeasuredPrecision:
    """A precision, compared with float32 on the first items of a cache.

    Args:
        encoder: folder of the encoder.
        cosines: (n,) float32, cosine to the vector of float32 per item and feature, of tokens over all of them; -1 for
            all if a value is not finite.
        speedup: how many times as many items per second as with float32.
    """

    modality: Modality
    encoder: str
    precision: Precision
    cosines: Floats
    speedup: float

    @property
    def agrees(self) -> bool:
        """Whether all cosines are at least `AGREEMENT_COSINE`."""
        return bool(len(self.cosines)) and bool(self.cosines.min() >= AGREEMENT_COSINE)

    def check(self) -> None:
        """Check that the precision computes what float32 does, or raise a `DataError`: `FAULT_COSINE`."""
        if len(self.cosines) and self.cosines.min() < FAULT_COSINE:
            raise DataError(
                f"{self.encoder}: expected vectors in {self.precision} to have cosines of at least {FAULT_COSINE} to "
                f"those in float32, got {self.cosines.min():.6f} on the first {noun(self.modality)}: this device or "
                "its library computes wrong values; use --precision float32"
            )

    def line(self) -> str:
        """Return a summary in one line."""
        if not len(self.cosines):
            return (
                f"{self.encoder}: {self.precision} was not compared: none of the first {noun(self.modality)} is valid"
            )
        verdict = "" if self.agrees else f", which is below {AGREEMENT_COSINE}"
        return (
            f"{self.encoder}: {self.precision} is {self.speedup:.1f} times as fast as float32; cosine to it on the "
            f"first {noun(self.modality)}: mean {self.cosines.mean():.6f}, min {self.cosines.min():.6f}{verdict}"
        )


def fast_precisions(device: str) -> tuple[Precision, ...]:
    """Return the precisions that a device computes faster than float32, the safest first: none on a CPU."""
    import torch

    if torch_device(device).type != "cuda":
        return ()
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8:
        return "bfloat16", "float16"
    return ("float16",) if major == 7 else ()


def choose_precisions(job: ExtractJob, source: Source, device: str, *, progress: Progress) -> ExtractJob:
    """Choose the precision of each new encoder of a job: with `auto` on a GPU, the first that agrees with float32.

    One that is named is compared too. Encoders with stored features keep theirs.

    Raises:
        DataError: with the named precision an item has a cosine below 0.99 to its vector of float32.
    """
    if job.settings.engine != "local":
        return job
    measured: list[MeasuredPrecision] = []
    for modality, spec in _new_encoders(job):
        for found in measure_precisions(job, source, modality, spec, device, _candidates(job, device)):
            progress.note(found.line())
            measured.append(found)
            if job.settings.encoder.precision != AUTO:
                found.check()
            elif found.agrees:
                break
    return use_precisions(job, measured)


def use_precisions(job: ExtractJob, measured: Sequence[MeasuredPrecision]) -> ExtractJob:
    """Return the job with the first measured precision of each encoder that agrees with float32."""
    agreeing: dict[tuple[str, str], Any] = {
        (found.modality, found.encoder): found.precision for found in reversed(measured) if found.agrees
    }
    return replace(job, precisions=agreeing if job.settings.encoder.precision == AUTO else {})


def plan_precisions(job: ExtractJob, source: Source, device: str) -> list[MeasuredPrecision]:
    """Compare the precisions that new encoders of a job could use with float32: the named one, or the fast ones."""
    return [
        found
        for modality, spec in _new_encoders(job)
        for found in measure_precisions(job, source, modality, spec, device, _candidates(job, device))
    ]


def _candidates(job: ExtractJob, device: str) -> tuple[Precision, ...]:
    """Return the precisions to compare with float32: the named one, or the fast ones."""
    asked = job.settings.encoder.precision
    if asked == AUTO:
        return fast_precisions(device)
    return () if asked == "float32" else (cast(Precision, asked),)


def _new_encoders(job: ExtractJob) -> Iterator[tuple[Modality, EncoderSpec]]:
    cache = Cache(job.cache)
    for modality, specs in job.encoders.items():
        for spec in map(EncoderSpec.parse, specs):
            if cache.info.num_items.get(modality) and find_group(cache.path, modality, spec.folder, cache.info) is None:
                yield modality, spec


def measure_precisions(
    job: ExtractJob,
    source: Source,
    modality: Modality,
    spec: EncoderSpec,
    device: str,
    precisions: Sequence[Precision],
) -> Iterator[MeasuredPrecision]:
    """Encode the first items in float32 and in other precisions, and compare; nothing of encoders that have no choice.

    The encoder is opened once per precision, one at a time, so that it takes no more memory than in extraction.
    """
    if not precisions:
        return
    cache, settings = Cache(job.cache), replace(job.settings.encoder, device=device, features=job.settings.features)
    table = cache.items(modality, chunk=0).slice(0, _NUM_MEASURED.get(modality, _NUM_LONG))
    writer = _open(cache, job, modality, spec, replace(settings, precision="float32"))
    if writer.encoder.fingerprint.backend not in ("torch", "onnxruntime"):
        return
    with ThreadPoolExecutor(job.settings.num_threads) as executor:
        loaded = load_items(source, table, [writer], executor)
    inputs = [item.inputs[0] for item in loaded if item.inputs and item.inputs[0] is not None]
    expected, rate = _encode(writer, inputs)
    for precision in precisions:
        writer.executor.shutdown()
        del writer
        gc.collect()  # frees the device's memory
        writer = _open(cache, job, modality, spec, replace(settings, precision=precision))
        try:
            found, own_rate = _encode(writer, inputs)
            cosines = [item_cosine(*pair) for pair in zip(expected, found, strict=True)]
        except DataError:  # NaN or infinity
            cosines, own_rate = [-1.0] * len(expected), rate
        yield MeasuredPrecision(
            modality=modality,
            encoder=spec.folder,
            precision=precision,
            cosines=np.array(cosines, np.float32),
            speedup=round(own_rate / rate, 2),
        )


def _open(
    cache: Cache, job: ExtractJob, modality: Modality, spec: EncoderSpec, settings: EncoderSettings
) -> FeatureWriter:
    """Open an encoder as extraction does, without a folder."""
    encoder = open_encoder(spec, modality=modality, settings=settings)
    names = choose_features(encoder, job.settings.features)
    return FeatureWriter(
        encoder=encoder,
        group=EncoderGroup(
            path=encoder_path(cache.path, modality, spec.folder),
            modality=modality,
            info=cache.info,
            spec=spec.text,
            fingerprint=encoder.fingerprint.to_json(),
        ),
        features=names,
        dtypes={name: getattr(encoder, "dtypes", {}).get(name, job.settings.dtype) for name in names},
        view=None,
        executor=ThreadPoolExecutor(1),
        gate=CpuGate(settings.device),
    )


def _encode(writer: FeatureWriter, inputs: Sequence[Array]) -> tuple[list[Array], float]:
    """Return the features of all items as they would be stored, and items per second after the first batch."""
    batches = list(blocks(len(inputs), max(1, min(writer.encoder.batch_size, len(inputs) // 2))))
    if batches:
        writer.encode(list(inputs[batches[0]]), writer.features)
    started = time.perf_counter()
    encoded = [writer.encode(list(inputs[batch]), writer.features) for batch in batches]
    seconds = max(time.perf_counter() - started, 1e-9)
    items = [writer.cast(name, item) for part in encoded for name in writer.features for item in part[name]]
    return items, len(inputs) / seconds


def item_cosine(stored: Array, encoded: Array) -> float:
    """Return the cosine between two features of one item, of tokens over all of them; -1 for other shapes."""
    if stored.shape != encoded.shape:
        return -1.0
    if np.array_equal(stored, encoded.astype(stored.dtype)):  # zeros have no direction
        return 1.0
    if stored.dtype.kind == "i":  # labels are equal or not
        return float((stored == encoded).mean())
    left, right = (normalize(array.astype(np.float32).reshape(1, -1)) for array in (stored, encoded))
    return float((left * right).sum())
