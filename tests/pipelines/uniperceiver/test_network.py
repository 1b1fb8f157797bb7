"""The shared transformer: what sees what, prompts and positions; captions against computing each prefix anew."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.errors import DataError
from embedcache.store.layout import Axis
from embedcache.train.initialization import freeze
from pipelines.uniperceiver.captions import CaptionSteps, write_captions
from pipelines.uniperceiver.layers import positions_of
from pipelines.uniperceiver.network import SharedNetwork, Tokens, Words
from pipelines.uniperceiver.words import BLANK, END, NUM_SPECIAL, UNKNOWN

GRID = {"kind": "grid", "rows": 2, "columns": 2, "box": [0, 0, 1, 1]}

MODALITIES = {"image": {"width": 5, "axis": GRID}, "audio": {"width": 4, "axis": {"kind": "time", "rate_hz": 50.0}}}

WORDS = ("a", "red", "blue", "circle", "square")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network(**options: Any) -> SharedNetwork:
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "feed_forward": 32, "word_width": 6}
    made = SharedNetwork(**{"modalities": MODALITIES, "words": WORDS, **sizes, **options}).eval()
    made.set_words(torch.randn(len(WORDS), 6).numpy())
    with torch.no_grad():  # far from the initialization, so that nothing is small
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def images(count: int = 3) -> dict[str, Tokens]:
    return {"image": Tokens(torch.randn(count, 4, 5))}


def words(*lists: list[int]) -> Words:
    lengths = torch.tensor([len(numbers) for numbers in lists])
    padded = [numbers + [END] * (int(lengths.max()) - len(numbers)) for numbers in lists]
    return Words(torch.tensor(padded), lengths)


TEXTS = ([3, 4, 6], [5, 7], [3, UNKNOWN, 7, 4])


def test_a_padded_batch_is_its_items_one_by_one() -> None:
    net = network()
    tokens = {**images(), "audio": Tokens(torch.randn(3, 6, 4), torch.tensor([6, 2, 4]))}
    batch, predicted = net.encode(tokens, words(*TEXTS)), net.predict_words(tokens, words(*TEXTS))
    assert (batch.shape, predicted.shape) == ((3, 16), (3, 5, 16))
    for row, text in enumerate(TEXTS):
        length = [6, 2, 4][row]
        one = {
            "image": Tokens(tokens["image"].values_BTD[[row]]),
            "audio": Tokens(tokens["audio"].values_BTD[[row], :length], torch.tensor([length])),
        }
        torch.testing.assert_close(net.encode(one, words(text))[0], batch[row], atol=1e-5, rtol=1e-5)
        found = net.predict_words(one, words(text))[0]
        torch.testing.assert_close(found, predicted[row, : len(text) + 1], atol=1e-5, rtol=1e-5)


def test_one_pass_predicts_what_each_prefix_alone_does() -> None:
    net, tokens = network(num_prompts=3), images(1)
    whole = net.predict_words(tokens, words([3, 4, 6, 5]))[0]
    for length in range(5):
        alone = net.predict_words(tokens, words([3, 4, 6, 5][:length] or [END]))[0, length]
        torch.testing.assert_close(alone, whole[length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", range(4))
def test_no_blank_sees_its_own_word_or_later_ones(place: int) -> None:
    net, tokens = network(), images(1)
    texts = [3, 4, 6, 5]
    changed = [*texts[:place], 7, *texts[place + 1 :]]
    before, after = (net.predict_words(tokens, words(text))[0] for text in (texts, changed))
    torch.testing.assert_close(after[: place + 1], before[: place + 1], atol=0, rtol=0)
    assert (after[place + 1 :] - before[place + 1 :]).abs().amax(dim=1).min() > 1e-3


def test_every_blank_sees_the_image_and_no_image_sees_the_words() -> None:
    net = network()
    before, after = (net.predict_words(tokens, words([3, 4]))[0] for tokens in (images(1), images(1)))
    assert (after - before).abs().amax(dim=1).min() > 1e-3


def test_a_masked_word_is_read_at_its_blank_in_sight_of_both_sides() -> None:
    net, tokens = network(), images(2)
    read = net.encode(tokens, words([3, BLANK, 6], [BLANK, BLANK, 4]), read="blank")
    assert read.shape == (3, 16)
    other = net.encode(tokens, words([3, BLANK, 7], [BLANK, BLANK, 4]), read="blank")
    assert (read[0] - other[0]).abs().max() > 1e-3
    torch.testing.assert_close(other[1:], read[1:])


def test_prompts_change_their_own_side_only() -> None:
    net, tokens = network(num_prompts=2), images()
    before = net.encode(tokens), net.encode(words=words([3, 4]), side="target")
    with torch.no_grad():
        net.prompts["input"].add_(torch.randn(2, 2, 16))
    assert (net.encode(tokens) - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(net.encode(words=words([3, 4]), side="target"), before[1])


def test_cells_of_several_grids_agree_where_their_centers_do() -> None:
    whole = positions_of(Axis(kind="grid", rows=4, columns=4), 16, 16)
    quarter = positions_of(Axis(kind="grid", rows=2, columns=2, box=(0.5, 0.0, 1.0, 0.5)), 4, 16)
    torch.testing.assert_close(quarter, whole[[2, 3, 6, 7]])
    slow, fast = (positions_of(Axis(kind="time", rate_hz=rate), 8, 16) for rate in (25.0, 50.0))
    torch.testing.assert_close(slow[:4], fast[::2])
    with pytest.raises(DataError, match="2 x 2 tokens"):
        network().encode({"image": Tokens(torch.randn(1, 9, 5))})


def test_parts_cover_everything_but_the_word_vectors() -> None:
    net = network(num_prompts=2, families=["classify"])
    paths = [path for part in net.parts().values() for path in part]
    left = [key for key in net.state_dict() if not any(key == path or key.startswith(f"{path}.") for path in paths)]
    assert left == ["words.table"]
    freeze(net, net.parts(), ["prompts", "norms"])
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"prompts", "layers", "embedding_norm", "final_norm"}
    assert all(name.split(".")[2].endswith("_norm") for name in trained if name.startswith("layers"))


NUM_WORDS = 3


def caption_network(**options: Any) -> SharedNetwork:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "feed_forward": 32, "word_width": 6}
    words = ["a", "red", "circle"]
    net = SharedNetwork(modalities={"image": {"width": 5}}, words=words, families=["caption"], **sizes, **options)  # type: ignore[arg-type]
    net.set_words(torch.randn(NUM_WORDS, 6).numpy())
    with torch.no_grad():
        for parameter in net.layers.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        net.classifier("caption").log_scale.fill_(2.5)  # not too sure of anything
    return net.eval()


def padded_images(count: int) -> dict[str, Tokens]:
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
    logits = net.classifier("caption").logits(representation, vocabulary(net)[1])
    return logits[0].double().log_softmax(dim=0).numpy()


@pytest.mark.parametrize("num_prompts", [0, 2])
def test_steps_match_the_network_without_a_memory(num_prompts: int) -> None:
    net, tokens = caption_network(num_prompts=num_prompts), padded_images(3)
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
    net, tokens = caption_network(), padded_images(4)
    found = write_captions(net, tokens, net.classifier("caption"), vocabulary(net), beam=2, max_length=5)
    expected = [plain_beam(net, one(tokens, item), beam=2, max_length=5) for item in range(4)]
    assert [tuple(caption.numbers.tolist()) for caption in found] == expected
    assert len({len(text) for text in expected}) > 1
