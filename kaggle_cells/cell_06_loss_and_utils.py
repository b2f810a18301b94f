# %% [markdown]
# ## 6. Loss, early stopping, averaged weights, checkpoints
#
# **Focal loss** (Lin et al., 2017) turns down what is already well classified, so that many easy clips do not
# drown the few hard ones.

# %%
import dataclasses
import gc
import hashlib
import math
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cell_02_global_config import Config
from cell_03_data_processing import replacing


class FocalLoss(nn.Module):
    """Mean of (1 - p)^gamma * cross-entropy, p being the probability given to the true class.

    Logits and targets have any equal shape; gamma = 0 is the plain binary cross-entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        missed = (1 - torch.exp(-entropy)).clamp_min(1e-6)  # 0 ** gamma has no gradient for gamma < 1
        return (missed**self.gamma * entropy).mean()


def build_loss(config: Config) -> FocalLoss:
    return FocalLoss(config.FOCAL_GAMMA if config.LOSS == "focal" else 0.0)


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
        self.best, self.best_epoch, self.waited = tuple(state["best"]), state["best_epoch"], state["waited"]


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights and running statistics, or None for decay 0."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


# %% [markdown]
# **Checkpoints** replace their predecessor only when they are complete, and hold nothing but tensors and plain
# values, so `torch.load(..., weights_only=True)` reads them: a file from a stranger cannot run code.

# %%
DOES_NOT_SHAPE_TRAINING = {
    *("DATA_DIR", "WORK_DIR", "CACHE_DIR", "PREDICT_DIR", "RESUME", "NUM_WORKERS", "TIME_BUDGET_HOURS"),
    *("EPOCHS", "PATIENCE", "GRADIENT_CHECKPOINTING"),
}


def save_checkpoint(file: Path, content: dict) -> None:
    """Write `content` so that `file` is always either the old or the new one, never a part of it."""
    with replacing(file) as partial_file:
        torch.save(content, partial_file)


def settings_changed(saved: dict, config: dict) -> list[str]:
    """Where two configurations differ in something that shapes training, a line for each parameter."""
    names = [name for name in config if name not in DOES_NOT_SHAPE_TRAINING]
    return [f"{n}: {saved.get(n)!r} then, {config[n]!r} now" for n in names if saved.get(n) != config[n]]


def data_fingerprint(videos: pd.DataFrame) -> str:
    """Tells whether two runs have the same videos in the same splits, wherever these are mounted."""
    rows = sorted(f"{Path(row.path).name} {row.method} {row.split}" for row in videos.itertuples())
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return f"{len(rows)} videos, {digest[:12]}"


def model_file(model: nn.Module, config: Config, temperature: float, threshold: float, history_row: dict) -> dict:
    """What best_model.pth holds: all that is needed to score videos as in training, on any machine."""
    paths = dict.fromkeys(("DATA_DIR", "WORK_DIR", "CACHE_DIR", "CHECKPOINT", "PREDICT_DIR", "WEIGHTS_PATH"), "")
    return {
        "format": 1,
        "model": model.state_dict(),
        "config": {**dataclasses.asdict(config), **paths},
        "classes": ["real", "fake"],
        "temperature": temperature,
        "threshold": threshold,
        **{name: history_row[name] for name in ("epoch", "val_auc", "val_loss")},
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of DataParallel or an average."""
    return unwrapped(model.module) if isinstance(model, (nn.DataParallel, AveragedModel)) else model


def free_memory() -> None:
    """Give cached memory back, between training and evaluation say."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
