"""Runs on disk: what is written is opened, damage and other settings are named, a kill leaves nothing that opens."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from embedcache.errors import (
    ArtifactError,
    CorruptError,
    DataError,
    FingerprintError,
    PathError,
    SettingError,
    UnknownNameError,
)
from embedcache.provenance import read_json, write_record
from embedcache.registry import trust_files
from embedcache.runs import PAIR, Run, RunInfo, RunInput, is_finished
from embedcache.settings import replace_fields
from tests.edits import edit_record, flip

IMAGE = RunInput(modality="image", feature="a/cls", spec="a:m", fingerprint={"family": "a", "weights": "w"}, width=6)
TEXT = RunInput(modality="text", feature="b/mean", spec="b:m", fingerprint={"family": "b"}, width=5)
INFO = RunInfo(
    kind=PAIR,
    arguments={"projector": "linear", "widths": {"image": 6, "text": 5}, "shared_width": 4},
    inputs={"image": IMAGE, "text": TEXT},
    settings={"seed": 3, "machine": {"device": "cpu"}, "split": {"kind": "key", "seed": 3}, "lr": 0.1},
    digests={"failed image": "f"},
    index_digest="d",
    caches=["../cache"],
)


def write(path: Path, info: RunInfo = INFO) -> Run:
    """Write a run with random weights."""
    torch.manual_seed(0)
    run = Run.create(path, info)
    (path / "split.parquet").write_bytes(b"split")
    return run.finish(info.build(), {"score": 0.5})


def test_lists_files_of_its_folder_only(tmp_path: Path) -> None:
    write(tmp_path / "run")
    edit_record(tmp_path / "run/run.json", {'"model.safetensors"': '"../model.safetensors"'})
    with pytest.raises(CorruptError, match="model.safetensors"):
        Run.open(tmp_path / "run")


def test_what_is_written_is_opened(tmp_path: Path) -> None:
    written = write(tmp_path / "run")
    run = Run.open(tmp_path / "run", kind=PAIR)
    assert run.info == written.info
    assert (run.info.settings, run.info.report) == (INFO.settings, {"score": 0.5})
    assert set(run.info.files) == {"model.safetensors", "split.parquet"}
    assert run.info.record["packages"]["torch"] == torch.__version__
    assert (run.projector, run.shared_width, run.modalities, run.seed) == ("linear", 4, ("image", "text"), 3)
    assert run.input("text") == TEXT
    assert run.other_modality("text") == "image"
    assert not run.pair.training
    torch.manual_seed(0)
    for name, value in INFO.build().state_dict().items():
        assert torch.equal(run.pair.state_dict()[name], value)
    with pytest.raises(DataError, match="video"):
        run.input("video")
    run.check_feature("image", "c/cls", dict(IMAGE.fingerprint))
    with pytest.raises(FingerprintError, match="weights"):
        run.check_feature("image", "c/cls", {"family": "a", "weights": "v"})


def test_run_is_opened_without_torch(tmp_path: Path) -> None:
    write(tmp_path / "run")
    code = "import sys; sys.modules['torch'] = None; from embedcache.runs import Run; Run.open(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)


def test_run_of_another_kind_is_named(tmp_path: Path) -> None:
    info = RunInfo(kind="torch.nn:Linear", arguments={"in_features": 2, "out_features": 1}, inputs={})
    write(tmp_path / "run", info)
    with pytest.raises(DataError, match=r"expected an aligned pair, got a run of kind torch\.nn:Linear"):
        Run.open(tmp_path / "run", kind=PAIR)
    assert isinstance(Run.open(tmp_path / "run").module, torch.nn.Linear)


@pytest.mark.parametrize("name", ["model.safetensors", "split.parquet"])
def test_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "run")
    for damage in (lambda path: flip(path, 2), Path.unlink):
        damage(tmp_path / "run" / name)
        for read in (lambda: Run.open(tmp_path / "run").file(name), lambda: Run.reuse(tmp_path / "run", INFO)):
            with pytest.raises((CorruptError, PathError), match=name):
                read()


def test_changed_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(CorruptError, match="changed since it was written"):
        Run.open(tmp_path / "run")
    path.write_text(text.replace("../cache", "../moved"))  # paths of caches may be corrected by hand
    assert Run.open(tmp_path / "run").info.caches == ["../moved"]
    for values, error in (({"format": 2}, ArtifactError), ({"format": 1, "kind": "pair"}, CorruptError)):
        write_record(path, values, unchecked=("caches",))
        with pytest.raises(error):
            Run.open(tmp_path / "run")
    path.write_text('{"hidden_size": 3}')
    with pytest.raises(ArtifactError, match="not written by embedcache"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kind": "torch.nn:Identity", "arguments": {}}, "Unexpected key"),
        ({"kind": "torch.nn:Linear"}, "unexpected keyword"),
        ({"arguments": {**INFO.arguments, "widths": {"image": 7, "text": 5}}}, "size mismatch"),
        ({"arguments": {**INFO.arguments, "shared_width": 2**80}}, "run.json"),
        # before memory is allocated
        ({"arguments": {**INFO.arguments, "shared_width": 2**31 - 1}}, "size mismatch"),
        ({"arguments": {**INFO.arguments, "widths": {"image": 2**31 - 1, "text": 5}}}, "size mismatch"),
    ],
)
def test_network_of_other_shapes_is_refused(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    write(tmp_path / "run")
    edit_record(tmp_path / "run" / "run.json", **changed)
    with trust_files(), pytest.raises(ArtifactError, match=reason):
        Run.open(tmp_path / "run").load()


def test_code_of_a_stranger_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "run")
    edit_record(tmp_path / "run" / "run.json", kind="nobody:evil", arguments={})
    with pytest.raises(SettingError, match="use --trust"):
        Run.open(tmp_path / "run").load()
    with trust_files(), pytest.raises(UnknownNameError, match="nobody"):
        Run.open(tmp_path / "run").load()


def test_unfinished_run_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"is not a finished run: it has no run\.json|does not exist"):
        Run.open(tmp_path / "run")
    Run.create(tmp_path / "run", INFO)
    assert not is_finished(tmp_path / "run")
    assert Run.reuse(tmp_path / "run", INFO) is None
    with pytest.raises(PathError, match="is not a finished run: its training has not ended"):
        Run.open(tmp_path / "run")


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"settings": {**INFO.settings, "lr": 0.2}}, r"settings\.lr: stored 0.1, requested 0.2"),
    ({"arguments": {**INFO.arguments, "shared_width": 5}}, r"arguments\.shared_width"),
    ({"inputs": {"image": TEXT, "text": TEXT}}, "inputs.image.feature"),
    ({"digests": {}}, "failed image .*retried"),
    ({"index_digest": "e"}, "index_digest .*extended"),
]


@pytest.mark.parametrize(("changed", "word"), OTHERS)
def test_other_settings_are_refused(tmp_path: Path, changed: dict[str, Any], word: str) -> None:
    other = replace_fields(INFO, **changed)
    write(tmp_path / "finished")
    with pytest.raises(FingerprintError, match=f"^run .*{word}.*; give the path of a new folder"):
        Run.reuse(tmp_path / "finished", other)
    Run.create(tmp_path / "stopped", INFO)
    (tmp_path / "stopped" / "selection.txt").touch()
    Run.create(tmp_path / "stopped", other)  # nothing was trained yet
    assert [path.name for path in (tmp_path / "stopped").glob("[!.]*")] == ["run.json"]
    (tmp_path / "stopped" / "checkpoint.pt").touch()
    with pytest.raises(FingerprintError, match="the unfinished run"):
        Run.create(tmp_path / "stopped", INFO)


def test_equal_settings_are_reused(tmp_path: Path) -> None:
    write(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    moved = replace_fields(INFO, caches=["elsewhere"])
    (tmp_path / "run" / "checkpoint.pt").touch()  # as if killed right before it was deleted
    run = Run.reuse(tmp_path / "run", moved)
    assert run is not None
    assert run.info.report == {"score": 0.5}
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    named = {"split": "s", "selection": "x", "prototypes": "p"}
    first, second = (
        replace_fields(
            INFO,
            digests=named,
            settings={
                **INFO.settings,
                "split": {"kind": f"{place}/split.parquet"},
                "selection": f"{place}/keys.txt",
                "prototypes": f"{place}/prototypes",
            },
        )
        for place in ("here", "there")
    )
    write(tmp_path / "copied", first)
    assert Run.reuse(tmp_path / "copied", second) is not None


def test_recipe_leaves_out_seeds_and_device(tmp_path: Path) -> None:
    first = write(tmp_path / "first").recipe
    settings = {**INFO.settings, "seed": 4, "machine": {"device": "cuda"}, "split": {"kind": "key", "seed": 9}}
    assert write(tmp_path / "second", replace_fields(INFO, settings=settings)).recipe == first
    assert write(tmp_path / "third", replace_fields(INFO, settings={**settings, "lr": 1})).recipe != first


def test_recipe_leaves_out_what_validation_chose(tmp_path: Path) -> None:
    report = {"recipes": [{"name": "slow", "options": {"lr": 1}}, {"name": "fast", "options": {"lr": 2}}]}
    slow, fast = (replace_fields(INFO, settings={**INFO.settings, "lr": lr}, report=report) for lr in (1, 2))
    assert Run(tmp_path, fast).recipe == Run(tmp_path, slow).recipe
    assert Run(tmp_path, replace_fields(slow, report={})).recipe != Run(tmp_path, slow).recipe


@pytest.mark.parametrize("files", [("model.safetensors", "thesis.tex"), (".claims", "notes.txt"), ("config.json",)])
def test_foreign_folder_is_refused_and_untouched(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).write_text("mine")
    with pytest.raises(PathError, match=files[-1]):
        Run.create(tmp_path, INFO)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize("left", [[".claims"], [".claims", ".run.json.0.partial"]])
def test_folder_of_a_kill_at_the_start_is_used(tmp_path: Path, left: list[str]) -> None:
    """A lease is acquired before anything is written, so its file may be all there is."""
    for name in left:
        (tmp_path / name).touch()
    Run.create(tmp_path, INFO)
    assert read_json(tmp_path / "run.json")["is_finished"] is False


@pytest.mark.slow
def test_folder_of_another_process_is_refused(tmp_path: Path) -> None:
    Run.create(tmp_path, INFO).leases.release(0)  # type: ignore[union-attr]
    script = (
        "import sys; from pathlib import Path; from embedcache.files import Leases; leases = Leases(Path(sys.argv[1]));"
        "print(leases.acquire(0), flush=True); input(); leases.release(0); print('released', flush=True); input();"
        "print(leases.acquire(0), flush=True)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "True\n"
        with pytest.raises(PathError, match="another process"):
            Run.create(tmp_path, INFO)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "released\n"
        write(tmp_path)
        assert other.communicate("\n") == ("True\n", None)


def test_run_that_another_process_has_finished_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "run")
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(PathError, match="another process has just finished"):
        Run.create(tmp_path / "run", INFO)
    assert (tmp_path / "run/run.json").read_bytes() == before
    assert Run.open(shutil.copytree(tmp_path / "run", tmp_path / "copy")).info.weights
