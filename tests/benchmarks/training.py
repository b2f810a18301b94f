"""How fast and in how much memory a network trains, against a plain loop measured in the same run.

    python tests/benchmarks/training.py [--backbone resnet50 --size 160 --frames 16]
        [--clips 240] [--rounds 3]
    python tests/benchmarks/training.py --count

On a GPU the default is the user's setting: ResNet50, 16 frames of 160 pixels. On the CPU it is that
of demo.yaml: resnet18, 6 frames of 96 pixels. Videos have three clips each. The plain loop is what
most notebooks have: float32, frames augmented one at a time on the CPU by two worker processes,
float clips sent to the device, the loss read at every step. Everything is measured in turns,
`--rounds` times, and ratios are medians over the rounds. Each memory figure comes from a process of
its own.

With --count, nothing is timed: it counts the kernels that a GPU would launch in a step of 16 clips
of the default setting, and the bytes it would move, on a machine without one.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kaggle_cells"))

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cell_02_global_config import CONFIG, Config
from cell_04_dataset_class import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClipDataset,
    PairBatches,
    PairedGenerator,
)
from cell_05_model_definition import build_model
from cell_06_loss_and_utils import FocalLoss, ModelEMA, free_memory
from cell_07_training_functions import (
    LossScaler,
    Trainer,
    amp_dtype,
    choose_batch_size,
    device_batches,
    train_one_epoch,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_clips(folder: Path, count: int, config: Config) -> pd.DataFrame:
    """Cached clips of smooth noise, and the table that goes with them: half real, half fake, in
    pairs.
    """
    rng, rows = np.random.default_rng(0), []
    frames = config.FRAMES_PER_VIDEO * config.CLIPS_PER_VIDEO
    shape = (frames, config.IMAGE_SIZE, config.IMAGE_SIZE, 3)
    for number in range(count):
        file = folder / f"{number}.npz"
        landmarks = np.full((frames, 5, 2), np.nan, np.float32)
        np.savez(file, frames=rng.integers(0, 256, shape, np.uint8), landmarks=landmarks)
        rows.append(
            dict(
                path=f"{number}.mp4",
                clip_file=str(file),
                label=number % 2,
                original=str(number // 2),
            )
        )
    columns = {"group": lambda table: table.original, "dataset": "d", "method": "m"}
    return pd.DataFrame(rows).assign(**columns)


class PlainDataset(Dataset):
    """Float clips (T, 3, S, S), each frame augmented by itself on the CPU."""

    def __init__(self, table: pd.DataFrame, size: int, every: int) -> None:
        self.table, self.every = table, every
        self.change = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomResizedCrop(size, scale=(0.64, 1), ratio=(1, 1)),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.2, 0.2, 0.2),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, float]:
        with np.load(self.table.clip_file[row]) as saved:
            frames = saved["frames"][:: self.every]
        return torch.stack([self.change(frame) for frame in frames]), float(self.table.label[row])


def plain_loop(table: pd.DataFrame, config: Config, batch: int) -> tuple[float, float]:
    """Clips a second and peak GiB of an epoch."""
    model = build_model(config).to(DEVICE).to(memory_format=torch.contiguous_format).train()
    optimizer, criterion = torch.optim.AdamW(model.parameters(), lr=1e-4), nn.BCEWithLogitsLoss()
    data = PlainDataset(table, config.IMAGE_SIZE, config.CLIPS_PER_VIDEO)
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=2)
    memory = Peak()
    total, started = 0.0, 0.0
    for epoch in range(2):  # the first one warms up
        started = time.perf_counter()
        for step, (clips, labels) in enumerate(loader):
            optimizer.zero_grad()
            loss = criterion(model(clips.to(DEVICE)).logit, labels.float().to(DEVICE))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            if epoch == 0 and step == 1:
                break
    return len(loader) * batch / (time.perf_counter() - started), memory.gib()


class FromDevice:
    """A loader whose batches are on the device already."""

    def __init__(self, loader: DataLoader) -> None:
        self.dataset = loader.dataset
        self.batches = list(device_batches(loader, DEVICE))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Ours:
    """The notebook's way: `epoch()` trains one and gives its clips a second."""

    def __init__(
        self, table: pd.DataFrame, config: Config, batch: int, parallel: bool = False
    ) -> None:
        self.config, self.model = config, build_model(config).to(DEVICE)
        self.model.precision = precision = amp_dtype(config.AMP, DEVICE)
        network = nn.DataParallel(self.model) if parallel else self.model
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        scaler = LossScaler(DEVICE, precision)
        average = ModelEMA(self.model, config.EMA_DECAY)
        given = network, FocalLoss(config.FOCAL_GAMMA, 0.5), optimizer, scaler, 1.0, average
        self.trainer = Trainer(*given)
        batches = PairBatches(table, batch, config)
        data = ClipDataset(table, config.NUM_WORKERS)
        self.loader = DataLoader(data, batch_sampler=batches, pin_memory=DEVICE.type == "cuda")
        self.few = DataLoader(data, batch_sampler=list(batches)[:2])

    def warm_up(self) -> float:
        return self.epoch(self.few)

    def epoch(self, loader: Any = None) -> float:
        started = time.perf_counter()
        scores = train_one_epoch(
            self.trainer,
            loader or self.loader,
            DEVICE,
            PairedGenerator(DEVICE, [0]),
            1,
            self.config,
        )
        return len(scores.labels) / (time.perf_counter() - started)


class Peak:
    """The most memory in use since it was made: of the GPU's allocator, or this process."""

    def __init__(self) -> None:
        self.process, self.most, self.running = psutil.Process(), 0, True
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.watch = threading.Thread(target=self._look, daemon=True)
            self.watch.start()

    def _look(self) -> None:
        while self.running:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.005)

    def gib(self) -> float:
        self.running = False
        return (torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else self.most) / 2**30


def activation_memory(config: Config, batch: int) -> float:
    """GiB that forward and backward of one batch need beyond weights, gradients and the batch
    itself.
    """
    model = build_model(config).to(DEVICE).train()
    model.precision = amp_dtype(config.AMP, DEVICE)
    clips = torch.rand(
        batch, config.FRAMES_PER_VIDEO, 3, config.IMAGE_SIZE, config.IMAGE_SIZE, device=DEVICE
    )
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    FocalLoss().of(
        model(clips[:1, :1]).logit.float(), torch.ones(1, device=DEVICE)
    ).backward()  # loads the libraries
    free_memory()
    base = (
        torch.cuda.memory_allocated()
        if DEVICE.type == "cuda"
        else psutil.Process().memory_info().rss
    )
    memory = Peak()
    FocalLoss().of(model(clips).logit.float(), torch.ones(batch, device=DEVICE)).backward()
    return memory.gib() - base / 2**30


def count() -> None:
    """What a step of the default setting takes of a GPU, from tensors without values."""
    from fake_gpu import watch_augmentation, watch_step

    whole, around = watch_step(CONFIG), watch_step(CONFIG, gradients=False)
    network = whole.bytes - around.bytes, whole.kernels - around.kernels
    augmentation = watch_augmentation(CONFIG)
    rows = {
        "augmentation": (augmentation.bytes, augmentation.kernels),
        "network in fp16, the LSTM without cuDNN": network,
        "clipping, optimizer, statistics, average": (around.bytes, around.kernels),
    }
    print("A step of 16 clips. What goes through a list of tensors counts as a kernel for each 50.")
    for name, (size, kernels) in rows.items():
        print(f"{name}: {size / 1e9:.2f} GB, {kernels} kernels")


def in_process(given: argparse.Namespace, what: str) -> list[float]:
    """Figures that a fresh process measures: `plain BATCH`, `ours BATCH CHECKPOINTING` or
    `activations ...`.
    """
    options = [
        f"--{name}={getattr(given, name)}"
        for name in ("backbone", "size", "frames", "clips", "folder")
    ]
    done = subprocess.run(
        [sys.executable, __file__, *options, "--only", what], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [float(figure) for figure in done.stdout.splitlines()[-1].split()]


def only(what: str, table: pd.DataFrame, config: Config) -> None:
    """Measure one thing in this process, and print its figures."""
    kind, batch, *recompute = what.split()
    config = dataclasses.replace(config, GRADIENT_CHECKPOINTING=recompute == ["recompute"])
    if kind == "activations":
        return print(activation_memory(config, int(batch)))
    if kind == "plain":
        return print(*plain_loop(table, config, int(batch)))
    memory, ours = Peak(), Ours(table, config, int(batch))
    ours.warm_up()
    print(ours.epoch(), memory.gib())


def main() -> None:
    small = DEVICE.type == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet18" if small else "resnet50")
    parser.add_argument("--size", type=int, default=96 if small else 160, help="pixels")
    parser.add_argument("--frames", type=int, default=6 if small else 16, help="frames of a clip")
    parser.add_argument("--clips", type=int, default=96 if small else 480, help="clips of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="count bytes and kernels of a GPU")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.count:
        return count()
    settings = dict(BACKBONE=given.backbone, IMAGE_SIZE=given.size, FRAMES_PER_VIDEO=given.frames)
    config = dataclasses.replace(CONFIG, **settings)
    with tempfile.TemporaryDirectory() as place:
        given.folder = given.folder or place
        table = make_clips(Path(place), given.clips, config)
        if given.only:
            return only(given.only, table, config)
        name = (
            torch.cuda.get_device_name()
            if DEVICE.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        precision = str(amp_dtype(config.AMP, DEVICE) or torch.float32).removeprefix("torch.")
        print(
            f"{name}; {given.backbone}, {given.frames} frames of {given.size} pixels; "
            f"ours in {precision}"
        )

        batch = 8
        ours = Ours(table, config, batch)
        fed, rounds = FromDevice(ours.loader), []
        ours.warm_up()
        for _ in range(given.rounds):
            plain, turns = (
                in_process(given, f"plain {batch}")[0],
                [ours.epoch(source) for source in (None, fed, fed, None)],
            )
            rounds.append([plain, statistics.mean(turns[::3]), statistics.mean(turns[1:3])])
        plain, fast, from_device = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        ratio = statistics.median(row[1] / row[0] for row in rounds)
        waiting = 100 * statistics.median(1 - row[1] / row[2] for row in rounds)
        print(f"batch {batch}: plain loop {plain:.1f} clips/s, ours {fast:.1f}, ratio {ratio:.2f}")
        print(
            f"fed from the device's memory {from_device:.1f} clips/s: "
            f"{waiting:.1f} % of the time waits for data"
        )
        del ours, fed
        free_memory()

        for size in sorted(
            {4, 8, choose_batch_size(config, DEVICE, amp_dtype(config.AMP, DEVICE))}
        ):
            speed, memory = in_process(given, f"plain {size}")
            print(f"batch {size}, plain loop: {speed:.1f} clips/s, peak {memory:.2f} GiB")
            for how in ("", "recompute"):
                speed, memory = in_process(given, f"ours {size} {how}")
                activations = in_process(given, f"activations {size} {how}")[0]
                words = (
                    f"{speed:.1f} clips/s, peak {memory:.2f} GiB, activations {activations:.2f} GiB"
                )
                print(f"batch {size}, {'GRADIENT_CHECKPOINTING' if how else 'ours'}: {words}")


if __name__ == "__main__":
    main()
