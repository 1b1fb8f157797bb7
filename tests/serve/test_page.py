"""The page in headless Chromium with a real server: it shows the same hits as the command."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedcache.extract.extract import extract
from embedcache.progress import NullProgress
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.search.settings import Filter, IndexSettings, SearchSettings
from embedcache.serve.service import ServePaths, open_service
from embedcache.serve.settings import ServeSettings
from embedcache.sources import open_source
from tests.crash import start
from tests.images import write_images
from tests.serve.browser import Browsing, open_browser
from tests.serve.conftest import running
from tests.toy import IMAGE
from tests.toy import TEXT as TEXT_ENCODER

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
TEXT = "red bar left on white"


@pytest.fixture(scope="module")
def address(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server started from the command line, in a process of its own."""
    command = ["serve", str(root / "index"), "--port", "0", "--trust"]
    folder = tmp_path_factory.mktemp("served")
    coverage = shutil.copy(root / "coverage.json", folder / "coverage.json")
    command += ["--coverage", str(coverage), "--selection", str(root / "few.txt")]
    pipe = folder / "printed"
    os.mkfifo(pipe)
    server = start(command, output=pipe)
    with pipe.open() as printed:
        found = next(line.split()[1] for line in printed if line.startswith("open http"))
        yield found.rstrip("/")
        server.terminate()
        server.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as browser:
        yield browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Browsing]:
    """A loaded page; at the end of the test it must have sent no request to another server and had no error."""
    browsing = Browsing(browser, address)
    yield browsing
    browsing.close()
    assert browsing.elsewhere == []
    assert browsing.errors == []


def captions_of(root: Path, queries: Any, **options: Any) -> list[str]:
    (hits,) = search(root / "index", queries, SearchSettings(**options))
    return [" · ".join(hit.captions) for hit in hits]


def test_page_opens_on_sample_and_questions(page: Browsing) -> None:
    page.page.wait_for_selector("#sample .hit")
    assert page.page.locator("#sample .hit").count() == 36
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("m")
    page.wait_for("#query-text", "Similar to ")
    page.wait_for("#status", "results")
    assert not page.page.is_visible("#sample")
    page.page.click("#clear")
    question = page.text("#questions button")
    page.page.click("#questions button")
    page.wait_for("#status", "results")
    assert page.page.input_value("#query") == question
    assert question in page.captions()[:10]


def test_map(page: Browsing) -> None:
    page.page.click("#tab-map")
    page.wait_for(".mapped .status", "80 of 80 visible")
    pixels = "(c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size)"
    assert page.page.evaluate(f"{pixels}(document.querySelector('.frame canvas'))") > 4
    page.page.focus(".frame")
    for key in ("ArrowRight", "+", "+", "0"):
        page.page.keyboard.press(key)
    page.wait_for(".mapped .status", "80 of 80 visible")
    page.page.click(".mapped .bars button >> nth=1")
    page.page.wait_for_selector(".gallery .hit")
    found = page.page.evaluate("fetch('/api/map/1').then(answer => answer.json())")
    rows = page.page.eval_on_selector_all(".gallery .hit", "all => all.map(one => Number(one.dataset.row))")
    assert rows == [hit["row"] for hit in found["hits"]]
    page.wait_for(".mapped .status", found["name"])
    page.page.focus(".frame")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#item[open]")
    page.page.wait_for_function("() => document.querySelectorAll('#item-columns tr').length")
    page.page.keyboard.press("Escape")
    page.page.wait_for_function("() => document.activeElement.classList.contains('frame')")


def test_address_of_a_tab(page: Browsing) -> None:
    page.type(TEXT)
    page.page.click("#tab-map")
    page.page.wait_for_url(lambda url: url.endswith("/?tab=map&q=red+bar+left+on+white"))
    page.page.reload()
    page.wait_for(".mapped .status", "80 of 80 visible")
    assert page.page.input_value("#query") == TEXT
    page.page.go_back()
    page.page.wait_for_selector("#query", state="visible")
    assert not page.page.is_visible("#map")
    page.page.goto(f"{page.address}/?tab=none")
    page.page.wait_for_selector("#query", state="visible")


def test_text_query(page: Browsing, root: Path) -> None:
    page.type(TEXT)
    assert page.captions()[:10] == captions_of(root, [TEXT])
    assert "60 results, best first" in page.text("#status")
    assert page.shown_images() > 3
    assert page.page.url.endswith("/?q=red+bar+left+on+white")
    page.page.click("#more")
    page.wait_for("#status", "80 results")
    page.type("blue bar")
    page.page.go_back()
    page.wait_for("#status", "80 results")
    assert page.captions()[:10] == captions_of(root, [TEXT])


def test_image_query_by_file_paste_and_drop(page: Browsing, root: Path) -> None:
    path = root / "photos" / "val" / "dog" / "00003.png"
    expected = captions_of(root, Queries(images=[path]))
    page.page.set_input_files("#file", path)
    page.wait_for("#query-text", "Similar to your image 00003.png")
    page.wait_for("#status", "results")
    assert page.captions()[:10] == expected
    for way in ("paste", "drop"):
        page.page.click("#clear")
        assert page.captions() == []
        assert page.page.is_visible("#sample .hit")
        page.give_file(path, way)
        page.wait_for("#status", "results")
        assert page.captions()[:10] == expected


def test_filters(page: Browsing, root: Path) -> None:
    page.type(TEXT)
    page.page.select_option("select[name=label]", "dog")
    page.page.select_option("select[name=split]", "val")
    page.wait_for("#status", "20 results")
    keep = Filter(label_value=("dog",), part=("val",))
    assert page.captions()[:10] == captions_of(root, [TEXT], filter=keep)
    page.page.select_option("select[name=selection]", "few")
    page.wait_for("#status", "No item passes these filters")
    page.page.reload()
    page.wait_for("#status", "No item passes these filters")
    assert page.page.input_value("select[name=label]") == "dog"
    page.page.fill("input[name=where]", "label is")
    page.page.press("input[name=where]", "Enter")
    page.wait_for("#status", "where: expected null")
    page.page.select_option("select[name=selection]", "")
    page.page.fill("input[name=where]", "key like '%3'")
    page.page.press("input[name=where]", "Enter")
    page.wait_for("#status", "2 results")
    assert all("400" in error for error in page.errors)
    page.errors.clear()


def test_keyboard_navigation(page: Browsing, root: Path) -> None:
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("/")
    page.page.keyboard.type(TEXT)
    page.page.keyboard.press("Enter")
    page.wait_for("#status", "results")
    (hits,) = search(root / "index", [TEXT], SearchSettings(k=20))
    page.page.keyboard.press("ArrowDown")
    page.wait_for_focus(hits[0].row)
    page.page.keyboard.press("ArrowRight")
    page.wait_for_focus(hits[1].row)
    page.page.keyboard.press("ArrowDown")
    page.wait_for_focus(hits[1 + page.num_columns()].row)
    page.page.keyboard.press("ArrowUp")
    page.page.keyboard.press("Enter")
    page.wait_for("#item-columns", hits[1].key)
    assert page.page.is_visible("#item")
    page.page.keyboard.press("ArrowRight")
    page.wait_for("#item-columns", hits[2].key)
    page.page.keyboard.press("Escape")
    assert not page.page.is_visible("#item")
    page.wait_for_focus(hits[2].row)
    page.page.keyboard.press("m")
    page.wait_for("#query-text", "Similar to ")
    page.wait_for("#status", "results")
    assert page.captions()[:10] == captions_of(root, Queries(rows=[hits[2].row]))


def test_coverage_view(page: Browsing) -> None:
    page.page.click("#tab-coverage")
    page.page.wait_for_selector(".bars button")
    names = page.page.eval_on_selector_all(".bars .name", "all => all.map(one => one.textContent)")
    assert sorted(names) == ["red", "sky"]
    page.page.click(".bars button:has-text('sky')")
    page.wait_for(".gallery h2", "sky")
    found = page.page.evaluate("fetch('/api/coverage/1').then(answer => answer.json())")
    rows = page.page.eval_on_selector_all(".gallery .hit", "all => all.map(one => Number(one.dataset.row))")
    assert rows == [hit["row"] for hit in found["hits"]]
    page.wait_for("#coverage .gallery [role=status]", "cannot tell items; best concept of")
    page.page.click(".gallery summary")
    page.page.click(".strip li:first-child button:has-text('yes')")
    page.wait_for("#coverage .gallery [role=status]", "] items; best concept of")
    page.wait_for(".gallery summary", "1 of 24 answered")
    page.page.click(".strip li:first-child button:has-text('yes')")
    page.wait_for("#coverage .gallery [role=status]", "cannot tell items")
    page.page.click("text=Search for this concept")
    page.wait_for("#status", "results")
    assert page.page.input_value("#query") == "sky"


def test_requests_without_an_answer(browser: Any, address: str) -> None:
    """What is missing is replaced by the reason, such as that the server has stopped, and asked for again later."""
    page, reason = Browsing(browser, address), "the server does not respond; check that it is still running"
    page.type(TEXT)
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#item-columns tr")
    page.page.route("**/api/items**", lambda route: route.abort())
    page.page.route("**/api/items/*", lambda route: route.abort())
    page.page.click("#item-next")
    page.wait_for("#item-captions", reason)
    page.page.keyboard.press("Escape")
    page.page.route("**/api/cards**", lambda route: route.abort())
    page.page.click("#tab-cards")
    page.wait_for("#cards", reason)
    page.page.unroute("**/api/cards**")
    page.page.click("#tab-search")
    page.page.click("#tab-cards")
    page.page.wait_for_selector(".cards h2")
    page.close()
    assert page.elsewhere == []
    assert [error for error in page.errors if not error.startswith("Failed to load resource")] == []


def test_narrow_screen_and_color_scheme(browser: Any, address: str) -> None:
    page = Browsing(browser, address, viewport={"width": 360, "height": 740}, color_scheme="light")
    page.page.wait_for_selector("#sample .hit")
    assert page.barriers() == []
    page.type(TEXT)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.num_columns() == 2
    for scheme in ("dark", "light"):
        page.page.emulate_media(color_scheme=scheme)
        red, green, blue = page.page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number)"
        )
        assert (red + green + blue > 600) == (scheme == "light")
    assert page.barriers() == []
    page.page.click("#tab-map")
    page.wait_for(".mapped .status", "visible")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.barriers() == []
    page.close()
    assert page.elsewhere == page.errors == []


def test_captions_are_not_markup(browser: Any, tmp_path: Path) -> None:
    """A caption with a script is shown as it is written."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    write_images(tmp_path / "photos", 5)
    for path in (tmp_path / "photos").glob("*.txt"):
        path.write_text(evil)
    extract(open_source(tmp_path / "photos"), tmp_path / "cache", image_encoder=[IMAGE], text_encoder=[TEXT_ENCODER])
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(feature="open_toy/mean", modality="text"))
    with serving(tmp_path / "index") as address:
        page = Browsing(browser, address)
        page.type("red")
        page.page.keyboard.press("ArrowDown")
        page.page.keyboard.press("Enter")
        page.wait_for("#item-title", "onerror")
        page.page.wait_for_function("() => document.querySelectorAll('#item-captions li').length")
        assert page.page.title() == "index · embedcache"
        assert page.captions()[0] == evil
        page.page.keyboard.press("Escape")
        page.page.click("#tab-map")
        page.page.wait_for_selector(".mapped .bars button")
        assert page.page.title() == "index · embedcache"
        page.close()
    assert page.elsewhere == page.errors == []


def test_players_of_recordings(browser: Any, media: Path) -> None:
    """Each result plays its recording, by a key too, and one plays at a time."""
    with serving(media / "audio") as address:
        page = Browsing(browser, address)
        page.page.wait_for_selector("#sample audio")
        assert page.text("#holds") == "2 recordings"
        assert page.barriers() == []
        names = page.page.eval_on_selector_all("#sample audio", "all => all.map(one => one.ariaLabel)")
        assert sorted(names) == ["Recording: blue", "Recording: red"]
        page.page.focus("#sample .hit")
        for number, key in enumerate(("p", "ArrowRight", "p")):
            page.page.keyboard.press(key)
            if key == "p":
                wait_for_player(page, f"#sample li:nth-child({1 + number // 2}) audio", "one.currentTime > 0")
        stopped, playing = players(page, "#sample audio", "[one.paused, one.tabIndex]")
        assert (stopped, playing[1]) == ([True, -1], 0)
        seconds = players(page, "#sample audio", "one.duration")
        assert sorted(seconds) == pytest.approx([0.25, 1.5], abs=0.01)
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#item[open] #item-image")
        assert page.barriers() == []
        page.page.keyboard.press("p")
        wait_for_player(page, "#item audio", "one.currentTime > 0")
        page.page.keyboard.press("Escape")
        page.page.wait_for_selector("#item audio", state="detached")
        page.page.set_input_files("#file", media / "files" / "tone.flac")
        page.wait_for("#query-text", "Similar to your recording tone.flac")
        page.wait_for("#status", "2 results")
        page.page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"x"})
        page.wait_for("#status", "This index cannot be searched by an image")
        page.close()
    assert page.elsewhere == page.errors == []


def test_players_of_videos(browser: Any, media: Path) -> None:
    """An interval ends where it ends, also when it is played again; a format that browsers lack is named."""
    with serving(media / "video") as address:
        page = Browsing(browser, address, viewport={"width": 360, "height": 740})
        page.page.wait_for_selector("#sample video[poster]")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
        film, old = (f"#sample video[aria-label='Video: {name}']" for name in ("green", "black"))
        for start_s in (0.2, 0.9):
            page.page.eval_on_selector(
                film, "(one, start_s) => { one.currentTime = start_s; one.play().catch(() => {}); }", start_s
            )
            wait_for_player(page, film, "one.paused && Math.abs(one.currentTime - 0.2) < 0.01")
        page.page.eval_on_selector(old, "one => { one.play().catch(() => {}); }")
        page.wait_for("#sample .problem:not(:empty)", "Not playable: browsers play MP4 and WebM")
        assert page.barriers() == []
        page.close()
    assert page.elsewhere == []
    assert [error for error in page.errors if "404" not in error] == []


def players(page: Browsing, selector: str, value: str) -> list[Any]:
    found: list[Any] = page.page.eval_on_selector_all(selector, f"all => all.map(one => {value})")
    return found


def wait_for_player(page: Browsing, selector: str, condition: str) -> None:
    page.page.wait_for_function(
        f"selector => {{ const one = document.querySelector(selector); return {condition}; }}", arg=selector
    )


@contextmanager
def serving(index: Path) -> Iterator[str]:
    """Serve an index from a thread of this process; yield the address."""
    service = open_service(ServePaths(index=index), ServeSettings(), device="cpu", progress=NullProgress())
    with running(service) as port:
        yield f"http://127.0.0.1:{port}"
