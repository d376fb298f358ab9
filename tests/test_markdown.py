import pytest

from moepp_jax import markdown


def test_a_table():
    rows = (cells for cells in [["MoE++", "1.2"], ["", "a|b"]])
    assert markdown.table(["", "x"], rows) == [
        "|  | x |",
        "|---|---|",
        "| MoE++ | 1.2 |",
        r"|  | a\|b |",
    ]


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"3 cells under 2 columns: \['a', 'b', 'c'\]"):
        markdown.table(["", "x"], [["1", "2"], ["a", "b", "c"]])
