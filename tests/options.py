"""Write `embedcache/options.pyi`, the types of options by name, from the settings classes: `just options`."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import embedcache
from embedcache.export.settings import HubSettings
from embedcache.settings import FlatSetting, Settings, flat_settings

STUB = Path(embedcache.__file__).parent / "options.pyi"
HEAD = '''"""Options of public functions by name; written by `just options`. None stands for the default of an option.

There is no module of this name when code runs: import these types under `typing.TYPE_CHECKING`.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Literal, TypedDict

'''
PATHS = ("FILE", "FOLDER", "CACHE", "RUN", "INDEX", "PATH")
"""Ends of the placeholder of a setting that is a path, or may be one."""


def write_stub() -> str:
    """Return the text of the stub."""
    sources = "".join(path.read_text() for path in STUB.parent.rglob("*.py"))
    names = {*re.findall(r'Unpack\["(\w+)Options"\]', sources), "Source"}
    kinds = [getattr(embedcache, f"{name}Settings", HubSettings) for name in sorted(names)]
    classes = (line for kind in kinds for line in option_class(kind))
    text = "\n".join([HEAD, *classes])
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def option_class(kind: type[Settings]) -> Iterator[str]:
    """Iterate over the lines of a class of options."""
    if kind is embedcache.ExtractSettings:  # the source that it opens has options, too
        yield "class ExtractOptions(SourceOptions, total=False):"
        yield "    source_type: str | None"
    else:
        yield f"class {kind.__name__.removesuffix('Settings')}Options(TypedDict, total=False):"
    for item in flat_settings(kind):
        hints = dict.fromkeys([*setting_hints(item, item.type), "None"])
        yield f"    {item.name}: {' | '.join(hints)}"


def setting_hints(item: FlatSetting, hint: Any) -> Iterator[str]:
    """Iterate over the types of values that `Settings` converts to the type of a setting."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        yield f"Literal[{', '.join(map(repr, arguments))}]"
    elif origin is Mapping:
        (part,) = setting_hints(item, arguments[1])
        yield from dict.fromkeys([part, "str"])
        yield from ("Iterable[str]", f"Mapping[str, {part}]")
    elif origin is tuple:
        parts = " | ".join(setting_hints(item, arguments[0]))
        yield from (parts, f"Iterable[{parts}]")
    elif hasattr(hint, "__metadata__"):
        yield from setting_hints(item, hint.__origin__)
    elif arguments:
        for part in arguments:
            yield from setting_hints(item, part)
    elif hint is not type(None):
        is_path = hint is Path or (hint is str and (item.metavar or "").endswith(PATHS))
        yield from ("str", "PathLike[str]") if is_path else (hint.__name__,)
        if item.parse is not None:
            yield "str"


if __name__ == "__main__":
    STUB.write_text(write_stub(), encoding="utf-8")
