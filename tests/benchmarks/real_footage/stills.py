"""Bring the stills that stage one is trained on into a folder that the notebook takes as DATA_DIR.

    python tests/benchmarks/real_footage/stills.py FOLDER [--mirrors FOLDER_OF_MIRRORS]
        [--reals 2500]

FOLDER/dfdc gets 95,634 face crops of the Deepfake Detection Challenge with their list, from the
repository i-Shreyansh/DeepFake-Detection; FOLDER/utkface gets real faces of UTKFace, from
mattans/AgeProgression, without grey ones and those with black corners. `--reals` takes so many real
pictures of each, with a fake of each: enough beside videos in stage two. The terms of both datasets
apply (research). Reading takes a minute from mirrors; without, both repositories are cloned,
some 600 MB.
"""

import argparse
import io
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from assemble import git_folder
from PIL import Image

DFDC, UTKFACE = "i-Shreyansh/DeepFake-Detection", "mattans/AgeProgression"


def blobs_below(git: Path, folder: str) -> dict[str, list[str]]:
    """The names of the files below a folder, by their blob."""
    command = ["git", "--git-dir", str(git), "ls-tree", "-r", "HEAD", folder]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names: dict[str, list[str]] = {}
    for line in listing.splitlines():
        meta, name = line.split("\t")
        names.setdefault(meta.split()[2], []).append(Path(name).name)
    return names


def all_blobs(git: Path) -> Iterator[tuple[str, bytes]]:
    """Every object of a repository in the order of its pack: much faster than by name."""
    options = "--batch-all-objects", "--batch", "--unordered"
    command = ["git", "--git-dir", str(git), "cat-file", *options]
    environment = {**os.environ, "GIT_NO_LAZY_FETCH": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as program:
        assert program.stdout is not None
        while header := program.stdout.readline().split():
            content = program.stdout.read(int(header[2]))
            program.stdout.read(1)
            yield header[0].decode(), content


def extract(git: Path, folder: str, wanted: set[str] | None, target: Path) -> None:
    """Write the files below `folder` that are `wanted`, all if None."""
    target.mkdir(parents=True, exist_ok=True)
    names = blobs_below(git, folder)
    for blob, content in all_blobs(git):
        for name in names.get(blob, ()):
            if wanted is None or name in wanted:
                (target / name).write_bytes(content)


def is_clean(content: bytes) -> bool:
    """Whether a picture is coloured and has no black corners, as rotated crops have."""
    small = np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((50, 50))).astype(int)
    corners = [
        small[y][:, x] for y in (slice(4), slice(-4, None)) for x in (slice(4), slice(-4, 50))
    ]
    return np.abs(small[..., 0] - small[..., 2]).mean() >= 4 and min(c.max() for c in corners) >= 12


def dfdc(git: Path, target: Path, reals: int) -> None:
    content = subprocess.run(
        ["git", "--git-dir", str(git), "show", "HEAD:metadata.csv"], capture_output=True, check=True
    )
    table = pd.read_csv(io.BytesIO(content.stdout))
    if reals:
        with_fakes = table[(table.label == "REAL") & table.videoname.isin(table.original)]
        picked = with_fakes.sample(reals, random_state=0)
        fakes = table[table.original.isin(picked.videoname)].groupby("original").head(1)
        table = pd.concat([picked, fakes])
    extract(
        git, "faces_224", {f"{name[:-4]}.jpg" for name in table.videoname}, target / "faces_224"
    )
    table.to_csv(target / "metadata.csv", index=False)


def utkface(git: Path, target: Path, reals: int) -> None:
    extract(git, "data/UTKFace/unlabeled", None, target)
    for number, file in enumerate(sorted(target.glob("*.chip.jpg"), key=lambda f: f.name[::-1])):
        keep = is_clean(file.read_bytes()) and (not reals or number < 1.2 * reals)
        if keep:
            file.rename(target / f"{file.name.split('.')[0]}.jpg")
        else:
            file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mirrors", type=Path)
    parser.add_argument("--reals", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as clones:
        for repo, write, target in (
            (DFDC, dfdc, given.folder / "dfdc"),
            (UTKFACE, utkface, given.folder / "utkface" / "real"),
        ):
            git = git_folder(repo, given.mirrors, Path(clones), with_files=True)
            if git is None:
                raise SystemExit(f"{repo} is not there")
            write(git, target, given.reals)
            pictures = len(list(target.rglob("*.jpg")))
            print(f"{pictures} pictures in {target}", flush=True)
            if not pictures:
                raise SystemExit(f"{repo} has none of the pictures: its files are not in {git}")


if __name__ == "__main__":
    main()
