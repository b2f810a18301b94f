"""The READMEs and docs/ name what exists, and both READMEs say the same."""

import re
from pathlib import Path

import pytest
from processes import ROOT

import build_notebook as builder

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
CARD = (ROOT / "pretrained" / "README.md").read_text(encoding="utf-8")
NAME = re.compile(r"`([A-Z][A-Z_]{3,})`")


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", outside_code(page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_both_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", outside_code(text), flags=re.M) for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1] and len(levels[0]) > 7


def test_both_have_the_same_code_but_for_its_comments():
    blocks = []
    for text in (ENGLISH, CHINESE):
        found = re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.M | re.S)
        blocks.append([(kind, re.sub(r"\s*# .*", "", code)) for kind, code in found])
    assert blocks[0] == blocks[1] and len(blocks[0]) > 5


def test_both_have_the_same_figures_numbers_and_names():
    """Row by row in tables; names in backquotes and numbers everywhere."""
    tables = [
        [line.count("|") for line in text.splitlines() if line.startswith("|")]
        for text in (ENGLISH, CHINESE)
    ]
    assert tables[0] == tables[1]
    for pattern in (r"(?<![\w.])\d+\.\d+(?!\w)", r"docs/\w+\.\w+"):
        found = [sorted(re.findall(pattern, text)) for text in (ENGLISH, CHINESE)]
        assert found[0] == found[1], pattern
    assert set(NAME.findall(ENGLISH)) == set(NAME.findall(CHINESE))


def auc_of_the_detector() -> str:
    """What its card says, as in 0.7 [0.6, 0.8]."""
    found = re.search(r"\| \*\*all\*\* \| \d+ \| \*\*([\d.]+)\*\* (\[[\d., ]+\])", CARD)
    assert found
    return " ".join(found.groups())


def test_both_say_early_what_has_not_been_shown():
    for text, gpu in ((ENGLISH, "run on a GPU yet"), (CHINESE, "没有在 GPU 上运行过")):
        beginning = "\n".join(text.splitlines()[:25])
        assert gpu in beginning and "0.43 [0.36, 0.50]" in beginning
        assert auc_of_the_detector() in " ".join(text.splitlines()[:9])


@EVERY_PAGE
def test_the_parameters_and_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    known = {*builder.known_parameters(builder.assemble()), "LICENSE", "README", "EDITED", "OUTPUT"}
    assert {*NAME.findall(text)} - known <= {"NAME"}
    for file in re.findall(
        r"(?:tests/benchmarks|notebooks/params|docs|kaggle_cells)/[\w.]+\.\w+", text
    ):
        assert (ROOT / file).exists(), file


@EVERY_PAGE
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    links += [(file, "") for file in re.findall(r'src="(?!http)([^"]+)"', page.read_text("utf-8"))]
    assert links
    for name, anchor in links:
        file = page.parent / name if name else page
        assert file.exists(), name
        assert not anchor or anchor in anchors(file), f"{name}#{anchor}"


def test_every_page_of_docs_is_linked():
    linked = re.findall(r"\]\(docs/(\w+\.md)", ENGLISH)
    assert {*linked} == {page.name for page in (ROOT / "docs").glob("*.md")}
