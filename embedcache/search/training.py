"""Training of a FAISS index on a sample of vectors."""

from collections.abc import Iterator
from typing import Any

from embedcache.progress import Progress
from embedcache.search.faiss_gpu import import_faiss
from embedcache.search.faiss_index import RowIndex
from embedcache.search.vectors import Vectors


def train_index(index: RowIndex, factory: str, vectors: Vectors, progress: Progress) -> None:
    """Train an index on a sample; a note replaces FAISS's warnings of too few vectors."""
    sample_SP, least = vectors.sample(index.num_training, progress=progress), 0
    quantizers = list(_quantizers(index.wrapped))
    for quantizer, num_centroids in quantizers:
        least = max(least, num_centroids * quantizer.cp.min_points_per_centroid)
        quantizer.cp.min_points_per_centroid = 1
    note = f"training {factory}"
    if len(sample_SP) < least:
        note += f" on {len(sample_SP):,} vectors; k-means finds better centroids in {least:,} or more"
    progress.note(note)
    index.train(sample_SP)
    for transform in _rotations(index.wrapped):
        transform.pq = None


def _quantizers(index: Any) -> Iterator[tuple[Any, int]]:
    """Iterate over what k-means trains in a FAISS index, with the number of centroids; `cp` are its parameters."""
    faiss = import_faiss()
    for transform in _rotations(index):
        transform.pq = quantizer = faiss.ProductQuantizer(transform.d_out, transform.M, 8)  # as FAISS's own
        yield quantizer, quantizer.ksub
    index = faiss.downcast_index(index)
    for lists in {index, getattr(index, "q1", index)}:
        if hasattr(lists, "nlist"):
            yield lists, lists.nlist
    if hasattr(index, "pq"):
        yield index.pq, index.pq.ksub
    residuals = [index.rq] if hasattr(index, "rq") else []
    if hasattr(index, "prq"):
        quantizers = (index.prq.subquantizer(number) for number in range(index.prq.nsplits))
        residuals += map(faiss.downcast_AdditiveQuantizer, quantizers)
    for residual in residuals:
        yield residual, 2 ** int(faiss.vector_to_array(residual.nbits).max())
    for inner in ("index", "base_index", "refine_index", "storage", "quantizer"):
        if getattr(index, inner, None) is not None:
            yield from _quantizers(getattr(index, inner))


def _rotations(index: Any) -> list[Any]:
    """Return the transforms of a FAISS index that are trained for a product quantizer, such as OPQ16."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        return _rotations(index.index)
    count = index.chain.size() if isinstance(index, faiss.IndexPreTransform) else 0
    transforms = [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(count)]
    return [transform for transform in transforms if isinstance(transform, faiss.OPQMatrix)]
