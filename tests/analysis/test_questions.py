"""Every question's numbers, against some worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from moepp_jax.analysis import drawing, means, question, sums
from moepp_jax.analysis.questions import (
    coactivation,
    destinations,
    differences,
    domain_specialisation,
    ffn_by_token,
    findings,
    frequency,
    health,
    load,
    part_of_speech,
    position,
    saturation,
    scores,
    switched_off,
    vocabulary_specialisation,
)
from moepp_jax.analysis.record import Record
from tests.analysis import made_up

THE, OF, A = 3, 4, 5  # ids of made_up.WORDS


def tiny(experts, **changes):
    """A record of these experts [J T K], of one document; K = 2 and the pool (8, 2, 1, 1).

    Args:
      changes: columns of `Rows`, and values of `Meta`.
    """
    experts = np.array(experts, np.uint8)
    J, T, K = experts.shape
    columns = made_up.Rows._fields
    meta = {name: changes.pop(name) for name in list(changes) if name not in columns}
    meta = made_up.meta(**({"layers": tuple(range(1, J + 1)), "most": K} | meta))
    flat = dict(
        token=np.full(T, THE), source=np.zeros(T), document=np.zeros(T), position=np.arange(T)
    )
    flat |= dict(place=np.arange(T), loss=np.ones(T))
    whole = dict(gates=np.ones((J, T, K)), kept=np.ones((J, T, K), bool), entropy=np.ones((J, T)))
    whole |= dict(scores=np.ones((J, T, 2)) / 2)
    given = {name: np.array(value) for name, value in changes.items()}
    rows = made_up.Rows(experts=experts, **{**flat, **whole, **given})
    integers = ("token", "source", "document", "position", "place")
    rows = rows._replace(**{n: getattr(rows, n).astype(np.int32) for n in integers})
    return Record(meta, rows._replace(kept=rows.kept.astype(bool)))


def rows_of(of, records, name=None):
    table = of.tables(records)[name or of.name]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


FFN, CONST, COPY, ZERO = 0, 8, 10, 11


def test_means_of_groups_and_their_errors():
    """Documents are the samples: (1 + 2) and 3 of a mean of 2 are 1 off, each."""
    group, values = np.array([0, 0, 0, 2, 2, -1]), np.array([1.0, 2, 3, 5, 5, 99])
    each = means.by_group(group, values, np.array([0, 0, 1, 1, 1, 1]), 3)
    np.testing.assert_allclose(each.mean, [2, math.nan, 5])
    np.testing.assert_allclose(each.error, [math.sqrt(2 * 2) / 3, math.nan, math.nan])
    assert each.count.tolist() == [3, 0, 2]


def test_samples_are_documents_or_stretches_of_long_ones():
    made = tiny(
        [[[0, 1]] * 6],
        document=[0, 0, 1, 1, 2, 2],
        source=[0, 0, 0, 0, 1, 1],
        position=[0, 1, 1023, 1024, 0, 1],
    )
    assert means.stretches(made).tolist() == [0, 0, 1, 2, 3, 3]
    block, source = means.blocks(made)
    assert block.tolist() == [0, 0, 1, 2, 3, 3]
    assert source.tolist() == [0, 0, 0, 1]
    weights = means.draws(source, 50)
    assert (weights[:, :3].sum(axis=1) == 3).all() and (weights[:, 3] == 1).all()
    assert weights[:, 0].std() > 0


def test_many_samples_are_taken_together_within_their_source(monkeypatch):
    monkeypatch.setattr(means, "_BLOCKS", 4)
    made = tiny([[[0, 1]] * 10], document=np.arange(10), source=[0] * 5 + [1] * 5)
    block, source = means.blocks(made)
    assert block.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 4]
    assert source.tolist() == [0, 0, 1, 1, 1]


def test_how_often_an_id_must_occur():
    assert means.enough(np.full(50, 100)) == 20
    assert means.enough(np.arange(60)) == 20
    assert means.enough(np.append(np.full(39, 100), [7, 3, 1])) == 7
    assert means.enough(np.array([100, 1])) == 2


def test_ffn_by_token():
    """the: 2, 1 of 2 layers' 1 and 1, then 2, 2; of: 0, 0; a occurs once."""
    experts = [
        [[0, 1], [2, 3], [8, 9], [10, 11], [0, 1]],
        [[0, 8], [2, 3], [8, 9], [10, 11], [0, 1]],
    ]
    made = tiny(experts, token=[THE, THE, OF, OF, A], document=[0, 1, 1, 2, 2])
    found = rows_of(ffn_by_token.FFNByToken(), [made])
    assert [(row["token"], row["occurrences"]) for row in found] == [("␣the", 2), ("␣of", 2)]
    assert [row["FFN experts"] for row in found] == [1.75, 0]
    assert [row["whole words"] for row in found] == [1, 1]
    np.testing.assert_allclose([row["standard error"] for row in found], [0.25, 0])


def test_ffn_by_token_needs_tokens_that_occur_twice():
    made = tiny([[[0, 1], [0, 1]]], token=[THE, OF])
    assert "twice" in ffn_by_token.FFNByToken().missing([made])


def test_part_of_speech():
    """the (2), hou-se (0, 1: fragments), ran (2), a full stop (1), the (1)."""
    pieces = ("", " the", " hou", "se", " ran", ".")
    experts = [[[0, 1], [8, 9], [0, 8], [0, 1], [0, 8], [0, 8]]]
    document, special = [0] * 5 + [1], {0: "<pad>"}
    token = [1, 2, 3, 4, 5, 1]
    made = tiny(experts, token=token, document=document, pieces=pieces, special=special)
    found = {row["token is"]: row for row in rows_of(part_of_speech.PartOfSpeech(), [made])}
    assert {name: (row["tokens"], row["FFN experts"]) for name, row in found.items()} == {
        "verb": (1, 2),
        "determiner": (2, 1.5),
        "punctuation": (1, 1),
        "word fragment": (2, 0.5),
    }
    assert next(iter(found)) == "verb" and list(found)[-1] == "word fragment"
    assert found["determiner"]["standard error"] == 0.5


def test_part_of_speech_takes_the_same_share_of_every_source(monkeypatch):
    monkeypatch.setattr(part_of_speech, "_MOST", 4)
    made = tiny([[[0, 1]] * 8], source=[0] * 6 + [2] * 2)
    assert part_of_speech._sample(made).tolist() == [0, 1, 2, 6]


def test_part_of_speech_of_a_sample(monkeypatch):
    monkeypatch.setattr(part_of_speech, "_MOST", 4)
    experts = [[*[[0, 1]] * 6, *[[8, 9]] * 2]]
    made = tiny(experts, source=[0] * 6 + [2] * 2, token=[THE] * 6 + [OF] * 2)
    found = [tuple(row.values())[:3] for row in rows_of(part_of_speech.PartOfSpeech(), [made])]
    assert found == [("determiner", 3, 2.0), ("preposition", 1, 0.0)]


def test_frequency():
    """Of three ids: one occurs once (2 FFN experts), one twice (1), one four times (0)."""
    made = tiny([[[0, 1], [0, 8], [0, 8], *[[8, 9]] * 4]], token=[A, OF, OF, *[THE] * 4])
    asked = frequency.Frequency()
    found = rows_of(asked, [made])
    assert [list(row.values())[:4] for row in found] == [
        ["1", 1, 1, 2.0],
        ["2 to 3", 1, 2, 1.0],
        ["4 to 7", 1, 4, 0.0],
    ]
    assert "-1.000" in asked.said([made])[0]


def test_position(monkeypatch):
    monkeypatch.setattr(position, "_BINS", 2)
    made = tiny(
        [[[0, 1], [0, 8], [8, 9], [0, 1]]], place=[0, 1, 2, 3], position=[0, 1, 2, 3], layers=(5,)
    )
    found = [tuple(row.values())[:5] for row in rows_of(position.Position(), [made])]
    assert found == [
        ("place in the row", 0, 1, 2, 1.5),
        ("place in the row", 2, 3, 2, 1.0),
        ("position in the document", 0, 0, 1, 2.0),
        ("position in the document", 1, 1, 1, 1.0),
        ("position in the document", 2, 3, 2, 1.0),
    ]


def test_load_by_source_and_layer():
    """Source 0: FFN, constant, copy, and one dropped; source 2: FFN, zero; source 1 has none."""
    made = tiny(
        [[[0, 8], [1, 10], [0, 11]]],
        kept=[[[1, 1], [0, 1], [1, 1]]],
        source=[0, 0, 2],
    )
    first, last = rows_of(load.Load(), [made])
    assert (first["source"], first["tokens"], first["layer"]) == ("wikipedia", 2, 1)
    assert [first[f"share {kind}"] for kind in ("FFN", "constant", "copy", "zero")] == [
        *(1 / 3, 1 / 3, 1 / 3, 0)
    ]
    assert (first["dropped"], first["FFN experts"]) == (0.25, 0.5)
    assert (first["load FFN 1"], first["load copy"], first["load FFN 2"]) == (0.5, 0.5, 0)
    assert (last["source"], last["share zero"], last["dropped"]) == ("arc_easy", 0.5, 0)


def test_load_of_the_middle_layer_beside_the_paper():
    """Layer 2 of 3 is the middle; parts of a task are taken together."""
    every, none = [[0, 1]] * 3, [[8, 9]] * 3
    made = tiny(
        [none, [[0, 1], [0, 8], [8, 9]], every],
        source=[0, 1, 2],
        sources={"notes": "file", "mmlu_law": "task", "mmlu_anatomy": "task"},
    )
    asked = load.Load()
    assert [tuple(row.values())[:4] for row in rows_of(asked, [made], "load_middle")] == [
        ("mmlu", 1.499, 2, 0.5),
        ("notes", None, 1, 2.0),
    ]
    assert "layer 2" in asked.said([made])[0]


@pytest.mark.parametrize(
    "name, task",
    [
        ("arc_easy", "arc_easy"),
        ("ARC-Challenge", "arc_challenge"),
        ("ARC-E", "arc_easy"),
        ("lambada_openai", "lambada"),
        ("nq_open", "nq"),
        ("mmlu_abstract_algebra", "mmlu"),
        ("hellaswag", "hellaswag"),
        ("wikipedia", ""),
        ("arcade", ""),
        ("nqx", ""),
    ],
)
def test_names_of_the_papers_tasks(name, task):
    assert load.task_of(name) == task


def test_scores():
    made = tiny(
        [[[0, 1], [0, 1]]],
        scores=[[[0.5, 0.25], [0.7, 0.25]]],
        entropy=[[1.0, 2.0]],
        rule={"residual": "none"},
    )
    asked = scores.Scores()
    (row,) = rows_of(asked, [made])
    assert row["first mean"] == pytest.approx(0.6) and row["first variance"] == pytest.approx(0.01)
    assert (row["first lowest"], row["first highest"], row["second variance"]) == (0.5, 0.7, 0)
    assert row["entropy"] == 1.5
    assert "variance is 0.01 of the first probability and 0 of the second" in asked.said([made])[0]
    bins = rows_of(asked, [made], "scores_histogram")
    assert sum(b["density of the first"] for b in bins) * 0.02 == pytest.approx(1)
    assert bins[12]["density of the second"] == 50
    with_them = tiny([[[0, 1]] * 2], rule={"residual": "logits"}, name="other")
    assert asked.said([made, with_them])[-1] == (
        "With gating residuals the variance is lower of the first probability; "
        "in the paper of both."
    )


def test_destinations():
    """the goes to zero in 3 of 4 places, of in none of 4; a occurs once."""
    experts = [
        [[0, 1], [0, 11], [0, 8], [0, 9], [10, 11]],
        [[0, 11], [0, 11], [0, 1], [0, 10], [10, 11]],
    ]
    made = tiny(experts, token=[THE, THE, OF, OF, A])
    asked = destinations.Destinations()
    found = {(row["goes to"], row["token"]): row["share"] for row in rows_of(asked, [made])}
    assert found["zero", "␣the"] == 0.75 and found["zero", "␣of"] == 0
    assert found["copy", "␣of"] == found["constant 1", "␣of"] == found["constant 2", "␣of"] == 0.25
    assert ("zero", "␣a") not in found
    examples = rows_of(asked, [made], "destinations_examples")
    assert examples[0]["example"] == "the »the« of of a" and examples[0]["layers"] == 2


def test_destinations_leave_out_what_was_dropped():
    made = tiny([[[0, 11], [0, 11]]], kept=[[[1, 0], [1, 1]]], token=[THE, THE])
    found = rows_of(destinations.Destinations(), [made])
    assert [row["share"] for row in found if row["goes to"] == "zero"] == [0.5]


def test_coactivation():
    """Expert 0 has three tokens: with 1, 1 and 11; 12 is no expert."""
    made = tiny([[[0, 1], [1, 0], [0, 11], [2, 12]]])
    rows = rows_of(coactivation.Coactivation(), [made])
    found = {(r["of the tokens of"], r["chose too"]): (r["share"], r["expected"]) for r in rows}
    assert found["FFN 1", "FFN 2"] == (2 / 3, 0.5)
    assert found["FFN 2", "FFN 1"] == (1.0, 0.75)
    assert found["zero", "FFN 1"] == (1.0, 0.75)
    assert found["FFN 3", "FFN 1"] == (0.0, 0.75)
    assert rows[0]["share"] == 1.0 and len(rows) == 12 * 11


def test_coactivation_needs_two_experts_of_a_token():
    assert coactivation.Coactivation().missing([tiny([[[0], [1]]])])


def test_domain_specialisation():
    """FFN 1 serves all of source 0 and a third of source 1; FFN 5 one token alone."""
    made = tiny(
        [[*[[0, 1]] * 29, [0, 4], *[[0, 1]] * 10, *[[2, 1]] * 20]], source=[*[0] * 30, *[1] * 30]
    )
    asked = domain_specialisation.DomainSpecialisation()
    rows = {(r["expert"], r["source"]): r for r in rows_of(asked, [made])}
    first = rows["FFN 1", "wikipedia"]
    assert first["share of the source's tokens that it serves"] == 1.0
    assert first["share of the expert's tokens"] == pytest.approx(0.75)
    assert first["share of all tokens"] == 0.5
    assert first["specialisation"] == pytest.approx(1.5)
    assert first["share at balance"] == pytest.approx(1.2 / 8)
    assert rows["FFN 2", "king_james"]["specialisation"] == pytest.approx(60 / 59)
    assert rows["FFN 3", "wikipedia"]["specialisation"] == 0
    assert math.isnan(rows["zero", "wikipedia"]["specialisation"])
    assert math.isnan(rows["FFN 5", "wikipedia"]["specialisation"])
    assert "FFN 3 of layer 1: it serves 2.00 times" in asked.said([made])[0]
    assert asked.missing([tiny([[[0, 1]] * 4])]) == "It needs two sources."


def test_vocabulary_specialisation():
    """FFN 1 has 3 of the four `the` and 1 of the two `of`; each its share, and of the others."""
    experts = [[[0, 1], [0, 1], [0, 1], [2, 1], [0, 1], [2, 1]]]
    made = tiny(experts, token=[*[THE] * 4, *[OF] * 2])
    asked = vocabulary_specialisation.VocabularySpecialisation()
    rows = {row["expert"]: row for row in rows_of(asked, [made])}
    assert rows["FFN 1"]["specialisation"] == (3 * 3 / 4 + 1 / 2) / 4
    assert rows["FFN 1"]["of the others"] == (3 * 2 / 3 + 0) / 4
    assert rows["FFN 1"]["load"] == 4 / 6
    assert rows["FFN 2"]["specialisation"] == rows["FFN 2"]["of the others"] == 1
    assert math.isnan(rows["zero"]["specialisation"])


def test_health():
    """FFN 1 has all, of the FFN experts; half of what constant 1 has is dropped."""
    made = tiny([[[0, 8], [0, 8]]], kept=[[[1, 1], [1, 0]]], counts=(2, 1, 0, 0), wanted=1.0)
    made = dataclasses.replace(made, rows=made.rows._replace(experts=made.rows.experts // 4))
    asked = health.Health()
    (row,) = rows_of(asked, [made])
    assert (row["largest over mean"], row["smallest over mean"], row["evenness"]) == (2, 0, 0)
    assert (row["FFN dropped"], row["constant dropped"]) == (0, 0.5)
    assert math.isnan(row["copy dropped"])
    assert (row["dead"], row["overloaded"]) == (1, 0)
    states = {r["expert"]: r for r in rows_of(asked, [made], "health_experts")}
    assert states["FFN 2"]["state"] == "dead" and states["FFN 1"]["over balance"] == 2
    assert asked.said([made]) == ["Dead: FFN 2 of layer 1; overloaded: none."]


def test_overloaded_experts():
    made = tiny([[[0, 11]] * 4])
    (row,) = rows_of(health.Health(), [made])
    assert (row["dead"], row["overloaded"]) == (10, 2)


def test_saturation():
    more = {"saturation": {"steps": [1, 2], "overlap": [[0.5, 0.25], [1, 1]], "tokens": 1234}}
    made = tiny([[[0, 1]], [[0, 1]]], layers=(2, 4), more=more)
    asked = saturation.Saturation()
    assert [tuple(row.values()) for row in rows_of(asked, [made])] == [
        *((1, 2, 0.5), (1, 4, 0.25), (2, 2, 1), (2, 4, 1))
    ]
    assert asked.said([made]) == ["Of 1,234 tokens."]
    assert asked.missing([tiny([[[0, 1]]])]) and not asked.missing([made, tiny([[[0, 1]]])])


def test_switched_off():
    off = {"tokens": 9, "none": {"loss": 4.0, "ffn_experts": 1.0}}
    off |= {"zero": {"loss": 4.5, "ffn_experts": 1.5}}
    asked = switched_off.SwitchedOff()
    found = rows_of(asked, [tiny([[[0, 1]]], more={"switched_off": off})])
    assert [tuple(row.values()) for row in found] == [
        ("none", 4.0, 0, 1.0),
        ("zero", 4.5, 0.5, 1.5),
    ]
    assert asked.missing([tiny([[[0, 1]]])])


def test_differences():
    """Two ids; the models differ by one FFN expert on half of the tokens of `the`."""
    token, document = [THE, THE, OF, OF], [0, 1, 0, 1]
    ours = tiny([[[0, 1], [0, 1], [0, 8], [0, 8]]], token=token, document=document, name="ours")
    theirs = tiny([[[0, 1], [0, 8], [0, 8], [8, 0]]], token=token, document=document)
    asked = differences.Differences()
    assert not asked.missing([ours, theirs])
    (row,) = rows_of(asked, [ours, theirs])
    assert [*row.values()] == [1, 1.5, 1.25, 0.25, pytest.approx(1.0)]
    the, of = rows_of(asked, [ours, theirs], "differences_tokens")
    assert (the["token"], the["FFN experts, ours"], the["difference"]) == ("␣the", 2.0, 0.5)
    assert the["standard error"] == 0.5 and of["difference"] == of["standard error"] == 0


def test_differences_do_not_cancel():
    ours, theirs = tiny([[[0, 1], [0, 8]]], name="ours"), tiny([[[0, 8], [0, 1]]])
    (row,) = rows_of(differences.Differences(), [ours, theirs])
    assert row["mean absolute difference"] == 1 and row["FFN experts, ours"] == 1.5


def test_differences_need_two_records_of_the_same_tokens():
    asked, one = differences.Differences(), tiny([[[0, 1], [0, 1]]])
    assert "one record" in asked.missing([one])
    assert "same tokens" in asked.missing([one, tiny([[[0, 1], [0, 1]]], token=[THE, OF])])
    assert "1 and 2 MoE layers" in asked.missing([one, tiny([[[0, 1], [0, 1]]] * 2)])


def shaped(documents=40, length=25, layers=4, seed=0, sources=2, **ffn_share):
    """Sources of documents whose FFN experts lean as `ffn_share` has it.

    Args:
      ffn_share: source_J=p: the share of FFN experts of a source in layer J (from 0).
    """
    rng = np.random.default_rng(seed)
    T = documents * length * sources
    source = np.repeat(np.arange(sources), documents * length)
    experts = np.empty((layers, T, 2), np.uint8)
    for j in range(layers):
        share = np.array([ffn_share.get(f"s{s}_{j}", 0.6) for s in range(sources)])[source]
        is_ffn = rng.random((T, 2)) < share[:, None]
        pick = rng.integers(0, 4, T)
        experts[j, :, 0] = np.where(is_ffn[:, 0], pick, ZERO)
        experts[j, :, 1] = np.where(is_ffn[:, 1], pick + 4, CONST + pick % 2)
    names = dict.fromkeys([f"source{s}" for s in range(sources)], "source")
    return tiny(
        experts,
        source=source,
        document=np.repeat(np.arange(documents * sources), length),
        position=np.tile(np.arange(length), documents * sources),
        sources=names,
        loss=1.0 + source,
    )


def verdicts(*records):
    found = rows_of(findings.Findings(), list(records))
    return {row["finding"]: row for row in found}


CORRELATE, MORE_THAN_DISTANT = (
    "adjacent layers' FFN experts of a token correlate",
    "more than distant layers' do",
)
SHALLOW = "sources differ more in shallow layers than in middle ones"
LAST, HARD = "and more in the last layer", "a hard source's FFN experts differ from an easy one's"
ZERO_FIRST, TOPICS = (
    "the zero expert serves more than any other one",
    "sources differ more than halves of one do",
)


def test_findings_where_the_sources_differ_in_the_first_and_the_last_layer():
    found = verdicts(shaped(s0_0=0.2, s1_0=0.9, s0_3=0.2, s1_3=0.9))
    for name in (SHALLOW, LAST, HARD, ZERO_FIRST, TOPICS):
        row = found[name]
        assert row["verdict"] == "holds", row
        assert row["low"] < row["value"] < row["high"]
    # Source 1 has 1.4 more in two of four layers.
    assert found[HARD]["value"] == pytest.approx(0.7, abs=0.05)


def test_findings_where_they_differ_in_the_middle():
    found = verdicts(shaped(s0_1=0.2, s1_1=0.9, s0_2=0.9, s1_2=0.2))
    assert found[SHALLOW]["verdict"] == found[LAST]["verdict"] == "does not hold"
    assert found[HARD]["verdict"] == "cannot be told"


def test_findings_where_sources_are_alike():
    found = verdicts(shaped())
    assert found[TOPICS]["verdict"] != "holds" and found[HARD]["verdict"] == "cannot be told"
    assert found[CORRELATE]["verdict"] == "cannot be told"


def test_findings_where_layers_repeat_each_other():
    """Layer 2 does as layer 1 and layer 4 as layer 3; 1 and 4 are distant and differ."""
    made = shaped(layers=4)
    experts = made.rows.experts[[0, 0, 2, 2]]
    found = verdicts(dataclasses.replace(made, rows=made.rows._replace(experts=experts)))
    assert found[CORRELATE]["verdict"] == found[MORE_THAN_DISTANT]["verdict"] == "holds"
    assert found[CORRELATE]["value"] == pytest.approx(2 / 3, abs=0.05)


def test_layers_that_differ_by_chance_alone_are_no_finding():
    """In layer 1 a document has one expert for all its tokens: so do sources differ by chance."""
    found = []
    for seed in range(6):
        made = shaped(seed=seed, sources=3)
        experts = made.rows.experts.copy()
        experts[0, :, 0] = np.random.default_rng(seed).integers(0, 8, 200)[made.rows.document]
        rows = made.rows._replace(experts=experts)
        found.append(verdicts(dataclasses.replace(made, rows=rows))[SHALLOW]["verdict"])
    assert found.count("cannot be told") >= 5


def test_findings_say_what_cannot_be_told():
    one = verdicts(shaped(layers=1, sources=1))
    assert {row["verdict"] for name, row in one.items() if name != ZERO_FIRST} == {"cannot be told"}
    assert one[CORRELATE]["of"] == "there is one MoE layer"
    assert one[TOPICS]["of"] == "it needs two sources"
    few = verdicts(shaped(documents=2))
    assert few[ZERO_FIRST]["of"] == "no source has 5 documents"


def test_findings_about_the_zero_expert():
    few = verdicts(shaped(**{f"s{s}_{j}": 0.95 for s in range(2) for j in range(4)}))
    assert few[ZERO_FIRST]["verdict"] == "does not hold"


def test_findings_of_the_papers_two_tasks():
    made = shaped(s0_1=0.9, s1_1=0.5)
    named = dict(zip(("hellaswag", "sciq"), ("task", "task"), strict=True))
    made = dataclasses.replace(made, meta=dataclasses.replace(made.meta, sources=named))
    row = verdicts(made)["HellaSwag gets more than SciQ, in the middle layer"]
    assert row["verdict"] == "holds" and row["value"] == pytest.approx(0.8, abs=0.05)


def test_correlation_is_that_of_all_tokens():
    """Made of sums over documents, it must be numpy's."""
    made = made_up.record(2000)
    of = sums.of(made)
    found = sums.correlations(of, np.ones((1, len(of.source))))[0]
    np.testing.assert_allclose(found, np.corrcoef(made.ffn), atol=1e-9)


def test_every_question_says_what_it_asks_and_how():
    asked = question.every()
    assert len({one.name for one in asked}) == len(asked) == 15
    assert len({name for one in asked for name in one.table_names}) == sum(
        len(one.table_names) for one in asked
    )
    for one in asked:
        assert one.title.endswith("?") and len(one.how) > 100, one.name


def test_records_have_names_of_their_own():
    a, b = made_up.record(100), made_up.record(100, name="b")
    assert question.labels([a, b]) == ["tiny", "b"]
    later = made_up.record(100, step=800)
    assert question.labels([a, later]) == ["tiny, step 700", "tiny, step 800"]
    assert question.labels([a, a]) == ["tiny, step 700 (1)", "tiny, step 700 (2)"]


def test_two_records_stand_beside_each_other():
    records = [made_up.record(50), made_up.record(50, name="b")]
    each = [{("x",): (1, 2), ("y",): (3, 4)}, {("z",): (5, 6), ("x",): (7, 8)}]
    table = question.beside(records, ["key"], ["p", "q"], each)
    assert table.columns == ["key", "p, tiny", "p, b", "q, tiny", "q, b"]
    assert table.rows == [
        ["x", 1, 7, 2, 8],
        ["y", 3, None, 4, None],
        ["z", None, 5, None, 6],
    ]


def test_names_of_experts_and_their_balance():
    meta = made_up.meta(counts=(2, 2, 1, 1), wanted=1.2)
    assert question.expert_names(meta) == [
        *("FFN 1", "FFN 2", "constant 1", "constant 2", "copy", "zero")
    ]
    np.testing.assert_allclose(question.balanced(meta), [0.6, 0.6, 0.2, 0.2, 0.2, 0.2])
    assert question.balanced(made_up.meta(counts=(4, 0, 0, 0), wanted=2.0)) == [0.5] * 4


def test_layers_are_chosen_evenly():
    assert drawing.chosen(3) == [0, 1, 2]
    assert drawing.chosen(24) == [0, 3, 7, 10, 13, 16, 20, 23]
    assert drawing.chosen(1) == [0]


def test_any_text_can_be_a_label():
    assert drawing.label("a$b$\n") == r"a\$b\$⏎"
    assert drawing.label("中") == "\\u4e2d"
    assert drawing.label("x" * 40) == "x" * 17 + "…"


def test_findings_leave_out_sources_of_few_documents():
    made = shaped(sources=3)
    first = made.rows.document < 82  # two documents of the third source
    cut = (a[first] if a.ndim == 1 else a[:, first] for a in made.rows)
    made = dataclasses.replace(made, rows=made_up.Rows(*cut))
    assert findings.Findings().said([made]) == ["Left out, having fewer than 5 documents: source2."]
    assert verdicts(made)["the same over sources: adjacent above distant"]["of"] == (
        "it needs three sources and three MoE layers"
    )
    assert verdicts(made)[ZERO_FIRST]["verdict"] == "holds"


def test_distances_between_halves():
    """Two sources that share no expert are 1 apart, and halves of one are 0."""
    load = np.zeros((8, 1, 2))
    source = np.repeat([3, 5], 4)
    load[:4, 0, 0] = load[4:, 0, 1] = 7
    assert sums.halves(load, source, np.random.default_rng(0)) == (1, 0)
