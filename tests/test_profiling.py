"""A trace of the steps that were asked for, and of no others."""

import jax
import jax.numpy as jnp
import pytest

from moepp_jax import profiling
from moepp_jax.errors import ConfigError
from moepp_jax.profiling import Profile


@pytest.mark.parametrize("text", ["3", "3:", ":3", "3:3", "4:3", "-1:3", "1.5:3", "a:b", "1:2:3"])
def test_anything_but_two_rising_numbers_is_refused(text):
    with pytest.raises(ConfigError, match=f"--profile={text} must be START:STOP"):
        profiling.parse(text)


def test_the_steps_of_the_range_are_traced(tmp_path, monkeypatch):
    assert profiling.parse("2:4") == range(2, 4)
    calls, done = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace

    def started(folder, **options):
        calls.append(len(done))
        start(folder, **options)

    monkeypatch.setattr(jax.profiler, "start_trace", started)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (calls.append(len(done)), stop()))
    square = jax.jit(lambda x: x @ x)
    x = jnp.eye(64)
    with Profile(tmp_path, range(2, 4), left=6) as profile:
        for _ in range(6):
            profile.before_step()
            x = square(x)
            done.append(x)
            profile.after_step(x)
    assert calls == [2, 4]
    assert [file.suffix for file in (tmp_path / "profile").rglob("*.xplane.pb")] == [".pb"]


def test_a_run_that_ends_early_still_has_its_trace(tmp_path):
    with pytest.raises(KeyError), Profile(tmp_path, range(0, 5), left=5) as profile:
        profile.before_step()
        raise KeyError
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_without_steps_nothing_is_traced_and_too_late_ones_are_refused(tmp_path):
    with Profile(tmp_path, None, left=1) as profile:
        profile.before_step()
        profile.after_step(None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"--profile=3:9: only 8 steps of the run are left"):
        Profile(tmp_path, range(3, 9), left=8)
