"""Options of public functions by name; written by `just options`. None stands for the default of an option.

There is no module of this name when code runs: import these types under `typing.TYPE_CHECKING`.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Literal, TypedDict

class AdapterOptions(TypedDict, total=False):
    split: str | PathLike[str] | None
    val_fraction: float | None
    test_fraction: float | None
    max_val: int | None
    max_test: int | None
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    split_by: (
        Literal["image", "text", "audio", "video", "points"]
        | Iterable[Literal["image", "text", "audio", "video", "points"]]
        | None
    )
    split_seed: int | None
    shuffle_pairs: bool | None
    seed: int | None

class AdapterEvalOptions(TypedDict, total=False):
    part: Literal["train", "val", "test", "all"] | None
    num_queries: int | None
    selection: str | PathLike[str] | None
    device: str | None

class CoverageOptions(TypedDict, total=False):
    modality: Literal["image", "text", "audio", "video", "points", "both"] | None
    feature: str | None
    run: str | PathLike[str] | None
    label: str | None
    language: str | None
    answers: str | PathLike[str] | None
    k: int | None
    min_count: int | None
    selection: str | PathLike[str] | None
    engine: Literal["local", "ray"] | None
    address: str | None
    device: str | None

class DedupOptions(TypedDict, total=False):
    cosine: float | None
    copies: bool | None
    pixels: bool | None
    modality: Literal["image", "text", "audio", "video", "points"] | None
    feature: str | None
    run: str | PathLike[str] | None
    keep: str | None
    selection: str | PathLike[str] | None
    all_pairs: bool | None
    scratch: str | PathLike[str] | None
    seed: int | None
    engine: Literal["local", "ray"] | None
    address: str | None
    device: str | None

class ExportOptions(TypedDict, total=False):
    metrics: str | PathLike[str] | None
    push_to_hub: str | None
    public: bool | None
    towers: bool | None

class ExtractOptions(SourceOptions, total=False):
    source_type: str | None
    feature: str | Iterable[str] | None
    view: str | Iterable[str] | None
    dtype: Literal["float16", "float32"] | None
    chunk_size: int | None
    limit: int | None
    extend: bool | None
    shard: str | None
    device: str | Iterable[str] | None
    threads: int | None
    engine: Literal["local", "ray"] | None
    address: str | None
    actors: int | None
    batch_size: int | None
    precision: Literal["auto", "float32", "float16", "bfloat16"] | None
    backend: Literal["auto", "torch", "onnxruntime"] | None
    compile: bool | None
    background: str | None

class HubOptions(TypedDict, total=False):
    public: bool | None
    license: str | None

class ImportOptions(TypedDict, total=False):
    model: str | None
    key_column: str | None
    caption_column: str | Iterable[str] | None
    item_column: str | Iterable[str] | Mapping[str, str] | None
    chunk_size: int | None

class IndexOptions(TypedDict, total=False):
    modality: Literal["image", "text", "audio", "video", "points"] | None
    feature: str | None
    run: str | PathLike[str] | None
    width: int | None
    factory: str | None
    memory: int | str | None
    on_disk: bool | None
    min_recall: float | None
    device: str | None

class LeakOptions(TypedDict, total=False):
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    all_pairs: bool | None
    scratch: str | PathLike[str] | None
    seed: int | None
    device: str | None

class MapOptions(TypedDict, total=False):
    projection: Literal["umap", "pca"] | None
    max_items: int | None
    concepts: str | PathLike[str] | None
    run: str | PathLike[str] | None
    cache: str | PathLike[str] | None
    seed: int | None
    device: str | None

class NegativesOptions(TypedDict, total=False):
    run: str | PathLike[str] | None
    modality: str | None
    index: str | PathLike[str] | None
    num_negatives: int | None
    range_min: int | None
    range_max: int | None
    max_score: float | None
    relative_margin: float | None
    sampling: Literal["top", "random"] | None
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    selection: str | PathLike[str] | None
    seed: int | None
    device: str | None

class OutlierOptions(TypedDict, total=False):
    k: int | None
    label_neighbors: int | None
    modality: Literal["image", "text", "audio", "video", "points"] | None
    feature: str | None
    run: str | PathLike[str] | None
    label: str | None
    all_pairs: bool | None
    scratch: str | PathLike[str] | None
    seed: int | None
    engine: Literal["local", "ray"] | None
    address: str | None
    device: str | None

class PairsOptions(TypedDict, total=False):
    language: str | None
    num_samples: int | None
    k: int | None
    seed: int | None
    selection: str | PathLike[str] | None
    device: str | None
    split: str | PathLike[str] | None
    val_fraction: float | None
    test_fraction: float | None
    max_val: int | None
    max_test: int | None
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    split_by: (
        Literal["image", "text", "audio", "video", "points"]
        | Iterable[Literal["image", "text", "audio", "video", "points"]]
        | None
    )
    split_seed: int | None

class ProbeOptions(TypedDict, total=False):
    modality: Literal["image", "text", "audio", "video", "points"] | None
    feature: str | None
    label: str | None
    classifier: str | Iterable[str] | None
    part: Literal["test", "val"] | None
    shots: int | Iterable[int] | None
    draws: int | None
    control: bool | None
    check_overlap: bool | None
    seed: int | None
    selection: str | PathLike[str] | None
    device: str | None
    split: str | PathLike[str] | None
    val_fraction: float | None
    test_fraction: float | None
    max_val: int | None
    max_test: int | None
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    split_by: (
        Literal["image", "text", "audio", "video", "points"]
        | Iterable[Literal["image", "text", "audio", "video", "points"]]
        | None
    )
    split_seed: int | None

class PruneOptions(TypedDict, total=False):
    feature: str | Iterable[str] | None
    modality: str | None

class RemoveOptions(TypedDict, total=False):
    index: str | PathLike[str] | Iterable[str | PathLike[str]] | None
    check: str | PathLike[str] | Iterable[str | PathLike[str]] | None

class RetrievalOptions(TypedDict, total=False):
    part: Literal["train", "val", "test", "all"] | None
    language: str | Iterable[str] | None
    trained_on: str | PathLike[str] | Iterable[str | PathLike[str]] | None
    check_overlap: bool | None
    widths: int | Iterable[int] | None
    max_samples: int | None
    selection: str | PathLike[str] | None
    device: str | None

class ScoreOptions(TypedDict, total=False):
    weights: str | PathLike[str] | None
    fold_layers: bool | None
    prompt: str | Iterable[str] | None
    negative: str | Iterable[str] | None
    column: str | None
    modality: Literal["image", "text", "audio", "video", "points"] | None
    feature: str | None
    run: str | PathLike[str] | None
    normalize: bool | None
    device: str | None

class SearchOptions(TypedDict, total=False):
    k: int | None
    match: Literal["vectors", "words", "both"] | None
    label: str | None
    where: str | None
    label_value: str | Iterable[str] | None
    part: str | Iterable[str] | None
    language: str | Iterable[str] | None
    selection: str | PathLike[str] | None
    run: str | PathLike[str] | None
    cache: str | PathLike[str] | None
    adapter: str | PathLike[str] | None
    device: str | None

class SelectOptions(TypedDict, total=False):
    budget: int | str | float | None
    scores: str | PathLike[str] | None
    score: str | None
    concepts: str | PathLike[str] | None
    join_names: bool | None
    label: str | None
    target: str | PathLike[str] | None
    run: str | PathLike[str] | None
    modality: Literal["image", "text", "audio", "video", "points"] | None
    feature: str | None
    selection: str | PathLike[str] | None
    where: str | None
    seed: int | None
    device: str | None

class SourceOptions(TypedDict, total=False):
    item_column: str | Iterable[str] | Mapping[str, str] | None
    caption_column: str | Iterable[str] | None
    key_column: str | None
    omit_column: str | Iterable[str] | None
    language_column: str | None
    language: str | Iterable[str] | None
    root: str | PathLike[str] | None
    delimiter: str | None

class SplitOptions(TypedDict, total=False):
    split: str | PathLike[str] | None
    val_fraction: float | None
    test_fraction: float | None
    max_val: int | None
    max_test: int | None
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    split_by: (
        Literal["image", "text", "audio", "video", "points"]
        | Iterable[Literal["image", "text", "audio", "video", "points"]]
        | None
    )
    split_seed: int | None

class SweepOptions(TypedDict, total=False):
    trials: int | None
    sampler: Literal["tpe", "random", "grid"] | None
    pruner: Literal["none", "median", "hyperband"] | None
    seed: int | None
    workers: int | None
    top_configs: int | None
    seeds_per_config: int | None
    storage: str | None

class TrainOptions(TypedDict, total=False):
    recipe: Literal["auto"] | None
    projector: str | None
    shared_width: int | None
    initialization: Literal["cca", "csa", "procrustes", "ridge", "random"] | None
    shrinkage: float | None
    dropout: float | None
    loss: str | None
    temperature: float | None
    mixup: float | None
    structure: float | None
    widths: int | Iterable[int] | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    weight_decay: float | None
    warmup_fraction: float | None
    max_grad_norm: float | None
    patience: int | None
    init_from: str | PathLike[str] | Iterable[str | PathLike[str]] | None
    trainable: str | None
    split: str | PathLike[str] | None
    val_fraction: float | None
    test_fraction: float | None
    max_val: int | None
    max_test: int | None
    cosine: float | str | Iterable[str] | Mapping[str, float] | None
    split_by: (
        Literal["image", "text", "audio", "video", "points"]
        | Iterable[Literal["image", "text", "audio", "video", "points"]]
        | None
    )
    split_seed: int | None
    language: str | None
    captions: Literal["draw", "all"] | None
    views: str | Iterable[str] | None
    selection: str | PathLike[str] | None
    where: str | None
    negatives: str | PathLike[str] | Iterable[str | PathLike[str]] | None
    num_negatives: int | None
    shuffle_pairs: bool | None
    prototypes: str | PathLike[str] | None
    prototype_weight: float | None
    shuffle_prototypes: bool | None
    block_rows: int | None
    seed: int | None
    device: str | None
    precision: Literal["float32", "float16", "bfloat16"] | None
    threads: int | None
    memory: int | str | None
    checkpoint_s: float | None
    report_to: str | Iterable[str] | None

class VectorExportOptions(TypedDict, total=False):
    feature: str | Iterable[str] | None
    modality: Literal["image", "text", "audio", "video", "points"] | None
    run: str | PathLike[str] | None
    selection: str | PathLike[str] | None
    where: str | None
    language: str | None
    device: str | None

class VerifyOptions(TypedDict, total=False):
    reencode: float | str | None
    repair: bool | None
    device: str | None

class ZeroShotOptions(TypedDict, total=False):
    label: str | None
    part: Literal["train", "val", "test", "all"] | None
    trained_on: str | PathLike[str] | Iterable[str | PathLike[str]] | None
    check_overlap: bool | None
    selection: str | PathLike[str] | None
    device: str | None
