"""The shared transformer: what sees what, no leakage, prompts that change nothing, positions by axis."""

from typing import Any

import pytest
import torch

from embedcache.axis import Axis
from embedcache.errors import DataError
from embedcache.train.initialization import freeze
from pipelines.uniperceiver.layers import positions_of
from pipelines.uniperceiver.network import SharedNetwork, Tokens, Words
from pipelines.uniperceiver.words import BLANK, END, UNKNOWN

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


def test_gradients_of_a_padded_batch_are_those_of_its_items() -> None:
    net, tokens, targets = network(), images(), torch.randn(3, 16)

    def gradients(rows: list[int]) -> torch.Tensor:
        batch = {"image": Tokens(tokens["image"].values_BTD[rows])}
        read = net.encode(batch, words(*[TEXTS[row] for row in rows]))
        parameters = [value for name, value in net.named_parameters() if name.startswith(("layers", "words.linear"))]
        found = torch.autograd.grad((read * targets[rows]).sum(), parameters)
        return torch.cat([value.flatten() for value in found])

    torch.testing.assert_close(gradients([0, 1, 2]), sum(gradients([row]) for row in range(3)), atol=1e-4, rtol=1e-4)


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
