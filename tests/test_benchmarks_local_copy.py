"""The benchmark of local copies in small: that it measures what it says."""

import sys

from moepp_jax.benchmarks import local_copy


def test_each_round_is_timed_and_the_rates_are_told(tmp_path, monkeypatch, capsys):
    gb, taken = local_copy.measure(tmp_path, 1, 3)
    assert 5e-4 < gb < 3e-3 and len(taken) == 3
    assert all(one.writes > 0 and one.restores > 0 for one in taken)
    monkeypatch.setattr(sys, "argv", ["local_copy", "--megabytes=1", "--rounds=2"])
    local_copy.main()
    said = capsys.readouterr().out
    assert all(f"{name:8} " in said and " a GB (" in said for name in local_copy.Taken._fields)
