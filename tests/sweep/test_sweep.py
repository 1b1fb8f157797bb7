"""Whole sweeps of a toy cache."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from embedcache.cli.main import main
from embedcache.errors import FingerprintError, PathError, SettingError
from embedcache.projectors.saved import read_config
from embedcache.provenance import digest_file, read_json
from embedcache.sweep.sweep import SweepReport, sweep
from tests.sweep.conftest import RANDOM, SIDES, SPACE, Notes

pytestmark = pytest.mark.slow

Swept = tuple[Path, SweepReport, list[str]]


def test_figures_tell_every_trial_the_best_and_what_chance_gives(swept: Swept) -> None:
    study_path, report, _ = swept
    figures = read_json(study_path / "report.json")
    assert figures["counts"] == {"complete": 6, "pruned": 0, "failed": 0}
    assert [trial["trial"] for trial in figures["trials"]] == list(range(6))
    assert set(figures["trials"][0]["params"]) == {"lr", "shared_width", "projector"}
    assert figures["trials"][0]["num_pairs"] == 2 * 195
    assert set(figures["importance"]) == {"lr", "shared_width", "projector"}
    assert sum(figures["importance"].values()) == pytest.approx(1, abs=1e-3)
    assert len(figures["best"]) == 2
    for best in figures["best"]:
        (test,) = best["test"].values()
        assert test["seeds"] == [0, 1]
        assert test["num_images"] == 75
        low, high = test["i2t"]["intervals"]["r@10"]
        assert low < test["i2t"]["r@10"] < high
        assert test["chance"]["i2t"]["r@10"] < low
        validation = best["validation"]
        assert validation["lowest"] <= validation["mean"] <= validation["highest"]
    assert report.best[0].number == figures["winner"]["trial"]


def test_validation_picks_the_winner(swept: Swept) -> None:
    _, report, _ = swept
    scores = {trial.number: trial.value for trial in report.findings.trials}
    retrained = {best.number for best in report.best}
    assert retrained == set(sorted(scores, key=lambda number: (-(scores[number] or 0), number))[:2])
    assert report.best[0].mean_score == max(best.mean_score for best in report.best)
    for best in report.best:  # the first seed is the trial's own
        assert best.scores[0] == best.score == scores[best.number]


def test_the_page_has_every_part_and_asks_for_nothing(swept: Swept) -> None:
    study_path, report, _ = swept
    page = (study_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert page.count("<svg") == 4
    for title in ("Best configurations", "Retrieval on test", "Train the winner again", "History", "What matters"):
        assert f"<h2>{title}</h2>" in page
    for words in (
        "chance",
        "All settings together",
        "What it costs",
        f"trial {report.best[1].number}",
        "6",
        "shared_width",
    ):
        assert words in page
    assert "What failed" not in page


def test_the_printed_command_gives_the_winners_weights(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study_path, report, _ = swept
    figures = read_json(study_path / "report.json")["winner"]
    words = shlex.split(figures["command"])
    place = words.index(str(study_path.resolve() / "winner"))
    words[place] = str(tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0, capsys.readouterr().err
    assert digest_file(tmp_path / "again" / "model.safetensors") == figures["weights"]
    assert read_config(report.best[0].run_paths[0]).weights == figures["weights"]


def test_trials_share_one_split_and_go_by_their_settings(swept: Swept) -> None:
    study_path, report, _ = swept
    split_path = study_path.resolve() / "split.parquet"
    digests = {read_config(study_path / "trials" / f"{number:05d}").split for number in range(6)}
    assert digests == {digest_file(split_path)}
    for trial in report.findings.trials:
        config = read_config(study_path / "trials" / f"{trial.number:05d}")
        assert config.training["optimizer"]["lr"] == trial.params["learning_rate"]
        assert config.training["split"]["kind"] == str(split_path)
        assert (config.projector, config.shared_width) == (trial.params["projector"], trial.params["shared_width"])


def test_each_trial_is_told_in_a_line(swept: Swept) -> None:
    _, _, lines = swept
    assert len(lines) == 6
    pattern = r"trial (\d) of 6: score 0\.\d{4} \(best (0\.\d{4}) in trials/\d{5}\)"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [match[1] for match in found if match] == list("123456")
    bests = [match[2] for match in found if match]
    assert bests == sorted(bests)


def test_more_trials_make_a_study_longer(cache_path: Path, tmp_path: Path, space_path: Path, swept: Swept) -> None:
    def run(num_trials: int) -> tuple[SweepReport, list[str]]:
        notes = Notes()
        settings = replace(RANDOM, num_trials=num_trials, top=1, num_seeds=1)
        report = sweep(cache_path, tmp_path / "study", space_path, **SIDES, settings=settings, progress=notes)
        return report, notes.lines

    first, _ = run(2)
    written = (tmp_path / "study/trials/00001/model.safetensors").stat().st_mtime_ns
    longer, lines = run(3)
    assert len(lines) == 1
    assert (tmp_path / "study/trials/00001/model.safetensors").stat().st_mtime_ns == written
    whole = [(trial.params, trial.value) for trial in swept[1].findings.trials]
    assert [(trial.params, trial.value) for trial in longer.findings.trials] == whole[:3]
    assert [trial.number for trial in first.findings.trials] == [0, 1]
    assert not first.findings.importance
    assert "Too few complete trials" in first.page_path.read_text()


def test_another_question_is_refused_with_both_answers(cache_path: Path, tmp_path: Path, swept: Swept) -> None:
    study_path, _, _ = swept
    space_path = study_path.parent / "space.toml"
    other = tmp_path / "space.toml"
    other.write_text(SPACE.replace("1e-1", "1e-2").replace('["linear", "mlp"]', '["linear", "glu"]'))
    with pytest.raises(
        FingerprintError, match=r"space\.space\.learning_rate\.high: stored 0\.1, requested 0\.01.*'glu'\] as"
    ):
        sweep(cache_path, study_path, other, **SIDES, settings=RANDOM)
    with pytest.raises(FingerprintError, match="sampler: stored 'random', requested 'tpe'"):
        sweep(cache_path, study_path, space_path, **SIDES, settings=replace(RANDOM, sampler="tpe"))
    with pytest.raises(FingerprintError, match="storage: stored None, requested 'sqlite:///other.db'"):
        sweep(cache_path, study_path, space_path, **SIDES, settings=replace(RANDOM, storage="sqlite:///other.db"))
    other.write_text(SPACE.replace("epochs = 2", "epochs = 2\nthreads = 1"))  # which decides nothing
    sweep(cache_path, study_path, other, **SIDES, settings=RANDOM)


def test_a_folder_with_other_things_is_refused_and_untouched(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(SPACE)
    with pytest.raises(PathError, match=r"is not a study and not empty: it holds space\.toml; give the path of a new"):
        sweep(cache_path, tmp_path, tmp_path / "space.toml", **SIDES)
    assert [path.name for path in tmp_path.iterdir()] == ["space.toml"]


def test_a_trial_that_fails_stops_nothing(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(
        "[fixed]\nsplit = 'key'\nepochs = 1\nshared_width = 8\n[space]\nbatch_size = [64, 9999]"
    )
    settings = replace(RANDOM, sampler="grid", top=3, num_seeds=1)
    report = sweep(cache_path, tmp_path / "study", tmp_path / "space.toml", **SIDES, settings=settings)
    figures = read_json(report.figures_path)
    assert figures["counts"] == {"complete": 1, "pruned": 0, "failed": 1}
    (failed,) = (trial for trial in figures["trials"] if trial["state"] == "failed")
    assert "batch size is 9,999, and there are 195 samples to train on" in failed["reason"]
    assert not (tmp_path / f"study/trials/{failed['trial']:05d}").exists()
    assert "batch size is 9,999, and there are 195 samples" in report.page_path.read_text()


def test_a_study_of_failures_says_why(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("[fixed]\nsplit = 'key'\n[space]\nbatch_size = [8888, 9999]")
    settings = replace(RANDOM, num_trials=2)
    with pytest.raises(
        SettingError, match=r"none of 2 trials was complete; trial 0 failed: batch size is .*another sp"
    ):
        sweep(cache_path, tmp_path / "study", tmp_path / "space.toml", **SIDES, settings=settings)


def test_a_configuration_that_another_seed_fails_on_is_left_out(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(
        "[fixed]\nsplit = 'key'\nepochs = 1\nshared_width = 8\n"
        "[space]\nloss = ['multi_positive', 'tests.sweep.unlucky:Unlucky']"
    )
    settings = replace(RANDOM, sampler="grid", top=2)
    report = sweep(cache_path, tmp_path / "study", tmp_path / "space.toml", **SIDES, settings=settings)
    assert [best.params["loss"] for best in report.best] == ["multi_positive"]
    ((number, reason),) = read_json(report.figures_path)["left_out"].items()
    assert report.findings.trials[int(number)].params["loss"] == "tests.sweep.unlucky:Unlucky"
    assert "the loss is nan at step 0" in reason
    assert f"<td>{number}, another seed</td><td>the loss is nan at step 0" in report.page_path.read_text()
    (tmp_path / "space.toml").write_text("[fixed]\nsplit = 'key'\n[space]\nloss = ['tests.sweep.unlucky:Unlucky']")
    with pytest.raises(
        SettingError, match=r"none of the best 1 configurations can be trained with 2 seeds; trial 0 fai"
    ):
        sweep(
            cache_path, tmp_path / "other", tmp_path / "space.toml", **SIDES, settings=replace(settings, num_trials=1)
        )


def test_trials_that_lie_behind_are_pruned(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(
        "[fixed]\nsplit = 'key'\nepochs = 3\nshared_width = 8\nstart = 'random'\n"
        "[space]\nlr = [1e-9, 1e-2]\ndropout = [0.0, 0.1, 0.2, 0.3, 0.4]"
    )
    settings = replace(RANDOM, sampler="grid", num_trials=10, pruner="median", top=1, num_seeds=1)
    notes = Notes()
    report = sweep(cache_path, tmp_path / "study", tmp_path / "space.toml", **SIDES, settings=settings, progress=notes)
    pruned = [trial for trial in report.findings.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert report.best[0].params["lr"] == 1e-2
    assert sum("pruned after epoch" in line for line in notes.lines) == len(pruned)
    for trial in pruned:
        assert not (tmp_path / f"study/trials/{trial.number:05d}").exists()
    assert "pruned" in report.page_path.read_text()


def test_several_caches_are_measured_each(two_caches: list[Path], tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(
        "[fixed]\nsplit = 'key'\nepochs = 1\nshared_width = 8\n[space]\nprojector = ['linear', 'mlp']"
    )
    settings = replace(RANDOM, num_trials=2, sampler="grid", top=1)
    report = sweep(two_caches, tmp_path / "study", tmp_path / "space.toml", **SIDES, settings=settings)
    assert list(report.best[0].test) == [str(path) for path in two_caches]
    assert len(read_config(tmp_path / "study/trials/00000").index_digest.split("+")) == 2


def words(cache_path: Path, *more: str) -> list[str]:
    """What a person types, in the folder that holds the space."""
    sides = ["--image-feature", SIDES["image"], "--text-feature", SIDES["text"]]
    search = ["--sampler", "random", "--top", "1", "--seeds", "1", "--trials", "6"]
    return ["embedcache", "sweep", str(cache_path), "space.toml", "study", *sides, *search, *more]


def scores(study_path: Path) -> dict[str, float]:
    """What a study tried, and what came of it."""
    return {json.dumps(trial["params"]): trial["score"] for trial in read_json(study_path / "report.json")["trials"]}


def wait_for_a_later_trial(study_path: Path) -> int:
    """Wait until a trial after the first is at work, and give its number."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in study_path.glob("trials/0000[1-5]"):
            if (path / "losses.jsonl").is_file() and not (path / "config.json").is_file():
                return int(path.name)
        time.sleep(0.002)
    raise TimeoutError(f"no trial of {study_path} was at work")


def test_a_killed_sweep_goes_on_with_two_workers_and_loses_only_what_it_was_at(
    cache_path: Path,
    tmp_path: Path,
    space_path: Path,
    swept: Swept,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-m", *words(cache_path)]
    with subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        number = wait_for_a_later_trial(tmp_path / "study")
        process.send_signal(signal.SIGKILL)
    written = (tmp_path / "study/trials/00000/model.safetensors").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words(cache_path, "--workers", "2"))
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    for said in ("Best on validation", "chance", "train the best again: embedcache train", "open study/report.html in"):
        assert said in shown.out
    assert shown.err.count("of 6: score") == 6 - number
    assert (tmp_path / "study/trials/00000/model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / f"study/trials/{number:05d}").exists()
    assert scores(tmp_path / "study") == scores(swept[0])  # of one process, that held the features in memory
