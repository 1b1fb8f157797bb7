"""Copies modules of this package into a model folder, so that they run there without it."""

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

from embedcache.exchange.models.run import refusal

_IMPORT = re.compile(r"^(\s*from )(embedcache\.[\w.]+)( import )", re.MULTILINE)
_HEADER = "# Copyright the embedcache authors. Apache-2.0. Copied from {module} of embedcache by its export.\n"
_ALLOWED = {"PIL", "numpy", "torch", "transformers", *sys.stdlib_module_names}


def ship(modules: list[str], folder: Path, form: str) -> None:
    """Copy modules, and those of this package that they import; imports of it become relative.

    Raises:
        SettingError: a module imports what the folder can't bring.
    """
    waiting, done = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        source = inspect.getsource(import_module(module))
        waiting += [found for _, found, _ in _IMPORT.findall(source)]
        text = _IMPORT.sub(lambda match: f"{match[1]}.{match[2].rpartition('.')[2]}{match[3]}", source)
        _check_imports(module, text, form)
        path = folder / f"{module.rpartition('.')[2]}.py"
        if not path.exists():  # what was written there before takes its place
            path.write_text(_HEADER.format(module=module) + text, encoding="utf-8")


def _check_imports(module: str, text: str, form: str) -> None:
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
        for name in names:
            if name.split(".")[0] not in _ALLOWED:
                raise refusal(form, f"{module} imports {name}, which a model folder can't bring")
