# %% [markdown]
# <a id="section-6"></a>
# ## 6. Loss, early stopping, averaged weights, checkpoints
#
# **Focal loss** (Lin et al., 2017) gives little weight to clips that are already classified well,
# so that many easy clips do not drown out the few hard ones.

# %%
import copy
import dataclasses
import gc
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from cell_01_imports_and_setup import IN_NOTEBOOK, attached_files, replacing, show_figure, styled
from cell_02_global_config import CONFIG, DAMAGE, Config
from cell_05_model_definition import DetectorOutput


# %%
class FocalLoss(nn.Module):
    """Mean of (1 - p)^gamma * cross-entropy, where p is the probability of the true class.

    That of the clips, plus `frame_weight` times that of single frames against the same labels.
    gamma = 0 is plain binary cross-entropy.
    """

    def __init__(self, gamma: float = 2.0, frame_weight: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.frame_weight = gamma, frame_weight

    def forward(self, output: DetectorOutput, labels: torch.Tensor) -> torch.Tensor:
        frames = self.of(output.frame_logits, labels[:, None].expand_as(output.frame_logits))
        return self.of(output.logit, labels) + self.frame_weight * frames

    def of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of logits with targets of the same shape."""
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        # Clamped, because 0 ** gamma has no gradient for gamma < 1.
        missed = (1 - torch.exp(-entropy)).clamp_min(1e-6)
        return (missed**self.gamma * entropy).mean()


# %% [markdown]
# **Early stopping** watches the validation AUC; of two equal ones, the lower loss is better.


# %%
def best_epoch(history: list[dict]) -> int:
    """The epoch with the highest AUC, and of these the lowest loss; 0 before the first."""
    best = max(history, key=lambda row: (row["val_auc"], -row["val_loss"]), default={"epoch": 0})
    return best["epoch"]


def should_stop(history: list[dict], patience: int) -> bool:
    """Whether `patience` epochs in a row were not better than the best."""
    return len(history) - best_epoch(history) >= patience


# %% [markdown]
# **Averaged weights** are less noisy than those of any single step: they are what is validated.


# %%
def by_dtype(tensors: Iterable[torch.Tensor]) -> dict[torch.dtype, list[torch.Tensor]]:
    """Lists for torch's `_foreach` functions, which take a few kernels for all of a list."""
    found: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return found


class ModelEMA(nn.Module):
    """An exponential moving average of a network's weights and statistics over the steps.

    It starts as the plain mean of the first steps, and unlike torch's AveragedModel never makes the
    CPU wait for the GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).requires_grad_(False), decay
        self.steps = 0

    def get_extra_state(self) -> int:
        """A part of the state dict."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state

    def forward(self, clips: torch.Tensor) -> tuple:
        return self.module(clips)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the current weights of `model` to the average."""
        self.steps += 1
        share = max(1 / self.steps, 1 - self.decay)
        theirs, own = (by_dtype(part.state_dict().values()) for part in (model, self.module))
        for dtype, means in own.items():
            if dtype.is_floating_point:
                torch._foreach_lerp_(means, theirs[dtype], share)
            else:
                torch._foreach_copy_(means, theirs[dtype])


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of a wrapper: DataParallel, DistributedDataParallel or an average."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, ModelEMA)
    return unwrapped(model.module) if isinstance(model, wrappers) else model


def free_memory() -> None:
    """Return unused GPU memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# %% [markdown]
# **Checkpoints** replace their predecessor only once they are complete. They hold nothing but
# tensors and plain values, so that `torch.load(..., weights_only=True)` reads them: a file from a
# stranger cannot run code. Their zip archive holds a checksum of each record, which tells damage.

# %%
FORMAT = 4  # of last_checkpoint.pth; a run saved in another format cannot be resumed
RESUMABLE_CHANGES = {  # parameters that may change when a run is resumed
    *("DATA_DIR", "WORK_DIR", "CACHE_DIR", "PREDICT_DIR", "RESUME", "NUM_WORKERS"),
    *("TIME_BUDGET_HOURS", "EPOCHS", "PATIENCE", "GRADIENT_CHECKPOINTING", "ROBUSTNESS"),
}


def save_checkpoint(file: Path, content: dict, keep: Path | None = None) -> None:
    """Replace `file` atomically; the old one becomes `keep`.

    Raises OSError, with the space that is left, if it cannot be written.
    """
    with replacing(file) as partial_file:
        try:
            torch.save(content, partial_file)
        except RuntimeError as error:  # torch's way to report a full disk
            free = shutil.disk_usage(file.parent).free / 2**20
            message = f"{file} cannot be written; {free:.0f} MiB are free there: {error}"
            raise OSError(message) from error
        with open(partial_file, "rb+") as stream:
            os.fsync(stream.fileno())
        if keep and file.exists():
            os.replace(file, keep)


def previous_of(checkpoint: Path) -> Path:
    return checkpoint.with_name("previous_checkpoint.pth")


def read_checkpoint_metadata(checkpoint: Path) -> dict:
    """The content of a checkpoint, its weights memory-mapped and not read yet."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


def is_valid_checkpoint(file: Path) -> bool:
    """Whether a file is a checkpoint of a run and agrees with its checksums."""
    try:
        with ZipFile(file) as archive:
            # torch does not read a record marked as a folder: its tensor would be garbage.
            marked = any(record.external_attr for record in archive.infolist())
            damaged = marked or archive.testzip() is not None
        return not damaged and {"settings", "epoch"} <= read_checkpoint_metadata(file).keys()
    except DAMAGE:
        return False


def latest_valid_checkpoint(checkpoint: Path) -> Path | None:
    """A checkpoint, or the previous one if it is missing or damaged, or None. Reports damage."""
    for file in filter(Path.is_file, (checkpoint, previous_of(checkpoint))):
        if is_valid_checkpoint(file):
            return file
        print(f"{file} is damaged or not a checkpoint: skipped.")
    return None


# %% [markdown]
# **Resuming.** An interrupted run resumes from its last checkpoint, or from the previous one if
# that is damaged: an epoch is lost, not the run. A new Kaggle session starts with an empty folder;
# there, the attached output of an earlier session is used if its settings and data are the same.


# %%
class RunState:
    """What a run needs to resume, in `file`, and the best model so far, in `best_file` beside it.

    `parts` have a `state_dict`: model, optimizer, ...; `facts` are settings, batch size, precision
    and the origin of the initial weights; `history` has a row for each epoch.
    """

    def __init__(self, file: Path, parts: dict[str, Any], **facts: Any) -> None:
        self.file, self.best_file = file, file.with_name("best_model.pth")
        self.parts, self.facts = parts, facts
        self.history: list[dict] = []
        self.best: dict = {}  # see `model_file`

    def save(self) -> None:
        """Write the state after an epoch, and the model if it is the best one."""
        content = {name: part.state_dict() for name, part in self.parts.items()} | self.facts
        epoch = len(self.history)
        content |= {"epoch": epoch, "history": self.history, "best": self.best}
        save_checkpoint(self.file, {"format": FORMAT, **content}, keep=previous_of(self.file))
        if epoch == 1:  # then the previous one is of a run that this one replaces
            previous_of(self.file).unlink(missing_ok=True)
        if self.best.get("epoch") == epoch:
            save_checkpoint(self.best_file, self.best)

    def load(self, file: Path, write: bool) -> None:
        """Restore a checkpoint; `write` the best model too, which may be missing or a later one."""
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            # A loss scale is right for the precision that it was found for.
            if name != "scaler" or saved["precision"] == self.facts["precision"]:
                part.load_state_dict(saved[name])
        self.history, self.best = saved["history"], saved["best"]
        self.facts["initial_weights"] = saved["initial_weights"]
        if write:
            save_checkpoint(self.best_file, self.best)


# %%
def run_settings(config: Config, videos: pd.DataFrame) -> dict:
    """What must be the same for a run to resume: parameters and videos, wherever they are."""
    rows = sorted(f"{Path(row.path).name} {row.method} {row.split}" for row in videos.itertuples())
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return {**dataclasses.asdict(config), "DATA": f"{len(rows)} videos, {digest[:12]}"}


def why_not_resumable(checkpoint: Path, settings: dict) -> str:
    """Why a run with these settings cannot resume from a checkpoint; empty if it can."""
    saved = read_checkpoint_metadata(checkpoint)
    if saved.get("format") != FORMAT:
        return "was saved by another version of this notebook"
    changed = [
        f"{name}: {saved['settings'].get(name)!r} then, {value!r} now"
        for name, value in settings.items()
        if name not in RESUMABLE_CHANGES and saved["settings"].get(name) != value
    ]
    return "\n  ".join(["comes from a run with other settings:", *changed]) if changed else ""


# %%
def find_resume_checkpoint(
    checkpoint: Path, settings: dict, attached: Iterable[Path] = ()
) -> Path | None:
    """The file to resume from: the run's own checkpoint, else the latest of those attached.

    Raises ValueError, with the reason, if the run's own cannot be resumed; attached ones that
    cannot are reported and skipped.
    """
    if own := latest_valid_checkpoint(checkpoint):
        if reason := why_not_resumable(own, settings):
            raise ValueError(
                f"{own} {reason}\nGo back to what it was started with to resume it, choose another "
                "WORK_DIR (or --output) to keep it, or set RESUME=False to replace it."
            )
        if own != checkpoint and checkpoint.exists():
            os.replace(own, checkpoint)  # or the damaged one would become the previous one
        return checkpoint if checkpoint.exists() else own
    epochs = {}
    for file in filter(None, map(latest_valid_checkpoint, attached)):
        if reason := why_not_resumable(file, settings):
            print(f"Skipped: {file} {reason}")
        else:
            epochs[file] = read_checkpoint_metadata(file)["epoch"]
    return max(epochs, key=epochs.__getitem__, default=None)


def attached_checkpoints(inputs: Path = Path("/kaggle/input")) -> list[Path]:
    """Last checkpoints in attached outputs of earlier sessions, in both of Kaggle's layouts."""
    files = attached_files("models/*_checkpoint.pth", inputs, depths=(1, 2, 3))
    return sorted({file.with_name("last_checkpoint.pth") for file in files})


# %% [markdown]
# **The result**, `best_model.pth`, holds all that is needed to score videos on any machine.


# %%
def model_file(
    model: nn.Module,
    config: Config,
    calibration: dict[str, float],
    trained_on: Iterable[str],
    history_row: dict,
) -> dict:
    """The content of best_model.pth: a copy of the weights, no paths of this machine.

    `calibration` is temperature, offset, threshold, sure_real and sure_fake: P(fake) is
    `sigmoid((logit - offset) / temperature)`. `trained_on` names manipulations.
    """
    paths = ["DATA_DIR", "WORK_DIR", "CACHE_DIR", "PREDICT_DIR", "WEIGHTS_PATH"]
    paths += ["CHECKPOINT", "INITIAL_MODEL"]
    weights = model.state_dict().items()
    return {
        "format": 2,
        "model": {name: value.detach().to("cpu", copy=True) for name, value in weights},
        "config": {**dataclasses.asdict(config), **dict.fromkeys(paths, "")},
        "classes": ["real", "fake"],
        "trained_on": sorted(trained_on),
        **calibration,
        **{name: history_row[name] for name in ("epoch", "val_auc", "val_loss")},
    }


# %% [markdown]
# Focal loss beside cross-entropy: once a clip is classified well, it hardly counts any more.


# %%
@styled
def plot_losses(gammas: Iterable[float]) -> Figure:
    """The loss of one clip by the probability given to its true class, a line for each gamma."""
    figure, ax = plt.subplots(figsize=(7, 2.6))
    logits, target = torch.linspace(-4, 5, 100), torch.ones(())
    for gamma in gammas:
        loss = [FocalLoss(gamma).of(logit, target) for logit in logits]
        label = f"focal loss, gamma {gamma:g}" if gamma else "cross-entropy"
        ax.plot(logits.sigmoid(), loss, label=label)
    ax.set(xlabel="probability of the true class", ylabel="loss", ylim=(0, 3))
    ax.legend()
    return figure


if IN_NOTEBOOK:
    show_figure(plot_losses([0, CONFIG.FOCAL_GAMMA or 2]))
