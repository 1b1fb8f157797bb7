import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from embedcache.errors import DataError
from embedcache.metrics.divergence import domain_gap, symmetric_kl

MEANS, VARIANCES = st.floats(-3, 3), st.floats(0.2, 4)


@settings(max_examples=20)
@given(MEANS, VARIANCES, MEANS, VARIANCES)
def test_matches_integral_over_densities(mean: float, variance: float, other: float, other_variance: float) -> None:
    p, q = norm(mean, variance**0.5), norm(other, other_variance**0.5)  # scipy takes standard deviations
    expected, _ = quad(lambda x: (p.pdf(x) - q.pdf(x)) * (p.logpdf(x) - q.logpdf(x)), -30, 30, limit=200)
    found = symmetric_kl(*(np.array([value]) for value in (mean, variance, other, other_variance)))
    assert found[0] == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_symmetric_and_invariant_under_scaling() -> None:
    rng = np.random.default_rng(0)
    mean, other = rng.normal(size=(2, 8))
    variance, other_variance = rng.uniform(0.1, 3, size=(2, 8))
    found = symmetric_kl(mean, variance, other, other_variance)
    assert found == pytest.approx(symmetric_kl(other, other_variance, mean, variance))
    assert found == pytest.approx(symmetric_kl(7 * mean, 49 * variance, 7 * other, 49 * other_variance))


def test_constant_channels() -> None:
    zeros, ones = np.zeros(3), np.ones(3)
    found = symmetric_kl(np.array([0.0, 0, 0]), np.array([0.0, 0, 1]), np.array([0.0, 1, 0]), np.array([0.0, 0, 0]))
    assert found.tolist() == [0, np.inf, np.inf]
    assert domain_gap(zeros, ones, zeros, np.array([1.0, 1, 0])) == 0  # one odd channel does not decide
    for variances in ((ones, np.array([1, -2, 3])), (np.array([-2, 1, 1]), -ones)):
        with pytest.raises(DataError, match=r"variances of at least 0, got -2.0$"):
            symmetric_kl(zeros, variances[0], zeros, variances[1])
    assert symmetric_kl(*[np.empty(0)] * 4).shape == (0,)
