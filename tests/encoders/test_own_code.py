"""Model folders with code of their own: it runs with `--trust` alone, and nothing is asked."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.errors import ArtifactError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.registry import trust_files
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from tests.cli.run import embedcache
from tests.encoders.checkpoints import save_bert, save_sentence_transformer
from tests.images import write_images

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import BertConfig, BertModel

class EvilConfig(BertConfig):
    model_type = "evil"

class EvilModel(BertModel):
    config_class = EvilConfig

    def forward(self, *arguments, **options):
        {result}
"""
TORCH = EncoderSettings(backend="torch")  # without the seconds of an ONNX export
OWN = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": "modeling_evil.EvilModel"}


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the library itself, where `y` is the answer to all questions."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("EMBEDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    return save_bert(tmp_path / "bert", seed=0)


def add_code(folder: Path, marker: Path, result: str = "return super().forward(*arguments, **options)") -> None:
    """Change a folder into one that brings the code of its model, which leaves a file where it runs."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "evil", "auto_map": OWN}))
    (folder / "modeling_evil.py").write_text(CODE.format(marker=str(marker), result=result))


def was_asked() -> bool:
    assert isinstance(sys.stdin, io.StringIO)
    return sys.stdin.tell() > 0


@pytest.mark.parametrize("family", ["hf", "st"])
def test_code_of_a_model_needs_trust(bert: Path, tmp_path: Path, family: str) -> None:
    folder, marker = tmp_path / family, tmp_path / "pwned"
    if family == "st":
        save_sentence_transformer(folder, bert, pooling="mean", max_tokens=12)
    else:
        shutil.copytree(bert, folder)
    spec = f"{family}:{folder}"
    plain = open_encoder(spec, modality="text", settings=TORCH)
    add_code(folder, marker)
    with pytest.raises(SettingError, match="has code of its own; if you trust its author, use --trust"):
        open_encoder(spec, modality="text")
    assert not marker.exists()
    with trust_files():
        own = open_encoder(spec, modality="text", settings=TORCH)
    assert marker.exists()
    first, second = (each.encode(each.prepare(["a red cat"]), ["mean"])["mean"][0] for each in (plain, own))
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert cosine == pytest.approx(1, abs=1e-5)
    assert not was_asked()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json"])
def test_code_of_a_tokenizer_or_processor_needs_trust(bert: Path, tmp_path: Path, file: str) -> None:
    from tests.encoders.checkpoints import save_vit

    is_text = file.startswith("tokenizer")
    folder = bert if is_text else save_vit(tmp_path / "vit")
    (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / "pwned"), result="pass"))
    own = {"AutoTokenizer": [None, "evil.EvilModel"], "AutoImageProcessor": "evil.EvilModel"}
    config = json.loads((folder / file).read_text())
    config = {**config, "auto_map": own, "tokenizer_class": "EvilModel", "image_processor_type": "EvilModel"}
    (folder / file).write_text(json.dumps(config))
    if is_text:  # the library has a tokenizer for this kind of model
        open_encoder(f"hf:{folder}", modality="text", settings=TORCH)
    else:
        with pytest.raises(SettingError, match="has code of its own; .*--trust"):
            open_encoder(f"hf:{folder}", modality="image")
    assert not (tmp_path / "pwned").exists()
    assert not was_asked()


@pytest.mark.parametrize("result", ["return 5", "raise RuntimeError('never')", "return {}"])
def test_code_that_does_not_fit_is_an_error_of_the_model(bert: Path, tmp_path: Path, result: str) -> None:
    add_code(bert, tmp_path / "pwned", result)
    with trust_files(), pytest.raises(ArtifactError, match="cannot be run: .*: choose another model"):
        open_encoder(f"hf:{bert}", modality="text")


def test_caches_and_indexes_of_a_stranger_run_no_model_code(bert: Path, tmp_path: Path) -> None:
    """Their features were computed when the folder had no code, or on another machine."""
    marker = tmp_path / "pwned"
    write_images(tmp_path / "photos", 4)
    spec = f"hf:{bert}"
    settings = ExtractSettings(encoder=TORCH)
    extract(open_source(tmp_path / "photos"), tmp_path / "cache", text_encoder=[spec], settings=settings)
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(feature="bert/mean", modality="text"))
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    add_code(bert, marker)
    (tmp_path / "cache/text/bert/mean/c/0/0").unlink()
    for words in (
        ("search", "index", "red"),
        ("verify", "cache", "--repair"),
        ("extract", "photos", "new", "--text-encoder", spec),
    ):
        done = embedcache(*words, cwd=tmp_path)
        assert (done.code, "use --trust" in done.stderr) == (1, True), (words, done.stderr)
        assert not marker.exists(), words
    assert not was_asked()
    done = embedcache("verify", "cache", "--repair", "--trust", cwd=tmp_path)
    assert marker.exists(), done.stderr
