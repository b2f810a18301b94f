"""Shared fixtures: a small demo set, its clips, and one finished run of the notebook."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TQDM_DISABLE", "1")

import build_notebook as builder  # noqa: E402
from cell_03_data_processing import ClipSettings, cache_clips, find_videos, load_face_detector, make_demo_set  # noqa: E402

SMALL = ClipSettings(frames=4, seconds=8.0, size=64, face_crop=True, margin=0.25)


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """12 real demo videos and a fake of each."""
    return make_demo_set(tmp_path_factory.mktemp("demo"), 12, seed=42, workers=2)


@pytest.fixture(scope="session")
def face_detector():
    return load_face_detector("cpu")


@pytest.fixture(scope="session")
def clip_table(demo_set, face_detector, tmp_path_factory) -> pd.DataFrame:
    """The demo set's videos with small cached clips."""
    usable, skipped = cache_clips(find_videos(demo_set), SMALL, tmp_path_factory.mktemp("cache"), face_detector, 2)
    assert skipped.empty
    return usable


@dataclass
class Run:
    folder: Path
    output: str

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results" / "experiment_results.json").read_text())

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name)


def run_notebook(folder: Path, *arguments: str, expect: int = 0) -> Run:
    """`python build_notebook.py run ARGUMENTS`, somewhere without a ./data folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "build_notebook.py"), "run", *arguments, "--output", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stdout + done.stderr
    return Run(folder, done.stdout + done.stderr)


def script(cell: str, folder: Path, **parameters: object) -> dict:
    """How to start one cell as a script in `folder`, with parameters in the environment: arguments of `Popen`."""
    environment = {**os.environ, **{f"DEEPFAKE_{name}": str(value) for name, value in parameters.items()}}
    return dict(args=[sys.executable, str(ROOT / "kaggle_cells" / f"{cell}.py")], cwd=folder, env=environment)


def run_script(cell: str, work_dir: Path, **parameters: object) -> subprocess.CompletedProcess:
    """One cell as a script, run to its end."""
    start = script(cell, work_dir, **parameters, WORK_DIR=work_dir)
    return subprocess.run(**start, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Run:
    """The notebook executed with ci.yaml, demo set and all."""
    return run_notebook(tmp_path_factory.mktemp("notebook") / "run", "ci")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the sources that a test may change."""
    for folder in ("kaggle_cells", "notebooks"):
        (tmp_path / folder).mkdir()
    for file in (ROOT / "kaggle_cells").glob("*.py"):
        (tmp_path / "kaggle_cells" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "CELLS", tmp_path / "kaggle_cells")
    monkeypatch.setattr(builder, "NOTEBOOK", tmp_path / "notebooks" / "deepfake_detection.ipynb")
    builder.build()
    return tmp_path
