"""Answer a question about an image with a run that was trained on questions.

    python -m pipelines.uniperceiver.answer work/seed0/prompts-easy-vqa-1 photo.png "what color is the shape?"

The image passes the frozen encoder and the rule of the pipeline, like the images of its caches.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from embedcache.arrays import Floats
from embedcache.cli.console import print_table, run_program
from embedcache.errors import DataError, PathError, SourceError
from embedcache.progress import NullProgress
from embedcache.provenance import check_same
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from pipelines.uniperceiver.data import IMAGE_TOKENS, extract_tokens
from pipelines.uniperceiver.evaluation import load_shared
from pipelines.uniperceiver.examples import Media, open_media
from pipelines.uniperceiver.network import SharedNetwork, Tokens
from pipelines.uniperceiver.tasks import Kind, encode_texts, load_words, read_tokens
from pipelines.uniperceiver.words import with_blanks

_NUM_ANSWERS = 5


def main() -> None:
    """Print the most probable answers of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that was tuned on easy-VQA")
    parser.add_argument("image", type=Path)
    parser.add_argument("question", help="`_` marks the place of the answer, which otherwise follows the question")
    options = parser.parse_args()

    answers = answer_question(options.run, options.image, options.question)
    best = sorted(answers.items(), key=lambda item: -item[1])[:_NUM_ANSWERS]
    print_table(["answer", "probability"], [[name, f"{probability:.1%}"] for name, probability in best])


def answer_question(run_path: Path, image: Path, question: str) -> dict[str, float]:
    """Return each answer that a run was trained on, with its probability.

    Raises:
        PathError: the run or the image does not exist.
        DataError: the run was not trained on answers, or the image cannot be decoded.
        FingerprintError: the run was trained on another encoder.
    """
    network, run = load_shared(run_path)
    tasks = [task for task in run.info.settings["tasks"] if task["kind"] == "answer"]
    if len(tasks) != 1:
        raise DataError(
            f"{run_path}: expected a run of one task of answers, got {len(tasks)}; use one tuned on easy-VQA"
        )
    names = tasks[0]["candidates"]

    # The image goes through a cache, so that encoder, rule and fingerprint are those of the training.
    with TemporaryDirectory() as folder:
        media = _read_image(image, Path(folder))
        check_same(
            str(image),
            media.feature.fingerprint,
            run.info.inputs["image"].fingerprint,
            next_step="use the encoder and the rule that the run was trained on",
        )
        tokens = read_tokens(media, np.zeros(1, np.int64), device=str(network.task_token.device))
    probabilities = compute_probabilities(network, tokens, names, kind="answer", questions=[question])
    return dict(zip(names, probabilities[0].tolist(), strict=True))


@torch.inference_mode()
def compute_probabilities(
    network: SharedNetwork,
    tokens: Mapping[str, Tokens],
    names: Sequence[str],
    *,
    kind: Kind,
    questions: Sequence[str] | None = None,
) -> Floats:
    """Compute the probability of each class of items, or of each answer to a question per item: (N, C)."""
    device = str(network.task_token.device)
    words = None if questions is None else load_words(with_blanks(network.vocabulary.encode(questions)), device=device)
    queries_NP = network.encode(tokens, words, read="task" if words is None else "blank")

    # A word that the run never saw would be compared as an unknown word.
    candidates = network.vocabulary.require_known(names, "candidates")
    logits_NC = network.classifier(kind).logits(queries_NP, encode_texts(network, candidates, device=device))
    return logits_NC.softmax(dim=1).cpu().numpy()


def _read_image(image: Path, folder: Path) -> Media:
    """Extract the tokens of one image into a cache in a folder."""
    if not image.is_file():
        raise PathError(f"expected an image, got {image}, which is not a file; check the path")
    (folder / "images").mkdir()
    shutil.copy(image, folder / "images" / "image.png")  # any format: images are decoded by their content

    try:
        extract_tokens(open_source(folder / "images"), folder / "cache", [], NullProgress())
    except SourceError as error:
        raise DataError(f"{image}: expected an image, got a file that cannot be decoded; convert it to PNG") from error
    return open_media(Cache(folder / "cache"), "image", IMAGE_TOKENS)


if __name__ == "__main__":
    run_program(main)
