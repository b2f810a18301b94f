# %% [markdown]
# # Is this video a deepfake?
#
# This notebook trains a deepfake detector on your videos, tests it on recordings it has never seen,
# reports how far its numbers can be trusted, and scores new videos. Each video becomes a few short
# **clips** of face crops; a network looks at every frame, reads the frames in order, and answers:
#
# ```
# frames ─▶ crops ─▶ ResNet50
#    ┌───────────────────┤
#    ▼                   ▼
# BiLSTM, attention,  score of
# mean and spread   each frame
#    └────▶ P(fake) ◀────┘
# ```
#
# **How to run it.** On Kaggle, choose *Settings ▸ Accelerator ▸ GPU T4 x2*, attach a dataset with
# *Add Input* (for example `xdxd003/ff-c23`), then *Run All*. Without a dataset the notebook makes a
# small demo set and still runs to the end. Every setting is in section 2.
#
# | Section | |
# |---|---|
# | [1. Imports and environment](#section-1) | what this machine offers |
# | [2. Parameters](#section-2) | every setting |
# | [3. From videos or pictures to clips](#section-3) | find, split, sample, crop, cache |
# | [4. Batches and augmentation](#section-4) | pairs, augmentation |
# | [5. The model](#section-5) | backbone, BiLSTM, self-attention; weights |
# | [6. Loss, early stopping, averaged weights, checkpoints](#section-6) | what guides training |
# | [7. One epoch of training, one of validation](#section-7) | and the largest batch that fits |
# | [8. Calibration, metrics, explanations, figures, prediction](#section-8) | what a score means |
# | [9. Videos become splits and clips](#section-9) | **the work starts here** |
# | [10. Loaders and batch size](#section-10) | how many clips per step |
# | [11. Model, optimizer, and where the last run stopped](#section-11) | new or resumed |
# | [12. Training](#section-12) | the long part |
# | [13. The test set, and your own videos](#section-13) | **the results** |
# | [14. Results to read, and results for programs](#section-14) | report, files, what to try next |

# %% [markdown]
# <a id="section-1"></a>
# ## 1. Imports and environment
#
# First, a look at the machine: is there a GPU *that works*, which libraries are installed, how much
# memory and disk is free, and is there internet access?

# %%
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# FFmpeg and OpenCV report damaged videos without naming them; data/skipped.csv names them.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
# Under torchrun, all processes make clips, but only the first one writes tables and prints.
_launcher = dict(os.environ) if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, LOCAL_RANK = int(_launcher.get("RANK", 0)), int(_launcher.get("LOCAL_RANK", 0))
WORLD_SIZE = int(_launcher.get("WORLD_SIZE", 1))
if RANK:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115

STARTED = time.time()
IN_NOTEBOOK = "__file__" not in globals()
ON_KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ or Path("/kaggle/working").is_dir()
ON_COLAB = "google.colab" in sys.modules
# A program that imports these files to use a Predictor wants neither tables nor network requests.
SHOW_TABLES = IN_NOTEBOOK or Path(sys.argv[0]).name.startswith("cell_")

# %% [markdown]
# **Packages.** Kaggle has all of them except `facenet-pytorch`, the face detector and its weights.
# On Kaggle and Colab, what is missing is installed from attached wheels or from PyPI, without its
# dependencies, so nothing else changes. Elsewhere you get the command to run.

# %%
REQUIREMENTS = {
    "torch": "torch>=2.5",
    "torchvision": "torchvision>=0.20",
    "cv2": "opencv-python-headless>=4.8.0.76",
    "facenet_pytorch": "facenet-pytorch==2.5.3",
    "numpy": "numpy>=1.26",
    "pandas": "pandas>=2.0",
    "scipy": "scipy>=1.11.1",
    "sklearn": "scikit-learn>=1.3",
    "networkx": "networkx>=3.0",
    "jinja2": "jinja2>=3.1",
    "PIL": "pillow>=10.0",
    "matplotlib": "matplotlib>=3.8",
    "seaborn": "seaborn>=0.13",
    "IPython": "ipython>=8.0",
    "psutil": "psutil>=5.9",
    "tqdm": "tqdm>=4.66",
    "yaml": "PyYAML>=6.0",
}


# %%
def attached_files(
    pattern: str, inputs: Path = Path("/kaggle/input"), depths: Iterable[int] = range(7)
) -> list[Path]:
    """Files in attached inputs, at these folder depths, whose paths end in `pattern`."""
    return sorted(file for depth in depths for file in inputs.glob("*/" * depth + pattern))


def install(requirement: str) -> str:
    """Install one package alone, from attached wheels or PyPI; returns pip's error message."""
    wheels = attached_files(re.split("[=<>]", requirement)[0].replace("-", "_") + "-*.whl")
    offline = ["--no-index", *(f"--find-links={wheel.parent}" for wheel in wheels)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    for source in ([offline] if wheels else []) + [["--timeout=10", "--retries=0"]]:
        done = subprocess.run([*pip, *source, requirement], capture_output=True, text=True)
        if done.returncode == 0:
            break
    importlib.invalidate_caches()
    return done.stderr.strip().rpartition("\n")[2]


def ensure_packages(*modules: str) -> None:
    """Install missing modules of REQUIREMENTS on Kaggle and Colab; ImportError names the rest."""
    missing = [module for module in modules if not importlib.util.find_spec(module)]
    errors = [install(REQUIREMENTS[module]) for module in missing if ON_KAGGLE or ON_COLAB]
    missing = [module for module in missing if not importlib.util.find_spec(module)]
    if not missing:
        return
    names, wanted = ", ".join(missing), " ".join(f'"{REQUIREMENTS[name]}"' for name in missing)
    advice = f"{names} cannot be imported. Run: python -m pip install {wanted}"
    if ON_KAGGLE:
        advice = f"{names} could not be installed ({'; '.join(filter(None, errors))}). Turn on "
        advice += f"Settings > Internet, or attach a dataset with the wheels of {wanted}."
    raise ImportError(advice)


ensure_packages(*(module for module in REQUIREMENTS if module != "facenet_pytorch"))

# %% [markdown]
# **The machine.** PyTorch can list a GPU that it has no code for (a P100, say) and then fail at the
# first operation. The probe therefore runs one operation on each GPU.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
import tqdm.auto as tqdm_auto
import tqdm.std as tqdm_std
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def is_interactive() -> bool:
    """Whether someone is watching; False under papermill, nbconvert and Kaggle's Save Version."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return os.environ["KAGGLE_KERNEL_RUN_TYPE"] != "Batch"
    if IN_NOTEBOOK:
        return getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", True)
    return sys.stderr.isatty()


def native_precision(device: str | torch.device) -> str:
    """The fast precision: bf16 from compute capability 8, fp16 on older GPUs (T4), fp32 on CPUs."""
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def internet_is_reachable(seconds: float = 3.0) -> bool:
    """Whether PyPI answers in time. Asked in a thread, because DNS lookups ignore the timeout."""
    answers = []

    def ask() -> None:
        with suppress(OSError, http.client.HTTPException):
            urllib.request.urlopen("https://pypi.org/simple/pip/", timeout=seconds).close()
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def installed_version(module: str, requirement: str) -> str:
    """Of the package if it is there, else of the module: cv2 comes from several packages."""
    with suppress(ImportError):
        return importlib.metadata.version(re.split("[<>=]", requirement)[0])
    with suppress(ImportError):
        return getattr(importlib.import_module(module), "__version__", "unknown")
    return "not installed"


# %%
def probe_gpus() -> tuple[dict[int, str], list[str]]:
    """Names of the GPUs that can compute, by number, and advice about those that cannot."""
    usable, advice = {}, []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count) if WORLD_SIZE == 1 else range(count)[LOCAL_RANK : LOCAL_RANK + 1]:
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            usable[index] = name
        except RuntimeError as error:
            advice.append(
                f"GPU {index} ({name}) is present, but torch {torch.__version__} cannot use it "
                f"({str(error).splitlines()[0]}). On Kaggle choose Settings > Accelerator > "
                "GPU T4 x2; elsewhere install a torch build that supports it."
            )
    if not count and not torch.version.cuda and shutil.which("nvidia-smi"):
        advice.append(f"torch {torch.__version__} is built for CPUs only; install one with CUDA.")
    if not usable:
        menu = " Choose Settings > Accelerator > GPU T4 x2." if ON_KAGGLE and not count else ""
        advice.append(f"No usable GPU: on the CPU, hundreds of videos take hours.{menu}")
    return usable, advice


# %%
@dataclass(frozen=True)
class Environment:
    """What this machine offers: usable GPUs by number, name and memory; memory and disk in GiB."""

    gpu_ids: tuple[int, ...]
    gpus: tuple[str, ...]
    gpu_gib: tuple[float, ...]
    device: str
    precision: str
    internet: bool
    versions: dict[str, str]
    advice: tuple[str, ...]
    interactive: bool = is_interactive()
    machine: str = "Kaggle" if ON_KAGGLE else "Colab" if ON_COLAB else platform.system()
    cpu_cores: int = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    ram_gib: float = psutil.virtual_memory().total / 2**30
    free_disk_gib: float = shutil.disk_usage(".").free / 2**30


def probe_environment() -> Environment:
    """Inspect the machine, try its GPUs, and collect advice about what will not work."""
    gpus, advice = probe_gpus()
    device = f"cuda:{min(gpus)}" if gpus else "cpu"
    internet = SHOW_TABLES and RANK == 0 and internet_is_reachable()
    try:
        ensure_packages("facenet_pytorch")
    except ImportError as error:
        advice.append(f"{error} Without it, only FACE_CROP = False works.")
    versions = {module: installed_version(module, text) for module, text in REQUIREMENTS.items()}
    if ON_KAGGLE and not internet:
        advice.append("No internet: turn it on, or attach the ImageNet weights (see section 5).")
    if Environment.free_disk_gib < 2:
        advice.append(
            f"Only {Environment.free_disk_gib:.1f} GiB free in {Path.cwd()}: checkpoints need one."
        )
    return Environment(
        gpu_ids=tuple(gpus),
        gpus=tuple(gpus.values()),
        gpu_gib=tuple(torch.cuda.get_device_properties(i).total_memory / 2**30 for i in gpus),
        device=device,
        precision=native_precision(device),
        internet=internet,
        versions={"python": platform.python_version()} | versions,
        advice=tuple(advice),
    )


# %%
def environment_table(found: Environment) -> pd.DataFrame:
    """The environment as a short table."""
    named = zip(found.gpus, found.gpu_gib, strict=True)
    gpus = Counter(f"{name}, {gib:.0f} GiB" for name, gib in named)
    rows = {
        "machine": f"{found.machine}, {'interactive' if found.interactive else 'unattended'}",
        "GPU": "; ".join(f"{number} x {kind}" for kind, number in gpus.items()) or "none",
        "precision": found.precision,
        "CPU, memory": f"{found.cpu_cores} cores, {found.ram_gib:.0f} GiB",
        "free disk": f"{found.free_disk_gib:.0f} GiB in {Path.cwd()}",
        "internet": "reachable" if found.internet else "not reachable",
    }
    for module in ("python", "torch", "torchvision", "cv2", "facenet_pytorch", "sklearn", "pandas"):
        rows[module] = found.versions[module]
    return pd.Series(rows, name="environment").to_frame()


ENVIRONMENT = probe_environment()
if SHOW_TABLES:
    display(environment_table(ENVIRONMENT))
    for line in ENVIRONMENT.advice:
        print("Note:", line)

# %%
LOG_INTERVAL = 300.0  # seconds


def progress_bar(
    items: Iterable | None = None, title: str = "", total: float | None = None, **look: Any
) -> Any:
    """A tqdm bar or, where nobody is watching, a line every LOG_INTERVAL seconds.

    Saved notebooks and logs would keep a bar as it first appeared, at 0 %. `look` is for the bar.
    """
    known: dict[str, Any] = dict(desc=title, total=total)
    known["disable"] = RANK > 0 or "TQDM_DISABLE" in os.environ
    if ENVIRONMENT.interactive:
        return tqdm_auto.tqdm(items, **known, leave=False, **look)
    known |= dict.fromkeys(("delay", "mininterval", "maxinterval"), LOG_INTERVAL)
    line = "{desc}: {percentage:.0f} %, {elapsed} passed, {remaining} left{postfix}\n"
    return tqdm_std.tqdm(items, **known, miniters=1, file=sys.stdout, bar_format=line)


# %% [markdown]
# **Files and figures.** Files are written completely or not at all. All figures share one style and
# two colours that colour-blind readers can tell apart.


# %%
@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `file` only once everything is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}-{platform.node()}"
    partial_file = file.with_name(f".partial-{writer}-{file.name}")
    try:
        yield partial_file
        os.replace(partial_file, file)
    finally:
        partial_file.unlink(missing_ok=True)


def save_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table without its index."""
    with replacing(file) as partial_file:
        table.to_csv(partial_file, index=False, errors="backslashreplace")


def duration(seconds: float) -> str:
    """Time in words: 48 s, 6 min 54 s, 1 h 32 min, 11 h."""
    hours, rest = divmod(round(seconds), 3600)
    parts = {"h": hours, "min": rest // 60, "s": 0 if hours else rest % 60}
    return " ".join(f"{count} {unit}" for unit, count in parts.items() if count) or "0 s"


def plural(number: int, name: str) -> str:
    """A number of things: 1 video, 2 videos."""
    return f"{number} {name}{'s' * (number != 1)}"


def file_size(size: int) -> str:
    """A number of bytes in words: 12 KiB, 44.1 MiB."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{-(-size // 2**10)} KiB"


# %%
REAL_COLOUR, FAKE_COLOUR = "#0072B2", "#D55E00"
WIDTH = 7  # inches; with 12-point text, readable on a phone
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
styled: Any = plt.rc_context(STYLE)  # a decorator for functions that draw


def show_figure(
    figure: Figure, file: Path | None = None, shown: DisplayHandle | None = None
) -> DisplayHandle | None:
    """Write a figure to a file, show it in a notebook, and close it.

    Given an earlier return value, it takes that one's place.
    """
    if file:
        with replacing(file) as partial_file:
            figure.savefig(partial_file, dpi=150)
    if IN_NOTEBOOK and shown:
        shown.update(figure)
    elif IN_NOTEBOOK:
        shown = display(figure, display_id=True)
    plt.close(figure)
    return shown


def show_row(ax: Axes, name: str, images: np.ndarray, titles: Sequence[str] = ()) -> None:
    """N images (N, H, W) in 0..1, or (N, H, W, 3), side by side as one picture, with its name.

    One picture, because many `Axes` are slow to draw.
    """
    white, width = 255 if images.dtype == np.uint8 else 1, images.shape[2]
    gap = [(0, 0), (0, 0), (0, width // 20), *[(0, 0)] * (images.ndim - 3)]
    separated = np.pad(images, gap, constant_values=white)
    ax.imshow(np.concatenate([*separated], axis=1), cmap="gray", vmin=0, vmax=white)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    for number, title in enumerate(titles):
        centre = number * separated.shape[2] + width / 2
        ax.text(centre, -width / 30, title, ha="center", va="bottom", fontsize=10)


# %% [markdown]
# **Imports between sections.** The sections import names from earlier ones, as the scripts in
# `kaggle_cells/` do. In a notebook, this bridge looks them up among what has already been run.

# %%
_sections = """imports_and_setup global_config data_processing dataset_class model_definition
    loss_and_utils training_functions evaluation_functions data_preparation data_loaders
    model_setup training_loop model_evaluation results_summary"""
CELLS = [f"cell_{number:02}_{name}" for number, name in enumerate(_sections.split(), 1)]


class NotebookCell(types.ModuleType):
    """Stands in for the file of one section and looks up its names in the notebook."""

    def __getattr__(self, name: str) -> object:
        notebook = vars(sys.modules["__main__"])
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in notebook:
            raise ImportError(f"'{name}' is not defined yet: run {self.__name__} first")
        return notebook[name]


if IN_NOTEBOOK:
    sys.modules.update({name: NotebookCell(name) for name in CELLS})
