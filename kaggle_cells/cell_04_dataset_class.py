# %% [markdown]
# <a id="section-4"></a>
# ## 4. Clips as tensors, and what happens to them on the way
#
# The loader hands out `uint8` clips just as they lie in the cache. Everything else, conversion, augmentation and
# normalisation, runs on whole batches on the device: the GPU has time for it, four CPU cores have not.

# %%
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from cell_02_global_config import Config, mixed_seed


class ClipDataset(Dataset):
    """Cached clips by row of a table with `path`, `clip_file` and `label`.

    An item is (clip (T, S, S, 3) uint8, landmarks (T, 5, 2) float, label float, row number). The row ~r, which is
    negative, stands for the self-blend of row r: the clip of r, called fake, for `augment` to make it one. Batches are
    read by `workers` threads: reading a cached file needs no process of its own, so nothing is copied between processes
    and no worker ever has to import a notebook. `change` is applied to each clip's array.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        workers: int = 1,
        change: Callable[[np.ndarray], np.ndarray] = lambda clip: clip,
    ) -> None:
        self.files, self.videos = list(table.clip_file), list(table.path)
        self.labels = torch.from_numpy(table.label.to_numpy(np.float32))
        self.workers, self.change, self.pool = workers, change, ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        label = self.labels[row] if row >= 0 else torch.tensor(1.0)
        with np.load(self.files[max(row, ~row)]) as saved:
            frames, landmarks = self.change(saved["frames"]), saved["landmarks"]
        return torch.from_numpy(frames), torch.from_numpy(landmarks), label, row

    def __getitems__(
        self, rows: list[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        return list(self.pool.map(self.__getitem__, rows))

    def name(self, row: int) -> str:
        """What to call the clip of a row in a message."""
        return f"{self.videos[row]}" if row >= 0 else f"{self.videos[~row]} (self-blended)"


# %% [markdown]
# **Pairs.** An epoch shows every real video of the training set once, and beside each one a fake of the same
# recording where there is one. Both classes are then equally frequent, whatever the dataset's ratio, and the
# difference between the two neighbours is the manipulation, not the person. The next epoch draws other fakes. For
# `SELF_BLEND` of the real videos the fake is made on the spot, from the real one itself (below).
# Where several processes train together, each takes its share of every batch.


# %%
class PairBatches(Sampler[list[int]]):
    """Batches of rows of a table with `label`, `original` and `group`: a real one, a fake one, a real one, ...

    The order depends on the seed and the epoch alone. A real video's partner is drawn from the fakes made of it that
    had the fewest turns in this epoch; without such a fake, from those of its group; without these, from all. With
    `pairs=False` it is drawn from all fakes. For the share `self_blend` of the real rows r, others in each epoch, the
    partner is ~r, its self-blend. All batches are full, for a last one of a single clip would upset batch
    normalisation; what is left over has its turn in another epoch. Of `processes` that train together, the one with
    this `rank` gets its equal share of each batch.

    Raises ValueError if a batch cannot be shared equally, there are fewer clips than processes, or there are no fakes.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        *,
        pairs: bool = True,
        self_blend: float = 0.0,
    ) -> None:
        if batch_size % processes:
            raise ValueError(
                f"batches of {batch_size} clips cannot be shared equally by {processes} processes"
            )
        table = table.reset_index(drop=True)
        self.reals = table.index[table.label == 0].to_numpy()
        self.fakes = table.index[table.label == 1].to_numpy()
        if not len(self.fakes) and self_blend < 1:
            raise ValueError(
                f"no fakes to train on: SELF_BLEND = {self_blend} needs some, SELF_BLEND = 1 does without"
            )
        of_original, of_group = (
            table.loc[self.fakes].groupby(name).indices if pairs else {}
            for name in ("original", "group")
        )
        self.partners = {
            real: self.fakes[
                of_original.get(table.original[real], of_group.get(table.group[real], slice(None)))
            ]
            for real in self.reals
        }
        self.share = min(batch_size, 2 * len(self.reals)) // processes
        if not self.share:
            raise ValueError(
                f"{2 * len(self.reals)} training clips are too few for {processes} processes"
            )
        self.seed, self.rank, self.processes, self.self_blend = seed, rank, processes, self_blend
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 * len(self.reals) // (self.share * self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        turns = rng.random(len(self.reals) + len(self.fakes))
        reals = rng.permutation(self.reals)
        blended = rng.permutation(len(reals)) < round(self.self_blend * len(reals))
        order: list[int] = []
        for real, is_blended in zip(reals, blended, strict=True):
            if is_blended:
                fake = ~real
            else:
                candidates = self.partners[real]
                fake = candidates[turns[candidates].argmin()]
                turns[fake] += 1
            order += int(real), int(fake)
        for batch in range(len(self)):
            first = (batch * self.processes + self.rank) * self.share
            yield order[first : first + self.share]


# %% [markdown]
# **What the network is shown** is drawn anew in each epoch, for whole batches, on the device. What a camera, a codec
# or a seat in the room would do to a clip is the same for all its frames; what differs between frames is evidence, and
# stays. The two clips of a pair get the same draw, so that here too the manipulation alone tells them apart.

# %%
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_float(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, T, S, S, 3) as float (B, T, 3, S, S) in 0..1."""
    return clips.permute(0, 1, 4, 2, 3).float() / 255


@functools.cache  # sending them to a GPU for each batch would make the CPU wait for it
def imagenet_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
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

    def __init__(
        self, device: torch.device, seed: Sequence[int], rank: int = 0, processes: int = 1
    ) -> None:
        self.generator = torch.Generator(device)
        self.generator.manual_seed(mixed_seed(*seed))
        self.rank, self.processes = rank, processes

    def uniform(self, clips: torch.Tensor, low: float, high: float, *shape: int) -> torch.Tensor:
        """Numbers from low..high for each clip, (B, *shape)."""
        share = len(clips)
        pairs = torch.empty((self.processes * share + 1) // 2, *shape, device=clips.device)
        pairs.uniform_(low, high, generator=self.generator)
        return pairs.repeat_interleave(2, dim=0)[self.rank * share :][:share]

    def sometimes(self, clips: torch.Tensor, share: float, high: float = 1) -> torch.Tensor:
        """For a `share` of the clips a number from 0..high, for the others 0; (B, 1, 1)."""
        return self.uniform(clips, high * (share - 1) / share, high, 1, 1).clamp(min=0)


# %% [markdown]
# **Resolution, blur, sharpness, cropping and mirroring** all do the same to every row of a picture, and then to every
# column. So each is a small matrix, `rows @ picture @ columns.T`; one after the other they are the product of their
# matrices, and cost one pass over the pictures.


# %%
def separable(clips: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Clips (B, T, 3, S, S) with a matrix (B, S, S), or (S, S) for all, along each of their axes."""
    rows, columns = (
        matrix[:, None, None] if matrix.ndim == 3 else matrix for matrix in (rows, columns)
    )
    return rows @ clips @ columns.mT


def averaging(weights: torch.Tensor) -> torch.Tensor:
    """Matrices (..., S, S) of weights scaled so that each row is a mean."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)


def crop_matrix(clips: torch.Tensor, centre: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(B, S, S): bilinear sampling of the part of an axis around `centre` (-1..1), `scale` times its length; (B,)."""
    size, pixels = clips.shape[-1], torch.arange(clips.shape[-1], device=clips.device)
    where = ((2 * pixels + 1 - size) * scale[:, None] + (centre[:, None] + 1) * size - 1) / 2
    return (1 - (where.clamp(0, size - 1)[..., None] - pixels).abs()).clamp(min=0)


def random_crop_and_flip(
    clips: torch.Tensor, draws: PairDraws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices for rows and for columns: a random square of 0.8..1 of the side, resized back, half of them mirrored."""
    draw = functools.partial(draws.uniform, clips)
    scale, mirror = draw(0.8, 1), draw(-1, 1).sign()
    across, down = draw(-1, 1) * (1 - scale), draw(-1, 1) * (1 - scale)
    return crop_matrix(clips, down, scale), crop_matrix(clips, across, scale * mirror)


def resolution_matrix(clips: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(B, S, S): reduce an axis to `factor` (B, 1, 1) of its pixels, averaging, and enlarge it again, bilinearly."""
    pixels = torch.arange(clips.shape[-1], device=clips.device)
    enlarge = (1 - ((pixels[:, None] + 0.5) * factor - 0.5 - pixels).abs()).clamp(min=0)
    return averaging(enlarge) @ averaging(enlarge.mT)


def blur_matrix(clips: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(B, S, S): a Gaussian of `sigma` (B, 1, 1) pixels."""
    pixels = torch.arange(clips.shape[-1], device=clips.device)
    return averaging(torch.exp(-((pixels[:, None] - pixels) ** 2) / (2 * sigma**2).clamp(min=1e-3)))


def change_colours(
    clips: torch.Tensor, gains: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """Scale channels (B, 3), distance from the mean colour and from grey (B,) of clips (B, T, 3, S, S)."""
    gains, contrast, saturation = (
        value.view(len(clips), 1, -1, 1, 1) for value in (gains, contrast, saturation)
    )
    clips = clips * gains
    clips = clips.mean(dim=(1, 2, 3, 4), keepdim=True).lerp(clips, contrast)
    return clips.mean(dim=2, keepdim=True).lerp(clips, saturation).clamp(0, 1)


# %% [markdown]
# **Coordinates of the face.** The five landmarks of a frame say where a face of standard form lies in it, how large
# and how tilted. In its coordinates a region is the same part of the face in every frame.

# %%
STANDARD_FACE = (
    -0.5 - 0.55j,
    0.5 - 0.55j,
    0.02j,
    -0.41 + 0.6j,
    0.41 + 0.6j,
)  # unit: distance between the eyes


@functools.cache
def standard_face(device: torch.device) -> torch.Tensor:
    """Eyes, nose and corners of the mouth as complex numbers (5,), of mean 0."""
    points = torch.tensor(STANDARD_FACE, device=device)
    return points - points.mean()


def face_coordinates(
    landmarks: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the pixels of square frames lie on the standard face, as complex numbers x + iy.

    Args:
        landmarks: (B, T, 5, 2) in pixels. Where they are NaN a face is assumed in the middle.
        size: side of the frames in pixels.

    Returns:
        The coordinates (B, T, S, S); and `turn` and `middle` (B, T, 1, 1) of the similarity that leads back:
        pixel = coordinate * turn + middle.
    """
    face = standard_face(landmarks.device)
    usual = torch.view_as_real(face * (size / 4) + (0.5 + 0.5j) * size)
    points = torch.view_as_complex(torch.where(landmarks.isnan(), usual, landmarks.float()))
    middle = points.mean(dim=-1, keepdim=True)
    turn = ((points - middle) * face.conj()).sum(
        dim=-1, keepdim=True
    ) / face.abs().square().sum()  # least squares
    middle, turn = middle[..., None], turn[..., None]
    pixels = torch.arange(size, device=landmarks.device)
    return (pixels + 1j * pixels[:, None] - middle) / turn, turn, middle


# %% [markdown]
# **Self-blending** (Shiohara and Yamasaki, 2022) teaches what all face swaps share instead of what one generator
# leaves behind: a real face is blended into itself. The inner part is recoloured, sharpened or made coarser, moved a
# little, and put back under a soft mask of random shape. Here the inner part also trembles a little from frame to
# frame, as faces do that are generated frame by frame (after video-level blending, arXiv 2408.17065). The real
# twin stands beside it in the batch: seam, texture and trembling alone tell them apart.


# %%
def face_mask_like(where: torch.Tensor, draws: PairDraws) -> torch.Tensor:
    """Soft masks (B, T, S, S) in 0..1, exactly 0 outside, for faces with coordinates `where` (B, T, S, S).

    An ellipse around the face or a part of it, its outline bent by a few waves, its edge hard or soft.
    """

    def draw(low: float, high: float, *shape: int) -> torch.Tensor:
        return draws.uniform(where, low, high, *shape, 1, 1, 1)

    width, height = draw(0.8, 1.3), draw(0.7, 1.5)
    across, down = (
        (where.real - draw(-0.2, 0.2)) / width,
        (where.imag - 0.1 - draw(-0.3, 0.3)) / height,
    )
    angle, radius = torch.atan2(down, across), torch.hypot(across, down)
    for waves in (2, 3, 5):
        radius = radius * (
            1 + draw(0, 0.2 / waves) * torch.cos(waves * angle + draw(0, 2 * math.pi))
        )
    softness = draw(0.02, 0.3)
    inside = ((1 + softness - radius) / (2 * softness)).clamp(0, 1)
    return inside * inside * (3 - 2 * inside)


def self_blend(
    clips: torch.Tensor, landmarks: torch.Tensor, draws: PairDraws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fakes made of real clips (B, T, 3, S, S) in 0..1 with landmarks (B, T, 5, 2), and their masks (B, T, S, S).

    Nothing changes where the mask is 0.
    """
    frames, size = clips.shape[1], clips.shape[-1]
    where, turn, middle = face_coordinates(landmarks, size)
    draw = functools.partial(draws.uniform, clips)
    strength = draw(0, 1, 1)
    gains, contrast, saturation = (1 + strength * draw(-0.25, 0.25, count) for count in (3, 1, 1))
    coarse = draw(-1, 1, 1, 1)  # from the sharpest to the coarsest
    resample = resolution_matrix(clips, torch.exp2(-2 * coarse.clamp(min=0)))
    sharpen = torch.eye(size, device=clips.device).lerp(
        blur_matrix(clips, torch.ones_like(coarse)), coarse.clamp(max=0)
    )
    matrix = resample @ sharpen
    inner = separable(change_colours(clips, gains, contrast, saturation), matrix, matrix).clamp(
        0, 1
    )

    trembling = draw(-2, 2, 1).clamp(min=0)  # half of them are steady
    tilt, growth, right, down = (  # the whole clip's, and each frame's
        limit * (draw(-1, 1, 1) + trembling * draw(-1, 1, frames))
        for limit in (0.04, 0.04, 0.1, 0.1)
    )
    moved = (
        torch.polar(1 + growth, tilt)[..., None, None] * where
        + torch.complex(right, down)[..., None, None]
    )
    grid = (2 * torch.view_as_real(moved * turn + middle) + 1) / size - 1
    inner = F.grid_sample(
        inner.flatten(0, 1), grid.flatten(0, 1), padding_mode="reflection", align_corners=False
    )
    mask = face_mask_like(where, draws)
    ratio = draw(0.25, 2, 1, 1, 1, 1).clamp(max=1)  # more than half of them are blended in full
    return torch.lerp(clips, inner.view_as(clips), ratio * mask[:, :, None]), mask


def with_self_blends(
    clips: torch.Tensor, landmarks: torch.Tensor, rows: torch.Tensor, draws: PairDraws
) -> torch.Tensor:
    """Clips (B, T, 3, S, S) in 0..1; those of negative `rows` (B,) become self-blends, see `ClipDataset`."""
    return torch.where(rows.view(-1, 1, 1, 1, 1) < 0, self_blend(clips, landmarks, draws)[0], clips)


# %% [markdown]
# **Augmentation.** `plain` crops, mirrors and recolours. `codec` adds noise and compression, which in a real video come
# after the manipulation: without them a self-blend would be given away by nothing but its smoothness. `robust` adds
# fewer pixels, blur and lost frames, and something that hides a part of the face, as a hand or a microphone does.


# %%
def choose_frames(
    clips: torch.Tensor, landmarks: torch.Tensor, frames: int, draws: PairDraws
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the clips of `frames` frames that lie interleaved in each row (B, K * frames, ...), and its landmarks."""
    between = clips.shape[1] // frames
    if between == 1:
        return clips, landmarks
    first = draws.uniform(clips, 0, between, 1).long().clamp(max=between - 1)
    shown = first + between * torch.arange(frames, device=clips.device)
    batch = torch.arange(len(clips), device=clips.device)[:, None]
    return clips[batch, shown], landmarks[batch, shown]


def lose_frames(clips: torch.Tensor, draws: PairDraws) -> torch.Tensor:
    """In some clips, some frames got lost: the one before them is shown once more, as players do."""
    times = torch.arange(clips.shape[1], device=clips.device)
    lost = draws.uniform(clips, 0, 1, len(times)) < draws.sometimes(clips, 0.1, 0.5)[..., 0]
    shown = torch.where(lost, 0, times).cummax(dim=1).values
    return clips.gather(1, shown.view(*shown.shape, 1, 1, 1).expand_as(clips))


def cut_out(clips: torch.Tensor, landmarks: torch.Tensor, draws: PairDraws) -> torch.Tensor:
    """In some clips, an oval of one colour covers the surroundings of one landmark in all frames."""
    where, *_ = face_coordinates(landmarks, clips.shape[-1])
    radius, shape = (
        draws.sometimes(clips, 0.15, 0.5)[..., None],
        draws.uniform(clips, 0.6, 1.6, 1, 1, 1),
    )
    centre = standard_face(clips.device)[draws.uniform(clips, 0, 5).long().clamp(max=4)].view(
        -1, 1, 1, 1
    )
    covered = torch.hypot((where - centre).real * shape, (where - centre).imag / shape) < radius
    return torch.where(covered[:, :, None], draws.uniform(clips, 0, 1, 1, 3, 1, 1), clips)


@functools.cache
def codec_constants(size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """RGB to luma and chroma (3, 3), and back; the cosine transform of blocks of 8 (S, S); steps (3, S, S)."""
    colours = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]]
    )
    blocks = []
    for length in [8] * (size // 8) + [size % 8] * (size % 8 > 0):
        place = torch.arange(length)
        block = torch.cos(math.pi / length * place[:, None] * (place + 0.5)) * math.sqrt(2 / length)
        block[0] /= math.sqrt(2)
        blocks.append(block)
    frequency = torch.arange(size) % 8
    steps = (10 + 6 * (frequency + frequency[:, None])) / 255
    steps = torch.stack([steps, 2 * steps, 2 * steps])
    constants = colours, torch.linalg.inv(colours), torch.block_diag(*blocks), steps
    return tuple(constant.to(device) for constant in constants)


def compress(clips: torch.Tensor, coarseness: torch.Tensor) -> torch.Tensor:
    """What JPEG does to clips (B, T, 3, S, S): cosine coefficients of blocks of 8 x 8 are rounded to steps that grow
    with the frequency, times `coarseness` (B, 1, 1): 0.2 is about quality 90, 1 about 50, 1.7 about 30; 0 does nothing.
    """
    colours, back, cosines, steps = codec_constants(clips.shape[-1], clips.device)
    coefficients = cosines @ torch.einsum("dc,btchw->btdhw", colours, clips) @ cosines.mT
    steps = steps * coarseness[..., None, None] + 1e-7
    coefficients = (coefficients / steps).round() * steps
    return torch.einsum("dc,btchw->btdhw", back, cosines.mT @ coefficients @ cosines).clamp(0, 1)


def augment(
    clips: torch.Tensor,
    landmarks: torch.Tensor,
    rows: torch.Tensor,
    draws: PairDraws,
    config: Config,
) -> torch.Tensor:
    """What training shows of a batch, ordered in pairs.

    Args:
        clips: (B, K * T, S, S, 3) uint8, K being CLIPS_PER_VIDEO; one of the K is shown.
        landmarks: (B, K * T, 5, 2) in pixels.
        rows: (B,); clips of negative ones become self-blends, see `ClipDataset`.
        draws: where all randomness comes from.
        config: FRAMES_PER_VIDEO, SELF_BLEND and AUGMENTATION count.

    Returns:
        (B, T, 3, S, S) float in 0..1.
    """
    clips, landmarks = choose_frames(clips, landmarks, config.FRAMES_PER_VIDEO, draws)
    clips = to_float(clips)
    if config.SELF_BLEND:
        clips = with_self_blends(clips, landmarks, rows, draws)
    if config.AUGMENTATION == "none":
        return clips
    draw = functools.partial(draws.uniform, clips)
    if config.AUGMENTATION == "robust":
        clips = lose_frames(cut_out(clips, landmarks, draws), draws)
    rows, columns = random_crop_and_flip(clips, draws)
    if config.AUGMENTATION == "robust":
        worse = resolution_matrix(clips, torch.exp2(-draws.sometimes(clips, 0.2)))
        worse = worse @ blur_matrix(clips, draws.sometimes(clips, 0.1))
        rows, columns = worse @ rows, worse @ columns
    clips = separable(clips, rows, columns)
    clips = change_colours(clips, draw(0.8, 1.2, 3), draw(0.8, 1.2), draw(0.8, 1.2))
    if config.AUGMENTATION in ("codec", "robust"):
        noise = torch.empty_like(clips[0]).normal_(
            generator=draws.generator
        )  # the same film for all, at its own gain
        clips = clips + draws.sometimes(clips, 0.7, 0.03)[..., None, None] * noise
        clips = compress(clips, draws.sometimes(clips, 0.7, 0.8))
    return clips
