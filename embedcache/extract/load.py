"""Raw items to model inputs, ahead of the encoder, on threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeVar

from embedcache.arrays import Array
from embedcache.cache.commit import hash_item
from embedcache.errors import ItemError
from embedcache.extract.target import Target
from embedcache.sources.contract import ImageItem, Source
from embedcache.sources.media import decode_image

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One item, ready for every target, or the reason why it is not.

    Args:
        hash: BLAKE2b-128 of the raw bytes or text; None where they could not be read.
        failure: the reason; None where all is well.
        inputs: one array a target; empty after a failure.
    """

    hash: bytes | None
    failure: str | None = None
    inputs: Sequence[Array] = ()


def load_image(source: Source, item: ImageItem, targets: Sequence[Target]) -> Loaded:
    """Read, decode and prepare one image once for all targets."""
    content_hash = None
    try:
        data = source.read(item)
        content_hash = hash_item(data)
        targets[0].turns.wait()
        image = decode_image(data)
    except ItemError as error:
        return Loaded(hash=content_hash, failure=str(error))
    return Loaded(hash=content_hash, inputs=[target.encoder.prepare([target.look(image)])[0] for target in targets])


def load_texts(texts: Sequence[str], targets: Sequence[Target]) -> list[Loaded]:
    """Tokenise a chunk of texts for all targets; equal texts share their inputs."""
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    prepared = [target.encoder.prepare([target.look(text) for text in distinct]) for target in targets]
    inputs = {text: list(arrays) for text, *arrays in zip(distinct, *prepared, strict=True)}
    return [
        Loaded(
            hash=hash_item(text.encode()),
            failure=None if text in inputs else "empty caption",
            inputs=inputs.get(text, ()),
        )
        for text in texts
    ]


def ahead(executor: Executor, call: Callable[[T], R], items: Iterable[T], *, window: int) -> Generator[R, None, None]:
    """Map in order with at most `window` calls under way or waiting to be taken."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(call, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
