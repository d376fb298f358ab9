import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax import seal

NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text())
FIELDS = st.dictionaries(
    st.text().filter(lambda name: name != seal.CHECKSUM),
    st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)


@given(FIELDS)
def test_what_is_sealed_is_opened(fields):
    there = json.loads(seal.sealed(fields))
    assert there[seal.CHECKSUM] and seal.opened(there) == fields
    backwards = dict(reversed(there.items()))
    assert seal.opened(backwards) == fields


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False))
def test_another_number_is_noticed(written, read):
    there = json.loads(seal.sealed({"optim": {"lr": written}}))
    there["optim"]["lr"] = read
    if repr(written) == repr(read):
        assert seal.opened(there)
        return
    with pytest.raises(ValueError, match=r"^has changed since it was written, as its 'checksum'"):
        seal.opened(there)
    del there[seal.CHECKSUM]
    assert seal.opened(there) == there


def test_a_file_of_before_is_taken_as_it_is():
    assert seal.opened({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="has changed"):
        seal.opened({"a": 1, seal.CHECKSUM: None})
