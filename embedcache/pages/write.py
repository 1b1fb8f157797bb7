"""Filling a page's template in."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined

from embedcache.disk import write_atomic


def write_page(path: Path, room: str, **values: Any) -> None:
    """Write the page whose template, `report.html.j2`, lies in a room; it extends `pages/base.html.j2`.

    Args:
        path: of the page.
        room: a package of embedcache, such as `sweep`.
        values: what the template names; text is escaped, a figure goes through `| safe`.
    """
    rooms = {name: PackageLoader(f"embedcache.{name}", "") for name in ("pages", room)}
    environment = Environment(
        loader=PrefixLoader(rooms), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_atomic(path, environment.get_template(f"{room}/report.html.j2").render(**values).encode())
