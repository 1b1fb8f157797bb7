"""What a command says when Ctrl-C or a disk ends it: what is kept, and whether the same command resumes."""

import errno
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from typer.core import TyperGroup

from embedcache.cli.commands import Command
from embedcache.cli.console import publish
from embedcache.cli.main import root_command
from embedcache.errors import DiskFullError, PathError, SettingError
from embedcache.export.settings import RECORD
from embedcache.io_errors import disk_full_message
from tests.cli.run import embedcache
from tests.cli.test_process import ENVIRONMENT, PROGRAM

PLUGINS = f"""
import os
import time

class Ends:
    accepts, requires_one_of, required_inputs, modality, uses_seed = ("budget",), (), (), "image", False

    def select(self, pool, settings):
        pool.progress.start("selecting", 9, "samples")
        pool.progress.advance(3)
        self.end()

class Interrupted(Ends):
    def end(self):
        raise KeyboardInterrupt

class Full(Ends):
    def end(self):
        raise OSError({errno.ENOSPC}, os.strerror({errno.ENOSPC}), "scratch")

class Damaged(Ends):
    def end(self):
        raise OSError({errno.EIO}, os.strerror({errno.EIO}), "disk")

class Waits(Ends):
    def end(self):
        open("waiting", "w").close()
        time.sleep(60)
"""


@pytest.fixture
def folder(cache_path: Path, tmp_path: Path) -> Path:
    (tmp_path / "ending_plugin.py").write_text(PLUGINS)
    (tmp_path / "cache").symlink_to(cache_path)
    (tmp_path / "words.txt").write_text("red\n")
    return tmp_path


@pytest.mark.parametrize(
    ("selector", "code", "last_line"),
    [
        ("Interrupted", 130, "Interrupted. Nothing is written; rerun the same command to start again."),
        (
            "Full",
            1,
            "error: scratch: no space left on the disk; free some space and rerun the same command; nothing is written",
        ),
        (
            "Damaged",
            1,
            "error: disk: Input/output error; check the disk, and rerun the same command; nothing is written",
        ),
    ],
)
def test_command_that_starts_again(folder: Path, selector: str, code: int, last_line: str) -> None:
    words = ["curate", "select", "cache", "out.parquet", "--method", f"ending_plugin:{selector}", "--budget", "9"]
    done = embedcache(*words, cwd=folder)
    assert (done.code, done.stderr.splitlines()[-1]) == (code, last_line)
    assert not (folder / "out.parquet").exists()


@pytest.mark.parametrize(
    ("raised", "code", "last_line"),
    [
        (KeyboardInterrupt(), 130, "Interrupted. Finished work is kept; rerun the same command to resume."),
        (
            DiskFullError(disk_full_message(" of cache")),
            1,
            "error: no space left on the disk of cache; free some space and rerun the same command; "
            "finished work is kept",
        ),
        (SettingError("name: expected another"), 1, "error: --name: expected another"),
    ],
)
def test_command_that_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, last_line: str
) -> None:
    def end(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("embedcache.derive.derive.derive_with_settings", end)
    done = embedcache("derive", "cache", "--rule", "mean", "--input", "text=open_toy/tokens", cwd=folder)
    assert (done.code, done.stderr.splitlines()[-1]) == (code, last_line)


def test_interrupted_extraction_asks_no_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("embedcache.extract.extract.extract", interrupt)
    done = embedcache("extract", "texts:words.txt", "http://localhost:1/cache", cwd=folder)
    assert (done.code, done.stderr) == (
        130,
        "Interrupted. Finished chunks are kept; rerun the same command to resume.\n",
    )


def test_output_that_is_written_before_the_interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ["curate", "outliers", "cache", "odd.parquet", "--feature", "open_toy/cls", "--html", "odd.html"]
    monkeypatch.setattr("embedcache.reports.scores.write_outlier_page", interrupt)
    done = embedcache(*words, cwd=folder)
    assert done.code == 130
    assert done.stderr.splitlines()[-1] == (
        "Interrupted. Only odd.parquet is written: delete it; rerun the same command to start again."
    )
    assert (folder / "odd.parquet").is_file()
    monkeypatch.setattr("embedcache.curate.outliers.find_outliers", interrupt)
    done = embedcache(*words, "--overwrite", cwd=folder)  # the old file is still there
    assert done.stderr.splitlines()[-1] == "Interrupted. Nothing is written; rerun the same command to start again."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), "Interrupted. Only {}; rerun the same command to start again."),
        (
            DiskFullError(disk_full_message(" of cache")),
            "error: no space left on the disk of cache; free some space and rerun the same command; only {}",
        ),
    ],
)
def test_second_output_that_is_written_before_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: str
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    words = ["curate", "dedup", "cache", "kept.parquet", "--feature", "open_toy/cls", "--cosine", "0.1"]
    monkeypatch.setattr("embedcache.curate.dedup.write_selection", end)
    done = embedcache(*words, cwd=folder)
    assert done.stderr.splitlines()[-1] == expected.format("kept.removed.parquet is written: delete it")
    assert (folder / "kept.removed.parquet").is_file()
    monkeypatch.undo()
    assert embedcache(*words, cwd=folder).code == 0


def test_files_that_are_written_into_a_folder_before_the_end(
    folder: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (folder / "results").mkdir()
    (folder / "results" / "other.json").touch()
    monkeypatch.setattr("embedcache.reports.retrieval.write_retrieval_page", interrupt)
    words = ["evaluate", "retrieval", "cache", str(run_path), "--output", "results", "--html", "page.html"]
    done = embedcache(*words, cwd=folder)
    (written,) = (path for path in (folder / "results").iterdir() if path.name != "other.json")
    assert done.stderr.splitlines()[-1] == (
        f"Interrupted. Only {written.relative_to(folder)} is written: delete it; rerun the same command to start again."
    )


@pytest.mark.slow
def test_folder_of_many_files_is_not_compared(folder: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (folder / "many").mkdir()
    for number in range(10_001):
        (folder / "many" / str(number)).touch()
    monkeypatch.setattr("embedcache.evaluate.retrieval.compare_retrieval", interrupt)
    done = embedcache("evaluate", "retrieval", "cache", str(run_path), "--output", "many", cwd=folder)
    assert done.stderr.splitlines()[-1] == (
        "Interrupted. There may be new files in many: delete them; rerun the same command to start again."
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "Nothing is written; rerun the same command to start again"),
        (("--yes",), "Finished work is kept; rerun the same command to resume"),
    ],
)
def test_removal_keeps_work_only_if_it_removes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (folder / "keys.txt").write_text("00003\n")
    for name in ("plan_removal", "remove_samples"):
        monkeypatch.setattr(f"embedcache.maintain.remove.{name}", interrupt)
    done = embedcache("cache", "remove", "cache", "keys.txt", *options, cwd=folder)
    assert (done.code, done.stderr) == (130, f"Interrupted. {expected}.\n")


@pytest.mark.parametrize(
    ("is_written", "expected"),
    [
        (False, "Nothing is written; rerun the same command to start again"),
        (True, "The export in out is kept; rerun the same command to resume"),
    ],
)
def test_upload_keeps_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool, expected: str
) -> None:
    def interrupt(_: str, __: Path, out: Path, *___: object) -> None:
        if is_written:
            out.mkdir()
            (out / RECORD).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("embedcache.export.export.export_run", interrupt)
    done = embedcache("export", "safetensors", "run", "out", "--push-to-hub", "me/pair", cwd=tmp_path)
    assert (done.code, done.stderr) == (130, f"Interrupted. {expected}.\n")


def test_commands_whose_help_promises_to_resume_keep_work() -> None:
    promised = {name for name, command in _commands(root_command()) if "same command again" in str(command.help)}
    kept = {name for name, command in _commands(root_command()) if command.kept}
    assert len(promised) > 10
    exports = {"transformers", "open-clip", "sentence-transformers", "onnx", "safetensors"}
    assert kept - promised == {"quickstart", "verify", "prune", "clip-benchmark", *exports}
    assert promised <= kept


def _commands(group: TyperGroup) -> Iterator[tuple[str, Command]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _commands(command)
        else:
            assert isinstance(command, Command)
            yield name, command


@pytest.mark.slow
def test_signal_ends_a_selection_with_an_explanation(folder: Path) -> None:
    words = ["curate", "select", "cache", "out.parquet", "--method", "ending_plugin:Waits", "--budget", "9"]
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores SIGINT
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, *words], stderr=theirs, cwd=folder, env=ENVIRONMENT, preexec_fn=restore
    ) as process:
        os.close(theirs)
        while not (folder / "waiting").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        shown = b""
        with suppress(OSError):  # how a closed terminal ends
            while part := os.read(terminal, 4096):
                shown += part
    assert process.returncode == 130
    *_, bar, line = shown.decode().splitlines()
    assert "3/9" in bar.split("\r")[-1]
    assert line == "Interrupted. Nothing is written; rerun the same command to start again."


def test_files_are_written_where_nobody_reads_the_table(tmp_path: Path) -> None:
    page, printed = tmp_path / "page.html", list[str]()

    def print_to_nobody() -> None:
        raise BrokenPipeError

    def write(path: Path) -> None:
        path.write_text("page")

    def fail(path: Path) -> None:
        raise PathError(f"{path} cannot be written")

    with pytest.raises(BrokenPipeError):
        publish(print_to_nobody, dict, as_json=False, html=page, write_page=write)
    assert page.read_text() == "page"
    with pytest.raises(PathError):
        publish(lambda: printed.append("table"), dict, as_json=False, html=page, write_page=fail)
    assert printed == ["table"]
