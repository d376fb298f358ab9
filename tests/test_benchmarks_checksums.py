"""The benchmark of checksums in small: that it measures and computes what it says."""

import json
import sys

import pytest

from moepp_jax.benchmarks import checksums
from moepp_jax.config import Config
from moepp_jax.configs import moepp_7b


def test_the_numbers_are_of_the_7b_model_and_of_files_that_were_read(tmp_path, monkeypatch, capsys):
    file = tmp_path / "numbers.json"
    flags = ["--megabytes=0.1", "--rounds=2", "--hosts=4", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["checksums", *flags])
    checksums.main()
    told = json.loads(file.read_text())
    assert told["seconds_per_gb"].keys() == {"sha256", "xxh3"}
    assert all(seconds["median"] > 0 for seconds in told["seconds_per_gb"].values())
    assert told["checkpoint_gb"] == pytest.approx(92, abs=2)
    assert "before" in capsys.readouterr().out and told["hosts"] == 4


def test_a_bucket_or_a_sum_is_what_is_waited_for_and_hosts_share_it():
    gb = checksums.checkpoint_gb(Config.parse(moepp_7b.get_config()))
    rates = checksums.Rates(sha256=1.25, xxh3=0.1, bucket=1.0, to_host=0.1)
    before, after = checksums.before(gb, 16, rates), checksums.after(gb, 16, rates)
    assert before.save_sums == 1.25 * gb and before.restore_verifies == 2.5 * gb
    assert after.save_sums == after.restore_verifies == after.restore_reads == gb / 16
    assert before.save_blocks == after.save_blocks == pytest.approx(gb / 160)
    slow = checksums.after(gb, 16, rates._replace(xxh3=2.0))
    assert slow.save_sums == 2 * gb / 16
