"""The routing page as a file: what it holds, that the text cannot break it, what is refused."""

import base64
import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from moepp_jax.analysis import page
from moepp_jax.analysis.page.build import NO_LOSS, PART, shown, visible
from moepp_jax.analysis.record import Record, Rows
from moepp_jax.errors import ConfigError
from tests.analysis import made_up

BYTES = len(made_up.PIECES)  # id of byte 0


def read_data(text):
    """The head and the arrays that a page holds."""
    found = re.search(r'<script id="data"[^>]*>([A-Za-z0-9+/=]*)</script>', text)
    block = gzip.decompress(base64.b64decode(found[1]))
    size = int.from_bytes(block[:4], "little")
    head, start = json.loads(block[4 : 4 + size]), 4 + size
    return head, {
        name: np.frombuffer(block, f"<u{width}", count, start + at)
        for name, width, at, count in head["arrays"]
    }


def of_tokens(token, **changes):
    """A record of these tokens, one document of them."""
    made = made_up.record(len(token), length=len(token), **changes)
    return Record(made.meta, made.rows._replace(token=np.array(token, np.int32)))


def of_bytes(text, **changes):
    return of_tokens([BYTES + byte for byte in text], **changes)


def texts(record):
    return [token.text for token in shown(record)]


def test_it_holds_what_was_routed():
    made = made_up.record(500)
    head, arrays = read_data(page.build([made], tokens=400))
    rows, (about,) = made.rows, head["models"]
    assert head["tokens"] == 400 and about["total"] == 500
    np.testing.assert_array_equal(arrays["token"], rows.token[:400])
    choice = arrays["choice0"].reshape(4, 2, 400).swapaxes(1, 2)
    N = made.meta.num_experts
    np.testing.assert_array_equal(choice < N, rows.kept[:, :400])
    np.testing.assert_array_equal(choice % (N + 1), rows.experts[:, :400])
    low, high = about["gates"]
    gate = low + arrays["gate0"].reshape(4, 2, 400).swapaxes(1, 2) / 255 * (high - low)
    np.testing.assert_allclose(gate, rows.gates[:, :400], atol=(high - low) / 500)
    loss = np.where(arrays["loss0"] == NO_LOSS, np.nan, arrays["loss0"] / 1000)
    np.testing.assert_allclose(loss, rows.loss[:400], atol=0.00051)
    assert about["meanFfn"] == pytest.approx(made.ffn[:, :400].mean())
    assert about["meanLoss"] == pytest.approx(np.nanmean(rows.loss[:400]))
    texts = [head["strings"][n][0] for n in arrays["text"]]
    assert texts == [made.text_of(t).replace("\n", "↵") for t in rows.token[:400].tolist()]


def test_an_unused_choice_is_none_that_was_dropped():
    made = made_up.record(4, layers=(1,))
    experts = np.array([[[0, 12], [3, 1], [8, 9], [12, 12]]], np.uint8)
    kept = np.array([[[1, 0], [0, 1], [1, 1], [0, 0]]], bool)
    _, arrays = read_data(
        page.build([Record(made.meta, made.rows._replace(experts=experts, kept=kept))])
    )
    assert arrays["choice0"].tolist() == [0, 12 + 1 + 3, 8, 12, 12, 1, 9, 12]


def test_segments_are_runs_of_one_document():
    made = made_up.record(130, length=50)
    position = np.where(np.arange(130) < 20, made.rows.position, made.rows.position + 7)
    head, _ = read_data(page.build([Record(made.meta, made.rows._replace(position=position))]))
    source = made.rows.source
    cuts = sorted({0, 20, 50, 100, *(np.flatnonzero(np.diff(source)) + 1).tolist()})
    assert [start for start, *_ in head["segments"]] == cuts
    assert head["segments"][1] == [20, source[20], 0, 27]


def test_a_character_of_several_tokens_is_in_the_first_of_them():
    record = of_bytes("aé😀".encode())
    tokens = shown(record)
    assert texts(record) == ["a", "é", "·", "😀", "·", "·", "·"]
    parts = [token.style == PART for token in tokens]
    assert parts == [False, False, True, False, True, True, True]
    assert "".join(token.raw for token in tokens) == "aé😀"


def test_bytes_of_no_character_are_told_in_hex():
    assert texts(of_bytes(b"\xffa\xe2\x82")) == ["\\xFF", "a", "\\xE2", "\\x82"]
    # A special token, or the document's end, ends a character that is not whole.
    assert texts(of_tokens([BYTES + 0xC3, 2, BYTES + 0xA9])) == ["\\xC3", "</s>", "\\xA9"]


@pytest.mark.parametrize(
    "text, seen",
    [
        ("\n", "↵"),
        ("\t", "⇥"),
        ("\0\x1b\x7f", "␀␛␡"),
        ("\x85", "\\u0085"),
        ("a\u202eb", "a\\u202Eb"),  # would turn what follows around
        ("\u2028", "\\u2028"),
        ("\ufeff", "\\uFEFF"),
        ("\u200d", "\\u200D"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("\u0301", "◌\u0301"),
        ("שלום", "שלום"),
    ],
)
def test_what_cannot_be_seen_has_a_sign(text, seen):
    assert visible(text) == seen


def test_nothing_in_the_text_or_a_name_is_markup():
    evil = "</script><script>alert(1)</script><!--&\"'\u2028{{data}}"
    plain = page.build([made_up.record(20)])
    pieces = list(made_up.pieces())
    pieces[3] = evil.encode().decode("latin-1")
    changes = dict(
        name=evil,
        pieces=tuple(pieces),
        special={1: evil},
        sources={evil: "file"},
        rule={"type": evil, evil: evil},
    )
    made = page.build([of_tokens([3, 1, 3, 4], **changes)])
    for mark in ("<script", "</script", "<!--", "<style", "</style"):
        assert made.count(mark) == plain.count(mark), mark
    assert "\u2028" not in re.sub(r"<title>.*?</title>", "", made, flags=re.S)
    title = re.search(r"<title>(.*?)</title>", made, re.S)[1]
    assert title == (
        "Routing of &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;!--&amp;&quot;&#x27;"
        "\u2028{{data}}"
    )
    head, arrays = read_data(made)
    assert head["models"][0]["name"] == evil
    assert head["strings"][arrays["text"][0]][0] == evil.replace("\u2028", "\\u2028")


def test_nothing_is_fetched():
    made = page.build([made_up.record(20)])
    assert "default-src 'none'" in made
    assert not re.search(r"https?:|//cdn|@import|url\(", made)
    assert made.encode()  # no lone surrogates, whatever the names
    assert page.build([made_up.record(20, name="\ud800")]).encode()


def test_it_is_the_same_each_time():
    assert page.build([made_up.record(100)]) == page.build([made_up.record(100)])


def test_two_of_one_text():
    a, b = made_up.record(300, name="a"), made_up.record(300, name="b", counts=(6, 2, 1, 1))
    b = Record(b.meta, b.rows._replace(token=a.rows.token))
    head, arrays = read_data(page.build([a, b]))
    assert [about["name"] for about in head["models"]] == ["a", "b"]
    assert len(arrays["choice1"]) == len(arrays["choice0"])


def test_two_texts_are_refused():
    a, names = made_up.record(300, name="one"), "one and two are of different texts.*"
    with pytest.raises(ConfigError, match=names + "300 and 200 tokens"):
        page.build([a, made_up.record(200, name="two")])
    other = a.rows.token.copy()
    other[17] += 1
    with pytest.raises(ConfigError, match=names + "the first token that differs is at 17"):
        page.build([a, Record(made_up.meta(name="two"), a.rows._replace(token=other))])
    with pytest.raises(ConfigError, match=names + "the first document that differs is at 50"):
        document = made_up.record(300, length=50).rows.document
        rows = a.rows._replace(document=np.where(np.arange(300) < 50, 0, document + 1))
        page.build([a, Record(made_up.meta(name="two"), rows)])
    pieces = ["x" if n == 4 else piece for n, piece in enumerate(made_up.pieces())]
    with pytest.raises(ConfigError, match=names + "token 4 is ' of' in one and 'x' in two"):
        page.build([a, Record(made_up.meta(name="two", pieces=tuple(pieces)), a.rows)])


def test_what_is_not_shown_may_differ():
    a = made_up.record(300)
    other = a.rows.token.copy()
    other[250] += 1
    page.build([a, Record(a.meta, a.rows._replace(token=other))], tokens=250)


def test_no_tokens_or_records_or_too_many():
    made = made_up.record(10)
    for records in ([], [made, made, made]):
        with pytest.raises(ConfigError, match="one record or two beside each other"):
            page.build(records)
    for tokens in (0, -5):
        with pytest.raises(ConfigError, match="no tokens of tiny to show"):
            page.build([made], tokens=tokens)
    rows = made.rows
    none = Rows(*(a[:0] if a.ndim == 1 else a[:, :0] for a in rows))
    with pytest.raises(ConfigError, match="no tokens of tiny to show"):
        page.build([Record(made.meta, none)])


@pytest.mark.parametrize("layers, megabytes", [(4, 1.5), (24, 6.0)])
def test_it_is_small(layers, megabytes):
    made = page.build([made_up.record(50_000, layers=tuple(range(1, layers + 1)))])
    assert len(made.encode()) < megabytes * 1e6


def test_it_is_built_without_jax():
    program = (
        "import sys; sys.modules['jax'] = None\n"
        "from moepp_jax.analysis import page\n"
        "from tests.analysis import made_up\n"
        "print('</html>' in page.build([made_up.record(50)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
