"""How features are made and stored."""

from dataclasses import dataclass, field
from typing import Literal

from embedcache.encoders.contract import EncoderSettings
from embedcache.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """How features are made and stored.

    Args:
        features: names to store; an encoder that has none of them stores its first. Empty: each its first.
        dtype: dtype on disk.
        chunk_size: items in a chunk; None is 2,048 for a new cache.
        threads: threads that read and decode; None is one a core.
        worker: this process's share, as i/n: of the missing chunks those whose number leaves i when divided by n.
        encoder: device, precision and backend of all encoders.
    """

    features: tuple[str, ...] = ()
    dtype: Literal["float16", "float32"] = "float16"
    chunk_size: int | None = None
    threads: int | None = None
    worker: str = "0/1"
    encoder: EncoderSettings = field(default_factory=EncoderSettings)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads is {self.threads}; it must be at least 1")
        self.takes(0)

    def takes(self, chunk: int) -> bool:
        """Say whether a chunk is this worker's.

        Raises:
            SettingError: the worker is not i/n with i from 0 to n - 1.
        """
        number, slash, count = self.worker.partition("/")
        if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
            raise SettingError(f"worker is {self.worker!r}; write i/n with i from 0 to n - 1, such as 0/4 to 3/4")
        return chunk % int(count) == int(number)
