"""Without zero-computation experts the layer is a vanilla top-K mixture of experts."""

import jax
import numpy as np
import pytest

from moepp_jax import moe
from tests import vanilla
from tests.moe import cases
from tests.oracle import Spec


@pytest.mark.parametrize("gate", ["renormalise_nonzero", "renormalise_all", "softmax_selected"])
@pytest.mark.parametrize("path, slots", [("capacity", 6), ("capacity", 16), ("blocked", 16)])
def test_equals_vanilla(path, slots, gate):
    """Slots: ceil(gamma K S / E), 0.75 * 2 * 16 / 4 = 6 of the 16 tokens."""
    gamma = 0.75 if slots == 6 else None
    spec = Spec(4, top_k=2, tau=1.0, gamma=gamma, gate=gate, residual=False)
    p, x, previous = cases.case(spec)
    y, _, stats = jax.jit(lambda *a: moe.local(*a, cases.layer(spec, path)))(x, previous, p)
    exact = [np.float64(w) for w in (p["router"]["w"], p["ffn"]["w_in"], p["ffn"]["w_out"])]
    want = np.array([vanilla.moe(np.float64(group), *exact, 2, slots) for group in x])
    cases.close(y, want, 1e-6)
    dropped = np.asarray(stats.load - stats.kept).sum()
    assert (dropped > 0) == (slots == 6)
