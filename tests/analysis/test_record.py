"""The file of what was routed: what goes in comes out, and what is no such file is refused."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moepp_jax.analysis import draw, record
from moepp_jax.errors import ConfigError
from tests.analysis import made_up


def parts_of(rows, size):
    for start in range(0, len(rows.token), size):
        cut = slice(start, start + size)
        yield record.Rows(*(a[cut] if a.ndim == 1 else a[:, cut] for a in rows))


def test_what_is_written_is_read(tmp_path):
    made, file = made_up.record(500), tmp_path / "routing.parquet"
    with record.Writer(file, made.meta) as writer:
        for part in parts_of(made.rows, 200):
            writer.write(part)
        writer.add(switched_off={"zero": 5.0})
    there = record.read(file)
    assert there.meta.more == {"switched_off": {"zero": 5.0}}
    assert there.meta == record.dataclasses.replace(made.meta, more=there.meta.more)
    for name, ours, theirs in zip(made.rows._fields, made.rows, there.rows, strict=True):
        exact = name not in ("gates", "scores", "entropy")
        np.testing.assert_allclose(theirs, ours, rtol=0 if exact else 2.0**-11, err_msg=name)


def test_pandas_and_others_read_it(tmp_path):
    made, file = made_up.record(100), tmp_path / "routing.parquet"
    record.write(file, made.meta, [made.rows])
    table = pq.read_table(file)
    assert table.column("source").to_pylist()[0] == "wikipedia"
    assert table.column("experts_3").to_pylist()[5] == made.rows.experts[2, 5].tolist()
    assert table.column("loss").null_count == np.isnan(made.rows.loss).sum()


def test_kinds_and_loads():
    """By hand: K = 2; experts 0-7 FFN, 8 and 9 constant, 10 copy, 11 zero, 12 unused."""
    experts = np.array([[[0, 8], [10, 11], [7, 3], [9, 12]]], np.uint8)
    kept = np.array([[[1, 1], [1, 1], [1, 0], [1, 0]]], bool)
    rows = made_up.record(4, layers=(2,)).rows._replace(experts=experts, kept=kept)
    made = record.Record(made_up.meta(layers=(2,)), rows)
    assert made.kind.tolist() == [[[0, 1], [2, 3], [0, 4], [1, 4]]]
    assert made.ffn.tolist() == [[1, 0, 1, 0]]
    assert made.of_kind("constant").tolist() == [[1, 0, 0, 1]]
    load = np.zeros(12)
    load[[0, 7, 8, 9, 10, 11]] = 0.25
    assert made.load().tolist() == [load.tolist()]
    assert made.load(slice(0, 1))[0, 8] == 1.0


def test_what_is_not_finished_leaves_nothing(tmp_path):
    made, file = made_up.record(50), tmp_path / "routing.parquet"
    file.write_bytes(b"an earlier one")
    with pytest.raises(KeyboardInterrupt), record.Writer(file, made.meta) as writer:
        writer.write(made.rows)
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ["routing.parquet"]
    assert file.read_bytes() == b"an earlier one"


def test_what_is_no_record_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.parquet"
    with pytest.raises(ConfigError, match=r"there is no .*x\.parquet: `main analyze`"):
        record.read(file)
    file.write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read"):
        record.read(file)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(ConfigError, match="it has no routing in it"):
        record.read(file)
    made = made_up.record(50)
    with monkeypatch.context() as patch:
        patch.setattr(record, "VERSION", 99)
        record.write(file, made.meta, [made.rows])
    with pytest.raises(ConfigError, match="it is of version 99, and this program reads 1"):
        record.read(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pieces": ("a",)}, "tokens beyond the 1 that"),
        ({"counts": (1, 0, 0, 0)}, "experts beyond the 1 that"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, said):
    made, file = made_up.record(50), tmp_path / "x.parquet"
    record.write(file, record.dataclasses.replace(made.meta, **changes), [made.rows])
    with pytest.raises(ConfigError, match=said):
        record.read(file)


def test_records_of_different_texts_are_not_drawn(tmp_path):
    for name, seed in ((draw.RECORD, 0), (draw.AGAINST, 1)):
        made = made_up.record(50, seed=seed)
        record.write(tmp_path / name, made.meta, [made.rows])
    with pytest.raises(ConfigError, match=r"against\.parquet are of different texts"):
        draw.draw(tmp_path)
    assert not (tmp_path / "REPORT.md").exists()


def test_it_is_read_without_jax(tmp_path):
    made, file = made_up.record(50), tmp_path / "routing.parquet"
    record.write(file, made.meta, [made.rows])
    program = (
        "import sys; sys.modules['jax'] = None\n"
        "from moepp_jax.analysis import record\n"
        f"print(record.read({str(file)!r}).num_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "50\n", done.stderr
