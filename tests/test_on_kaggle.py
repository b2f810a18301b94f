"""The notebook as on Kaggle: read-only inputs, offline, unattended, facenet-pytorch in a wheel.

A real Kaggle differs in its paths alone: here its `/kaggle` and `/tmp/clip_cache` lie in a
temporary folder.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import nbformat
import papermill
import pytest
import torch
import torchvision
from conftest import CI, Run
from processes import command
from test_end_to_end import PROMISED

import build_notebook as builder

OFFLINE = {
    **dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    ),  # nobody there
    **dict.fromkeys(("no_proxy", "NO_PROXY", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"), ""),
    "PIP_INDEX_URL": "https://pypi.org/simple",
    "PIP_CONFIG_FILE": os.devnull,
}
SAVE_VERSION = """
import nbclient, nbformat
notebook = nbformat.read("../../asked.ipynb", as_version=4)
try:
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, "executed.ipynb")
"""


def python_without_facenet(folder: Path) -> Path:
    """A virtual environment with every package of this one but facenet-pytorch."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith("facenet_pytorch"):
            (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    own = next((folder / "venv").glob("lib/python*/site-packages"))
    (own / "all_but_facenet.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin" / "python"


def make_wheel(folder: Path) -> None:
    """The wheel of the installed facenet-pytorch, as `pip download` would give it."""
    folder.mkdir(parents=True)
    installed = importlib.metadata.distribution("facenet-pytorch")
    with zipfile.ZipFile(
        folder / f"facenet_pytorch-{installed.version}-py3-none-any.whl", "w"
    ) as wheel:
        for file in installed.files or []:
            if file.suffix != ".pyc" and file.name not in (
                "INSTALLER",
                "REQUESTED",
                "direct_url.json",
            ):
                wheel.write(file.locate(), str(file))


def copy_half(videos: Path, folder: Path) -> None:
    """Every other person of the demo set, real and fake."""
    shutil.copytree(videos, folder, ignore=shutil.ignore_patterns("*[13579].mp4", "*[13579]__*"))


@dataclass
class Kaggle:
    """One session: attach files below `inputs`, then `run_all`."""

    folder: Path

    @property
    def inputs(self) -> Path:
        return self.folder / "kaggle" / "input"

    def contents(self) -> list:
        return sorted(
            (str(file), file.stat().st_size, file.stat().st_mtime_ns)
            for file in self.inputs.rglob("*")
        )

    def run_all(self, expect: int, **parameters: object) -> Run:
        """Save Version: the whole notebook, unattended, in /kaggle/working."""
        working = self.folder / "kaggle" / "working"
        working.mkdir(parents=True)
        for place in [self.inputs, *self.inputs.rglob("*")]:
            place.chmod(0o555 if place.is_dir() else 0o444)
        notebook = builder.assemble()
        for cell in notebook.cells:
            for path in ("/kaggle/", "/tmp/clip_cache"):
                cell.source = cell.source.replace(f'"{path}', f'"{self.folder}{path}')
        given = {**CI, "DATA_DIR": "auto", "PRETRAINED": True, **parameters}
        asked = self.folder / "asked.ipynb"
        nbformat.write(notebook, asked)
        papermill.execute_notebook(asked, asked, given, prepare_only=True, progress_bar=False)
        environment = {**OFFLINE, "KAGGLE_KERNEL_RUN_TYPE": "Batch", "HOME": self.folder}
        environment["MPLCONFIGDIR"] = matplotlib.get_configdir()  # its list of fonts takes a while
        words = [python_without_facenet(self.folder), "-c", SAVE_VERSION]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("TQDM_DISABLE", "PYTHONPATH", "JUPYTER_PATH"):
                patch.delenv(name, raising=False)
            return Run(working, command(words, working, expect, **environment))


def shown(run: Run) -> str:
    """Everything that the executed notebook shows."""
    notebook = nbformat.read(run.folder / "executed.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    return "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )


@pytest.fixture(scope="module")
def first_session(demo_set, tmp_path_factory) -> tuple[Kaggle, Run, list]:
    """Kaggle's layout of today, with time for one epoch."""
    kaggle = Kaggle(tmp_path_factory.mktemp("today"))
    mounted = kaggle.inputs / "datasets" / "somebody"
    copy_half(demo_set, mounted / "face-videos" / "videos")
    make_wheel(mounted / "wheels")
    (mounted / "backbones").mkdir()
    torch.save(
        {"state_dict": torchvision.models.get_model(CI["BACKBONE"]).state_dict()},
        mounted / "backbones" / f"{CI['BACKBONE']}-mine.pth",
    )
    before = kaggle.contents()
    return kaggle, kaggle.run_all(0, EPOCHS=3, TIME_BUDGET_HOURS=1e-6, ROBUSTNESS=0), before


def test_everything_works_offline_with_attached_wheels_and_weights(first_session):
    kaggle, run, before = first_session
    text = shown(run)
    assert "Kaggle, unattended" in text and "not reachable" in text and "%|" not in text
    assert run.results["model"]["initial_weights"].endswith(
        f"somebody/backbones/{CI['BACKBONE']}-mine.pth"
    )
    assert run.results["data"]["origin"] == str(kaggle.inputs)
    assert (run.table("data/test.csv").face_share > 0).all(), "no faces found"
    for name in {*PROMISED} - {"results/evaluation/robustness.png"}:
        assert (run.folder / name).stat().st_size > 0, name
    assert kaggle.contents() == before, "the inputs were written to"
    assert (
        list((kaggle.folder / "tmp" / "clip_cache").iterdir())
        and not (run.folder / "cache").exists()
    )


@pytest.mark.slow
def test_a_later_session_in_the_older_layout_goes_on_from_the_attached_output(
    first_session, demo_set, tmp_path
):
    _, earlier, _ = first_session
    kaggle = Kaggle(tmp_path)
    copy_half(demo_set, kaggle.inputs / "face-videos")
    make_wheel(kaggle.inputs / "wheels" / "deep")
    shutil.copytree(earlier.folder, kaggle.inputs / "my-notebook")
    before = kaggle.contents()
    run = kaggle.run_all(0, EPOCHS=3, ROBUSTNESS=0)
    text = shown(run)
    assert "Resuming after epoch 1 of " in text and "my-notebook/models/last_checkpoint.pth" in text
    assert run.table("results/training_history.csv").epoch.tolist() == [1, 2, 3]
    assert run.results["data"]["videos"] == earlier.results["data"]["videos"]
    assert kaggle.contents() == before


@pytest.mark.slow
def test_without_the_wheel_the_run_ends_early_and_says_what_to_attach(demo_set, tmp_path):
    kaggle = Kaggle(tmp_path)
    shutil.copytree(demo_set, kaggle.inputs / "face-videos")
    run = kaggle.run_all(1)
    assert "facenet_pytorch could not be installed" in run.output
    assert 'attach a dataset with the wheels of "facenet-pytorch==2.5.3"' in run.output
    assert "Note: facenet_pytorch could not be installed" in shown(run)
