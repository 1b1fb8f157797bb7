"""A task of mteb; importing mteb takes two seconds, which processes that run other tests do without."""

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata


class Pairs(AbsTaskRetrieval):
    """Images by their captions."""

    metadata = TaskMetadata(
        type="Any2AnyRetrieval",
        name="EmbedcachePairs",
        description="Images by their captions.",
        reference=None,
        dataset={"path": "none", "revision": "none"},
        category="t2i",
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2026-01-01", "2026-01-02"),
        domains=[],
        task_subtypes=[],
        license="cc-by-4.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="found",
        bibtex_citation="",
    )
    num_images = 24
    folder: Path

    def load_data(self, *_: Any, **__: Any) -> None:
        """Read the first images and captions of a folder."""
        numbers = range(self.num_images)
        images = sorted(self.folder.glob("*.png"))[: self.num_images]
        captions = [path.with_suffix(".txt").read_text().strip() for path in images]
        queries = {"id": [f"q{n}" for n in numbers], "text": captions}
        features = Features({"id": Value("string"), "image": Image()})
        corpus = {"id": [f"d{n}" for n in numbers], "image": [str(path) for path in images]}
        relevant = {f"q{n}": {f"d{m}": int(captions[m] == captions[n]) for m in numbers} for n in numbers}
        data = RetrievalSplitData(
            queries=Dataset.from_dict(queries),
            corpus=Dataset.from_dict(corpus, features=features),
            relevant_docs=relevant,
            top_ranked=None,
        )
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True
