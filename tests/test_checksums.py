"""Sums in parts: every change of every file is found, whoever reads which part."""

import hashlib
import itertools
import json

import pytest

from moepp_jax import checksums, storage

PART = 100
SIZES = (0, 1, PART - 1, PART, PART + 1, 3 * PART)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_PART", PART)
    monkeypatch.setattr(checksums, "_CHUNK", 30)
    (tmp_path / "params" / "d").mkdir(parents=True)
    for size in SIZES:
        (tmp_path / "params" / "d" / str(size)).write_bytes(bytes(i % 251 for i in range(size)))
    checksums.write(tmp_path, ["params"])
    return tmp_path


def verdicts(folder, shares=1):
    return [
        checksums.verdict(folder, ["params"], ["params"], checksums.Share(i, shares))
        for i in range(shares)
    ]


@pytest.mark.parametrize("shares", [1, 2, 5, 40])
def test_of_all_shares_one_finds_what_is_changed_cut_longer_or_gone(folder, shares):
    assert not any(map(any, verdicts(folder, shares)))
    for size in SIZES:
        file = folder / "params" / "d" / str(size)
        good = file.read_bytes()
        flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, size, 37)]
        for bad in [*flipped, good + b"x", good[:-1] * (size > 0) or b"y", good[:PART] + b"z"]:
            file.write_bytes(bad)
            damages = {v.damage for v in verdicts(folder, shares)} - {None}
            assert damages == {f"params/d/{size} is not as it was saved"} or bad == good
        file.unlink()
        damages = {v.damage for v in verdicts(folder, shares)} - {None}
        assert damages == {f"params/d/{size} is missing"}
        file.write_bytes(good)
    assert not any(map(any, verdicts(folder, shares)))


def test_each_part_of_a_file_is_read_by_one_share(folder, monkeypatch):
    read = []
    real = checksums._xxh3

    def noted(part, last, file):
        read.append((file.name, part))
        return real(part, last, file)

    monkeypatch.setattr(checksums, "_xxh3", noted)
    verdicts(folder, 4)
    assert sorted(read) == sorted((str(s), p) for s in SIZES for p in range(max(1, -(-s // PART))))


def test_sha_256_of_earlier_versions_is_compared(folder):
    file = folder / "checksums.json"
    files = [f for f in (folder / "params").rglob("*") if f.is_file()]
    sums = {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()) for f in files}
    file.write_text(json.dumps({name: of_file.hexdigest() for name, of_file in sums.items()}))
    assert not any(map(any, verdicts(folder, 3)))
    (folder / "params" / "d" / "1").write_bytes(b"x")
    assert "params/d/1 is not as it was saved" in [v.damage for v in verdicts(folder, 3)]


@pytest.mark.parametrize("wrong", [3, None, [], [3], {"a": 1}])
def test_sums_that_are_none_are_damage(folder, wrong):
    (folder / "checksums.json").write_text(json.dumps({"params/d/1": wrong}))
    [found] = verdicts(folder)
    assert found.damage.startswith("checksums.json is no JSON object of sums (params/d/1 has ")


def test_what_was_summed_up_before_is_collected_and_not_read_again(tmp_path, monkeypatch):
    for process, item in itertools.product("01", ("params", "rest")):
        own = tmp_path / item / f"of_{process}"
        own.mkdir(parents=True)
        (own / "a").write_text(process)
        checksums.write_own(tmp_path, f"{item}.{process}", own, f"{item}/of_{process}")
    (tmp_path / "rest" / "b").write_text("b")
    checksums.write_own(tmp_path, "gone", tmp_path / "nowhere", "rest/nowhere")
    read = []
    real = checksums._xxh3
    monkeypatch.setattr(checksums, "_xxh3", lambda *a: read.append(a[2].name) or real(*a))
    writers = [f"{item}.{process}" for item in ("params", "rest") for process in "01"]
    with pytest.raises(FileNotFoundError, match=r"checksums\.rest\.2\.json"):
        checksums.write(tmp_path, ["params", "rest"], [*writers, "rest.2"])
    assert not (tmp_path / "checksums.json").exists() and not read
    checksums.write(tmp_path, ["params", "rest"], [*writers, "gone"])
    assert read == ["b"]
    assert [entry.name for entry in storage.files_below(tmp_path) if "sums" in entry.name] == [
        "checksums.json"
    ]
    sums = json.loads((tmp_path / "checksums.json").read_text())
    assert list(sums) == ["params/of_0/a", "params/of_1/a", "rest/b", "rest/of_0/a", "rest/of_1/a"]
    assert not any(checksums.verdict(tmp_path, ["params", "rest"], ["params", "rest"]))
