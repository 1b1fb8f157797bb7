"""Caption search with kept keys and values, against computing every prefix anew."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.errors import DataError, SettingError
from embedcache.networks.candidates import Candidates
from embedcache.networks.captions import CaptionSteps, write_captions
from embedcache.networks.shared import SharedNetwork, Tokens, Words
from embedcache.networks.words import END, NUM_SPECIAL

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
        net.likelihood("caption").log_scale.fill_(1.5)  # not too sure of anything
    return net.eval()


def images(count: int) -> dict[str, Tokens]:
    return {"image": Tokens(torch.randn(count, 4, 5), torch.tensor([4, 2, 3, 1][:count]))}


def vocabulary(net: SharedNetwork) -> tuple[torch.Tensor, Candidates]:
    numbers = torch.tensor([END, *range(NUM_SPECIAL, NUM_SPECIAL + NUM_WORDS)])
    with torch.no_grad():
        return numbers, Candidates(net.encode_words(numbers))


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


def all_log_probs(net: SharedNetwork, tokens: dict[str, Tokens], max_length: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every caption up to a length."""
    words = range(NUM_SPECIAL, NUM_SPECIAL + NUM_WORDS)
    found: dict[tuple[int, ...], float] = {}
    starts: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(max_length + 1):
        for text in itertools.product(words, repeat=length):
            following = starts[text] + log_probs(net, tokens, text)
            found[text] = float(following[0])
            starts |= {(*text, word): float(following[1 + place]) for place, word in enumerate(words)}
    return found


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


@pytest.mark.slow
@pytest.mark.parametrize("length_power", [0.0, 0.7, 1.0])
def test_a_wide_beam_finds_the_best_of_all_captions(length_power: float) -> None:
    net, tokens = network(), images(2)
    options = {"beam": NUM_WORDS**3, "max_length": 3, "length_power": length_power}
    found = write_captions(net, tokens, net.likelihood("caption"), vocabulary(net), **options)  # type: ignore[arg-type]
    for item, caption in enumerate(found):
        of_all = all_log_probs(net, one(tokens, item), 3)
        scores = {text: log_prob / (len(text) + 1) ** length_power for text, log_prob in of_all.items()}
        best = max(scores, key=lambda text: scores[text])
        assert tuple(caption.numbers.tolist()) == best
        assert caption.score == pytest.approx(scores[best], abs=1e-4)
        assert caption.log_prob == pytest.approx(scores[best] * (len(best) + 1) ** length_power, abs=1e-4)


def plain_beam(net: SharedNetwork, tokens: dict[str, Tokens], *, beam: int, max_length: int) -> tuple[int, ...]:
    """Beam search on full re-computation, by the mean over words."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: dict[tuple[int, ...], float] = {}
    for _ in range(max_length + 1):
        grown = []
        for text, log_prob in live:
            following = log_prob + log_probs(net, tokens, text)
            finished[text] = following[0] / (len(text) + 1)
            grown += [((*text, NUM_SPECIAL + place), following[1 + place]) for place in range(NUM_WORDS)]
        live = sorted(grown, key=lambda entry: -entry[1])[:beam]
    return max(finished, key=lambda text: finished[text])


@pytest.mark.slow
def test_a_batch_gives_the_captions_of_a_plain_search_of_each_item() -> None:
    net, tokens = network(), images(4)
    found = write_captions(
        net, tokens, net.likelihood("caption"), vocabulary(net), beam=2, max_length=5, length_power=1.0
    )
    expected = [plain_beam(net, one(tokens, item), beam=2, max_length=5) for item in range(4)]
    assert [tuple(caption.numbers.tolist()) for caption in found] == expected
    assert len({len(text) for text in expected}) > 1


def test_length_power_makes_captions_longer() -> None:
    net, tokens = network(), images(4)
    lengths = [
        sum(
            len(caption.numbers)
            for caption in write_captions(net, tokens, net.likelihood("caption"), vocabulary(net), length_power=power)
        )
        for power in (0.0, 1.0)
    ]
    assert lengths[0] < lengths[1]


def test_bad_settings_are_refused() -> None:
    net, tokens = network(), images(1)
    likelihood, (numbers, candidates) = net.likelihood("caption"), vocabulary(net)
    with pytest.raises(SettingError, match="beam"):
        write_captions(net, tokens, likelihood, (numbers, candidates), beam=0)
    with pytest.raises(DataError, match="one end"):
        write_captions(net, tokens, likelihood, (numbers[1:], Candidates(candidates.vectors_CP[1:])))
