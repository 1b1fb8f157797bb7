"""Imports between packages go downwards only, without cycles, and each heavy library has few importers."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import embedcache

PACKAGE = Path(embedcache.__file__).parent
LAYERS = [
    {"errors"},
    {"registry", "progress", "modalities"},
    {"arrays", "modeling"},
    {"settings"},
    {"processes", "files"},
    {"neighbors"},
    {"metrics", "provenance"},
    {"store"},
    {"sources", "encoders", "projectors"},
    {"runs"},
    {"dataset"},
    {"derive"},
    {"extract"},
    {"train", "search"},
    {"evaluate", "curate"},
    {"reports"},
    {"inference"},
    {"quickstart", "sweep", "export", "vectors", "serve", "testing"},
    {"maintain"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "google_crc32c": {"store"},
    "zarr": {"store"},
    "upath": {"files"},
    "ray": {"processes"},
    "pandas": {"store", "search"},
    "datasets": {"sources"},
    "av": {"sources"},
    "fontTools": {"quickstart"},
    "faiss": {"search"},
    "timm": {"encoders"},
    "transformers": {"encoders", "export", "modeling"},
    "sentence_transformers": {"export"},
    "open_clip": {"encoders", "export"},
    "clip_benchmark": {"vectors", "sources"},
    "mteb": {"vectors"},
    "onnxruntime": {"encoders", "export"},
    "ctranslate2": {"encoders"},
    "typer": {"cli"},
    "rich": {"cli"},
    "tqdm": {"progress"},
    "tensorboard": {"train"},
    "wandb": {"train"},
    "jinja2": {"reports"},
    "matplotlib": {"reports", "sweep"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "optuna": {"sweep"},
    "sqlalchemy": {"sweep"},
    "sklearn": {"evaluate", "sweep"},
    "umap": {"curate"},
    "pytest": {"testing"},
}
"""Heavy library -> packages that may import it. A library that is not listed may be imported anywhere."""
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(("embedcache", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def all_imports(tree: ast.Module) -> set[str]:
    """Return every module that a file imports at any place, and every name it passes to `require`."""
    found = set()
    for node in ast.walk(tree):
        found |= imported_by(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def imported_by(node: ast.AST) -> set[str]:
    """Return the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.slow
def test_imports_go_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in FILES
        if package_of(path) != "__init__"
        for module in all_imports(parse(path))
        if module.startswith("embedcache.") and module.split(".")[1] in LEVEL
        if module.split(".")[1] != package_of(path) and LEVEL[module.split(".")[1]] >= LEVEL[package_of(path)]
    ]
    assert not wrong


@pytest.mark.slow
def test_modules_have_no_import_cycles() -> None:
    graph = {
        name: {module for node in parse(path).body for module in imported_by(node)} & set(MODULES) - {name}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"import cycle: {error.args[1]}") from None


@pytest.mark.slow
def test_heavy_libraries_have_few_importers() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in FILES
        for module in all_imports(parse(path))
        if package_of(path) not in HEAVY.get(module.split(".")[0], {package_of(path)})
    ]
    assert not wrong


def test_every_package_has_a_level() -> None:
    assert {package_of(path) for path in FILES} - {"__init__"} == set(LEVEL)
