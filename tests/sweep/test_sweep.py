"""Whole sweeps of a toy cache."""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from embedcache.cli.main import main
from embedcache.errors import FingerprintError, PathError, SettingError
from embedcache.extract.extract import extract
from embedcache.provenance import digest_file, read_json, replacing_files
from embedcache.reports.summary import summarize
from embedcache.runs import Run, is_finished
from embedcache.settings import replace_fields
from embedcache.store.arrays import file_checksum
from embedcache.sweep.report import present_sweep
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import read_space
from embedcache.sweep.study import open_study
from embedcache.sweep.sweep import SweepReport, sweep
from embedcache.sweep.trials import StudyJob
from embedcache.train.data import open_data
from tests.cli.run import embedcache
from tests.crash import forked_workers, pause, start
from tests.media_toy import MEDIA
from tests.recorded import RecordedProgress
from tests.reports.contract import check_report
from tests.sweep.conftest import FEATURES, RANDOM, SPACE, write_space
from tests.toy import TEXT
from tests.train.test_modalities import Sounds

pytestmark = pytest.mark.slow

Swept = tuple[Path, SweepReport, list[str]]


def test_report(swept: Swept) -> None:
    study_path, report, _ = swept
    found = read_json(study_path / "report.json")
    assert found["counts"] == {"complete": 6, "pruned": 0, "failed": 0}
    assert [trial["trial"] for trial in found["trials"]] == list(range(6))
    assert set(found["trials"][0]["params"]) == {"lr", "shared_width", "projector"}
    assert found["trials"][0]["num_pairs"] == 2 * 195
    assert set(found["importance"]) == {"lr", "shared_width", "projector"}
    assert sum(found["importance"].values()) == pytest.approx(1, abs=1e-3)
    scores = {trial["trial"]: trial["score"] for trial in found["trials"]}
    assert {best["trial"] for best in found["best"]} == set(sorted(scores, key=lambda each: (-scores[each], each))[:2])
    for best in found["best"]:
        (test,) = best["test"].values()
        assert test["seeds"] == [0, 1]
        assert test["num_images"] == 75
        low, high = test["i2t"]["intervals"]["r@10"]
        assert low < test["i2t"]["r@10"] < high
        assert test["chance"]["i2t"]["r@10"] < low
        assert min(best["scores"]) <= best["mean_score"] <= max(best["scores"])
    assert report.best[0].number == found["winner"]["trial"]
    assert report.best[0].mean_score == max(best.mean_score for best in report.best)
    for best in report.best:  # the first seed is the trial's own
        assert best.scores[0] == best.score == report.trials[best.number].value
        epochs = [Run.open(path).info.report["best_epoch"] for path in best.run_paths]
        assert best.kept_initialization == (not any(epochs))
    assert bool(report.warning) == report.best[0].kept_initialization


def test_storage_is_closed(swept: Swept) -> None:
    study_path, _, _ = swept
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert study_path / "study.db" not in opened


def test_report_is_presented(swept: Swept) -> None:
    _, report, _ = swept
    check_report(present_sweep(report))
    assert report.page_path.read_text().count("<svg") == 2


def test_printed_command_gives_the_winners_weights(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study_path, report, _ = swept
    winner = read_json(study_path / "report.json")["winner"]
    words = shlex.split(winner["command"])
    position = words.index(str(study_path.resolve() / "winner"))
    words[position] = str(tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0, capsys.readouterr().err
    assert digest_file(tmp_path / "again" / "model.safetensors") == winner["weights"]
    assert Run.open(report.best[0].run_paths[0]).info.weights == winner["weights"]


def test_trials_share_one_split(swept: Swept) -> None:
    study_path, report, _ = swept
    split_path = study_path.resolve() / "split.parquet"
    runs = [Run.open(study_path / "trials" / f"{number:05d}") for number in range(6)]
    assert {run.info.files["split.parquet"].checksum for run in runs} == {file_checksum(split_path)}
    for trial in report.trials:
        run = runs[trial.number]
        assert run.info.settings["optimizer"]["lr"] == trial.params["lr"]
        assert run.info.settings["split"]["kind"] == str(split_path)
        assert (run.projector, run.shared_width) == (trial.params["projector"], trial.params["shared_width"])


def test_more_trials_extend_a_study(cache_path: Path, tmp_path: Path, space_path: Path, swept: Swept) -> None:
    def run(num_trials: int) -> tuple[SweepReport, list[str]]:
        progress = RecordedProgress()
        settings = replace_fields(RANDOM, trials=num_trials, top_configs=1, seeds_per_config=1)
        report = sweep(cache_path, tmp_path / "study", space_path, **FEATURES, settings=settings, progress=progress)
        return report, progress.notes

    first, _ = run(2)
    written = (tmp_path / "study/trials/00001/model.safetensors").stat().st_mtime_ns
    longer, notes = run(3)
    assert len(notes) == 1
    assert (tmp_path / "study/trials/00001/model.safetensors").stat().st_mtime_ns == written
    whole = [(trial.params, trial.value) for trial in swept[1].trials]
    assert [(trial.params, trial.value) for trial in longer.trials] == whole[:3]
    assert [trial.number for trial in first.trials] == [0, 1]
    assert not first.importance


def test_study_that_was_killed_before_its_manifest_begins_again(
    cache_path: Path, tmp_path: Path, space_path: Path, swept: Swept
) -> None:
    study_path, _, _ = swept
    killed = tmp_path / "study"
    killed.mkdir()
    for name in (".lock", "split.parquet"):
        shutil.copy(study_path / name, killed)
    data = open_data(cache_path, FEATURES["feature"], memory_bytes=1e9)
    with replacing_files(False):  # as on the command line
        study = open_study(killed, data, read_space(space_path), RANDOM)
    assert study.split_digest == digest_file(study_path / "split.parquet")


def test_other_requests_are_rejected(cache_path: Path, tmp_path: Path, swept: Swept) -> None:
    other = SPACE.replace("1e-1", "1e-2").replace('["linear", "mlp"]', '["linear", "glu"]')
    for text, settings, word in (
        (other, {}, "glu"),
        (SPACE, {"sampler": "tpe"}, "sampler"),
        (SPACE, {"storage": "sqlite:///other.db"}, "storage"),
    ):
        options = replace_fields(RANDOM, **settings)
        space_path = write_space(tmp_path, text)
        with pytest.raises(FingerprintError, match=word):
            sweep(cache_path, swept[0], space_path, **FEATURES, settings=options)


def test_errors_begin_no_study(cache_path: Path, tmp_path: Path) -> None:
    space_path = write_space(tmp_path, SPACE)
    settings = replace_fields(RANDOM, storage="sqlite:////nowhere/at/all/study.db")
    with pytest.raises(PathError, match="nowhere"):
        sweep(cache_path, tmp_path / "study", space_path, **FEATURES, settings=settings)
    with pytest.raises(PathError, match="space.toml"):
        sweep(cache_path, tmp_path, space_path, **FEATURES)
    assert [path.name for path in tmp_path.iterdir()] == ["space.toml"]


def test_settings_without_effect_may_change(cache_path: Path, tmp_path: Path, swept: Swept) -> None:
    space_path = write_space(tmp_path, SPACE.replace("epochs = 2", "epochs = 2\nthreads = 1"))
    progress = RecordedProgress()
    sweep(cache_path, swept[0], space_path, **FEATURES, settings=RANDOM, progress=progress)
    assert progress.notes == []


def test_failing_trials_and_seeds_are_reported(cache_path: Path, tmp_path: Path) -> None:
    space_path = write_space(
        tmp_path,
        "[fixed]\nsplit = 'key'\nepochs = 1\nshared_width = 8\n"
        "[space]\nloss = ['multi_positive', 'tests.sweep.unlucky:Unlucky']\nbatch_size = [64, 9999]",
    )
    settings = replace_fields(RANDOM, sampler="grid")
    report = sweep(cache_path, tmp_path / "study", space_path, **FEATURES, settings=settings)
    found = read_json(report.json_path)
    assert found["counts"] == {"complete": 2, "pruned": 0, "failed": 2}
    for trial in found["trials"]:
        if trial["state"] == "failed":
            assert "195 training samples, got 9,999" in trial["reason"]
            assert not (tmp_path / f"study/trials/{trial['trial']:05d}").exists()
    assert [best.params["loss"] for best in report.best] == ["multi_positive"]
    ((number, reason),) = found["left_out"].items()
    assert report.trials[int(number)].params["loss"] == "tests.sweep.unlucky:Unlucky"
    assert "the loss is nan at step 0" in reason
    settings = replace_fields(settings, trials=1, top_configs=1)
    space_path = write_space(
        tmp_path, "[fixed]\nsplit = 'key'\nepochs = 1\n[space]\nloss = ['tests.sweep.unlucky:Unlucky']"
    )
    with pytest.raises(SettingError, match="none"):
        sweep(cache_path, tmp_path / "unlucky", space_path, **FEATURES, settings=settings)


def test_underperforming_trials_are_pruned(cache_path: Path, tmp_path: Path) -> None:
    space_path = write_space(
        tmp_path,
        "[fixed]\nsplit = 'key'\nepochs = 3\nshared_width = 8\ninitialization = 'random'\n"
        "[space]\nlr = [1e-9, 1e-2]\ndropout = [0.0, 0.1, 0.2, 0.3, 0.4]",
    )
    settings = replace_fields(RANDOM, sampler="grid", trials=10, pruner="median", top_configs=1, seeds_per_config=1)
    progress = RecordedProgress()
    report = sweep(cache_path, tmp_path / "study", space_path, **FEATURES, settings=settings, progress=progress)
    pruned = [trial for trial in report.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert report.best[0].params["lr"] == 1e-2
    assert sum("pruned after epoch" in line for line in progress.notes) == len(pruned)
    assert len(progress.started) == 4  # pairing, splitting and loading: once, and not in each of the trials
    for trial in pruned:
        assert not (tmp_path / f"study/trials/{trial.number:05d}").exists()


def test_lists_are_tried_on_two_caches(
    two_caches: list[Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    space_path = write_space(
        tmp_path, "[fixed]\nsplit = 'key'\nepochs = 1\nshared_width = 8\n[space]\nwidths = [[4], [2, 4]]"
    )
    settings = replace_fields(RANDOM, trials=2, sampler="grid", top_configs=1, seeds_per_config=1)
    for _ in range(2):  # the study is opened again
        report = sweep(two_caches, tmp_path / "study", space_path, **FEATURES, settings=settings)
    for trial in report.trials:
        info = Run.open(tmp_path / "study/trials" / f"{trial.number:05d}").info
        assert ",".join(map(str, info.settings["loss"]["widths"])) == trial.params["widths"]
        assert len(info.index_digest.split("+")) == 2
    assert {trial.params["widths"] for trial in report.trials} == {"4", "2,4"}
    assert f"--widths {report.best[0].params['widths']}" in report.command
    assert list(report.best[0].test) == [str(path) for path in two_caches]
    assert not [warning for warning in recwarn if "optuna" in str(warning.message).lower()]


def test_sweep_of_recordings_and_texts(cache_path: Path, tmp_path: Path) -> None:
    cache, study_path = tmp_path / "sounds", tmp_path / "study"
    extract(Sounds(), cache, text_encoder=TEXT, encoder={"audio": [MEDIA]}, limit=60)
    text = "[fixed]\nsplit = 'key'\nepochs = 1\nblock_rows = 1\nshared_width = 8\nbatch_size = 16\n[space]\nlr = [0.01]"
    space_path = write_space(tmp_path, text)
    words = ["--sampler", "grid", "--top-configs", "1", "--seeds-per-config", "1"]
    words += ["--feature", "text=open_toy/mean", "--feature", "audio=open_media/mean"]
    shown = embedcache("sweep", cache, space_path, study_path, *words, cwd=tmp_path)
    assert shown.code == 0, shown.stderr
    assert "a2t R@1" in shown.stdout

    stored, found = read_json(study_path / "study.json"), read_json(study_path / "report.json")
    assert (stored["format"], list(stored["sides"])) == (1, ["audio", "text"])
    assert {"a2t", "t2a", "num_recordings", "num_texts"} <= set(found["best"][0]["test"][str(cache)])
    assert "--feature audio=open_media/mean --feature text=open_toy/mean" in found["winner"]["command"]
    assert "features: audio open_media/mean, text open_toy/mean" in summarize(study_path).lines

    space, settings = read_space(space_path), SweepSettings(sampler="grid")
    data = open_data(cache, {"text": "open_toy/mean", "audio": "open_media/mean"}, memory_bytes=1e9)
    study = open_study(study_path, data, space, settings)
    assert {**stored, **study.to_json()} == stored == found["study"] | {"digest": stored["digest"]}
    job = StudyJob(caches=(str(cache),), path=study_path, study=study, space=space, settings=settings)
    fingerprints = [feature.fingerprint for feature in data.features.values()]
    assert [feature.fingerprint for feature in job.mapped_data().features.values()] == fingerprints
    with pytest.raises(FingerprintError, match="sides"):
        sweep(cache_path, study_path, space_path, **FEATURES, settings=settings)


def scores(study_path: Path) -> dict[str, float]:
    """Return the score of each configuration of a study."""
    return {json.dumps(trial["params"]): trial["score"] for trial in read_json(study_path / "report.json")["trials"]}


def pause_in_a_later_trial(process: BaseProcess, study_path: Path) -> int:
    """Pause the process of a study while a trial after the first is running, and return the trial's number."""

    def running() -> list[int]:
        folders = study_path.glob("trials/0000[1-5]")
        has_begun = (path for path in folders if (path / "losses.jsonl").is_file())
        return [int(path.name) for path in has_begun if not is_finished(path)]

    while process.is_alive():
        if running():
            pause(process)
            if found := running():
                return found[0]
            assert process.pid
            os.kill(process.pid, signal.SIGCONT)  # the trial has ended before the process was paused
        time.sleep(0.002)
    raise TimeoutError(f"no trial of {study_path} was running")


def test_killed_sweep_resumes_with_two_workers(
    cache_path: Path,
    tmp_path: Path,
    space_path: Path,
    swept: Swept,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study_path = tmp_path / "study"
    words = ["sweep", str(cache_path), str(space_path), str(study_path)]
    words += ["--feature", "image=open_toy/cls", "--feature", "text=open_toy/mean"]
    words += ["--sampler", "random", "--top-configs", "1", "--seeds-per-config", "1", "--trials", "6"]
    process = start(words)
    number = pause_in_a_later_trial(process, study_path)
    process.kill()
    process.join()
    written = (study_path / "trials/00000/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["embedcache", *words, "--workers", "2"])
    with forked_workers(), pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    assert f"best run: {study_path}/best/" in shown.out
    assert shown.err.count("of 6: validation recall") == 6 - number
    assert (study_path / "trials/00000/model.safetensors").stat().st_mtime_ns == written
    assert not (study_path / f"trials/{number:05d}").exists()
    assert scores(study_path) == scores(swept[0])  # of one process that held the features in memory
