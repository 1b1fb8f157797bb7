import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from embedcache.train.losses import info_nce


def batch(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        normalize(torch.randn(size, 4, generator=generator, dtype=torch.float64), dim=1).requires_grad_() for _ in "it"
    )  # type: ignore[return-value]


@given(st.integers(1, 6), st.integers(0, 100), st.floats(0.02, 1))
def test_with_one_positive_a_row_it_is_clips_loss(size: int, seed: int, temperature: float) -> None:
    images, texts = batch(size, seed)
    logits = images @ texts.T / temperature
    labels = torch.arange(size)
    clip = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    ours = info_nce(images, texts, torch.tensor(temperature), torch.eye(size, dtype=torch.bool))
    torch.testing.assert_close(ours, clip)


def test_a_second_positive_is_pulled_and_not_pushed() -> None:
    def pull(positive: torch.Tensor) -> float:
        images, texts = batch(4, 0)[0], torch.eye(4, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(info_nce(images, texts, torch.tensor(1.0), positive), images)
        return float(-gradient[0] @ texts[1])

    one = torch.eye(4, dtype=torch.bool)
    two = one.clone()
    two[0, 1] = True
    assert pull(one) < 0 < pull(two)


@given(st.integers(2, 5), st.integers(0, 100))
def test_gradients_are_those_of_finite_differences(size: int, seed: int) -> None:
    images, texts = batch(size, seed)
    positive = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    positive |= torch.eye(size, dtype=torch.bool)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: info_nce(*inputs, positive), (images, texts, temperature))
