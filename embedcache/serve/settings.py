"""Where the page is served, to whom, and what it takes at most."""

import ipaddress
import re
from dataclasses import dataclass

from embedcache.errors import SettingError

_SHORTEST_TOKEN = 16
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_LAST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a search page is served.

    Args:
        host: address or name that is bound.
        port: 0 takes any that is free.
        token: what a browser or a program must show; None is none on this machine alone, else one that is drawn.
        names: what else people write before the port, such as `search.example.org`: a request for another name is
            refused, as a page of a stranger's whose name leads here would send it.
        max_upload_bytes: of a picture that is asked with.
        max_pixels: of such a picture.
        timeout_s: for a request, from its first byte to the end of its answer.
        trusts_cache: read pictures wherever the cache says: behind URLs, in other folders, by a source of one's own.

    Raises:
        SettingError: a value out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    names: tuple[str, ...] = ()
    max_upload_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    timeout_s: float = 30.0
    trusts_cache: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _LAST_PORT:
            raise SettingError(f"port is {self.port}; it must be 0 to {_LAST_PORT}, and 0 takes any that is free")
        if self.token is not None and len(self.token) < _SHORTEST_TOKEN:
            raise SettingError(
                f"the token has {len(self.token)} characters; it must have at least {_SHORTEST_TOKEN}: leave --token "
                "out, and one is drawn"
            )
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise SettingError("the token must be of ASCII letters, digits, - and _, as it stands in a link")
        for name in ("max_upload_bytes", "max_pixels", "timeout_s"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can ask."""
        address = as_address(self.host)
        return self.host == "localhost" if address is None else address.is_loopback


def as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an IP address, in brackets or not; None where it is a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
