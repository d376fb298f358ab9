"""The report: its files, the same every time, from whatever record there may be."""

import csv
import dataclasses
import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from moepp_jax.analysis import drawing, question, record, report, words
from moepp_jax.errors import ConfigError
from tests.analysis import made_up

MORE = {
    "saturation": {"steps": [100, 700], "overlap": [[0.5] * 4, [1] * 4], "tokens": 1000},
    "switched_off": {
        "tokens": 1000,
        "none": {"loss": 4.5, "ffn_experts": 1.2},
        "zero": {"loss": 4.6, "ffn_experts": 1.4},
    },
}


@pytest.fixture(scope="module")
def made():
    return made_up.record(2000, more=MORE)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    assert report.write(folder, [made], "main analyze x") == folder / "REPORT.md"
    return folder


@pytest.fixture
def only_svg(monkeypatch):
    """Drawing is slow, and one format enough where figures must only be possible."""
    monkeypatch.setattr(drawing, "FORMATS", ("svg",))


def page(folder):
    return (folder / "REPORT.md").read_text()


def tables(text):
    """Lines of each Markdown table, as lists of cells."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        for block in blocks
    ]


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def answered(text):
    return text.count("## ") - text.count("*Not answered.*")


def test_every_question_has_its_files(folder, made):
    there, text = files(folder), page(folder)
    expected = {"REPORT.md"}
    for one in question.every():
        assert f"## {one.title}\n\n{one.how}\n" in text
        if one.missing([made]):
            assert f"*Not answered.* {one.missing([made])}" in text
            continue
        expected |= {f"{one.name}.{kind}" for kind in ("png", "svg")}
        expected |= {f"{name}.csv" for name in one.tables([made])}
        assert set(one.tables([made])) == set(one.table_names)
        assert f"![{one.title}]({one.name}.png)" in text
    assert set(there) == expected
    assert text.count("*Not answered.*") == 1  # one record: no differences
    assert not re.search(r"\bnan\b|\binf\b", text)
    for name, content in there.items():
        assert content, name
        if name.endswith(".svg"):
            ElementTree.fromstring(content)


def test_head(folder):
    text = page(folder)
    assert text.startswith("# Routing of tiny\n\n    main analyze x\n")
    runs, sources = tables(text)[:2]
    assert runs[2][:5] == [
        "tiny",
        "700",
        "type moepp, top_k 2, tau 0.75, residual logits",
        "8 FFN, 2 constant, 1 copy, 1 zero",
        "1 to 4",
    ]
    assert runs[2][-1] == "CPU, 2 cores"
    assert sources[0][:4] == ["source", "is a", "tokens", "documents"]
    assert sources[3][:4] == ["king_james", "source", "667", "11"]


def test_same_records_same_bytes(folder, made, tmp_path):
    again = dataclasses.replace(made)  # nothing that was computed is kept
    report.write(tmp_path, [again], "main analyze x")
    assert files(tmp_path) == files(folder)


def test_tables_can_be_read(folder):
    for file in folder.glob("*.csv"):
        head, *rows = csv.reader(io.StringIO(file.read_text()))
        assert rows and all(len(row) == len(head) for row in rows), file.name
    for table in tables(page(folder)):
        assert len({len(row) for row in table}) == 1, table[0]


def test_two_records_are_beside_each_other(made, tmp_path, only_svg):
    other = made_up.record(2000, seed=1, name="other", rule={"residual": "none"})
    other = dataclasses.replace(other, rows=other.rows._replace(token=made.rows.token))
    report.write(tmp_path, [made, other], "main analyze x")
    text = page(tmp_path)
    assert text.startswith("# Routing of tiny and other\n")
    assert "*Not answered.*" not in text
    for name in ("ffn_by_token", "load", "findings", "scores", "health"):
        head = next(csv.reader(io.StringIO((tmp_path / f"{name}.csv").read_text())))
        ours, theirs = ([c for c in head if c.endswith(f", {n}")] for n in ("tiny", "other"))
        assert ours and [c.replace(", tiny", "") for c in ours] == [
            c.replace(", other", "") for c in theirs
        ]
        svg = (tmp_path / f"{name}.svg").read_text()
        assert "tiny" in svg and "other" in svg, name


def test_models_that_differ_in_everything_can_be_beside_each_other(made, tmp_path, only_svg):
    other = made_up.record(
        900, name="other", counts=(6, 0, 0, 0), layers=(2, 4), sources={"notes": "file"}
    )
    report.write(tmp_path, [made, other], "main analyze x")
    assert "The two records are not of the same tokens." in page(tmp_path)


NASTY = [
    "| a | b",
    "<script>alert(1)</script>",
    "\n\n# x",
    "`x`",
    "\x00\x07",
    "*_~[l](u)$x$ ",
    "\\|",
]


def test_text_breaks_nothing(tmp_path, only_svg):
    pieces = list(made_up.pieces())
    pieces[3 : 3 + len(NASTY)] = NASTY
    pieces[3 + len(NASTY)] = "\xc3"  # half a character
    one = made_up.record(
        1200,
        pieces=tuple(pieces),
        name="a|b <b>\n$x$",
        sources={"x|y\n<i>": "file", "_z_": "file"},
        machine="<script>",
    )
    report.write(tmp_path, [one], "main analyze\n# x")
    text = page(tmp_path)
    assert "<script" not in text and "<b>" not in text and "<i>" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "\n# x" not in text and "\n    main analyze⏎# x\n" in text
    asked = {one.title for one in question.every()}
    assert set(re.findall(r"^## (.*)$", text, re.MULTILINE)) == asked
    for table in tables(text):
        assert len({len(row) for row in table}) == 1, table[0]
    shown = (tmp_path / "ffn_by_token.csv").read_text()
    names = [row[1] for row in csv.reader(io.StringIO(shown))]
    assert {"|␣a␣|␣b", "\\x00\\x07", "⏎⏎#␣x", "\\xc3"} <= set(names)
    assert len(shown.splitlines()) == len(names)
    for file in tmp_path.glob("*.svg"):
        ElementTree.fromstring(file.read_bytes())


def test_the_least_that_a_record_can_be(tmp_path, only_svg):
    """One source, one layer, one expert of a token, and no zero-computation experts."""
    one = made_up.record(
        300, layers=(3,), most=1, counts=(8, 0, 0, 0), wanted=1.0, sources={"notes": "file"}
    )
    both = np.repeat(one.rows.scores, 2, axis=-1)[..., :2]
    one = dataclasses.replace(one, rows=one.rows._replace(scores=both))
    report.write(tmp_path, [one], "main analyze x")
    text = page(tmp_path)
    for why in (
        "Every token has one expert.",
        "The pool has no zero-computation experts.",
        "It needs two sources.",
        "The model was not run with experts masked.",
        "Earlier checkpoints of the run were not asked.",
    ):
        assert f"*Not answered.* {why}" in text
    assert answered(text) == 15 - 6
    assert not (tmp_path / "coactivation.csv").exists()


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_few_tokens(tokens, tmp_path, only_svg):
    report.write(tmp_path, [made_up.record(tokens)], "main analyze x")
    assert answered(page(tmp_path)) > 5


def test_no_tokens_are_refused(tmp_path):
    one = made_up.record(1)
    cut = (a[:0] if a.ndim == 1 else a[:, :0] for a in one.rows)
    empty = dataclasses.replace(one, rows=record.Rows(*cut))
    with pytest.raises(ConfigError, match="the record of tiny holds no token"):
        report.write(tmp_path, [empty], "main analyze x")


def test_earlier_files_go_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FORMATS", ("svg",))
    monkeypatch.setattr(question, "every", lambda: [_Asked("")])
    report.write(tmp_path, [made_up.record(50)], "x")
    (tmp_path / "notes.csv").write_text("mine")
    (tmp_path / "asked_more.csv").write_text("mine")
    assert {"asked.csv", "asked.svg"} <= set(files(tmp_path))
    monkeypatch.setattr(question, "every", lambda: [_Asked("Not today.")])
    report.write(tmp_path, [made_up.record(50)], "x")
    assert set(files(tmp_path)) == {"REPORT.md", "notes.csv", "asked_more.csv"}


class _Asked(question.Question):
    name, title, how = "asked", "Is it?", "By asking."

    def __init__(self, why):
        super().__init__()
        self.why = why

    def missing(self, records):
        return self.why

    def tables(self, records):
        return {"asked": question.Table(["a", "b"], [[1, "x"]])}

    def figure(self, records):
        figure = drawing.new()
        figure.subplots()
        return figure


def test_without_the_tagger_the_rest_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FORMATS", ())
    monkeypatch.setattr(words, "can_tag", lambda: False)
    report.write(tmp_path, [made_up.record(300)], "x")
    text = page(tmp_path)
    assert "tagger is not installed: `pip install textblob`" in text
    assert (tmp_path / "ffn_by_token.csv").exists()
    assert not (tmp_path / "part_of_speech.csv").exists()


def test_it_is_written_without_jax(tmp_path):
    file = tmp_path / "routing.parquet"
    one = made_up.record(100)
    record.write(file, one.meta, [one.rows])
    program = (
        "import sys; sys.modules['jax'] = None\n"
        "from pathlib import Path\n"
        "from moepp_jax.analysis import drawing, record, report\n"
        "drawing.FORMATS = ()\n"
        f"print(report.write(Path({str(tmp_path)!r}), [record.read({str(file)!r})], 'x').name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "REPORT.md\n", done.stderr


def test_numbers_as_they_are_shown():
    rows = [[1234567, 0.123456, 0.0123456, 0.000123, float("nan"), None, np.float32(2), np.int8(3)]]
    table = question.Table(list("abcdefgh"), rows)
    assert (
        report.as_markdown(table)[-1]
        == "| 1,234,567 | 0.123 | 0.0123 | 0.00012 |  |  | 2.000 | 3 |"
    )
    assert report.as_csv(table) == "a,b,c,d,e,f,g,h\n1234567,0.123456,0.0123456,0.000123,,,2,3\n"


def test_nothing_in_a_text_or_a_name_is_markup_of_a_figure(tmp_path):
    """Tokens, sources and runs whose names would end an SVG, or begin a formula."""
    evil = "</svg><script>alert(1)</script>", '" onload="alert(1)', "$\\frac{", "]]>&lt;<!--"
    pieces = list(made_up.pieces())
    for token, text in enumerate(evil, 3):
        pieces[token] = text.encode().decode("latin-1")
    changes = dict(
        name=evil[0],
        pieces=tuple(pieces),
        special={1: evil[0]},
        sources=dict.fromkeys(evil, "file"),
    )
    records = [made_up.record(3000, **changes), made_up.record(3000, seed=1, **changes)]
    report.write(tmp_path, records, "command")
    figures = sorted(tmp_path.glob("*.svg"))
    assert len(figures) > 5
    for file in figures:
        for element in ElementTree.fromstring(file.read_bytes()).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "foreignObject"), file.name
            assert not any(name.startswith("on") for name in element.attrib), file.name
    assert "<script" not in (tmp_path / "REPORT.md").read_text()
