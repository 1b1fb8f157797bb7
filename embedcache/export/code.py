"""Write the Python code of an exported folder, so that it runs where neither embedcache nor a plug-in is installed.

transformers has no class for two frozen encoders with trained projectors, nor an image processor that prepares images
exactly as at extraction. With `trust_remote_code=True` it runs the code in a folder instead, all of it beside the
weights and without subfolders:

    modeling_embedcache.py            the model (only of the format transformers)
    projectors.py                     which classes are the projectors of the run; written here (likewise)
    image_processing_embedcache.py    the image processor (also of ONNX graphs of whole towers)
    heads.py, arrays.py …             modules of embedcache that these import, by their last name
    visplug_heads.py, visplug_util.py modules of a plug-in `visplug` with a projector, by their full name

All but `projectors.py` are copies of modules, with a first line that names the module; only their imports of each other
are changed, to relative ones. What is copied may otherwise import `LIBRARIES` and the standard library only.
"""

import ast
import inspect
import keyword
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType

from embedcache.encoders.base import Modality
from embedcache.errors import SettingError, one_line
from embedcache.export.base import unsupported

LIBRARIES = ("PIL", "numpy", "torch", "transformers")
"""What copied modules may import besides the standard library and each other."""
MODEL_MODULE = "embedcache.export.hub_code.modeling_embedcache"
PROCESSOR_MODULE = "embedcache.export.hub_code.image_processing_embedcache"

_HEADER = "# Copyright the embedcache authors. Apache-2.0. Copied from {module} of embedcache by its export.\n"
_PLUGIN_HEADER = (  # two lines, so that Python ignores the encoding that a third line may declare: all files are UTF-8
    "# Copied from {module} by the export of embedcache, which changed the imports of copied modules.\n"
    "# The license is that of {package}.\n"
)
_NESTED = "# Imports of the modules above: transformers 4 copies only what this file imports itself.\n"
_ALLOWED = {*LIBRARIES, *sys.stdlib_module_names}
_RESERVED = ("__init__", "image_processing_embedcache", "modeling_embedcache", "projectors")
_FROM = re.compile(r"from\b.*?\bimport\b", re.DOTALL)
_FOUND_BY_TRANSFORMERS = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)

_Refuse = Callable[[str], SettingError]


@dataclass(frozen=True)
class _ImportedName:
    """A name that an import statement binds, or `*`.

    Args:
        module: the copied module; None: a module that is not copied.
        attribute: what is imported from it; None: the module itself.
    """

    module: str | None
    attribute: str | None
    alias: ast.alias


@dataclass(frozen=True)
class _Module:
    """A copied module: its source code, and its import statements that name copied modules, in order."""

    source: str
    imports: Sequence[tuple[ast.stmt, Sequence[_ImportedName]]]

    @property
    def modules(self) -> list[str]:
        return [name.module for _, names in self.imports for name in names if name.module is not None]


def write_model_code(projectors: Mapping[Modality, tuple[str, str]], folder: Path, format_name: str) -> Collection[str]:
    """Write the code of a model, its projectors and its image processor.

    Args:
        projectors: modality -> module and name of the class of its projector.

    Returns:
        The packages of plug-ins of which the folder has copies.

    Raises:
        SettingError: see `copy_code`.
    """
    own_modules = [module for module, _ in projectors.values() if not _is_of_library(module)]
    files = copy_code([MODEL_MODULE, *own_modules], folder, format_name)
    lines = ['"""The projectors of both modalities."""', ""]
    packages = [name for name in sorted(files) if _is_plugin(name) and hasattr(sys.modules[name], "__path__")]
    lines += [f"from .{files[name]} import __name__ as _" for name in packages]  # Python runs packages first
    for modality, (module, attribute) in projectors.items():
        source = module if _is_of_library(module) else f".{files[module]}"
        _check_name(attribute, format_name)
        lines.append(f"from {source} import {attribute} as {modality.title()}Projector")
    text = "\n".join([*lines, "", '__all__ = ["ImageProjector", "TextProjector"]', ""])
    (folder / "projectors.py").write_text(text, "utf-8")
    return {module.partition(".")[0] for module in files if _is_plugin(module)}


def copy_code(modules: Sequence[str], folder: Path, format_name: str) -> dict[str, str]:
    """Copy modules, that of the image processor, and those of this package and of plug-ins that they import.

    transformers opens the first module and that of the processor.

    Returns:
        Copied module -> name of its file, without `.py`.

    Raises:
        SettingError: a module has no source code, or imports a library or in a way that an export cannot.
    """
    copied = _collect([*modules, PROCESSOR_MODULE], format_name)
    files = _file_names(copied)
    texts = {module: _rewrite(code, files) for module, code in copied.items()}
    opened = {PROCESSOR_MODULE: [PROCESSOR_MODULE], **dict.fromkeys(modules[:1], modules)}
    for module, roots in opened.items():
        texts[module] += _import_nested(module, roots, copied, files)
    for module, text in texts.items():
        if _is_plugin(module):
            _check_text(module, text, files, format_name)
        header = _PLUGIN_HEADER if _is_plugin(module) else _HEADER
        package = module.partition(".")[0]
        (folder / f"{files[module]}.py").write_text(header.format(module=module, package=package) + text, "utf-8")
    return files


def _is_of_library(module: str) -> bool:
    """Return whether a module is of a library that an export requires, such as `torch.nn`."""
    return module.partition(".")[0] in LIBRARIES


def _is_plugin(module: str) -> bool:
    """Return whether a copied module is not of this package."""
    return module.partition(".")[0] != "embedcache"


def _check_name(name: str, format_name: str) -> None:
    """Check that a module or an attribute can be named in generated code."""
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        raise change_plugin(format_name, f"expected a name that an import statement can have, got {name!r}")


def change_plugin(format_name: str, reason: str) -> SettingError:
    """Return the error for a plug-in whose code cannot be part of an export."""
    next_step = "change the plug-in, or use embedcache export onnx"
    return unsupported(format_name, reason, next_step)


def _collect(roots: Sequence[str], format_name: str) -> dict[str, _Module]:
    """Read modules and all that they import from their packages: first those that built-in modules import."""
    packages = {"embedcache", *(root.partition(".")[0] for root in roots)}
    copied: dict[str, _Module] = {}
    for root in sorted(roots, key=_is_plugin):
        if root == "__main__":
            raise change_plugin(
                format_name, "expected a projector of a module, got one of the script or session itself"
            )
        _check_name(root, format_name)
        waiting = [root]
        while waiting:
            module = waiting.pop()
            if module not in copied:
                copied[module] = _read(module, packages, format_name)
                waiting += copied[module].modules
    return copied


def _read(module: str, packages: set[str], format_name: str) -> _Module:
    imported = _import(module, partial(change_plugin, format_name))
    source = _source(imported)
    if source is None:
        raise change_plugin(format_name, f"{module} is no file of Python code: expected modules written in Python")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = []
    for node in sorted(nodes, key=_position):
        names = list(_resolve(node, imported, module, packages, format_name))
        if any(name.module is not None for name in names):
            imports.append((node, names))
    return _Module(source, imports)


def _import(module: str, refuse: _Refuse) -> ModuleType:
    try:
        return import_module(module)
    except Exception as error:
        raise refuse(f"{module} cannot be imported: {type(error).__name__}: {one_line(error)}") from error


def _source(module: ModuleType) -> str | None:
    """Return the source code of a module, or None if it has none: a C extension, or an interactive session."""
    try:
        return inspect.getsource(module)
    except TypeError:
        return None
    except OSError:  # also raised for an empty file
        file = inspect.getsourcefile(module)
        return "" if file is not None and Path(file).is_file() else None


def _position(node: ast.stmt) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _resolve(
    node: ast.Import | ast.ImportFrom, importer: ModuleType, module: str, packages: set[str], format_name: str
) -> Iterator[_ImportedName]:
    """Yield the names of an import statement; SettingError if an export cannot have it."""

    def refuse(reason: str) -> SettingError:
        return change_plugin(format_name, f"{module}, line {node.lineno}: {reason}")

    if isinstance(node, ast.ImportFrom):
        base = _base(node, module, is_package=hasattr(importer, "__path__"), refuse=refuse)
        bases = [base] * len(node.names)
    else:
        bases = [alias.name for alias in node.names]
    for base, alias in zip(bases, node.names, strict=True):
        package = base.partition(".")[0]
        if package not in packages:
            if package not in _ALLOWED:
                raise unsupported(
                    format_name,
                    f"{module} imports {base}: expected only {', '.join(LIBRARIES)}, the standard library and modules "
                    f"of its own package",
                )
            yield _ImportedName(None, None, alias)
        elif isinstance(node, ast.ImportFrom):
            yield _resolve_from(base, alias, refuse)
        else:
            _check_module(base, f"import {base}", refuse)
            if alias.asname is None and "." in base:
                raise refuse(f"expected `from {base} import NAME` or `import {base} as NAME`, got `import {base}`")
            yield _ImportedName(base, None, alias)


def _base(node: ast.ImportFrom, module: str, *, is_package: bool, refuse: _Refuse) -> str:
    """Return the absolute name of the module after `from`."""
    name = "." * node.level + (node.module or "")
    try:
        return resolve_name(name, module if is_package else module.rpartition(".")[0])
    except ImportError as error:
        raise refuse(f"expected an import from within its package, got `from {name} import …`") from error


def _resolve_from(base: str, alias: ast.alias, refuse: _Refuse) -> _ImportedName:
    """Return whether a name that is imported from a module or package is an attribute of it or a submodule."""
    package = _import(base, refuse)
    if not hasattr(package, "__path__"):
        return _ImportedName(base, alias.name, alias)
    name, value = f"{base}.{alias.name}", vars(package).get(alias.name)
    is_submodule = isinstance(value, ModuleType) and value.__name__ == name
    if is_submodule or (alias.name not in vars(package) and alias.name != "*" and find_spec(name) is not None):
        _check_module(name, f"from {base} import {alias.name}", refuse)
        return _ImportedName(name, None, alias)
    if not _is_plugin(base):
        raise refuse(f"expected `from {base}.MODULE import {alias.name}`, got `from {base} import {alias.name}`")
    return _ImportedName(base, alias.name, alias)


def _check_module(name: str, statement: str, refuse: _Refuse) -> None:
    """Check that a module that gets a name of its own is no package, whose modules would be its attributes."""
    if hasattr(_import(name, refuse), "__path__"):
        raise refuse(f"expected `from {name}.MODULE import NAME`, got `{statement}`, which is a whole package")


def _file_names(copied: Mapping[str, object]) -> dict[str, str]:
    """Return the names of the files of copied modules, which differ also where case does not count."""
    files: dict[str, str] = {}
    own = [module for module in copied if not _is_plugin(module)]
    taken = {*_RESERVED} - {module.rpartition(".")[2] for module in own}
    for module in [*own, *sorted(set(copied) - {*own})]:
        name, stem = module.rpartition(".")[2], re.sub(r"[^0-9A-Za-z_]", "_", module)
        if _is_plugin(module) or name.lower() in taken:
            name, number = stem, 1
            while name.lower() in taken:
                number += 1
                name = f"{stem}_{number}"
        files[module] = name
        taken.add(name.lower())
    return files


def _rewrite(code: _Module, files: Mapping[str, str]) -> str:
    """Return source code in which imports of copied modules are imports of their files."""
    lines = code.source.encode().split(b"\n")  # positions count bytes
    for node, names in reversed(code.imports):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        text = "\n".join(line.decode() for line in [*lines[first:last], lines[last][: node.end_col_offset]])
        new = _rewrite_import(text[len(before.decode()) :], names, files)
        lines[first : last + 1] = [before + new.encode() + after]
    return b"\n".join(lines).decode()


def _rewrite_import(statement: str, names: Sequence[_ImportedName], files: Mapping[str, str]) -> str:
    """Return an import statement that names the files of copied modules.

    `from visplug.util import K` becomes `from .visplug_util import K`, and `import visplug.util as util` becomes
    `from . import visplug_util as util`.
    """
    if all(name.module is not None and name.attribute is not None for name in names):
        assert names[0].module is not None
        return _FROM.sub(f"from .{files[names[0].module]} import", statement, count=1)
    statements = []
    for name in names:
        bound = name.alias.asname or name.alias.name
        if name.module is None:
            statements.append(f"import {ast.unparse(name.alias)}")
        elif name.attribute is None:
            statements.append(f"from . import {files[name.module]} as {bound}")
        else:
            statements.append(f"from .{files[name.module]} import {name.attribute} as {bound}")
    return "; ".join(statements)


def _import_nested(module: str, roots: Sequence[str], copied: Mapping[str, _Module], files: Mapping[str, str]) -> str:
    """Return statements that import, into a module that transformers opens, what its imports import.

    transformers 4 copies only what such a module imports itself from a local folder.

    Args:
        roots: modules that are imported with it, itself included.
    """
    nested = _reachable(roots, copied) - {module, *copied[module].modules}
    lines = [f"from .{files[name]} import __name__ as _\n" for name in sorted(nested)]
    return "".join(["\n", _NESTED, *lines] if lines else [])


def _reachable(roots: Sequence[str], copied: Mapping[str, _Module]) -> set[str]:
    """Return modules with all that they import, directly or not."""
    found, waiting = set[str](), list(roots)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += copied[module].modules
    return found


def _check_text(module: str, text: str, files: Mapping[str, str], format_name: str) -> None:
    """Check that transformers, which finds relative imports by their text, finds only copied modules."""
    for found in _FOUND_BY_TRANSFORMERS.finditer(text):
        if (found[1] or found[2]) not in files.values():
            line = " ".join(found[0].split())
            raise change_plugin(
                format_name,
                f"{module} has the line {line!r} in a string, which transformers takes for an import: expected none",
            )
