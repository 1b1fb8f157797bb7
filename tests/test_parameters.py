"""Parameters of plug-ins by name, from the signatures of functions and classes."""

from typing import Annotated, Any

import pytest
from pydantic import Field

from embedcache.errors import EmbedcacheError, SettingError, UnknownNameError
from embedcache.registry import Registry, bind, plugin_name
from embedcache.train.losses import check_loss

HERE = f"{__name__}:"


def choose(  # type: ignore[no-untyped-def]
    pool: object,
    /,
    *,
    budget: int,
    width: int = 3,
    share: Annotated[float, Field(gt=0, le=1)] = 0.5,
    levels: tuple[int, ...] | None = None,
    is_fast: bool = False,
    path: str | None = None,
    untyped=7,
) -> dict[str, Any]:
    return {"pool": pool, "budget": budget, "width": width, "levels": levels, "path": path, "untyped": untyped}


class Kernel:
    def __init__(self, size: int, padding: int = 0) -> None:
        self.size = size
        self.padding = padding


METHODS = Registry("method", {"choose": f"{HERE}choose", "kernel": f"{HERE}Kernel"}, arguments=1, has_parameters=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("choose", {}),
        ("choose:width=1024,share=0.25", {"width": 1024, "share": 0.25}),
        ("choose: width = 5", {"width": 5}),
        ("choose:levels=1000+100", {"levels": (1000, 100)}),
        ("choose:is_fast=true,untyped=9", {"is_fast": True, "untyped": 9}),
        ('choose:path="a,b=c.parquet",width=4', {"path": "a,b=c.parquet", "width": 4}),
        ("choose:path=s3://bucket/file", {"path": "s3://bucket/file"}),
        (f"{HERE}choose:width=4", {"width": 4}),
        ("kernel:padding=2", {"padding": 2}),
    ],
)
def test_values_have_the_types_of_the_signature(text: str, expected: dict[str, Any]) -> None:
    found = bind(METHODS, text, given=("budget",)).keywords
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("choose:widht=4", UnknownNameError, ["widht", "'width'", "levels"]),
        ("choose:budget=4", UnknownNameError, ["budget"]),  # which the caller gives
        ("choose:pool=4", UnknownNameError, ["pool"]),
        ("kernel:size=4", UnknownNameError, ["size", "padding"]),
        ("choose:width=wide", SettingError, ["width", "integer", "wide"]),
        ("choose:share=1.5", SettingError, ["share", "1.5"]),
        ("choose:levels=3+x", SettingError, ["levels", "3+x"]),
        ("choose:width=", SettingError, ["width="]),
        ("choose:width=4,5", SettingError, ["'5'"]),
        ("choose:width=4,width=5", SettingError, ["twice"]),
        ("chose:width=4", UnknownNameError, ["choose"]),
    ],
)
def test_wrong_parameters_are_one_clear_error(text: str, error: type[EmbedcacheError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        bind(METHODS, text, given=("budget",))
    assert all(word in str(caught.value) for word in words)


def test_a_parameter_without_a_default_is_required() -> None:
    with pytest.raises(SettingError, match="budget"):
        bind(METHODS, "choose:width=4")
    assert bind(METHODS, "choose:budget=4")(None)["budget"] == 4


@pytest.mark.parametrize("text", ["mlp", "mine.heads:Head", "file:///a"])
def test_plain_names(text: str) -> None:
    assert plugin_name(text) == text
    assert plugin_name(f"{text}:hidden=4,path=a:b=c") == text


def test_losses_have_parameters() -> None:
    check_loss("siglip:bias=-5", "draw")
    with pytest.raises(UnknownNameError, match="bias"):
        check_loss("info_nce:bias=-5", "draw")
