# %% [markdown]
# # Is this video a deepfake?
#
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/YOUR_GITHUB_NAME/video-deepfake-detection/blob/main/notebooks/deepfake_detection.ipynb)
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_GITHUB_NAME/video-deepfake-detection/blob/main/notebooks/deepfake_detection.ipynb)
#
# This notebook trains a detector on videos of real and manipulated faces, tests it on recordings it has never
# seen, says how far its numbers can be trusted, and scores your own videos with it. It is for anyone who wants a
# deepfake detector of their own, or wants to know what one is worth; to run it you need no more than a dataset.
#
# Each video becomes a short **clip** of face crops. A network looks at every frame, reads the frames in order,
# decides which of them matter, and answers with one probability.
#
# ```
# video
#   │  16 frames of 8 seconds
#   ▼
# face crops, 160 x 160
#   ▼
# ResNet50 ───────────┐
#   ▼                 ▼
# BiLSTM          a score for
#   ▼             each frame
# self-attention      │
#   ▼                 │
# mean, spread        │
#   └───▶ P(fake) ◀───┘
# ```
#
# **Run it** from top to bottom. On Kaggle, choose *Settings ▸ Accelerator ▸ GPU T4 x2* and attach a dataset
# with *Add Input*, for example `xdxd003/ff-c23`. With no dataset at all it makes a small demo set and still
# runs to the end. Everything you may want to change is one screen of parameters, in section 2.
#
# | Section | |
# |---|---|
# | [1. Imports and environment](#section-1) | what this machine can do |
# | [2. Parameters](#section-2) | everything that you can change |
# | [3. From a folder of videos to clips](#section-3) | find, split, sample, crop, cache |
# | [4. Clips as tensors, and what happens to them on the way](#section-4) | pairs, augmentation, self-blends |
# | [5. The model](#section-5) | backbone, BiLSTM, self-attention; weights |
# | [6. Loss, early stopping, averaged weights, checkpoints](#section-6) | what guides and guards training |
# | [7. One epoch of training, one of validation](#section-7) | and as many clips at once as fit |
# | [8. Calibration, metrics, explanations, figures, prediction](#section-8) | what a verdict is worth |
# | [9. The videos become clips and splits](#section-9) | **here the work starts** |
# | [10. Loaders and batch size](#section-10) | as much at once as fits |
# | [11. Model, optimizer, and where the last run stopped](#section-11) | new, or resumed |
# | [12. Training](#section-12) | the long part |
# | [13. The test set, and your own videos](#section-13) | **the result** |
# | [14. Results for people and for programs](#section-14) | report, files, what to try next |

# %% [markdown]
# <a id="section-1"></a>
# ## 1. Imports and environment
#
# What this machine offers decides much of what follows: whether a GPU is there *and works*, which libraries are
# installed, how much memory and disk is left, whether the internet is in reach.

# %%
import glob
import http.client
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A damaged video makes FFmpeg and OpenCV print lines that do not name it; skipped.csv does, with the reason.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
# Of the processes that torchrun starts to train together, the first one prepares, writes and talks.
RANK, LOCAL_RANK, PROCESSES = 0, 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, LOCAL_RANK, PROCESSES = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
if RANK:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115

STARTED = time.time()
IN_NOTEBOOK = "__file__" not in globals()
ON_KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ or Path("/kaggle/working").is_dir()
ON_COLAB = "google.colab" in sys.modules
# A program that imports these files for a Predictor wants no tables, and no request to the internet.
SHOW_TABLES = IN_NOTEBOOK or Path(sys.argv[0]).name.startswith("cell_")

# %% [markdown]
# **Packages.** Kaggle's image has all of them but `facenet-pytorch`, which brings the face detector together with its
# weights. What is missing is installed there, and on Colab: from wheels in an attached dataset, else from the internet.
# Nothing that is there already is changed, so its outdated pins on other libraries do no harm. Elsewhere you get the
# command to run.

# %%
REQUIREMENTS = {
    "torch": "torch>=2.4",
    "torchvision": "torchvision>=0.19",
    "cv2": "opencv-python-headless>=4.8",
    "facenet_pytorch": "facenet-pytorch==2.5.3",
    "sklearn": "scikit-learn>=1.3",
    "pandas": "pandas>=2.0",
    "matplotlib": "matplotlib>=3.8",
    "psutil": "psutil>=5.9",
    "yaml": "PyYAML>=6.0",
    "tqdm": "tqdm>=4.66",
    "IPython": "ipython>=8.0",
}
OPENCV = [
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
]


def attached_files(
    pattern: str, inputs: Path = Path("/kaggle/input"), depths: Iterable[int] = range(7)
) -> list[Path]:
    """Files below /kaggle/input, so many folders deep, whose paths end like this."""
    return sorted(
        Path(file) for depth in depths for file in glob.glob(f"{inputs}/{'*/' * depth}{pattern}")
    )


def install(requirement: str) -> str:
    """Install one package and nothing else, from attached wheels or from PyPI. Returns pip's reason for a failure."""
    wheels = attached_files(re.split("[=<>]", requirement)[0].replace("-", "_") + "-*.whl")
    folders = [option for wheel in wheels for option in ("--find-links", str(wheel.parent))]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--timeout",
        "10",
        "--retries",
        "0",
    ]
    for source in ([["--no-index", *folders]] if wheels else []) + [[]]:
        done = subprocess.run([*command, *source, requirement], capture_output=True, text=True)
        if done.returncode == 0:
            break
    importlib.invalidate_caches()
    return done.stderr.strip().rpartition("\n")[2]


def ensure_packages(*modules: str) -> None:
    """Make modules of REQUIREMENTS importable; on Kaggle, missing ones are installed.

    Raises ImportError with all that are still missing and what to do.
    """
    missing = [module for module in modules if not importlib.util.find_spec(module)]
    reasons = [install(REQUIREMENTS[module]) for module in missing] if ON_KAGGLE or ON_COLAB else []
    missing = [module for module in missing if not importlib.util.find_spec(module)]
    if not missing:
        return
    wanted = " ".join(f'"{REQUIREMENTS[module]}"' for module in missing)
    message = (
        f"{', '.join(missing)} cannot be imported. Install with: python -m pip install {wanted}"
    )
    if ON_KAGGLE:
        message = (
            f"{', '.join(missing)} could not be installed ({'; '.join(filter(None, reasons))}). Turn on Settings > "
            f"Internet, or attach a dataset with the wheels of {wanted}."
        )
    raise ImportError(message)


ensure_packages(*(module for module in REQUIREMENTS if module != "facenet_pytorch"))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure

# %% [markdown]
# **The machine.** A GPU can be present and still useless: PyTorch lists a P100 as available, but recent builds hold no
# code for it and fail at the first operation. So the probe tries one.


# %%
@dataclass(frozen=True)
class Environment:
    """What the machine offers. `gpus` names the usable CUDA devices, `gpu_ids` numbers them; memory is in GiB."""

    machine: str
    interactive: bool
    device: str
    gpus: tuple[str, ...]
    gpu_ids: tuple[int, ...]
    gpu_gib: tuple[float, ...]
    precision: str
    cpu_cores: int
    ram_gib: float
    free_disk_gib: float
    internet: bool
    versions: dict[str, str]
    advice: tuple[str, ...]


def is_interactive() -> bool:
    """Whether somebody looks on: not with papermill, nbconvert and Kaggle's Save Version, where nobody can answer."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return os.environ["KAGGLE_KERNEL_RUN_TYPE"] != "Batch"
    if IN_NOTEBOOK:
        return getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", True)
    return sys.stderr.isatty()


def native_precision(device: str | torch.device) -> str:
    """What a device computes fast: bf16 from compute capability 8 on, fp16 on older GPUs such as the T4, else fp32."""
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def internet_is_reachable(seconds: float = 3.0) -> bool:
    """Whether PyPI answers within this time, which even a name that nobody resolves cannot stretch."""
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request("https://pypi.org/simple/pip/", method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answers.append(True)
        except (OSError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return any(answers)


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages of REQUIREMENTS; OpenCV's goes by several names."""
    versions = {"python": platform.python_version()}
    for module, requirement in REQUIREMENTS.items():
        names = OPENCV if module == "cv2" else [re.split("[=<>]", requirement)[0]]
        found = [
            package.version
            for name in names
            for package in importlib.metadata.distributions(name=name)
        ]
        versions[module] = (
            found or ["unknown" if importlib.util.find_spec(module) else "not installed"]
        )[0]
    return versions


def probe_gpus() -> tuple[dict[int, str], list[str]]:
    """The names of the GPUs that can compute, by number, and advice for what stands in the way of others."""
    gpus, advice = {}, []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count) if PROCESSES == 1 else range(LOCAL_RANK, min(LOCAL_RANK + 1, count)):
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            gpus[index] = name
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            advice.append(
                f"GPU {index} ({name}) is there, but torch {torch.__version__} cannot compute on it ({reason}). "
                "On Kaggle choose Settings > Accelerator > GPU T4 x2; elsewhere install a torch build for it."
            )
    if not count and not torch.version.cuda and shutil.which("nvidia-smi"):
        advice.append(
            f"torch {torch.__version__} is built for the CPU alone: install one for CUDA to use the GPU."
        )
    if not gpus:
        turn_on = " Choose Settings > Accelerator > GPU T4 x2." if ON_KAGGLE and not count else ""
        advice.append(
            "No usable GPU: training runs on the CPU, which is practical for the demo set only."
            + turn_on
        )
    return gpus, advice


def probe_environment() -> Environment:
    """Look at the machine, try its GPUs, and collect advice for what will not work."""
    gpus, advice = probe_gpus()
    device = f"cuda:{min(gpus)}" if gpus else "cpu"
    internet = SHOW_TABLES and RANK == 0 and internet_is_reachable()
    free_disk = shutil.disk_usage(".").free / 2**30
    try:
        ensure_packages("facenet_pytorch")
    except ImportError as error:
        advice.append(f"{error} Without it there are no face crops, only FACE_CROP = False.")
    if ON_KAGGLE and not internet:
        advice.append(
            "No internet: ImageNet weights must come from an attached dataset (section 5). Or set Internet to On."
        )
    if free_disk < 2:
        advice.append(
            f"Only {free_disk:.1f} GiB are free in {Path.cwd()}: checkpoints alone can take one."
        )
    return Environment(
        machine="Kaggle" if ON_KAGGLE else "Colab" if ON_COLAB else platform.system(),
        interactive=is_interactive(),
        device=device,
        gpus=tuple(gpus.values()),
        gpu_ids=tuple(gpus),
        gpu_gib=tuple(
            torch.cuda.get_device_properties(index).total_memory / 2**30 for index in gpus
        ),
        precision=native_precision(device),
        cpu_cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        ram_gib=psutil.virtual_memory().total / 2**30,
        free_disk_gib=free_disk,
        internet=internet,
        versions=installed_versions(),
        advice=tuple(advice),
    )


def environment_table(found: Environment) -> pd.DataFrame:
    """The environment for people."""
    gpus = Counter(
        f"{name}, {gib:.0f} GiB" for name, gib in zip(found.gpus, found.gpu_gib, strict=True)
    )
    shown = ("python", "torch", "torchvision", "cv2", "facenet_pytorch", "sklearn", "pandas")
    rows = {
        "machine": f"{found.machine}, {'interactive' if found.interactive else 'unattended'}",
        "GPU": "; ".join(f"{number} x {kind}" for kind, number in gpus.items()) or "none",
        "precision": found.precision,
        "CPU, memory": f"{found.cpu_cores} cores, {found.ram_gib:.0f} GiB",
        "free disk": f"{found.free_disk_gib:.0f} GiB in {Path.cwd()}",
        "internet": "reachable" if found.internet else "not reachable",
        **{name: found.versions[name] for name in shown},
    }
    return pd.Series(rows, name="environment").to_frame()


ENVIRONMENT = probe_environment()
# A saved notebook keeps every progress bar as it first appeared, at 0 %; so do logs.
NO_BARS = RANK > 0 or "TQDM_DISABLE" in os.environ or not ENVIRONMENT.interactive
if SHOW_TABLES:
    display(environment_table(ENVIRONMENT))
    for line in ENVIRONMENT.advice:
        print("Note:", line)


# %% [markdown]
# **Files and figures.** A file is replaced as a whole or not at all. Figures share one style and two colours that
# colour-blind readers can tell apart.


# %%
@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to instead of `file`, which takes its place only when all is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_name(f".partial-{os.getpid()}-{threading.get_ident()}-{file.name}")
    try:
        yield partial_file
        os.replace(partial_file, file)
    finally:
        partial_file.unlink(missing_ok=True)


def save_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table without its index, all of it or nothing."""
    with replacing(file) as partial_file:
        table.to_csv(partial_file, index=False, errors="backslashreplace")


# %%
REAL_COLOUR, FAKE_COLOUR = "#0072B2", "#D55E00"
WIDTH = 7  # inches; with letters of 12 points it can be read on a phone
STYLE: Any = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.size": 12,
}
styled: Any = plt.rc_context(STYLE)  # decorates the functions that draw


def show_figure(figure: Figure, shown: DisplayHandle | None = None) -> DisplayHandle | None:
    """Show a figure in a notebook, and close it. Given what it returned, it shows the new one in that place."""
    if IN_NOTEBOOK and shown:
        shown.update(figure)
    elif IN_NOTEBOOK:
        shown = display(figure, display_id=True)
    plt.close(figure)
    return shown


def save_figure(
    figure: Figure, file: Path, shown: DisplayHandle | None = None
) -> DisplayHandle | None:
    """Write a figure, then show it; see `show_figure`."""
    with replacing(file) as partial_file:
        figure.savefig(partial_file, dpi=150)
    return show_figure(figure, shown)


def show_row(axes: np.ndarray, name: str, images: np.ndarray) -> None:
    """Images (N, H, W) in 0..1 or (N, H, W, 3) side by side, with a name before them."""
    for ax, image in zip(axes, images, strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel(name, rotation=0, ha="right", va="center")


# %% [markdown]
# Times and sizes as people read them, for the sections below:


# %%
def duration(seconds: float) -> str:
    """Time for people: 48 s, 6 min 54 s, 1 h 32 min, 11 h."""
    hours, rest = divmod(round(seconds), 3600)
    parts = {"h": hours, "min": rest // 60, "s": 0 if hours else rest % 60}
    return " ".join(f"{count} {unit}" for unit, count in parts.items() if count) or "0 s"


def file_size(size: int) -> str:
    """A number of bytes for people: 12 KiB, 44.1 MiB."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{-(-size // 2**10)} KiB"


# %% [markdown]
# Every section below says what it takes from earlier ones with ordinary imports, as the scripts in
# `kaggle_cells/` do. In a notebook those files need not exist: the bridge answers such an import from what has
# been run here, and names the section to run first when something is missing.

# %%
CELLS = (
    "cell_01_imports_and_setup",
    "cell_02_global_config",
    "cell_03_data_processing",
    "cell_04_dataset_class",
    "cell_05_model_definition",
    "cell_06_loss_and_utils",
    "cell_07_training_functions",
    "cell_08_evaluation_functions",
    "cell_09_data_preparation",
    "cell_10_data_loaders",
    "cell_11_model_setup",
    "cell_12_training_loop",
    "cell_13_model_evaluation",
    "cell_14_results_summary",
)


class NotebookCell(types.ModuleType):
    """Stands for the file of one section and looks its names up in the notebook."""

    def __getattr__(self, name: str) -> object:
        notebook = vars(sys.modules["__main__"])
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in notebook:
            raise ImportError(f"'{name}' is not defined yet: run {self.__name__} first")
        return notebook[name]


if IN_NOTEBOOK:
    sys.modules.update({name: NotebookCell(name) for name in CELLS})
