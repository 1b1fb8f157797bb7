"""A package of icons in the layout of @iconify/json: shapes in colors, in families with a style each."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "circle": "M12 3a9 9 0 1 0 .1 0z",
    "square": "M3 3h18v18H3z",
    "triangle": "M12 2l10 19H2z",
    "cross": "M9 2h6v7h7v6h-7v7H9v-7H2V9h7z",
    "diamond": "M12 1l9 11-9 11-9-11z",
    "star": "M12 1l3 8h8l-6 5 2 9-7-5-7 5 2-9-6-5h8z",
    "heart": "M12 21L3 12a5 5 0 0 1 9-6 5 5 0 0 1 9 6z",
    "arrow": "M2 9h11V3l9 9-9 9v-6H2z",
    "moon": "M15 2a10 10 0 1 0 7 14A9 9 0 0 1 15 2z",
    "house": "M12 2l10 9h-3v11H5V11H2z",
    "lightning": "M13 1L4 14h6l-2 9 10-13h-7z",
    "flag": "M4 2h16l-4 5 4 5H7v11H4z",
}
COLORS = {
    "red": "#e02424",
    "orange": "#f97316",
    "yellow": "#facc15",
    "green": "#16a34a",
    "blue": "#2563eb",
    "purple": "#7e22ce",
    "pink": "#f472b6",
    "brown": "#7c4a1e",
    "gray": "#9ca3af",
    "black": "#111111",
}
KINDS = {
    "big": '<path fill="currentColor" d="{d}"/>',
    "small": '<path fill="currentColor" transform="translate(7 7) scale(.4)" d="{d}"/>',
    "hollow": '<path fill="none" stroke="currentColor" stroke-width="1.5" d="{d}"/>',
    "double": '<g fill="currentColor"><path transform="translate(0 6) scale(.48)" d="{d}"/>'
    '<path transform="translate(12 6) scale(.48)" d="{d}"/></g>',
}
STYLES = {
    "plain": "{body}",
    "tilted": '<g transform="rotate(14 12 12)">{body}</g>',
    "tile": '<path fill="#eef2f7" d="M0 0h24v24H0z"/><g transform="translate(4 4) scale(.68)">{body}</g>',
    "ringed": '<circle cx="12" cy="12" r="11.5" fill="none" stroke="#94a3b8"/>'
    '<g transform="translate(5 5) scale(.6)">{body}</g>',
}


def write_package(folder: Path) -> Path:
    """Write eight families, four of each palette, each with a drawn part of the names: 256 icons in all."""
    (folder / "json").mkdir(parents=True)
    (folder / "package.json").write_text('{"version": "1.0.0"}')
    rng, about = np.random.default_rng(0), {}
    colored = {
        f"{color}-{shape}": f'<path fill="{value}" d="{d}"/>'
        for (color, value), (shape, d) in product(COLORS.items(), SHAPES.items())
    }
    mono = {f"{kind}-{shape}": body.format(d=d) for (kind, body), (shape, d) in product(KINDS.items(), SHAPES.items())}
    for (style, frame), (palette, bodies, count) in product(
        STYLES.items(), (("color", colored, 48), ("mono", mono, 16))
    ):
        prefix = f"{style}-{palette}"
        names = sorted(rng.choice(sorted(bodies), count, replace=False).tolist())
        icons = {name: {"body": frame.format(body=bodies[name])} for name in names}
        about[prefix] = _describe(prefix, is_color=palette == "color")
        content = {"prefix": prefix, "icons": icons, "width": 24, "height": 24}
        (folder / "json" / f"{prefix}.json").write_text(json.dumps(content))
    (folder / "collections.json").write_text(json.dumps(about))
    return folder


def _describe(prefix: str, *, is_color: bool) -> dict[str, Any]:
    return {
        "name": prefix.title(),
        "author": {"name": f"Author of {prefix}", "url": "https://example.org"},
        "license": {"spdx": "MIT", "url": "https://example.org/license"},
        "palette": is_color,
    }
