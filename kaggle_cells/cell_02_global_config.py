# %% [markdown]
# <a id="section-2"></a>
# ## 2. Parameters
#
# Every setting, on one screen. The defaults suit Kaggle's two T4 GPUs and a dataset such as
# FaceForensics++. A value that cannot work stops the run here, with a message that says what can.
#
# Edit them here, or set them with papermill's `-p NAME VALUE` and `-f FILE.yaml`; the scripts read
# `DEEPFAKE_<NAME>` from the environment. Misspelt names are errors.

# %% tags=["parameters"]
DATA_DIR: str = "auto"  # folder or CSV manifest; auto: /kaggle/input, ./data, else demo; or none
WORK_DIR: str = "."  # where models/, results/ and data/ are written
CACHE_DIR: str = ""  # clip cache; empty: /tmp/clip_cache on Kaggle, WORK_DIR/cache elsewhere
CHECKPOINT: str = ""  # a best_model.pth, or pretrained: with EPOCHS 0 use it, else train it further
INITIAL_MODEL: str = ""  # same, but only what fits is taken over: clips and network may differ
PREDICT_DIR: str = ""  # score all videos in this folder into results/predictions.csv
# Videos and clips
MAX_VIDEOS_PER_CLASS: int = 120  # fakes are sampled evenly over manipulations; 0: all videos
METHODS: list = []  # manipulations to use; empty: all, except DeepFakeDetection (no originals)
HOLDOUT_METHODS: list = []  # manipulations kept out of training and validation, only tested
VAL_FRACTION: float = 0.15  # share of videos for validation, unless the dataset has a split
TEST_FRACTION: float = 0.2  # same for the test set; with EPOCHS 0 it may be 1: test all videos
FRAMES_PER_VIDEO: int = 16  # frames per clip; memory and time grow in proportion
CLIPS_PER_VIDEO: int = 3  # clips per video, with different frames; a video's score averages them
CLIP_SECONDS: float = 8.0  # clips cover this much of the middle of the video
IMAGE_SIZE: int = 160  # side of the square face crops, in pixels
FACE_CROP: bool = True  # crop the face; False: crop the middle of the frame
FACE_MARGIN: float = 0.25  # added on each side of the face box, as a share of its size
# Model
BACKBONE: str = "resnet50"  # any torchvision classification model, by name
PRETRAINED: bool = True  # start from ImageNet weights: cached, attached or downloaded
WEIGHTS_PATH: str = ""  # a .pth file with other weights for the backbone
LSTM_HIDDEN: int = 256  # LSTM units in each direction
LSTM_LAYERS: int = 1  # number of LSTM layers; 0: no LSTM, a clip's score is its frames' mean
ATTENTION_HEADS: int = 8  # self-attention heads; must divide 2 * LSTM_HIDDEN
DROPOUT: float = 0.5  # before the classifier
REFERENCE: float = 0.0  # subtract part of the score after coarse compression (1.7: JPEG 30)
GRADIENT_CHECKPOINTING: bool = False  # recompute activations: less memory, more time
# What training sees
PAIRS: bool = True  # put each real clip and a fake of it in one batch, augmented alike
SELF_BLEND: float = 0.5  # share of fakes made from real clips during training; 1: no others
AUGMENTATION: str = "codec"  # none; plain: crop, flip, colour; codec: + compression; robust: more
EPOCH_VIDEOS: int = 0  # real videos per epoch, from all datasets equally; 0: each of them once
DATASET_SHARES: list = []  # weights of the datasets, ["DFDC 3", "my_videos 1"]; empty: equal
# Training
EPOCHS: int = 25  # upper bound; early stopping usually ends sooner
BATCH_SIZE: int = 0  # clips per step on all devices; 0: up to 8 per GPU, as memory allows
LEARNING_RATE: float = 1e-4  # for AdamW; without pretrained weights, try 3e-4
WEIGHT_DECAY: float = 1e-2  # for AdamW, on all weights
FOCAL_GAMMA: float = 2.0  # focal loss: how strongly to focus on hard clips; 0: cross-entropy
FRAME_LOSS_WEIGHT: float = 0.5  # weight of the same loss applied to single frames
GRADIENT_CLIP: float = 1.0  # maximum gradient norm; 0: no clipping
LR_PATIENCE: int = 3  # halve the rate after more epochs than this without a lower val loss
PATIENCE: int = 8  # stop after this many epochs without a better validation AUC
EMA_DECAY: float = 0.98  # EMA decay; closer to 1 averages over more steps; 0 disables it
SYNC_BATCH_NORM: str = "auto"  # torchrun on GPUs, on or off; auto: with fewer than 8 clips on each
AMP: str = "auto"  # auto: bf16 or fp16, whichever the GPU prefers, fp32 on CPU; or off, fp16, bf16
# Evaluation and run
ROBUSTNESS: int = 500  # test videos to score again under compression, blur, ...; 0: none
TIME_BUDGET_HOURS: float = 0.0  # stop training in time for results; 0: 11 on Kaggle, else no limit
RESUME: bool = True  # resume from models/last_checkpoint.pth, on Kaggle also an attached one
NUM_WORKERS: int = 2  # threads that decode videos and load clips
SEED: int = 42  # for splits, weights, sampling and augmentation

# %% [markdown]
# The parameters become one frozen object, `CONFIG`. `Parameters` states what each may be.

# %%
import dataclasses
import difflib
import math
import os
import random
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
import torchvision
import yaml
from IPython.display import display

from cell_01_imports_and_setup import (
    IN_NOTEBOOK,
    ON_KAGGLE,
    SHOW_TABLES,
    WORLD_SIZE,
    attached_files,
)


# %%
def allow(*values: Any) -> Any:
    """A field that allows numbers from the first to the second value, or these texts."""
    return field(metadata={"allowed": values})


# %%
@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The fields of Config."""

    DATA_DIR: str
    WORK_DIR: str
    CACHE_DIR: str
    CHECKPOINT: str
    INITIAL_MODEL: str
    PREDICT_DIR: str
    MAX_VIDEOS_PER_CLASS: int = allow(0, 10**6)
    METHODS: list
    HOLDOUT_METHODS: list
    VAL_FRACTION: float = allow(0.01, 0.9)
    TEST_FRACTION: float = allow(0.01, 1)
    FRAMES_PER_VIDEO: int = allow(1, 256)
    CLIPS_PER_VIDEO: int = allow(1, 16)
    CLIP_SECONDS: float = allow(0.1, 3600)
    IMAGE_SIZE: int = allow(32, 1024)
    FACE_CROP: bool
    FACE_MARGIN: float = allow(0, 2)
    BACKBONE: str
    PRETRAINED: bool
    WEIGHTS_PATH: str
    LSTM_HIDDEN: int = allow(1, 4096)
    LSTM_LAYERS: int = allow(0, 8)
    ATTENTION_HEADS: int = allow(1, 64)
    DROPOUT: float = allow(0, 0.95)
    REFERENCE: float = allow(0, 10)
    GRADIENT_CHECKPOINTING: bool
    PAIRS: bool
    SELF_BLEND: float = allow(0, 1)
    AUGMENTATION: str = allow("none", "plain", "codec", "robust")
    EPOCH_VIDEOS: int = allow(0, 10**7)
    DATASET_SHARES: list
    EPOCHS: int = allow(0, 10**4)
    BATCH_SIZE: int = allow(0, 4096)
    LEARNING_RATE: float = allow(1e-8, 1)
    WEIGHT_DECAY: float = allow(0, 1)
    FOCAL_GAMMA: float = allow(0, 10)
    FRAME_LOSS_WEIGHT: float = allow(0, 10)
    GRADIENT_CLIP: float = allow(0, 10**3)
    LR_PATIENCE: int = allow(0, 10**4)
    PATIENCE: int = allow(1, 10**4)
    EMA_DECAY: float = allow(0, 0.99999)
    SYNC_BATCH_NORM: str = allow("auto", "on", "off")
    AMP: str = allow("auto", "off", "fp16", "bf16")
    ROBUSTNESS: int = allow(0, 10**6)
    TIME_BUDGET_HOURS: float = allow(0, 10**4)
    RESUME: bool
    NUM_WORKERS: int = allow(1, 64)
    SEED: int = allow(0, 2**31 - 1)


PARAMETERS = [item.name for item in dataclasses.fields(Parameters)]
PRETRAINED_FILE = "deepfake_detector.pth"

# %% [markdown]
# Types and ranges come first, then what only works together.


# %%
def parse_share(text: str) -> tuple[str, float]:
    """An entry of DATASET_SHARES: a name and its weight. Raises ValueError."""
    name, _, weight = text.rpartition(" ")
    with suppress(ValueError):
        if name and 0 < float(weight) < math.inf:
            return name, float(weight)
    raise ValueError(f"DATASET_SHARES: {text!r} is not a dataset's name and a number above 0")


def checked_value(name: str, kind: type, value: Any, allowed: Any) -> Any:
    """The value as `kind`. Raises TypeError, or ValueError if it is not in `allowed`.

    `allowed` is (low, high) for numbers, a tuple of choices for text, or empty.
    """
    if kind is float and type(value) in (int, str):  # YAML reads 1e-4 as text
        with suppress(ValueError):
            value = float(value)
    if kind is list and type(value) is str:  # -p METHODS FaceSwap
        value = [value]
    items = value if isinstance(value, list) else []
    if type(value) is not kind or any(type(item) is not str for item in items):
        wanted = "list of str" if kind is list else kind.__name__
        raise TypeError(f"{name} = {value!r} is {type(value).__name__}, not {wanted}")
    if kind is str and allowed and value not in allowed:
        raise ValueError(f"{name} = {value!r} is unknown: use one of {', '.join(allowed)}")
    if kind is not str and allowed and not allowed[0] <= value <= allowed[1]:
        raise ValueError(f"{name} = {value!r} is out of range: from {allowed[0]} to {allowed[1]}")
    return value


# %%
@dataclass(frozen=True, kw_only=True)
class Config(Parameters):
    """Checked parameters; TypeError and ValueError name the parameter and what is allowed."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            kind: Any = item.type
            allowed = item.metadata.get("allowed", ())
            value = checked_value(item.name, kind, getattr(self, item.name), allowed)
            object.__setattr__(self, item.name, value)
        for name in ("CHECKPOINT", "INITIAL_MODEL"):
            object.__setattr__(self, name, model_path(getattr(self, name)))
        check_together(self)

    @property
    def time_budget(self) -> float:
        """Seconds for the whole run."""
        return 3600 * (self.TIME_BUDGET_HOURS or (11 if ON_KAGGLE else math.inf))

    def syncs_batch_norm(self, clips: int) -> bool:
        """Whether processes on GPUs, with so many `clips` each, share their batch statistics."""
        return self.SYNC_BATCH_NORM == "on" or (self.SYNC_BATCH_NORM == "auto" and clips < 8)

    @property
    def work_dir(self) -> Path:
        return Path(self.WORK_DIR)

    @property
    def dataset_shares(self) -> dict[str, float]:
        return dict(map(parse_share, self.DATASET_SHARES))

    @property
    def last_checkpoint(self) -> Path:
        return self.work_dir / "models" / "last_checkpoint.pth"

    @property
    def cache_dir(self) -> Path:
        return Path(self.CACHE_DIR or ("/tmp/clip_cache" if ON_KAGGLE else self.work_dir / "cache"))


# %%
def model_path(name: str) -> str:
    """The file of `pretrained`, which comes with the project; any other name as it is.

    It is looked for beside the scripts, in the current folder and those above, and in attached
    datasets. Raises ValueError if it is nowhere.
    """
    if name != "pretrained":
        return name
    here = Path.cwd() if IN_NOTEBOOK else Path(__file__).resolve().parent
    places = [folder / "pretrained" / PRETRAINED_FILE for folder in (here, *here.parents)]
    for file in [*places, *attached_files(PRETRAINED_FILE)]:
        if file.is_file():
            return str(file)
    raise ValueError(
        f"'pretrained' needs {PRETRAINED_FILE} from the project's folder pretrained/: put it into "
        f"{here / 'pretrained'}, or attach a dataset that holds it"
    )


def check_together(config: Config) -> None:
    """Raises ValueError for values that do not work together or on this machine."""
    for name in ("CHECKPOINT", "INITIAL_MODEL", "WEIGHTS_PATH", "PREDICT_DIR"):
        if (path := getattr(config, name)) and not Path(path).exists():
            raise ValueError(f"{name} = {path!r} does not exist (current folder: {Path.cwd()})")
    for text in config.DATASET_SHARES:
        parse_share(text)
    known = torchvision.models.list_models(module=torchvision.models)
    near = difflib.get_close_matches(config.BACKBONE, known) or known
    width, heads, batch = 2 * config.LSTM_HIDDEN, config.ATTENTION_HEADS, config.BATCH_SIZE
    shares = config.VAL_FRACTION + config.TEST_FRACTION
    unlabelled = config.DATA_DIR == "none" and (config.EPOCHS or not config.PREDICT_DIR)
    problems = {
        f"BACKBONE = {config.BACKBONE!r} is not a torchvision classification model; "
        f"try {', '.join(near)}": config.BACKBONE not in known,
        f"ATTENTION_HEADS = {heads} does not divide 2 * LSTM_HIDDEN = {width}": width % heads,
        f"BATCH_SIZE = {batch} is not a multiple of the {WORLD_SIZE} processes": batch % WORLD_SIZE,
        f"VAL_FRACTION + TEST_FRACTION = {shares:g} leaves too little for training: at most 0.9": (
            config.EPOCHS and shares > 0.9
        ),
        "DATA_DIR = 'none' is for scoring PREDICT_DIR with a CHECKPOINT and EPOCHS = 0": unlabelled,
        "EPOCHS = 0 does not train: set CHECKPOINT to a trained model": (
            not config.EPOCHS and not config.CHECKPOINT
        ),
        "CHECKPOINT and INITIAL_MODEL are two starts: set one": (
            config.CHECKPOINT and config.INITIAL_MODEL
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(problem)


# %% [markdown]
# Misspelt names stop the run with a suggestion.


# %%
def check_name(name: str, origin: str = "") -> None:
    """Raises ValueError with the closest parameter if there is none of this name."""
    if name not in PARAMETERS:
        near = difflib.get_close_matches(name.upper(), PARAMETERS, n=1)
        advice = f"; did you mean {near[0]}?" if near else ". Section 2 lists them."
        raise ValueError(f"{origin}{name} is not a parameter{advice}")


def check_injected(history: list[str]) -> None:
    """Check the names in papermill's cell among the cells run so far; papermill only warns."""
    for cell in history:
        if cell.startswith("# Parameters\n"):
            for name in re.findall(r"^(\w+) = ", cell, flags=re.M):
                check_name(name)


def parameters_from_environment(environ: dict[str, str]) -> dict[str, object]:
    """Parameters from DEEPFAKE_<NAME> variables as YAML values (`25`, `false`, `[FaceSwap]`)."""
    found = {}
    for variable, text in environ.items():
        if variable.startswith("DEEPFAKE_"):
            check_name(name := variable.removeprefix("DEEPFAKE_"), f"{variable}: ")
            is_text = Config.__dataclass_fields__[name].type is str
            try:
                found[name] = text if is_text else yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"{variable}: {text!r} is not a YAML value") from error
    return found


# %% [markdown]
# A trained model must see new videos the way it saw its training videos. With CHECKPOINT, the
# settings that shape clips and network are therefore read from that file.

# %%
MODEL_SETTINGS = [
    *("FRAMES_PER_VIDEO", "CLIPS_PER_VIDEO", "CLIP_SECONDS", "IMAGE_SIZE", "FACE_CROP"),
    *("FACE_MARGIN", "BACKBONE", "LSTM_HIDDEN", "LSTM_LAYERS", "ATTENTION_HEADS", "REFERENCE"),
]


# What files raise when they are read that are damaged, or of another kind.
DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError),
    *(UnpicklingError, BadZipFile, zlib.error),
)


def read_model_file(path: str | Path, **options: Any) -> dict:
    """What a best_model.pth holds. Raises ValueError for any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, **options)
        if isinstance(content, dict) and "config" in content:
            return content
    except (FileNotFoundError, PermissionError):
        raise
    except DAMAGE:
        pass  # not written by torch.save
    raise ValueError(f"{path} is not a model file, such as models/best_model.pth of a run")


# %%
def saved_config(content: dict) -> dict:
    """The parameters in a model file; older files may lack some and have others."""
    saved = {"CLIPS_PER_VIDEO": 1, "REFERENCE": 0.0, **content["config"]}
    return {name: value for name, value in saved.items() if name in PARAMETERS}


def adopt_checkpoint(config: Config) -> Config:
    """`config` with its CHECKPOINT's settings for clips and network."""
    if not config.CHECKPOINT:
        return config
    content = read_model_file(config.CHECKPOINT, mmap=True)
    saved, current = saved_config(content), dataclasses.asdict(config)
    changed = {name: saved[name] for name in MODEL_SETTINGS if saved[name] != current[name]}
    if changed:
        settings = ", ".join(f"{name} = {value}" for name, value in changed.items())
        print(f"From {config.CHECKPOINT}: {settings}")
    return dataclasses.replace(config, **changed)


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers: SEED, epoch, ..."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch from one or more numbers, each GPU with a seed of its own.

    With the same seed, DataParallel's copies would drop the same units of their clips.
    """
    seed = mixed_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for index, generator in enumerate(torch.cuda.default_generators):
        generator.manual_seed(mixed_seed(*numbers, index))


# %%
_given = {name: globals()[name] for name in PARAMETERS}
check_injected(globals().get("In", []))  # IPython's list of the cells run so far
if not IN_NOTEBOOK:
    _given |= parameters_from_environment(dict(os.environ))
CONFIG = adopt_checkpoint(Config(**_given))
seed_everything(CONFIG.SEED)
torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on all GPUs

if SHOW_TABLES:
    _lstm = f"BiLSTM with 2 x {CONFIG.LSTM_HIDDEN} units, {CONFIG.ATTENTION_HEADS} attention heads"
    _summary = {
        "data": f"{CONFIG.DATA_DIR}; up to {CONFIG.MAX_VIDEOS_PER_CLASS or 'all'} videos per class",
        "clips": f"{CONFIG.CLIPS_PER_VIDEO} per video, {CONFIG.FRAMES_PER_VIDEO} frames each, "
        f"{CONFIG.IMAGE_SIZE} x {CONFIG.IMAGE_SIZE} pixels",
        "network": f"{CONFIG.BACKBONE}, {_lstm if CONFIG.LSTM_LAYERS else 'on single frames'}",
        "epochs": CONFIG.EPOCHS or f"none; evaluate {CONFIG.CHECKPOINT}",
        "held out": ", ".join(CONFIG.HOLDOUT_METHODS) or "recordings only, no manipulation",
        "results": f"in {CONFIG.work_dir.resolve()}",
    }
    with pd.option_context("display.max_colwidth", None):
        display(pd.Series(_summary, name="this run").to_frame())
