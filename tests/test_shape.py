"""The cells can be read: nothing is longer than a screen, and every section shows something."""

import ast
import statistics

import jupytext
import pytest
from processes import ROOT

FILES = sorted((ROOT / "kaggle_cells").glob("cell_*.py"))
SECTIONS = [cell for file in FILES[2:8] for cell in [file]]  # 3 to 8, which define and do no work
LONGER: dict[str, str] = {}  # a function or class of more lines, and the reason


def code_cells(file) -> list[str]:
    cells = jupytext.reads(file.read_text(encoding="utf-8"), fmt="py:percent").cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_code_cell_fits_on_a_screen(file):
    lengths = [len(source.splitlines()) for source in code_cells(file)]
    assert max(lengths) <= 60, f"cell {lengths.index(max(lengths)) + 1} has {max(lengths)} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_functions_and_classes_are_short_and_lines_fit_on_a_notebook_page(file):
    text = file.read_text(encoding="utf-8")
    limits = {ast.FunctionDef: 35, ast.ClassDef: 90}
    for node in ast.walk(ast.parse(text)):
        if type(node) in limits and node.name not in LONGER:
            length = node.end_lineno - node.lineno + 1
            assert length <= limits[type(node)], f"{node.name} has {length} lines"
    assert [line for line in text.splitlines() if len(line) > 100] == []


def test_the_notebook_is_not_long():
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in FILES) <= 3400
    lengths = [len(source.splitlines()) for file in FILES for source in code_cells(file)]
    assert statistics.median(lengths) <= 30
