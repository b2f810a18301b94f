# %% [markdown]
# ## 7. One epoch of training, one of validation
#
# Both loops take batches that are already on the device. While one is computed, a thread reads the next one and
# sends it over.

# %%
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cell_02_global_config import Config
from cell_04_dataset_class import augment, normalize, to_float
from cell_05_model_definition import build_model
from cell_06_loss_and_utils import free_memory


def device_batches(loader: DataLoader, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """The loader's batches on the device, always one ahead."""

    def fetch() -> list[torch.Tensor] | None:
        batch = next(batches, None)
        return batch and [part.to(device, non_blocking=True) for part in batch]

    batches = iter(loader)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(fetch)
            yield batch


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The precision of mixed-precision training, None for plain float32.

    `auto` is bf16 where the GPU computes it natively (compute capability 8 and later), fp16 on older ones such
    as the T4, and float32 on the CPU.
    """
    if choice == "auto" and device.type != "cuda":
        return None
    if choice == "auto":
        choice = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]


def step_fits(config: Config, device: torch.device, precision: torch.dtype | None, batch: int) -> bool:
    """Whether the device has the memory for one training step on `batch` clips: it tries one on blank clips."""
    clips = torch.zeros(batch, config.FRAMES_PER_VIDEO, config.IMAGE_SIZE, config.IMAGE_SIZE, 3, dtype=torch.uint8)
    try:
        model = build_model(config).to(device)
        model.precision = precision
        output = model(normalize(augment(to_float(clips.to(device)))))
        (output.logit.float().sum() + output.frame_logits.float().sum()).backward()
        torch.optim.AdamW(model.parameters()).step()  # its two averages of each weight need memory too
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def choose_batch_size(config: Config, device: torch.device, precision: torch.dtype | None) -> int:
    """The most clips, 8 at most, that a training step can take on one GPU; on the CPU simply 8.

    Raises RuntimeError with advice if not even a single clip fits.
    """
    for batch in (8, 4, 2, 1):
        if device.type == "cpu" or step_fits(config, device, precision, batch):
            return batch
        free_memory()
    raise RuntimeError(
        f"one clip of {config.FRAMES_PER_VIDEO} frames of {config.IMAGE_SIZE} pixels does not fit into the GPU's "
        "memory: lower FRAMES_PER_VIDEO or IMAGE_SIZE, set GRADIENT_CHECKPOINTING=True, or choose a smaller BACKBONE"
    )


@dataclass
class Scores:
    """A loss and an AUC over clips, with what they were computed from.

    `logits`, `labels` and `rows` are (N,), `frame_logits` and `attention` (N, T); `auc` is NaN with one class.
    """

    loss: float
    auc: float
    logits: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    frame_logits: np.ndarray
    attention: np.ndarray
    seconds: float


def total_loss(output: tuple, labels: torch.Tensor, criterion: nn.Module, frame_weight: float) -> torch.Tensor:
    """The loss of the clips, plus that of their single frames against the same labels."""
    frames = criterion(output.frame_logits.float(), labels[:, None].expand_as(output.frame_logits))
    return criterion(output.logit.float(), labels) + frame_weight * frames


def scores_of(parts: list[tuple], losses: list[torch.Tensor], started: float, title: str) -> Scores:
    """Collect what the batches gave: (logits, labels, rows, frame logits, attention) each.

    Raises FloatingPointError if the loss is not finite, with what to try.
    """
    logits, labels, rows, frame_logits, attention = (
        torch.cat(part).float().cpu().numpy() for part in zip(*parts, strict=True)
    )
    sizes = torch.tensor([len(part[0]) for part in parts], dtype=torch.float64)
    loss = float((torch.stack(losses).double().cpu() * sizes).sum() / sizes.sum())
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{title}: the loss is {loss}. Try a lower LEARNING_RATE, or AMP='off' to see whether half precision is "
            "the cause"
        )
    auc = float(roc_auc_score(labels, logits)) if len(np.unique(labels)) == 2 else math.nan
    return Scores(loss, auc, logits, labels, rows.astype(int), frame_logits, attention, time.perf_counter() - started)


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    *,
    frame_weight: float = 0.0,
    gradient_clip: float = 0.0,
    average: AveragedModel | None = None,
    title: str = "training",
) -> Scores:
    """One pass over the loader. Raises FloatingPointError if the loss is not finite."""
    model.train()
    started, parts, losses = time.perf_counter(), [], []
    bar = tqdm(device_batches(loader, device), total=len(loader), desc=title, unit="batch", leave=False)
    for step, (clips, labels, rows) in enumerate(bar, 1):
        output = model(normalize(augment(to_float(clips))))
        loss = total_loss(output, labels, criterion, frame_weight)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if gradient_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.update_parameters(model)
        parts.append((output.logit.detach(), labels, rows, output.frame_logits.detach(), output.attention.detach()))
        losses.append(loss.detach())
        if step % 10 == 0:  # reading the loss makes the CPU wait for the GPU, so seldom
            bar.set_postfix(loss=f"{losses[-1].item():.3f}")
    return scores_of(parts, losses, started, title)


@torch.no_grad()  # not inference_mode: DataParallel's threads may not touch its tensors
def validate(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    device: torch.device,
    *,
    frame_weight: float = 0.0,
    title: str = "validation",
) -> Scores:
    """Score every clip of the loader, in its order."""
    model.eval()
    started, parts, losses = time.perf_counter(), [], []
    for clips, labels, rows in tqdm(device_batches(loader, device), total=len(loader), desc=title, leave=False):
        output = model(normalize(to_float(clips)))
        parts.append((output.logit, labels, rows, output.frame_logits, output.attention))
        losses.append(total_loss(output, labels, criterion, frame_weight))
    return scores_of(parts, losses, started, title)
