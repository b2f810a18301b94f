# %% [markdown]
# ## 4. Clips as tensors, and what happens to them on the way
#
# The loader hands out `uint8` clips just as they lie in the cache. Everything else, conversion, augmentation and
# normalisation, runs on whole batches on the device: the GPU has time for it, four CPU cores have not.

# %%
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler


class ClipDataset(Dataset):
    """Cached clips by row of a table with `clip_file` and `label`.

    An item is (clip (T, S, S, 3) uint8, label float, row number). Batches are read by `workers` threads: reading
    a cached file needs no process of its own, so nothing is copied between processes and no worker ever has to
    import a notebook.
    """

    def __init__(self, table: pd.DataFrame, workers: int = 1) -> None:
        self.files = list(table.clip_file)
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


# %%
class PairSampler(Sampler[int]):
    """Rows of a table with `label`, `original` and `group`: a real one, a fake one, a real one, ...

    The order depends on the seed and the epoch alone. A real video's partner is drawn from the fakes made of it that
    had the fewest turns in this epoch; without such a fake, from those of its group; without these, from all.
    """

    def __init__(self, table: pd.DataFrame, seed: int) -> None:
        table = table.reset_index(drop=True)
        self.reals = table.index[table.label == 0].to_numpy()
        self.fakes = table.index[table.label == 1].to_numpy()
        of_original, of_group = (table.loc[self.fakes].groupby(name).indices for name in ("original", "group"))
        self.partners = {
            real: self.fakes[of_original.get(table.original[real], of_group.get(table.group[real], slice(None)))]
            for real in self.reals
        }
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return 2 * max(len(self.reals), 1)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        turns = rng.random(len(self.reals) + len(self.fakes))
        for real in rng.permutation(self.reals):
            candidates = self.partners[real]
            fake = candidates[turns[candidates].argmin()]
            turns[fake] += 1
            yield int(real)
            yield int(fake)


# %% [markdown]
# **Augmentation** changes a clip as another camera or another seat in the room would: the same crop, mirroring
# and colours for all its frames. What differs between frames is evidence, and stays. The two clips of a pair get
# the same draw, so that here too the manipulation alone tells them apart.

# %%
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_float(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, T, S, S, 3) as float (B, T, 3, S, S) in 0..1."""
    return clips.permute(0, 1, 4, 2, 3).float() / 255


def normalize(clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, 3, S, S) in 0..1 with ImageNet's mean and deviation taken out, as the backbones expect."""
    mean, std = (torch.tensor(v, device=clips.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (clips - mean) / std


def draw(clips: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A uniform number for each clip of a batch (B,), the same for rows 2i and 2i + 1: a pair, if batches are even."""
    pairs = torch.empty((len(clips) + 1) // 2, device=clips.device).uniform_(low, high)
    return pairs.repeat_interleave(2)[: len(clips)]


def random_crop_and_flip(clips: torch.Tensor, smallest: float = 0.8) -> torch.Tensor:
    """Crop each clip (B, T, 3, S, S) to a random square of `smallest`..1 of its side, resize it back, mirror half."""
    scale, mirror = draw(clips, smallest, 1), draw(clips, -1, 1).sign()
    shift = torch.stack([draw(clips, -1, 1), draw(clips, -1, 1)], dim=1) * (1 - scale)[:, None]
    theta = torch.zeros(len(clips), 2, 3, device=clips.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(theta, [len(clips), 1, *clips.shape[-2:]], align_corners=False)
    return F.grid_sample(clips.flatten(1, 2), grid, padding_mode="reflection", align_corners=False).view_as(clips)


def random_colour(clips: torch.Tensor, strength: float = 0.2) -> torch.Tensor:
    """Change each channel's gain, the contrast and the saturation of each clip (B, T, 3, S, S) by up to `strength`."""
    *gains, contrast, saturation = (draw(clips, 1 - strength, 1 + strength).view(-1, 1, 1, 1, 1) for _ in range(5))
    clips = clips * torch.cat(gains, dim=2)
    clips = clips.mean(dim=(1, 2, 3, 4), keepdim=True).lerp(clips, contrast)
    clips = clips.mean(dim=2, keepdim=True).lerp(clips, saturation)
    return clips.clamp(0, 1)


def augment(clips: torch.Tensor) -> torch.Tensor:
    """Training augmentation of clips (B, T, 3, S, S) in 0..1, ordered in pairs."""
    return random_colour(random_crop_and_flip(clips))
