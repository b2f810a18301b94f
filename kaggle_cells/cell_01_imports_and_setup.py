# %% [markdown]
# # Is this video a deepfake?
#
# This notebook trains a detector on videos of real and manipulated faces, tests it on recordings it has never
# seen, and scores your own videos with it. Each video becomes a short **clip** of face crops; a network looks
# at every frame, reads the frames in order, decides which of them matter, and answers with one probability.
#
# ```
# video ─▶ 16 frames ─▶ face crop ─▶ ResNet50 ─▶ BiLSTM ─▶ self-attention ─▶ P(fake)
#          (once, then cached)       per frame   in order   over frames
# ```
#
# **Run it** from top to bottom. On Kaggle, choose *Settings ▸ Accelerator ▸ GPU T4 x2* and attach a dataset
# with *Add Input*, for example `xdxd003/ff-c23`. With no dataset at all it makes a small demo set and still
# runs to the end. Everything you may want to change is one screen of parameters, in section 2.
#
# | Sections | |
# |---|---|
# | 1, 2 | the environment and the parameters |
# | 3 to 8 | definitions: data, model, training, evaluation. Nothing is read or written there |
# | 9 to 11 | the videos become clips and splits; loaders; the model |
# | 12 to 14 | training, evaluation on the test set, results |

# %% [markdown]
# ## 1. Imports and environment
#
# What this machine offers decides much of what follows: whether a GPU is there *and works*, which libraries are
# installed, how much memory and disk is left.

# %%
import glob
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

# A damaged video makes FFmpeg and OpenCV print lines that do not name it; skipped.csv does, with the reason.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
# Of the processes that torchrun starts to train together, the first one prepares, writes and talks.
RANK, LOCAL_RANK, PROCESSES = 0, 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, LOCAL_RANK, PROCESSES = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
if RANK:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
# A saved notebook keeps every progress bar as it first appeared, at 0 %.
NO_BARS = RANK > 0 or "TQDM_DISABLE" in os.environ or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"

import pandas as pd
import psutil
import torch
from IPython.display import display

STARTED = time.time()
IN_NOTEBOOK = "__file__" not in globals()
ON_KAGGLE = Path("/kaggle/working").is_dir()

# %% [markdown]
# A GPU can be present and still useless: PyTorch lists a P100 as available, but recent builds hold no code for
# it and fail at the first operation. So the probe tries one.

# %%
LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "OpenCV": "opencv-python opencv-python-headless opencv-contrib-python opencv-contrib-python-headless",
    "facenet-pytorch": "facenet-pytorch",
    "scikit-learn": "scikit-learn",
    "pandas": "pandas",
}


@dataclass(frozen=True)
class Environment:
    """What the machine offers. `gpus` names the usable CUDA devices, `gpu_ids` numbers them; memory is in GiB."""

    device: str
    gpus: tuple[str, ...]
    gpu_ids: tuple[int, ...]
    cpu_cores: int
    ram_gib: float
    free_disk_gib: float
    versions: dict[str, str]
    advice: tuple[str, ...]


def installed_version(distributions: str) -> str:
    """The version of the first of these distributions (names separated by spaces) that is installed."""
    for name in distributions.split():
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def probe_environment() -> Environment:
    """Look at the machine, try its GPUs, and collect advice for what will not work."""
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
    if not gpus:
        advice.append("No usable GPU: training runs on the CPU, which is practical for the demo set only.")
    return Environment(
        device=f"cuda:{min(gpus)}" if gpus else "cpu",
        gpus=tuple(gpus.values()),
        gpu_ids=tuple(gpus),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_gib=psutil.virtual_memory().total / 2**30,
        free_disk_gib=shutil.disk_usage(".").free / 2**30,
        versions={
            "python": platform.python_version(),
            **{name: installed_version(names) for name, names in LIBRARIES.items()},
        },
        advice=tuple(advice),
    )


ENVIRONMENT = probe_environment()
display(
    pd.Series(
        {
            "machine": "Kaggle" if ON_KAGGLE else platform.system(),
            "device": ", ".join(ENVIRONMENT.gpus) or "CPU",
            "CPU cores": ENVIRONMENT.cpu_cores,
            "memory": f"{ENVIRONMENT.ram_gib:.0f} GiB",
            "free disk": f"{ENVIRONMENT.free_disk_gib:.0f} GiB",
            **ENVIRONMENT.versions,
        },
        name="environment",
    ).to_frame()
)
for line in ENVIRONMENT.advice:
    print("Note:", line)

# %% [markdown]
# `facenet-pytorch` brings the face detector together with its weights, but is not part of Kaggle's image. It is
# installed when it is needed, without its outdated pins on other libraries. Offline, attach a dataset that holds
# its wheel.


# %%
def ensure_package(module: str, requirement: str) -> None:
    """Make `module` importable. On Kaggle it is installed if missing: from an attached wheel, else from PyPI.

    Raises ImportError with the command to run where that is not possible. Nothing already there is changed.
    """
    if importlib.util.find_spec(module):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--timeout", "10", "--retries", "1"]
    if ON_KAGGLE:
        below = ("/kaggle/input/" + "*/" * depth + f"{module}-*.whl" for depth in range(6))
        wheels = sorted(wheel for pattern in below for wheel in glob.glob(pattern))
        done = subprocess.run([*command, wheels[-1] if wheels else requirement], capture_output=True, text=True)
        importlib.invalidate_caches()
        if done.returncode == 0 and importlib.util.find_spec(module):
            return
        raise ImportError(
            f"{module} could not be installed: {done.stderr.strip() or 'pip gave no reason'}. Turn on "
            f"Settings > Internet, or attach a dataset that holds the wheel of {requirement}."
        )
    raise ImportError(f"{module} is missing. Install it with: pip install --no-deps {requirement}")


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
