# %% [markdown]
# <a id="section-7"></a>
# ## 7. One epoch of training, one of validation
#
# Both loops take batches that are already on the device. While the GPU computes one, a thread reads the next one and
# sends it over. Results are read back every tenth step only, to show them: each time, the CPU waits for the GPU.

# %%
import atexit
import datetime
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cell_01_imports_and_setup import NO_BARS, PROCESSES, native_precision
from cell_02_global_config import Config
from cell_04_dataset_class import PairDraws, augment, normalize, to_float, with_self_blends
from cell_05_model_definition import Output, build_model
from cell_06_loss_and_utils import WeightAverage, free_memory, unwrapped

LOOK_EVERY = 10  # steps between two looks at the loss
BAD_STEPS = 5  # so many in a row that are not finite end the run
NOT_FINITE_ADVICE = (
    "Try a lower LEARNING_RATE, or AMP='off' to see whether half precision is the cause."
)


def device_batches(loader: DataLoader, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """The loader's batches on the device, always one ahead; on the CPU, where nothing could overlap, in turn."""
    if device.type == "cpu":
        yield from loader
        return

    def fetch() -> list[torch.Tensor] | None:
        batch = next(batches, None)
        return None if batch is None else [part.to(device, non_blocking=True) for part in batch]

    batches = iter(loader)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(fetch)
            yield batch


# %% [markdown]
# **Precision.** Half precision is fast, and sometimes a number in it is too large. `LossScaler` leaves out the step
# then, without the CPU having to ask the GPU, and for fp16 looks for the scale that fits.


# %%
def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The precision of mixed-precision training, None for plain float32.

    `auto` is bf16 where the GPU computes it natively (compute capability 8 and later), fp16 on older ones such
    as the T4, and float32 on the CPU.
    """
    choice = native_precision(device) if choice == "auto" else choice
    return {"off": None, "fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]


class LossScaler(torch.amp.GradScaler):
    """Leaves out optimizer steps whose gradients are not finite. The loss is scaled for fp16 only."""

    def __init__(self, device: torch.device, precision: torch.dtype | None) -> None:
        self.scales = precision == torch.float16
        super().__init__(device.type, init_scale=2.0**16 if self.scales else 1.0)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(new_scale if self.scales else 1.0)


# %% [markdown]
# **Memory.** The batch is chosen by trying. Should it not fit later on, since something else uses the GPU, the same
# batch is computed in smaller parts whose gradients add up: training goes on as if nothing had happened, slower.


# %%
def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or one of its libraries, has asked for memory in vain."""
    signs = [
        "out of memory",
        "can't allocate memory",
        "ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",
    ]
    signs += ["unable to find an engine to execute"]  # cuDNN, without room for its workspace
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        sign in str(error) for sign in signs
    )


def step_fits(
    config: Config, device: torch.device, precision: torch.dtype | None, batch: int
) -> bool:
    """Whether the device has the memory for one training step on `batch` clips: it tries one on blank clips."""
    frames = config.FRAMES_PER_VIDEO * config.CLIPS_PER_VIDEO
    clips = torch.zeros(batch, frames, config.IMAGE_SIZE, config.IMAGE_SIZE, 3, dtype=torch.uint8)
    landmarks, rows = torch.full((batch, frames, 5, 2), math.nan), torch.arange(batch)
    try:
        model = build_model(config).to(device)
        model.precision = precision
        others = [
            weight.clone() for weight in model.parameters()
        ]  # what an average, or DDP's buckets, will take
        shown = augment(
            clips.to(device), landmarks.to(device), rows.to(device), PairDraws(device, [0]), config
        )
        output = model(normalize(shown))
        (output.logit.float().sum() + output.frame_logits.float().sum()).backward()
        torch.optim.AdamW(
            model.parameters()
        ).step()  # its two averages of each weight need memory too
        del others
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def choose_batch_size(config: Config, device: torch.device, precision: torch.dtype | None) -> int:
    """The most clips, 8 at most, that a training step can take on one device.

    Raises RuntimeError with advice if not even a single clip fits.
    """
    for batch in (8, 4, 2, 1):
        if step_fits(config, device, precision, batch):
            return batch
        free_memory()
    raise RuntimeError(
        f"one clip of {config.FRAMES_PER_VIDEO} frames of {config.IMAGE_SIZE} pixels does not fit into the GPU's "
        "memory: lower FRAMES_PER_VIDEO or IMAGE_SIZE, set GRADIENT_CHECKPOINTING=True, or choose a smaller BACKBONE"
    )


# %% [markdown]
# **A training step** is one call. What the network said, the loss and the gradient's norm come back as tensors on
# the device, where nobody has waited for them.


# %%
def total_loss(
    output: Output, labels: torch.Tensor, criterion: nn.Module, frame_weight: float
) -> torch.Tensor:
    """The loss of the clips, plus that of their single frames against the same labels."""
    frames = criterion(output.frame_logits.float(), labels[:, None].expand_as(output.frame_logits))
    return criterion(output.logit.float(), labels) + frame_weight * frames


@dataclass
class Trainer:
    """Everything that takes part in a training step.

    `micro_batch` clips are computed at once, the whole batch if it is None; it is halved when memory runs out.
    `interrupted` is true from the start of an epoch until somebody has put away its result.
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    frame_weight: float = 0.0
    gradient_clip: float = 0.0
    average: WeightAverage | None = None
    warmup_epochs: int = 0
    micro_batch: int | None = None
    interrupted: bool = False
    bad_in_a_row: int = 0

    def step(
        self, clips: torch.Tensor, labels: torch.Tensor
    ) -> tuple[Output, torch.Tensor, torch.Tensor]:
        """One optimizer step on normalised clips (B, T, 3, S, S): output, loss, and norm of the gradients.

        If loss or gradients are not finite, weights and running statistics stay what they were.
        """
        statistics = [
            (buffer, buffer.clone()) for buffer in self.model.buffers()
        ]  # the forward pass changes them
        while (result := self.try_gradients(clips, labels)) is None:
            self.halve(len(clips))
            for buffer, before in statistics:
                buffer.copy_(before)
            free_memory()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        finite = norm.isfinite()
        for buffer, before in statistics:
            buffer.copy_(torch.where(finite, buffer, before))
        if self.average is not None:
            self.average.update(self.model)
        return *result, norm

    def try_gradients(
        self, clips: torch.Tensor, labels: torch.Tensor
    ) -> tuple[Output, torch.Tensor] | None:
        """Output and loss, with gradients left in the weights; None if the memory is too small."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            return self.accumulate(clips, labels)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None  # the error, which keeps the failed step's tensors alive, ends here

    def accumulate(self, clips: torch.Tensor, labels: torch.Tensor) -> tuple[Output, torch.Tensor]:
        """Forward and backward, in micro-batches: what the network said, and the loss of the whole batch."""
        size, outputs, losses = self.micro_batch or len(clips), [], []
        for some_clips, some_labels in zip(clips.split(size), labels.split(size), strict=True):
            output = self.model(some_clips)
            loss = total_loss(output, some_labels, self.criterion, self.frame_weight) * (
                len(some_clips) / len(clips)
            )
            # An infinite loss can have finite gradients. Starting backward from NaN makes all of them NaN, in every
            # process, and the scaler leaves the step out.
            self.scaler.scale(loss).backward(torch.where(loss.isfinite(), 1.0, math.nan))
            outputs.append([part.detach() for part in output])
            losses.append(loss.detach())
        return Output(*map(torch.cat, zip(*outputs, strict=True))), torch.stack(losses).sum()

    def halve(self, batch: int) -> None:
        """Compute half as many clips at once from now on. Raises RuntimeError, with advice, where that cannot be."""
        size = self.micro_batch or batch
        if (
            size == 1 or PROCESSES > 1
        ):  # other processes would wait for this one, in the middle of their step
            raise RuntimeError(
                f"memory ran out, computing {size} at a time. Set GRADIENT_CHECKPOINTING=True and run again: training "
                "goes on after its last complete epoch. A smaller BATCH_SIZE, FRAMES_PER_VIDEO, IMAGE_SIZE or BACKBONE "
                "needs less too, but starts anew"
            )
        self.micro_batch = (size + 1) // 2
        print(
            f"Memory ran out with {size} clips at once: batches are now computed in parts of {self.micro_batch}"
        )

    def warm_up(self, epochs: float) -> None:
        """Set the learning rates for a step that ends `epochs` after the start, if that is within the warm-up."""
        if epochs <= self.warmup_epochs:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * epochs / self.warmup_epochs

    def one_too_many(self, loss: float, norm: float) -> bool:
        """Take in a step's figures; True if now so many in a row were not finite that the run must end."""
        looks_for_scale = (
            math.isfinite(loss) and self.scaler.get_scale() > 1
        )  # fp16 will do with a smaller one
        bad = not (math.isfinite(norm) or looks_for_scale)
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        return self.bad_in_a_row >= BAD_STEPS


# %% [markdown]
# **The two loops** collect what the batches gave. A training step that was left out is counted; a loss that stays
# `nan` ends the run, with the clips at which it happened.


# %%
@dataclass
class Scores:
    """A loss and an AUC over clips, with what they were computed from.

    `logits`, `labels` and `rows` are (N,), `frame_logits` and `attention` (N, T), in the order of rows; `auc` is NaN
    with one class. `skipped` is the number of training steps left out.
    """

    loss: float
    auc: float
    logits: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    frame_logits: np.ndarray
    attention: np.ndarray
    seconds: float
    skipped: int = 0


class Part(NamedTuple):
    """What one batch gave for each of its clips, (B,) or (B, T): tensors, or NumPy arrays once it is `joined`."""

    losses: Any
    logits: Any
    labels: Any
    rows: Any
    frame_logits: Any
    attention: Any


def part_of(output: Output, loss: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> Part:
    """A batch's output as it is collected, without the graph behind it; each clip has the loss of the batch."""
    logits, frame_logits, attention = (value.detach().float() for value in output)
    return Part(loss.detach().expand(len(labels)), logits, labels, rows, frame_logits, attention)


def joined(parts: list[Part]) -> Part:
    """Batches put together, as NumPy arrays."""
    return Part(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def auc_of(labels: np.ndarray, logits: np.ndarray) -> float:
    """AUC-ROC, NaN with one class."""
    return float(roc_auc_score(labels, logits)) if len(np.unique(labels)) == 2 else math.nan


def scores_of(parts: list[Part], started: float, title: str, skipped: int = 0) -> Scores:
    """Put together what the batches gave, in all processes. Raises FloatingPointError if a loss is not finite."""
    shares = [share for share in gathered(joined(parts) if parts else None) if share]
    whole = Part(*(np.concatenate(column) for column in zip(*shares, strict=True)))
    order = np.argsort(whole.rows, kind="stable")
    losses, logits, labels, rows, frame_logits, attention = (column[order] for column in whole)
    loss = float(losses.mean(dtype=np.float64))
    if not math.isfinite(loss):
        raise FloatingPointError(f"{title}: the loss is {loss}. {NOT_FINITE_ADVICE}")
    seconds = time.perf_counter() - started
    return Scores(
        loss,
        auc_of(labels, logits),
        logits,
        labels,
        rows,
        frame_logits,
        attention,
        seconds,
        skipped,
    )


def progress(title: str, *loaders: DataLoader) -> tqdm:
    """A bar for all batches of these loaders, to be used in `with`."""
    return tqdm(
        total=sum(map(len, loaders)), desc=title, unit="batch", leave=False, disable=NO_BARS
    )


def memory_in_use(device: torch.device) -> float:
    """GiB: the most that PyTorch has reserved on a GPU so far; on the CPU what the process has now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def show(
    bar: tqdm,
    trainer: Trainer,
    parts: list[Part],
    device: torch.device,
    seconds: float,
    skipped: int,
) -> None:
    """Write behind the bar: loss and AUC so far, learning rate, speed, memory."""
    so_far = joined(parts)
    figures = {
        "loss": f"{so_far.losses.mean():.3f}",
        "AUC": f"{auc_of(so_far.labels, so_far.logits):.3f}",
        "lr": f"{trainer.optimizer.param_groups[0]['lr']:.0e}",
        "clips/s": f"{PROCESSES * len(so_far.labels) / seconds:.1f}",
        "memory": f"{memory_in_use(device):.1f} GiB",
    }
    bar.set_postfix(figures | ({"skipped": skipped} if skipped else {}))


def train_one_epoch(
    trainer: Trainer,
    loader: DataLoader,
    device: torch.device,
    draws: PairDraws,
    epoch: int,
    config: Config,
    bar: tqdm | None = None,
) -> Scores:
    """One pass over the loader, whose dataset tells the `name` of a row. The epoch counts from 1.

    Raises FloatingPointError, with epoch, step, loss scale and clips, if several steps in a row are not finite.
    """
    trainer.model.train()
    trainer.interrupted, started = True, time.perf_counter()
    parts: list[Part] = []
    waiting: list[
        torch.Tensor
    ] = []  # loss and gradient norm of the steps that nobody has looked at yet
    losses: list[float] = []  # of the others
    dataset: Any = loader.dataset
    skipped = 0
    for step, (clips, landmarks, labels, rows) in enumerate(device_batches(loader, device), 1):
        trainer.warm_up(epoch - 1 + step / len(loader))
        output, loss, norm = trainer.step(
            normalize(augment(clips, landmarks, rows, draws, config)), labels
        )
        parts.append(part_of(output, loss, labels, rows))
        waiting.append(torch.stack([loss, norm]))
        if bar is not None:
            bar.update()
        if step % LOOK_EVERY == 0 or step == len(loader):
            for step_loss, step_norm in torch.stack(waiting).tolist():
                losses.append(step_loss)
                skipped += not math.isfinite(step_norm)
                if trainer.one_too_many(step_loss, step_norm):
                    names = ", ".join(
                        dataset.name(row) for row in parts[len(losses) - 1].rows.tolist()
                    )
                    scale = trainer.scaler.get_scale()
                    raise FloatingPointError(
                        f"epoch {epoch}, step {len(losses)}: step {BAD_STEPS} in a row that is not finite. Loss "
                        f"{step_loss}, gradient norm {step_norm}, loss scale {scale:g}; the clips: {names}. "
                        + NOT_FINITE_ADVICE
                    )
            waiting.clear()
            finite = [
                part
                for part, step_loss in zip(parts, losses, strict=True)
                if math.isfinite(step_loss)
            ]
            if bar is not None and finite:
                show(bar, trainer, finite, device, time.perf_counter() - started, skipped)
    if not finite:
        raise FloatingPointError(
            f"epoch {epoch}: the loss of every step is {losses[-1]}. {NOT_FINITE_ADVICE}"
        )
    return scores_of(finite, started, f"epoch {epoch}", skipped)


@torch.no_grad()  # not inference_mode: DataParallel's threads may not touch its tensors
def validate(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    device: torch.device,
    *,
    frame_weight: float = 0.0,
    title: str = "validation",
    bar: tqdm | None = None,
) -> Scores:
    """Score every clip of the loader, in order of rows; in full precision if numbers become too large for half.

    Self-blends, where the loader has some, are the same each time.
    Raises FloatingPointError if the loss is not finite even then.
    """
    model.eval()
    started = time.perf_counter()
    network: Any = unwrapped(model)
    has_blends = any(row < 0 for row in loader.sampler)

    def score() -> Scores:
        parts, draws = [], PairDraws(device, [0])
        for clips, landmarks, labels, rows in device_batches(loader, device):
            clips = to_float(clips)
            if has_blends:
                clips = with_self_blends(clips, landmarks, rows, draws)
            output = model(normalize(clips))
            parts.append(
                part_of(output, total_loss(output, labels, criterion, frame_weight), labels, rows)
            )
            if bar is not None:
                bar.update()
        return scores_of(parts, started, title)

    precision = getattr(network, "precision", None)
    try:
        return score()
    except FloatingPointError:
        if precision is None:
            raise
    print(f"{title}: numbers are too large for {precision}; scored again in float32")
    network.precision = None
    try:
        return score()
    finally:
        network.precision = precision


# %% [markdown]
# **Several processes**, started by `torchrun`, train one model on as many GPUs, of one machine or more
# (DistributedDataParallel). A notebook is one process: on Kaggle, skip this. They start from equal weights, take equal
# shares of each batch, add up their gradients, and normalise with the mean and variance of the whole batch: apart from
# rounding and dropout, it makes no difference how many they are.


# %%
def join_processes(device: torch.device) -> None:
    """Meet the other processes of torchrun, however long the first one needs to prepare the data.

    Raises RuntimeError if some of them have a GPU and some have not.
    """
    if PROCESSES == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo",
        timeout=datetime.timedelta(days=2),
    )
    atexit.register(dist.destroy_process_group)
    kinds = [kind for kind in gathered(device.type) if kind == "cuda"]
    if len(kinds) not in (0, PROCESSES):
        raise RuntimeError(
            f"{PROCESSES} processes, but only {len(kinds)} of them have a usable GPU of their own"
        )


def gathered(value: Any) -> list:
    """The values of all processes, in the order of their ranks."""
    if PROCESSES == 1:
        return [value]
    values: list[Any] = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value that the first process has, in all of them."""
    if PROCESSES == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Every summand has the sum of the gradients."""

    @staticmethod
    def forward(context: object, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNormCPU(nn.BatchNorm2d):
    """What nn.SyncBatchNorm does on GPUs, for processes with equal shares of a batch on CPUs."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(images)
        values = images.to(self.running_mean.dtype)
        mean = SumOverProcesses.apply(values.mean(dim=(0, 2, 3))) / PROCESSES
        centred = values - mean[:, None, None]
        variance = SumOverProcesses.apply(centred.square().mean(dim=(0, 2, 3))) / PROCESSES
        count = PROCESSES * values[:, 0].numel()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(images.dtype)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make batch normalisation see the batches of all processes."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNormCPU
    return model
