"""Numbers of a layer's loads by hand, and warnings that come once."""

import numpy as np

from moepp_jax.analysis.health import Watch, by_layer

BALANCE = [0.5, 0.5, 0.5, 0.5]
EVEN = np.full((2, 4), 0.5)


def loads(layer: int, *values: float) -> np.ndarray:
    load = EVEN.copy()
    load[layer] = values
    return load


def test_by_hand():
    """Three FFN experts and a zero expert; the second layer's tokens choose the zero expert."""
    load = np.array([[0.9, 0.3, 0.0, 0.8], [0.0, 0.0, 0.0, 2.0]])
    found = by_layer(load, 3, BALANCE)
    np.testing.assert_allclose(found["load_largest_by_layer"], [0.9 / 0.4, 0.0])
    np.testing.assert_allclose(found["load_smallest_by_layer"], [0.0, 0.0])
    assert found["dead_experts_by_layer"].tolist() == [1, 3]


def test_a_dead_expert_is_told_once_and_not_at_its_first_absence():
    watch = Watch(3, BALANCE)
    gone = loads(1, 0.9, 0.6, 0.001, 0.5)
    assert watch.look(EVEN) == watch.look(gone) == watch.look(EVEN) == []
    assert watch.look(gone) == watch.look(gone) == []
    (said,) = watch.look(gone)
    assert said.startswith("MoE layer 2: no token chooses expert 2 any more")
    assert watch.look(gone) == []


def test_an_expert_that_never_lived_is_not_said_to_have_died():
    watch = Watch(3, BALANCE)
    gone = loads(1, 0.7, 0.8, 0.0, 0.5)
    (said,) = [line for _ in range(3) for line in watch.look(gone)]
    assert said.startswith("MoE layer 2: no token chooses expert 2 yet")


def test_of_experts_that_take_turns_none_is_dead():
    watch = Watch(3, BALANCE)
    for row in range(9):
        load = np.roll([0.9, 0.6, 0.0], row).tolist()
        assert watch.look(loads(0, *load, 0.5)) == []


def test_a_layer_that_collapses_is_told_once():
    watch = Watch(3, BALANCE)
    (said,) = watch.look(loads(0, 0.02, 1.0, 0.02, 0.5))
    assert said.startswith("MoE layer 1 has collapsed: FFN expert 1 has 96% of its FFN choices")
    assert watch.look(loads(0, 0.02, 1.0, 0.02, 0.5)) == []
    assert Watch(1, [1.0]).look(np.ones((1, 1))) == []  # one expert cannot collapse
    assert Watch(3, BALANCE).look(np.array([[0.0, 0.0, 0.0, 2.0]])) == []
