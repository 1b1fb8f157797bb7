"""Open a frozen encoder from a spec such as `timm:vit_small_patch14_dinov2.lvd142m,weights=model.safetensors`.

    family:model[,option=value]…

A spec is text, so that a cache can store it and anyone can open the same encoder again. The family is a name in
`ENCODERS`, or `module:attribute` of a plug-in: `my_module:open_mine[:model][,option=value]…`. A value with a comma, or
with a space at an end, is a JSON string: `prompt="query, short: "`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedcache.encoders.base import Encoder, EncoderSettings, Fingerprint, Modality, background_of
from embedcache.errors import ArtifactError, EmbedcacheError, PathError, SettingError, one_line
from embedcache.files import expand_home
from embedcache.modalities import noun
from embedcache.processes import AUTO, Precision, torch_device
from embedcache.provenance import DERIVED, IMPORTED, check_same
from embedcache.registry import (
    Registry,
    has_trust,
    names_from,
    parse_options,
    quote_option,
    split_options,
    unknown_name,
)
from embedcache.settings import replace_fields

ENCODERS = Registry(
    "encoder family",
    {
        "frames": "embedcache.encoders.frames:open_frames",
        "hf": "embedcache.encoders.transformers:open_transformers",
        "lite": "embedcache.encoders.timm:open_lite",
        "open_clip": "embedcache.encoders.open_clip:open_open_clip",
        "st": "embedcache.encoders.sentence_transformers:open_sentence_transformers",
        "timm": "embedcache.encoders.timm:open_timm",
        "whisper": "embedcache.encoders.whisper:open_whisper",
    },
    group="embedcache.encoders",
)
"""Each is a function `open_mine(spec, *, modality, settings) -> Encoder`."""


_OF_FOLDERS = frozenset({"hf", "st"})
"""Families whose models may bring code of their own."""

_IN_TORCH = frozenset({"frames", "hf", "lite", "open_clip", "st", "timm"})
"""Families whose models torch runs, in any precision."""

_EXAMPLES = "timm:vit_small_patch14_dinov2.lvd142m or st:all-MiniLM-L6-v2"
_PATH_STARTS = ("/", "./", "../", "~")
_TEXTS = frozenset({"prompt", "prompt_name"})
"""Options whose values are texts: never paths, and with the spaces that were given."""


def open_encoder(spec: "str | EncoderSpec", *, modality: Modality, settings: EncoderSettings | None = None) -> Encoder:
    """Open a frozen encoder.

    Args:
        spec: the spec, or its text.
        modality: what to encode; some families serve both.
        settings: device, precision and backend. `auto`, the default of each, is the fastest device, in float32.

    Raises:
        EmbedcacheError: the spec is invalid. Each mistake has a subclass: an unknown family, model or option, a
            modality that the family does not serve, a missing package, weights that are missing or do not fit.
    """
    if isinstance(spec, str):
        spec = EncoderSpec.parse(spec)

    if (reason := why_no_encoder(spec, modality)) is not None:
        raise SettingError(reason)

    settings = _without_auto(settings or EncoderSettings())
    open_family = ENCODERS.load(spec.family)
    try:
        encoder: Encoder = open_family(spec, modality=modality, settings=settings)
    except EmbedcacheError:
        raise
    except Exception as error:
        # An error in a model's own code is not a bug of this package.
        if not (has_trust() and spec.family in _OF_FOLDERS):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ArtifactError(f"{spec.text} cannot be run: {reason}: choose another model") from error

    # White is the default, and fingerprints of caches with it do not record it.
    if modality == "image" and settings.background != "white":
        preprocessing = {**encoder.fingerprint.preprocessing, "background": settings.background}
        encoder.fingerprint = replace(encoder.fingerprint, preprocessing=preprocessing)

    return encoder


def check_spec(spec: str) -> None:
    """Check a spec without opening a model: its family, and that its files exist.

    Raises:
        SettingError, UnknownNameError: the spec is invalid, or there is no such family.
        PathError: the folder or file of a model does not exist.
    """
    parsed = EncoderSpec.parse(spec)
    if parsed.family in (IMPORTED, DERIVED):
        return

    for part in filter(None, (parsed, parsed.inner)):
        ENCODERS.load(part.family)
        paths = [expand_home(part.model)] if part.is_path and part.family in ENCODERS.paths else []
        if part.weights:
            paths.append(part.weights)

        for path in paths:
            if not path.exists():
                raise PathError(f"encoder {spec}: expected the files of a model, got {path}, which does not exist")


def why_no_encoder(spec: "EncoderSpec", modality: Modality, *, next_step: str | None = None) -> str | None:
    """Return why no items can be encoded like the features of a spec, if no encoder computed them.

    Args:
        spec: spec of the features.
        modality: modality of the items.
        next_step: the step that the message suggests instead. If None, one that suits extraction and repair.
    """
    if spec.family == IMPORTED:
        next_step = next_step or (
            "repair damage by running the same embedcache import again, or extract features of new "
            f"{noun(modality)} with an encoder into a cache of its own"
        )
        return (
            f"the vectors of {spec.model} were imported and their encoder is unknown, so no {modality} can be encoded "
            f"like them: {next_step}"
        )

    if spec.family == DERIVED:
        return (
            f"features of {DERIVED}:{spec.model} are derived from other features, so no raw {modality} can be encoded "
            f"like them: {next_step or 'use the features that they are derived from'}"
        )

    return None


def _without_auto(settings: EncoderSettings) -> EncoderSettings:
    """Replace `auto`. The device is the CPU for onnxruntime, and the precision is float32."""
    is_onnx = settings.device == AUTO and settings.backend == "onnxruntime"
    return replace_fields(
        settings,
        device="cpu" if is_onnx else str(torch_device(settings.device)),
        precision="float32" if settings.precision == AUTO else settings.precision,
    )


def auto_precision(spec: "EncoderSpec", device: str) -> Precision:
    """Return the precision `auto` of new features: bfloat16 for models that torch runs on a GPU that has it."""
    import torch

    # Compute capability 8 is the first one with bfloat16.
    runs_in_torch = spec.family in _IN_TORCH and torch_device(device).type == "cuda"
    return "bfloat16" if runs_in_torch and torch.cuda.get_device_capability(device)[0] >= 8 else "float32"


def reopen_encoder(
    spec: str, *, modality: Modality, feature: str, fingerprint: Mapping[str, Any], device: str = AUTO
) -> Encoder:
    """Open the encoder that computed a cached feature, with the same precision and backend.

    Raises:
        FingerprintError: the encoder differs. The message names each field with both values.
        SettingError: the encoder is custom code, and the file that names it is not trusted.
    """
    settings = EncoderSettings(**recorded_settings(fingerprint, device), features=feature_names(feature))
    expected = {field: value for field, value in fingerprint.items() if field != "view"}

    # A stored graph answers without transformers, whose import takes longer than a search.
    if modality == "text" and fingerprint["backend"] == "onnxruntime":
        from embedcache.encoders.models import open_stored

        if (stored := open_stored(expected, _without_auto(settings))) is not None:
            return stored

    with names_from(f"the record of the feature {feature}"):
        encoder = open_encoder(spec, modality=modality, settings=settings)

    next_step = "use the weights and libraries that it was extracted with, or extract again"
    check_same(f"feature {feature}", expected, encoder.fingerprint.to_json(), next_step=next_step)
    return encoder


def recorded_settings(fingerprint: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the `EncoderSettings` fields with which an encoder gives the output of its fingerprint.

    An encoder that ran on onnxruntime stays on the CPU. Any other runs on the device.
    """
    # Any other library is the only one of its family.
    has_choice = fingerprint["backend"] in {"torch", "onnxruntime"}
    return {
        "device": "cpu" if fingerprint["backend"] == "onnxruntime" else device,
        "backend": fingerprint["backend"] if has_choice else "auto",
        "precision": fingerprint["precision"] or "float32",
        "background": background_of(fingerprint.get("preprocessing")),
    }


def feature_names(feature: str) -> tuple[str, ...]:
    """Return the encoder's own names of a cached feature: `encoder/feature`, or several joined by `+`.

    Example:
        >>> feature_names("dinov2/cls+dinov2/patches")
        ('cls', 'patches')
    """
    return tuple(part.rpartition("/")[2] for part in feature.split("+"))


@dataclass(frozen=True)
class EncoderSpec:
    """A parsed encoder spec: a name in `ENCODERS` or `module:attribute`, a name or path of a model, and options."""

    family: str
    model: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "EncoderSpec":
        """Parse `family:model[,option=value]…`.

        Example:
            >>> spec = EncoderSpec.parse("st:all-MiniLM-L6-v2,truncate_dim=128")
            >>> spec.family, spec.model, spec.int_option("truncate_dim")
            ('st', 'all-MiniLM-L6-v2', 128)
        """
        name, *options = split_options(text)
        family, colon, model = name.strip().partition(":")

        if not (family and colon and model):
            families = ", ".join(ENCODERS.names)
            raise SettingError(f"invalid encoder {text!r}: expected family:model: {_EXAMPLES}; families: {families}")

        if family not in ENCODERS and family not in (IMPORTED, DERIVED):
            attribute, _, model = model.partition(":")
            family = f"{family}:{attribute}"

        return cls(family, model, parse_options(text, options, unstripped=_TEXTS))

    @property
    def text(self) -> str:
        """The spec as a string, with options sorted by name. `parse` reads it back."""
        name = f"{self.family}:{self.model}" if self.model else self.family
        options = [f"{key}={quote_option(value)}" for key, value in sorted(self.options.items())]
        return ",".join([name, *options])

    @property
    def absolute(self) -> "EncoderSpec":
        """The same spec with absolute local paths, so that it opens from any working directory."""
        options = dict(self.options)
        for key, value in self.options.items():
            path = expand_home(value)
            if key not in _TEXTS and path.exists():
                options[key] = str(path.absolute())

        model = str(expand_home(self.model).absolute()) if self.is_path else self.model
        if self.inner is not None:
            model = EncoderSpec(self.inner.family, self.inner.absolute.model).text
        return EncoderSpec(self.family, model, options)

    @property
    def inner(self) -> "EncoderSpec | None":
        """Spec of the encoder that a `frames` model names, as `lite:efficientnet-lite0`. None for other families."""
        if self.family != "frames" or ":" not in self.model:
            return None

        # All options but the rate belong to the image encoder.
        options = dict(self.options)
        options.pop("rate", None)
        return replace(EncoderSpec.parse(self.model), options=options)

    @property
    def is_path(self) -> bool:
        """Whether the model is a path: it starts with `/`, `~` or a dot, or has a `/` and is an existing folder."""
        is_folder = "/" in self.model and Path(self.model).is_dir()
        return is_folder or self.model in {".", ".."} or self.model.startswith(_PATH_STARTS)

    @property
    def folder(self) -> str:
        """Name of the encoder's folder in a cache: the model's name, or the last part of its path."""
        if self.inner is not None:
            return self.inner.folder
        # Paths such as `.` name a folder only when they are resolved.
        name = self.model or self.family.rpartition(":")[2]
        if self.is_path:
            path = expand_home(self.model)
            name = (path.resolve() if path.name in {"", ".."} else path).name
            name = name.removesuffix(".safetensors")
        return re.sub(r"[^\w.=+-]", "-", name.replace("/", "--")).lstrip(".") or "model"

    @property
    def weights(self) -> Path | None:
        """The option `weights`, a local file instead of the published weights."""
        return expand_home(self.options["weights"]) if "weights" in self.options else None

    def int_option(self, name: str) -> int | None:
        """Return an option that is a positive whole number. It is None without the option."""
        text = self.options.get(name)
        if text is not None and not (text.isdecimal() and int(text)):
            raise SettingError(f"option {name} in {self.text}: expected a whole number of at least 1, got {text!r}")
        return None if text is None else int(text)

    def fingerprint(self, **fields: Any) -> Fingerprint:
        """Return the fingerprint of the model that the spec names, with other `fields` of `Fingerprint`."""
        return Fingerprint(family=self.family, model=self.model_name, **fields)

    @property
    def model_name(self) -> str:
        """Name of the model in a fingerprint: a path is replaced by the folder's name."""
        return self.folder if self.is_path else self.model


def check_options(spec: EncoderSpec, known: Collection[str]) -> None:
    """Check that a spec has only options of its family."""
    for name in spec.options:
        if name not in known:
            raise unknown_name("option", name, known, where=f"of the encoder family {spec.family!r}")


def check_modality(spec: EncoderSpec, modality: Modality, served: Modality) -> None:
    """Check that a family, or a model of it, serves the requested modality."""
    if modality != served:
        raise SettingError(f"{spec.text}: expected an encoder of {noun(modality)}, got one of {noun(served)}")
