"""Settings of an extraction, and the job they are part of. Nothing heavy is imported here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from embedcache.encoders.base import EncoderSettings
from embedcache.errors import SettingError
from embedcache.modalities import ModalityName
from embedcache.processes import AUTO, address_setting, device_setting, engine_setting, num_cores
from embedcache.settings import Settings, group, parse_fraction, replace_fields, setting

if TYPE_CHECKING:
    from embedcache.modalities import Source


class ExtractSettings(Settings):
    """Settings of extraction: how features are computed and stored.

    Only `features`, `views`, `dtype` and the encoders' precision and backend change the stored values.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> settings = ExtractSettings(dtype="float32", limit=5)
        >>> embedcache.extract_features("photos", "five-photos", image_encoder=encoder, settings=settings)[0]
        open_example (vector): encoded 5 images, reused 0, failed 0
        >>> embedcache.Cache("five-photos").feature("image")
        Feature(open_example/vector: image, (5, 48) float32)
    """

    features: tuple[str, ...] = setting(
        (),
        "Feature to store, such as cls, patches, grid:4, kmeans:4 or layer6.cls; an encoder without any of them stores "
        "its default feature. May be repeated.",
        flat_name="feature",
        metavar="NAME",
        default_text="the default of each encoder",
    )
    views: tuple[str, ...] = setting(
        (),
        "Also encode an altered version of each item: crop:0.5, flip or module:function[:ARGUMENT]. May be repeated.",
        flat_name="view",
        metavar="VIEW",
        commas="split specs",
    )
    dtype: Literal["float16", "float32"] = setting("float16", "Data type of the stored features.")
    chunk_size: int | None = setting(
        None,
        "Items per chunk, the unit of work and resume.",
        ge=1,
        le=2**24,
        affects_result=False,
        default_text="2048 to 16384, depending on the number of items",
    )
    limit: int | None = setting(
        None,
        "Take only the first N samples of the source; --extend with a larger N, or none, appends the next ones.",
        ge=1,
        le=2**48,
        affects_result=False,
        default_text="all samples",
    )
    extend: bool = setting(
        False, "Append samples that were added to the source, or that --limit left out.", affects_result=False
    )
    shard: str = setting(
        "0/1",
        "Work only on shard i of n, so that n jobs of an array share the chunks; i counts from 0.",
        affects_result=False,
        metavar="I/N",
        panel="machine",
    )
    devices: tuple[str, ...] = setting(
        (),
        "Torch devices, such as cpu or cuda:0,cuda:1; one worker process runs on each. auto is all GPUs, else the CPU. "
        "May be repeated.",
        flat_name="device",
        affects_result=False,
        metavar="DEVICE",
        default_text=AUTO,
        panel="machine",
    )
    threads: int | None = setting(
        None,
        "Threads per device that read and decode items.",
        ge=1,
        le=1024,
        affects_result=False,
        default_text="one per core",
        panel="machine",
    )
    engine: Literal["local", "ray"] = engine_setting(panel="machine")
    address: str | None = address_setting(panel="machine")
    actors: int | None = setting(
        None,
        "Ray tasks that share the chunks.",
        ge=1,
        affects_result=False,
        default_text="one per GPU, or one per node without GPUs",
        panel="machine",
    )
    encoder: EncoderSettings = group(EncoderSettings)

    @field_validator("shard")
    @classmethod
    def _check_shard(cls, shard: str) -> str:
        number, slash, count = shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise SettingError(f"shard: expected i/n with i from 0 to n - 1, such as 0/4 to 3/4, got {shard!r}")
        return shard

    @property
    def num_threads(self) -> int:
        """Number of threads that read and decode items."""
        return self.threads or num_cores()

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """The numbers i and n: chunks whose number modulo n is i belong to the shard."""
        number, count = map(int, self.shard.split("/"))
        return number, count

    def split_shard(self, number: int, count: int) -> "ExtractSettings":
        """Return the settings for part `number` of `count` equal parts of the shard."""
        own_number, own_count = self.shard_numbers
        return replace_fields(self, shard=f"{own_number + own_count * number}/{own_count * count}")


class VerifySettings(Settings):
    """Settings of `verify_cache`: the steps beyond comparing checksums.

    Example:
        >>> embedcache.verify_cache("cache", VerifySettings(reencode=0.5)).is_sound
        True
    """

    reencode: float | None = setting(
        None,
        "Encode this fraction of the items again and compare, such as 0.1%.",
        gt=0,
        le=1,
        parse=parse_fraction,
        metavar="FRACTION",
    )
    repair: bool = setting(False, "Encode or derive damaged and missing chunks.")
    device: str = device_setting()


@dataclass(frozen=True, kw_only=True)
class ExtractJob:
    """A complete description of an extraction, from which any process on any machine can take part.

    Args:
        encoders: modality -> specs of its encoders; a modality without encoders is absent.
        places: where items of the source are read; None: anywhere, as the user named the source itself.
        opened: the source, in the process that opened it; None in others.
    """

    cache: str
    source: Mapping[str, Any]
    encoders: Mapping[ModalityName, tuple[str, ...]]
    settings: ExtractSettings
    places: Sequence[str] | None = None
    opened: "Source | None" = None
