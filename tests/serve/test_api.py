"""The API answers what `embedcache search` answers."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from embedcache.curate.coverage import measure_coverage
from embedcache.curate.map import read_map
from embedcache.errors import CorruptError, FingerprintError, MissingExtraError, PathError, SettingError
from embedcache.maintain.remove import remove_samples
from embedcache.progress import NullProgress
from embedcache.provenance import write_report_json
from embedcache.reports.coverage import coverage_json
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search
from embedcache.search.settings import Filter, IndexSettings, SearchSettings
from embedcache.serve.batching import Batcher
from embedcache.serve.coverage import measure_served_coverage
from embedcache.serve.service import SearchService, ServePaths, open_service
from embedcache.serve.settings import ServeSettings
from embedcache.store.cache import Cache
from tests.serve.conftest import visit

TEXT = "red bar left on white"


def ask(client: TestClient, **query: Any) -> list[dict[str, Any]]:
    answer = client.post("/api/search", json=query)
    assert answer.status_code == 200, answer.text
    hits: list[dict[str, Any]] = answer.json()["hits"]
    return hits


def start(**places: Any) -> SearchService:
    return open_service(ServePaths(**places), ServeSettings(), device="cpu", progress=NullProgress())


def as_found(root: Path, queries: Queries | list[str], **options: Any) -> list[dict[str, Any]]:
    (hits,) = search(root / "index", queries, SearchSettings(**options))
    return json.loads(json.dumps([asdict(hit) for hit in hits]))  # type: ignore[no-any-return]


def without_image(hits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in hit.items() if name not in ("image", "name", "player")} for hit in hits]


@pytest.mark.slow
def test_queries_equal_the_command(client: TestClient, root: Path) -> None:
    hits = ask(client, text=TEXT, k=9)
    assert without_image(hits) == as_found(root, [TEXT], k=9)
    assert all(hit["image"] == hit["row"] and hit["player"] is None for hit in hits)
    assert without_image(ask(client, row=33, k=4)) == as_found(root, Queries(rows=[33]), k=4)
    assert ask(client, key="train/dog/00013", k=1)[0]["row"] == 33
    path = root / "photos" / "val" / "dog" / "00003.png"
    answer = client.post("/api/search/image?k=5", content=path.read_bytes(), headers={"Content-Type": "image/png"})
    assert without_image(answer.json()["hits"]) == as_found(root, Queries(images=[path]), k=5)
    hits = client.post("/api/search/image?k=50&labels=dog&splits=train", content=path.read_bytes()).json()["hits"]
    assert (len(hits), {hit["key"].rpartition("/")[0] for hit in hits}) == (20, {"train/dog"})


@pytest.mark.slow
def test_filters_equal_command(client: TestClient, root: Path) -> None:
    for options, keep in (
        ({"labels": ["cat"]}, Filter(label_value=("cat",))),
        ({"splits": ["val"], "labels": ["cat", "dog"]}, Filter(part=("val",), label_value=("cat", "dog"))),
        ({"selection": "few"}, Filter(selection=root / "few.txt")),
        ({"languages": ["de"]}, Filter(language=("de",))),
        ({"where": "label = 'dog'", "splits": ["val"]}, Filter(where="label = 'dog'", part=("val",))),
    ):
        hits = ask(client, text=TEXT, k=6, **options)
        assert without_image(hits) == as_found(root, [TEXT], k=6, filter=keep)
    german = ask(client, text=TEXT, k=500, languages=["de"])
    assert len(german) == 20
    assert all(caption.endswith("auf deutsch") for hit in german for caption in hit["captions"])
    for match in ("words", "both"):
        hits = ask(client, text="red dog", k=6, match=match, labels=["dog"])
        assert without_image(hits) == as_found(root, ["red dog"], k=6, match=match, filter=Filter(label_value=("dog",)))
    assert len(ask(client, text=TEXT, k=500, selection="few")) == 7
    assert ask(client, text=TEXT, selection="few", splits=["val"]) == []
    assert ask(client, text=TEXT, where="label = 'bird'") == []


@pytest.mark.slow
def test_concurrent_queries_get_own_results(client: TestClient, root: Path) -> None:
    texts = [f"{front} bar {side} on white" for front in ("red", "blue", "green") for side in ("left", "top", "right")]
    expected = search(root / "index", texts, SearchSettings(k=3))
    labels: list[list[str]] = [[], ["cat"]]
    queries = [{"text": text, "k": 3, "labels": labels[number % 2]} for number, text in enumerate(4 * texts)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda query: ask(client, **query), queries))
    for number, answer in enumerate(answers):
        if number % 2:
            assert all(hit["label"] == "cat" for hit in answer)
        else:
            assert [hit["key"] for hit in answer] == [hit.key for hit in expected[number % len(texts)]]


def test_concurrent_queries_form_batches(served: SearchService, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode, submit, have_come = served.index.query_encoder.encode_texts, Batcher.submit, threading.Semaphore(0)

    def counting(texts: list[str]) -> Any:
        if not sizes:
            assert all(have_come.acquire(timeout=20) for _ in range(12))  # while the first is answered, others gather
        sizes.append(len(texts))
        return encode(texts)

    def submit_counted(batcher: Batcher[Any, Any], request: Any) -> Any:
        have_come.release()
        return submit(batcher, request)

    monkeypatch.setattr(served.index.query_encoder, "encode_texts", counting)
    monkeypatch.setattr(Batcher, "submit", submit_counted)
    with visit(served) as client, ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda number: ask(client, text=f"red {number}", k=1), range(12)))
    assert sum(sizes) == 12
    assert max(sizes) > 4


def test_item_has_all_columns(client: TestClient) -> None:
    item = client.get("/api/items/0").json()
    assert item["key"] == "train/cat/00000"
    assert item["path"] == "train/cat/00000.png"
    assert [one["language"] for one in item["captions"]] == ["de", None]
    assert item["columns"] == {"split": "train", "label": "cat", "folder": "train/cat"}
    assert client.get("/api/items/80").status_code == 404


def test_images_are_scaled_and_reencoded(client: TestClient, root: Path) -> None:
    answer = client.get("/api/images/3/thumbnail")
    assert answer.headers["content-type"] == "image/webp"
    shown = np.asarray(Image.open(BytesIO(answer.content)).convert("RGB"), np.int64)
    real = np.asarray(Image.open(root / "photos" / "train" / "cat" / "00003.png").convert("RGB"), np.int64)
    assert abs(shown - real).mean() < 12
    assert client.get("/api/images/3/full").status_code == 200
    assert client.get("/api/images/80/thumbnail").status_code == 404


def test_info_and_cards(client: TestClient) -> None:
    info = client.get("/api/info").json()
    assert info["num_items"] == 80
    assert info["takes"] == ["text", "image"]
    assert info["filters"]["label"] == {"cat": 40, "dog": 40}
    assert info["filters"]["split"] == {"train": 40, "val": 40}
    assert info["filters"]["language"] == {"de": 20}
    assert info["selections"] == ["few"]
    titles = [card["title"] for card in client.get("/api/cards").json()]
    assert titles == ["Index", "Run", "Cache"]


def test_coverage_equals_command(client: TestClient, root: Path) -> None:
    report = measure_coverage(root / "cache", root / "concepts", run=root / "run", k=24)
    told = coverage_json(report)["concepts"]
    for number, concept in enumerate(client.get("/api/coverage").json()["concepts"]):
        names = ("count", "low", "high", "best", "certain")
        assert concept["counts"] == [{name: told[number][name] for name in names}]
        assert concept["threshold"] == pytest.approx(told[number]["threshold"], abs=1e-4)
    sky = client.get("/api/coverage/1").json()
    assert sky["name"] == "sky"
    assert [hit["row"] for hit in sky["hits"]] == report.rows[1].tolist()
    assert [hit["row"] for hit in sky["strip"]] == report.strip_rows[1].tolist()
    assert {hit["shows"] for hit in sky["strip"]} == {None}
    assert client.get("/api/coverage/2").status_code == 404


@pytest.fixture
def report_path(root: Path, tmp_path: Path) -> Path:
    """A report by plain examples with a selection of seven items, beside which answers can be saved."""
    options = {"label": "folder", "feature": "open_toy/cls", "selection": root / "few.txt", "k": 5}
    report = measure_coverage(root / "cache", root / "cache", **options)
    write_report_json(tmp_path / "coverage.json", coverage_json(report))
    return tmp_path / "coverage.json"


def answer_all(client: TestClient, number: int, shows: bool | None) -> dict[str, Any]:
    for hit in client.get(f"/api/coverage/{number}").json()["strip"]:
        answer = client.post(f"/api/coverage/{number}/answer", json={"row": hit["row"], "shows": shows})
        assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_answers_settle_a_concept_and_are_saved(root: Path, report_path: Path) -> None:
    with visit(start(index=root / "plain", coverage=report_path)) as client:
        before = client.get("/api/coverage").json()["concepts"]
        few, many = answer_all(client, 0, shows=False), answer_all(client, 0, shows=True)
        assert few["num_answers"] == many["num_answers"] == len(many["strip"]) == 24
        for least, most, num_items in zip(few["counts"], many["counts"], (80, 7), strict=True):
            assert least["count"] < most["count"] <= num_items
            assert most["low"] <= most["count"] <= most["high"] <= num_items
        assert few["threshold"] > many["threshold"]
        after = client.get("/api/coverage").json()["concepts"]
        assert after[1:] == before[1:]
        assert after[0]["counts"] == many["counts"]
    with visit(start(index=root / "plain", coverage=report_path)) as client:
        assert client.get("/api/coverage/0").json() == many
        assert answer_all(client, 0, shows=None)["counts"] == before[0]["counts"]
        assert client.get("/api/coverage").json()["concepts"] == before


def test_answers_of_a_report_can_be_taken_back(root: Path, report_path: Path, tmp_path: Path) -> None:
    with visit(start(index=root / "plain", coverage=report_path)) as client:
        before = client.get("/api/coverage").json()["concepts"]
        settled = answer_all(client, 0, shows=False)
    options = {"label": "folder", "feature": "open_toy/cls", "selection": root / "few.txt", "k": 5}
    report = measure_coverage(root / "cache", root / "cache", **options, answers=tmp_path / "coverage.answers.json")
    told = coverage_json(report)
    write_report_json(tmp_path / "settled.json", told)
    for part, found in zip((told["concepts"][0], told["concepts"][0]["selection"]), settled["counts"], strict=True):
        assert {name: part[name] for name in found} == pytest.approx(found, abs=1)
    for _ in range(2):
        with visit(start(index=root / "plain", coverage=tmp_path / "settled.json")) as client:
            assert client.get("/api/coverage/0").json()["counts"] == settled["counts"]
    with visit(start(index=root / "plain", coverage=tmp_path / "settled.json")) as client:
        answer_all(client, 0, shows=None)
    with visit(start(index=root / "plain", coverage=tmp_path / "settled.json")) as client:
        assert client.get("/api/coverage").json()["concepts"] == before


def test_unknown_items_and_concepts_cannot_be_answered_for(root: Path, report_path: Path) -> None:
    with visit(start(index=root / "plain", coverage=report_path)) as client:
        asked = {hit["row"] for hit in client.get("/api/coverage/0").json()["strip"]}
        other = next(row for row in range(80) if row not in asked)
        for number, row in ((0, other), (0, 80), (0, -1), (4, 0)):
            answer = client.post(f"/api/coverage/{number}/answer", json={"row": row, "shows": True})
            assert answer.status_code == 404
    assert not report_path.with_name("coverage.answers.json").exists()


def test_report_of_coverage_names_no_removed_items(root: Path, served: SearchService, tmp_path: Path) -> None:
    cache = shutil.copytree(root / "cache", tmp_path / "cache")
    keys = [hit["key"] for hit in served.concept(1)["hits"]]
    remove_samples(cache, keys[:2])
    found = start(index=root / "plain", cache=str(cache), coverage=root / "coverage.json")
    assert [hit["key"] for hit in found.concept(1)["hits"]] == keys[2:]
    assert found.coverage is not None
    assert found.coverage.summary["warnings"][-1].startswith("measured before samples were removed from the cache")


def test_measured_coverage_equals_report(root: Path, served: SearchService) -> None:
    found = measure_served_coverage(root / "concepts", served.index, NullProgress())
    assert served.coverage is not None
    assert found.summary == served.coverage.summary
    for one, other in zip(found.concepts(), served.coverage.concepts(), strict=True):
        assert one == {**other, "threshold": pytest.approx(other["threshold"], abs=1e-5)}


def test_foreign_coverage_raises(root: Path, cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "other", IndexSettings(feature="open_toy/cls"))
    for path, index, error, message in (
        (root / "coverage.json", tmp_path / "other", FingerprintError, "got other samples"),
        (tmp_path / "no.json", root / "index", PathError, "which does not exist; write it with"),
        (root / "concepts.json", root / "index", CorruptError, "has no digest"),
    ):
        with pytest.raises(error, match=message):
            start(index=index, coverage=path)


@pytest.mark.slow
def test_caption_index_shows_sample_images(root: Path, tmp_path: Path) -> None:
    build_index(root / "cache", tmp_path / "index", IndexSettings(feature="open_toy/mean", modality="text"))
    service = start(index=tmp_path / "index")
    hits = service.hits(service.index.search(Queries(texts=[TEXT]), k=1)[0])
    with visit(service) as client:
        (hit,) = ask(client, text=TEXT, k=1)
        assert [hit] == json.loads(json.dumps(hits))  # before all keys and captions are in memory
        assert hit["captions"] == [TEXT] or hit["score"] < 1
        item = client.get(f"/api/items/{hit['row']}").json()
        assert item["key"] == hit["key"]
        assert client.get(f"/api/items/{hit['image']}").status_code == 200
        refused = client.post("/api/search/image", content=b"x")
        assert refused.status_code == 400
        assert "does not accept images: expected an index built with a run" in refused.json()["error"]
        german = ask(client, text=TEXT, k=100, languages=["de"])
        assert len(german) == 20


def ready(client: TestClient, path: str) -> dict[str, Any]:
    """Wait for the map, which is read or computed after the start."""
    for _ in range(400):
        answer: dict[str, Any] = client.get(path).json()
        if answer["state"] != "computing":
            return answer
        time.sleep(0.05)
    raise AssertionError("no map")


def test_page_opens_on_sample_and_questions(client: TestClient, root: Path) -> None:
    opening = ready(client, "/api/opening")
    assert len({hit["row"] for hit in opening["hits"]}) == 36
    assert all(hit["score"] is None and hit["image"] == hit["row"] for hit in opening["hits"])
    captions = Cache(root / "cache").items("text")["text"].to_pylist()
    assert opening["questions"]
    assert set(opening["questions"]) <= set(captions)


def test_map_in_ten_bytes_per_item(client: TestClient, root: Path) -> None:
    clusters = ready(client, "/api/map")["clusters"]
    found = read_map(OpenIndex(root / "index"))
    assert found is not None
    content = client.get("/api/map/points").content
    assert len(content) == 800
    np.testing.assert_array_equal(np.frombuffer(content, "<u4", 80), found.rows)
    points = np.frombuffer(content, "<u2", 160, offset=320).reshape(2, 80).T
    np.testing.assert_allclose(points / 65535, found.points, atol=1e-5)
    np.testing.assert_array_equal(np.frombuffer(content, "<u2", 80, offset=640), found.clusters_N)
    assert [one["size"] for one in clusters] == np.bincount(found.clusters_N).tolist()
    cluster = client.get("/api/map/1").json()
    assert [hit["row"] for hit in cluster["hits"]] == list(found.clusters[1].nearest)
    assert client.get("/api/map/99").status_code == 404
    items = client.get("/api/items?rows=5&rows=3").json()
    assert [item["row"] for item in items] == [5, 3]
    assert client.get("/api/items?rows=80").status_code == 404


@pytest.mark.slow
def test_missing_map_is_computed_and_stored(root: Path, tmp_path: Path) -> None:
    """A map of other items is replaced; in a folder that cannot be written it is computed at each start."""
    shutil.copytree(root / "plain", tmp_path / "plain")
    stale = shutil.copy(root / "index" / "map.parquet", tmp_path / "plain" / "map.parquet")
    with visit(start(index=tmp_path / "plain", cache=str(root / "cache"))) as client:
        opening = ready(client, "/api/opening")
    assert len(opening["hits"]) == 36
    assert opening["questions"] == []  # texts are not accepted
    assert stale.read_bytes() != (root / "index" / "map.parquet").read_bytes()
    stale.unlink()
    stale.mkdir()
    with visit(start(index=tmp_path / "plain", cache=str(root / "cache"))) as client:
        assert ready(client, "/api/opening")["hits"] == opening["hits"]


def test_index_says_why_texts_are_not_accepted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with visit(start(index=root / "plain")) as client:
        info = client.get("/api/info").json()
        assert info["takes"] == ["image"]
        assert "got one of the plain image feature open_toy/cls; build one with: " in info["rejects"]["text"]
        refused = client.post("/api/search", json={"text": "a"})
        assert refused.status_code == 400
        assert info["rejects"]["text"] in refused.json()["error"]
        refused = client.post("/api/search", json={"row": 0, "selection": "few"})
        assert refused.json() == {"error": "selection 'few': this index has no selection to filter by; leave it out"}


def test_label_column_is_named(root: Path) -> None:
    paths, settings = ServePaths(index=root / "plain"), ServeSettings(label="folder")
    with visit(open_service(paths, settings, device="cpu", progress=NullProgress())) as client:
        assert "train/cat" in client.get("/api/info").json()["filters"]["label"]
        assert {hit["label"] for hit in ask(client, row=0, labels=["val/dog"])} == {"val/dog"}


def test_missing_package_of_an_encoder_is_no_obstacle(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def require(*_: Any, **__: Any) -> None:
        raise MissingExtraError("open_toy needs a package; pip install toys")

    monkeypatch.setattr("embedcache.search.queries.open_feature_encoder", require)
    with visit(start(index=root / "index")) as client:
        assert {"text", "image"} <= set(client.get("/api/info").json()["rejects"])
        assert len(ask(client, row=3, k=2)) == 2
    assert "text queries: open_toy needs a package; pip install toys" in caplog.text


def test_invalid_requests_get_one_line_errors(client: TestClient) -> None:
    no_json = "the body: expected a JSON object in UTF-8, sent with the header Content-"
    invalid: list[tuple[dict[str, Any] | bytes | str, int, str]] = [
        ({}, 422, "either"),
        ({"text": "a", "row": 1}, 422, "either"),
        ({"key": "train/cat"}, 404, "train/cat"),
        ({"row": 80}, 404, "80"),
        ({"text": "  "}, 422, "text"),
        ({"text": "a", "k": 501}, 422, "k"),
        ({"text": "a", "x": 1}, 422, "x"),
        ({"text": "a" * 2001}, 422, "2000"),
        ({"text": "a", "labels": ["bird"]}, 404, "bird"),
        ({"text": "a", "selection": "../few"}, 404, "../few"),
        ({"text": "a", "where": "read_csv('/etc/passwd')"}, 400, "where: expected"),
        ({"text": "a", "where": "x = 1"}, 404, "label"),
        ({"row": 1, "match": "words"}, 400, "words"),
        ({"text": "a", "where": "x" * 2001}, 422, "2000"),
        ({"row": 10**30}, 422, "row"),
        ({"text": "\ud800"}, 422, "text"),
        *((body, 422, no_json) for body in (b"", b"{", b"[1]", b"null")),
        *((body, 400, no_json) for body in ('{"text": "é"}'.encode("latin-1"), b"[" * 30_000)),
    ]
    for body, status, word in invalid:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        answer = client.post("/api/search", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, word in answer.json()["error"]) == (status, True), answer.text
        assert "\n" not in answer.json()["error"]
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl sends it without a header
    assert no_json in client.post("/api/search", content=b'{"text": "a"}', headers=form).json()["error"]


def test_operations_are_described(client: TestClient) -> None:
    operations = client.get("/openapi.json").json()["paths"]
    for modality in ("image", "audio", "video"):
        assert f"{modality}/*" in operations[f"/api/search/{modality}"]["post"]["requestBody"]["content"]
    for page in ("/", "/api"):
        assert client.get(page).headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("places", "error", "word"),
    [
        ({"index": "no"}, PathError, "curate index"),
        ({"coverage": "x", "concepts": "y"}, SettingError, "both"),
        ({"selections": [Path("few.txt"), Path("a/few.txt")]}, SettingError, "names"),
        ({"selections": [Path("no.txt")]}, PathError, "no.txt"),
    ],
)
def test_start_errors(root: Path, places: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        start(**{"index": root / "index", **places})
