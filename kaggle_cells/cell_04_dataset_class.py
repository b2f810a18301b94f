# %% [markdown]
# ## 4. Clips as tensors, and what happens to them on the way
#
# The loader hands out `uint8` clips just as they lie in the cache. Everything else, conversion, augmentation and
# normalisation, runs on whole batches on the device: the GPU has time for it, four CPU cores have not.

# %%
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from cell_02_global_config import mixed_seed


class ClipDataset(Dataset):
    """Cached clips by row of a table with `path`, `clip_file` and `label`.

    An item is (clip (T, S, S, 3) uint8, label float, row number). Batches are read by `workers` threads: reading
    a cached file needs no process of its own, so nothing is copied between processes and no worker ever has to
    import a notebook.
    """

    def __init__(self, table: pd.DataFrame, workers: int = 1) -> None:
        self.files, self.videos = list(table.clip_file), list(table.path)
        self.labels = torch.tensor(table.label.to_numpy(), dtype=torch.float32)
        self.pool = ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        with np.load(self.files[row]) as saved:
            return torch.from_numpy(saved["frames"]), self.labels[row], row

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        return list(self.pool.map(self.__getitem__, rows))


# %% [markdown]
# **Pairs.** An epoch shows every real video of the training set once, and beside each one a fake of the same
# recording where there is one. Both classes are then equally frequent, whatever the dataset's ratio, and the
# difference between the two neighbours is the manipulation, not the person. The next epoch draws other fakes.
# Where several processes train together, each takes its share of every batch.


# %%
class PairBatches(Sampler[list[int]]):
    """Batches of rows of a table with `label`, `original` and `group`: a real one, a fake one, a real one, ...

    The order depends on the seed and the epoch alone. A real video's partner is drawn from the fakes made of it that
    had the fewest turns in this epoch; without such a fake, from those of its group; without these, from all. All
    batches are full, for a last one of a single clip would upset batch normalisation; what is left over has its turn in
    another epoch. Of `processes` that train together, the one with this `rank` gets its equal share of each batch.

    Raises ValueError if a batch cannot be shared equally, or there are fewer clips than processes.
    """

    def __init__(self, table: pd.DataFrame, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        if batch_size % processes:
            raise ValueError(f"batches of {batch_size} clips cannot be shared equally by {processes} processes")
        table = table.reset_index(drop=True)
        self.reals = table.index[table.label == 0].to_numpy()
        self.fakes = table.index[table.label == 1].to_numpy()
        of_original, of_group = (table.loc[self.fakes].groupby(name).indices for name in ("original", "group"))
        self.partners = {
            real: self.fakes[of_original.get(table.original[real], of_group.get(table.group[real], slice(None)))]
            for real in self.reals
        }
        self.share = min(batch_size, 2 * len(self.reals)) // processes
        if not self.share:
            raise ValueError(f"{2 * len(self.reals)} training clips are too few for {processes} processes")
        self.seed, self.rank, self.processes = seed, rank, processes
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 * len(self.reals) // (self.share * self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        turns = rng.random(len(self.reals) + len(self.fakes))
        order: list[int] = []
        for real in rng.permutation(self.reals):
            candidates = self.partners[real]
            fake = candidates[turns[candidates].argmin()]
            turns[fake] += 1
            order += int(real), int(fake)
        for batch in range(len(self)):
            first = (batch * self.processes + self.rank) * self.share
            yield order[first : first + self.share]


# %% [markdown]
# **Augmentation** changes a clip as another camera or another seat in the room would: the same crop, mirroring
# and colours for all its frames. What differs between frames is evidence, and stays. The two clips of a pair get
# the same draw, so that here too the manipulation alone tells them apart.

# %%
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_float(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, T, S, S, 3) as float (B, T, 3, S, S) in 0..1."""
    return clips.permute(0, 1, 4, 2, 3).float() / 255


@functools.cache  # sending them to a GPU for each batch would make the CPU wait for it
def imagenet_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def normalize(clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, 3, S, S) in 0..1 with ImageNet's mean and deviation taken out, as the backbones expect."""
    mean, std = imagenet_statistics(clips.device)
    return (clips - mean) / std


class PairDraws:
    """Random numbers for the clips of a batch, the same for rows 2i and 2i + 1: a pair, if batches are even.

    They depend on `seed` alone. Processes that train together draw for the whole batch and use those of their share, so
    that it makes no difference how many they are.
    """

    def __init__(self, device: torch.device, seed: Sequence[int], rank: int = 0, processes: int = 1) -> None:
        self.generator = torch.Generator(device)
        self.generator.manual_seed(mixed_seed(*seed))
        self.rank, self.processes = rank, processes

    def uniform(self, clips: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """A number from low..high for each clip (B,)."""
        share = len(clips)
        pairs = torch.empty((self.processes * share + 1) // 2, device=clips.device)
        pairs.uniform_(low, high, generator=self.generator)
        return pairs.repeat_interleave(2)[self.rank * share :][:share]


def random_crop_and_flip(clips: torch.Tensor, draws: PairDraws, smallest: float = 0.8) -> torch.Tensor:
    """Crop each clip (B, T, 3, S, S) to a random square of `smallest`..1 of its side, resize it back, mirror half."""
    scale, mirror = draws.uniform(clips, smallest, 1), draws.uniform(clips, -1, 1).sign()
    shift = torch.stack([draws.uniform(clips, -1, 1), draws.uniform(clips, -1, 1)], dim=1) * (1 - scale)[:, None]
    theta = torch.zeros(len(clips), 2, 3, device=clips.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(theta, [len(clips), 1, *clips.shape[-2:]], align_corners=False)
    return F.grid_sample(clips.flatten(1, 2), grid, padding_mode="reflection", align_corners=False).view_as(clips)


def random_colour(clips: torch.Tensor, draws: PairDraws, strength: float = 0.2) -> torch.Tensor:
    """Change each channel's gain, the contrast and the saturation of each clip (B, T, 3, S, S) by up to `strength`."""
    *gains, contrast, saturation = (
        draws.uniform(clips, 1 - strength, 1 + strength).view(-1, 1, 1, 1, 1) for _ in range(5)
    )
    clips = clips * torch.cat(gains, dim=2)
    clips = clips.mean(dim=(1, 2, 3, 4), keepdim=True).lerp(clips, contrast)
    clips = clips.mean(dim=2, keepdim=True).lerp(clips, saturation)
    return clips.clamp(0, 1)


def augment(clips: torch.Tensor, draws: PairDraws) -> torch.Tensor:
    """Training augmentation of clips (B, T, 3, S, S) in 0..1, ordered in pairs."""
    return random_colour(random_crop_and_flip(clips, draws), draws)
