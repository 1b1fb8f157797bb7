"""Caption search with kept keys and values, against computing every prefix anew."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.uniperceiver.captions import CaptionSteps, write_captions
from pipelines.uniperceiver.network import SharedNetwork, Tokens, Words
from pipelines.uniperceiver.words import END, NUM_SPECIAL

NUM_WORDS = 3


def network(**options: Any) -> SharedNetwork:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "feed_forward": 32, "word_width": 6}
    words = ["a", "red", "circle"]
    net = SharedNetwork(modalities={"image": {"width": 5}}, words=words, families=["caption"], **sizes, **options)  # type: ignore[arg-type]
    net.set_words(torch.randn(NUM_WORDS, 6).numpy())
    with torch.no_grad():
        for parameter in net.layers.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        net.likelihood("caption").log_scale.fill_(2.5)  # not too sure of anything
    return net.eval()


def images(count: int) -> dict[str, Tokens]:
    return {"image": Tokens(torch.randn(count, 4, 5), torch.tensor([4, 2, 3, 1][:count]))}


def vocabulary(net: SharedNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    """Words with their representations; that of the end is chosen such that captions have several lengths."""
    numbers = torch.tensor([END, *range(NUM_SPECIAL, NUM_SPECIAL + NUM_WORDS)])
    with torch.no_grad():
        vectors = net.encode(words=Words(numbers[:, None], torch.ones_like(numbers)), side="target")
    vectors[0] = torch.randn(net.width, generator=torch.Generator().manual_seed(9))
    return numbers, vectors


def one(tokens: dict[str, Tokens], item: int) -> dict[str, Tokens]:
    values, lengths = tokens["image"]
    assert lengths is not None
    return {"image": Tokens(values[[item]], lengths[[item]])}


@torch.no_grad()
def log_probs(net: SharedNetwork, tokens: dict[str, Tokens], prefix: Sequence[int]) -> np.ndarray:
    """Log-probabilities of the word after a prefix of one item, all of it computed anew."""
    text = Words(torch.tensor([[*prefix, END]]), torch.tensor([len(prefix)]))
    representation = net.predict_words(tokens, text)[:, len(prefix)]
    logits = net.likelihood("caption").logits(representation, vocabulary(net)[1])
    return logits[0].double().log_softmax(dim=0).numpy()


@pytest.mark.parametrize("num_prompts", [0, 2])
def test_steps_match_the_network_without_a_memory(num_prompts: int) -> None:
    net, tokens = network(num_prompts=num_prompts), images(3)
    steps = CaptionSteps(net, tokens)
    texts: list[list[int]] = [[], [], []]
    found = steps(None, torch.arange(3))
    for numbers, parents in (([3, 4, 5, 3], [0, 2, 2, 1]), ([5, 5], [3, 1])):
        texts = [[*texts[parent], number] for number, parent in zip(numbers, parents, strict=True)]
        found = steps(torch.tensor(numbers), torch.tensor(parents))
    expected = [
        net.predict_words(one(tokens, item), Words(torch.tensor([text]), torch.tensor([2])))[0, 2]
        for item, text in zip([1, 2], texts, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def plain_beam(net: SharedNetwork, tokens: dict[str, Tokens], *, beam: int, max_length: int) -> tuple[int, ...]:
    """Beam search on full re-computation."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: dict[tuple[int, ...], float] = {}
    for _ in range(max_length + 1):
        grown = []
        for text, log_prob in live:
            following = log_prob + log_probs(net, tokens, text)
            finished[text] = following[0]
            grown += [((*text, NUM_SPECIAL + place), following[1 + place]) for place in range(NUM_WORDS)]
        live = sorted(grown, key=lambda entry: -entry[1])[:beam]
    return max(finished, key=lambda text: finished[text])


@pytest.mark.slow
def test_a_batch_gives_the_captions_of_a_plain_search_of_each_item() -> None:
    net, tokens = network(), images(4)
    found = write_captions(net, tokens, net.likelihood("caption"), vocabulary(net), beam=2, max_length=5)
    expected = [plain_beam(net, one(tokens, item), beam=2, max_length=5) for item in range(4)]
    assert [tuple(caption.numbers.tolist()) for caption in found] == expected
    assert len({len(text) for text in expected}) > 1
