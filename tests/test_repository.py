"""Files for people who cite the project, report faults or read its history."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import flax_unet

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
#: {version: date}, the latest first.
RELEASES = dict(re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE))

pytestmark = pytest.mark.skipif(not TEMPLATES.is_dir(), reason="this is no checkout")


def test_every_release_has_a_date_and_this_version_is_the_latest_or_comes_after_it():
    headings = re.findall(r"^## \[(.*?)\]", CHANGELOG, re.MULTILINE)
    assert headings == ["Unreleased", *RELEASES]
    assert [*RELEASES.values()] == sorted(RELEASES.values(), reverse=True)
    this, latest = Version(flax_unet.__version__), Version(next(iter(RELEASES)))
    assert this > latest if this.is_devrelease else this == latest
    links = re.findall(r"^\[(.*?)\]: \S+$", CHANGELOG, re.MULTILINE)
    assert links == headings


def test_the_citation_is_of_the_latest_release_and_of_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "flax-unet"
    assert citation.keys() >= {"message", "authors", "license", "repository-code"}
    assert (citation["version"], str(citation["date-released"])) == next(iter(RELEASES.items()))
    bibtex = (ROOT / "tfds_kvasir" / "kvasir_seg" / "CITATIONS.bib").read_text()
    [kvasir] = re.findall(r"doi=\{(.*)\}", bibtex)
    dois = [reference["doi"] for reference in citation["references"]]
    assert dois == ["10.1007/978-3-319-24574-4_28", kvasir]
    names = [author["family-names"] for author in citation["references"][1]["authors"]]
    [authors] = re.findall(r"author=\{(.*)\},", bibtex)
    assert [*map(str.strip, names)] == [
        text.split(",")[0].removeprefix("de ") for text in authors.split(" and ")
    ]


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_have_what_github_demands(name):
    form = yaml.safe_load((TEMPLATES / f"{name}.yml").read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 1
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)
    required = {f["id"] for f in fields if f.get("validations", {}).get("required")}
    assert required == ({"what", "how", "info"} if name == "bug_report" else {"task"})
    assert "Output of `flax-unet info`" in [field["attributes"]["label"] for field in fields]


@pytest.mark.parametrize("name", ["SECURITY.md", "ROADMAP.md"])
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
    assert links and all((ROOT / link).exists() for link in links)


def test_what_is_said_to_be_tested_is_what_the_fault_campaign_tried():
    table = re.findall(r"^\| ([^|]+) \| ([\d,]+) \|", (ROOT / "docs/faults.md").read_text(), re.M)
    tried = {kind: int(number.replace(",", "")) for kind, number in table}
    expected = {
        tried[f"{kind}{by}"]
        for kind in ("picture files", "PyTorch files")
        for by in ("", ", by coverage")
    }
    expected |= {tried["exported models"], tried["zips of Kvasir-SEG"], tried["checkpoints"]}
    expected |= {tried["config.json"] + tried["metrics.jsonl"]}
    text = (ROOT / "SECURITY.md").read_text()
    numbers = re.findall(r"\b\d[\d,]*\d\d\b", text)
    assert {int(number.replace(",", "")) for number in numbers} == expected


def test_the_license_of_the_models_says_what_the_cards_say():
    license = (ROOT / "models" / "LICENSE").read_text()
    for name in ("pretrained", "strong"):
        card = (ROOT / "models" / name / "README.md").read_text()
        assert f"{name}/weights.npz" in license
        for text in (license, card):
            text = " ".join(text.split())
            assert "research and education" in text and "written permission" in text
            assert "10.1007/978-3-030-37734-2_37" in text and "Apache License 2.0" in text
