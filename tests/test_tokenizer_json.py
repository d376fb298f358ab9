"""tokenizer.json: the tokens of `transformers`, text that comes back as it comes, bad files."""

import functools
import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.generation import Reader
from tests import tokenizer_files as files

BYTE_LEVEL = ("olmoe", "qwen3_moe", "llama3")
BROKEN = "\N{REPLACEMENT CHARACTER}"


@functools.cache
def library(family: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(files.trained(family))


@pytest.fixture(scope="module", params=files.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family, tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(files.save(tmp_path_factory.mktemp(family), family))


# Tokens


def test_tokens_are_the_librarys_with_and_without_bos(family, tokenizer):
    texts = files.texts(500)
    batch = tokenizer.encode_batch(texts)
    assert batch == tokenizer.encode_batch(texts, threads=1)
    assert [tokenizer.beginning + ids for ids in batch] == [
        library(family).encode(text).ids for text in texts
    ]
    assert (tokenizer.bos_id is None) == (family in ("olmoe", "qwen3_moe"))
    assert tokenizer.document(batch[0]) == [*tokenizer.beginning, *batch[0], tokenizer.eos_id]
    assert tokenizer.prompt("") == [tokenizer.prefix_id]
    assert tokenizer.prefix_id == (tokenizer.beginning or [tokenizer.eos_id])[0]


@pytest.mark.torch
@pytest.mark.parametrize("named", [None, "own", "PreTrainedTokenizerFast"])
def test_tokens_and_text_are_those_of_transformers(tmp_path, family, named):
    from transformers import AutoTokenizer

    files.save(tmp_path, family)
    kinds = {"olmoe": "GPTNeoXTokenizer", "qwen3_moe": "Qwen2Tokenizer"}
    if family not in kinds and named != "PreTrainedTokenizerFast":
        pytest.skip("published with the general class")
    settings = {"eos_token": files.end(family)}
    settings |= {"tokenizer_class": kinds[family] if named == "own" else named} if named else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model_type = family if family in kinds else "llama"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = files.texts(10_000)
    wanted, batch = theirs(texts)["input_ids"], ours.encode_batch(texts)
    for text, ids, want in zip(texts, batch, wanted, strict=True):
        assert ours.beginning + ids == want, text
        assert ours.decode(want) == theirs.decode(want, skip_special_tokens=True), text
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_a_text_comes_back(family, tokenizer):
    for text in files.texts(300):
        for special in files.SPECIAL[family]:
            text = text.replace(special, "")
        ids = tokenizer.encode(text)
        if family != "mixtral":  # whose file knows no way to write a letter for a space
            normal = library(family).normalizer.normalize_str(text)
            assert tokenizer.decode(tokenizer.document(ids)) == normal
        joined = b"".join(tokenizer.piece(i)[1] for i in ids).decode(errors="replace")
        assert joined.removeprefix(" " * (family == "mixtral")) == tokenizer.decode(ids)


def test_special_tokens_have_no_text_and_added_ones_have(family, tokenizer):
    for special in files.SPECIAL[family]:
        (token,) = tokenizer.encode(special)
        assert tokenizer.piece(token) == (special, None) and tokenizer.decode([token]) == ""
    if family == "qwen3_moe":
        (token,) = tokenizer.encode("<think>")
        assert tokenizer.piece(token) == ("<think>", b"<think>")
        assert tokenizer.decode([token]) == "<think>"


def test_what_a_training_left_in_the_file_does_nothing(tmp_path):
    """Truncation, padding, and merges that are left out at random."""
    plain = Tokenizer.load(files.save(tmp_path / "plain", "olmoe"))
    fields = json.loads(files.trained("olmoe"))
    left = {"strategy": "LongestFirst", "direction": "Right", "max_length": 4, "stride": 0}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "!", "pad_to_multiple_of": None}
    pad |= {"strategy": {"Fixed": 64}, "direction": "Left"}
    model = fields["model"] | {"dropout": 0.5}
    file = files.save(tmp_path / "left", "olmoe", truncation=left, padding=pad, model=model)
    text = "In the beginning God created the heaven and the earth"
    assert Tokenizer.load(file).encode(text) == plain.encode(text)


# As a stream


@pytest.mark.parametrize("name", files.FAMILIES)
def test_pieces_of_a_stream_are_whole_characters(name, tmp_path):
    tokenizer = Tokenizer.load(files.save(tmp_path, name))
    for text in files.texts(300, seed=1):
        text = text.replace(BROKEN, "")
        ids = tokenizer.encode(text)
        reader, pieces = Reader(tokenizer), []
        for token in ids:
            reader(token)
            pieces.append(reader.take())
        assert not any(BROKEN in piece for piece in pieces), text
        assert reader.finished() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_a_character_over_tokens_waits_for_its_last(name, tmp_path):
    tokenizer = Tokenizer.load(files.save(tmp_path, name))
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    reader = Reader(tokenizer, tokenizer.prompt("日本"))
    assert [(reader(token), reader.take())[1] for token in ids] == ["", "", "", "😀"]
    broken = Reader(tokenizer)
    for token in ids[:2]:
        broken(token)
    assert broken.take() == "" and broken.finished() == BROKEN


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 481), max_size=20))
def test_any_byte_level_tokens_read_as_they_do_together(ids):
    tokenizer = _llama3()
    reader = Reader(tokenizer)
    pieces = [(reader(token), reader.take())[1] for token in ids]
    reader.close()
    assert "".join([*pieces, reader.take()]) == tokenizer.decode(ids)


@functools.cache
def _llama3() -> Tokenizer:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(files.save(Path(folder), "llama3"))


# Files


def test_saved_and_sent_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "new")
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint and other.files == tokenizer.files
        assert other.document(other.encode("so")) == tokenizer.document(tokenizer.encode("so"))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>"}),
        ("config.json", {"eos_token_id": 482, "bos_token_id": 480}),
        ("generation_config.json", {"eos_token_id": [482, 480]}),
    ],
)
def test_what_ends_a_document_is_said_beside_the_file(tmp_path, name, fields):
    file = files.save(tmp_path / "a", "qwen3_moe")
    ended = Tokenizer.load(file)
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    (tmp_path / "a" / name).write_text(json.dumps(fields))
    tokenizer = Tokenizer.load(file)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (482, None)
    assert tokenizer.fingerprint != ended.fingerprint  # other documents
    tokenizer.save(tmp_path / "b" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "b").fingerprint == tokenizer.fingerprint
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written["eos_token"] == fields.get("eos_token", "<|im_end|>")


def test_what_the_file_itself_puts_behind_a_text_ends_a_document(tmp_path):
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = tokenizers.Tokenizer.from_str(files.trained("mixtral"))
    made.post_processor = template
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.beginning, tokenizer.eos_id) == ([1], 2)


def test_tokens_that_only_the_settings_know(tmp_path):
    file = files.save(tmp_path, "qwen3_moe")
    token = {"content": "<|tool|>", "special": True, "normalized": False}
    said = {"eos_token": files.END, "added_tokens_decoder": {"484": token}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.load(file)
    assert tokenizer.encode("<|tool|>") == [484] and tokenizer.vocab_size == 485
    said["added_tokens_decoder"] = {"490": token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"added_tokens_decoder .*'<\|tool\|>' cannot be token"):
        Tokenizer.load(file)


def test_rows_that_are_no_piece(tokenizer):
    surplus = tokenizer.surplus(512)
    assert surplus.shape == (512,) and not surplus[: tokenizer.vocab_size].any()
    assert surplus[tokenizer.vocab_size :].all()
    assert tokenizer.decode([0, 500, 511]) == tokenizer.decode([0])
    tokenizer.require_fits(512, "x")
    with pytest.raises(ConfigError, match=r"x has 48\d pieces, more than .* = 400"):
        tokenizer.require_fits(400, "x")


def test_holes_in_the_vocabulary_are_no_pieces(tmp_path):
    model = json.loads(files.trained("olmoe"))["model"]
    vocab = {piece: i + 10 * (i > 300) for piece, i in model["vocab"].items()}
    file = files.save(tmp_path, "olmoe", model=model | {"vocab": vocab}, added_tokens=[])
    settings = {"eos_token": max(vocab, key=vocab.get)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    surplus = Tokenizer.load(file).surplus(500)
    np.testing.assert_array_equal(np.flatnonzero(surplus), [*range(301, 311), *range(490, 500)])


# Bad ones


def _merge_of_nothing(fields):
    fields["model"]["merges"].append(["q", "nothing"])


def _begins_with_nothing(fields):
    begin = {"type": "TemplateProcessing", "special_tokens": {}}
    begin["single"] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    fields["post_processor"] = begin | {"pair": begin["single"]}


def _other_id(fields):
    fields["added_tokens"][0]["id"] = 600


DAMAGES = {
    "cut": (lambda raw: raw[: len(raw) // 2], "cannot be read by the tokenizers library: .*EOF"),
    "empty": (lambda raw: b"", "cannot be read by the tokenizers library"),
    "no text": (lambda raw: b"\xff\xfe" + raw, "cannot be read by the tokenizers library"),
    "no model": (lambda raw: b'{"version": "1.0", "model": {"type": "BPE"}}', "Missing vocab"),
    "kind": (lambda raw: raw.replace(b'"type":"BPE"', b'"type":"Tok"'), "tokenizers library: data"),
    "merge": (_merge_of_nothing, "tokenizers library: Token `nothing` out of vocabulary"),
    "bos": (_begins_with_nothing, "the tokenizers library cannot encode a text"),
    "id": (_other_id, "added token .* has the id 600, which does not follow on the others"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_clear_error(tmp_path, damage):
    change, why = DAMAGES[damage]
    file = files.save(tmp_path, "qwen3_moe")
    if damage in ("merge", "id", "bos"):
        fields = json.loads(file.read_text())
        change(fields)
        file.write_text(json.dumps(fields))
    else:
        file.write_bytes(change(files.trained("qwen3_moe").encode()))
    with pytest.raises(ConfigError, match=rf"the tokenizer {file} .*{why}"):
        Tokenizer.load(file)


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        (
            {},
            "no token is known to end a document: put a tokenizer_config.json with its eos_token "
            'beside it, as {"eos_token": "</s>"}',
        ),
        (
            {"tokenizer_config.json": {"eos_token": "<end>"}},
            "no such token as .*eos_token = '<end>'",
        ),
        (
            {"config.json": {"eos_token_id": 500}},
            "no such token as config.json: eos_token_id = 500",
        ),
        ({"config.json": {"eos_token_id": "x"}}, "eos_token_id = 'x' must be a token id or a list"),
        ({"generation_config.json": {"eos_token_id": [1, -2]}}, r"= \[1, -2\] must be a token id"),
        ({"tokenizer_config.json": [1]}, "tokenizer_config.json beside .* holds a list"),
        ({"config.json": "{"}, "config.json beside .* cannot be read as JSON"),
    ],
)
def test_a_file_without_an_end_is_one_clear_error(tmp_path, beside, why):
    file = files.save(tmp_path, "qwen3_moe")
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in beside.items():
        content = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=why):
        Tokenizer.load(file)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.model cannot be read: No such file"):
        Tokenizer.load(tmp_path)
