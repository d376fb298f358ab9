"""Files and benchmark items as parts of the text; what is no text is refused by name."""

import json

import numpy as np
import pytest

from moepp_jax.data import prepare
from moepp_jax.errors import ConfigError
from moepp_jax.harness import tasks
from moepp_jax.observe import texts
from tests import tiny

ITEMS = {
    "sciq": (
        {"question": "Why?", "support": "A fact.", "correct_answer": "so"},
        "A fact.\nQuestion: Why?\nAnswer: so",
    ),
    "piqa": (
        {"goal": "Sit", "sol1": "here", "sol2": "there", "label": 1},
        "Question: Sit\nAnswer: there",
    ),
    "winogrande": (
        {"sentence": "A met B, as _ was late.", "option1": "A", "option2": "B", "answer": "2"},
        "A met B, as B was late.",
    ),
    "arc_easy": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "Question: Q?\nAnswer: y",
    ),
    "hellaswag": ({"ctx": "He", "endings": ["a", "b", "c", "d"], "label": "3"}, "He d"),
    "logiqa": (
        {"context": "C", "question": "Q?", "options": ["p", "q", "r", "s"], "label": "c"},
        "Passage: C\nQuestion: Q?\nA. p\nB. q\nC. r\nD. s\nAnswer: C",
    ),
    "boolq": (
        {"passage": "P", "question": "is it", "label": 1},
        "P\nQuestion: is it?\nAnswer: yes",
    ),
    "lambada_openai": ({"text": "Once more"}, "Once more"),
    "nq_open": ({"question": "who", "answer": ["me", "I"]}, "Q: who?\nA: me"),
    "mmlu": (
        {"question": "Q?", "choices": ["p", "q", "r", "s"], "answer": 1},
        "Q?\nA. p\nB. q\nC. r\nD. s\nAnswer: B",
    ),
}
ITEMS["arc_challenge"] = ITEMS["arc_easy"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    c = tiny.config(**{"data.dir": str(tmp_path_factory.mktemp("data"))})
    return prepare(c, lambda line: None).tokenizer


def task_of(name):
    return next(task for task in tasks.PAPER if task.name == name)


def write(folder, name, items, below=""):
    where = folder / name / below
    where.mkdir(parents=True)
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (where / f"{task_of(name).evaluated}.jsonl").write_text(lines)


def test_every_task_of_the_suite_has_its_text(tmp_path):
    assert set(texts.TEXTS) == {task.name for task in tasks.PAPER} == set(ITEMS)
    for name, (item, want) in ITEMS.items():
        write(tmp_path, name, [item, item])
        assert list(texts.texts_of(task_of(name), tmp_path)) == [want, want]


def test_subjects_take_turns(tmp_path):
    item = ITEMS["mmlu"][0]
    for subject in ("anatomy", "botany"):
        write(tmp_path, "mmlu", [item | {"question": f"{subject} {i}"} for i in (1, 2)], subject)
    asked = [text.splitlines()[0] for text in texts.texts_of(task_of("mmlu"), tmp_path)]
    assert asked == ["anatomy 1", "botany 1", "anatomy 2", "botany 2"]


def test_an_item_is_a_document(tmp_path, tokenizer):
    write(tmp_path, "piqa", [ITEMS["piqa"][0]] * 50)
    ids = tokenizer.encode(ITEMS["piqa"][1])
    whole = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    length = 2 * len(whole) + 3
    (part,) = texts.of_tasks([task_of("piqa")], tmp_path, tokenizer, length, 100)
    assert (part.name, part.kind) == ("piqa", "task")
    batch = part.rows.read(np.arange(len(part.rows)))
    for row in range(len(part.rows) - 1):  # two are whole, and of a third there is nothing
        assert batch["tokens"][row].tolist() == [*whole, *whole, *[tokenizer.pad_id] * 3]
        assert batch["segments"][row].tolist() == [1] * len(whole) + [2] * len(whole) + [0] * 3
    items = sum(int(row.max()) for row in batch["segments"])
    assert items * len(whole) <= 100 + length + len(whole)  # no more than it takes
    assert part.count(100) == max(1, 100 // length) and part.count(1) == 1


def test_rows_by_hand():
    """Rows of 4: a document of 2, one of 3 that does not fit beside it, one of 6 over rows."""
    rows = texts.WholeRows([[1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11], [12]], 4, pad_id=0)
    batch = rows.read(np.arange(6))
    assert batch["tokens"].tolist() == [
        [1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 8, 9], [10, 11, 12, 0], [0] * 4, [0] * 4
    ]  # fmt: skip
    assert batch["targets"].tolist() == [
        [2, 0, 0, 0], [4, 5, 0, 0], [7, 8, 9, 10], [11, 0, 0, 0], [0] * 4, [0] * 4
    ]  # fmt: skip
    assert batch["loss_mask"].tolist() == (batch["targets"] > 0).tolist()
    assert batch["segments"].tolist() == [
        [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 2, 0], [0] * 4, [0] * 4
    ]  # fmt: skip
    assert batch["positions"][3].tolist() == [0, 1, 0, 0]
    document, place = rows.standing(np.arange(6))
    assert document[3].tolist() == [2, 2, 3, 0] and place[3].tolist() == [4, 5, 0, 0]
    assert len(rows) == 4
    alike = tiny.packed([np.arange(1, 7), np.arange(7, 10)], 4, drop_last=False)
    document, place = alike.standing(np.arange(2))
    assert document.tolist() == [[0] * 4, [0, 0, 1, 1]]
    assert place.tolist() == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_a_damaged_item_is_named(tmp_path):
    write(tmp_path, "sciq", [ITEMS["sciq"][0], {"question": "x"}])
    with pytest.raises(ConfigError, match=r"validation.jsonl, line 2: this is no item of sciq"):
        list(texts.texts_of(task_of("sciq"), tmp_path))
    file = tmp_path / "sciq" / "validation.jsonl"
    file.write_text("{\n")
    with pytest.raises(ConfigError, match=r"validation.jsonl, line 1 is no JSON"):
        list(texts.texts_of(task_of("sciq"), tmp_path))


def test_a_file_is_one_document(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("In the beginning, é <script>\u202e", encoding="utf-8")
    part = texts.of_file(file, tokenizer, 64, 1000)
    batch = part.rows.read(np.arange(len(part.rows)))
    tokens = batch["tokens"][batch["segments"] > 0].tolist()
    assert tokens == [tokenizer.bos_id, *tokenizer.encode(file.read_text()), tokenizer.eos_id]
    assert (part.name, part.kind) == ("a.txt", "file")


def test_of_a_long_file_no_more_is_read_than_is_of_use(tmp_path, tokenizer):
    file = tmp_path / "long.txt"
    file.write_text("é" * 100_000, encoding="utf-8")
    part = texts.of_file(file, tokenizer, 8, 7)  # 112 bytes: of a character of two, no half
    assert len(part.rows) * 8 <= 7 * 16 + 2 + 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"ab\xff\xfe", "is not UTF-8 text: byte 2 is 0xff"),
        (b"ab\0cd", "there is a zero byte in it"),
        (b"x" * 100 + b"\xff" + b"x" * 9000, "is not UTF-8 text: byte 100 is 0xff"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_text(tmp_path, tokenizer, content, said):
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        texts.of_file(file, tokenizer, 8, 100)
    assert str(file) in str(error.value)


def test_a_folder_is_no_text(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        texts.of_file(tmp_path, tokenizer, 8, 100)


def test_pieces_are_the_bytes_of_the_text(tokenizer):
    text = "In the beginning — é\n\t\x01 <s>"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.piece(token)[1] for token in ids).decode() == text
    assert tokenizer.piece(tokenizer.bos_id) == ("<s>", None)
    assert tokenizer.piece(tokenizer.eos_id)[1] is None
