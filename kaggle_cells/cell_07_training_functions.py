# %% [markdown]
# <a id="section-7"></a>
# ## 7. One epoch of training, one of validation
#
# While the device computes one batch, a thread loads the next one. Results are read back only every
# tenth step, because each reading makes the CPU wait for the GPU.

# %%
import atexit
import datetime
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cell_01_imports_and_setup import (
    IN_NOTEBOOK,
    RANK,
    WORLD_SIZE,
    native_precision,
    show_figure,
    styled,
)
from cell_02_global_config import Config
from cell_03_data_processing import cache_clips
from cell_04_dataset_class import (
    Batch,
    DeviceRandom,
    PairedGenerator,
    augment,
    normalize,
    to_float,
    with_self_blends,
)
from cell_05_model_definition import DeepfakeDetector, DetectorOutput, build_model
from cell_06_loss_and_utils import FocalLoss, ModelEMA, by_dtype, free_memory, unwrapped

LOG_EVERY = 10  # steps
BAD_STEPS = 5  # so many non-finite steps in a row end the run
NOT_FINITE_ADVICE = "Try a lower LEARNING_RATE, or AMP='off' to see if half precision is the cause."
NO_BAR = tqdm(disable=True)


# %%
def device_batches(loader: DataLoader, device: torch.device) -> Iterator[Batch]:
    """The loader's batches with clips, landmarks and labels on the device, loaded one ahead."""
    if device.type == "cpu":  # nothing would overlap
        yield from loader
        return

    def to_device(batch: Batch) -> Batch:
        moved = [part.to(device, non_blocking=True) for part in batch[:3]]
        return Batch._make([*moved, *batch[3:]])

    def fetch() -> Batch | None:
        batch = next(batches, None)
        try:
            return batch and to_device(batch)
        except RuntimeError as error:
            require_out_of_memory(error)
            return batch  # it will fit when the step before it has ended

    batches = iter(loader)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch)
        while (batch := ahead.result()) is not None:
            if batch.clips.device.type == "cpu":
                free_memory()
                batch = to_device(batch)
            ahead = pool.submit(fetch)
            yield batch


# %% [markdown]
# **Precision.** Half precision is fast, but its range is small. If gradients overflow, `LossScaler`
# skips the step without making the CPU wait, and for fp16 it adjusts the scale of the loss.


# %%
def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None for float32.

    `auto` is bf16 where the GPU computes it natively (compute capability 8 and later), fp16 on
    older ones such as the T4, and float32 on the CPU.
    """
    choice = native_precision(device) if choice == "auto" else choice
    return {"off": None, "fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]


class LossScaler(torch.amp.GradScaler):
    """Skips optimizer steps with non-finite gradients. The loss is scaled for fp16 only."""

    def __init__(self, device: torch.device, precision: torch.dtype | None) -> None:
        self.scales = precision == torch.float16
        super().__init__(device.type, init_scale=2.0**16 if self.scales else 1.0)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(new_scale if self.scales else 1.0)


# %% [markdown]
# **Memory.** The batch size is found by trying. If memory runs out later, because something else
# uses the GPU, the same batch is computed in smaller parts: slower, but with the same result. In
# training their gradients add up.

# %%
OUT_OF_MEMORY = "out of memory|can't allocate memory|ALLOC_FAILED|ALLOCATION_FAILED"
OUT_OF_MEMORY += "|(CUBLAS|CUDNN)_STATUS_NOT_INITIALIZED"
# cuDNN, without room for its workspace
OUT_OF_MEMORY += "|unable to find an engine to execute|Unable to find a valid cuDNN algorithm"


def require_out_of_memory(error: RuntimeError) -> None:
    """Raise the error, unless a device or one of its libraries could not allocate memory."""
    if not re.search(OUT_OF_MEMORY, str(error)):
        raise error


def halved(size: int, in_step: bool = False) -> int:
    """Half of the clips computed at once. Raises RuntimeError, with advice, if there is no half."""
    if size == 1 or (in_step and WORLD_SIZE > 1):  # others would wait in the middle of their step
        raise RuntimeError(
            f"memory ran out with {size} clips at once. Set GRADIENT_CHECKPOINTING=True and run "
            "again to resume after the last complete epoch. A smaller BATCH_SIZE, "
            "FRAMES_PER_VIDEO, IMAGE_SIZE or BACKBONE saves memory too, but starts over"
        )
    half = (size + 1) // 2
    print(f"Memory ran out with {size} clips at once: computing {half} at a time from now on")
    free_memory()
    return half


# %%
def in_parts(
    compute: Callable,
    columns: Sequence[torch.Tensor],
    size: int | None,
    in_step: bool = False,
    multiple: int = 1,
    undo: Callable[[], None] = lambda: None,
) -> tuple[list, int | None]:
    """What `compute` makes of tensors of B clips, `size` clips at once (None: all), and the size.

    Whenever memory runs out, all starts again after `undo`, with half the size, but parts stay
    multiples of `multiple`.
    """
    count = len(columns[0])
    while True:
        most = min(size or count, count)
        split = (column.split(most + most % multiple) for column in columns)
        parts = zip(*split, strict=True) if most < count else [columns]
        try:
            return [compute(*part) for part in parts], size
        except RuntimeError as error:
            require_out_of_memory(error)
        size = halved(most, in_step)  # only here, because the error keeps tensors in memory
        undo()


# %%
def step_fits(
    config: Config, device: torch.device, precision: torch.dtype | None, count: int
) -> bool:
    """Whether a training step on `count` blank clips fits into the device's memory."""
    frames, size = config.FRAMES_PER_VIDEO, config.IMAGE_SIZE
    batch = Batch(
        torch.zeros(count, frames, size, size, 3, dtype=torch.uint8, device=device),
        torch.full((count, frames, 5, 2), math.nan, device=device),
        *(None, None),
        blend=torch.arange(count) % 2 == 1,
    )
    try:
        model = build_model(config).to(device)
        model.precision = precision
        others = [weight.clone() for weight in model.parameters()]  # EMA, or DDP's buckets
        output = model(normalize(augment(batch, PairedGenerator(device, [0]), config)))
        (output.logit.sum() + output.frame_logits.sum()).backward()
        torch.optim.AdamW(model.parameters()).step()  # allocates two averages of each weight
        del others
    except RuntimeError as error:
        require_out_of_memory(error)
        return False
    return True


def choose_batch_size(config: Config, device: torch.device, precision: torch.dtype | None) -> int:
    """The most clips, 8 at most, that a training step can take on one device.

    Raises RuntimeError with advice if not even one clip fits.
    """
    for count in (8, 4, 2, 1):
        if step_fits(config, device, precision, count):
            return count
        free_memory()
    raise RuntimeError(
        f"one clip of {config.FRAMES_PER_VIDEO} frames of {config.IMAGE_SIZE} pixels does not fit "
        "into the GPU's memory: lower FRAMES_PER_VIDEO or IMAGE_SIZE, set "
        "GRADIENT_CHECKPOINTING=True, or choose a smaller BACKBONE"
    )


# %% [markdown]
# **A training step** returns its output, loss and gradient norm as tensors on the device, so the
# CPU can prepare the next step without waiting for them.


# %%
def flat_statistics(model: nn.Module) -> dict[torch.dtype, torch.Tensor]:
    """The running statistics of a network, one flat tensor for each dtype."""
    kinds = by_dtype(model.buffers()).items()
    return {dtype: torch.cat([*map(torch.flatten, buffers)]) for dtype, buffers in kinds}


def roll_back(model: nn.Module, before: dict[torch.dtype, torch.Tensor], failed: Any) -> None:
    """Restore the running statistics if a step has `failed`, a bool or a tensor of one."""
    now = flat_statistics(model)
    for dtype, buffers in by_dtype(model.buffers()).items():
        kept = torch.where(failed, before[dtype], now[dtype])
        parts = kept.split([buffer.numel() for buffer in buffers])
        views = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
        torch._foreach_copy_(buffers, views)


def clip_gradients(model: nn.Module, limit: float, scaler: LossScaler) -> torch.Tensor:
    """Clip gradients that are still scaled by their true norm, 0 for no limit, and return the norm.

    If it is not finite, all become NaN, which the scaler finds.
    """
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    norm = norm / scaler.scale(torch.ones_like(norm))
    share = ((limit or math.inf) / (norm + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, torch.where(norm.isfinite(), share, math.nan))
    return norm


# %%
@dataclass
class Trainer:
    """What a training step needs. `micro_batch` clips are computed at once, None for all.

    `interrupted` is True from the start of an epoch until its result has been saved.
    """

    model: nn.Module
    criterion: FocalLoss
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    gradient_clip: float = 0.0
    average: ModelEMA | None = None
    micro_batch: int | None = None
    interrupted: bool = False
    bad_in_a_row: int = 0

    def step(self, clips: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any, Any]:
        """One optimizer step on normalised clips (B, T, 3, S, S): output, loss, gradient norm.

        If loss or gradients are not finite, weights and running statistics stay what they were.
        """
        before = flat_statistics(self.model)
        self.optimizer.zero_grad(set_to_none=True)

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            roll_back(self.model, before, labels.new_ones((), dtype=torch.bool))

        compute = partial(self.add_gradients, len(clips))
        size = self.micro_batch
        parts, self.micro_batch = in_parts(compute, (clips, labels), size, True, undo=undo)
        norm = clip_gradients(self.model, self.gradient_clip, self.scaler)
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        roll_back(self.model, before, ~norm.isfinite())
        if self.average is not None:
            self.average.update(self.model)
        outputs, losses = zip(*parts, strict=True)
        columns = map(torch.cat, zip(*outputs, strict=True))
        return DetectorOutput(*columns), torch.stack(losses).sum(), norm

    def add_gradients(
        self, count: int, clips: torch.Tensor, labels: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Output and loss of some of a step's `count` clips, which add their gradients."""
        output = self.model(clips)
        loss = self.criterion(output, labels) * len(clips) / count
        # An infinite loss can have finite gradients. Backward from NaN makes all of them NaN, in
        # every process, and the scaler skips the step.
        self.scaler.scale(loss).backward(torch.where(loss.isfinite(), 1.0, math.nan))
        return [value.detach() for value in output], loss.detach()


# %% [markdown]
# **Scores** are what an epoch produced. A skipped step is counted; a loss that stays `nan` ends the
# run and names the clips.


# %%
class BatchScores(NamedTuple):
    """The results of B clips: tensors, or NumPy arrays once concatenated."""

    losses: Any  # (B,), each clip has its batch's
    logits: Any
    labels: Any
    rows: Any
    frame_logits: Any  # (B, T)

    @classmethod
    def of(cls, output: DetectorOutput, loss: torch.Tensor, batch: Batch) -> "BatchScores":
        losses = loss.expand(len(output.logit))
        return cls(losses, output.logit, batch.labels, batch.rows, output.frame_logits)


@dataclass
class Scores:
    """Loss and AUC (NaN with one class) over N clips, and what they were computed from.

    Arrays are in the order of rows, a self-blend after its original.
    """

    loss: float
    auc: float
    logits: np.ndarray  # (N,), so are labels and rows
    labels: np.ndarray
    rows: np.ndarray
    frame_logits: np.ndarray  # (N, T)
    seconds: float
    skipped: int = 0  # steps


# %%
def concat_scores(parts: list[BatchScores]) -> BatchScores:
    """All batches as NumPy arrays; stills, which have fewer frames, are filled up with NaN."""
    longest = max(part.frame_logits.shape[1] for part in parts)

    def filled(value: Any) -> torch.Tensor:
        value = torch.as_tensor(value)  # other processes send arrays
        missing = longest - value.shape[1] if value.ndim == 2 else 0
        return nn.functional.pad(value, (0, missing), value=math.nan) if missing else value

    columns = [torch.cat([*map(filled, column)]) for column in zip(*parts, strict=True)]
    return BatchScores(*(column.cpu().numpy() for column in columns))


def auc_by_ranks(fake: np.ndarray, scores: np.ndarray) -> float:
    """P(a fake scores higher than a real video), ties half; NaN with one class.

    Mann-Whitney's statistic of (N,) bool and float: fast enough to resample.
    """
    reals, fakes = np.sort(scores[~fake]), scores[fake]
    if not (len(reals) and len(fakes)):
        return math.nan
    above = np.searchsorted(reals, fakes) + np.searchsorted(reals, fakes, side="right")
    return float(above.mean() / 2 / len(reals))


def scores_of(parts: list[BatchScores], started: float, title: str, skipped: int = 0) -> Scores:
    """The scores of all processes. Raises FloatingPointError if the loss is not finite."""
    shares = all_gather_object(concat_scores(parts) if parts else None)
    whole = concat_scores([share for share in shares if share])
    order = np.lexsort((whole.labels, whole.rows))
    whole = BatchScores(*(column[order] for column in whole))
    loss = float(whole.losses.mean(dtype=np.float64))
    if not math.isfinite(loss):
        raise FloatingPointError(f"{title}: the loss is {loss}. {NOT_FINITE_ADVICE}")
    auc, seconds = auc_by_ranks(whole.labels == 1, whole.logits), time.perf_counter() - started
    return Scores(loss, auc, *whole[1:], seconds=seconds, skipped=skipped)


# %%
class EpochMeter:
    """Collects the results of an epoch's steps, watches for non-finite ones, and moves the bar."""

    def __init__(self, trainer: Trainer, dataset: Any, epoch: int, bar: tqdm) -> None:
        self.trainer, self.dataset, self.epoch, self.bar = trainer, dataset, epoch, bar
        self.started, self.steps, self.skipped = time.perf_counter(), 0, 0
        self.waiting: list[tuple[Any, BatchScores, torch.Tensor]] = []  # still on the device
        self.finite: list[BatchScores] = []

    def update(
        self, batch: Batch, output: DetectorOutput, loss: torch.Tensor, norm: torch.Tensor
    ) -> None:
        scores = BatchScores.of(output, loss, batch)
        self.waiting.append((batch.blend, scores, torch.stack([loss, norm])))
        if len(self.waiting) == LOG_EVERY:
            self.read()
        self.bar.update()

    def read(self) -> None:
        """Read back the last steps. Raises FloatingPointError after BAD_STEPS bad ones in a row."""
        figures = torch.stack([figures for *_, figures in self.waiting]).tolist()
        for (blend, scores, _), (loss, norm) in zip(self.waiting, figures, strict=True):
            self.steps += 1
            self.skipped += not math.isfinite(norm)
            self.check(scores.rows, blend, loss, norm)
            if math.isfinite(loss):
                self.finite.append(scores)
        self.waiting.clear()
        if self.finite and not self.bar.disable:
            self.bar.set_postfix(bar_figures(self), refresh=False)

    def check(self, rows: Any, blend: Any, loss: float, norm: float) -> None:
        trainer, scale = self.trainer, self.trainer.scaler.get_scale()
        overflow = math.isfinite(loss) and scale > 1  # a smaller scale will do for fp16
        bad = not (math.isfinite(norm) or overflow)
        trainer.bad_in_a_row = trainer.bad_in_a_row + 1 if bad else 0
        if trainer.bad_in_a_row >= BAD_STEPS:
            clips = zip(rows.tolist(), blend.tolist(), strict=True)
            raise FloatingPointError(
                f"epoch {self.epoch}, step {self.steps}: {BAD_STEPS} non-finite steps in a row. "
                f"Loss {loss}, gradient norm {norm}, loss scale {scale:g}; clips: "
                f"{', '.join(self.dataset.name(*clip) for clip in clips)}. {NOT_FINITE_ADVICE}"
            )

    def scores(self) -> Scores:
        """The whole epoch. Raises FloatingPointError if no step had a finite loss."""
        if self.waiting:
            self.read()
        title = f"epoch {self.epoch}"
        if not self.finite:
            raise FloatingPointError(f"{title}: no step has a finite loss. {NOT_FINITE_ADVICE}")
        return scores_of(self.finite, self.started, title, self.skipped)


# %%
def bar_figures(meter: EpochMeter) -> dict:
    """What the bar shows: loss and AUC so far, learning rate, speed, memory (a GPU's peak)."""
    so_far, seconds = concat_scores(meter.finite), time.perf_counter() - meter.started
    device, memory = meter.finite[0].logits.device, psutil.Process().memory_info().rss
    if device.type == "cuda":
        memory = torch.cuda.max_memory_reserved(device)
    figures = {
        "loss": f"{so_far.losses.mean():.3f}",
        "AUC": f"{auc_by_ranks(so_far.labels == 1, so_far.logits):.3f}",
        "lr": f"{meter.trainer.optimizer.param_groups[0]['lr']:.0e}",
        "clips/s": f"{WORLD_SIZE * len(so_far.labels) / seconds:.1f}",
        "memory": f"{memory / 2**30:.1f} GiB",
    }
    return figures | ({"skipped": meter.skipped} if meter.skipped else {})


# %%
def train_one_epoch(
    trainer: Trainer,
    loader: DataLoader,
    device: torch.device,
    random: PairedGenerator,
    epoch: int,
    config: Config,
    bar: tqdm = NO_BAR,
) -> Scores:
    """One pass over the loader, whose dataset has a `name` for each row. Epochs count from 1.

    Raises FloatingPointError, with epoch, step, loss scale and clips, after BAD_STEPS non-finite
    steps in a row.
    """
    trainer.model.train()
    trainer.interrupted = True
    meter = EpochMeter(trainer, loader.dataset, epoch, bar)
    size = None

    def shown(*part: torch.Tensor) -> torch.Tensor:
        return normalize(augment(Batch(*part), random, config))

    for batch in device_batches(loader, device):
        parts, size = in_parts(shown, batch, size, True, multiple=2)  # twins share their draws
        clips = torch.cat(parts) if parts[1:] else parts[0]
        meter.update(batch, *trainer.step(clips, batch.labels))
    return meter.scores()


# %%
@torch.no_grad()  # not inference_mode: DataParallel's threads may not touch its tensors
def score_batches(
    model: nn.Module, loader: DataLoader, criterion: FocalLoss, device: torch.device, bar: tqdm
) -> list[BatchScores]:
    """What the model says of every batch. Self-blends are the same each time."""
    found, size, random = [], None, DeviceRandom(device, [0])

    def score(*part: torch.Tensor) -> BatchScores:
        batch = Batch(*part)
        clips = with_self_blends(to_float(batch.clips), batch.landmarks, batch.blend, random)
        output = model(normalize(clips))
        return BatchScores.of(output, criterion(output, batch.labels), batch)

    for batch in device_batches(loader, device):
        parts, size = in_parts(score, batch, size)
        found += parts
        bar.update()
    return found


def validate(
    model: nn.Module,
    loader: DataLoader,
    criterion: FocalLoss,
    device: torch.device,
    *,
    title: str = "validation",
    bar: tqdm = NO_BAR,
) -> Scores:
    """Score every clip of the loader; in float32 if half precision overflows.

    Raises FloatingPointError if the loss is not finite even then.
    """
    network: Any = unwrapped(model.eval())
    started, precision = time.perf_counter(), getattr(network, "precision", None)
    given = model, loader, criterion, device, bar
    try:
        return scores_of(score_batches(*given), started, title)
    except FloatingPointError:
        if precision is None:
            raise
    print(f"{title}: {precision} overflows; scoring again in float32")
    network.precision = None
    try:
        return scores_of(score_batches(*given), started, title)
    finally:
        network.precision = precision


# %% [markdown]
# **Several processes**, started by `torchrun`, train one model on as many GPUs, of one machine or
# more (DistributedDataParallel); on Kaggle, skip this. The first one finds the videos and deals
# them out, and each makes the clips of its share. In training they start from equal weights, take
# equal shares of each batch, and average their gradients.


# %%
def join_processes(device: torch.device) -> None:
    """Join torchrun's other processes, however long the slowest needs for its share of the clips.

    Raises RuntimeError if some of them have a GPU and some have not.
    """
    if WORLD_SIZE == 1 or dist.is_initialized():
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo",
        timeout=datetime.timedelta(days=2),
    )
    atexit.register(dist.destroy_process_group)
    gpus = all_gather_object(device.type).count("cuda")
    if gpus not in (0, WORLD_SIZE):
        raise RuntimeError(
            f"{WORLD_SIZE} processes, but only {gpus} of them have their own usable GPU"
        )


def all_gather_object(value: Any) -> list:
    """The values of all processes, in the order of their ranks."""
    if WORLD_SIZE == 1:
        return [value]
    values: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The first process's value, in all of them."""
    return all_gather_object(value)[0]


def cache_clips_together(videos: pd.DataFrame, *options: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`cache_clips` of videos that all processes know: each makes a share, all get the result."""
    parts = all_gather_object(cache_clips(videos, *options, share=slice(RANK, None, WORLD_SIZE)))
    made, failed = map(pd.concat, zip(*parts, strict=True))
    return made.sort_index(ignore_index=True), failed.sort_index(ignore_index=True)


def help_to_prepare(*options: Any) -> dict[str, pd.DataFrame]:
    """Make shares of the videos that the first process sends, until it sends the splits' tables."""
    while not isinstance(sent := broadcast_object(None), dict):
        cache_clips_together(sent, *options)
    return sent


# %% [markdown]
# Does it learn? Twenty steps of a tiny network on toy clips: the real ones are still pictures, the
# fakes flicker.


# %%
@styled
def plot_toy_training(steps: int = 20) -> Figure:
    """The loss of a tiny detector over a few training steps."""
    labels, losses, cpu = torch.tensor([0.0, 1.0]).repeat(8), [], torch.device("cpu")
    with torch.random.fork_rng():  # the run's own random numbers must not depend on this
        torch.manual_seed(0)
        pool = nn.AdaptiveAvgPool2d(1)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten())
        model = DeepfakeDetector(backbone, 8, 8, 1, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        trainer = Trainer(model, FocalLoss(0.0), optimizer, LossScaler(cpu, None))
        for _ in range(steps):
            flicker = labels.view(-1, 1, 1, 1, 1) * torch.randn(16, 6, 3, 1, 1)
            losses.append(float(trainer.step(torch.randn(16, 1, 3, 8, 8) + flicker, labels)[1]))
    figure, ax = plt.subplots(figsize=(4, 2))
    ax.plot(losses)
    ax.set(xlabel="step", ylabel="loss")
    return figure


if IN_NOTEBOOK:
    show_figure(plot_toy_training())
