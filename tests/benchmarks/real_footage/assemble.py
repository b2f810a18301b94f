"""Bring the videos of videos.tsv into one folder that the notebook takes as DATA_DIR.

    python tests/benchmarks/real_footage/assemble.py FOLDER [--mirrors FOLDER_OF_MIRRORS]

The list names public files: repository, git blob, SHA-256, label, generator (`method`), `kind` of
manipulation, and the `group` that must not cross a split. Each repository is cloned without its
files from GitHub and asked for the blobs wanted, or read from MIRRORS/OWNER+NAME/repo. Every file
is checked against its SHA-256 and written completely or not at all; what is there already is kept.
A row with a crop is one half of a side-by-side video and is cut out, and so encoded again, with
ffmpeg (imageio-ffmpeg). Writes FOLDER/manifest.csv; exit status 1 if files are missing.

The videos belong to their owners, whose terms apply: use them for research, and do not pass them
on.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

LIST = Path(__file__).with_name("videos.tsv")
QUIET = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}


def git_folder(
    repo: str, mirrors: Path | None, clones: Path, *, with_files: bool = False
) -> Path | None:
    """The git directory of a repository; None if there is none.

    Without mirrors it is cloned: either `with_files`, those of the newest commit, or with the whole
    history and no files, which git fetches one by one when they are read.
    """
    if mirrors:
        folder = mirrors / repo.replace("/", "+") / "repo"
        places = [place for place in (folder, folder / ".git") if (place / "objects").is_dir()]
        return places[0] if places else None
    folder = clones / repo.replace("/", "+")
    part = "--depth=1" if with_files else "--filter=blob:none"
    command = ["git", "clone", "--quiet", "--bare", part, f"https://github.com/{repo}"]
    if not folder.exists() and subprocess.run([*command, folder], env=QUIET).returncode:
        return None
    return folder


def read_blob(git: Path, blob: str) -> bytes:
    """The content of a file; empty if it cannot be had."""
    command = ["git", "--git-dir", str(git), "cat-file", "blob", blob]
    return subprocess.run(command, capture_output=True, env=QUIET).stdout


def cut_out(content: bytes, file: Path, row: pd.Series) -> None:
    """Write a part of the picture of a video as a file of its own. Raises CalledProcessError."""
    import imageio_ffmpeg

    box = ":".join(str(int(row[f"crop_{side}"])) for side in "whxy")
    encoding = ["-c:v", "libx264", "-crf", "12", "-preset", "superfast", "-pix_fmt", "yuv420p"]
    with tempfile.NamedTemporaryFile(suffix=".mp4") as whole:
        whole.write(content)
        whole.flush()
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", whole.name]
        subprocess.run(
            [*command, "-vf", f"crop={box}", *encoding, "-an", "-f", "mp4", file], check=True
        )


def file_of(row: pd.Series, folder: Path) -> Path:
    half = "" if pd.isna(row.crop_w) else f"-x{row.crop_x:.0f}"
    return folder / row.label / row.method / f"{Path(row.repo).name[:24]}-{row.blob[:12]}{half}.mp4"


def fetch(row: pd.Series, git: Path | None, file: Path) -> str:
    """Write one video; returns what went wrong."""
    if git is None:
        return "no such repository"
    content = read_blob(git, row.blob)
    if not content:
        return f"{row.path_in_repo} is not there"
    if hashlib.sha256(content).hexdigest() != row.sha256:
        return f"{row.path_in_repo} is another file than the one listed"
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".partial")
    try:
        if pd.isna(row.crop_w):
            unfinished.write_bytes(content)
        else:
            cut_out(content, unfinished, row)
    except subprocess.CalledProcessError as error:
        unfinished.unlink(missing_ok=True)
        return f"{row.path_in_repo}: ffmpeg fails ({error.returncode})"
    unfinished.replace(file)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mirrors", type=Path)
    given = parser.parse_args()
    videos, missing = pd.read_csv(LIST, sep="\t"), 0
    with tempfile.TemporaryDirectory() as clones:
        for repo, rows in videos.groupby("repo"):
            files = [file_of(row, given.folder) for _, row in rows.iterrows()]
            if all(file.exists() for file in files):
                continue
            git = git_folder(str(repo), given.mirrors, Path(clones))
            for file, (_, row) in zip(files, rows.iterrows(), strict=True):
                if not file.exists() and (problem := fetch(row, git, file)):
                    print(f"{repo}: {problem}")
                    missing += 1
    places = [file_of(row, given.folder) for _, row in videos.iterrows()]
    videos["path"] = [str(place.relative_to(given.folder)) for place in places]
    videos["cut"] = videos.crop_w.notna()
    videos.loc[videos.label == "real", "method"] = "real"
    there = videos[[place.exists() for place in places]]
    columns = ["path", "label", "method", "kind", "group", "cut"]
    there[columns].to_csv(given.folder / "manifest.csv", index=False)
    print(f"{len(there)} of {len(videos)} videos in {given.folder}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
