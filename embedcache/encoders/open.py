"""From a spec such as `timm:vit_small_patch14_dinov2.lvd142m,weights=model.safetensors` to an open encoder.

    family:model[,option=value]…

A spec is text, so that a cache can keep it and anyone can open the same encoder again. The family is a name in
`ENCODERS`, or `module:attribute` of your own: `my_module:open_mine[:model][,option=value]…`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError, UnknownNameError
from embedcache.provenance import check_same
from embedcache.registry import Registry, unknown_name

ENCODERS = Registry(
    "encoder family",
    {
        "hf": "embedcache.encoders.transformers:open_transformers",
        "imported": "embedcache.encoders.imported:open_imported",
        "lite": "embedcache.encoders.lite:open_lite",
        "open_clip": "embedcache.encoders.open_clip:open_open_clip",
        "st": "embedcache.encoders.sentence_transformers:open_sentence_transformers",
        "timm": "embedcache.encoders.timm:open_timm",
        "use": "embedcache.encoders.use:open_use",
        "wordllama": "embedcache.encoders.wordllama:open_wordllama",
    },
)
"""Each is a function of a spec, a modality and settings: `open_mine(spec, *, modality, settings) -> Encoder`."""

_EXAMPLES = "timm:vit_small_patch14_dinov2.lvd142m or st:all-MiniLM-L6-v2"
_PATH_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, in words.

    Args:
        family: a name in `ENCODERS`, or `module:attribute`.
        model: a name the family knows, or the path of a local folder.
        options: the family's own options, such as `weights`.
    """

    family: str
    model: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "EncoderSpec":
        """Read `family:model[,option=value]…`.

        Raises:
            SettingError: it has no family or no model, or an option is not `name=value`.
        """
        name, *options = text.strip().split(",")
        family, colon, model = name.partition(":")
        if not (family and colon and model):
            raise SettingError(
                f"{text!r} does not name an encoder; write family:model, such as {_EXAMPLES}; "
                f"families: {', '.join(ENCODERS.paths)}"
            )
        if family not in ENCODERS.paths:
            attribute, _, model = model.partition(":")
            family = f"{family}:{attribute}"
        return cls(family, model, _parse_options(text, options))

    @property
    def text(self) -> str:
        """The spec as text, options sorted by name; `parse` reads it back."""
        name = f"{self.family}:{self.model}" if self.model else self.family
        return ",".join([name, *(f"{key}={value}" for key, value in sorted(self.options.items()))])

    @property
    def absolute(self) -> "EncoderSpec":
        """The same spec with every local path from the root, so that it opens from any working folder."""
        model = _absolute(self.model) if self.is_path else self.model
        options = {key: _absolute(value) if _is_file(value) else value for key, value in self.options.items()}
        return EncoderSpec(self.family, model, options)

    @property
    def is_path(self) -> bool:
        """Whether the model is a path: from the root, the home or a dot, or with a `/` and a folder that is there."""
        is_folder = "/" in self.model and Path(self.model).is_dir()
        return is_folder or self.model in {".", ".."} or self.model.startswith(_PATH_STARTS)

    @property
    def folder(self) -> str:
        """The name of the encoder's folder in a cache, made from the model's name or the last part of its path."""
        name = self.model or self.family.rpartition(":")[2]
        if self.is_path:
            path = Path(self.model).expanduser()
            name = (path.resolve() if path.name in {"", ".."} else path).name
        return re.sub(r"[^\w.=+-]", "-", name.replace("/", "--")).lstrip(".") or "model"


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _is_file(value: str) -> bool:
    return Path(value).expanduser().exists()


def open_encoder(spec: str | EncoderSpec, *, modality: Modality, settings: EncoderSettings | None = None) -> Encoder:
    """Open a frozen encoder.

    Args:
        spec: the spec, or its text.
        modality: what it shall encode; some families serve both.
        settings: device, precision and backend; float32 on the CPU when None.

    Raises:
        EmbedcacheError: a leaf of it for each thing that may be wrong with a spec: no such family, model or option,
            a modality the family does not serve, a missing package, weights that are missing or do not fit.
    """
    if isinstance(spec, str):
        spec = EncoderSpec.parse(spec)
    return _opener(spec)(spec, modality=modality, settings=settings or EncoderSettings())


def reopen_encoder(
    spec: str, *, modality: Modality, feature: str, fingerprint: Mapping[str, Any], device: str = "cpu"
) -> Encoder:
    """Open the very encoder that made a cached feature, with the precision and the backend it was made with.

    Args:
        spec: what the cache remembers of it.
        modality: what it encodes.
        feature: `encoder/feature`, or several with `+` between.
        fingerprint: what the encoder must be; a view's is that of the encoder behind it.
        device: where it runs; what onnxruntime made, it makes again on the CPU.

    Raises:
        FingerprintError: the encoder that opens now is another; names each field with both values.
    """
    settings = EncoderSettings(
        device="cpu" if fingerprint["backend"] == "onnxruntime" else device,
        backend=fingerprint["backend"] or "auto",  # imported vectors record neither
        precision=fingerprint["precision"] or "float32",
        features=feature_names(feature),
    )
    encoder = open_encoder(spec, modality=modality, settings=settings)
    plain = {field: value for field, value in fingerprint.items() if field != "view"}
    next_step = "use the weights and libraries that it was extracted with, or extract again"
    check_same(f"feature {feature}", plain, encoder.fingerprint.to_json(), next_step=next_step)
    return encoder


def feature_names(feature: str) -> tuple[str, ...]:
    """Give an encoder's own names of what a cache calls `encoder/feature`, or several with `+` between.

    Example:
        >>> feature_names("dinov2/cls+dinov2/patches")
        ('cls', 'patches')
    """
    return tuple(part.rpartition("/")[2] for part in feature.split("+"))


def check_options(spec: EncoderSpec, known: Collection[str]) -> None:
    """Refuse an option that a family does not have.

    Raises:
        UnknownNameError: lists the family's options.
    """
    for name in spec.options:
        if name not in known:
            raise unknown_name(f"option of the encoder family {spec.family!r}", name, known)


def check_modality(spec: EncoderSpec, modality: Modality, served: Modality) -> None:
    """Refuse a modality other than the one a family, or a model of it, serves.

    Raises:
        SettingError: says which it serves.
    """
    if modality != served:
        raise SettingError(
            f"{spec.text} encodes {served}, asked for {modality}; give it as the {served} encoder, "
            f"or choose another for {modality}"
        )


def _parse_options(text: str, parts: Collection[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value):
            raise SettingError(
                f"{part!r} in {text!r} is not an option; write name=value after a comma "
                "(a path with a comma in it can't be used here: rename it or link to it)"
            )
        if name in options:
            raise SettingError(f"the option {name!r} is given twice in {text!r}; give it once")
        options[name] = value
    return options


def _opener(spec: EncoderSpec) -> Callable[..., Encoder]:
    try:
        opener = ENCODERS.load(spec.family)
    except UnknownNameError as error:
        family = spec.family.partition(":")[0]
        raise unknown_name("encoder family", family, ENCODERS.paths, hint=_own_hint(error)) from error
    if not callable(opener):
        raise SettingError(
            f"{spec.family} is a {type(opener).__name__}, not a function that opens an encoder; "
            "write one like open_timm in embedcache/encoders/timm.py"
        )
    return cast(Callable[..., Encoder], opener)


def _own_hint(error: UnknownNameError) -> str:
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return f"a plug-in of your own is named module:attribute{cause}"
