"""The check of recipes: what is read of two collections, and its rows on the toy cache."""

from pathlib import Path

import pytest

from embedcache.train import recipes
from embedcache.train.recipes import Recipe, TrainingLength
from embedcache.train.train import train
from pipelines.drawings.clip_art import list_clip_art, list_stamps
from pipelines.drawings.recipe_check import AUTO, CLOSED_FORM, DEFAULT, SHUFFLED, check_recipe, check_table
from tests.train.runs import IMAGE, TEXT


def test_stamps_have_the_first_line_of_their_text(tmp_path: Path) -> None:
    for name, text in (("a/duck", "A duck.\nde.utf8=Eine Ente."), ("b/gone", "No image."), ("b/nut", "A nut.")):
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "a/duck.png").touch()
    (tmp_path / "b/nut.svg").touch()
    assert [(file.name, name) for file, name in list_stamps(tmp_path)] == [
        *(("duck.png", "A duck."), ("nut.svg", "A nut."))
    ]


def test_drawings_have_titles_of_their_own(tmp_path: Path) -> None:
    names = ["food/pie_01", "food/tea", "shapes/star", *(f"signs/no_{letter}_02" for letter in "abcdef")]
    titles = ["Clipart by A. B. - apple &amp; pie_3", "", "star", *["Road signs"] * 6]
    for name, title in zip(names, titles, strict=True):
        path = tmp_path / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<svg><dc:title>{title}</dc:title><dc:title>an agent</dc:title></svg>")
    found = {file.relative_to(tmp_path).as_posix(): name for file, name in list_clip_art(tmp_path)}
    assert found == {
        "food/pie_01.svg": "apple pie",
        "food/tea.svg": "tea",
        **{f"signs/no_{letter}_02.svg": f"no {letter}" for letter in "abcdef"},
    }


@pytest.mark.slow
def test_rows_share_runs_and_seeds(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Recipe(min_pairs=0, options={"projector": "linear"}, length=TrainingLength(400, 1, 9))
    monkeypatch.setattr(recipes, "RECIPES", (made,))
    train(cache_path, tmp_path / "seed0", feature={"image": IMAGE, "text": TEXT}, split="key", epochs=0)
    check = check_recipe("toy", cache_path, tmp_path, [0], {"image": IMAGE, "text": TEXT})
    assert list(check.rows) == [AUTO, DEFAULT, CLOSED_FORM, SHUFFLED]
    rows = {row[2]: row for row in check_table([check])[1]}
    assert rows[AUTO][3].startswith("`--projector linear --epochs 2 --patience 3")
    assert rows[DEFAULT][3] == ""
    assert float(rows[AUTO][4][:5]) > 2 * float(rows["chance"][4])
    num_runs = len(list(tmp_path.glob("seed0/*/config.json")))
    again = check_recipe("toy", cache_path, tmp_path, [0], {"image": IMAGE, "text": TEXT})
    assert check_table([again]) == check_table([check])
    assert len(list(tmp_path.glob("seed0/*/config.json"))) == num_runs == 11
