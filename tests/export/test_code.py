"""Exports whose projectors are plug-ins: their modules are copied, and run where the plug-ins are not installed."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import SettingError
from embedcache.export.base import TEXTS, TOLERANCE, ExportRun, example_images
from embedcache.export.code import MODEL_MODULE, _collect, _file_names, copy_code
from embedcache.export.export import export_run
from embedcache.export.settings import ExportSettings
from tests.export.runs import make_run

HEAD = """
from torch import nn

class {name}(nn.Module):
    def __init__(self, input_width, output_width):
        super().__init__()
        self.layer = nn.Linear(input_width, output_width)

    def forward(self, x):
        return {result}
"""
MODULES = {
    "heads.py": HEAD.format(name="Head", result="self.layer(x).tanh()"),
    "pp/__init__.py": "",
    "pp/heads.py": HEAD.format(name="LinearProjector", result="self.layer(x).sigmoid()"),
    "pp/projectors.py": (
        "from embedcache.encoders.base import Modality\nfrom embedcache.projectors.base import HasLinearBranch\n"
        "from embedcache.projectors.heads import Dropout\n" + HEAD.format(name="Head", result="Dropout(0.0)(x) @ M.T")
    ).replace("@ M.T", "@ self.layer.weight.T"),
    "pp/util.py": "from .deep.constants import K\n\ndef grow(x):\n    return K * x.square()\n",
    "pp/deep/__init__.py": "",
    "pp/deep/constants.py": "K, L = 3.0, 'ÄÄÄ'\n",
    "pp/forms.py": '''# -*- coding: latin-1 -*-
"""Ünicode, and every form of import that can be copied: import pp.heads."""
from __future__ import annotations
import math, pp.util as u
from . import util; from .util import (  # both
    K,
    grow as increase,
)
from pp.deep.constants import *
if 'Ä': from .deep import constants as c, constants
'''
    + HEAD.format(name="Head", result="(u.grow(y) * c.K).sin() + increase(y * len(L)).cos() * K * constants.K / util.K")
    .replace("(self, x)", "(self, x, é='Ä')")
    .replace("        return", "        y = self.layer(x) * len(é)\n        return"),
    "pp/made.py": (
        "from torch import nn\n\ndef make():\n    class Made(nn.Linear):\n        pass\n    return Made\n\n"
        "Head = make()\n"
    ),
    "pp_util.py": HEAD.format(name="Head", result="self.layer(x).sin()"),
    "pk/__init__.py": "SCALE = 0.5\nfrom .heads import Head\n",
    "pk/heads.py": "from . import SCALE\n" + HEAD.format(name="Head", result="(SCALE * self.layer(x)).sin()"),
}  # fmt: skip
CASES = {
    "module named as a built-in one": ("heads:Head+linear", {"heads_2", "heads"}),
    "module named as a generated file": ("pp.projectors:Head", {"pp_projectors", "base", "embedcache_encoders_base"}),
    "every form of import": ("pp.forms:Head", {"pp_forms", "pp_util", "pp_deep_constants"}),
    "class named as a built-in one": ("pp.heads:LinearProjector+linear", {"pp_heads", "heads"}),
    "names that are equal with underscores": ("pp.forms:Head+pp_util:Head", {"pp_util", "pp_util_2"}),
    "package with code": ("pk.heads:Head", {"pk", "pk_heads"}),
    "class that a function makes": ("pp.made:Head+token", {"pp_made", "tokens"}),
    "class of torch": ("torch.nn:Linear", {"projectors"}),
}  # fmt: skip
LOAD = """
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

sys.modules["embedcache"] = None
assert not any(map(find_spec, ("heads", "pp", "pp_util", "pk")))
for folder in map(Path, sys.argv[1:]):
    inputs = {name: torch.from_numpy(array) for name, array in np.load(folder.with_suffix(".npz")).items()}
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.inference_mode():
            image, text = model.get_image_features(inputs.pop("pixel_values")), model.get_text_features(**inputs)
        np.savez(folder.with_suffix(".out.npz"), image=image, text=text)
    except Exception as error:
        print(folder.name, repr(error))
"""


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of plug-ins on `sys.path`."""
    site = tmp_path_factory.mktemp("site")
    write_modules(site, MODULES)
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield site
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"heads", "pp", "pp_util", "pk", "bad"}:
            del sys.modules[name]


def write_modules(site: Path, modules: Mapping[str, str]) -> None:
    for name, source in modules.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(source, "latin-1" if "latin-1" in source else "utf-8")


@pytest.fixture(scope="module")
def exports(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Exports of all cases, whose vectors are computed in a process that finds no plug-in; and what it printed."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("exports")
    errors = ""
    for number, (projector, _) in enumerate(CASES.values()):
        text = (tiny["bert"], "tokens" if projector.endswith("+token") else "mean")
        run = make_run(folder / f"run{number}", (tiny["vit"], "cls"), text, projector)
        model = folder / f"model{number}"
        try:
            export_run("transformers", run, model)
        except Exception as error:  # noqa: BLE001 - of one case
            errors += f"model{number} {error!r}\n"
            continue
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        inputs = processor(
            images=example_images(), text=list(TEXTS), return_tensors="np", padding=True, truncation=True
        )
        np.savez(model.with_suffix(".npz"), **{n: inputs[n] for n in ("pixel_values", "input_ids", "attention_mask")})
    command = [sys.executable, "-c", LOAD, *map(str, sorted(path for path in folder.glob("model?") if path.is_dir()))]
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "HOME": str(folder)}
    environment["OMP_NUM_THREADS"] = "1"  # as in this process: threads would wait for each other, busily
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return folder, errors + done.stdout + (done.stderr if done.returncode else "")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_runs_without_the_plugin(case: str, exports: tuple[Path, str]) -> None:
    folder, printed = exports
    number, names = list(CASES).index(case), CASES[case][1]
    assert (folder / f"model{number}.out.npz").is_file(), printed
    run = ExportRun.open(folder / f"run{number}")
    with np.load(folder / f"model{number}.out.npz") as archive:
        found = dict(archive)
    for modality in ("image", "text"):
        np.testing.assert_allclose(found[modality], run.embed_examples(modality), atol=TOLERANCE)
        assert np.abs(found[modality][0] - found[modality][1]).max() > 10 * TOLERANCE
    assert names <= {path.stem for path in (folder / f"model{number}").glob("*.py")}


@pytest.mark.slow
def test_copies_are_in_the_record_and_on_the_card(exports: tuple[Path, str], tiny: dict[str, str]) -> None:
    folder, printed = exports
    model = folder / "model3"
    assert model.is_dir(), printed
    assert "`pp` are copies of its code" in (model / "README.md").read_text()
    assert (model / "pp_heads.py").read_text().splitlines()[0].startswith("# Copied from pp.heads by the export of ")
    assert "embedcache authors" not in (model / "pp_heads.py").read_text()


@pytest.mark.slow
def test_onnx_towers_of_a_plugin(tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "heads:Head+linear")
    assert max(export_run("onnx", run, tmp_path / "model", ExportSettings(towers=True)).differences.values()) < 1e-4
    assert not (tmp_path / "model" / "heads_2.py").exists()


@pytest.mark.slow
def test_code_that_needs_the_plugin_is_refused(tiny: dict[str, str], tmp_path: Path, plugins: Path) -> None:
    lazy = HEAD.format(name="Head", result="self.layer(x) * __import__('pp.util').util.K")
    write_modules(plugins, {"pp/lazy.py": lazy})
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "pp.lazy:Head+linear")
    words = r"the copied code of pp does not run outside of that package: ModuleNotFoundError: .*; change the plug"
    with pytest.raises(SettingError, match=words):
        export_run("transformers", run, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sys.modules["pp"] is not None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import bad.util", r"bad.x, line 2: expected `from bad.util import NAME` or `import bad.util as NAME`, got "),
        ("import bad", r"line 2: expected `from bad.MODULE import NAME`, got `import bad`, which is a whole package"),
        ("import bad.sub as s", r"expected `from bad.sub.MODULE import NAME`, got `import bad.sub`, which is a whole"),
        ("from . import sub", r"expected `from bad.sub.MODULE import NAME`, got `from bad import sub`, which is a "),
        ("def f():\n  from ... import y", r"line 3: expected an import from within its package, got `from \.\.\. imp"),
        ("def f():\n  from .none import y", r"bad.x, line 3: bad.none cannot be imported: ModuleNotFoundError: No mo"),
        ("def f():\n  from .error import y", r"bad.x, line 3: bad.error cannot be imported: ZeroDivisionError: div"),
        ("def f():\n  from ._c import y", r"bad._c is no file of Python code: expected modules written in Python"),
        ("def f():\n  from ._b import y", r"bad._b is no file of Python code: expected modules written in Python"),
        ("import pytest", r"bad.x imports pytest: expected only PIL, numpy, torch, transformers, the standard library"),
        ("from embedcache import load", r"expected `from embedcache.MODULE import load`, got `from embedcache import"),
        ('"""\nfrom .util import K\n"""', r"bad.x has the line 'from .util import' in a string, which transformers t"),
    ],
)  # fmt: skip
def test_import_that_cannot_be_copied_is_refused(source: str, words: str, tmp_path: Path, plugins: Path) -> None:
    modules = {
        "__init__": "",
        "sub/__init__": "",
        "sub/a": "",
        "util": "K = 1",
        "error": "1 / 0",
        "x": f"'''Bad.'''\n{source}\n",
    }
    for name in [name for name in sys.modules if name.partition(".")[0] == "bad"]:
        del sys.modules[name]
    write_modules(plugins, {f"bad/{name}.py": text for name, text in modules.items()})
    import _ctypes as extension

    sys.modules["bad._c"], sys.modules["bad._b"] = extension, sys
    with pytest.raises(SettingError, match=words) as caught:
        copy_code([MODEL_MODULE, "bad.x"], tmp_path, "transformers")
    assert "\n" not in str(caught.value)
    assert "use embedcache export onnx" in str(caught.value)


@pytest.mark.parametrize("name", ["my-heads", "class", "a.b c", "x\nimport os", "__main__"])
def test_module_without_a_safe_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="expected a "):
        copy_code([MODEL_MODULE, name], tmp_path, "transformers")
    assert not list(tmp_path.iterdir())


def test_files_of_built_in_modules_stay_equal(tmp_path: Path) -> None:
    """Whatever plug-ins are copied beside them, except the last lines of the opened modules."""
    plain, plugged = tmp_path / "plain", tmp_path / "plugged"
    for path, modules in ((plain, ["embedcache.projectors.tokens"]), (plugged, ["pp.forms", "pp.projectors", "heads"])):
        path.mkdir()
        copy_code([MODEL_MODULE, *modules], path, "transformers")
    for path in plain.glob("*.py"):
        if path.stem == "modeling_embedcache":
            start = path.read_text().partition("\n# Imports of the modules above")[0]
            assert (plugged / path.name).read_text().startswith(start)
        elif path.stem != "tokens":
            assert path.read_bytes() == (plugged / path.name).read_bytes()


def test_modules_that_every_export_has_are_named_first() -> None:
    alone = list(_collect([MODEL_MODULE], "transformers"))
    assert list(_collect(["pp.projectors", MODEL_MODULE], "transformers"))[: len(alone)] == alone


def test_file_names_differ() -> None:
    own = ["embedcache.projectors.heads", "embedcache.encoders.base", "embedcache.projectors.base"]
    plugged = ["Heads", "projectors", "a.b_c", "a_b.c", "a.B.c", "köpfe.x", "käpfe.x", "image_processing_embedcache"]
    names = _file_names(dict.fromkeys([*own, *plugged]))
    assert [names[module] for module in own] == ["heads", "base", "embedcache_projectors_base"]
    assert names["a.B.c"] == "a_B_c"
    assert names["a.b_c"] == "a_b_c_2"
    assert names == _file_names(dict.fromkeys([*own, *reversed(plugged)]))
    lower = {name.lower() for name in names.values()}
    assert len(lower) == len(names)
    assert not lower & {"projectors", "image_processing_embedcache", "modeling_embedcache", "__init__"}
    assert all(name.isidentifier() and name.isascii() for name in names.values())
