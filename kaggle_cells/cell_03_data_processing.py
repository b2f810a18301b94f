# %% [markdown]
# <a id="section-3"></a>
# ## 3. From videos or pictures to clips
#
# Each video is decoded once. What the network sees of it is cached as a small `uint8` file: 48 face
# crops of 160 x 160 pixels take 3.7 MB. From then on, an epoch decodes nothing. A picture is a clip
# of one frame, and a folder of numbered frames is a clip like a video. Pictures that are face crops
# already need neither face detector nor cache: they are read where they are.
#
# **Finding videos.** Each known layout is one function that takes a folder and returns a row per
# video, or nothing. A row gives the `label` and `method` and, as `sources`, what the video was made
# from: the face swap `004_982.mp4` shows recording 004 with the face of 982.

# %%
import csv
import functools
import hashlib
import io
import json
import math
import mmap
import os
import platform
import re
import shutil
import struct
import sys
import threading
import unicodedata
import warnings
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby, product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import matplotlib
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from cell_01_imports_and_setup import (
    IN_NOTEBOOK,
    WIDTH,
    ensure_packages,
    plural,
    progress_bar,
    replacing,
    show_figure,
    show_row,
    styled,
)
from cell_02_global_config import CONFIG, DAMAGE, Config

# %%
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + PICTURE_SUFFIXES
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # by folder
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
CLASSES = {"real": 0, "0": 0, "fake": 1, "1": 1}
VIDEO_COLUMNS = ("path", "label", "method", "split", "dataset", "original", "group")
CLIP_COLUMNS = ("clip_file", "face_share", "distinct_frames", "note")  # what the cache adds
# The labels that each split needs.
EVERY_CLASS: dict[str, tuple[int, ...]] = dict.fromkeys(("train", "val", "test"), (0, 1))


# %%
class Folder(NamedTuple):
    """A folder with its subfolders by name and the names of its files, without hidden entries."""

    path: Path
    folders: dict[str, Path]
    files: list[str]


def list_folder(path: Path) -> Folder:
    """Look into a folder; one that cannot be read is empty, with a warning."""

    def warn(error: OSError) -> None:
        warnings.warn(f"{error.filename} is not searched: {error.strerror}", stacklevel=6)

    _, *names = next(os.walk(path, onerror=warn), (path, [], []))
    folders, files = (sorted(name for name in part if name[0] != ".") for part in names)
    return Folder(path, {name: path / name for name in folders}, files)


# %%
def is_picture(path: str | Path) -> bool:
    return str(path).lower().endswith(PICTURE_SUFFIXES)


def media_below(folder: Path, stills: bool = False) -> list[Path]:
    """Videos, pictures and folders of frames below `folder`, sorted, without hidden ones.

    The pictures in a folder are one clip if they have one name with different numbers,
    frame_001.png, ..., and they are not `stills`. Linked folders are entered once. Includes folders
    that cannot be read, or are named like a video but hold none: `check_files` reports them.
    """
    found, entered = list[Path](), set()
    unreadable: list[OSError] = []
    for where, folders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if (real_path := os.path.realpath(where)) in entered:
            folders.clear()
            continue
        entered.add(real_path)
        names = [n for n in files if n.lower().endswith(MEDIA_SUFFIXES) and n[0] != "."]
        numbered = [re.sub(r"\d+$", "", Path(name).stem) for name in names if is_picture(name)]
        is_clip = not stills and len(numbered) > len({*numbered}) == 1
        is_named_like_video = not names and where.lower().endswith(MEDIA_SUFFIXES)
        found += [Path(where)] * (is_clip or is_named_like_video)
        found += [Path(where, name) for name in names if not (is_clip and is_picture(name))]
    return sorted([*found, *(Path(error.filename) for error in unreadable)])


def rows_below(
    folder: Path, method: str, label: int | None = None, stills: bool = False
) -> list[dict]:
    """A row for each video below `folder`, all of one method; `real` is the method of real ones."""
    row = dict(label=int(method != "real") if label is None else label, method=method, split="")
    return [dict(path=path, **row, sources=[]) for path in media_below(folder, stills)]


# %% [markdown]
# **Layouts**: a CSV manifest, FaceForensics++, Celeb-DF, DFDC, and plain `real/` and `fake/`
# folders. To add one, write a function like these and list it in `LAYOUTS`.


# %%
def read_manifest(file: Path) -> list[dict]:
    """The lines of a CSV file with columns path and label, as text; nothing of other tables."""
    form: dict[str, Any] = dict(sep=None, engine="python", dtype=str, encoding="utf-8-sig")
    form |= dict(index_col=False, keep_default_na=False, skip_blank_lines=False)
    try:
        header = pd.read_csv(file, nrows=0, encoding_errors="replace", **form)
    except (ValueError, csv.Error):
        return []
    columns = {name.strip().lower() for name in header}
    if not {"path", "label"} <= columns or {"clip_file", "reason", "logit"} & columns:
        return []  # another table, perhaps one that this notebook wrote
    try:
        table = pd.read_csv(file, **form).fillna("")
    except ValueError as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8: {error}") from error
    table = table.rename(columns=lambda name: name.strip().lower()).apply(lambda c: c.str.strip())
    names, labels = table.path.str.lower(), table.label.str.lower()
    lists_videos = names.str.endswith(VIDEO_SUFFIXES).any()
    lists_faces = names.str.endswith(PICTURE_SUFFIXES).any() and labels.isin(CLASSES).any()
    return table.to_dict("records") if lists_videos or lists_faces else []


def find_manifest(folder: Folder) -> list[dict]:
    """CSV files with the columns path and label, and optionally method, group and split.

    Paths are absolute or relative to the file. Without a split column the file's own name may be
    the split: `train.csv`. Raises ValueError with the line of a wrong label or split.
    """
    rows = []
    for file in (folder.path / name for name in folder.files if name.lower().endswith(".csv")):
        for line, entry in enumerate(read_manifest(file), start=2):
            if not any(entry.values()):
                continue
            label, split = CLASSES.get(entry["label"].lower()), entry.get("split", "").lower()
            if label is None or (split and split not in SPLITS):
                raise ValueError(
                    f"{file}, line {line}: label {entry['label']!r}, split {split!r}. A label is "
                    "0 or real, 1 or fake; a split is train, val, test or empty"
                )
            named = entry.get("method", "")
            method = "real" if label == 0 else "fake" if named.lower() in ("", "real") else named
            path = folder.path / entry["path"].replace("\\", "/")
            split = SPLITS.get(split or file.stem.lower(), "")
            sources = [entry["group"]] if entry.get("group") else []
            rows.append(dict(path=path, label=label, method=method, split=split, sources=sources))
    return rows


# %% [markdown]
# DeepFakeDetection is part of FaceForensics++, but Kaggle's copy lacks its originals, videos of
# actors. A class that differs in resolution would teach the resolution, so these videos are used
# only if `METHODS` names them. Until then the actors' real videos carry the method's name, too.

# %%
FF_METHODS = ("Deepfakes", "Face2Face", "FaceShifter", "FaceSwap", "NeuralTextures")
ONLY_IF_NAMED = "DeepFakeDetection"


def find_faceforensics(folder: Folder) -> list[dict]:
    """Kaggle's `FaceForensics++_C23`, `original/` beside the methods; or the official tree."""
    methods = [name for name in (*FF_METHODS, ONLY_IF_NAMED) if name in folder.folders]
    if "original" in folder.folders and methods:
        places = {folder.path / name: name for name in ("original", *methods)}
    else:  # KIND/METHOD/COMPRESSION/videos; masks lie in a folder beside the compressions
        kinds = map(folder.folders.get, ("original_sequences", "manipulated_sequences"))
        parts = [part for kind in kinds if kind for part in sorted(kind.iterdir())]
        found = [place for part in parts for place in sorted(part.glob("*/videos"))]
        places = {place: place.parts[-3] for place in found if place.parts[-2] != "masks"}
    reals = {"original": "real", "youtube": "real", "actors": ONLY_IF_NAMED}
    rows = [rows_below(p, reals.get(n, n), int(n not in reals)) for p, n in places.items()]
    return [row for part in rows for row in part]


def find_celeb_df(folder: Folder) -> list[dict]:
    """Celeb-DF v1 and v2. In their list of test videos 1 is real: the folders give the labels."""
    parts = {"Celeb-real": "real", "YouTube-real": "real", "Celeb-synthesis": "Celeb-DF"}
    if not {"Celeb-real", "Celeb-synthesis"} <= set(folder.folders):
        return []
    names = sorted(parts.keys() & folder.folders.keys())
    rows = [row for name in names for row in rows_below(folder.path / name, parts[name])]
    if "List_of_testing_videos.txt" not in folder.files:
        return rows
    file = folder.path / "List_of_testing_videos.txt"
    lines = file.read_text("utf-8-sig", "replace").replace("\\", "/").splitlines()
    in_test = {folder.path / re.split(r"[,\s]+", line.strip())[-1] for line in lines}
    if not in_test & {row["path"] for row in rows}:
        warnings.warn(f"{file} names none of the videos: its test set is not used", stacklevel=2)
        return rows
    return [dict(row, split="test" if row["path"] in in_test else "train") for row in rows]


# %% [markdown]
# DFDC describes its videos, or face crops of them, in a file beside them; in your own folders,
# names do.


# %%
def read_dfdc_list(folder: Folder) -> dict:
    """What `metadata.json` says of videos, or `metadata.csv` of pictures in a folder beside it."""
    if "metadata.json" in folder.files:
        return json.loads((folder.path / "metadata.json").read_text(encoding="utf-8-sig"))
    if "metadata.csv" not in folder.files:
        return {}
    table = pd.read_csv(folder.path / "metadata.csv", dtype=str, keep_default_na=False)
    if not {"videoname", "label", "original"} <= set(table) or len(folder.folders) != 1:
        return {}
    (faces,) = folder.folders
    names = [f"{faces}/{Path(name).stem}.jpg" for name in table.videoname]
    return dict(zip(names, table[["label", "original"]].to_dict("records"), strict=True))


def find_dfdc(folder: Folder) -> list[dict]:
    """A part of the DFDC; its list gives label, split and original of each video."""
    try:
        entries = read_dfdc_list(folder)
    except ValueError as error:
        warnings.warn(f"the metadata in {folder.path} is not used: {error}", stacklevel=2)
        return []
    rows = []
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.get("label") in ("REAL", "FAKE"):
            label, method = (0, "real") if entry["label"] == "REAL" else (1, "DFDC")
            split = SPLITS.get(str(entry.get("split")).lower(), "")
            original = Path(str(entry.get("original") or name)).stem if label else Path(name).stem
            row = dict(path=folder.path / name, label=label, method=method, split=split)
            rows.append(dict(row, sources=[original]))
    return rows


def find_real_fake(folder: Folder) -> list[dict]:
    """`real/` and `fake/`; a subfolder of `fake`, or what follows `__` in a name, is the method.

    Folders named like splits may lie above these (the search handles that) or below. If pictures
    lie in one of these folders itself, all pictures are stills, not frames of videos.
    """
    parts = [path for name, path in folder.folders.items() if name.lower() in ("real", "fake")]
    tops = [top for part in parts for top in (part, *map(part.joinpath, SPLITS)) if top.is_dir()]
    stills, rows = any(is_picture(name) for top in tops for name in os.listdir(top)), []
    for part in parts:
        for row in rows_below(part, part.name.lower(), stills=stills):
            *below, _ = row["path"].relative_to(part).parts
            split = SPLITS[below.pop(0).lower()] if below and below[0].lower() in SPLITS else ""
            named = [*row["path"].stem.split("__")[1:], *below, "fake"]
            rows.append(dict(row, method=named[0] if row["label"] else "real", split=split))
    return rows


# %% [markdown]
# **The search** goes through folders breadth first and asks each layout in turn. What was found
# then loses duplicates and methods that are not wanted, and gets its groups.

# %%
LAYOUTS: dict[str, Callable[[Folder], list[dict]]] = {
    "CSV manifest": find_manifest,
    "FaceForensics++": find_faceforensics,
    "Celeb-DF": find_celeb_df,
    "DFDC": find_dfdc,
    "real/fake folders": find_real_fake,
}
# In these a name means the same recording in every copy and part of the dataset.
SHARED_NAMES = ("FaceForensics++", "Celeb-DF", "DFDC")
SEARCH_DEPTH = 7  # folders


def recognise(folder: Folder) -> tuple[str, list[dict]]:
    """The first layout that a folder has, and its rows; empty if it has none."""
    for layout, find in LAYOUTS.items():
        try:
            if rows := find(folder):
                return layout, rows
        except OSError as error:
            warnings.warn(f"{error.filename} is not read: {error.strerror}", stacklevel=4)
    return "", []


def search_folders(root: Path) -> list[dict]:
    """The rows of every dataset at or below `root`, with their `dataset` and `split`."""
    rows, entered, queue = [], set(), deque([(root, "", 0)])
    while queue:
        path, split, depth = queue.popleft()
        if (real_path := os.path.realpath(path)) in entered:
            continue
        entered.add(real_path)
        layout, found = recognise(folder := list_folder(path))
        names = [part for part in path.relative_to(root).parts if part.lower() not in SPLITS]
        dataset = layout if layout in SHARED_NAMES else "/".join(names) or root.resolve().name
        rows += [dict(row, dataset=dataset, split=row["split"] or split) for row in found]
        holders = {row["path"].parent for row in found}
        used = {parent for holder in holders for parent in (holder, *holder.parents)}
        for name, sub in folder.folders.items() if depth < SEARCH_DEPTH else ():
            if sub not in used:
                queue.append((sub, SPLITS.get(name.lower(), split), depth + 1))
    return rows


# %%
def search_root(root: Path) -> list[dict]:
    """The rows of DATA_DIR: a folder or a manifest. Raises FileNotFoundError or ValueError."""
    if not root.exists():
        raise FileNotFoundError(f"DATA_DIR: {root} does not exist (seen from {Path.cwd()})")
    if root.is_file():
        if rows := find_manifest(Folder(root.parent, {}, [root.name])):
            return [dict(row, dataset=root.name) for row in rows]
        raise ValueError(
            f"DATA_DIR: {root} is not a CSV file with columns path and label and a video per line"
        )
    if rows := search_folders(root):
        return rows
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    raise FileNotFoundError(
        f"DATA_DIR: no known dataset in {root.resolve()}, which holds {len(names)} entries "
        f"({', '.join(names[:8]) or 'it is empty'}) and {len(media_below(root))} videos. "
        f"Known layouts: {', '.join(LAYOUTS)}; the README shows them."
    )


# %%
def resolve_duplicates(videos: pd.DataFrame) -> pd.DataFrame:
    """Keep one row per file, label and split; a row without a split yields to one that gives it."""
    real_folder = functools.cache(os.path.realpath)  # pictures lie in thousands in one folder

    def real_path(path: Path) -> str:
        is_link = path.is_symlink()
        return os.path.realpath(path) if is_link else f"{real_folder(path.parent)}/{path.name}"

    keys = [videos.path.map(real_path), videos.label]
    has_split = (videos.split != "").groupby(keys).transform("any")
    repeated = pd.concat([*keys, videos.split], axis=1).duplicated()
    return videos[~repeated & ((videos.split != "") | ~has_split)]


# %%
def require_known(parameter: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError if a parameter names something that is not among the `known`."""
    if unknown := {*names} - {*known}:
        wrong, available = ", ".join(sorted(unknown)), ", ".join(sorted({*known}))
        raise ValueError(f"{parameter}: {wrong} not among {available}")


def choose_methods(videos: pd.DataFrame, methods: Iterable[str], root: Path) -> pd.DataFrame:
    """Real videos and the fakes of the methods wanted; none named means all but ONLY_IF_NAMED."""
    known = set(videos.method) - {"real"}
    require_known(f"METHODS below {root}", methods, known)
    left_out = (videos.method == ONLY_IF_NAMED).sum()
    if left_out and not methods:
        warnings.warn(
            f"{left_out} {ONLY_IF_NAMED} videos are left out; METHODS can name them", stacklevel=3
        )
    wanted = {"real", *(methods or known - {ONLY_IF_NAMED})}
    videos = videos[videos.method.isin(wanted)]
    if videos.empty:
        raise ValueError(f"below {root} is only {ONLY_IF_NAMED}: name it in METHODS to use it")
    return videos.assign(method=videos.method.where(videos.label == 1, "real"))


def group_videos(videos: pd.DataFrame) -> pd.DataFrame:
    """Replace `sources` by `original`, the recording a video shows, and `group`."""
    named = pd.concat([sources_by_name(part) for _, part in videos.groupby("dataset")])
    sources = [
        [f"{row.dataset}/{name}" for name in row.sources or named[row.Index]]
        for row in videos.itertuples()
    ]
    original, group = [names[0] for names in sources], connected_groups(sources)
    return videos.drop(columns="sources").assign(original=original, group=group)


def find_videos(root: Path, methods: Iterable[str] = ()) -> pd.DataFrame:
    """Every labelled video of the `methods` wanted; none named means all but DeepFakeDetection.

    `root` is a CSV manifest, a dataset, or a folder with some up to SEARCH_DEPTH folders below it.
    Of the VIDEO_COLUMNS, `split` is "" if not given, `original` is the recording shown, and `group`
    is shared by all videos linked through sources. Raises FileNotFoundError if there is no known
    layout, with what there is, and ValueError for a wrong manifest or a method that is not there.
    """
    videos = resolve_duplicates(pd.DataFrame(search_root(root)))
    return group_videos(choose_methods(videos, methods, root)).reset_index(drop=True)


# %% [markdown]
# **Sources** that no list gives are read from file names. Videos that share a source, directly or
# through others, form a **group**, and a group never crosses a split: with a person's original in
# training and a fake of the same recording in the test set, the test would measure memory.

# %%
# A pattern for the whole name, the recording it shows, and which parts are other sources.
NAME_PATTERNS = (
    (r".*?(?<![a-z0-9])(\d{3})_(\d{3})(?![a-z0-9]).*", r"\1", (2,)),  # FaceForensics++: 004_982
    (r"(id\d+)(?:_(id\d+))?_(\d{4})", r"\1_\3", (1, 2)),  # Celeb-DF: id0_id1_0003
    (r"(\d\d)(?:_(\d\d))?__(.+?)(?:__[a-z0-9]{8})?", r"\1__\3", (1, 2)),  # DeepFakeDetection
)


def names_within(stem: str, names: Collection[str]) -> list[str]:
    """Which of the `names` are whole words of a file name, from the left, the longest first."""
    words, found, done = [word.span() for word in re.finditer(r"[^\W_]+", stem)], [], 0
    for (start, _), (_, end) in product(words, reversed(words)):
        if done <= start < end and stem[start:end] in names:
            found.append(stem[start:end])
            done = end
    return found


def named_sources(stem: str, reals: Collection[str]) -> list[str]:
    """The sources that a lower-case file name gives, first the recording that the video shows.

    For names of no known dataset these are the `reals` it contains and what stands before `__`, or
    before `_frame12` in the name of a still; without any, the name itself.
    """
    for pattern, recording, people in NAME_PATTERNS:
        if match := re.fullmatch(pattern, stem):
            return [match.expand(recording), *(match[i] for i in people if match[i])]
    stem = re.sub(r"[-_ ]?frames?[-_ ]?\d+$", "", stem) or stem
    head, mark, _ = stem.partition("__")
    sources = names_within(stem, reals) + [head] * bool(head and mark)
    return list(dict.fromkeys(sources)) or [stem]


# %%
def sources_by_name(videos: pd.DataFrame) -> pd.Series:
    """The sources that the names of one dataset's videos give, a list for each."""
    stems = videos.path.map(lambda path: unicodedata.normalize("NFC", path.stem).lower())
    reals = set(stems[videos.label == 0])
    sources = [*map(named_sources, stems, videos.label.map({0: set(), 1: reals}))]
    # real_004 is the recording 004 if a fake is called fake_004_982.
    paired = {name for names in sources if len(names) > 1 for name in names}
    numbers = stems.str.extract(r"[\W_](\d{3})$")[0]
    sources = [
        [number, *names] if number in paired and len(names) == 1 else names
        for number, names in zip(numbers, sources, strict=True)
    ]
    if all(names == [stem] for names, stem in zip(sources, stems, strict=True)):
        # If no name refers to another, video1 of train and video1 of test are two recordings.
        counted = stems.str.fullmatch(r"[^\W\d_]*[-_ ]?\d+") & (videos.split != "")
        sources = [[name] for name in (videos.split + "/" + stems).where(counted, stems)]
    return pd.Series(sources, index=videos.index)


def connected_groups(sources: list[list[str]]) -> list[str]:
    """The group of each video: all that its sources are linked to, named by the first of them."""
    linked, first = nx.utils.UnionFind(), dict[str, str]()
    for names in sources:
        linked.union(*names)
    return [first.setdefault(linked[names[0]], names[0]) for names in sources]


# %% [markdown]
# **Checking files** before anything is decoded finds what cannot be a video, and copies. The same
# content labelled both real and fake is contradictory: neither copy is used.


# %%
def file_problem(path: Path) -> str:
    """Why a file cannot be a video, as far as its directory entry tells; empty if it may be one."""
    try:
        str(path).encode()  # OpenCV crashes on names that are not UTF-8
        if not os.access(path, os.R_OK):
            return "cannot be read: no permission" if path.exists() else "does not exist"
        if path.is_dir():
            return "" if frame_files(path) else "is a folder"
        return "" if path.stat().st_size else "is empty"
    except UnicodeEncodeError:
        return "its name is not valid UTF-8: rename it"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def frame_files(path: Path) -> list[Path]:
    """The pictures in a folder of frames, in order of their numbers; a file is its own list."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.iterdir() if is_picture(file) and file.name[0] != "."]
    return sorted(files, key=lambda file: (len(file.name), file.name))


def content_size(path: Path) -> int:
    return sum(map(os.path.getsize, frame_files(path)))


def file_identity(path: Path) -> list[Any]:
    """Path, size and time of change (ns) of a video: the same video has the same ones."""
    stats = [file.stat() for file in frame_files(path)]
    changed = max((stat.st_mtime_ns for stat in stats), default=0)
    return [str(path.resolve()), sum(stat.st_size for stat in stats), changed]


def content_digest(path: Path) -> str:
    """A hash of a video's content, or its path if it can't be read: decoding will say why."""
    content = hashlib.blake2b(digest_size=16)
    try:
        for file in frame_files(path):
            with file.open("rb") as stream:
                while chunk := stream.read(2**20):
                    content.update(chunk)
    except OSError:
        return str(path)
    return content.hexdigest()


def contradictions(videos: pd.DataFrame, digests: pd.Series) -> dict[int, str]:
    """By row, the reason why a video whose content is labelled both real and fake is not used."""
    reasons = {}
    labels = videos.groupby(digests).label.transform("nunique")
    for _, copies in videos[labels > 1].groupby(digests):
        for row in copies.itertuples():
            other = copies[copies.label != row.label].iloc[0]
            place, kind = "/".join(other.path.parts[-3:]), CLASS_NAMES[other.label]
            reasons[row.Index] = f"contradictory: same content as {place}, which is labelled {kind}"
    return reasons


# %%
def check_files(videos: pd.DataFrame, workers: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Separate files that can be videos from those that cannot, before anything is decoded.

    Copies, files of the same content, are put in one group. Returns the good rows, and the others
    with a `reason`.
    """
    with ThreadPool(workers) as pool:
        problems = pool.map(file_problem, videos.path)
        reasons = pd.Series(problems, index=videos.index, dtype=object)
        readable = videos[reasons == ""]
        sizes = pd.Series(pool.map(content_size, readable.path), index=readable.index)
        suspects = readable[sizes.duplicated(keep=False)]
        digests = pd.Series(pool.map(content_digest, suspects.path), index=suspects.index)
    reasons.update(pd.Series(contradictions(suspects, digests), dtype=object))
    contents = digests.reindex(videos.index).fillna(videos.group)
    sources = [[*pair] for pair in zip(videos.group, contents, strict=True)]
    videos, good = videos.assign(group=connected_groups(sources)), reasons == ""
    refused = videos.assign(reason=reasons)[~good]
    printable = [str(path).encode(errors="backslashreplace").decode() for path in refused.path]
    refused["path"] = list(map(Path, printable))
    return videos[good].reset_index(drop=True), refused.reset_index(drop=True)


# %% [markdown]
# **Splitting** comes before sampling, so that a larger sample never moves a video from the test set
# into training. Every split gets its share of each class and manipulation.

# %%
CLASS_NAMES = ("real", "fake")


def split_shares(videos: pd.DataFrame, val: float, test: float) -> dict[str, dict[str, float]]:
    """By dataset, the share of each split in the videos that can be assigned freely.

    A val or test split that the dataset gives gets nothing more.
    """
    # Never 0, because train takes what others, which a dataset gives itself, do not.
    wanted = {"train": max(1 - val - test, 1e-9), "val": val, "test": test}
    return {
        dataset: {s: share * (s == "train" or s not in given) for s, share in wanted.items()}
        for dataset, given in videos.groupby("dataset").split.agg(set).items()
    }


def known_splits(
    videos: pd.DataFrame, held: pd.Series, shares: dict[str, dict[str, float]]
) -> pd.Series:
    """The split of each video for which none is to be drawn, else "".

    What a dataset gives is kept, except training videos of which some are to become validation or
    test videos. Groups of `held` fakes alone are test videos. A copy follows the split that another
    dataset gives it.
    """
    complete = videos.dataset.map(lambda name: not (shares[name]["val"] or shares[name]["test"]))
    fixed = videos.split.isin(["val", "test"]) | ((videos.split == "train") & complete)
    split = videos.split.where(fixed, "")
    split[held.groupby(videos.group).transform("all") & ~fixed] = "test"
    for own_split, allowed in (("", ("test", "train", "val")), ("train", ("train", "val"))):
        of_group = videos[fixed & videos.split.isin(allowed)].groupby("group").split.min().to_dict()
        follows = (split == "") & (videos.split == own_split)
        split[follows] = [of_group.get(group, "") for group in videos.group[follows]]
    return split


def split_videos(
    videos: pd.DataFrame,
    val: float,
    test: float,
    seed: int,
    holdout: Iterable[str] = (),
    needed: dict[str, tuple[int, ...]] = EVERY_CLASS,
) -> pd.DataFrame:
    """Fill in `split` so that no group crosses a split; each gets its share of class and method.

    Splits that a dataset gives are kept; a missing one is taken from its training videos. Fakes of
    `holdout` methods are in the test set only: those whose group is elsewhere are dropped. Raises
    ValueError, with the counts, if a split lacks a class that is `needed`.
    """
    require_known("HOLDOUT_METHODS", holdout, videos.method[videos.label == 1])
    held, shares = videos.method.isin(list(holdout)), split_shares(videos, val, test)
    split = known_splits(videos, held, shares)
    pool = videos[split == ""]
    split[pool.index] = pool.group.map(assign_groups(pool, shares, seed))
    videos = videos.assign(split=split)
    videos = videos[~held | (videos.split == "test")].reset_index(drop=True)
    require_classes(videos, needed)
    return videos


# %% [markdown]
# Groups are assigned one by one, large ones first, each to the split where it helps most. With 40
# to 80 groups this comes much nearer to every share than scikit-learn's StratifiedGroupKFold.


# %%
def assign_groups(
    videos: pd.DataFrame, shares: dict[str, dict[str, float]], seed: int
) -> dict[str, str]:
    """A split for each group, so that each dataset's classes and methods come near its `shares`.

    The distance to them is chi-square: the sum of (count - goal)^2 / goal.
    """
    kinds = pd.concat([videos.assign(kind=kind) for kind in (videos.label.map(str), videos.method)])
    table = pd.crosstab(kinds.group, [kinds.dataset, kinds.kind])
    counts, splits = table.to_numpy(float), ["train", "val", "test"]
    share = np.array([[shares[dataset][split] for dataset, _ in table] for split in splits])
    goal = np.maximum(share / share.sum(axis=0) * counts.sum(axis=0), 1e-9)
    assigned, split_of = np.zeros_like(goal), {}
    order = np.random.default_rng(seed).permutation(len(counts))
    for row in order[np.argsort(-counts.sum(axis=1)[order], kind="stable")]:
        change = counts[row] * (2 * (assigned - goal) + counts[row]) / goal
        best = change.sum(axis=1).argmin()
        assigned[best] += counts[row]
        split_of[table.index[row]] = splits[best]
    return split_of


def crossing_groups(videos: pd.DataFrame) -> list[str]:
    """Groups found in more than one split, which only a split given by the dataset can cause."""
    splits = videos.groupby("group").split.nunique()
    return list(splits.index[splits > 1])


# %%
def require_classes(videos: pd.DataFrame, needed: dict[str, tuple[int, ...]] = EVERY_CLASS) -> None:
    """Raise ValueError, with the counts, if a split is empty or lacks a class that is `needed`."""
    wanted = {label for labels in needed.values() for label in labels}
    if missing := wanted - {*videos.label}:
        kind = CLASS_NAMES[min(missing)]
        raise ValueError(f"no {kind} videos among the {len(videos)} that can be used")
    table = pd.crosstab(videos.split, videos.label)
    table = table.reindex(index=["train", "val", "test"], columns=[0, 1], fill_value=0)
    if all(table.loc[s].any() and table.loc[s, list(needed[s])].all() for s in needed):
        return
    linked, hint = videos.group.value_counts().max(), ""
    if linked > 0.6 * len(videos):
        hint = (
            f"{linked} of the videos are linked into one group through the people in fakes, and no "
            "group may cross a split. Leave out a method with METHODS, or give a CSV manifest with "
            "a split column that accepts this. "
        )
    raise ValueError(
        f"a split lacks a class: {len(videos)} usable videos in {videos.group.nunique()} groups"
        f" became\n{table.rename(columns={0: 'real', 1: 'fake'})}\n{hint}Add recordings, increase "
        "MAX_VIDEOS_PER_CLASS, or change VAL_FRACTION, TEST_FRACTION or HOLDOUT_METHODS. With "
        "SELF_BLEND = 1 only the test set needs fakes. data/skipped.csv lists unusable videos."
    )


# %% [markdown]
# **Sampling** takes real and fake videos from the datasets in equal parts, or the dataset would
# tell the class, and fakes evenly from the methods. Originals are ordered once by a hash of the
# seed; fakes of originals that are in the sample come first, each original starting with another
# method.


# %%
def even_quotas(total: int, available: pd.Series) -> pd.Series:
    """Divide `total` evenly, nowhere beyond what is `available`; the rest is divided on."""
    quotas: dict[Any, int] = {}
    for place, (size, name) in enumerate(sorted((int(n), name) for name, n in available.items())):
        quotas[name] = min(size, (total - sum(quotas.values())) // (len(available) - place))
    return pd.Series(quotas, dtype=int)


def in_sampling_order(videos: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The videos in sampling order, whatever the order of the rows."""
    key = videos.original.map(lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest())
    videos = videos.assign(key=key, name=videos.path.map(str)).sort_values(["key", "name"])
    rank = videos.groupby("split").key.transform(lambda keys: pd.factorize(keys)[0])
    methods = sorted(set(videos.method[videos.label == 1]))
    number = videos.method.map({name: n for n, name in enumerate(methods)}).fillna(0)
    turn = ((number - rank) % max(len(methods), 1)).where(videos.label == 1, 0)
    turn += len(methods) * videos.groupby(["original", "method"]).cumcount()
    return videos.assign(rank=rank, turn=turn).sort_values(["turn", "rank"], kind="stable")


def take_shares(videos: pd.DataFrame, quotas: pd.Series) -> pd.DataFrame:
    """The first videos up to the `quotas` of datasets, evenly by method, each split its share."""
    sizes = videos.groupby(["dataset", "method"]).size()
    wanted = [even_quotas(quotas[name], part) for name, part in sizes.groupby("dataset")]
    share, kind = pd.concat(wanted).reindex(sizes.index) / sizes, ["split", "dataset", "method"]
    cells = videos.groupby(kind).size().reindex(["test", "val", "train"], level="split")
    # Rounded along the cells, small splits first, so that errors neither add up nor empty a split.
    goals = cells * share.reindex(cells.index.droplevel("split")).to_numpy()
    ends = np.ceil(goals.cumsum().round(6))
    count = videos.join(ends.diff().fillna(ends).rename("count"), on=kind)["count"]
    return videos[videos.groupby(kind).cumcount() < count]


def sample_per_class(videos: pd.DataFrame, per_class: int, seed: int) -> pd.DataFrame:
    """At most `per_class` real and fake videos (0 = all), each split keeping its share."""
    if not per_class or videos.empty:
        return videos
    ordered = in_sampling_order(videos, seed)
    sizes = pd.crosstab(videos.dataset, videos.label).reindex(columns=[0, 1], fill_value=0)
    equal = even_quotas(per_class, sizes.min(axis=1))
    kept = ordered[:0]
    for label, part in ordered.groupby("label"):
        quotas = equal + even_quotas(per_class - equal.sum(), sizes[label] - equal)
        is_taken = part.original.isin(kept.original)
        part = pd.concat([part[is_taken], part[~is_taken]])
        kept = pd.concat([kept, take_shares(part, quotas)])
    return videos[videos.index.isin(kept.index)].reset_index(drop=True)


# %% [markdown]
# **Frames** are taken at even spacing from a fixed stretch in the middle of the video. Fakes are
# often shorter than originals: spread over the whole video, their frames would lie closer together,
# and the network would learn to tell durations.

# %%
CLIP_VERSION = 5  # part of each cached clip's name: increased when clips are made differently
LONG_LEAD = 1500  # frames before the first one wanted, beyond which one seek saves time
LONGEST_SIDE = 1920  # pixels; larger frames are reduced: faces stay large enough, memory small
Decoded = tuple[dict[int, np.ndarray], int, float]  # by number; the count read; last time in s
Frames = tuple[list[np.ndarray], np.ndarray, str]  # frames, their numbers, a note


class VideoError(Exception):
    """A video cannot be used; the message is the reason that goes to skipped.csv."""


def frame_positions(total: int, count: int, fps: float, seconds: float) -> np.ndarray:
    """`count` even positions within the middle `seconds` of `total` frames.

    At few frames per second the stretch is longer, to hold `count` frames; a shorter video repeats
    some.
    """
    span = min(total, max(count, round(fps * seconds))) if fps > 0 else total
    return (total - span) // 2 + ((np.arange(count) + 0.5) * span / count).astype(int)


def open_video(path: Path) -> cv2.VideoCapture:
    """A capture with one decoding thread: other videos use the other cores. Raises VideoError."""
    if problem := file_problem(path):
        raise VideoError(problem)
    capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise VideoError("no frames can be decoded: not a video, sound alone, cut off or damaged")
    return capture


def retrieve(capture: cv2.VideoCapture, at: int) -> np.ndarray:
    """The frame that was grabbed, number `at`, in RGB, its longer side at most LONGEST_SIDE."""
    readable, frame = capture.retrieve()
    if not readable:
        raise VideoError(f"frame {at} cannot be decoded")
    scale = LONGEST_SIDE / max(frame.shape[:2])
    if scale < 1:
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


# %% [markdown]
# There are two ways to reach the frames. A **pass from the start** is exact in every container, and
# cheaper than a seek per frame, which would decode most of the video many times: it grabs every
# frame and converts those wanted. In long videos **one seek** to the first frame wanted saves
# decoding what comes before, if the container's time stamps prove that it arrived at the right
# frame.


# %%
def decode_forward(capture: cv2.VideoCapture, wanted: np.ndarray, at: int = 0) -> Decoded:
    """Decode from the capture's position, frame `at`, up to the last frame wanted.

    Returns the frames (H, W, 3) uint8 RGB by number, the number after the last one, its time in s.
    """
    frames, time, needed = {}, 0.0, set(wanted.tolist())
    while at <= wanted[-1] and capture.grab():
        time = max(time, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        if at in needed:
            frames[at] = retrieve(capture, at)
        at += 1
    return frames, at, time


def decode_after_seek(path: Path, wanted: np.ndarray, fps: float) -> Decoded | None:
    """Seek to the first frame wanted, then decode; None if the seek ended at another frame."""
    capture, before = open_video(path), int(wanted[0]) - 1
    capture.set(cv2.CAP_PROP_POS_FRAMES, before)
    if not capture.grab() or abs(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 * fps - before) > 0.5:
        return None
    return decode_forward(capture, wanted, before + 1)


# %%
def seconds_to_play(path: Path) -> float:
    """What an MP4 or MOV file says it plays, after any edit list; infinite for other files.

    From the movie header (ISO/IEC 14496-12): times of creation and change, time scale, duration.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = data.find(b"mvhd")
        header = data[place + 4 : place + 36]
    if place < 0 or len(header) < 32:
        return math.inf
    layout = ">4x16xIQ" if header[0] == 1 else ">4x8xII"
    scale, length = struct.unpack_from(layout, header)
    return length / scale if scale else math.inf


# %%
def check_length(path: Path, end: int, time: float, total: int, fps: float) -> str:
    """A note if decoding ends after `end` of `total` frames because an edit list hides the rest.

    `time` of the last frame in s: a variable frame rate is no damage. Raises VideoError if
    something is missing.
    """
    shown = max(end, time * fps + 1)
    if shown >= 0.95 * total:
        return ""
    if shown >= 0.95 * fps * seconds_to_play(path):
        return f"an edit list shows {end} of {total} frames"
    missing = f"truncated or damaged, {(total - end) / (fps or 25):.0f} s are missing"
    raise VideoError(f"decoding ends after {end} of {total} frames: {missing}")


def read_frames(path: Path, count: int, seconds: float) -> Frames:
    """`count` RGB frames (H, W, 3) uint8 of a video, their numbers, and a note if some are hidden.

    Short videos repeat frames. Raises VideoError if it is not a video, or ends before it should.
    """
    capture, note = open_video(path), ""
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    positions = frame_positions(total if total > 1 else 2**31, count, fps, seconds)
    is_long = total > 1 and positions[0] > LONG_LEAD
    decoded = decode_after_seek(path, positions, fps) if is_long else None
    frames, end, time = decoded or decode_forward(capture, positions)
    if end <= positions[-1]:  # damaged, trimmed, or the container guessed its number of frames
        note = check_length(path, end, time, total, fps)
        if end < 2:
            raise VideoError(f"holds {plural(end, 'frame')}")
        positions = frame_positions(end, count, end / time if time else fps, seconds)
        frames, *_ = decode_forward(open_video(path), positions)
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError("changes its frame size midway")
    return [frames[position] for position in positions.tolist()], positions, note


# %% [markdown]
# **Pictures.** OpenCV decodes a truncated JPEG without an error, so whatever does not end as a JPEG
# should is left to Pillow, which takes twice as long and says what is wrong.


# %%
def read_picture(path: Path) -> np.ndarray:
    """A picture as RGB (H, W, 3) uint8, upright. Raises VideoError if it cannot be decoded."""
    try:
        content, picture = path.read_bytes(), None
        if content.startswith(b"\xff\xd8") and b"\xff\xd9" in content[-64:]:
            picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        if picture is not None:
            return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        with Image.open(io.BytesIO(content)) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError) as error:
        problem = file_problem(path) or f"not a picture, truncated or damaged: {error}"
        raise VideoError(problem) from error


def read_pictures(path: Path, count: int) -> Frames:
    """A picture, or `count` pictures of a folder of frames, as `read_frames` returns them."""
    files = frame_files(path)
    if not files:
        raise VideoError("is a folder without pictures")
    positions = frame_positions(len(files), count if len(files) > 1 else 1, 0, 0)
    wanted = {position: read_picture(files[position]) for position in set(positions.tolist())}
    if len({frame.shape for frame in wanted.values()}) > 1:
        raise VideoError("its pictures differ in size")
    return [wanted[position] for position in positions.tolist()], positions, ""


# %% [markdown]
# **The face** is detected in a few frames with MTCNN and followed through the clip. In between its
# box is interpolated, and it keeps one size: a crop whose size followed each detection would hide,
# or imitate, the unsteadiness that gives some manipulations away.

# %%
DETECTION_FRAMES = 8  # frames of a clip that the face detector looks at
DETECTION_SIDE = 640  # longer side of the frames it sees
GPU_ERROR = re.compile("CUDA|CUDNN|cuDNN|CUBLAS")  # in messages: no fault of the video
FACE_SIZES = (80, 32)  # smallest face in their pixels; small ones only if there is no larger one
Mtcnn = torch.nn.ModuleList | None  # the face detector's stages; None: no faces are looked for


class Face(NamedTuple):
    """A face found in one of the frames looked at: box (4,) and landmarks (5, 2) in pixels."""

    time: int
    box: np.ndarray
    landmarks: np.ndarray

    @property
    def size(self) -> float:
        return float((self.box[2:] - self.box[:2]).max())


def load_face_detector(device: str | torch.device) -> torch.nn.ModuleList:
    """MTCNN (Zhang et al., 2016) for large and small faces, with facenet-pytorch's weights."""
    ensure_packages("facenet_pytorch")
    from facenet_pytorch import MTCNN

    with warnings.catch_warnings():  # torch 2.5 warns of how facenet-pytorch reads its own weights
        warnings.filterwarnings("ignore", "You are using `torch.load`", FutureWarning)
        stages = [MTCNN(keep_all=True, min_face_size=size, device=device) for size in FACE_SIZES]
    mtcnn = torch.nn.ModuleList(stages).eval()
    return mtcnn.to(memory_format=torch.channels_last)  # a third faster on CPUs


def detect_faces(frames: list[np.ndarray], mtcnn: Iterable[Any]) -> list[list[Face]]:
    """The faces in each of some RGB frames of one size.

    Raises VideoError if the face detector fails, and what the GPU raises if that fails.
    """
    scale = min(1.0, DETECTION_SIDE / max(frames[0].shape[:2]))
    shrink = dict(fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    small = [cv2.resize(frame, None, **shrink) for frame in frames]
    found: list[list[Face]] = [[] for _ in frames]
    for stage in mtcnn:
        faceless = [time for time, faces in enumerate(found) if not faces]
        if not faceless or min(small[0].shape[:2]) < stage.min_face_size:
            continue
        try:
            images = torch.from_numpy(np.stack([small[time] for time in faceless]))
            # colour planes one after the other: MTCNN cuts and shrinks these faster
            images = images.movedim(-1, 1).contiguous().movedim(1, -1)
            boxes, _, landmarks = stage.detect(images, landmarks=True)
        except (IndexError, RuntimeError, ValueError) as error:  # it fails on boxes without area
            if GPU_ERROR.search(str(error)):
                raise
            raise VideoError(f"the face detector failed: {error}") from error
        for time, box, points in zip(faceless, boxes, landmarks, strict=True):
            if box is not None:
                pairs = zip(box.astype(float) / scale, points.astype(float) / scale, strict=True)
                found[time] = [Face(time, *pair) for pair in pairs]
    return found


# %% [markdown]
# **Tracks.** From frame to frame, faces go to the tracks that they overlap most, if they are at
# least half and at most twice as large. The face of a clip is the track with the largest mean size
# times the cube of the share of frames it is seen in: one that stays beats a larger one that
# passes.


# %%
def overlaps(face: Face, others: list[Face]) -> np.ndarray:
    """How much others (N,) overlap a face (IoU); 0 for less than half or more than twice its size.

    A track goes on where this is above 0.
    """
    boxes = torch.from_numpy(np.stack([face.box, *(other.box for other in others)]))
    is_similar = [face.size / 2 < other.size < 2 * face.size for other in others]
    return box_iou(boxes[:1], boxes[1:])[0].numpy() * is_similar


class FaceTracker:
    """Gives each face the number of its track: that of the earlier face it overlaps most."""

    def __init__(self, patience: float) -> None:
        self.tracks: dict[int, tuple[Face, int]] = {}  # the last face, how often missed since then
        self.patience, self.scene, self.count = patience, 0, 0

    def follow(self, faces: list[Face], scene: int = 0) -> dict[int, Face]:
        """The faces of the next frame, by track, which may miss `patience` frames of its scene."""
        tracks = self.tracks if scene == self.scene else {}
        last = {n: face for n, (face, missed) in tracks.items() if missed <= self.patience}
        found: dict[int, Face] = {}
        if last and faces:
            shared = np.stack([overlaps(face, faces) for face in last.values()])
            pairs = zip(*linear_sum_assignment(shared, maximize=True), strict=True)
            found = {[*last][row]: faces[i] for row, i in pairs if shared[row, i] > 0}
        new = [face for face in faces if all(face is not other for other in found.values())]
        found |= dict(enumerate(new, self.count + 1))
        missed = {n: (face, self.tracks[n][1] + 1) for n, face in last.items()}
        self.tracks = missed | {n: (face, 0) for n, face in found.items()}
        self.scene, self.count = scene, self.count + len(new)
        return found


def follow_face(found: list[list[Face]]) -> list[Face]:
    """The track of the clip's main face; empty if there is no face."""
    tracker, tracks = FaceTracker(math.inf), defaultdict[int, list[Face]](list)
    for faces in found:
        for number, face in tracker.follow(faces).items():
            tracks[number].append(face)

    def prominence(track: list[Face]) -> float:
        return float(np.mean([face.size for face in track])) * (len(track) / len(found)) ** 3

    return max(tracks.values(), key=prominence, default=[])


# %%
def evenly(count: int, most: int) -> np.ndarray:
    """At most so many numbers below `count`, evenly spaced, with the first and the last one."""
    if most == 1:
        return np.array([(count - 1) // 2])
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def between(
    frames: np.ndarray, times: np.ndarray | list[int], faces: list[Face]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (T, 4) and landmarks (T, 5, 2) in `frames` (T,) of a face seen at some `times`."""
    values = np.stack([np.hstack([face.box, face.landmarks.ravel()]) for face in faces])
    values = np.stack([np.interp(frames, times, column) for column in values.T], axis=1)
    return values[:, :4], values[:, 4:].reshape(-1, 5, 2)


def find_face(frames: list[np.ndarray], mtcnn: Mtcnn) -> tuple[np.ndarray, np.ndarray, float]:
    """The face of a clip: boxes (T, 4), landmarks (T, 5, 2) in pixels, share of frames showing it.

    Without a face, or without a face detector, boxes and landmarks are NaN and the share is 0.
    """
    seen = evenly(len(frames), DETECTION_FRAMES)
    track = follow_face(detect_faces([frames[i] for i in seen], mtcnn)) if mtcnn else []
    if not track:
        return np.full((len(frames), 4), np.nan), np.full((len(frames), 5, 2), np.nan), 0.0
    times = seen[[face.time for face in track]]
    return *between(np.arange(len(frames)), times, track), len(track) / len(seen)


# %%
def crop_squares(boxes: np.ndarray, height: int, width: int, margin: float) -> np.ndarray:
    """Squares (T, 3) of left, top, side around the boxes (T, 4), of one size, inside the frame.

    NaN boxes give the largest square in the middle of the frame.
    """
    if np.isnan(boxes).any():
        side = min(height, width)
        return np.tile([(width - side) // 2, (height - side) // 2, side], (len(boxes), 1))
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    side = min(int(np.median(sides) * (1 + 2 * margin)), height, width)
    corner = (boxes[:, :2] + boxes[:, 2:]) / 2 - side / 2
    corner = np.clip(corner.round(), 0, [width - side, height - side])
    return np.column_stack([corner, np.full(len(boxes), side)]).astype(int)


def crop_frames(frames: list[np.ndarray], squares: np.ndarray, size: int) -> np.ndarray:
    """The squares (T, 3) of T frames, resized to (T, size, size, 3)."""
    filtering = cv2.INTER_AREA if squares[0, 2] > size else cv2.INTER_LINEAR
    crops = [
        cv2.resize(frame[y : y + side, x : x + side], (size, size), interpolation=filtering)
        for frame, (x, y, side) in zip(frames, squares, strict=True)
    ]
    return np.stack(crops)


# %% [markdown]
# Together they make a **clip**. It is cached in one file, whose name is a fingerprint of the video
# and of every setting that shapes the clip. It is written under another name and then renamed, so
# that a half-written one is never read.


# %%
@dataclass(frozen=True)
class ClipSettings:
    """What shapes a clip; see the parameters. `frames` are those of all clips of a video."""

    frames: int
    seconds: float
    size: int
    face_crop: bool
    margin: float

    @property
    def moments(self) -> int:
        """Frames compared in a window of a whole video: an odd number for each that is used."""
        return self.frames * (math.ceil(15 / self.frames) | 1)

    @classmethod
    def of(cls, config: Config | SimpleNamespace) -> "ClipSettings":
        frames, seconds = config.FRAMES_PER_VIDEO * config.CLIPS_PER_VIDEO, config.CLIP_SECONDS
        return cls(frames, seconds, config.IMAGE_SIZE, config.FACE_CROP, config.FACE_MARGIN)


@dataclass
class Clip:
    """A video as the network sees it.

    `frames` (T, S, S, 3) uint8 RGB; `squares` (T, 3), left, top, side of the crops in the video's
    pixels; `landmarks` (T, 5, 2), eyes, nose, corners of the mouth in the crops' pixels, NaN where
    no face is; `face_share` of the frames looked at; `positions` (T,), frame numbers; `note`, what
    is unusual about the video. T is 1 for a single picture.
    """

    frames: np.ndarray
    squares: np.ndarray
    landmarks: np.ndarray
    face_share: float
    positions: np.ndarray
    note: str = ""


def make_clip(path: Path, settings: ClipSettings, mtcnn: Mtcnn) -> Clip:
    """Decode, crop and resize one video. Raises VideoError with the reason if it cannot be used."""
    if path.is_dir() or is_picture(path):
        frames, positions, note = read_pictures(path, settings.frames)
    else:
        frames, positions, note = read_frames(path, settings.frames, settings.seconds)
    height, width = frames[0].shape[:2]
    boxes, landmarks, share = find_face(frames, mtcnn if settings.face_crop else None)
    squares = crop_squares(boxes, height, width, settings.margin)
    crops = crop_frames(frames, squares, settings.size)
    landmarks = (landmarks - squares[:, None, :2]) * (settings.size / squares[0, 2])
    landmarks = landmarks.round(2).astype(np.float32)
    return Clip(crops, squares, landmarks, share, positions, note)


# %% [markdown]
# **Whole videos.** Training uses one clip of each video, scoring the whole video, in windows as
# long as a clip. One pass decodes a few frames ahead and holds one window. As in a clip, faces are
# detected in some of the frames and cropped from those that are used, but here every face is
# followed, until it is gone or a cut changes the scene.

# %%
READ_AHEAD = 8  # frames decoded while others are looked at
# Half a second apart, frames of 120 real-footage and 14 demo videos are at least 1.2 alike (of
# 1,912 pairs, 2 were not, in one video); of two videos, 98 in 100 are less than 0.9.
LEAST_ALIKE = 0.9


@dataclass
class Moment:
    """A frame (H, W, 3) of a video, its number among those wanted, and its faces by track.

    `done` is the share of the video up to it. `faces` is None where no faces are looked for.
    """

    number: int
    seconds: float
    frame: np.ndarray
    scene: int
    is_looked_at: bool
    done: float = 1.0
    faces: dict[int, Face] | None = None


# %%
def spacing_of(capture: cv2.VideoCapture, settings: ClipSettings) -> tuple[int, float, float]:
    """Frames in a video, as far as its header says; frames a second; frames between moments."""
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    fps = fps if fps > 0 else 25.0
    span = max(settings.frames, round(fps * settings.seconds))
    return total, fps, (min(total, span) if total > 1 else span) / settings.moments


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """A frame in 32 x 32 pixels, the means of 16 pixels each (those of all would take 2 ms)."""
    some = cv2.resize(frame, (128, 128), interpolation=cv2.INTER_NEAREST)
    return cv2.resize(some, (32, 32), interpolation=cv2.INTER_AREA)


def is_cut(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two thumbnails (32, 32, 3) uint8 RGB show different scenes.

    They are alike by the sum of two correlations: of pixels, and of histograms of colours. A blank
    picture has no correlation (NaN) and always starts a new scene.
    """
    bins: Any = [0, 1, 2], None, [8, 4, 4], [0, 180, 0, 256, 0, 256]
    hsv = [cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV) for thumbnail in (before, after)]
    first, second = (cv2.calcHist([thumbnail], *bins).ravel() for thumbnail in hsv)
    alike = cv2.compareHist(first, second, cv2.HISTCMP_CORREL)
    alike += float(cv2.matchTemplate(before, after, cv2.TM_CCOEFF_NORMED)[0, 0])
    return not alike >= LEAST_ALIKE


# %%
def read_moments(path: Path, settings: ClipSettings, wanted: Collection[int]) -> Iterator[Moment]:
    """The wanted moments of a video, in one pass. Raises VideoError where it ends too early."""
    capture, each = open_video(path), settings.moments // settings.frames
    offsets = {*(evenly(settings.frames, DETECTION_FRAMES) * each + each // 2).tolist()}
    total, fps, step = spacing_of(capture, settings)
    at, number, scene, time, shape = 0, 0, 0, 0.0, None
    before = np.zeros((32, 32, 3), np.uint8)
    while capture.grab():
        time = max(time, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        while int((number + 0.5) * step) == at:
            if number in wanted:
                frame = retrieve(capture, at)
                after = thumbnail(frame)
                is_new = frame.shape != shape or is_cut(before, after)
                scene, before, shape = scene + is_new, after, frame.shape
                is_looked_at = is_new or number % settings.moments in offsets
                done = min(1.0, at / max(1, total))
                yield Moment(number, time or at / fps, frame, scene, is_looked_at, done)
            number += 1
        at += 1
    if at < 2:
        raise VideoError(f"holds {plural(at, 'frame')}")
    check_length(path, at, time, total, fps)


# %%
def picture_moments(path: Path, settings: ClipSettings) -> Iterator[Moment]:
    """The moments of a picture, or of a folder of frames, as if there were 25 a second."""
    frames, positions, _ = read_pictures(path, settings.frames)
    offsets = {*evenly(len(frames), DETECTION_FRAMES).tolist()}
    for number, frame in enumerate(frames):
        yield Moment(number, positions[number] / 25, frame, 1, number in offsets)


def read_ahead(moments: Iterator[Moment]) -> Iterator[Moment]:
    """The same, decoded in a thread while the caller works."""
    pool = ThreadPoolExecutor(1)
    try:
        ahead = deque(pool.submit(next, moments, None) for _ in range(READ_AHEAD))
        while moment := ahead.popleft().result():
            ahead.append(pool.submit(next, moments, None))
            yield moment
    finally:
        pool.shutdown(cancel_futures=True)


# %%
def plan_windows(
    path: Path, settings: ClipSettings, stride: float, limit: int
) -> tuple[Collection[int], Collection[int]]:
    """Where windows start, by moment, `stride` seconds apart, and which moments they need.

    With a `limit` they are as many, spread evenly, else as many as the video has room for.
    """
    apart = count = settings.moments
    if stride or limit:
        capture = open_video(path)
        total, fps, step = spacing_of(capture, settings)
        apart = max(1, round(stride * fps / step)) if stride else count
    if not limit:
        return range(0, 2**31, apart), range(2**31)
    if total <= 1:
        _, total, _ = decode_forward(capture, np.array([2**31]))
    last = max(0, math.ceil(total / step - 0.5) - count)
    every = [*range(0, last, apart), last]
    starts = {every[number] for number in evenly(len(every), limit)}
    return starts, {start + number for start in starts for number in range(count)}


# %%
def gather_windows(
    moments: Iterator[Moment], count: int, starts: Collection[int]
) -> Iterator[list[Moment]]:
    """Windows of `count` moments, and the last ones; then re-raises the error of `moments`."""
    held, done, problem = deque[Moment](maxlen=count), -1, None
    try:
        for moment in moments:
            if held and held[-1].number + 1 < moment.number:
                held.clear()
            held.append(moment)
            if moment.number + 1 - count in starts:
                yield [*held]
                done = moment.number
    except VideoError as error:
        problem = error
    if held and held[-1].number > done:
        yield [*held]
    if problem:
        raise problem


# %%
def find_faces(moments: list[Moment], mtcnn: Mtcnn, tracker: FaceTracker) -> None:
    """Detect the faces of the moments that are looked at; without MTCNN, one that is NaN."""
    unseen = [moment for moment in moments if moment.is_looked_at and moment.faces is None]
    for scene, group in groupby(unseen, key=lambda moment: moment.scene):
        part = [*group]
        found = detect_faces([moment.frame for moment in part], mtcnn) if mtcnn else []
        for moment, faces in zip(part, found, strict=False):
            moment.faces = tracker.follow(faces, scene)
        for moment in part[len(found) :]:
            moment.faces = {scene: Face(0, np.full(4, np.nan), np.full((5, 2), np.nan))}


# %% [markdown]
# A face unlike those the model was calibrated with is not judged: its score would mean nothing.
# The pretrained model was calibrated with faces of at least 67 pixels (350 videos were measured)
# and, in all but 3 of 737 videos, a sharpness of at least 6 in crops of 192 pixels. In such crops
# the strongest blur of training, 2 pixels, lowers the median sharpness from 68 to 5.5. Larger crops
# are measured at 192 pixels, too.

# %%
MEASURED_SIDE = 192  # pixels of a crop; larger ones are treated like these
LEAST_SIDE = 0.4  # of a crop before it is resized, as a share of its side after that
LEAST_SHARPNESS = 6.0  # variance of the Laplacian of the crops


@dataclass
class Window:
    """A face for as long as a clip, or for as long as it was there.

    `start`, `end` in s; `box` (4,) in the frame's pixels, in the middle, and its longer side
    `size`; `sharpness` of the crops; `seen`, the share of the frames looked at; `reason` why it is
    not judged; `clip` (T, S, S, 3) uint8, with `frame_logits` (T,); `done`, the share of the video
    that was read. Face 0: there is no face.
    """

    face: int
    start: float
    end: float
    box: tuple[float, ...] = ()
    size: float = math.nan
    sharpness: float = math.nan
    seen: float = 0.0
    reason: str = ""
    clip: Any = None
    frame_logits: Any = None
    logit: float = math.nan
    probability: float = math.nan
    done: float = 1.0


def measure_sharpness(clip: np.ndarray) -> float:
    """The median over some frames of a clip (T, S, S, 3)."""
    size, some = [min(MEASURED_SIDE, clip.shape[1])] * 2, clip[:: max(1, len(clip) // 4)]
    grey = [cv2.cvtColor(cv2.resize(frame, size), cv2.COLOR_RGB2GRAY) for frame in some]
    return float(np.median([cv2.Laplacian(frame, cv2.CV_32F).var() for frame in grey]))


# %%
def why_not(window: Window, moments: list[Moment], seen: int, settings: ClipSettings) -> str:
    """Why a face `seen` so often cannot be judged; empty if it can."""
    if not settings.face_crop:
        return ""
    looks = sum(moment.is_looked_at for moment in moments)
    needed = LEAST_SIDE * min(MEASURED_SIDE, settings.size) / (1 + 2 * settings.margin)
    least = min(1.0, settings.seconds / 8, moments[-1].seconds - moments[0].seconds)
    if looks > 1 and (seen < 2 or window.end - window.start < least):
        return f"there for only {window.end - window.start:.1f} s, or not a face"
    if window.size < needed:
        return f"too small: {window.size:.0f} pixels, where {needed:.0f} are needed"
    return "too blurred" if window.sharpness < LEAST_SHARPNESS else ""


# %%
def visible_span(moments: list[Moment], found: list[int]) -> tuple[int, int, int]:
    """The first and last moment of a face `found` in some, and in how many it was looked for.

    It is visible throughout its scene, or half-way to a moment in which it was not found.
    """
    scene = [i for i, moment in enumerate(moments) if moment.scene == moments[found[0]].scene]
    missed = [i for i in scene if moments[i].is_looked_at and i not in found]
    first = max(((i + found[0] + 1) // 2 for i in missed if i < found[0]), default=scene[0])
    last = min(((i + found[-1]) // 2 for i in missed if i > found[-1]), default=scene[-1])
    return first, last, len(found) + len(missed)


def face_in(moments: list[Moment], number: int, settings: ClipSettings) -> Window:
    """What a window shows of the face with this `number`."""
    faces = {i: m.faces[number] for i, m in enumerate(moments) if m.faces and number in m.faces}
    first, last, looks = visible_span(moments, [*faces])
    boxes, _ = between(np.arange(first, last + 1), [*faces], [*faces.values()])
    picked = frame_positions(len(boxes), settings.frames if len(moments) > 1 else 1, 0, 0)
    frames = [moments[first + i].frame for i in picked]
    height, width = frames[0].shape[:2]
    squares = crop_squares(boxes[picked], height, width, settings.margin)
    window = Window(number, *time_span(moments, first, last), done=moments[-1].done)
    window.clip = crop_frames(frames, squares, settings.size)
    window.box = tuple(boxes[len(boxes) // 2].round(1).tolist())
    window.size = float(np.median((boxes[:, 2:] - boxes[:, :2]).max(axis=1)))
    window.sharpness, window.seen = measure_sharpness(window.clip), len(faces) / looks
    window.reason = why_not(window, moments, len(faces), settings)
    return window


def time_span(moments: list[Moment], first: int, last: int) -> tuple[float, float]:
    """Start and end in s of the moments first to last, half their distance before and after."""
    length = moments[-1].seconds - moments[0].seconds
    half = length / max(1, len(moments) - 1) / 2 or 0.02  # a picture stands for a 25th of a second
    return max(0.0, moments[first].seconds - half), moments[last].seconds + half


# %%
def face_windows(
    path: Path, settings: ClipSettings, mtcnn: Mtcnn, stride: float = 0, limit: int = 0
) -> Iterator[list[Window]]:
    """A list for each window of a video or picture, with every face in it.

    Raises VideoError with the reason if nothing can be decoded, or after the last window if the
    rest of the video is missing.
    """
    starts: Collection[int] = {0}
    if path.is_dir() or is_picture(path):
        moments = picture_moments(path, settings)
    else:
        starts, wanted = plan_windows(path, settings, stride, limit)
        moments = read_ahead(read_moments(path, settings, wanted))
    tracker = FaceTracker(patience=1)
    for window in gather_windows(moments, settings.moments, starts):
        find_faces(window, mtcnn if settings.face_crop else None, tracker)
        faces = sorted({face for moment in window for face in moment.faces or ()})
        span = time_span(window, 0, len(window) - 1)
        nobody = Window(0, *span, reason="no face found", done=window[-1].done)
        yield [face_in(window, face, settings) for face in faces] or [nobody]


# %%
def clip_file(path: Path, settings: ClipSettings, cache_dir: Path) -> Path:
    """Where a video's clip is cached, by the video's path, size and age and the settings."""
    identity = [CLIP_VERSION, *file_identity(path), asdict(settings)]
    return cache_dir / (hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24] + ".npz")


# Threads of Python 3.11 fail when they parse headers at the same time (gh-106905).
NPZ_READERS = threading.Semaphore(1 if sys.version_info[:2] == (3, 11) else 64)


def read_arrays(file: str | Path, *names: str) -> list[np.ndarray]:
    """Arrays of an npz file, which several threads may ask for."""
    with NPZ_READERS, np.load(file) as saved:
        return [saved[name] for name in names]


def is_intact(file: Path) -> bool:
    """Whether a cached clip is there, and every byte of it agrees with its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except DAMAGE:
        return False


# %%
def cached_clip(
    path: Path, settings: ClipSettings, cache_dir: Path, mtcnn: Mtcnn, is_crop: bool
) -> dict:
    """Make sure that a video's clip is in the cache; its CLIP_COLUMNS, or the `reason` it fails.

    A picture that `is_crop` is only checked: it is its own clip.
    """
    try:
        if is_crop:
            read_picture(path)
            return dict(clip_file=str(path), face_share=1.0, distinct_frames=1, note="")
        file = clip_file(path, settings, cache_dir)
        clip = None if is_intact(file) else make_clip(path, settings, mtcnn)
    except (VideoError, cv2.error) as error:
        return dict(reason=str(error))
    except OSError as error:
        return dict(reason=f"cannot be read: {error.strerror}")
    if clip:
        with replacing(file) as partial_file, open(partial_file, "wb") as stream:
            np.savez(stream, **vars(clip))
    share, positions, note = read_arrays(file, "face_share", "positions", "note")
    distinct = len(np.unique(positions))
    return dict(
        clip_file=str(file), face_share=float(share), distinct_frames=distinct, note=str(note)
    )


# Eyes, nose, corners of the mouth in face crops, as shares of the side: means of 785 of DFDC's
# faces_224 and of UTKFace. MTCNN finds them only if a border is added, else 0.1 too high.
CROP_LANDMARKS = ((0.31, 0.3), (0.7, 0.3), (0.5, 0.51), (0.34, 0.72), (0.67, 0.72))


def load_clip(file: str | Path, size: int = CONFIG.IMAGE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, S, S, 3) uint8 and landmarks (T, 5, 2) of a cached clip, or of a face crop."""
    if is_picture(file):
        picture = read_picture(Path(file))
        middle = crop_squares(np.full((1, 4), np.nan), len(picture), picture.shape[1], 0)
        return crop_frames([picture], middle, size), np.array([CROP_LANDMARKS], np.float32) * size
    frames, landmarks = read_arrays(file, "frames", "landmarks")
    return frames, landmarks


# %% [markdown]
# Many datasets for this job consist of face crops. A dataset's pictures are used whole if, in a few
# of each class, the usual crop around the face would take in nearly all. If that is so in one class
# alone, both are cropped, or the size of the face would tell real from fake.

# %%
PICTURES_LOOKED_AT = 24


@functools.cache  # asked once for the space that clips need, and once to make them
def crop_share(path: Path, mtcnn: torch.nn.ModuleList) -> float:
    """The crop's side around a picture's face as a share of the picture's; NaN without a face."""
    try:
        picture = read_picture(path)
        boxes, *_ = find_face([picture], mtcnn)
    except VideoError:
        return np.nan
    return (boxes[0, 2:] - boxes[0, :2]).max() * 1.5 / min(picture.shape[:2])


def find_face_crops(videos: pd.DataFrame, settings: ClipSettings, mtcnn: Mtcnn) -> pd.Series:
    """Which of the videos are pictures to be used whole."""
    crops = videos.path.map(is_picture).astype(bool)
    if mtcnn is None or not settings.face_crop:
        return crops
    for _, part in videos[crops].groupby("dataset"):
        usual = []
        for _, paths in part.path.groupby(part.label):
            some = paths.iloc[evenly(len(paths), PICTURES_LOOKED_AT)]
            usual.append(some.map(lambda path: crop_share(path, mtcnn)).median())
        crops[part.index] = all(share > 0.8 for share in usual)  # no face, NaN, is none
    return crops


# %%
def cache_clips(
    videos: pd.DataFrame,
    settings: ClipSettings,
    cache_dir: Path,
    mtcnn: Mtcnn,
    workers: int,
    *,
    share: slice = slice(None),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the clips of a `share` of videos, in threads: OpenCV decodes outside Python's lock.

    Returns usable rows with CLIP_COLUMNS, and the others with a `reason`; both keep their index.
    """
    crops = find_face_crops(videos, settings, mtcnn)  # decided by all of them
    videos, options = videos[share], (settings, cache_dir, mtcnn)
    rows, chunk = videos.index, 1 + len(videos) // 1000  # a task costs as much as a picture
    with ThreadPool(workers, torch.set_num_threads, (1,)) as pool:
        clips = pool.imap(lambda i: cached_clip(videos.path[i], *options, crops[i]), rows, chunk)
        outcomes = [*progress_bar(clips, "making clips", len(videos))]
    table = videos.join(pd.DataFrame(outcomes, rows, [*CLIP_COLUMNS, "reason"]))
    usable = table.reason.isna()
    made = table[usable].drop(columns="reason").astype({"distinct_frames": int})
    return made, table[~usable].drop(columns=[*CLIP_COLUMNS]).astype({"reason": object})


# %% [markdown]
# Three checks come before the work: whether there is room for the clips, whether a table in `data/`
# was not written by this notebook, and what killed processes left half-written.

# %%
OWN_TABLES = ("train.csv", "val.csv", "test.csv", "skipped.csv")  # what section 9 writes in data/


def require_own_tables(folder: Path) -> None:
    """Raise FileExistsError if section 9 would overwrite a table that it did not write."""
    for file in filter(Path.exists, map(folder.joinpath, OWN_TABLES)):
        columns = pd.read_csv(file, nrows=0, encoding_errors="replace")
        if not {"clip_file", "reason"} & set(columns):
            raise FileExistsError(
                f"{file} would be overwritten but is not this notebook's: choose another WORK_DIR"
            )


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder."""
    for file in folder.glob(f".partial-*-{platform.node()}-*"):  # not of machines that share it
        process = file.name.split("-")[1]
        is_own = process == str(os.getpid())
        if process.isdecimal() and (is_own or not psutil.pid_exists(int(process))):
            file.unlink(missing_ok=True)


def require_space(videos: pd.DataFrame, settings: ClipSettings, cache: Path, mtcnn: Mtcnn) -> str:
    """Say how much disk the missing clips need. Raises OSError if more than is free."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_partial_files(cache)
    except OSError as error:
        raise OSError(f"CACHE_DIR {cache} is not a writable folder: {error.strerror}") from error
    cached = videos.path[~find_face_crops(videos, settings, mtcnn)]
    paths = [p for p in cached if p.exists() and not clip_file(p, settings, cache).exists()]
    frames = sum(1 if is_picture(path) else settings.frames for path in paths)
    needed = (frames * settings.size**2 * 3 + len(paths) * 4096) / 2**30
    free = shutil.disk_usage(cache).free / 2**30
    words = f"{len(paths)} clips to make, {1024 * needed:.0f} MiB; {free:.1f} GiB free in {cache}"
    if needed > free:
        raise OSError(f"{words}. Set CACHE_DIR where more is free, or take fewer or smaller clips")
    return words


# %% [markdown]
# **The demo set** lets the notebook run without any dataset. From one public-domain portrait that
# ships with matplotlib it makes short videos of "people" (the portrait, reshaped at random), who
# move their heads in changing light, and three kinds of fakes of them:
#
# - `blend`: another face is blended in, with a seam and other colours;
# - `lowres`: the face went through a generator of low resolution;
# - `jitter`: the face does not quite follow the head from frame to frame.
#
# Person, motion, light, background, camera and codec are drawn from the same distributions for both
# classes, so that only the manipulation tells them apart.

# %%
DEMO_METHODS = ("blend", "lowres", "jitter")
DEMO_FRAMES, DEMO_FPS = (20, 28), 12
FACE_CENTRE, FACE_AXES = (265, 236), (76, 92)  # of the face in the portrait, in its pixels
SHOULDERS = [[20, 600], [35, 400], [200, 310], [330, 310], [490, 390], [512, 600]]


def load_portrait() -> np.ndarray:
    """Grace Hopper by James S. Davis, 1984 (public domain), as BGR float32 (600, 512, 3), 0..1."""
    file = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return read_picture(Path(file))[..., ::-1].astype(np.float32) / 255


def reshaped(portrait: np.ndarray, rng: np.random.Generator, strength: float = 6) -> np.ndarray:
    """The portrait (H, W, C) with smooth displacements of about `strength` pixels: a new person."""
    height, width = portrait.shape[:2]
    coarse = rng.normal(0, strength, (7, 6, 2)).astype(np.float32)
    shift = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    y, x = np.indices((height, width), np.float32)
    places = x + shift[..., 0], y + shift[..., 1]
    return cv2.remap(portrait, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def face_mask(rng: np.random.Generator, feather: float) -> np.ndarray:
    """A soft ellipse over the face, (600, 512, 1) float32 in 0..1, its edge `feather` wide."""
    mask = np.zeros((600, 512), np.float32)
    axes = [int(axis * rng.uniform(0.85, 1.1)) for axis in FACE_AXES]
    cv2.ellipse(mask, FACE_CENTRE, axes, rng.uniform(-8, 8), 0, 360, 1, cv2.FILLED)
    return cv2.GaussianBlur(mask, (0, 0), feather)[..., None]


def manipulated(
    person: np.ndarray, portrait: np.ndarray, method: str, frames: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The person's picture for each frame of a fake, manipulated inside the face only."""
    size = person.shape[1::-1]
    if method == "blend":
        gain = 1 + rng.choice([-1, 1], 3) * rng.uniform(0.08, 0.2, 3)
        donor = reshaped(portrait, rng) * gain.astype(np.float32)
        return [person + face_mask(rng, rng.uniform(1.5, 3)) * (donor - person)] * frames
    mask = face_mask(rng, rng.uniform(2, 5))
    if method == "lowres":
        scale = rng.uniform(0.1, 0.16)
        small = cv2.resize(person, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        generated = cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)
        return [person + mask * (generated - person)] * frames
    pictures = []
    for _ in range(frames):
        turn = cv2.getRotationMatrix2D(FACE_CENTRE, rng.normal(0, 4), rng.normal(1, 0.03))
        turn[:, 2] += rng.normal(0, 11, 2)
        moved = cv2.warpAffine(person, turn, size, borderMode=cv2.BORDER_REFLECT)
        pictures.append(person + mask * (moved - person))
    return pictures


# %% [markdown]
# A demo video is a person in a scene. All that both classes share is drawn from one generator of
# random numbers, what only this video has (its manipulation and noise) from another.


# %%
def draw_person(portrait: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A person's picture (H, W, 3), and its soft outline (H, W, 1) before the backdrop."""
    outline = np.zeros(portrait.shape[:2], np.float32)
    cv2.ellipse(outline, (262, 185), (118, 170), 0, 0, 360, 1, cv2.FILLED)
    cv2.fillPoly(outline, [np.array(SHOULDERS)], 1)
    outline = cv2.GaussianBlur(outline, (0, 0), 5)[..., None]
    person = reshaped(np.concatenate([portrait, outline], axis=2), rng)
    if rng.random() < 0.5:
        person = person[:, ::-1]
    return person[..., :3].copy(), person[..., 3:].copy()


def draw_scene(rng: np.random.Generator) -> SimpleNamespace:
    """A scene: backdrop (H, W, 3); poses (T, 2, 3); light (T, 3); the camera's faults."""
    width, height = (int(side) for side in rng.choice([224, 240, 256, 288], 2))
    count = int(rng.integers(*DEMO_FRAMES))
    colours = (rng.uniform(0.2, 0.8, 3) + rng.normal(0, 0.08, (5, 5, 3))).astype(np.float32)
    backdrop = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
    time = np.arange(count) / DEMO_FPS

    def wave(amplitude: float) -> np.ndarray:
        rates, phases = rng.uniform(0.2, 0.8, 2), rng.uniform(0, 2 * np.pi, 2)
        return amplitude * np.sin(2 * np.pi * rates[:, None] * time + phases[:, None]).mean(axis=0)

    zoom, angle = rng.uniform(0.42, 0.56) * np.exp(wave(0.06)), rng.normal(0, 4) + wave(8)
    x, y = width * rng.uniform(0.42, 0.58) + wave(14), height * rng.uniform(0.42, 0.52) + wave(8)
    poses = [cv2.getRotationMatrix2D(FACE_CENTRE, angle[t], zoom[t]) for t in range(count)]
    for t, pose in enumerate(poses):
        pose[:, 2] += (x[t] - FACE_CENTRE[0], y[t] - FACE_CENTRE[1])
    light = rng.uniform(0.75, 1.1) * rng.normal(1, 0.04, 3) * (1 + wave(0.1))[:, None]
    camera = dict(blur=rng.uniform(0.3, 0.9), noise=rng.uniform(0.005, 0.025))
    quality = int(rng.integers(60, 96))
    return SimpleNamespace(backdrop=backdrop, poses=poses, light=light, quality=quality, **camera)


def demo_frames(portrait: np.ndarray, number: int, method: str, seed: int) -> list[np.ndarray]:
    """The frames (H, W, 3) uint8 BGR of demo video `number`: real, or a fake of the same scene."""
    rng = np.random.default_rng([seed, number])
    own = np.random.default_rng([seed, number, 1 + ("real", *DEMO_METHODS).index(method)])
    person, outline = draw_person(portrait, rng)
    scene = draw_scene(rng)
    backdrop, pictures = scene.backdrop, [person] * len(scene.poses)
    if method != "real":
        pictures = manipulated(person, portrait, method, len(pictures), own)
    frames: list[Any] = []
    for picture, pose, light in zip(pictures, scene.poses, scene.light, strict=True):
        picture = np.concatenate([picture, outline], axis=2)
        picture = cv2.warpAffine(picture, pose, backdrop.shape[1::-1], flags=cv2.INTER_LINEAR)
        frame = backdrop + picture[..., 3:] * (picture[..., :3] - backdrop)
        frame = cv2.GaussianBlur(frame * light.astype(np.float32), (0, 0), scene.blur)
        frame = frame + own.standard_normal(frame.shape, np.float32) * scene.noise
        pixels = (frame.clip(0, 1) * 255).astype(np.uint8)
        _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, scene.quality])
        frames.append(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    return frames


# %%
def write_video(file: Path, frames: list[np.ndarray], fps: float) -> None:
    """Write BGR frames as MPEG-4; raises OSError where OpenCV cannot."""
    with replacing(file) as partial_file:
        codec, size = cv2.VideoWriter.fourcc(*"mp4v"), frames[0].shape[1::-1]
        writer = cv2.VideoWriter(str(partial_file), codec, fps, size)
        if not writer.isOpened():
            reason = "no MPEG-4 encoder, or no space"
            raise OSError(f"OpenCV {cv2.__version__} cannot write {partial_file}: {reason}")
        for frame in frames:
            writer.write(frame)
        writer.release()


def make_demo_set(folder: Path, per_class: int, seed: int, workers: int) -> Path:
    """Make `per_class` real videos and a fake of each below `folder`; existing ones are kept."""
    portrait = load_portrait()
    for kind in ("real", "fake"):
        remove_partial_files(folder / kind)

    def make(number: int) -> None:
        method = DEMO_METHODS[number % len(DEMO_METHODS)]
        files = {"real": f"real/{number:04}.mp4", method: f"fake/{number:04}__{method}.mp4"}
        for kind, file in files.items():
            if not (folder / file).exists():
                write_video(folder / file, demo_frames(portrait, number, kind, seed), DEMO_FPS)

    with ThreadPool(workers) as pool:
        made = pool.imap_unordered(make, range(per_class))
        deque(progress_bar(made, "demo set", per_class), maxlen=0)
    return folder


# %% [markdown]
# One demo person, real and in the three fakes of the same scene, above what the network gets to
# see:


# %%
@styled
def plot_demo_person(number: int = 1, seed: int = 0) -> plt.Figure:
    """The middle frame of a demo video and its face crop, for the real one and each fake."""
    portrait = load_portrait()
    mtcnn = load_face_detector("cpu") if CONFIG.FACE_CROP else None
    pictures, crops, methods = [], [], ("real", *DEMO_METHODS)
    for method in methods:
        frames = demo_frames(portrait, number, method, seed)
        frame = frames[len(frames) // 2][..., ::-1]
        if method == "real":  # the fakes hold their heads in the same place
            boxes, *_ = find_face([frame], mtcnn)
            ((x, y, side),) = crop_squares(boxes, len(frame), frame.shape[1], CONFIG.FACE_MARGIN)
        pictures.append(frame)
        crops.append(frame[y : y + side, x : x + side])
    figure, (top, below) = plt.subplots(2, 1, figsize=(WIDTH, 3.6))
    show_row(top, "", np.stack(pictures), methods)
    show_row(below, "", np.stack(crops))
    return figure


if IN_NOTEBOOK:
    show_figure(plot_demo_person())
