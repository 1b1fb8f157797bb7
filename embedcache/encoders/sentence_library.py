"""Models of sentence-transformers that the library itself runs, as a whole: one vector per item, of any modality."""

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array, Floats
from embedcache.devices import announce_device, autocast, torch_device
from embedcache.encoders.audio import SAMPLE_RATE_HZ, check_audio, resample
from embedcache.encoders.backends import out_of_memory
from embedcache.encoders.base import Encoder, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.weights import ModelFolder, hash_weights, quiet_transformers
from embedcache.errors import ArtifactError, MissingExtraError, SettingError, one_line
from embedcache.modalities import noun
from embedcache.provenance import construct, read_json
from embedcache.registry import has_trust, require

_EXTRA = "sentence-transformers"
_DESCRIPTIONS = (".json", ".txt", ".model", ".jinja")
"""Suffixes of the files of a model that hold no weights."""
EXAMPLES: Mapping[str, Any] = {
    "text": "a",
    "image": Image.new("RGB", (32, 32)),
    "audio": np.zeros(SAMPLE_RATE_HZ, np.float32),
}
"""Modality that the library serves here -> an item."""


def open_with_library(
    spec: EncoderSpec,
    folder: ModelFolder,
    prompt: str,
    *,
    modality: Modality,
    settings: EncoderSettings,
    reason: Exception,
) -> Encoder:
    """Open a model that is run by the library; `reason` says why it is."""
    try:
        library = require("sentence_transformers", extra=_EXTRA)
    except MissingExtraError as error:
        raise MissingExtraError(f"{reason}; or let the library read it: {error}") from None
    if settings.backend == "onnxruntime":
        raise SettingError(f"backend: expected auto or torch, got onnxruntime: {spec.text} runs on torch only")
    construct(folder.path, lambda: _check_classes(folder.path))
    device = torch_device(settings.device)
    try:
        with quiet_transformers():
            model = library.SentenceTransformer(str(folder.path), device=str(device), trust_remote_code=has_trust())
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise ArtifactError(
            f"sentence-transformers cannot open {folder.path}: {one_line(error)}; choose another model"
        ) from error
    if modality not in model.modalities or modality not in EXAMPLES:
        served = [noun(name) for name in model.modalities if name in EXAMPLES]
        raise SettingError(f"{spec.text}: expected an encoder of {noun(modality)}, got one of {', '.join(served)}")
    max_tokens = spec.int_option("max_tokens")
    if max_tokens is not None:
        model.max_seq_length = max_tokens
    return LibraryEncoder(spec, folder, model, prompt, modality=modality, settings=settings)


def _check_classes(folder: Path) -> None:
    """Check that a model consists of the library's own modules, unless its author is trusted."""
    path = folder / "modules.json"
    rows = read_json(path) if path.is_file() and not has_trust() else ()
    for row in rows:
        for name, package in _named_classes(folder / row["path"], row["type"], {folder.resolve()}):
            if not str(name).startswith(package):
                raise SettingError(
                    f"{folder} names {name!r}, which is custom code; if you trust its author, use --trust, or "
                    "embedcache.registry.trust_files() in Python"
                )


def _named_classes(folder: Path, kind: str, above: Set[Path]) -> Iterator[tuple[str, str]]:
    """Iterate over the class of a module and those that its files name, each with the package that it must be of.

    A router, whose description has two names, names the modules in folders of its own.
    """
    yield kind, "sentence_transformers."
    for name in ("router_config.json", "config.json", "wordembedding_config.json"):
        path = folder / name
        config = read_json(path) if path.is_file() else {}
        if str(kind).endswith("Dense") and config.get("activation_function"):
            yield config["activation_function"], "torch.nn."
        if name.startswith("word") and "tokenizer_class" in config:
            yield config["tokenizer_class"], "sentence_transformers."
        for part, part_kind in config.get("types", {}).items() if folder.resolve() not in above else ():
            yield from _named_classes(folder / part, part_kind, {*above, folder.resolve()})


class LibraryEncoder:
    """A model that the library sentence-transformers runs: one vector per item, as its `encode` returns them."""

    def __init__(
        self,
        spec: EncoderSpec,
        folder: ModelFolder,
        model: Any,
        prompt: str,
        *,
        modality: Modality,
        settings: EncoderSettings,
    ) -> None:
        self.modality = modality
        self._model, self._prompt, self._width = model.eval(), prompt, spec.int_option("truncate_dim")
        self._device = torch_device(settings.device)
        announce_device(self._device)
        self._precision = settings.precision
        processor = getattr(model, "processor", None)
        self._rate_hz = int(
            getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", SAMPLE_RATE_HZ)
        )
        on_gpu = self._device.type != "cpu"
        self.batch_size = 1 if modality == "audio" else settings.batch_size or (128 if on_gpu else 32)
        width = len(self.encode(self.prepare([EXAMPLES[modality]]), ["pooled"])["pooled"][0])
        check_width(spec, width)
        self.features: Mapping[str, ItemShape] = {"pooled": (width,)}
        cut = "" if self._width is None else f", first {self._width} dimensions"
        self.fingerprint = Fingerprint(
            family="st",
            model=spec.model_name,
            revision=folder.revision,
            weights=hash_weights(model.state_dict()),
            preprocessing={
                "max_tokens": model.max_seq_length if modality == "text" else None,
                "prefix": prompt,
                "files": _hash_descriptions(folder.path),
            },
            pooling={"pooled": "the vector of the library sentence-transformers" + cut},
            precision=settings.precision,
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert items to arrays: the bytes of a text, (H, W, 3) pixels of an image, (n,) samples of a recording."""
        if self.modality == "text":
            return [np.frombuffer(item.encode(), np.uint8) for item in items]
        if self.modality == "audio":
            return [resample(check_audio(item, 1), self._rate_hz) for item in items]
        return [np.asarray(item) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Compute the vectors of one batch; one that does not fit into memory is encoded in halves."""
        check_names(names, ["pooled"])
        if not (prepared and names):
            return {name: [] for name in names}
        if self.modality == "audio":  # one by one: padding would change what they are encoded to
            return {"pooled": [self._run([array])[0] for array in prepared]}
        return {"pooled": list(self._run(prepared))}

    def _run(self, prepared: Sequence[Array]) -> Floats:
        """Return the vectors of some items: (N, D) float32."""
        try:
            with autocast(self._device.type, self._precision), _fixed_randomness(prepared[0]):
                vectors_ND: torch.Tensor = self._model.encode(
                    [self._input(array) for array in prepared],
                    prompt=self._prompt,
                    truncate_dim=self._width,
                    batch_size=len(prepared),
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )
            return vectors_ND.float().cpu().numpy()
        except torch.OutOfMemoryError:
            if len(prepared) == 1:
                raise out_of_memory(self._device) from None
        half = len(prepared) // 2
        return np.concatenate([self._run(prepared[:half]), self._run(prepared[half:])])

    def _input(self, array: Array) -> Any:
        """Return an item as the library takes it."""
        if self.modality == "text":
            return array.tobytes().decode()
        return Image.fromarray(array) if self.modality == "image" else {"array": array, "sampling_rate": self._rate_hz}


@contextmanager
def _fixed_randomness(array: Array) -> Iterator[None]:
    """Make random numbers a function of an item: CLAP takes a random part of a long recording, by NumPy's own ones."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(zlib.crc32(array.tobytes()))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _hash_descriptions(folder: Path) -> str:
    """Return the SHA-256 over the files of a model that decide, beside its weights, what it computes."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _DESCRIPTIONS and path.is_file():
            sha.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def check_width(spec: EncoderSpec, found: int) -> None:
    """Check that vectors have the requested number of dimensions; with fewer the model has no more."""
    width = spec.int_option("truncate_dim")
    if width is not None and width > found:
        raise SettingError(f"option truncate_dim in {spec.text}: expected at most {found}, got {width}")
