"""Drawings of SVG through resvg."""

from typing import Any

import resvg_py


def draw_png(**options: Any) -> bytes:
    """Draw an SVG as a PNG with the arguments of `resvg_py.svg_to_bytes`.

    Raises:
        ValueError: the SVG cannot be parsed or drawn.
    """
    try:
        return bytes(resvg_py.svg_to_bytes(**options))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of Rust has no class that could be imported
        raise ValueError(str(error)) from None
