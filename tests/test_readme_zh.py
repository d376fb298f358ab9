"""The README in Chinese says what README.md says: the same commands, numbers and links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "README.zh-CN.md")
ENGLISH, CHINESE = (ROOT.joinpath(name).read_text(encoding="utf-8") for name in NAMES)

_GENERATED = re.compile(r"<!-- results: begin -->.*?<!-- results: end -->\n*", re.DOTALL)
_CODE = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
_INLINE = re.compile(r"`[^`\n]+`")
_NUMBER = re.compile(r"\d[\d,.]*(?<![,.])")
# Each page links to the other one; the Chinese page also to the results that are generated.
_EACH_OTHER = re.compile(r"README(\.zh-CN)?\.md(#.*)?")


def blocks(text: str) -> list[str]:
    """Code, in order, as it is typed."""
    return _CODE.findall(text)


def spans(text: str) -> list[str]:
    """`code` within sentences, whose order may differ."""
    return sorted(_INLINE.findall(_CODE.sub("", text)))


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return sorted(link for link in found if not _EACH_OTHER.fullmatch(link))


def tables(text: str) -> list[list[list[str]]]:
    """The numbers of each row of each table, whose order in a sentence may differ."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[sorted(_NUMBER.findall(row)) for row in table.splitlines()] for table in found]


def numbers(text: str) -> list[str]:
    """Those of all sentences."""
    return sorted(_NUMBER.findall(re.sub(r"(?m)^\|.*\n", "", _INLINE.sub("", _CODE.sub("", text)))))


def levels(text: str) -> list[str]:
    """How deep each heading is."""
    return re.findall(r"^#+(?= )", text, re.MULTILINE)


PARTS = (blocks, spans, links, tables, numbers, levels)


def differ(english: str, chinese: str) -> list[str]:
    return [part.__name__ for part in PARTS if part(english) != part(chinese)]


@pytest.mark.parametrize("part", PARTS)
def test_both_pages_agree(part):
    assert part(_GENERATED.sub("", ENGLISH)) == part(CHINESE)


def test_each_links_to_the_other_at_its_head():
    for text, other in ((ENGLISH, NAMES[1]), (CHINESE, NAMES[0])):
        assert f"]({other})" in text.partition("## ")[0]


@pytest.mark.parametrize(
    ("said", "instead", "part"),
    [
        ("--temperature=0.8\n", "--temperature=0.9\n", "blocks"),
        ("`tests/oracle.py`", "`tests/oracles.py`", "spans"),
        ("](docs/DATA.md)", "](docs/DATUM.md)", "links"),
        ("| 0.5 | 1.05 | 15.8 |", "| 0.5 | 1.05 | 15.9 |", "tables"),
        ("+0.022", "+0.002", "numbers"),
    ],
)
@pytest.mark.parametrize("page", ["english", "chinese"])
def test_a_change_of_one_page_is_seen(page, said, instead, part):
    pages = {"english": _GENERATED.sub("", ENGLISH), "chinese": CHINESE}
    assert said in pages[page]
    pages[page] = pages[page].replace(said, instead)
    assert differ(**pages) == [part]


def test_what_is_linked_is_there():
    for link in links(ENGLISH) + links(CHINESE):
        assert link.startswith("https://") or (ROOT / link).exists(), link
