"""How features are made and stored."""

from dataclasses import dataclass, field, replace
from typing import Literal

from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """How features are made and stored. Only `features`, `views`, `dtype` and the encoders' precision decide values.

    Args:
        features: names to store; an encoder that has none of them stores its first. Empty: each its first.
        views: other looks at the same items, such as `crop:0.5`, stored beside the plain one.
        dtype: dtype on disk.
        chunk_size: items in a chunk; None is 2,048 for a new cache.
        threads: threads that read and decode; None is one a core.
        worker: this process's share, as i/n: of the missing chunks those whose number leaves i when divided by n.
        devices: torch devices, one process each; empty: all CUDA devices, else the CPU.
        engine: what runs the work: a name in `ENGINES`.
        address: of a running Ray cluster; None starts one on this machine.
        num_actors: processes of Ray that hold the encoders; None is one a GPU, or one a node without GPUs.
        encoder: precision and backend of all encoders; its device is one of `devices`.
    """

    features: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    dtype: Literal["float16", "float32"] = "float16"
    chunk_size: int | None = None
    threads: int | None = None
    worker: str = "0/1"
    devices: tuple[str, ...] = ()
    engine: str = "local"
    address: str | None = None
    num_actors: int | None = None
    encoder: EncoderSettings = field(default_factory=EncoderSettings)

    def __post_init__(self) -> None:
        for name in ("threads", "num_actors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}; it must be at least 1")
        self.takes(0)

    def share(self, number: int, count: int) -> "ExtractSettings":
        """Give one of `count` equal parts of this worker's share."""
        mine, _, workers = self.worker.partition("/")
        return replace(self, worker=f"{int(mine) + int(workers) * number}/{int(workers) * count}")

    def takes(self, chunk: int) -> bool:
        """Say whether a chunk is this worker's.

        Raises:
            SettingError: the worker is not i/n with i from 0 to n - 1.
        """
        number, slash, count = self.worker.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise SettingError(f"worker is {self.worker!r}; write i/n with i from 0 to n - 1, such as 0/4 to 3/4")
        return chunk % int(count) == int(number)
