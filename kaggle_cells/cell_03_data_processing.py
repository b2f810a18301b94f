# %% [markdown]
# ## 3. From a folder of videos to clips
#
# A video is decoded once, in one sequential pass, and what the network will see of it is kept as a small
# `uint8` file: 16 face crops of 160 x 160 pixels are 1.2 MB. From then on an epoch costs no decoding.
#
# First the **finding**. Each known layout is one function that looks at a folder and returns a row a video, or
# nothing. A row says what the video shows (`label`, `method`) and, as `sources`, which original recordings it was
# made from: the face swap `004_982.mp4` shares its pictures with the original `004` and its face with `982`.

# %%
import hashlib
import heapq
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from cell_01_imports_and_setup import ensure_package
from cell_02_global_config import Config

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # folder: split
FF_METHODS = ("Deepfakes", "Face2Face", "FaceShifter", "FaceSwap", "NeuralTextures", "DeepFakeDetection")


def videos_below(folder: Path) -> list[Path]:
    """Every video below `folder`, sorted; hidden files are left out, linked folders are entered once."""
    found, entered = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (place := os.path.realpath(where)) in entered:
            folders.clear()
            continue
        entered.add(place)
        found += [Path(where, name) for name in names if name[0] != "."]
    return sorted(path for path in found if path.suffix.lower() in VIDEO_SUFFIXES)


def sources_from_name(stem: str) -> list[str]:
    """The recordings that a file name tells of.

    `004_982` tells of 004 and 982 (a FaceForensics++ fake), `alice_1__swapped` of `alice_1`, any other name of
    itself, so that a real and a fake video of one name belong together.
    """
    if re.fullmatch(r"\d{3}_\d{3}", stem):
        return stem.split("_")
    return [stem.split("__")[0]]


def find_real_fake(folder: Path) -> list[dict]:
    """`{real,fake}/` below the splits, above them, or without: the user's layouts.

    A further folder below `fake`, or what follows `__` in a name, tells the manipulation.
    """
    children = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    parts = [(split, sub) for name, split in SPLITS.items() if name in children for sub in children[name].iterdir()]
    parts = [(split, sub) for split, sub in parts if sub.is_dir() and sub.name.lower() in ("real", "fake")]
    if not parts and {"real", "fake"} <= set(children):
        parts = [("", children["real"]), ("", children["fake"])]
    rows = []
    for split, part in parts:
        real = part.name.lower() == "real"
        for path in videos_below(part):
            *below, _ = path.relative_to(part).parts
            own = SPLITS[below.pop(0).lower()] if below and below[0].lower() in SPLITS else split
            method = "real" if real else [*path.stem.split("__")[1:], *below, "fake"][0]
            sources = sources_from_name(path.stem)
            rows.append(dict(path=path, label=int(not real), method=method, sources=sources, split=own))
    if not any(len(row["sources"]) > 1 for row in rows):  # no recording numbers: train/real/1 and test/real/1 are two
        rows = [dict(row, sources=[f"{row['split']}/{row['sources'][0]}"]) for row in rows]
    return rows


def find_faceforensics(folder: Path) -> list[dict]:
    """Kaggle's `FaceForensics++_C23`: `original/` beside a folder for each manipulation, all 1000 videos."""
    children = {child.name: child for child in folder.iterdir() if child.is_dir()}
    methods = [name for name in FF_METHODS if name in children]
    if "original" not in children or not methods:
        return []
    rows = []
    for name in ("original", *methods):
        label, method = (0, "real") if name == "original" else (1, name)
        for path in videos_below(children[name]):
            sources = sources_from_name(path.stem)
            if name == "DeepFakeDetection":  # 01_02__outside_talking__YVGY8LOK: the actors 01 and 02
                sources = [f"actor {number}" for number in sources[0].split("_")]
            rows.append(dict(path=path, label=label, method=method, sources=sources, split=""))
    return rows


LAYOUTS: dict[str, Callable[[Path], list[dict]]] = {
    "FaceForensics++": find_faceforensics,
    "real/fake folders": find_real_fake,
}


def find_videos(root: Path, methods: Iterable[str] = ()) -> pd.DataFrame:
    """Every labelled video below `root`, in whichever known layouts, a few folders deep.

    Args:
        root: a dataset, or a folder that holds some.
        methods: the manipulations wanted; none means all but DeepFakeDetection, whose originals are missing: a
            class that differs in resolution would teach the resolution.

    Returns:
        A row a video: path, label (0 real, 1 fake), method, group, split ("" if not given), dataset, sources.

    Raises:
        FileNotFoundError: `root` does not exist, or holds no known layout; says what it holds.
        ValueError: a wanted method is not there; names those that are.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"DATA_DIR: {root} is not a folder (seen from {Path.cwd()})")
    rows, level, entered = [], [root], set()
    for _ in range(6):
        deeper = []
        for folder in level:
            if (place := folder.resolve()) in entered:
                continue
            entered.add(place)
            rows_here = next(filter(None, (find(folder) for find in LAYOUTS.values())), [])
            name = folder.resolve().name if folder == root else str(folder.relative_to(root))
            rows += [dict(row, dataset=name) for row in rows_here]
            if not rows_here:
                deeper += sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
        level = deeper
    if not rows:
        names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
        raise FileNotFoundError(
            f"DATA_DIR: no known dataset below {root.resolve()}, which holds {len(names)} entries "
            f"({', '.join(names[:8]) or 'it is empty'}) and {len(videos_below(root))} videos. Expected "
            "real/ and fake/, train|val|test/ with real/ and fake/, or FaceForensics++_C23 with original/"
        )
    videos = pd.DataFrame(rows)
    unknown = set(methods) - set(videos.method)
    if unknown:
        known = sorted(set(videos.method) - {"real"})
        raise ValueError(f"METHODS: {', '.join(sorted(unknown))} not found below {root}; there are {', '.join(known)}")
    wanted = set(methods) or set(videos.method) - {"DeepFakeDetection"}
    videos = videos[(videos.label == 0) | videos.method.isin(wanted)]
    sources = [[f"{row.dataset}/{source}" for source in row.sources] for row in videos.itertuples()]
    return videos.assign(group=connected_groups(sources)).drop(columns="sources").reset_index(drop=True)


def connected_groups(sources: list[list[str]]) -> list[str]:
    """The group of each video: the connected component of its sources, named by its first one in sorted order."""
    parent: dict[str, str] = {}

    def root_of(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for names in sources:
        for name in names:
            low, high = sorted((root_of(names[0]), root_of(name)))
            parent[high] = low
    return [root_of(names[0]) for names in sources]


# %% [markdown]
# **Limiting and splitting** work on groups, never on single videos: if a person's original is in training and a
# fake of the same recording in the test set, the test measures memory. Groups are dealt out so that every split
# gets its share of each class and manipulation.


# %%
def limit_videos(videos: pd.DataFrame, per_class: int, seed: int) -> pd.DataFrame:
    """At most `per_class` real and fake videos (0 = all), of as many and the same groups as possible.

    Fakes are taken evenly over methods. A given split keeps its share of the videos.
    """
    if not per_class:
        return videos
    groups = np.random.default_rng(seed).permutation(sorted(videos.group.unique()))
    with_real = set(videos.group[videos.label == 0])
    rank = {group: place + len(groups) * (group not in with_real) for place, group in enumerate(groups)}
    of_class, kept = videos.label.value_counts(), []
    for (label, _), part in videos.groupby(["label", "split"]):
        kept += spread_out(part, rank, max(1, round(per_class * len(part) / of_class[label])))
    return videos.loc[sorted(kept)].reset_index(drop=True)


def spread_out(videos: pd.DataFrame, rank: dict[str, int], count: int) -> list[int]:
    """The index of `count` videos: each time of the rarest method so far, and of its least used group, by rank."""
    used: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    waiting: dict[str, list[tuple]] = {}
    for row in videos.itertuples():
        waiting.setdefault(row.method, []).append((0, rank[row.group], str(row.path), row.group, row.Index))
    for heap in waiting.values():
        heapq.heapify(heap)
    chosen = []
    while waiting and len(chosen) < count:
        method = min(waiting, key=lambda name: (taken[name], name))
        heap = waiting[method]
        while heap[0][0] < used[heap[0][3]]:  # its group was used since it was put here
            heapq.heapreplace(heap, (used[heap[0][3]], *heap[0][1:]))
        *_, group, index = heapq.heappop(heap)
        chosen.append(index)
        used[group] += 1
        taken[method] += 1
        if not heap:
            del waiting[method]
    return chosen


def split_videos(videos: pd.DataFrame, val: float, test: float, seed: int, holdout: Iterable[str] = ()) -> pd.DataFrame:
    """Fill in `split`, so that no group crosses a split and each split has its share of each method.

    A split that a dataset gives is kept; one that it does not give is taken from its training videos. Fakes of
    `holdout` methods stay in the test set only: those whose group went elsewhere are dropped.

    Raises ValueError when a split would lack a class, with the counts.
    """
    unknown = set(holdout) - set(videos.method)
    if unknown:
        raise ValueError(f"HOLDOUT_METHODS: {', '.join(unknown)} not among {', '.join(sorted(set(videos.method)))}")
    split = videos.split.copy()
    for _, part in videos.groupby("dataset"):
        shares = {"train": 1 - val - test, "val": val, "test": test}
        shares = {name: share for name, share in shares.items() if name == "train" or name not in set(part.split)}
        pool = part[part.split.isin(["", "train"] if len(shares) > 1 else [""])]
        split.update(pool.group.map(deal_out(pool, shares, seed)))
    videos = videos.assign(split=split)
    videos = videos[~videos.method.isin(list(holdout)) | (videos.split == "test")].reset_index(drop=True)
    table = pd.crosstab(videos.split, videos.label)
    table = table.reindex(index=["train", "val", "test"], columns=[0, 1], fill_value=0)
    if (table == 0).any(axis=None):
        raise ValueError(
            f"a split lacks a class: {len(videos)} usable videos in {videos.group.nunique()} groups became\n"
            f"{table.rename(columns={0: 'real', 1: 'fake'})}\n"
            "More recordings, or other VAL_FRACTION and TEST_FRACTION, help."
        )
    return videos


def deal_out(videos: pd.DataFrame, shares: dict[str, float], seed: int) -> dict[str, str]:
    """A split for each group, in the proportion of `shares`, with its share of each method.

    Groups are dealt out large ones first, otherwise in random order, each to the split that lacks most of what the
    group has (after the iterative stratification of Sechidis et al., 2011).
    """
    table = pd.crosstab(videos.group, videos.method)
    counts, splits = table.to_numpy(), list(shares)
    share = np.array(list(shares.values()))[:, None] / sum(shares.values())
    missing = share * counts.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(counts))
    chosen = {}
    for row in order[np.argsort(-counts.sum(axis=1)[order], kind="stable")]:
        best = int(np.argmax((missing / share) @ (counts[row] / counts.sum(axis=0))))
        missing[best] -= counts[row]
        chosen[table.index[row]] = splits[best]
    return chosen


def crossing_groups(videos: pd.DataFrame) -> list[str]:
    """Groups found in more than one split, which only a split given by the dataset can cause."""
    splits = videos.groupby("group").split.nunique()
    return list(splits.index[splits > 1])


# %% [markdown]
# **Frames** are taken at even spacing from a fixed stretch of the middle of the video. Fakes are often shorter
# than originals; spread over the whole video, their frames would lie closer together, and the network would
# learn to tell durations. Seeking to each frame would decode most of the video many times, so one pass grabs
# every frame up to the last one needed and converts only those that are.

# %%
LONGEST_SIDE = 1920  # larger frames are reduced on reading: a face is large enough then, and memory stays small


class VideoError(Exception):
    """A video cannot be used; the message is the reason that goes to skipped.csv."""


def frame_positions(total: int, count: int, fps: float, seconds: float) -> np.ndarray:
    """`count` even positions within the middle `seconds` of `total` frames; repeated where frames are fewer."""
    span = min(total, max(1, round(fps * seconds))) if fps > 0 else total
    return (total - span) // 2 + ((np.arange(count) + 0.5) * span / count).astype(int)


def read_frames(path: Path, count: int, seconds: float) -> list[np.ndarray]:
    """`count` RGB frames (H, W, 3) uint8 of a video. Raises VideoError if it cannot be decoded that far."""
    if not path.is_file():
        raise VideoError("is a directory" if path.is_dir() else "does not exist")
    if path.stat().st_size == 0:
        raise VideoError("empty file")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise VideoError("not a video, or damaged at its start")
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    if total <= 0:  # some WebM files do not say: count, and start again
        total = sum(1 for _ in iter(capture.grab, False))
        capture.open(str(path), cv2.CAP_FFMPEG)
    if total == 0:
        raise VideoError("holds no video frames")
    wanted = Counter(frame_positions(total, count, fps, seconds).tolist())
    frames = []
    for position in range(max(wanted) + 1):
        if not capture.grab():
            raise VideoError(f"decoding ends at frame {position} of {total}: truncated or damaged")
        if position in wanted:
            ok, frame = capture.retrieve()
            if not ok:
                raise VideoError(f"frame {position} of {total} cannot be decoded")
            frames += [to_rgb(frame)] * wanted[position]
    return frames


def to_rgb(frame: np.ndarray) -> np.ndarray:
    """A decoded BGR frame as RGB, its longer side at most LONGEST_SIDE."""
    scale = LONGEST_SIDE / max(frame.shape[:2])
    if scale < 1:
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


# %% [markdown]
# **The face** is searched for in a few frames with MTCNN and followed through the clip. Its box is interpolated
# in between and keeps one size: a crop that breathed with the detector would hide, or fake, the unsteadiness
# that gives some manipulations away.

# %%
DETECTION_FRAMES = 5  # frames of a clip that the detector looks at
DETECTION_SIDE = 960  # longer side of the frames it sees
SMALLEST_FACE = 40  # in pixels of those


def load_face_detector(device: str) -> torch.nn.Module:
    """MTCNN (Zhang et al., 2016), whose weights come inside the facenet-pytorch package."""
    ensure_package("facenet_pytorch", "facenet-pytorch==2.5.3")
    from facenet_pytorch import MTCNN

    with warnings.catch_warnings():  # torch 2.4 and 2.5 say how facenet-pytorch should read its own weights
        warnings.filterwarnings("ignore", message="You are using `torch.load`", category=FutureWarning)
        return MTCNN(keep_all=True, min_face_size=SMALLEST_FACE, device=device).eval()


def follow_face(found: list[tuple[np.ndarray, np.ndarray]]) -> list[int | None]:
    """The index of one face in each frame's boxes (N, 4), or None: the chain with the largest sum of sizes.

    From each detected face a chain is grown by taking the nearest one in every other frame, if it is no farther
    away than the face is wide. So a large face that stays wins against a larger one that passes.
    """
    best, best_score = [None] * len(found), 0.0
    for boxes, _ in found:
        for start in boxes:
            chain, score = [], 0.0
            for others, chances in found:
                middles, sizes = (others[:, :2] + others[:, 2:]) / 2, np.ptp(others.reshape(-1, 2, 2), axis=1).max(-1)
                distance = np.linalg.norm(middles - (start[:2] + start[2:]) / 2, axis=1)
                near = int(distance.argmin()) if len(others) else None
                if near is not None and distance[near] > (start[2:] - start[:2]).max():
                    near = None
                chain.append(near)
                score += 0.0 if near is None else float(sizes[near] * chances[near])
            if score > best_score:
                best, best_score = chain, score
    return best


def find_face(frames: list[np.ndarray], detector: torch.nn.Module | None) -> tuple[np.ndarray, np.ndarray, float]:
    """The face of a clip: boxes (T, 4) and landmarks (T, 5, 2) in pixels, and the share of frames that show it.

    Without any face, or without a detector, the boxes and landmarks are NaN and the share is 0.
    """
    no_face = np.full((len(frames), 4), np.nan), np.full((len(frames), 5, 2), np.nan), 0.0
    if detector is None:
        return no_face
    looked_at = np.unique(np.linspace(0, len(frames) - 1, DETECTION_FRAMES).round().astype(int))
    scale = min(1.0, DETECTION_SIDE / max(frames[0].shape[:2]))
    small = [cv2.resize(frames[i], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for i in looked_at]
    if min(small[0].shape[:2]) < SMALLEST_FACE:
        return no_face
    try:
        boxes, chances, landmarks = detector.detect(np.stack(small), landmarks=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:  # facenet-pytorch stumbles over boxes without area
        raise VideoError(f"the face detector failed: {error}") from error
    none = np.zeros((0, 4)), np.zeros(0)
    found = [none if b is None else (b.astype(float), c) for b, c in zip(boxes, chances, strict=True)]
    picks = follow_face(found)
    seen = [i for i, pick in enumerate(picks) if pick is not None]
    if not seen:
        return no_face
    values = [np.concatenate([boxes[i][picks[i]], landmarks[i][picks[i]].ravel()]) for i in seen]
    values = np.stack(values).astype(float) / scale
    track = np.stack([np.interp(range(len(frames)), looked_at[seen], value) for value in values.T], axis=1)
    return track[:, :4], track[:, 4:].reshape(-1, 5, 2), len(seen) / len(looked_at)


def crop_squares(boxes: np.ndarray, height: int, width: int, margin: float) -> np.ndarray:
    """Squares (T, 3) of left, top, side around the boxes (T, 4), all of one size, shifted to lie in the frame.

    A box that is NaN gives the largest square in the middle of the frame.
    """
    if np.isnan(boxes).any():
        side = min(height, width)
        return np.tile([(width - side) // 2, (height - side) // 2, side], (len(boxes), 1))
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    side = min(int(np.median(sides) * (1 + 2 * margin)), height, width)
    corner = (boxes[:, :2] + boxes[:, 2:]) / 2 - side / 2
    corner = np.clip(corner.round(), 0, [width - side, height - side])
    return np.column_stack([corner, np.full(len(boxes), side)]).astype(int)


# %% [markdown]
# Together they make a **clip**. It is cached in one file, written under another name and then renamed, so that a
# half-written one is never read. Its name is a fingerprint of the video and of every setting that shapes it.


# %%
@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to instead of `file`, which takes its place only when all is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_name(f".partial-{os.getpid()}-{file.name}")
    try:
        yield partial_file
        os.replace(partial_file, file)
    finally:
        partial_file.unlink(missing_ok=True)


def save_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table without its index, all of it or nothing."""
    with replacing(file) as partial_file:
        table.to_csv(partial_file, index=False)


@dataclass(frozen=True)
class ClipSettings:
    """What shapes a clip; see the parameters of the same names."""

    frames: int
    seconds: float
    size: int
    face_crop: bool
    margin: float

    @classmethod
    def of(cls, config: Config) -> "ClipSettings":
        return cls(
            config.FRAMES_PER_VIDEO, config.CLIP_SECONDS, config.IMAGE_SIZE, config.FACE_CROP, config.FACE_MARGIN
        )


@dataclass
class Clip:
    """A video as the network sees it.

    `frames` (T, S, S, 3) uint8 RGB; `squares` (T, 3), the left, top and side of the crops in the video's pixels;
    `landmarks` (T, 5, 2), eyes, nose and corners of the mouth in the crops' pixels, NaN without a face;
    `face_share`, the share of the frames looked at that show the face.
    """

    frames: np.ndarray
    squares: np.ndarray
    landmarks: np.ndarray
    face_share: float


def make_clip(path: Path, settings: ClipSettings, detector: torch.nn.Module | None) -> Clip:
    """Decode, crop and resize one video. Raises VideoError with the reason if it cannot be used."""
    frames = read_frames(path, settings.frames, settings.seconds)
    height, width = frames[0].shape[:2]
    boxes, landmarks, share = find_face(frames, detector if settings.face_crop else None)
    squares = crop_squares(boxes, height, width, settings.margin)
    shrinks = squares[0, 2] > settings.size
    crops = [
        cv2.resize(
            frame[top : top + side, left : left + side],
            (settings.size, settings.size),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        for frame, (left, top, side) in zip(frames, squares, strict=True)
    ]
    landmarks = (landmarks - squares[:, None, :2]) * (settings.size / squares[0, 2])
    return Clip(np.stack(crops), squares, landmarks.astype(np.float32), share)


def clip_file(path: Path, settings: ClipSettings, cache_dir: Path) -> Path:
    """Where the clip of a video is cached: a name for this file, at this size and age, with these settings."""
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, asdict(settings)]
    return cache_dir / (hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24] + ".npz")


def cached_clip(path: Path, settings: ClipSettings, cache_dir: Path, detector: torch.nn.Module | None) -> dict:
    """Make sure that a video's clip is in the cache; returns where, and its share of frames with a face."""
    try:
        file = clip_file(path, settings, cache_dir)
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error
    if file.exists():
        try:
            with np.load(file) as saved:
                return dict(clip_file=str(file), face_share=float(saved["face_share"]))
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError):
            file.unlink()  # damaged on disk: made again
    clip = make_clip(path, settings, detector)
    with replacing(file) as partial_file, open(partial_file, "wb") as stream:
        np.savez(stream, **vars(clip))
    return dict(clip_file=str(file), face_share=clip.face_share)


def cache_clips(
    videos: pd.DataFrame, settings: ClipSettings, cache_dir: Path, detector: torch.nn.Module | None, workers: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the clips of all videos, several at a time in threads (OpenCV decodes outside Python's lock).

    Returns:
        The usable videos with columns `clip_file` and `face_share`, and the others with a `reason`.
    """
    outcomes: dict[int, dict] = {}

    def outcome(path: Path) -> dict:
        try:
            return cached_clip(path, settings, cache_dir, detector)
        except (VideoError, cv2.error) as error:
            return dict(reason=str(error))

    cache_dir.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(outcome, row.path): row.Index for row in videos.itertuples()}
        with tqdm(as_completed(jobs), total=len(jobs), desc="videos to clips", unit="video", leave=False) as bar:
            for job in bar:
                outcomes[jobs[job]] = job.result()
                bar.set_postfix(skipped=sum("reason" in done for done in outcomes.values()))
    finally:
        pool.shutdown(cancel_futures=True)
    columns = pd.DataFrame.from_dict(outcomes, orient="index", columns=["clip_file", "face_share", "reason"])
    table = videos.join(columns)
    usable = table.reason.isna()
    return (
        table[usable].drop(columns="reason").reset_index(drop=True),
        table[~usable].drop(columns=["clip_file", "face_share"]).reset_index(drop=True),
    )


# %% [markdown]
# **The demo set** lets the notebook run with no dataset at all. From one public-domain portrait that ships with
# matplotlib it makes short videos of "people" (the portrait's face is reshaped at random), who move their heads
# in changing light, and three kinds of fakes of them:
#
# - `blend`: another face is blended in, with a seam and other colours;
# - `lowres`: the face went through a generator of low resolution;
# - `jitter`: the face does not quite follow the head from frame to frame.
#
# Person, motion, light, background, camera and codec are drawn from the same distributions for both classes, so
# that only the manipulation tells them apart.

# %%
DEMO_METHODS = ("blend", "lowres", "jitter")
DEMO_FRAMES, DEMO_FPS = (20, 28), 12
FACE_CENTRE, FACE_AXES = (265, 236), (76, 92)  # of the face in the portrait, in its pixels


def load_portrait() -> np.ndarray:
    """Grace Hopper by James S. Davis, 1984 (public domain), as BGR float32 (600, 512, 3) in 0..1."""
    file = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    portrait = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)  # imread fails on some Windows paths
    return portrait.astype(np.float32) / 255


def reshaped(portrait: np.ndarray, rng: np.random.Generator, strength: float = 6) -> np.ndarray:
    """The portrait (H, W, C) with smooth random displacements of about `strength` pixels: another person."""
    height, width = portrait.shape[:2]
    shift = cv2.resize(
        rng.normal(0, strength, (7, 6, 2)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(portrait, x + shift[..., 0], y + shift[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def face_mask(rng: np.random.Generator, feather: float) -> np.ndarray:
    """A soft ellipse over the face, (600, 512, 1) float32 in 0..1, its edge about `feather` pixels wide."""
    mask = np.zeros((600, 512), np.float32)
    axes = [int(axis * rng.uniform(0.85, 1.1)) for axis in FACE_AXES]
    cv2.ellipse(mask, FACE_CENTRE, axes, rng.uniform(-8, 8), 0, 360, 1, cv2.FILLED)
    return cv2.GaussianBlur(mask, (0, 0), feather)[..., None]


def manipulated(
    person: np.ndarray, portrait: np.ndarray, method: str, frames: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The person's picture for each frame of a fake, manipulated inside the face only."""
    height, width = person.shape[:2]
    if method == "blend":
        gain = 1 + rng.choice([-1, 1], 3) * rng.uniform(0.08, 0.2, 3)
        donor = reshaped(portrait, rng) * gain.astype(np.float32)
        mask = face_mask(rng, rng.uniform(1.5, 3))
        return [person + mask * (donor - person)] * frames
    mask = face_mask(rng, rng.uniform(2, 5))
    if method == "lowres":
        small = cv2.resize(person, None, fx=(scale := rng.uniform(0.1, 0.16)), fy=scale, interpolation=cv2.INTER_AREA)
        return [person + mask * (cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR) - person)] * frames
    if method != "jitter":
        raise ValueError(f"{method!r} is no demo method: one of {', '.join(DEMO_METHODS)}")
    pictures = []
    for _ in range(frames):
        turn = cv2.getRotationMatrix2D(FACE_CENTRE, rng.normal(0, 4), rng.normal(1, 0.03))
        turn[:, 2] += rng.normal(0, 11, 2)
        moved = cv2.warpAffine(person, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
        pictures.append(person + mask * (moved - person))
    return pictures


def demo_frames(portrait: np.ndarray, number: int, method: str, seed: int) -> list[np.ndarray]:
    """The frames (H, W, 3) uint8 BGR of demo video `number`: real, or a fake of the same scene."""
    rng = np.random.default_rng([seed, number])
    outline = np.zeros(portrait.shape[:2], np.float32)
    cv2.ellipse(outline, (262, 185), (118, 170), 0, 0, 360, 1, cv2.FILLED)
    cv2.fillPoly(outline, [np.array([[20, 600], [35, 400], [200, 310], [330, 310], [490, 390], [512, 600]])], 1)
    outline = cv2.GaussianBlur(outline, (0, 0), 5)[..., None]
    person = reshaped(np.concatenate([portrait, outline], axis=2), rng)
    person, outline = person[..., :3], person[..., 3:]
    if rng.random() < 0.5:
        person, outline = person[:, ::-1].copy(), outline[:, ::-1].copy()
    width, height = (int(side) for side in rng.choice([224, 240, 256, 288], 2))
    count = int(rng.integers(*DEMO_FRAMES))
    colours = rng.uniform(0.2, 0.8, 3) + rng.normal(0, 0.08, (5, 5, 3))
    backdrop = cv2.resize(colours.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    time = np.arange(count) / DEMO_FPS

    def wave(amplitude: float) -> np.ndarray:
        rates, phases = rng.uniform(0.2, 0.8, 2), rng.uniform(0, 2 * np.pi, 2)
        return amplitude * np.sin(2 * np.pi * rates[:, None] * time + phases[:, None]).mean(axis=0)

    zoom, angle = rng.uniform(0.42, 0.56) * np.exp(wave(0.06)), rng.normal(0, 4) + wave(8)
    x, y = width * rng.uniform(0.42, 0.58) + wave(14), height * rng.uniform(0.42, 0.52) + wave(8)
    light = rng.uniform(0.75, 1.1) * rng.normal(1, 0.04, 3) * (1 + wave(0.1))[:, None]
    blur, noise, quality = rng.uniform(0.3, 0.9), rng.uniform(0.005, 0.025), int(rng.integers(60, 96))

    own = np.random.default_rng([seed, number, 1 + ("real", *DEMO_METHODS).index(method)])
    pictures = [person] * count if method == "real" else manipulated(person, portrait, method, count, own)
    frames = []
    for t, picture in enumerate(pictures):
        pose = cv2.getRotationMatrix2D(FACE_CENTRE, angle[t], zoom[t])
        pose[:, 2] += (x[t] - FACE_CENTRE[0], y[t] - FACE_CENTRE[1])
        picture = cv2.warpAffine(
            np.concatenate([picture, outline], axis=2), pose, (width, height), flags=cv2.INTER_LINEAR
        )
        frame = backdrop + picture[..., 3:] * (picture[..., :3] - backdrop)
        frame = cv2.GaussianBlur(frame * light[t].astype(np.float32), (0, 0), blur)
        frame = frame + own.standard_normal(frame.shape, np.float32) * noise
        _, jpeg = cv2.imencode(".jpg", (frame.clip(0, 1) * 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality])
        frames.append(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    return frames


def write_video(file: Path, frames: list[np.ndarray], fps: float) -> None:
    """Write BGR frames as MPEG-4; raises OSError where OpenCV cannot."""
    with replacing(file) as partial_file:
        writer = cv2.VideoWriter(str(partial_file), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames[0].shape[1::-1])
        if not writer.isOpened():
            raise OSError(f"OpenCV {cv2.__version__} cannot write {partial_file}: no MPEG-4 encoder, or no room")
        for frame in frames:
            writer.write(frame)
        writer.release()


def make_demo_set(folder: Path, per_class: int, seed: int, workers: int) -> Path:
    """Make `per_class` real videos and a fake of each below `folder`; those already there are kept."""
    portrait = load_portrait()

    def make(number: int) -> None:
        method = DEMO_METHODS[number % len(DEMO_METHODS)]
        for kind, file in (("real", f"real/{number:04}.mp4"), (method, f"fake/{number:04}__{method}.mp4")):
            if not (folder / file).exists():
                write_video(folder / file, demo_frames(portrait, number, kind, seed), DEMO_FPS)

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(make, number) for number in range(per_class)]
        for job in tqdm(as_completed(jobs), total=per_class, desc="demo set", unit="pair", leave=False):
            job.result()
    return folder
