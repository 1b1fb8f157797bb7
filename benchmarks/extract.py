"""Extraction beside its floors and its peers: images, texts, clip-retrieval, precisions."""

from benchmarks import images, peers, precision, texts


def main(*, quick: bool) -> None:
    """Run all of them."""
    for part in (images, texts, peers, precision):
        part.main(quick=quick)
