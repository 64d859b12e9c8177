import re
import subprocess
import sys
from pathlib import Path

import pytest

from classact import catalogue
from classact.catalogue import FAMILIES, find_entry, load_entries, papers
from classact.evidence.claims import _CHECK_KEYS, KINDS

ENTRIES = load_entries()


def test_seventy_three_papers():
    assert len(ENTRIES) == 73
    assert {entry.family for entry in ENTRIES.values()} == set(FAMILIES)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_entry_is_complete(entry):
    assert entry.authors
    assert all(name.strip() == name and name for name in entry.authors)
    assert 1990 < entry.year < 2030
    assert entry.url.startswith("https://"), "neither arXiv nor DOI"
    assert not entry.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)
    assert not entry.code or re.fullmatch(r"https://[\w.-]+/\S+", entry.code)
    sentences = re.findall(r"[.!?](?:\s|$)", entry.summary.replace("e.g.", "").replace("vs.", ""))
    assert 1 <= len(sentences) <= 3, "a summary of about two sentences"
    assert 6 <= len(entry.keywords) <= 10
    assert entry.api
    assert all(name.startswith((f"classact.{entry.family}.", "classact.nn.")) for name in entry.api)
    assert sum(bool(claim.get("central")) for claim in entry.claims) == 1
    ids = [claim["id"] for claim in entry.claims]
    assert len(set(ids)) == len(ids)
    for claim in entry.claims:
        assert set(claim) <= {"id", "central", "statement", "reported", "note", "checks", "untested"}
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim["id"])
        assert claim["statement"].strip()
        assert claim["reported"].strip()
        assert not (claim.get("checks") and claim.get("untested"))
        for check in claim.get("checks", []):
            assert set(check) <= _CHECK_KEYS
            assert check["evidence"] in KINDS
    assert entry.bibtex().count("{") == entry.bibtex().count("}")


@pytest.mark.parametrize("entry", [e for e in ENTRIES.values() if e.status == "measured"], ids=lambda e: e.slug)
def test_committed_results_are_those_of_the_code_and_the_checks(entry):
    """Results are not stale, every check has been judged, and judging the stored cells again gives what is stored."""
    from importlib import import_module

    from classact.evidence.claims import evaluate_claims

    result = entry.result()
    assert not entry.stale()
    module = import_module(f"classact.reproductions.{entry.family}.{entry.slug}")
    ratios = {key: experiment.test_train_ratio for key, experiment in module.EXPERIMENTS.items()}
    cells = {key: {int(seed): cell for seed, cell in part.items()} for key, part in result["results"].items()}
    for claim, stored in zip(evaluate_claims(entry.claims, cells, ratios), result["claims"], strict=True):
        assert claim["verdict"] == stored["verdict"]
        assert claim["effect"] == pytest.approx(stored["effect"], rel=1e-9)
    assert [c["id"] for c in result["claims"]] == [c["id"] for c in entry.claims if c.get("checks")]
    folder = catalogue.PACKAGE / "results" / entry.slug
    assert sum(file.stat().st_size for file in folder.iterdir() if not file.name.startswith("smoke")) < 300_000


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("attention entropy", "aem"),
        ("rare classes in pathology", "scmil"),
        ("novel classes in tables", "pbn"),
        ("class activation map principal component", "eigencam"),
        ("training without backpropagation", "noprop"),
        ("click-through rate", "din"),
        ("merge models", "adamerging"),
        ("zhang entropy maximization", "aem"),
    ],
)
def test_search_finds_it_among_the_first_three(query, slug):
    assert slug in [entry.slug for entry in papers(query)[:3]]


def test_search_in_a_family_and_without_a_hit():
    assert {entry.family for entry in papers("attention", family="mil")} == {"mil"}
    assert papers("zzzz") == []
    with pytest.raises(ValueError, match="no family 'mill'; there are nn, explain"):
        papers(family="mill")


def test_nearest_name():
    with pytest.raises(KeyError, match="no paper 'acmli'; did you mean acmil"):
        find_entry("acmli")


def test_status_is_read_off_the_files(monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    entry = ENTRIES["acmil"]
    assert entry.status == "planned"
    (tmp_path / "mil").mkdir()
    (tmp_path / "mil" / "acmil.py").touch()
    assert entry.status == "method"
    (tmp_path / "results" / "acmil").mkdir(parents=True)
    (tmp_path / "results" / "acmil" / "cpu.json").write_text("{}")
    assert entry.status == "measured"


def test_names_of_finished_papers_exist():
    import importlib

    for entry in ENTRIES.values():
        if entry.status != "planned":
            for name in entry.api:
                package, _, member = name.rpartition(".")
                assert hasattr(importlib.import_module(package), member), name


@pytest.mark.parametrize(
    "words", [["papers"], ["papers", "rare classes in pathology"], ["papers", "acmil"], ["--help"]]
)
def test_the_catalogue_needs_no_heavy_import(words):
    code = (
        "import sys; sys.argv = ['classact', *sys.argv[1:]]\n"
        "from classact.cli import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'lightning'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    said = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("HEAVY []")


def test_a_malformed_entry_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    (tmp_path / "catalogue").mkdir()
    text = (Path(catalogue.__file__).parent / "aem.toml").read_text()
    for broken, message in (
        (
            text.replace('family = "mil"', 'family = "mill"'),
            r"aem\.toml: slug must be the file's name and family one of",
        ),
        (text.replace("year = 2024\n", ""), r"aem\.toml: missing key 'year'"),
        ('doii = "x"\n' + text, r"aem\.toml: unknown keys doii"),
    ):
        (tmp_path / "catalogue" / "aem.toml").write_text(broken)
        with pytest.raises(ValueError, match=message):
            load_entries.__wrapped__()


def test_the_readme_lists_every_paper_with_its_status():
    root = Path(__file__).parent.parent
    namespace = {"__name__": "readme_table", "__file__": str(root / "docs" / "readme_table.py")}
    exec((root / "docs" / "readme_table.py").read_text(), namespace)
    text = (root / "README.md").read_text()
    assert namespace["with_table"](text) == text, "run: python docs/readme_table.py"
