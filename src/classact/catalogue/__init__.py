"""The catalogue: one entry per paper, found by search. Standard library only; no paper's code is imported.

An entry is ``catalogue/<slug>.toml``: bibliography, summary, keywords, names in the library, and the paper's claims
with its own figures. How far the library has got with a paper is read off the files that are there.
"""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

PACKAGE = Path(__file__).resolve().parent.parent
FAMILIES = {
    "nn": "Activations and layers",
    "explain": "Visual explanations",
    "probe": "What a network has learned",
    "mil": "Multiple-instance learning",
    "discover": "Novel classes",
    "continual": "Continual learning",
    "supervision": "Imperfect supervision",
    "transfer": "Transfer",
    "segment": "Segmentation",
    "signals": "Brain and heart signals",
    "recommend": "Recommendation",
    "rules": "Learning without backpropagation",
    "theory": "Theory",
}
SCALES = ("smoke", "cpu", "gpu", "paper")
Status = Literal["planned", "method", "measured"]


@dataclass(frozen=True)
class Entry:
    """What the catalogue knows of one paper.

    Attributes
    ----------
    slug, title, family, year, venue, arxiv, code, summary : str or int
        Bibliography; `arxiv` is the identifier, `code` the authors' repository (empty if none was published).
    authors, keywords, api : tuple of str
        `api` names what the library offers, as ``classact.mil.ACMIL``.
    claims : tuple of dict
        The paper's claims: id, statement, reported, central, and ``checks`` or ``untested``.
    """

    slug: str
    title: str
    family: str
    authors: tuple[str, ...]
    year: int
    venue: str
    summary: str
    keywords: tuple[str, ...]
    api: tuple[str, ...]
    claims: tuple[dict[str, Any], ...]
    arxiv: str = ""
    code: str = ""
    doi: str = ""

    @property
    def url(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else f"https://doi.org/{self.doi}" * bool(self.doi)

    @property
    def status(self) -> Status:
        """How far the library has got, by the files that are there."""
        if self.result("cpu") is not None:
            return "measured"
        method = PACKAGE / self.family / self.slug
        return "method" if method.with_suffix(".py").exists() or (method / "__init__.py").exists() else "planned"

    def result(self, scale: str = "cpu") -> dict[str, Any] | None:
        """Return the committed results at a scale, if any."""
        path = PACKAGE / "results" / self.slug / f"{scale}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def stale(self, scale: str = "cpu") -> bool:
        """Whether the results at a scale were made by other code than is here now."""
        from classact.catalogue.codehash import code_hash

        result = self.result(scale)
        return result is not None and result["code_hash"] != code_hash(
            f"classact.reproductions.{self.family}.{self.slug}"
        )

    def bibtex(self) -> str:
        """BibTeX record of the paper."""
        first = re.sub(r"\W", "", self.authors[0].split()[-1].lower())
        kind, place = "article", "journal"
        if not self.venue or "arxiv" in self.venue.lower():
            kind, place = "misc", "howpublished"
        elif re.search(r"(?i)conference|symposium|workshop|neural information|meeting|challenge", self.venue):
            kind, place = "inproceedings", "booktitle"
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "year": str(self.year),
            place: self.venue,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else "",
            "doi": self.doi,
        }
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
        return f"@{kind}{{{first}{self.year}{self.slug},\n{lines}\n}}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values of the entry, with its status."""
        return {**self.__dict__, "status": self.status, "url": self.url}


@lru_cache(maxsize=1)
def load_entries() -> dict[str, Entry]:
    """Every entry by slug, sorted by family and slug.

    Raises
    ------
    ValueError
        If an entry is malformed; the message names file and key.
    """
    entries = [_read(path) for path in sorted((PACKAGE / "catalogue").glob("*.toml"))]
    order = list(FAMILIES)
    return {entry.slug: entry for entry in sorted(entries, key=lambda e: (order.index(e.family), e.slug))}


def _read(path: Path) -> Entry:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    for key in ("slug", "title", "family", "authors", "year", "venue", "summary", "keywords", "api", "claims"):
        if key not in content:
            msg = f"{path}: missing key {key!r}"
            raise ValueError(msg)
    if content["slug"] != path.stem or content["family"] not in FAMILIES:
        msg = f"{path}: slug must be the file's name and family one of {', '.join(FAMILIES)}"
        raise ValueError(msg)
    if unknown := set(content) - set(Entry.__dataclass_fields__):
        msg = f"{path}: unknown keys {', '.join(sorted(unknown))}"
        raise ValueError(msg)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return Entry(**fields)


def find_entry(slug: str) -> Entry:
    """Return one entry.

    Raises
    ------
    KeyError
        If there is none; the message suggests the nearest.
    """
    import difflib

    entries = load_entries()
    if slug in entries:
        return entries[slug]
    near = difflib.get_close_matches(slug, entries, n=3, cutoff=0.5)
    msg = f"no paper {slug!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; see `classact papers`")
    raise KeyError(msg)


def papers(query: str | None = None, family: str | None = None) -> list[Entry]:
    """Entries of the catalogue, all or the best matches of a query first.

    Parameters
    ----------
    query : str, optional
        Words to search for in title, summary, keywords, names, authors and claims (BM25).
    family : str, optional
        Only this family.

    Examples
    --------
    >>> papers("entropy of attention", family="mil")[0].slug
    'aem'
    """
    if family is not None and family not in FAMILIES:
        msg = f"no family {family!r}; there are {', '.join(FAMILIES)}"
        raise ValueError(msg)
    entries = [entry for entry in load_entries().values() if family in (None, entry.family)]
    return entries if not query else _bm25(query, entries)


_STOP = frozenset(
    {"a", "an", "and", "are", "as", "at", "be", "by", "can", "do", "for", "from", "how", "in", "into", "is", "it"}
    | {"its", "my", "of", "on", "or", "that", "the", "to", "we", "with"}
)


def _tokens(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [_stem(word) for word in words if word not in _STOP]


def _stem(word: str) -> str:
    for suffix in ("ations", "ation", "ings", "ing", "ies", "es", "ed", "s", "e", "al", "y"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


def _document(entry: Entry) -> list[str]:
    weighted: Iterable[tuple[int, str]] = (
        (4, f"{entry.slug} {entry.title}"),
        (3, " ".join(entry.keywords)),
        (2, f"{entry.summary} {entry.family} {FAMILIES[entry.family]}"),
        (1, " ".join((*entry.api, *entry.authors, *(claim.get("statement", "") for claim in entry.claims)))),
    )
    return [token for weight, text in weighted for token in _tokens(text) * weight]


def _bm25(query: str, entries: list[Entry], k1: float = 1.5, b: float = 0.75) -> list[Entry]:
    documents = [Counter(_document(entry)) for entry in entries]
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / max(len(lengths), 1)
    scores = [0.0] * len(entries)
    for token in set(_tokens(query)):
        holders = sum(token in document for document in documents)
        idf = math.log(1 + (len(entries) - holders + 0.5) / (holders + 0.5))
        for index, document in enumerate(documents):
            count = document[token]
            scores[index] += idf * count * (k1 + 1) / (count + k1 * (1 - b + b * lengths[index] / mean))
    ranked = sorted(range(len(entries)), key=lambda index: -scores[index])
    return [entries[index] for index in ranked if scores[index] > 0]
