# %% [markdown]
# <a id="section-2"></a>
# ## 2. Parameters
#
# One screen holds everything you can change. The defaults are meant for Kaggle's two T4 GPUs and a dataset such
# as FaceForensics++. A value that cannot work stops the run here, with a message that says what is allowed.
#
# Papermill sets them with `-p NAME VALUE` or `-f FILE.yaml`, the scripts read `DEEPFAKE_<NAME>` from the
# environment. A name that is no parameter is an error, too.

# %% tags=["parameters"]
# Where things are
DATA_DIR: str = "auto"  # dataset folder or CSV manifest; auto: below /kaggle/input, ./data, or demo: made here; or none
WORK_DIR: str = "."  # models/, results/ and data/ are written below it
CACHE_DIR: str = ""  # clip cache; empty: /tmp/clip_cache on Kaggle, WORK_DIR/cache elsewhere
CHECKPOINT: str = ""  # start from this best_model.pth; with EPOCHS 0 it is only evaluated and used
PREDICT_DIR: str = (
    ""  # score every video below this folder into results/predictions.csv; needs no DATA_DIR
)
# Which videos, and what becomes of them
MAX_VIDEOS_PER_CLASS: int = 120  # sampled evenly over manipulations; 0: all
METHODS: list = []  # manipulations to use; empty: all, except DeepFakeDetection, which has no originals
HOLDOUT_METHODS: list = []  # manipulations kept out of training and validation, and part of the test set
VAL_FRACTION: float = (
    0.15  # share of the videos for validation, where the dataset has no split of its own
)
TEST_FRACTION: float = (
    0.2  # share of the videos for the test, likewise; with EPOCHS 0 up to 1, all of them
)
FRAMES_PER_VIDEO: int = 16  # frames of a clip; more cost memory and time in proportion
CLIPS_PER_VIDEO: int = (
    3  # clips of a video, each with other frames; training draws one, the verdict averages all
)
CLIP_SECONDS: float = 8.0  # they are spread over this much of the middle of the video
IMAGE_SIZE: int = 160  # side of the square crops, in pixels
FACE_CROP: bool = True  # follow the face; False: take the middle of the frame
FACE_MARGIN: float = 0.25  # share of the face box added on each side
# The model
BACKBONE: str = "resnet50"  # any classification model of torchvision, by name
PRETRAINED: bool = True  # start from ImageNet weights: cached, attached on Kaggle, or downloaded
WEIGHTS_PATH: str = ""  # a .pth file with other weights for the backbone
LSTM_HIDDEN: int = 256  # units of the LSTM in each direction
LSTM_LAYERS: int = 1  # layers of the LSTM
ATTENTION_HEADS: int = 8  # heads of the self-attention; must divide 2 * LSTM_HIDDEN
DROPOUT: float = 0.5  # before the classifier
TRAINABLE: str = "all"  # what of the backbone learns: all, norms (its normalisation layers) or head (nothing of it)
MIRROR_TEST: bool = False  # score each clip and its mirror image, and average: twice the time
GRADIENT_CHECKPOINTING: bool = False  # compute the backbone's blocks twice: less memory, more time
COMPILE: bool = (
    False  # torch.compile the backbone: slow at the start, then perhaps faster; see the benchmark
)
# What training shows
PAIRS: bool = True  # beside each real clip a fake made of it, in the same light; False: any fake
SELF_BLEND: float = (
    0.5  # share of the fakes that are made on the spot from real clips; 1: real videos are enough
)
AUGMENTATION: str = (
    "codec"  # none; plain: crop, mirror, colour; codec: and noise, compression; robust: and more
)
# Training
EPOCHS: int = 25  # upper bound; early stopping usually ends sooner
BATCH_SIZE: int = (
    0  # clips a step, of all devices together; 0: up to 8 for each GPU, fewer where memory is short
)
LEARNING_RATE: float = 1e-4  # of AdamW; 3e-4 suits training without pretrained weights
BACKBONE_LR: float = (
    1.0  # learning rate of a backbone with trained weights, as a multiple of LEARNING_RATE
)
WARMUP_EPOCHS: int = 0  # epochs in which the learning rate rises from 0
WEIGHT_DECAY: float = 1e-2  # of AdamW, on all weights
LOSS: str = "focal"  # focal or bce
FOCAL_GAMMA: float = 2.0  # how much the focal loss favours hard clips; 0 is bce
LABEL_SMOOTHING: float = (
    0.0  # the loss asks for probabilities this much nearer to 0.5, half of it on each side
)
FRAME_LOSS_WEIGHT: float = 0.5  # weight of the same loss on single frames
GRADIENT_CLIP: float = 1.0  # largest gradient norm; 0: no limit
LR_PATIENCE: int = 3  # epochs without a better validation loss before the learning rate is halved
PATIENCE: int = 8  # epochs without a better validation AUC before training stops
EMA_DECAY: float = (
    0.98  # average the weights over the steps, the more of them the nearer to 1; 0: off
)
AMP: str = "auto"  # auto: bf16 or fp16, as the GPU likes, fp32 on the CPU; or off, fp16, bf16
# The test
ROBUSTNESS: int = 500  # test videos scored again after each kind of compression, blur, ...; 0: none
# The run
TIME_BUDGET_HOURS: float = (
    0.0  # training stops in time for results within this; 0: 11 on Kaggle, no limit elsewhere
)
RESUME: bool = (
    True  # go on from models/last_checkpoint.pth, or on Kaggle from that of an attached output
)
NUM_WORKERS: int = 2  # threads that prepare videos and read clips
SEED: int = 42  # of splits, weights, sampling and augmentation

# %% [markdown]
# The parameters become one frozen object, `CONFIG`, which checks them first.

# %%
import ast
import contextlib
import dataclasses
import difflib
import math
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchvision
import yaml
from IPython.display import display

from cell_01_imports_and_setup import IN_NOTEBOOK, ON_KAGGLE, PROCESSES, SHOW_TABLES


def between(low: float, high: float) -> Any:
    """A parameter with a number from `low` to `high`, both allowed."""
    return field(metadata={"low": low, "high": high})


def one_of(*choices: str) -> Any:
    """A parameter with one of these values."""
    return field(metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every parameter of a run, checked: TypeError and ValueError name the parameter and what is allowed."""

    DATA_DIR: str
    WORK_DIR: str
    CACHE_DIR: str
    CHECKPOINT: str
    PREDICT_DIR: str
    MAX_VIDEOS_PER_CLASS: int = between(0, 10**6)
    METHODS: list
    HOLDOUT_METHODS: list
    VAL_FRACTION: float = between(0.01, 0.9)
    TEST_FRACTION: float = between(0.01, 1)
    FRAMES_PER_VIDEO: int = between(1, 256)
    CLIPS_PER_VIDEO: int = between(1, 16)
    CLIP_SECONDS: float = between(0.1, 3600)
    IMAGE_SIZE: int = between(32, 1024)
    FACE_CROP: bool
    FACE_MARGIN: float = between(0, 2)
    BACKBONE: str
    PRETRAINED: bool
    WEIGHTS_PATH: str
    LSTM_HIDDEN: int = between(1, 4096)
    LSTM_LAYERS: int = between(1, 8)
    ATTENTION_HEADS: int = between(1, 64)
    DROPOUT: float = between(0, 0.95)
    TRAINABLE: str = one_of("all", "norms", "head")
    MIRROR_TEST: bool
    GRADIENT_CHECKPOINTING: bool
    COMPILE: bool
    PAIRS: bool
    SELF_BLEND: float = between(0, 1)
    AUGMENTATION: str = one_of("none", "plain", "codec", "robust")
    EPOCHS: int = between(0, 10**4)
    BATCH_SIZE: int = between(0, 4096)
    LEARNING_RATE: float = between(1e-8, 1)
    BACKBONE_LR: float = between(0, 100)
    WARMUP_EPOCHS: int = between(0, 10**4)
    WEIGHT_DECAY: float = between(0, 1)
    LOSS: str = one_of("focal", "bce")
    FOCAL_GAMMA: float = between(0, 10)
    LABEL_SMOOTHING: float = between(0, 0.5)
    FRAME_LOSS_WEIGHT: float = between(0, 10)
    GRADIENT_CLIP: float = between(0, 10**3)
    LR_PATIENCE: int = between(0, 10**4)
    PATIENCE: int = between(1, 10**4)
    EMA_DECAY: float = between(0, 0.99999)
    AMP: str = one_of("auto", "off", "fp16", "bf16")
    ROBUSTNESS: int = between(0, 10**6)
    TIME_BUDGET_HOURS: float = between(0, 10**4)
    RESUME: bool
    NUM_WORKERS: int = between(1, 64)
    SEED: int = between(0, 2**31 - 1)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            self._check(item, getattr(self, item.name))
        if self.EPOCHS and self.VAL_FRACTION + self.TEST_FRACTION > 0.9:
            raise ValueError(
                f"VAL_FRACTION {self.VAL_FRACTION} and TEST_FRACTION {self.TEST_FRACTION} leave too little for "
                "training: together at most 0.9"
            )
        if 2 * self.LSTM_HIDDEN % self.ATTENTION_HEADS:
            raise ValueError(
                f"ATTENTION_HEADS = {self.ATTENTION_HEADS} does not divide 2 * LSTM_HIDDEN = {2 * self.LSTM_HIDDEN}"
            )
        for name in ("CHECKPOINT", "WEIGHTS_PATH", "PREDICT_DIR"):
            if getattr(self, name) and not Path(getattr(self, name)).exists():
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} does not exist (seen from {Path.cwd()})"
                )
        known = torchvision.models.list_models(module=torchvision.models)
        if self.BACKBONE not in known:
            near = [name for name in known if name[:4] == self.BACKBONE[:4]]
            raise ValueError(
                f"BACKBONE = {self.BACKBONE!r} is no torchvision classification model; try {', '.join(near or known)}"
            )
        if self.COMPILE and self.GRADIENT_CHECKPOINTING:
            raise ValueError(
                "COMPILE and GRADIENT_CHECKPOINTING do not go together: turn one of them off"
            )
        if self.BATCH_SIZE % PROCESSES:
            raise ValueError(
                f"BATCH_SIZE = {self.BATCH_SIZE} is no multiple of {PROCESSES}, the number of processes"
            )
        if self.DATA_DIR == "none" and (self.EPOCHS or not self.PREDICT_DIR):
            raise ValueError(
                "DATA_DIR = 'none' is for scoring PREDICT_DIR with a CHECKPOINT and EPOCHS = 0"
            )
        if self.EPOCHS == 0 and not self.CHECKPOINT:
            raise ValueError(
                "EPOCHS = 0 trains nothing: name a trained model with CHECKPOINT, or train"
            )

    def _check(self, item: dataclasses.Field, value: Any) -> None:
        if item.type is float and type(value) in (int, str):  # YAML reads 1e-4 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if item.type is list and type(value) is str:  # -p METHODS FaceSwap
            value = [value]
        if type(value) is not item.type or (
            item.type is list and not all(isinstance(part, str) for part in value)
        ):
            wanted = "list of str" if item.type is list else getattr(item.type, "__name__", "")
            raise TypeError(f"{item.name} = {value!r} is {type(value).__name__}, not {wanted}")
        object.__setattr__(self, item.name, value)
        low, high = item.metadata.get("low"), item.metadata.get("high")
        if low is not None and not low <= value <= high:
            raise ValueError(f"{item.name} = {value!r} is out of range: from {low} to {high}")
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{item.name} = {value!r} is unknown: one of {', '.join(choices)}")

    @property
    def work_dir(self) -> Path:
        return Path(self.WORK_DIR)

    @property
    def time_budget(self) -> float:
        """Seconds for the whole run."""
        return 3600 * (self.TIME_BUDGET_HOURS or (11 if ON_KAGGLE else math.inf))

    @property
    def last_checkpoint(self) -> Path:
        return self.work_dir / "models" / "last_checkpoint.pth"

    @property
    def cache_dir(self) -> Path:
        return Path(self.CACHE_DIR or ("/tmp/clip_cache" if ON_KAGGLE else self.work_dir / "cache"))


PARAMETERS = [item.name for item in dataclasses.fields(Config)]


def meant(name: str, question: str) -> str:
    """The question with the parameter that is most like a name that is none, if there is one like it."""
    near = difflib.get_close_matches(name.upper(), PARAMETERS, n=1)
    return question.format(near[0]) if near else ""


def check_injected(history: list[str]) -> None:
    """Raises ValueError for a parameter of papermill's that does not exist: it warns and defines the name anyway.

    `history` holds the cells run so far. Papermill's assignments are a cell of its own, which begins in one way.
    """
    injected = [cell for cell in history if cell.startswith("# Parameters\n")]
    targets = [
        target
        for line in ast.parse("\n".join(injected)).body
        for target in getattr(line, "targets", [])
    ]
    for name in (target.id for target in targets if isinstance(target, ast.Name)):
        if name not in PARAMETERS:
            raise ValueError(
                f"{name} is no parameter"
                + (meant(name, "; is it {}?") or ". Section 2 lists them.")
            )


def parameters_from_environment(environ: dict[str, str]) -> dict[str, object]:
    """The parameters that DEEPFAKE_<NAME> variables set, read as YAML values (`25`, `false`, `[FaceSwap]`).

    Raises ValueError for a name that is no parameter, with the nearest one.
    """
    found = {}
    for variable, text in environ.items():
        if not variable.startswith("DEEPFAKE_"):
            continue
        name = variable.removeprefix("DEEPFAKE_")
        if name not in PARAMETERS:
            raise ValueError(f"{variable} sets no parameter" + meant(name, "; is it DEEPFAKE_{}?"))
        is_text = Config.__dataclass_fields__[name].type is str
        found[name] = text if is_text else yaml.safe_load(text)
    return found


# %% [markdown]
# A trained model must see new videos as it saw its training videos. So with CHECKPOINT, whatever shapes clips
# and network comes from that file.

# %%
TRAVELS_WITH_MODEL = (
    *(
        "FRAMES_PER_VIDEO",
        "CLIPS_PER_VIDEO",
        "CLIP_SECONDS",
        "IMAGE_SIZE",
        "FACE_CROP",
        "FACE_MARGIN",
        "MIRROR_TEST",
    ),
    *("BACKBONE", "LSTM_HIDDEN", "LSTM_LAYERS", "ATTENTION_HEADS"),
)


def saved_config(content: dict) -> dict:
    """The configuration in a model file, with what older files do not know of as it was then."""
    return {"CLIPS_PER_VIDEO": 1, "MIRROR_TEST": False, **content["config"]}


def adopt_checkpoint(config: Config) -> Config:
    """`config` with the settings of its CHECKPOINT for everything that shapes clips and network."""
    if not config.CHECKPOINT:
        return config
    saved = saved_config(
        torch.load(config.CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)
    )
    changed = {
        name: saved[name] for name in TRAVELS_WITH_MODEL if saved[name] != getattr(config, name)
    }
    if changed:
        print(
            f"From {config.CHECKPOINT}:",
            ", ".join(f"{name} = {value}" for name, value in changed.items()),
        )
    return dataclasses.replace(config, **changed)


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed of several numbers: SEED, epoch, ..."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device, with one number or several."""
    seed = mixed_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


_given = {name: globals()[name] for name in PARAMETERS}
check_injected(globals().get("In", []))  # IPython keeps there what was run
if not IN_NOTEBOOK:
    _given |= parameters_from_environment(dict(os.environ))
CONFIG = adopt_checkpoint(Config(**_given))
seed_everything(CONFIG.SEED)

# %% [markdown]
# What this run is going to do:

# %%
_steps = {
    "data": f"{CONFIG.DATA_DIR}; up to {CONFIG.MAX_VIDEOS_PER_CLASS or 'all'} videos a class",
    "clips": f"{CONFIG.CLIPS_PER_VIDEO} a video, of {CONFIG.FRAMES_PER_VIDEO} frames, {CONFIG.IMAGE_SIZE} pixels",
    "network": f"{CONFIG.BACKBONE}, BiLSTM 2 x {CONFIG.LSTM_HIDDEN}, attention with {CONFIG.ATTENTION_HEADS} heads",
    "training": f"up to {CONFIG.EPOCHS} epochs"
    if CONFIG.EPOCHS
    else f"none; the model is {CONFIG.CHECKPOINT}",
    "held out": ", ".join(CONFIG.HOLDOUT_METHODS) or "no manipulation, only recordings",
    "results": f"below {CONFIG.work_dir.resolve()}",
}
if SHOW_TABLES:
    with pd.option_context("display.max_colwidth", None):
        display(pd.Series(_steps, name="this run").to_frame())
