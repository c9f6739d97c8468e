"""The factor fits products between layers better than leading eigenvectors of the same rank."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.profile import Array
from allocator.profiling.coupling import RANK, between_layers
from tests.support.synthetic_profiles import PROPERTY

WIDTH = 2


def grams(seed: int, layers: int, common: int, own: float) -> Array:
    """Return inner products of effects with `common` shared directions and independent parts."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(WIDTH * layers, common))
    alone = rng.normal(size=(WIDTH * layers, WIDTH * layers)) * own
    return np.asarray(shared @ shared.T + alone @ alone.T / (WIDTH * layers), dtype=np.float64)


def own_part(count: int) -> Array:
    return np.kron(np.eye(count // WIDTH), np.ones((WIDTH, WIDTH))).astype(bool)


def left_out(gram: Array, factor: Array) -> float:
    own = own_part(len(gram))
    missing = np.where(own, 0, gram - factor.T @ factor)
    return float(np.linalg.norm(missing) / np.linalg.norm(np.where(own, 0, gram)))


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(2, 12),
    common=st.integers(1, 6),
    own=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_the_truncation_is_the_share_of_the_products_that_is_left_out(
    seed: int, layers: int, common: int, own: float
) -> None:
    gram = grams(seed, layers, common, own)
    factor, truncation = between_layers(gram, WIDTH)
    assert factor.shape[0] <= min(RANK, layers)
    assert truncation == pytest.approx(left_out(gram, factor), abs=1e-9)


@pytest.mark.parametrize("own", [0.0, 3.0, 30.0])
def test_a_few_common_directions_are_fitted_whatever_the_size_of_each_layer_s_own_part(
    own: float,
) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(40, 3))
    gram = shared @ shared.T + np.kron(np.diag(rng.uniform(0, own, 20)), np.eye(WIDTH))
    assert between_layers(gram, WIDTH)[1] < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_the_leading_eigenvectors_leave_out_more(seed: int) -> None:
    gram = grams(seed, 80, 100, 20.0)
    factor, truncation = between_layers(gram, WIDTH)
    values, vectors = np.linalg.eigh(gram)
    eigen = (vectors[:, -len(factor) :] * np.sqrt(values[-len(factor) :])).T
    assert truncation < 0.8 * left_out(gram, eigen)


def test_layers_without_coupling_have_no_factor() -> None:
    factor, truncation = between_layers(np.kron(np.eye(5), np.ones((WIDTH, WIDTH))), WIDTH)
    assert factor.shape == (0, 5 * WIDTH)
    assert truncation == 0


def test_one_layer_has_no_factor() -> None:
    assert between_layers(np.eye(WIDTH), WIDTH)[0].shape == (0, WIDTH)


def test_directions_are_in_descending_order_of_size() -> None:
    factor, _ = between_layers(grams(0, 10, 5, 0.1), WIDTH)
    sizes = np.linalg.norm(factor, axis=1)
    assert (np.diff(sizes) <= 1e-9).all()
