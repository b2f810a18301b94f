"""Shared fixtures: a small demo set, its clips, and one finished run of the notebook.

The libraries and the cells are imported by the fixtures that need them: pytest-xdist's main process
needs neither.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest
import yaml
from filelock import FileLock
from processes import ROOT, Program

if TYPE_CHECKING:
    import pandas as pd

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many tests run at once as there are cores
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
SMALL: dict[str, Any] = dict(
    frames=4, seconds=8.0, size=64, face_crop=True, margin=0.25
)  # ClipSettings
CI = yaml.safe_load((ROOT / "notebooks" / "params" / "ci.yaml").read_text(encoding="utf-8"))
CI_WITHOUT_ROBUSTNESS = {
    **CI,
    "ROBUSTNESS": 0,
}  # its twelve passes over the test set take longer than the training

LONGEST = (
    "test_end_to_end",
    "test_on_kaggle",
    "test_import",  # needs no run of the others, which is not finished yet
    "test_cell_12_training_loop",
    "test_build_notebook",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that all workers end at about the same time."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(place)), -item.path.stat().st_size))


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)` is a folder that `make` fills, in whichever worker asks for it first."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        place, done = shared / "shared" / name, shared / "shared" / f".{name}.done"
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                make(place)
                done.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def demo_set(once) -> Path:
    """12 real demo videos and a fake of each."""
    from cell_03_data_processing import make_demo_set

    return once("demo_set", lambda folder: make_demo_set(folder, 12, seed=42, workers=2))


@pytest.fixture(scope="session")
def face_detector():
    from cell_03_data_processing import load_face_detector

    return load_face_detector("cpu")


@pytest.fixture(scope="session")
def clip_table(demo_set, face_detector, once) -> "pd.DataFrame":
    """The demo set's videos with small cached clips."""
    from cell_03_data_processing import ClipSettings, cache_clips, find_videos

    def make(folder: Path) -> tuple:
        return cache_clips(find_videos(demo_set), ClipSettings(**SMALL), folder, face_detector, 2)

    usable, skipped = make(once("clips", make))
    assert skipped.empty
    return usable


@dataclass
class Run:
    folder: Path
    output: str

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results" / "experiment_results.json").read_text())

    def table(self, name: str) -> "pd.DataFrame":
        import pandas as pd

        return pd.read_csv(self.folder / name)


def run_notebook(folder: Path, *arguments: object, expect: int = 0) -> Run:
    """`python build_notebook.py run ARGUMENTS`, away from ./data, with a real kernel process."""
    words = [ROOT / "build_notebook.py", "run", *arguments, "--output", folder]
    return Run(folder, processes.run(words, folder.parent, expect))


def in_environment(parameters: dict) -> dict[str, Any]:
    """Parameters as the variables that scripts read them from. Figures are for `finished_run`."""
    return {"UNDRAWN": 1, **{f"DEEPFAKE_{name}": value for name, value in parameters.items()}}


def start_script(cell: str, folder: Path, **parameters: Any) -> Program:
    """Start one cell as a script in a folder."""
    return Program([ROOT / "kaggle_cells" / f"{cell}.py"], folder, **in_environment(parameters))


def run_script(cell: str, folder: Path, expect: int = 0, **parameters: Any) -> str:
    """One cell as a script in a folder, run to its end; returns what it printed."""
    words = [ROOT / "kaggle_cells" / f"{cell}.py"]
    return processes.run(words, folder, expect, **in_environment(parameters))


def program_file(folder: Path, program: str) -> Path:
    """A Python file in a folder that has the cells to import."""
    folder.mkdir(parents=True, exist_ok=True)
    preamble = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT / 'kaggle_cells')!r})\n"
    file = folder / "program.py"
    file.write_text(preamble + program, encoding="utf-8")
    return file


def run_program(program: str, folder: Path, expect: int = 0, **parameters: Any) -> str:
    """A program that can import the cells, run to its end in a folder; returns what it printed."""
    return processes.run(
        [program_file(folder, program)], folder, expect, **in_environment(parameters)
    )


@pytest.fixture(scope="session")
def finished_run(once) -> Run:
    """The notebook executed with ci.yaml, demo set and all, by the command that users type."""

    def make(folder: Path) -> None:
        words = [
            sys.executable,
            ROOT / "build_notebook.py",
            "run",
            "ci",
            "--output",
            folder / "run",
        ]
        (folder / "output.txt").write_text(processes.command(words, folder), encoding="utf-8")

    folder = once("notebook", make)
    return Run(folder / "run", (folder / "output.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def failed_run(once) -> Run:
    """A run with a wrong parameter, which ends in section 2, where an earlier notebook lies."""

    def make(folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run" / "deepfake_detection.ipynb").write_text("with all its figures")
        failed = run_notebook(folder / "run", "ci", "-p", "BACKBONE", "resnet5O", expect=1)
        (folder / "output.txt").write_text(failed.output, encoding="utf-8")

    folder = once("failed", make)
    return Run(folder / "run", (folder / "output.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def its_clips(finished_run) -> dict[str, Path]:
    """Parameters for further runs on the videos and clips of the finished one."""
    return {
        "DATA_DIR": finished_run.folder / "demo_videos_42",
        "CACHE_DIR": finished_run.folder / "cache",
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the sources that a test may change."""
    import build_notebook as builder

    for folder in ("kaggle_cells", "notebooks"):
        (tmp_path / folder).mkdir()
    for file in (ROOT / "kaggle_cells").glob("*.py"):
        (tmp_path / "kaggle_cells" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "CELLS", tmp_path / "kaggle_cells")
    monkeypatch.setattr(builder, "NOTEBOOK", tmp_path / "notebooks" / "deepfake_detection.ipynb")
    builder.build()
    return tmp_path
