# %% [markdown]
# <a id="section-3"></a>
# ## 3. From a folder of videos to clips
#
# A video is decoded once, in one sequential pass, and what the network will see of it is kept as a small
# `uint8` file: 16 face crops of 160 x 160 pixels are 1.2 MB. From then on an epoch costs no decoding.
#
# First the **finding**. Each known layout is one function that looks at a folder and returns a row a video, or
# nothing; a new layout is one more function. A row says what the video shows (`label`, `method`) and, as `sources`,
# what it was made from: the face swap `004_982.mp4` has the pictures of recording 004 and the face of 982.

# %%
import hashlib
import json
import os
import re
import shutil
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from cell_01_imports_and_setup import NO_BARS, ensure_packages, replacing
from cell_02_global_config import Config

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(
    ("test", "testing"), "test"
)  # folder: split
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
VIDEO_COLUMNS = (
    "path",
    "label",
    "method",
    "split",
    "dataset",
    "original",
    "group",
)  # of the table of videos
CLIP_COLUMNS = ("clip_file", "face_share", "distinct_frames")  # and of what the cache adds to it
CLASSES = {"real": 0, "0": 0, "fake": 1, "1": 1}
# what a run needs: in each split, which labels
EVERY_CLASS: dict[str, tuple[int, ...]] = dict.fromkeys(("train", "val", "test"), (0, 1))
FF_METHODS = (
    "Deepfakes",
    "Face2Face",
    "FaceShifter",
    "FaceSwap",
    "NeuralTextures",
    "DeepFakeDetection",
)
FF_REAL = dict.fromkeys(("original", "youtube", "actors"), "real")


def videos_below(folder: Path) -> list[Path]:
    """Every video below `folder`, sorted; hidden entries are left out, linked folders are entered once.

    A folder that cannot be read, or is named like a video and holds none, is listed too: a loss to be reported.
    """
    found: list[Path] = []
    closed: list[OSError] = []
    entered = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if (place := os.path.realpath(where)) in entered:
            folders.clear()
            continue
        entered.add(place)
        videos = [
            Path(where, name)
            for name in names
            if name.lower().endswith(VIDEO_SUFFIXES) and name[0] != "."
        ]
        found += videos or [Path(where)] * where.lower().endswith(VIDEO_SUFFIXES)
    return sorted([*found, *(Path(error.filename) for error in closed)])


def rows_below(folder: Path, method: str) -> list[dict]:
    """A row for each video below `folder`, all of one method; `real` is the method of real ones."""
    label = int(method != "real")
    return [
        dict(path=p, label=label, method=method, split="", sources=[]) for p in videos_below(folder)
    ]


Contents = tuple[
    dict[str, Path], list[str]
]  # the subfolders of a folder by name, and the names of its files


def contents(folder: Path) -> Contents:
    """What lies in a folder, but for hidden entries, sorted. One request to the disk, however many files."""
    with os.scandir(folder) as entries:
        visible = sorted(
            (entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name
        )
    is_folder = [
        os.path.isdir(entry) if entry.is_symlink() else entry.is_dir() for entry in visible
    ]
    folders = {
        entry.name: folder / entry.name
        for entry, yes in zip(visible, is_folder, strict=True)
        if yes
    }
    return folders, [entry.name for entry in visible if entry.name not in folders]


def find_manifest(folder: Path, inside: Contents) -> list[dict]:
    """CSV files with the columns path and label (0, 1, real, fake), and perhaps method, group and split.

    Paths are absolute or relative to the file. Where it has no splits, its own name may be one: `train.csv`.
    """
    rows = []
    for file in (folder / name for name in inside[1] if name.lower().endswith(".csv")):
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            header = stream.readline().strip().lower()
        separator = next((mark for mark in ",;\t" if mark in header), ",")
        columns = [
            name.strip(' "') or f"column {place}"
            for place, name in enumerate(header.split(separator))
        ]
        if not {"path", "label"} <= set(columns) or {"clip_file", "reason", "logit"} & set(columns):
            continue  # some other table, or one that this notebook wrote
        form = dict(
            sep=separator, names=columns, header=0, index_col=False, dtype=str, encoding="utf-8-sig"
        )
        try:
            table = pd.read_csv(file, keep_default_na=False, skip_blank_lines=False, **form).fillna(
                ""
            )
        except ValueError as error:
            raise ValueError(f"{file} is no CSV in UTF-8: {error}") from error
        table = table.apply(lambda column: column.str.strip())
        if not table.path.str.lower().str.endswith(VIDEO_SUFFIXES).any():
            continue
        for number, row in enumerate(table.to_dict("records"), start=2):
            if not any(row.values()):
                continue
            label, split = CLASSES.get(row["label"].lower()), row.get("split", "").lower()
            if label is None or (split and split not in SPLITS):
                raise ValueError(
                    f"{file}, line {number}: label {row['label']!r}, split {split!r}. A label is 0 or real, 1 or fake; "
                    "a split is train, val, test or empty"
                )
            method = row.get("method", "") if label else "real"
            method = "fake" if label and method.lower() in ("", "real") else method
            sources = [row["group"]] if row.get("group") else []
            path, split = (
                folder / row["path"].replace("\\", "/"),
                SPLITS.get(split or file.stem.lower(), ""),
            )
            rows.append(dict(path=path, label=label, method=method, split=split, sources=sources))
    return rows


def find_faceforensics(folder: Path, inside: Contents) -> list[dict]:
    """Kaggle's `FaceForensics++_C23`, `original/` beside the methods; or the official tree, without its masks."""
    if "original" in inside[0] and (methods := [name for name in FF_METHODS if name in inside[0]]):
        return [
            row
            for name in ("original", *methods)
            for row in rows_below(folder / name, FF_REAL.get(name, name))
        ]
    kinds = [
        inside[0][name]
        for name in ("original_sequences", "manipulated_sequences")
        if name in inside[0]
    ]
    parts = [part for kind in kinds for part in contents(kind)[0].values()]
    qualities = [
        quality for part in parts for name, quality in contents(part)[0].items() if name != "masks"
    ]
    places = [place for quality in qualities if (place := quality / "videos").is_dir()]
    return [
        row
        for place in places
        for row in rows_below(place, FF_REAL.get(place.parts[-3], place.parts[-3]))
    ]


def find_celeb_df(folder: Path, inside: Contents) -> list[dict]:
    """Celeb-DF v1 and v2. Their list of test videos writes 1 for real: labels come from the folders instead."""
    parts = {"Celeb-real": "real", "YouTube-real": "real", "Celeb-synthesis": "Celeb-DF"}
    if not {"Celeb-real", "Celeb-synthesis"} <= set(inside[0]):
        return []
    rows = [
        row
        for name, method in parts.items()
        if name in inside[0]
        for row in rows_below(folder / name, method)
    ]
    if "List_of_testing_videos.txt" in inside[1]:
        listed = folder / "List_of_testing_videos.txt"
        lines = listed.read_text(encoding="utf-8-sig").replace("\\", "/").splitlines()
        tested = {folder / re.split(r"[,\s]+", line.strip())[-1] for line in lines}
        if not tested & {row["path"] for row in rows}:
            warnings.warn(
                f"{listed} names none of the videos: there is no test set of the dataset's own",
                stacklevel=2,
            )
            return rows
        rows = [dict(row, split="test" if row["path"] in tested else "train") for row in rows]
    return rows


def find_dfdc(folder: Path, inside: Contents) -> list[dict]:
    """A part of the Deepfake Detection Challenge: `metadata.json` tells label, split and original of each video."""
    if "metadata.json" not in inside[1]:
        return []
    try:
        entries = json.loads((folder / "metadata.json").read_text(encoding="utf-8-sig"))
    except ValueError as error:
        warnings.warn(f"{folder / 'metadata.json'} is not used: {error}", stacklevel=2)
        return []
    rows = []
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.get("label") in ("REAL", "FAKE"):
            label, method = (0, "real") if entry["label"] == "REAL" else (1, "DFDC")
            sources = [Path(str(entry.get("original") or name)).stem]
            split = SPLITS.get(str(entry.get("split")).lower(), "")
            rows.append(
                dict(path=folder / name, label=label, method=method, split=split, sources=sources)
            )
    return rows


def find_real_fake(folder: Path, inside: Contents) -> list[dict]:
    """`real/` and `fake/`, the user's layout. A folder below `fake`, or what follows `__` in a name, is the method.

    Folders of splits may lie above (the search sees to that) or below.
    """
    rows = []
    for part in (part for name, part in inside[0].items() if name.lower() in ("real", "fake")):
        for row in rows_below(part, part.name.lower()):
            *below, _ = row["path"].relative_to(part).parts
            split = SPLITS[below.pop(0).lower()] if below and below[0].lower() in SPLITS else ""
            method = (
                [*row["path"].stem.split("__")[1:], *below, "fake"][0] if row["label"] else "real"
            )
            rows.append(dict(row, method=method, split=split))
    return rows


LAYOUTS: dict[str, Callable[[Path, Contents], list[dict]]] = {
    "CSV manifest": find_manifest,
    "FaceForensics++": find_faceforensics,
    "Celeb-DF": find_celeb_df,
    "DFDC": find_dfdc,
    "real/fake folders": find_real_fake,
}
ONE_NAMESPACE = (
    "FaceForensics++",
    "Celeb-DF",
    "DFDC",
)  # here a name means the same recording in every copy and part


def recognise(folder: Path, inside: Contents) -> tuple[str, list[dict]]:
    """The first layout that a folder has, and its rows; neither if it has none."""
    for layout, find in LAYOUTS.items():
        try:
            if rows := find(folder, inside):
                return layout, rows
        except OSError as error:
            warnings.warn(f"{error.filename} is not read: {error.strerror}", stacklevel=4)
    return "", []


def search(root: Path) -> list[dict]:
    """The rows of every dataset at or below `root`, breadth first, with their `dataset` and `split`."""
    rows, level, entered = [], [(root, "")], set()
    for _ in range(8):
        deeper = []
        for folder, split in level:
            if (place := os.path.realpath(folder)) in entered:
                continue
            entered.add(place)
            try:
                inside = contents(folder)
            except OSError as error:
                warnings.warn(f"{error.filename} is not searched: {error.strerror}", stacklevel=3)
                continue
            layout, here = recognise(folder, inside)
            names = [part for part in folder.relative_to(root).parts if part.lower() not in SPLITS]
            dataset = layout if layout in ONE_NAMESPACE else "/".join(names) or root.resolve().name
            rows += [dict(row, dataset=dataset, split=row["split"] or split) for row in here]
            used = {parent for row in here for parent in row["path"].parents}
            deeper += [
                (sub, SPLITS.get(name.lower(), split))
                for name, sub in inside[0].items()
                if sub not in used
            ]
        level = deeper
    return rows


def find_videos(root: Path, methods: Iterable[str] = ()) -> pd.DataFrame:
    """Every labelled video at or below `root`, in whichever known layouts, up to seven folders deep.

    Args:
        root: a dataset, a folder that holds some, or a CSV manifest.
        methods: the manipulations wanted; none means all but DeepFakeDetection. Kaggle's FaceForensics++ lacks the
            originals of that one, and a class that differs in resolution would teach the resolution.

    Returns:
        A row a video: path, label (0 real, 1 fake), method, split ("" if not given), dataset, original (the recording
        whose pictures it shows) and group (the same for all that share a source, directly or through others).

    Raises:
        FileNotFoundError: `root` does not exist, or holds no known layout; says what it holds.
        ValueError: a wanted method is not there, and names those that are; or a manifest holds a wrong value.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"DATA_DIR: {root} does not exist (seen from {Path.cwd()})")
    if root.is_dir():
        rows = search(root)
    else:
        rows = [
            dict(row, dataset=root.name) for row in find_manifest(root.parent, ({}, [root.name]))
        ]
        if not rows:
            raise ValueError(
                f"DATA_DIR: {root} is no CSV with the columns path and label and a video in each line"
            )
    if not rows:
        names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
        raise FileNotFoundError(
            f"DATA_DIR: no known dataset in {root.resolve()}, which holds {len(names)} entries "
            f"({', '.join(names[:8]) or 'it is empty'}) and {len(videos_below(root))} videos. "
            f"Known are {', '.join(LAYOUTS)}; the README shows them."
        )
    rows.sort(
        key=lambda row: row["split"] == ""
    )  # a file listed twice: the row that tells its split counts
    videos = pd.DataFrame(rows).assign(place=[os.path.realpath(row["path"]) for row in rows])
    told_already = videos.duplicated(["place", "label"]) & (videos.split == "")
    videos = videos[~told_already & ~videos.duplicated(["place", "label", "split"])].drop(
        columns="place"
    )
    if unknown := set(methods) - set(videos.method):
        known = sorted(set(videos.method) - {"real"})
        raise ValueError(
            f"METHODS: {', '.join(sorted(unknown))} not found below {root}; there are {', '.join(known)}"
        )
    wanted = set(methods) or set(videos.method) - {"DeepFakeDetection"}
    of_actors = (videos.dataset == "FaceForensics++") & videos.path.map(
        lambda path: "__" in path.stem
    )
    if not methods and of_actors.any():
        warnings.warn(
            f"{of_actors.sum()} DeepFakeDetection videos are left out; METHODS can name them",
            stacklevel=2,
        )
    keep = (videos.label == 0) | videos.method.isin(wanted)
    videos = videos[keep & (~of_actors | ("DeepFakeDetection" in wanted))]
    if videos.empty:
        raise ValueError(
            f"below {root} is nothing but DeepFakeDetection: name it in METHODS to use it"
        )
    named = pd.concat([sources_by_name(part) for _, part in videos.groupby("dataset")])
    sources = [
        [f"{row.dataset}/{name}" for name in row.sources or named[row.Index]]
        for row in videos.itertuples()
    ]
    videos = videos.assign(
        original=[names[0] for names in sources], group=connected_groups(sources)
    )
    return videos.drop(columns="sources").reset_index(drop=True)


# %% [markdown]
# **Sources** that no list gives are read from file names. Videos that share one, directly or through others, form a
# **group**, and a group never crosses a split: if a person's original is in training and a fake of the same recording
# in the test set, the test measures memory.


# %%
def named_sources(stem: str, reals: set[str]) -> list[str]:
    """The recordings and people that a file name tells of; first the recording whose pictures the video shows.

    `004_982` is of FaceForensics++, `id0_id1_0003` of Celeb-DF, where identities count too, and
    `01_02__walking__yvgy8lok` of DeepFakeDetection, with its actors. Any other name tells of the real videos (`reals`)
    whose names it contains, and of what stands before a double underscore; if there is no such thing, of itself. Names
    are expected in lower case.
    """
    if match := re.search(r"(?<![a-z0-9])(\d{3})_(\d{3})(?![a-z0-9])", stem):
        return [*match.groups()]
    if match := re.fullmatch(r"(id\d+)(?:_(id\d+))?_(\d{4})", stem):
        return [f"{match[1]}_{match[3]}", *filter(None, match.groups()[:2])]
    if match := re.fullmatch(r"(\d\d)(?:_(\d\d))?__(.+?)(?:__[a-z0-9]{8})?", stem):
        return [f"{match[1]}__{match[3]}", *filter(None, match.groups()[:2])]
    words, sources, first = list(re.finditer(r"[^\W_]+", stem)), [], 0
    while first < len(words):
        runs = {
            end: stem[words[first].start() : words[end - 1].end()]
            for end in range(len(words), first, -1)
        }
        longest = next((end for end, run in runs.items() if run in reals), None)
        sources += [runs[longest]] if longest else []
        first = longest or first + 1
    head = stem.split("__")[0] or stem
    return [*dict.fromkeys([*sources, head] if head != stem else sources or [stem])]


def sources_by_name(videos: pd.DataFrame) -> pd.Series:
    """The sources that the names of one dataset's videos tell, a list for each.

    Where no name tells of another, a name with nothing but a number (`video1`) starts anew in each given split.
    """
    stems = videos.path.map(lambda path: unicodedata.normalize("NFC", path.stem).lower())
    reals = {0: set(), 1: set(stems[videos.label == 0])}
    sources = [
        named_sources(stem, reals[label]) for stem, label in zip(stems, videos.label, strict=True)
    ]
    paired = {name for names in sources if len(names) > 1 for name in names}
    number = stems.str.extract(r"[\W_](\d{3})$")[0]  # real_004 beside fake_004_982
    sources = [
        [own, *names] if own in paired and len(names) == 1 else names
        for own, names in zip(number, sources, strict=True)
    ]
    sources = pd.Series(sources, index=videos.index)
    if all(names == [stem] for names, stem in zip(sources, stems, strict=True)):
        counted = stems.str.fullmatch(r"[^\W\d_]*[-_ ]?\d+") & (videos.split != "")
        sources = (videos.split + "/" + stems).where(counted, stems).map(lambda name: [name])
    return sources


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


def file_problem(path: Path) -> str:
    """Why a file cannot be a video, as far as its directory entry tells; empty if it may be one."""
    try:
        str(path).encode()  # OpenCV crashes on other names
        if not os.access(path, os.R_OK):
            return "cannot be read: no permission" if path.exists() else "does not exist"
        return "is a folder" if path.is_dir() else "" if path.stat().st_size else "is empty"
    except UnicodeEncodeError:
        return "its name is not valid UTF-8: rename it"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def check_files(videos: pd.DataFrame, workers: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tell apart, before anything is decoded, the files that can be videos and those that cannot.

    The same content under both labels is contradictory: neither is used. Copies under one label form one group.

    Returns the good rows, and the others with a `reason`.
    """

    def digest(path: Path) -> str:
        content = hashlib.blake2b(digest_size=16)
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(2**20):
                    content.update(chunk)
        except OSError:
            return str(path)  # like no other; decoding will tell what is wrong with it
        return content.hexdigest()

    with ThreadPoolExecutor(workers) as pool:
        reasons = pd.Series(
            list(pool.map(file_problem, videos.path)), index=videos.index, dtype=object
        )
        readable = videos[reasons == ""]
        sizes = pd.Series(list(pool.map(os.path.getsize, readable.path)), index=readable.index)
        alike = readable[sizes.duplicated(keep=False)]
        alike = alike.assign(content=list(pool.map(digest, alike.path)))
    same = alike[alike.content.duplicated(keep=False)]
    for _, copies in same.groupby("content"):
        if copies.label.nunique() > 1:
            for row in copies.itertuples():
                other = copies[copies.label != row.label].iloc[0]
                place, kind = "/".join(other.path.parts[-3:]), ("real", "fake")[other.label]
                reasons[row.Index] = (
                    f"contradictory: the same content as {place}, which is called {kind}"
                )
    content = same.content.reindex(videos.index)
    links = [
        [g] if pd.isna(c) else [g, f"\U0010ffff{c}"]
        for g, c in zip(videos.group, content, strict=True)
    ]
    videos, good = videos.assign(group=connected_groups(links)), reasons == ""
    refused = videos.assign(reason=reasons)[~good]
    refused["path"] = [
        Path(str(path).encode(errors="backslashreplace").decode()) for path in refused.path
    ]
    return videos[good].reset_index(drop=True), refused.reset_index(drop=True)


# %% [markdown]
# **Splitting and limiting.** Splits come first, so that a larger sample never moves a video from the test set into
# training. Groups are dealt out so that every split gets its share of each class and manipulation.


# %%
def split_videos(
    videos: pd.DataFrame,
    val: float,
    test: float,
    seed: int,
    holdout: Iterable[str] = (),
    needed: dict[str, tuple[int, ...]] = EVERY_CLASS,
) -> pd.DataFrame:
    """Fill in `split`, so that no group crosses a split and each split has its share of each class and method.

    A split that a dataset gives is kept; one that it does not give is taken from its training videos. Fakes of
    `holdout` methods are in the test set only: those whose group is in training or validation are dropped.

    Raises ValueError when a split would lack a class that is `needed`, with the counts.
    """
    known = set(videos.method[videos.label == 1])
    if unknown := set(holdout) - known:
        raise ValueError(
            f"HOLDOUT_METHODS: {', '.join(sorted(unknown))} not among {', '.join(sorted(known))}"
        )
    held = videos.method.isin(list(holdout))
    shares = {}
    for dataset, given in videos.groupby("dataset").split.agg(set).items():
        wanted = {"train": 1 - val - test, "val": val, "test": test}
        shares[dataset] = {
            name: share * (name == "train" or name not in given) for name, share in wanted.items()
        }
    complete = videos.dataset.map(lambda name: sum(map(bool, shares[name].values())) == 1)
    fixed = videos.split.isin(["val", "test"]) | ((videos.split == "train") & complete)
    split = videos.split.where(fixed, "")
    split[held.groupby(videos.group).transform("all") & ~fixed] = "test"
    for given, allowed in (
        ("", ("test", "train", "val")),
        ("train", ("train", "val")),
    ):  # copies in other datasets
        of_copy = videos[fixed & videos.split.isin(allowed)].groupby("group").split.min().to_dict()
        follows = (split == "") & (videos.split == given)
        split = split.where(
            ~follows, videos.group.map(lambda name, of_copy=of_copy: of_copy.get(name, ""))
        )
    pool = videos[split == ""]
    split = split.where(split != "", pool.group.map(deal_out(pool, shares, seed)))
    videos = videos.assign(split=split)
    videos = videos[~held | (videos.split == "test")].reset_index(drop=True)
    require_classes(videos, needed)
    return videos


def require_classes(videos: pd.DataFrame, needed: dict[str, tuple[int, ...]] = EVERY_CLASS) -> None:
    """Raise ValueError, with the counts, if a split lacks a class that is `needed` there, or has no videos at all."""
    wanted = {label for labels in needed.values() for label in labels}
    if missing := wanted - {*videos.label}:
        kind = ("real", "fake")[min(missing)]
        raise ValueError(f"no {kind} videos among {len(videos)} that can be used")
    table = pd.crosstab(videos.split, videos.label)
    table = table.reindex(index=["train", "val", "test"], columns=[0, 1], fill_value=0)
    if not all(
        table.loc[split].any() and table.loc[split, list(labels)].all()
        for split, labels in needed.items()
    ):
        raise ValueError(
            f"a split lacks a class: {len(videos)} usable videos in {videos.group.nunique()} groups became\n"
            f"{table.rename(columns={0: 'real', 1: 'fake'})}\n"
            "More recordings help, a larger MAX_VIDEOS_PER_CLASS, or other VAL_FRACTION, TEST_FRACTION and "
            "HOLDOUT_METHODS. With SELF_BLEND = 1 only the test set needs fakes. data/skipped.csv lists what cannot be "
            "used."
        )


def deal_out(
    videos: pd.DataFrame, shares: dict[str, dict[str, float]], seed: int
) -> dict[str, str]:
    """A split for each group, so that each dataset's classes and methods come near that dataset's `shares`.

    The distance is chi-square: the sum of (count - goal)^2 / goal. Groups are dealt out one by one, each to where it
    lessens the distance most: large ones first, then again in random orders, as often as time allows. The best counts.
    """
    kinds = pd.concat(
        [videos.assign(kind=videos.label.astype(str)), videos.assign(kind=videos.method)]
    )
    table = (
        kinds.groupby(["group", "dataset", "kind"])
        .size()
        .unstack(["dataset", "kind"], fill_value=0)
    )
    counts, splits = table.to_numpy(float), ["train", "val", "test"]
    share = np.array([[shares[dataset][name] for dataset, _ in table] for name in splits])
    goal = np.maximum(share / share.sum(axis=0) * counts.sum(axis=0), 1e-9)
    rng, best, shortest = np.random.default_rng(seed), np.zeros(len(counts), int), np.inf
    for attempt in range(1 + 20_000 // (len(counts) + 1)):
        order = rng.permutation(len(counts))
        if attempt == 0:
            order = order[np.argsort(-counts.sum(axis=1)[order], kind="stable")]
        now, place = np.zeros_like(goal), np.zeros(len(counts), int)
        for row in order:
            place[row] = (
                (counts[row] * (2 * (now - goal) + counts[row]) / goal).sum(axis=1).argmin()
            )
            now[place[row]] += counts[row]
        distance = ((now - goal) ** 2 / goal).sum()
        if distance < shortest - 1e-6:
            best, shortest = place, distance
    return {group: splits[index] for group, index in zip(table.index, best, strict=True)}


def crossing_groups(videos: pd.DataFrame) -> list[str]:
    """Groups found in more than one split, which only a split given by the dataset can cause."""
    splits = videos.groupby("group").split.nunique()
    return list(splits.index[splits > 1])


def limit_videos(videos: pd.DataFrame, per_class: int, seed: int) -> pd.DataFrame:
    """At most `per_class` real and fake videos (0 = all), each split keeping its share.

    Real and fake come from the datasets in equal parts, or the dataset would tell the class; fakes come evenly from the
    methods of each, and from its originals, first from those that are taken themselves.
    """
    if not per_class:
        return videos
    videos = videos.sort_values("path", key=lambda paths: paths.map(str), kind="stable")
    # The order in which videos are taken: by turns of their originals, which come in random order.
    order = sorted(
        videos.original.unique(),
        key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest(),
    )
    place = (
        videos.drop_duplicates("original")
        .set_index("original")
        .loc[order]
        .groupby("split")
        .cumcount()
    )
    rank, number = (
        videos.original.map(place),
        videos.method.where(videos.label == 1).astype("category").cat.codes,
    )
    turn = (number - rank) % (number.max() + 1)  # each original begins with another method
    turn += (number.max() + 1) * videos.groupby(["original", "method"]).cumcount()
    turn = turn.where(videos.label == 1, videos.groupby("original").cumcount())
    # How many: by class and dataset, then method, then split, where the largest arrears are served first.
    sizes = (
        videos.groupby(["dataset", "label"])
        .size()
        .unstack(fill_value=0)
        .reindex(columns=[0, 1], fill_value=0)
    )
    equal = pd.Series(even_quotas(per_class, sizes.min(axis=1)))
    kept: list[int] = []
    for label in (0, 1):
        rest = even_quotas(per_class - equal.sum(), sizes[label] - equal)
        wanted: dict[str, float] = defaultdict(float)
        given = Counter[str]()
        alone = (label == 1) & ~videos.original.isin(videos.original[kept])
        keys = pd.DataFrame({"alone": alone, "turn": turn, "rank": rank})
        for dataset, quota in equal.items():
            part = videos[(videos.dataset == dataset) & (videos.label == label)]
            for method, count in even_quotas(
                quota + rest[dataset], part.method.value_counts()
            ).items():
                ranked = keys.loc[part.index[part.method == method]].sort_values([*keys])[::-1]
                queues = {name: [*rows.index] for name, rows in ranked.groupby(part.split)}
                for name, queue in queues.items():
                    wanted[name] += count * len(queue) / len(ranked)
                for _ in range(count):
                    claims = {
                        n: (given[n] == 0, wanted[n] - given[n])
                        for n, queue in queues.items()
                        if queue
                    }
                    name = max(claims, key=claims.__getitem__)
                    kept.append(queues[name].pop())
                    given[name] += 1
    return videos.loc[kept].sort_index().reset_index(drop=True)


def even_quotas(total: int, available: pd.Series) -> dict[str, int]:
    """Divide `total` evenly by name, nowhere more than is `available`; what a small one leaves goes to the others."""
    quotas: dict[str, int] = {}
    for place, (size, name) in enumerate(
        sorted((int(size), name) for name, size in available.items())
    ):
        quotas[name] = min(size, (total - sum(quotas.values())) // (len(available) - place))
    return quotas


# %% [markdown]
# **Frames** are taken at even spacing from a fixed stretch of the middle of the video. Fakes are often shorter
# than originals; spread over the whole video, their frames would lie closer together, and the network would
# learn to tell durations. Seeking to each frame would decode most of the video many times, so one pass grabs
# every frame up to the last one needed and converts only those that are.

# %%
CLIP_VERSION = 2  # part of each cached clip's name: counts the changes to how clips are made
LONG_LEAD = 1500  # frames: in longer videos one seek to the first frame wanted saves decoding what comes before
LONGEST_SIDE = 1920  # larger frames are reduced on reading: a face is large enough then, and memory stays small


class VideoError(Exception):
    """A video cannot be used; the message is the reason that goes to skipped.csv."""


def frame_positions(total: int, count: int, fps: float, seconds: float) -> np.ndarray:
    """`count` even positions within the middle `seconds` of `total` frames.

    At few frames a second the stretch is longer, and holds `count` frames; of a shorter video some are repeated.
    """
    span = min(total, max(count, round(fps * seconds))) if fps > 0 else total
    return (total - span) // 2 + ((np.arange(count) + 0.5) * span / count).astype(int)


def open_video(path: Path) -> cv2.VideoCapture:
    """A capture with one decoding thread: other videos keep the other cores busy. Raises VideoError with the reason."""
    if problem := file_problem(path):
        raise VideoError(problem)
    capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise VideoError(
            "no pictures that can be decoded: not a video, sound alone, cut off or damaged"
        )
    return capture


def decode(
    capture: cv2.VideoCapture, wanted: np.ndarray, at: int = 0
) -> tuple[dict[int, np.ndarray], int, float]:
    """One pass from frame `at` up to the last one wanted, converting only those that are.

    Returns the wanted frames (H, W, 3) uint8 RGB by number, the number after the last one that came, and its time in s.
    """
    frames, time, needed = {}, 0.0, set(wanted.tolist())
    while at <= wanted[-1] and capture.grab():
        time = max(time, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        if at in needed:
            readable, frame = capture.retrieve()
            if not readable:
                raise VideoError(f"frame {at} cannot be decoded")
            frames[at] = to_rgb(frame)
        at += 1
    return frames, at, time


def read_frames(path: Path, count: int, seconds: float) -> tuple[list[np.ndarray], np.ndarray]:
    """`count` RGB frames (H, W, 3) uint8 of a video and their numbers in it; some are repeated if it has fewer.

    Raises VideoError with the reason if it is no video, or ends before it should.
    """
    capture, at = open_video(path), 0
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    positions = frame_positions(total if total > 1 else 2**31, count, fps, seconds)
    if total > 1 and positions[0] > LONG_LEAD:
        at = int(positions[0])
        capture.set(cv2.CAP_PROP_POS_FRAMES, at - 1)
        if (
            not capture.grab()
            or abs(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 * fps - (at - 1)) > 0.5
        ):
            capture, at = (
                open_video(path),
                0,
            )  # the time is another: this container cannot be trusted to find a frame
    frames, end, time = decode(capture, positions, at)
    if (
        end <= positions[-1]
    ):  # damaged; or the container does not know its frames, and guessed from the duration
        if max(end, time * fps + 1) < 0.95 * total:
            raise VideoError(f"decoding ends after {end} of {total} frames: truncated or damaged")
        if at:
            _, end, time = decode(open_video(path), positions)
        if end < 2:
            raise VideoError(f"holds {end or 'no'} frame{'s' * (end != 1)}")
        positions = frame_positions(end, count, end / time if time else fps, seconds)
        frames, *_ = decode(open_video(path), positions)
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError("changes its frame size midway")
    return [frames[position] for position in positions.tolist()], positions


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
DETECTION_FRAMES = 8  # frames of a clip that the detector looks at
DETECTION_SIDE = 640  # longer side of the frames it sees
FACE_SIZES = (
    80,
    32,
)  # smallest face searched for, in pixels of those; small ones only where there is no larger


def load_face_detector(device: str) -> torch.nn.ModuleList:
    """MTCNN (Zhang et al., 2016) for large and for small faces; its weights come inside the facenet-pytorch package."""
    ensure_packages("facenet_pytorch")
    from facenet_pytorch import MTCNN

    with (
        warnings.catch_warnings()
    ):  # torch 2.4 and 2.5 say how facenet-pytorch should read its own weights
        warnings.filterwarnings(
            "ignore", message="You are using `torch.load`", category=FutureWarning
        )
        stages = [MTCNN(keep_all=True, min_face_size=size, device=device) for size in FACE_SIZES]
    return (
        torch.nn.ModuleList(stages).eval().to(memory_format=torch.channels_last)
    )  # a third faster on CPUs


def follow_face(found: list[np.ndarray]) -> list[int | None]:
    """The index of one face in each frame's boxes (N, 4), or None where it is not seen.

    From each box a track grows both ways through time: the nearest box, if it is no farther than the face is wide and
    of similar size. The track with the largest mean size times the cube of the share of frames that it is seen in
    wins: a face that stays beats a larger one that passes.
    """
    corners = [boxes.reshape(-1, 2, 2) for boxes in found]
    middles, sides = (
        [c.mean(axis=1) for c in corners],
        [np.ptp(c, axis=1).max(axis=1) for c in corners],
    )
    best, best_score = {}, 0.0
    for first, start in (
        (t, index) for t, boxes in enumerate(found) for index in range(len(boxes))
    ):
        track = {first: start}
        for times in (range(first + 1, len(found)), reversed(range(first))):
            last = first
            for t in times:
                size, middle = sides[last][track[last]], middles[last][track[last]]
                distance = np.linalg.norm(middles[t] - middle, axis=1)
                near = (distance < size) & (sides[t] < 2 * size) & (sides[t] > size / 2)
                if near.any():
                    track[t] = int(np.where(near, distance, np.inf).argmin())
                    last = t
        score = (
            np.mean([sides[t][index] for t, index in track.items()])
            * (len(track) / len(found)) ** 3
        )
        if score > best_score:
            best, best_score = track, score
    return [best.get(t) for t in range(len(found))]


def find_face(
    frames: list[np.ndarray], detector: Iterable[Any] | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The face of a clip: boxes (T, 4) and landmarks (T, 5, 2) in pixels, and the share of frames that show it.

    Without any face, or without a detector, the boxes and landmarks are NaN and the share is 0.
    """
    no_face = np.full((len(frames), 4), np.nan), np.full((len(frames), 5, 2), np.nan), 0.0
    if detector is None:
        return no_face
    looked_at = np.unique(np.linspace(0, len(frames) - 1, DETECTION_FRAMES).round().astype(int))
    scale = min(1.0, DETECTION_SIDE / max(frames[0].shape[:2]))
    small = [
        cv2.resize(frames[i], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        for i in looked_at
    ]
    found = [np.zeros((0, 14))] * len(small)  # a row a face: its box and landmarks
    for stage in detector:
        faceless = [i for i, faces in enumerate(found) if not len(faces)]
        if not faceless or min(small[0].shape[:2]) < stage.min_face_size:
            continue
        try:
            boxes, _, landmarks = stage.detect(
                np.stack([small[i] for i in faceless]), landmarks=True
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except (
            IndexError,
            RuntimeError,
            ValueError,
        ) as error:  # facenet-pytorch stumbles over boxes without area
            raise VideoError(f"the face detector failed: {error}") from error
        for i, box, points in zip(faceless, boxes, landmarks, strict=True):
            if box is not None:
                found[i] = np.hstack([box, points.reshape(-1, 10)]).astype(float) / scale
    picks = follow_face([faces[:, :4] for faces in found])
    seen = [i for i, pick in enumerate(picks) if pick is not None]
    if not seen:
        return no_face
    track = np.stack([found[i][picks[i]] for i in seen])
    track = np.stack(
        [np.interp(range(len(frames)), looked_at[seen], values) for values in track.T], axis=1
    )
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
OWN_TABLES = ("train.csv", "val.csv", "test.csv", "skipped.csv")  # what cell 9 writes in data/


def require_own_tables(folder: Path) -> None:
    """Raise FileExistsError if a table that cell 9 would write in `folder` is there and somebody else's: a manifest."""
    for file in map(folder.joinpath, OWN_TABLES):
        if file.exists() and not {"clip_file", "reason"} & set(
            pd.read_csv(file, nrows=0, encoding_errors="replace")
        ):
            raise FileExistsError(
                f"{file} would be overwritten, and is not of this notebook: choose another WORK_DIR"
            )


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder."""
    for file in folder.glob(".partial-*"):
        process = file.name.split("-")[1]
        if process.isdecimal() and (
            int(process) == os.getpid() or not psutil.pid_exists(int(process))
        ):
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class ClipSettings:
    """What shapes a clip; see the parameters of the same names. `frames` are those of all clips of a video."""

    frames: int
    seconds: float
    size: int
    face_crop: bool
    margin: float

    @classmethod
    def of(cls, config: Config | SimpleNamespace) -> "ClipSettings":
        frames = config.FRAMES_PER_VIDEO * config.CLIPS_PER_VIDEO
        return cls(
            frames, config.CLIP_SECONDS, config.IMAGE_SIZE, config.FACE_CROP, config.FACE_MARGIN
        )


@dataclass
class Clip:
    """A video as the network sees it.

    `frames` (T, S, S, 3) uint8 RGB; `squares` (T, 3), the left, top and side of the crops in the video's pixels;
    `landmarks` (T, 5, 2), eyes, nose and corners of the mouth in the crops' pixels, NaN without a face;
    `face_share`, the share of the frames looked at that show the face; `positions` (T,), their numbers in the video.
    """

    frames: np.ndarray
    squares: np.ndarray
    landmarks: np.ndarray
    face_share: float
    positions: np.ndarray


def make_clip(path: Path, settings: ClipSettings, detector: torch.nn.ModuleList | None) -> Clip:
    """Decode, crop and resize one video. Raises VideoError with the reason if it cannot be used."""
    frames, positions = read_frames(path, settings.frames, settings.seconds)
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
    return Clip(np.stack(crops), squares, landmarks.round(2).astype(np.float32), share, positions)


def clip_file(path: Path, settings: ClipSettings, cache_dir: Path) -> Path:
    """Where the clip of a video is cached: a name for this file, at this size and age, with these settings."""
    stat = path.stat()
    identity = [CLIP_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, asdict(settings)]
    return cache_dir / (hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24] + ".npz")


def is_intact(file: Path) -> bool:
    """Whether a cached clip is there, and every byte of it agrees with its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False


def cached_clip(
    path: Path, settings: ClipSettings, cache_dir: Path, detector: torch.nn.ModuleList | None
) -> dict:
    """Make sure that a video's clip is in the cache; returns what the tables say of it."""
    try:
        file = clip_file(path, settings, cache_dir)
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error
    if not is_intact(file):
        with replacing(file) as partial_file, open(partial_file, "wb") as stream:
            np.savez(stream, **vars(make_clip(path, settings, detector)))
    with np.load(file) as saved:
        distinct_frames = len(np.unique(saved["positions"]))
        return dict(
            clip_file=str(file),
            face_share=float(saved["face_share"]),
            distinct_frames=distinct_frames,
        )


def require_space(videos: pd.DataFrame, settings: ClipSettings, cache_dir: Path) -> str:
    """Compare what the clips still to be made will need with the free disk; says so in words.

    Raises OSError, with both figures, if there is too little room.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        remove_partial_files(cache_dir)
    except OSError as error:
        raise OSError(
            f"CACHE_DIR {cache_dir} is no folder to write to: {error.strerror}"
        ) from error
    missing = sum(
        not clip_file(path, settings, cache_dir).exists() for path in videos.path if path.exists()
    )
    needed = missing * (settings.frames * settings.size**2 * 3 + 4096) / 2**30
    free = shutil.disk_usage(cache_dir).free / 2**30
    words = f"{missing} clips to make, {1024 * needed:.0f} MiB; {free:.1f} GiB free in {cache_dir}"
    if needed > free:
        raise OSError(
            f"{words}. Set CACHE_DIR to a folder with more room, or take fewer videos, fewer frames or smaller images"
        )
    return words


def cache_clips(
    videos: pd.DataFrame,
    settings: ClipSettings,
    cache_dir: Path,
    detector: torch.nn.ModuleList | None,
    workers: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the clips of all videos, several at a time in threads (OpenCV decodes outside Python's lock).

    Returns:
        The usable videos with `clip_file`, `face_share` and `distinct_frames`, and the others with a `reason`.
    """
    outcomes: dict[int, dict] = {}
    skipped = 0

    def outcome(path: Path) -> dict:
        try:
            return cached_clip(path, settings, cache_dir, detector)
        except (VideoError, cv2.error) as error:
            return dict(reason=str(error))

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        jobs = {pool.submit(outcome, row.path): row.Index for row in videos.itertuples()}
        with tqdm(
            as_completed(jobs),
            total=len(jobs),
            desc="videos to clips",
            leave=False,
            disable=NO_BARS,
        ) as bar:
            for job in bar:
                outcomes[jobs[job]] = job.result()
                skipped += "reason" in job.result()
                bar.set_postfix(skipped=skipped, refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)
    table = videos.join(
        pd.DataFrame.from_dict(outcomes, orient="index", columns=[*CLIP_COLUMNS, "reason"])
    )
    usable = table.reason.isna()
    good = table[usable].drop(columns="reason").astype({"distinct_frames": int})
    return good.reset_index(drop=True), table[~usable].drop(columns=[*CLIP_COLUMNS]).reset_index(
        drop=True
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
    portrait: Any = cv2.imdecode(
        np.fromfile(file, np.uint8), cv2.IMREAD_COLOR
    )  # imread fails on some Windows paths
    return portrait.astype(np.float32) / 255


def reshaped(portrait: np.ndarray, rng: np.random.Generator, strength: float = 6) -> np.ndarray:
    """The portrait (H, W, C) with smooth random displacements of about `strength` pixels: another person."""
    height, width = portrait.shape[:2]
    shift = cv2.resize(
        rng.normal(0, strength, (7, 6, 2)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        portrait,
        x + shift[..., 0],
        y + shift[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )


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
        small = cv2.resize(
            person,
            None,
            fx=(scale := rng.uniform(0.1, 0.16)),
            fy=scale,
            interpolation=cv2.INTER_AREA,
        )
        return [
            person
            + mask * (cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR) - person)
        ] * frames
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
    cv2.fillPoly(
        outline,
        [np.array([[20, 600], [35, 400], [200, 310], [330, 310], [490, 390], [512, 600]])],
        1,
    )
    outline = cv2.GaussianBlur(outline, (0, 0), 5)[..., None]
    person = reshaped(np.concatenate([portrait, outline], axis=2), rng)
    person, outline = person[..., :3], person[..., 3:]
    if rng.random() < 0.5:
        person, outline = person[:, ::-1].copy(), outline[:, ::-1].copy()
    width, height = (int(side) for side in rng.choice([224, 240, 256, 288], 2))
    count = int(rng.integers(*DEMO_FRAMES))
    colours = rng.uniform(0.2, 0.8, 3) + rng.normal(0, 0.08, (5, 5, 3))
    backdrop = cv2.resize(
        colours.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    time = np.arange(count) / DEMO_FPS

    def wave(amplitude: float) -> np.ndarray:
        rates, phases = rng.uniform(0.2, 0.8, 2), rng.uniform(0, 2 * np.pi, 2)
        return amplitude * np.sin(2 * np.pi * rates[:, None] * time + phases[:, None]).mean(axis=0)

    zoom, angle = rng.uniform(0.42, 0.56) * np.exp(wave(0.06)), rng.normal(0, 4) + wave(8)
    x, y = width * rng.uniform(0.42, 0.58) + wave(14), height * rng.uniform(0.42, 0.52) + wave(8)
    light = rng.uniform(0.75, 1.1) * rng.normal(1, 0.04, 3) * (1 + wave(0.1))[:, None]
    blur, noise, quality = (
        rng.uniform(0.3, 0.9),
        rng.uniform(0.005, 0.025),
        int(rng.integers(60, 96)),
    )

    own = np.random.default_rng([seed, number, 1 + ("real", *DEMO_METHODS).index(method)])
    pictures = (
        [person] * count if method == "real" else manipulated(person, portrait, method, count, own)
    )
    frames: list[Any] = []
    for t, picture in enumerate(pictures):
        pose = cv2.getRotationMatrix2D(FACE_CENTRE, angle[t], zoom[t])
        pose[:, 2] += (x[t] - FACE_CENTRE[0], y[t] - FACE_CENTRE[1])
        picture = cv2.warpAffine(
            np.concatenate([picture, outline], axis=2),
            pose,
            (width, height),
            flags=cv2.INTER_LINEAR,
        )
        frame = backdrop + picture[..., 3:] * (picture[..., :3] - backdrop)
        frame = cv2.GaussianBlur(frame * light[t].astype(np.float32), (0, 0), blur)
        frame = frame + own.standard_normal(frame.shape, np.float32) * noise
        _, jpeg = cv2.imencode(
            ".jpg", (frame.clip(0, 1) * 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality]
        )
        frames.append(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    return frames


def write_video(file: Path, frames: list[np.ndarray], fps: float) -> None:
    """Write BGR frames as MPEG-4; raises OSError where OpenCV cannot."""
    with replacing(file) as partial_file:
        writer = cv2.VideoWriter(
            str(partial_file), cv2.VideoWriter.fourcc(*"mp4v"), fps, frames[0].shape[1::-1]
        )
        if not writer.isOpened():
            raise OSError(
                f"OpenCV {cv2.__version__} cannot write {partial_file}: no MPEG-4 encoder, or no room"
            )
        for frame in frames:
            writer.write(frame)
        writer.release()


def make_demo_set(folder: Path, per_class: int, seed: int, workers: int) -> Path:
    """Make `per_class` real videos and a fake of each below `folder`; those already there are kept."""
    portrait = load_portrait()
    for kind in ("real", "fake"):
        remove_partial_files(folder / kind)

    def make(number: int) -> None:
        method = DEMO_METHODS[number % len(DEMO_METHODS)]
        for kind, file in (
            ("real", f"real/{number:04}.mp4"),
            (method, f"fake/{number:04}__{method}.mp4"),
        ):
            if not (folder / file).exists():
                write_video(folder / file, demo_frames(portrait, number, kind, seed), DEMO_FPS)

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(make, number) for number in range(per_class)]
        for job in tqdm(
            as_completed(jobs), total=per_class, desc="demo set", leave=False, disable=NO_BARS
        ):
            job.result()
    return folder
