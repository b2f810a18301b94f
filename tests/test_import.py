"""Edits made on Kaggle or in Jupyter come back into the scripts."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import processes
import pytest
from processes import ROOT

import build_notebook as builder
from build_notebook import SOURCE_KEY


@pytest.fixture
def edit(project, capsys):
    """Change `edit.notebook`; `edit.take()` imports it and returns what was printed."""

    class Edit:
        notebook = nbformat.read(builder.NOTEBOOK, as_version=4)
        file = project / "edited.ipynb"

        def index(self, text: str) -> int:
            return next(n for n, cell in enumerate(self.notebook.cells) if text in cell.source)

        def cell(self, text: str) -> nbformat.NotebookNode:
            return self.notebook.cells[self.index(text)]

        def insert(self, place: int, source: str, kind: str = "code") -> None:
            self.notebook.cells.insert(place, getattr(nbformat.v4, f"new_{kind}_cell")(source))

        def forget(self) -> None:
            """As if pasted by hand: no metadata, no ids."""
            self.notebook.metadata, self.notebook.nbformat_minor = {}, 4
            for cell in self.notebook.cells:
                cell.metadata = {}
                cell.pop("id", None)

        def take(self, dry_run: bool = False) -> str:
            self.file.write_text(json.dumps(self.notebook), encoding="utf-8")
            builder.import_edits(self.file, dry_run)
            return capsys.readouterr().out

        def refused(self, match: str) -> None:
            before = contents(project)
            with pytest.raises(builder.Failure, match=match):
                self.take()
            assert contents(project) == before

    return Edit()


def contents(project: Path) -> dict[str, str]:
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted((project / "kaggle_cells").glob("*.py"))
    }


def changes(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name[:7] for name in before if before[name] != after[name]}


def assert_given_back(notebook: nbformat.NotebookNode) -> None:
    """build after import gives the edited notebook back."""
    built = builder.assemble()
    assert [(cell.cell_type, cell.source) for cell in built.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]


def test_import_after_build_changes_nothing(edit, project):
    before = contents(project)
    assert "Nothing to do" in edit.take() and contents(project) == before


@pytest.mark.parametrize("forgotten", [False, True])
def test_changed_new_and_deleted_cells_go_to_their_files(edit, project, forgotten):
    before = contents(project)
    changed, deleted = (
        edit.cell("class FocalLoss"),
        edit.index("**The backbone** is any classification model"),
    )
    changed.source = changed.source.replace("gamma: float = 2.0", "gamma: float = 1.5")
    del edit.notebook.cells[deleted]
    edit.insert(edit.index("def train_one_epoch") + 1, "print('a new cell')")
    edit.insert(edit.index("def train_one_epoch") + 2, "And *some* words.", "markdown")
    edit.insert(len(edit.notebook.cells), "print('at the very end')")
    if forgotten:
        edit.forget()
    said = edit.take()
    after = contents(project)
    assert changes(before, after) == {"cell_05", "cell_06", "cell_07", "cell_14"}
    assert "gamma: float = 1.5" in after["cell_06_loss_and_utils.py"]
    assert "# And *some* words." in after["cell_07_training_functions.py"]
    assert after["cell_14_results_summary.py"].endswith("# %%\nprint('at the very end')\n")
    assert (
        "cell_06_loss_and_utils.py: 1 changed\n" in said
        and "cell_07_training_functions.py: 2 new\n" in said
    )
    assert (
        "cell_05_model_definition.py: 1 deleted\n" in said and "-# **The backbone** is any" in said
    )
    assert_given_back(edit.notebook)


def test_a_dry_run_shows_the_same_and_writes_nothing(edit, project):
    before = contents(project)
    edit.cell("LEARNING_RATE: float").source += "\nprint(SEED)"
    said = edit.take(dry_run=True)
    assert contents(project) == before and "+print(SEED)" in said and "nothing was written" in said
    assert edit.take().replace("Written. Now", "") != said and contents(project) != before


def test_a_first_cell_that_was_rewritten_stays_in_its_file(edit, project):
    title = edit.cell("## 6. ")
    title.source = "## 6. Something else altogether"
    edit.take()
    assert contents(project)["cell_06_loss_and_utils.py"].startswith(
        "# %% [markdown]\n# ## 6. Something else"
    )
    assert_given_back(edit.notebook)


def test_a_split_cell_and_a_moved_one(edit, project):
    cell, place = edit.cell("def fit_threshold"), edit.index("def fit_threshold")
    head, tail = cell.source.split("def fit_threshold", 1)
    cell.source = head.rstrip()
    second = nbformat.v4.new_code_cell("def fit_threshold" + tail, metadata=dict(cell.metadata))
    edit.notebook.cells.insert(place + 1, second)
    moved = edit.notebook.cells.pop(edit.index("def build_model"))
    edit.notebook.cells.insert(edit.index("def train_one_epoch") + 1, moved)
    said = edit.take()
    assert (
        "def build_model" in contents(project)["cell_07_training_functions.py"]
        and "1 moved here" in said
    )
    assert "cell_05_model_definition.py: 1 moved away\n" in said
    assert_given_back(edit.notebook)


def test_magics_shell_lines_and_empty_cells_are_left_out(edit, project):
    before = contents(project)
    first = edit.cell("import torch\n")
    first.source = (
        "%%time\n!pip install -q \\\n  something\n" + first.source + "\n%matplotlib inline\nCONFIG?"
    )
    edit.insert(3, "%%bash\nls -l")
    edit.insert(5, "!nvidia-smi\n\n%load_ext tensorboard")
    edit.insert(6, "   \n")
    said = edit.take()
    assert contents(project) == before and "Nothing to do" in said and said.count("Left out: ") == 3


def test_a_percent_sign_in_python_is_not_a_magic(edit, project):
    edit.cell(
        "def mixed_seed"
    ).source += '\n\nTEXT = """\n%d of them\n!important\n""" % 3\nREST = (7\n% 4)'
    edit.take()
    assert "\n%d of them\n!important\n" in contents(project)["cell_02_global_config.py"]
    assert_given_back(edit.notebook)


def test_magics_that_are_commented_out_are_comments_and_names_of_commands_are_names(edit, project):
    edit.insert(40, "# !pip install something\n# %matplotlib inline\ncat, ls = 1, 2\nls")
    edit.take()
    assert "# !pip install something\n# %matplotlib inline\n" in "".join(contents(project).values())
    assert_given_back(edit.notebook)


def test_a_notebook_that_papermill_executed(edit, project, failed_run):
    """Outputs, injected parameters and error notices are left out; the edit is imported."""
    before = contents(project)
    edit.notebook = nbformat.read(
        failed_run.folder / "deepfake_detection.unfinished.ipynb", as_version=4
    )
    assert edit.cell('BACKBONE = "resnet5O"') and any(
        cell.get("outputs") for cell in edit.notebook.cells
    )
    edit.insert(edit.index("class Config") + 1, "raise RuntimeError('here it ends')")
    said = edit.take()
    after = contents(project)
    assert (
        changes(before, after) == {"cell_02"}
        and 'BACKBONE = "resnet5O"' not in after["cell_02_global_config.py"]
    )
    assert "+raise RuntimeError('here it ends')" in said and said.count("added by papermill") >= 2
    edit.notebook.cells[
        edit.index('BACKBONE = "resnet5O"')
    ].metadata = {}  # a tag that another tool dropped
    assert "Nothing to do" in edit.take()


@pytest.mark.parametrize(
    "version",
    [
        "3.0",
        *(pytest.param(version, marks=pytest.mark.slow) for version in ("4.0", "4.2", "4.4")),
        "4.5 without ids",
    ],
)
def test_notebooks_of_other_jupyter_versions(edit, project, version):
    before = contents(project)
    edit.cell("EPOCHS: int = 25").source = edit.cell("EPOCHS: int = 25").source.replace(
        "EPOCHS: int = 25", "EPOCHS: int = 7"
    )
    for cell in edit.notebook.cells:
        cell.pop("id")
    edit.notebook.nbformat_minor = int(version[2])
    if version == "3.0":
        edit.notebook = nbformat.convert(edit.notebook, 3)
    edit.take()
    after = contents(project)
    assert (
        changes(before, after) == {"cell_02"}
        and "EPOCHS: int = 7" in after["cell_02_global_config.py"]
    )
    assert '# %% tags=["parameters"]' in after["cell_02_global_config.py"]


def test_files_pasted_whole_into_cells_come_apart_again(edit, project):
    before = contents(project)
    texts = [text.replace("gamma: float = 2.0", "gamma: float = 3.0") for text in before.values()]
    edit.notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in texts]
    )
    edit.take()
    after = contents(project)
    assert changes(before, after) == {"cell_06"}
    assert after["cell_06_loss_and_utils.py"] == texts[5]


def test_a_cell_that_moves_within_its_file(edit, project):
    first, second = edit.index("def file_size"), edit.index("REAL_COLOUR, FAKE_COLOUR =")
    edit.notebook.cells.insert(first, edit.notebook.cells.pop(second))
    assert "cell_01_imports_and_setup.py: in another order\n" in edit.take()
    assert_given_back(edit.notebook)


def test_what_cannot_be_placed_is_refused_and_nothing_is_written(edit):
    edit.cell("class FocalLoss").metadata[SOURCE_KEY] = "kaggle_cells/cell_15_more.py"
    edit.refused(
        r"cell \d+ \('.*'\) comes from kaggle_cells/cell_15_more.py, which does not exist here"
    )


@pytest.mark.parametrize("line", ["def broken(:", "files = !ls", "await something()"])
def test_code_that_is_not_python_is_refused_with_the_line(edit, line):
    edit.insert(40, f"import os\n{line}\nprint(os)")
    edit.refused(
        rf"cell 41 \('import os'\) is not valid Python, even without magics: '{re.escape(line)}': "
    )


def test_a_lost_script_is_refused(edit):
    edit.notebook.cells = [
        cell for cell in edit.notebook.cells if "cell_07" not in cell.metadata[SOURCE_KEY]
    ]
    edit.refused("Nothing is left of kaggle_cells/cell_07_training_functions.py")


def test_lost_parameters_are_refused(edit):
    del edit.notebook.cells[edit.index("EPOCHS: int = 25")]
    edit.refused("The parameters cell of section 2 is missing")


def test_a_cell_without_metadata_between_two_files_is_refused_where_it_may_belong_to_either(edit):
    edit.forget()
    place = edit.index("## 6. ")
    edit.notebook.cells[place].source = "Words that nobody has seen before."
    edit.refused(
        "may be new at the end of kaggle_cells/cell_05.* or replace the start of .*cell_06"
    )


def test_pictures_in_cells_are_refused(edit):
    edit.cell("## 6. ").attachments = {"picture.png": {"image/png": "aGVsbG8="}}
    edit.refused("contains pictures")


def test_another_notebook_is_refused(edit):
    edit.notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('hello')")])
    edit.refused("No cell of this notebook is known here")


@pytest.mark.parametrize(
    "text", ["", "no notebook", "{}", '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}']
)
def test_a_file_that_is_not_a_notebook_is_a_clear_error(edit, tmp_path, text):
    file = tmp_path / "odd.ipynb"
    file.write_text(text)
    with pytest.raises(builder.Failure, match=r"odd.ipynb cannot be read as a notebook"):
        builder.import_edits(file, dry_run=False)


def test_edits_of_an_older_notebook_come_with_a_warning(edit, project):
    newer = project / "kaggle_cells" / "cell_06_loss_and_utils.py"
    newer.write_text(newer.read_text(encoding="utf-8") + "\nNEWER = 1\n", encoding="utf-8")
    said = edit.take(dry_run=True)
    assert "-NEWER = 1" in said and "built from a different version of the scripts" in said


def test_the_command(tmp_path):
    copy = tmp_path / "project"
    copy.mkdir()
    shutil.copytree(
        ROOT / "kaggle_cells", copy / "kaggle_cells", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "notebooks", copy / "notebooks")
    shutil.copy(ROOT / "build_notebook.py", copy)
    notebook = nbformat.read(copy / "notebooks" / "deepfake_detection.ipynb", as_version=4)
    notebook.cells[-1].source += "\nprint('done')"
    nbformat.write(notebook, copy / "notebooks" / "deepfake_detection.ipynb")

    def command(*arguments: str, expect: int = 0) -> str:
        return processes.run([copy / "build_notebook.py", *arguments], copy, expect)

    edited = "notebooks/deepfake_detection.ipynb"
    command("check", expect=1)
    assert "+print('done')" in command("import", edited, "--dry-run")
    command("check", expect=1)
    command("import", edited)
    command()
    command("check")
    assert "Nothing to do" in command("import", edited)
    missing = command("import", "elsewhere.ipynb", expect=1)
    assert missing.startswith("elsewhere.ipynb cannot be read as a notebook")
