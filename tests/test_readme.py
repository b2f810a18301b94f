"""What the READMEs say is what there is, and both say the same."""

import re

import pytest
from processes import ROOT

import build_notebook as builder

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^#+ (.+)$", flags=re.M)


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def test_both_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", outside_code(text), flags=re.M) for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1] and len(levels[0]) > 10


def test_both_have_the_same_code_but_for_its_comments():
    blocks = []
    for text in (ENGLISH, CHINESE):
        found = re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.M | re.S)
        blocks.append([(kind, re.sub(r"\s*# .*", "", code)) for kind, code in found])
    assert blocks[0] == blocks[1] and len(blocks[0]) > 8


def test_both_have_the_same_figures_numbers_and_names():
    """Row by row in tables; names in backquotes and numbers everywhere."""
    tables = [
        [line.count("|") for line in text.splitlines() if line.startswith("|")]
        for text in (ENGLISH, CHINESE)
    ]
    assert tables[0] == tables[1]
    for pattern in (r"(?<![\w.])\d+\.\d+(?!\w)", r"docs/\w+\.png"):
        found = [sorted(re.findall(pattern, text)) for text in (ENGLISH, CHINESE)]
        assert found[0] == found[1], pattern
    names = [set(re.findall(r"`([A-Z][A-Z_]{3,})`", text)) for text in (ENGLISH, CHINESE)]
    assert names[0] == names[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_parameters_and_files_that_are_named_exist(text):
    known = {*builder.known_parameters(builder.assemble()), "LICENSE", "README", "EDITED", "OUTPUT"}
    assert {*re.findall(r"`([A-Z][A-Z_]{3,})`", text)} - known <= {"NAME"}
    for file in re.findall(
        r"(?:tests/benchmarks|notebooks/params|docs|kaggle_cells)/[\w.]+\.\w+", text
    ):
        assert (ROOT / file).exists(), file
    for folder, name in re.findall(r"\]\((?!http|#)([\w/]*?)([\w.-]+)\)", text):
        assert (ROOT / folder / name).exists(), name


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_links_within_the_page_lead_to_headings(text):
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in HEADING.findall(outside_code(text))
    }
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links and set(links) <= anchors
