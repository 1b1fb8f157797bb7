"""Settings of the search page's server. Nothing heavy is imported here."""

import ipaddress
import re

from embedcache.errors import SettingError
from embedcache.search.settings import LABEL
from embedcache.settings import Settings, parse_size, setting

_MIN_TOKEN_LENGTH = 16
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


class ServeSettings(Settings):
    """Where a search page is served, to whom, and its limits."""

    host: str = setting(
        "127.0.0.1", "Address to bind; one that others can reach requires a token.", metavar="ADDRESS", panel="server"
    )
    port: int = setting(8000, "Port to bind; 0 chooses any free port.", ge=0, le=65535, panel="server")
    token: str | None = setting(
        None, "Token that visitors must send.", metavar="TOKEN", default_text="random, where required", panel="server"
    )
    names: tuple[str, ...] = setting(
        (), "Accept requests for this host name too.", flat_name="host_name", metavar="NAME", panel="server"
    )
    max_upload: int = setting(
        20 * 2**20,
        "Largest query file in bytes.",
        gt=0,
        metavar="SIZE",
        default_text="20MiB",
        parse=parse_size,
        panel="server",
    )
    max_pixels: int = setting(40_000_000, "Largest query image in pixels.", gt=0, panel="server")
    timeout: float = setting(30.0, "Request timeout in seconds.", gt=0, le=86_400, metavar="SECONDS", panel="server")
    label: str = setting(**LABEL)

    def model_post_init(self, _context: object) -> None:
        if not self.host:
            raise SettingError("host: expected an address such as 127.0.0.1, or 0.0.0.0 for all, got an empty text")
        if self.token is not None and len(self.token) < _MIN_TOKEN_LENGTH:
            raise SettingError(
                f"token: expected at least {_MIN_TOKEN_LENGTH} characters, got {len(self.token)}; omit --token "
                "for a random one"
            )
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise SettingError("token: expected ASCII letters, digits, - and _, because it is part of a link")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        address = parse_address(self.host)
        return self.host == "localhost" if address is None else address.is_loopback


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, with or without brackets; None for a host name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
