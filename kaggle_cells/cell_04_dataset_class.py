# %% [markdown]
# <a id="section-4"></a>
# ## 4. Batches and augmentation
#
# The loader delivers `uint8` clips exactly as they are cached. Conversion, augmentation and
# normalisation run on whole batches on the device, because a GPU has time to spare for them and
# four CPU cores do not.

# %%
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.fft import dct
from torch.utils.data import Dataset, Sampler

from cell_01_imports_and_setup import IN_NOTEBOOK, WIDTH, show_figure, show_row, styled
from cell_02_global_config import Config, mixed_seed
from cell_03_data_processing import FACE_CENTRE, is_picture, load_clip, load_portrait


class Sample(NamedTuple):
    """What to load: a row of the table, to be self-blended or not, and which of its frames."""

    row: int
    self_blend: bool = False
    clip: slice = slice(None)  # clip c of K interleaved ones is slice(c, None, K)


class Batch(NamedTuple):
    """What the loader delivers: one clip of a dataset, or B of them collated."""

    clips: Any  # (B, T, S, S, 3) uint8
    landmarks: Any  # (B, T, 5, 2) in pixels, NaN without a face
    labels: Any  # (B,) float, 1 is fake
    rows: Any  # (B,) rows of the table
    blend: Any  # (B,) bool, always on the CPU: these are to be self-blended


# %%
class ClipDataset(Dataset):
    """Cached clips of a table with `path`, `clip_file` and `label`, indexed by `Sample` or row.

    A plain row loads all frames. `workers` threads read a batch: unlike worker processes they need
    not import the notebook or copy clips. `change` is applied to each clip's array. A still is
    repeated to `frames` frames.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        workers: int = 1,
        change: Callable[[np.ndarray], np.ndarray] = lambda clip: clip,
        frames: int = 1,
    ) -> None:
        self.files, self.videos = list(table.clip_file), list(table.path)
        self.stills, self.frames = [is_picture(path) for path in self.videos], frames
        self.labels = table.label.to_numpy(np.float32)
        self.workers, self.change, self.pool = workers, change, ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Sample | int) -> Batch:
        row, blend, clip = index if isinstance(index, Sample) else Sample(index)
        parts = load_clip(self.files[row])
        if self.stills[row]:
            frames, landmarks = (part.repeat(self.frames, axis=0) for part in parts)
        else:
            frames, landmarks = (part[clip] for part in parts)
        frames = self.change(np.ascontiguousarray(frames))
        label = torch.tensor(1.0 if blend else self.labels[row])
        return Batch(torch.from_numpy(frames), torch.from_numpy(landmarks), label, row, blend)

    def __getitems__(self, indices: Sequence[Sample | int]) -> list[Batch]:
        return list(self.pool.map(self.__getitem__, indices))

    def name(self, row: int, self_blend: bool = False) -> str:
        """How messages refer to a clip."""
        return f"{self.videos[row]}{' (self-blended)' if self_blend else ''}"


def batches_of_one_length(
    dataset: ClipDataset, samples: Sequence[Sample], size: int, stills: int
) -> list[list[Sample]]:
    """Batches of `size` clips, then of `stills` stills: what is collated must have one length."""
    batches = []
    for kind, count in ((False, size), (True, stills)):
        part = [sample for sample in samples if dataset.stills[sample.row] == kind]
        batches += [part[first : first + count] for first in range(0, len(part), count)]
    return batches


# %% [markdown]
# **Pairs.** An epoch shows every real training video once, next to a fake of the same recording
# if there is one. The classes are balanced whatever the dataset's ratio, and what differs within
# a pair is the manipulation, not the person. Each epoch draws other fakes and other clips, evenly
# from the manipulations. `SELF_BLEND` of the fakes are made from the real clip itself (below), and
# all those of a dataset that has none. With `EPOCH_VIDEOS`, an epoch is that many real videos, in
# equal parts from the datasets, or one of a hundred videos would hardly be seen beside thousands.


# %%
def possible_partners(table: pd.DataFrame) -> list[np.ndarray]:
    """Rows of fakes for each real video: of its `original`, else of its `group` or `dataset`."""
    rows, fakes = np.flatnonzero(table.label == 1), table[table.label == 1]
    found = [(key, fakes.groupby(key).indices) for key in ("original", "group", "dataset")]
    reals, none = table[table.label == 0], np.array([], int)

    def partners(real: Any) -> np.ndarray:
        places = (fakes_of.get(getattr(real, key)) for key, fakes_of in found)
        return rows[next((place for place in places if place is not None), none)]

    return [partners(real) for real in reals.itertuples()]


def draw_evenly(
    datasets: dict[str, np.ndarray], shares: dict[str, float], count: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` of the videos of all datasets by their `shares` (1 if not named); 0: each once."""
    if not count:
        return rng.permutation(np.concatenate(list(datasets.values())))
    weights = np.array([shares.get(name, 1.0) for name in datasets])
    counts = np.ceil(count * weights / weights.sum()).astype(int)
    parts = zip(datasets.values(), counts, strict=True)
    drawn = [np.resize(rng.permutation(part), number) for part, number in parts]
    return rng.permutation(np.concatenate(drawn))[:count]


def pick_fakes(
    partners: list[np.ndarray], blended: np.ndarray, methods: list[str], rng: np.random.Generator
) -> Iterator[int | None]:
    """For each real video one of its partners, of the method least used; None: its self-blend."""
    uses = rng.random(len(methods))  # fractions break ties at random
    used = {method: rng.random() for method in dict.fromkeys(methods)}
    for rows, blend in zip(partners, blended, strict=True):
        if blend or not len(rows):
            yield None
            continue
        some = rng.choice(rows, 200) if len(rows) > 200 else rows
        fake = min(some.tolist(), key=lambda row: (used[methods[row]], uses[row]))
        used[methods[fake]] += 1
        uses[fake] += 1
        yield fake


# %%
class PairBatches(Sampler[list[Sample]]):
    """Batches of samples: real, fake, real, fake, ... The order depends on seed and epoch alone.

    Each real video meets a fake or, for a share SELF_BLEND, its self-blend. Both show the same
    one of CLIPS_PER_VIDEO clips. Batches are full (batch normalisation needs more than a clip or
    two) and shared equally by the `processes`. Raises ValueError if a batch cannot be shared
    equally or there are too few clips.
    """

    def __init__(
        self, table: pd.DataFrame, size: int, config: Config, rank: int = 0, processes: int = 1
    ) -> None:
        self.config, self.rank, self.processes, self.epoch = config, rank, processes, 0
        self.reals, self.methods = np.flatnonzero(table.label == 0), list(table.method)
        self.datasets = table[table.label == 0].groupby("dataset").indices
        self.clips = 2 * (config.EPOCH_VIDEOS or len(self.reals))
        if size % processes:
            raise ValueError(f"{processes} processes cannot share batches of {size} equally")
        if self.clips < processes:
            raise ValueError(f"{self.clips} training clips are too few for {processes} processes")
        self.share = min(size, self.clips) // processes
        fakes = np.flatnonzero(table.label == 1)
        self.partners = possible_partners(table) if config.PAIRS else [fakes] * len(self.reals)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.clips // (self.share * self.processes)

    def __iter__(self) -> Iterator[list[Sample]]:
        samples = self.draw_epoch()
        for batch in range(len(self)):
            first = (batch * self.processes + self.rank) * self.share
            yield samples[first : first + self.share]

    def draw_epoch(self) -> list[Sample]:
        config, rng = self.config, np.random.default_rng([self.config.SEED, self.epoch])
        places = draw_evenly(self.datasets, config.dataset_shares, config.EPOCH_VIDEOS, rng)
        blended = rng.permutation(len(places)) < round(config.SELF_BLEND * len(places))
        fakes = pick_fakes([self.partners[i] for i in places], blended, self.methods, rng)
        samples: list[Sample] = []
        for real, fake in zip(self.reals[places].tolist(), fakes, strict=True):
            clip = slice(int(rng.integers(config.CLIPS_PER_VIDEO)), None, config.CLIPS_PER_VIDEO)
            other = Sample(real, True, clip) if fake is None else Sample(fake, False, clip)
            samples += Sample(real, False, clip), other
        return samples


# %% [markdown]
# **Random numbers** depend on the seed alone, so a resumed run repeats them exactly. The two
# clips of a pair get the same draws, and so do all frames of a clip: camera, codec and crop must
# not reveal which of the two is fake, and whatever differs between frames is evidence. `robust`
# augmentation gives half of the twins draws of their own: then quality differs within pairs, too,
# and does not hint at the class either.


# %%
class DeviceRandom:
    """Random tensors on a device and single numbers on the CPU, determined by `seed`."""

    def __init__(self, device: torch.device, seed: Sequence[int]) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(mixed_seed(*seed))
        self.host = np.random.default_rng(seed)

    def uniform(self, count: int, low: float, high: float, *shape: int) -> torch.Tensor:
        """(count, *shape), between low and high."""
        numbers = torch.empty(count, *shape, device=self.device)
        return numbers.uniform_(low, high, generator=self.generator)

    def sometimes(self, count: int, share: float, high: float, *shape: int) -> torch.Tensor:
        """(count, *shape): for a `share` of the clips between 0 and high, else 0."""
        chosen = self.uniform(count, 0, 1, *shape) < share
        return chosen * self.uniform(count, 0, high, *shape)


class PairedGenerator(DeviceRandom):
    """The same numbers for rows 2i and 2i + 1 of a batch that `processes` share.

    Only a share `same` of the twins has them. `blends` draws independently for each self-blend.
    """

    def __init__(
        self,
        device: torch.device,
        seed: Sequence[int],
        rank: int = 0,
        processes: int = 1,
        same: float = 1.0,
    ) -> None:
        super().__init__(device, seed)
        self.rank, self.processes, self.same = rank, processes, same
        self.blends = DeviceRandom(device, [*seed, 1 + rank])

    def uniform(self, count: int, low: float, high: float, *shape: int) -> torch.Tensor:
        pairs = (self.processes * count + 1) // 2
        first = super().uniform(pairs, low, high, *shape)
        second = first
        if self.same < 1:
            follows = super().uniform(pairs, 0, 1, *[1] * len(shape)) < self.same
            second = torch.where(follows, first, super().uniform(pairs, low, high, *shape))
        return torch.stack([first, second], dim=1).flatten(0, 1)[self.rank * count :][:count]

    def numbers(self, count: int, low: float, high: float) -> np.ndarray:
        """(count,) on the CPU, for what decides about shapes."""
        first, second = self.host.uniform(low, high, (2, (self.processes * count + 1) // 2))
        second = np.where(self.host.random(len(first)) < self.same, first, second)
        return np.stack([first, second], axis=1).ravel()[self.rank * count :][:count]


# %%
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache  # copying them to a GPU for each batch would make the CPU wait for it
def device_constant(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)


def to_float(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, T, S, S, 3) to float (B, T, 3, S, S) in 0..1."""
    return clips.permute(0, 1, 4, 2, 3).contiguous() / 255


def normalize(clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, 3, S, S) in 0..1, standardised with ImageNet's mean and standard deviation."""
    mean, std = device_constant((IMAGENET_MEAN, IMAGENET_STD), clips.device)[..., None, None]
    return (clips - mean) / std


def denormalize(clips: torch.Tensor) -> torch.Tensor:
    mean, std = device_constant((IMAGENET_MEAN, IMAGENET_STD), clips.device)[..., None, None]
    return clips * std + mean


# %%
def change_colours(clips: torch.Tensor, random: DeviceRandom, strength: Any) -> torch.Tensor:
    """Clips (B, T, 3, S, S) with contrast and saturation of 1 +- `strength`, gains of half that."""
    changes = strength * random.uniform(len(clips), -1, 1, 1, 5, 1, 1)
    gains, contrast, saturation = (1 + changes).split([3, 1, 1], dim=2)
    clips = clips * (1 + gains) / 2  # colour casts look odd sooner than contrast
    clips = clips.mean(dim=(1, 2, 3, 4), keepdim=True).lerp(clips, contrast)
    return clips.mean(dim=2, keepdim=True).lerp(clips, saturation).clamp(0, 1)


def lower_resolution(clips: torch.Tensor, factor: float) -> torch.Tensor:
    """Clips (B, T, 3, S, S) reduced to `factor` of their side and enlarged again."""
    size = clips.shape[-1]
    small = F.interpolate(clips.flatten(1, 2), size=max(1, round(factor * size)), mode="area")
    return F.interpolate(small, size=size, mode="bilinear").view_as(clips)


# %% [markdown]
# **Face coordinates.** The five landmarks determine the similarity (scale, rotation, translation)
# between a standard face and the frame. A region in face coordinates is the same part of the face
# in every frame.

# %%
# eyes, nose, corners of the mouth; mean 0, unit: the distance between the eyes
STANDARD_FACE = (-0.5, -0.574), (0.5, -0.574), (0.0, -0.004), (-0.41, 0.576), (0.41, 0.576)


def similarity(a: torch.Tensor, b: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
    """Matrices (..., 3, 3) that map (u, v) to (au - bv + x, bu + av + y), from numbers (...)."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, -b, x, b, a, y, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


def face_transforms(landmarks: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (B, T, 3, 3) from face to frame, and back; a frame's coordinates are -1..1.

    A least-squares fit to `landmarks` (B, T, 5, 2), in pixels of frames with side `size`. Where
    these are NaN, a face in the middle is assumed.
    """
    face = device_constant(STANDARD_FACE, landmarks.device)
    points = (2 * landmarks.float() + 1) / size - 1
    points = torch.where(points.isnan(), face / 2, points)
    x, y = points.mean(dim=2).unbind(-1)
    unit = face / face.square().sum()
    a = (points * unit).sum(dim=(2, 3))
    b = (points[..., 1] * unit[:, 0] - points[..., 0] * unit[:, 1]).sum(dim=2)
    to_frame, area = similarity(a, b, x, y), a * a + b * b
    return to_frame, similarity(
        a / area, -b / area, -(a * x + b * y) / area, (b * x - a * y) / area
    )


def pixel_grid(transforms: torch.Tensor, size: int) -> torch.Tensor:
    """Where matrices (B, T, 3, 3) map the pixels of a frame: (B, T, S, S, 2)."""
    shape = [transforms.shape[0] * transforms.shape[1], 1, size, size]
    grid = F.affine_grid(transforms.flatten(0, 1)[:, :2], shape, align_corners=False)
    return grid.unflatten(0, transforms.shape[:2])


# %% [markdown]
# **Self-blending** (Shiohara and Yamasaki, 2022) teaches what all face swaps share rather than
# the traces of one generator: a real face is blended into itself. A copy is recoloured, sharpened
# or reduced in resolution, moved a little, and put back under a soft mask of random shape. In
# half of the clips it also trembles from frame to frame, like faces that were generated frame by
# frame (after video-level blending, arXiv 2408.17065).


# %%
def perturb_face(clips: torch.Tensor, random: DeviceRandom) -> torch.Tensor:
    """Recoloured clips (B, T, 3, S, S), half of them sharpened and half reduced in resolution."""
    draw = functools.partial(random.uniform, len(clips))
    clips = change_colours(clips, random, 0.25 * draw(0, 1, 1, 1, 1, 1))
    images = clips.flatten(0, 1)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    sharper = blurred.view_as(clips).lerp(clips, draw(1, 2, 1, 1, 1, 1))
    coarser = lower_resolution(clips, 2.0 ** random.host.uniform(-2, 0))
    return torch.where(draw(0, 1, 1, 1, 1, 1) < 0.5, sharper, coarser).clamp(0, 1)


def warp_face(
    clips: torch.Tensor, transforms: tuple[torch.Tensor, torch.Tensor], random: DeviceRandom
) -> torch.Tensor:
    """Clips (B, T, 3, S, S) moved relative to the face, half of them differently in each frame."""
    count, frames, size = len(clips), clips.shape[1], clips.shape[-1]
    trembling = random.sometimes(count, 0.5, 2, 1, 1)
    moves = random.uniform(count, -1, 1, 4, 1) + trembling * random.uniform(count, -1, 1, 4, frames)
    limits = device_constant((0.04, 0.04, 0.1, 0.1), clips.device)[:, None]
    angle, growth, right, down = (limits * moves).unbind(1)
    scale = 1 + growth
    moved = similarity(scale * angle.cos(), scale * angle.sin(), right, down)
    to_frame, to_face = transforms
    grid = pixel_grid(to_frame @ moved @ to_face, size).flatten(0, 1)
    warped = F.grid_sample(
        clips.flatten(0, 1), grid, padding_mode="reflection", align_corners=False
    )
    return warped.view_as(clips)


def blend_mask(to_face: torch.Tensor, size: int, random: DeviceRandom) -> torch.Tensor:
    """Masks (B, T, S, S) in 0..1, 0 outside: an ellipse with a wavy outline and a soft edge."""

    def draw(low: float, high: float, *shape: int) -> torch.Tensor:
        return random.uniform(len(to_face), low, high, 1, 1, 1, *shape)

    x, y = pixel_grid(to_face, size).unbind(-1)
    x, y = (x - draw(-0.2, 0.2)) / draw(0.6, 1.1), (y - draw(-0.2, 0.4)) / draw(0.6, 1.3)
    angle, waves = torch.atan2(y, x), device_constant((2.0, 3.0, 5.0), x.device)
    outline = torch.cos(waves * angle[..., None] + draw(0, 2 * math.pi, 3))
    radius = torch.hypot(x, y) * (1 + (draw(0, 0.2, 3) / waves * outline).sum(dim=-1))
    softness = draw(0.02, 0.3)
    inside = ((1 + softness - radius) / (2 * softness)).clamp(0, 1)
    return inside * inside * (3 - 2 * inside)  # smoothstep


# %%
def self_blend(
    clips: torch.Tensor, landmarks: torch.Tensor, random: DeviceRandom
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fakes of real clips (B, T, 3, S, S) in 0..1 with landmarks (B, T, 5, 2); masks (B, T, S, S).

    Nothing changes where the mask is 0.
    """
    transforms = face_transforms(landmarks, clips.shape[-1])
    inner = warp_face(perturb_face(clips, random), transforms, random)
    mask = blend_mask(transforms[1], clips.shape[-1], random)
    ratio = random.uniform(len(clips), 0.25, 2, 1, 1, 1, 1).clamp(max=1)  # 1 in 57 %
    return torch.lerp(clips, inner, ratio * mask[:, :, None]), mask


def take(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return torch.stack([values[row] for row in rows])


def with_self_blends(
    clips: torch.Tensor, landmarks: torch.Tensor, blend: torch.Tensor, random: DeviceRandom
) -> torch.Tensor:
    """Self-blend, in place, the clips (B, T, 3, S, S) that `blend` (B,), on the CPU, marks."""
    rows = [row for row, chosen in enumerate(blend.tolist()) if chosen]
    if rows:
        # By numbers that the CPU knows: an index on the device would have to be sent there.
        blended, _ = self_blend(take(clips, rows), take(landmarks, rows), random)
        torch._foreach_copy_([clips[row] for row in rows], list(blended))
    return clips


# %% [markdown]
# **Augmentation.** `plain` crops, mirrors and recolours. `codec` adds noise and compression,
# which in a real video follow the manipulation; without them, smoothness alone would give
# self-blends away. `robust` gives each clip the history of another video: resolution, sharpness,
# gamma and a second, coarser compression.


# %%
def crop_and_flip(clips: torch.Tensor, random: DeviceRandom) -> torch.Tensor:
    """A random square of 0.8 to 1 of the side, resized back; half of the clips are mirrored."""
    draw = functools.partial(random.uniform, len(clips))
    scale, mirror = draw(0.8, 1), draw(-1, 1).sign()
    x, y, zero = draw(-1, 1) * (1 - scale), draw(-1, 1) * (1 - scale), torch.zeros_like(scale)
    theta = torch.stack([scale * mirror, zero, x, zero, scale, y], dim=1).view(-1, 2, 3)
    images = clips.flatten(1, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return out.view_as(clips)


# %%
@functools.cache
def codec_constants(size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """RGB to YCbCr (3, 3); cosine transform of blocks of 8 (S, S); rounding steps (3, S, S)."""
    colours = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]]
    )
    sides = [8] * (size // 8) + [size % 8] * (size % 8 > 0)
    blocks = [dct(np.eye(side, dtype=np.float32), axis=0, norm="ortho") for side in sides]
    frequency = torch.arange(size) % 8
    luma = (10 + 6 * (frequency + frequency[:, None])) / 255
    steps = torch.stack([luma, 2 * luma, 2 * luma])
    cosines = torch.block_diag(*map(torch.from_numpy, blocks))
    constants = colours, torch.linalg.inv(colours), cosines, steps
    return tuple(constant.to(device) for constant in constants)


def compress(clips: torch.Tensor, coarseness: torch.Tensor) -> torch.Tensor:
    """JPEG's loss for clips (B, T, 3, S, S): the cosine coefficients of 8 x 8 blocks are rounded.

    The steps grow with the frequency, times `coarseness` (B, 1, 1, 1, 1): 0.2 is about quality 90,
    1 about 50, 1.7 about 30; 0 changes nothing.
    """
    colours, back, cosines, steps = codec_constants(clips.shape[-1], clips.device)
    channels = (colours @ clips.flatten(-2)).view_as(clips)
    coefficients = cosines @ channels @ cosines.mT
    steps = steps * coarseness + 1e-7
    coefficients = (coefficients / steps).round() * steps
    channels = cosines.mT @ coefficients @ cosines
    return (back @ channels.flatten(-2)).view_as(clips).clamp(0, 1)


# %%
REDUCE = ("area", "bilinear", "bicubic")


def change_resolutions(clips: torch.Tensor, random: PairedGenerator) -> torch.Tensor:
    """Four in ten clips (B, T, 3, S, S) are reduced, at most to a third, and enlarged again."""
    size, changed = clips.shape[-1], []
    sides = np.rint(size * 2.0 ** random.numbers(len(clips), -1.5, 2)).astype(int)
    filters = random.numbers(len(clips), 0, len(REDUCE)).astype(int)
    enlarge = random.numbers(len(clips), 0, 2).astype(int)
    for clip, side, down, up in zip(clips, sides, filters, enlarge, strict=True):
        if side < size:
            options: dict[str, Any] = dict(mode=REDUCE[down], antialias=True if down else None)
            small = F.interpolate(clip, size=max(4, int(side)), **options)
            clip = F.interpolate(small, size=size, mode=REDUCE[1 + up])
        changed.append(clip)
    return torch.stack(changed).clamp(0, 1)


def change_quality(clips: torch.Tensor, random: PairedGenerator) -> torch.Tensor:
    """Clips (B, T, 3, S, S) with another compression, resolution, sharpness and gamma."""
    draw = functools.partial(random.uniform, len(clips))
    rows = np.flatnonzero(random.numbers(len(clips), 0, 1) < 0.3).tolist()
    coarseness = draw(0.1, 1, 1, 1, 1, 1)
    if rows:
        compressed = compress(take(clips, rows), take(coarseness, rows))
        torch._foreach_copy_([clips[row] for row in rows], list(compressed))
    clips = change_resolutions(clips, random)
    pool = functools.partial(F.avg_pool2d, stride=1, padding=2, count_include_pad=False)
    blurred = pool(pool(clips.flatten(0, 1), 5), 5).view_as(clips)
    sharpness = draw(-1, 1, 1, 1, 1, 1) * (draw(0, 1, 1, 1, 1, 1) < 0.5)
    clips = blurred.lerp(clips, 1 + sharpness).clamp(1e-3, 1)
    return clips ** draw(-0.3, 0.3, 1, 1, 1, 1).exp()


def augment(batch: Batch, random: PairedGenerator, config: Config) -> torch.Tensor:
    """What training shows of a batch on the device, ordered in pairs: (B, T, 3, S, S) in 0..1."""
    clips, count = to_float(batch.clips), len(batch.clips)
    clips = with_self_blends(clips, batch.landmarks, batch.blend, random.blends)
    if config.AUGMENTATION == "none":
        return clips
    clips = crop_and_flip(clips, random)
    if config.AUGMENTATION == "robust":
        clips = change_quality(clips, random)
    clips = change_colours(clips, random, 0.2)
    if config.AUGMENTATION in ("codec", "robust"):
        # one noise for all clips, with a gain for each pair: the twins must have the same
        noise = torch.empty_like(clips[0]).normal_(generator=random.generator)
        clips = torch.addcmul(clips, random.sometimes(count, 0.7, 0.03, 1, 1, 1, 1), noise)
        coarsest = 1.2 if config.AUGMENTATION == "robust" else 0.8
        clips = compress(clips, random.sometimes(count, 0.7, coarsest, 1, 1, 1, 1))
    return clips


# %% [markdown]
# A portrait as it is, augmented, and self-blended step by step:


# %%
@styled
def plot_self_blends(table: pd.DataFrame, seed: int, clips: int = 5) -> Figure:
    """The middle frame of up to `clips` real clips, the mask of a self-blend, and the result."""
    dataset = ClipDataset(table[table.label == 0].iloc[:clips])
    items = [dataset[row] for row in range(len(dataset))]
    frames, landmarks = (
        torch.stack([part[len(part) // 2, None] for part in column])
        for column in list(zip(*items, strict=True))[:2]
    )
    real = to_float(frames)
    fake, masks = self_blend(real, landmarks, DeviceRandom(torch.device("cpu"), [seed]))
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 4))
    show_row(axes[0], "real", real[:, 0].movedim(1, -1).numpy())
    show_row(axes[1], "mask", masks[:, 0].numpy())
    show_row(axes[2], "self-blend", fake[:, 0].movedim(1, -1).numpy())
    return figure


@styled
def plot_augmentation(seed: int = 2) -> Figure:
    """Matplotlib's portrait, augmented, and the steps of its self-blend."""
    x, y = FACE_CENTRE
    crop = load_portrait()[y - 120 : y + 120, x - 120 : x + 120, ::-1].copy()
    real = torch.from_numpy(crop).movedim(-1, 0)[None, None]
    random = DeviceRandom(torch.device("cpu"), [seed])
    transforms = face_transforms(torch.full((1, 1, 5, 2), math.nan), real.shape[-1])
    perturbed = perturb_face(real, random)
    warped = warp_face(perturbed, transforms, random)
    mask = blend_mask(transforms[1], real.shape[-1], random)[:, :, None]
    augmented = change_colours(crop_and_flip(real, random), random, 0.2)
    steps = {"real": real, "augmented": compress(augmented, torch.tensor(0.8))}
    steps |= {"perturbed": perturbed, "warped": warped, "mask": mask.expand_as(real)}
    steps["self-blend"] = real.lerp(warped, mask)
    pictures = torch.cat([*steps.values()])[:, 0].movedim(1, -1).numpy()
    figure, ax = plt.subplots(figsize=(WIDTH, 1.5))
    show_row(ax, "", pictures, [*steps])
    return figure


if IN_NOTEBOOK:
    show_figure(plot_augmentation())
