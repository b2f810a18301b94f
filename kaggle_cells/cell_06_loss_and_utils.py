# %% [markdown]
# <a id="section-6"></a>
# ## 6. Loss, early stopping, averaged weights, checkpoints
#
# **Focal loss** (Lin et al., 2017) turns down what is already well classified, so that many easy clips do not
# drown the few hard ones.

# %%
import copy
import dataclasses
import gc
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from cell_01_imports_and_setup import attached_files, replacing
from cell_02_global_config import Config


class FocalLoss(nn.Module):
    """Mean of (1 - p)^gamma * cross-entropy, p being the probability given to the true class.

    Logits and targets have any equal shape; gamma = 0 is the plain binary cross-entropy. `smoothing` s moves the
    targets of the cross-entropy from 0 and 1 to s / 2 and 1 - s / 2.
    """

    def __init__(self, gamma: float = 2.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.smoothing = gamma, smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        missed = (1 - torch.exp(-entropy)).clamp_min(
            1e-6
        )  # 0 ** gamma has no gradient for gamma < 1
        if self.smoothing:
            smooth = targets.lerp(torch.full_like(targets, 0.5), self.smoothing)
            entropy = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        return (missed**self.gamma * entropy).mean()


def build_loss(config: Config) -> FocalLoss:
    return FocalLoss(config.FOCAL_GAMMA if config.LOSS == "focal" else 0.0, config.LABEL_SMOOTHING)


# %% [markdown]
# **Early stopping** watches the validation AUC; between equal ones the lower loss is better.


# %%
class EarlyStopping:
    """Tells which epoch is the best so far and when `patience` epochs in a row were not."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best, self.best_epoch, self.waited = (-math.inf, -math.inf), 0, 0

    def update(self, epoch: int, auc: float, loss: float) -> bool:
        """Take in an epoch; True if it is the best so far."""
        if (auc, -loss) > self.best:
            self.best, self.best_epoch, self.waited = (auc, -loss), epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def should_stop(self) -> bool:
        return self.waited >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_epoch, self.waited = (
            tuple(state["best"]),
            state["best_epoch"],
            state["waited"],
        )


class WeightAverage(nn.Module):
    """The running mean of a network's weights and statistics, after each step: of all steps while they are few, then
    exponential with `decay`. Unlike torch's AveragedModel it never makes the CPU wait for the GPU."""

    steps: torch.Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).requires_grad_(False), decay
        self.register_buffer("steps", torch.zeros((), device=next(model.parameters()).device))

    def forward(self, clips: torch.Tensor) -> tuple:
        return self.module(clips)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` as they are now."""
        self.steps += 1
        share = self.steps.reciprocal().clamp(min=1 - self.decay)
        own, theirs = (
            itertools.chain(network.parameters(), network.buffers())
            for network in (self.module, model)
        )
        for mean, value in zip(own, theirs, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, share.to(mean.dtype))
            else:
                mean.copy_(value)


# %% [markdown]
# **Checkpoints** replace their predecessor only when they are complete, and hold nothing but tensors and plain
# values, so `torch.load(..., weights_only=True)` reads them: a file from a stranger cannot run code.

# %%
DOES_NOT_SHAPE_TRAINING = {
    *(
        "DATA_DIR",
        "WORK_DIR",
        "CACHE_DIR",
        "PREDICT_DIR",
        "RESUME",
        "NUM_WORKERS",
        "TIME_BUDGET_HOURS",
    ),
    *("EPOCHS", "PATIENCE", "GRADIENT_CHECKPOINTING", "COMPILE", "ROBUSTNESS"),
}
FORMAT = 2  # of last_checkpoint.pth; another one cannot be gone on from
SUMMED = 64  # characters of a SHA-256


def checksum(file: Path, length: int) -> bytes:
    """The SHA-256 of the first `length` bytes of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while length > 0 and (block := stream.read(min(length, 2**20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest().encode()


def save_checkpoint(file: Path, content: dict, keep: Path | None = None) -> None:
    """Write `content` so that `file` is always the old or the new one, never a part of it; the old one becomes `keep`.

    The SHA-256 of all bytes becomes the comment of the archive that torch makes: `is_whole` compares them.
    Raises OSError, with the space that is left, if it cannot be written.
    """
    with replacing(file) as partial_file:
        try:
            torch.save(content, partial_file)
        except RuntimeError as error:  # as which torch reports a full disk
            free = shutil.disk_usage(file.parent).free / 2**20
            raise OSError(
                f"{file} cannot be written; {free:.0f} MiB are free there: {error}"
            ) from error
        with open(partial_file, "r+b") as stream:
            stream.seek(-2, os.SEEK_END)
            stream.write(
                SUMMED.to_bytes(2, "little")
            )  # an archive ends with its comment's length, and the comment
            stream.flush()
            stream.write(checksum(partial_file, stream.tell()))
            stream.flush()
            os.fsync(stream.fileno())
        if keep and file.exists():
            os.replace(file, keep)


def is_whole(file: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written."""
    length = file.stat().st_size - SUMMED
    with open(file, "rb") as stream:
        stream.seek(max(length, 0))
        return length > 0 and stream.read() == checksum(file, length)


def settings_changed(saved: dict, config: dict) -> list[str]:
    """Where two configurations differ in something that shapes training, a line for each parameter."""
    names = [name for name in config if name not in DOES_NOT_SHAPE_TRAINING]
    return [
        f"{n}: {saved.get(n)!r} then, {config[n]!r} now" for n in names if saved.get(n) != config[n]
    ]


# %% [markdown]
# **An interrupted run** goes on from its last checkpoint. If that is damaged, the one before it is still there: an
# epoch is lost, not the run. A new Kaggle session starts with an empty folder; there the output of an earlier one,
# attached as input, does as well, if it is of the same settings and data.


# %%
def previous_of(checkpoint: Path) -> Path:
    return checkpoint.with_name("previous_checkpoint.pth")


def peek(checkpoint: Path) -> dict:
    """What a checkpoint holds, without reading its weights yet."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


def readable(checkpoint: Path) -> Path | None:
    """A checkpoint, or if it is missing or damaged the one before, or None. What is damaged is said."""
    for file in (checkpoint, previous_of(checkpoint)):
        if file.is_file():
            if is_whole(file) and {"settings", "epoch"} <= peek(file).keys():
                return file
            print(f"{file} is damaged or no checkpoint: it is not used.")
    return None


def run_settings(config: Config, videos: pd.DataFrame) -> dict:
    """What must be the same for a run to go on."""
    return {"FORMAT": FORMAT, **dataclasses.asdict(config), "DATA": data_fingerprint(videos)}


def run_to_resume(checkpoint: Path, settings: dict, attached: Iterable[Path] = ()) -> Path | None:
    """The file to go on from: this run's own checkpoint, or else the one of those attached that came furthest.

    Raises ValueError, with what differs, if the run's own comes from other settings; attached ones are passed over.
    """
    if own := readable(checkpoint):
        if changed := settings_changed(peek(own)["settings"], settings):
            raise ValueError(
                f"{own} comes from a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Put them back to go on with it, choose another WORK_DIR (or --output), or let RESUME=False replace it."
            )
        if own != checkpoint and checkpoint.exists():
            os.replace(
                own, checkpoint
            )  # the next one to be kept as the one before must not be the damaged one
        return checkpoint if checkpoint.exists() else own
    epochs = {}
    for file in filter(None, map(readable, attached)):
        if changed := settings_changed(peek(file)["settings"], settings):
            print(
                f"{file} is not gone on from, since it comes from other settings:\n  "
                + "\n  ".join(changed)
            )
        else:
            epochs[file] = peek(file)["epoch"]
    return max(epochs, key=epochs.__getitem__, default=None)


def attached_checkpoints(inputs: Path = Path("/kaggle/input")) -> list[Path]:
    """Where outputs of earlier Kaggle sessions would have their checkpoint, in both of Kaggle's layouts."""
    files = attached_files("models/*_checkpoint.pth", inputs, depths=(1, 2, 3))
    return sorted({file.with_name("last_checkpoint.pth") for file in files})


def data_fingerprint(videos: pd.DataFrame) -> str:
    """Tells whether two runs have the same videos in the same splits, wherever these are mounted."""
    rows = sorted(f"{Path(row.path).name} {row.method} {row.split}" for row in videos.itertuples())
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return f"{len(rows)} videos, {digest[:12]}"


def model_file(
    model: nn.Module,
    config: Config,
    calibration: tuple[float, float, float],
    trained_on: Iterable[str],
    history_row: dict,
) -> dict:
    """What best_model.pth holds: all that is needed to score videos as in training, on any machine. A copy.

    `calibration` is temperature, offset and threshold. The offset becomes a part of the weights, of the bias that all
    logits have in common: P(fake) is `sigmoid(logit / temperature)`. `trained_on` are the names of manipulations.
    """
    paths = dict.fromkeys(
        ("DATA_DIR", "WORK_DIR", "CACHE_DIR", "CHECKPOINT", "PREDICT_DIR", "WEIGHTS_PATH"), ""
    )
    weights = {
        name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()
    }
    temperature, offset, threshold = calibration
    weights["frame_head.1.bias"] -= offset
    return {
        "format": 1,
        "model": weights,
        "config": {**dataclasses.asdict(config), **paths},
        "classes": ["real", "fake"],
        "trained_on": sorted(trained_on),
        "temperature": temperature,
        "threshold": threshold,
        **{name: history_row[name] for name in ("epoch", "val_auc", "val_loss")},
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of what trains it on several devices, or an average."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, WeightAverage)
    return unwrapped(model.module) if isinstance(model, wrappers) else model


def free_memory() -> None:
    """Give cached memory back, between training and evaluation say."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
