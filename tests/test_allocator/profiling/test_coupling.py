"""The factor keeps what layers do to each other, better than the leading eigenvectors of the same rank."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.profile import Array
from allocator.profiling.coupling import RANK, between_layers
from tests.support.synthetic_profiles import PROPERTY

WIDTH = 2


def grams(seed: int, layers: int, common: int, own: float) -> Array:
    """Return inner products of effects that share `common` directions and each have one of their own beside."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(WIDTH * layers, common))
    alone = rng.normal(size=(WIDTH * layers, WIDTH * layers)) * own
    return np.asarray(shared @ shared.T + alone @ alone.T / (WIDTH * layers), dtype=np.float64)


def own_part(count: int) -> Array:
    return np.kron(np.eye(count // WIDTH), np.ones((WIDTH, WIDTH))).astype(bool)


def left_out(gram: Array, factor: Array) -> float:
    between = np.where(own_part(len(gram)), 0, gram)
    return float(
        np.linalg.norm(np.where(own_part(len(gram)), 0, gram - factor.T @ factor))
        / np.linalg.norm(between)
    )


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(2, 12),
    common=st.integers(1, 6),
    own=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_what_is_said_to_be_left_out_is(seed: int, layers: int, common: int, own: float) -> None:
    gram = grams(seed, layers, common, own)
    factor, said = between_layers(gram, WIDTH)
    assert factor.shape[0] <= min(RANK, layers)
    assert said == pytest.approx(left_out(gram, factor), abs=1e-9)


@pytest.mark.parametrize("own", [0.0, 3.0, 30.0])
def test_a_few_common_directions_are_found_however_much_each_layer_does_alone(own: float) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(40, 3))
    gram = shared @ shared.T + np.kron(np.diag(rng.uniform(0, own, 20)), np.eye(WIDTH))
    assert between_layers(gram, WIDTH)[1] < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_the_leading_eigenvectors_leave_out_more(seed: int) -> None:
    gram = grams(seed, 80, 100, 20.0)
    factor, said = between_layers(gram, WIDTH)
    values, vectors = np.linalg.eigh(gram)
    eigen = (vectors[:, -len(factor) :] * np.sqrt(values[-len(factor) :])).T
    assert said < 0.8 * left_out(gram, eigen)


def test_layers_that_do_nothing_to_each_other_have_no_factor() -> None:
    factor, said = between_layers(np.kron(np.eye(5), np.ones((WIDTH, WIDTH))), WIDTH)
    assert factor.shape == (0, 5 * WIDTH)
    assert said == 0


def test_one_layer_has_no_factor() -> None:
    assert between_layers(np.eye(WIDTH), WIDTH)[0].shape == (0, WIDTH)


def test_the_strongest_direction_stands_first() -> None:
    factor, _ = between_layers(grams(0, 10, 5, 0.1), WIDTH)
    sizes = np.linalg.norm(factor, axis=1)
    assert (np.diff(sizes) <= 1e-9).all()
