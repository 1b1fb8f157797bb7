"""What settings classes declare as numbers: part of the interface, which changes only on purpose."""

import importlib
import math
from dataclasses import is_dataclass

from embedcache.settings import FlatSetting, flat_settings


def declared_numbers(module: str) -> dict[str, list[str]]:
    """Return class -> its settings with a number as default or bound, as `name default range`; groups are left out."""
    found = {}
    for kind in vars(importlib.import_module(module)).values():
        if is_dataclass(kind) and kind.__module__ == module:
            own = [item for item in flat_settings(kind) if len(item.path) == 1]  # type: ignore[arg-type]
            lines = [line for line in map(_describe, own) if line]
            if lines:
                found[kind.__name__] = lines  # type: ignore[union-attr]
    return found


def _describe(item: FlatSetting) -> str | None:
    declared, default = item.declared, item.default
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    low = (
        f"[{declared.ge:g}" if declared.ge is not None else f"({declared.gt:g}" if declared.gt is not None else "(-inf"
    )
    high = f"{declared.le:.9g}]" if declared.le is not None else f"{declared.lt or math.inf:.10g})"
    if not is_number and (low, high) == ("(-inf", "inf)"):
        return None
    return f"{item.name} {default} {low}, {high}"
