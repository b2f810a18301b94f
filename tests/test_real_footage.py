"""The scripts that bring public footage, against repositories that stand in for GitHub's."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from processes import ROOT

SCRIPTS = ROOT / "tests" / "benchmarks" / "real_footage"


def git(*arguments: str | Path, cwd: Path) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def publish(folder: Path, files: dict[str, bytes]) -> None:
    """A repository with these files that can be cloned without them, as GitHub's can."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git("init", "-q", cwd=folder)
    git("config", "uploadpack.allowFilter", "true", cwd=folder)
    git("config", "uploadpack.allowAnySHA1InWant", "true", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-q", "-m", "files", cwd=folder)


@pytest.fixture
def github(tmp_path, monkeypatch):
    """A folder whose repositories git takes for GitHub's."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{tmp_path}/github/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
    return tmp_path / "github"


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(30, 255, (40, 40, 3), np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def publish_stills(github: Path, *, faces: bool) -> None:
    table = pd.DataFrame(
        [("r1.mp4", "REAL", None), ("f1.mp4", "FAKE", "r1.mp4"), ("f2.mp4", "FAKE", "r1.mp4")],
        columns=["videoname", "label", "original"],
    )
    names = [f"faces_224/{name}.jpg" for name in ("r1", "f1", "f2")] if faces else ["README"]
    files = {name: picture(number) for number, name in enumerate(names)}
    files["metadata.csv"] = table.to_csv(index=False).encode()
    publish(github / "i-Shreyansh" / "DeepFake-Detection", files)
    grey = cv2.imencode(".jpg", np.full((40, 40, 3), 128, np.uint8))[1].tobytes()
    below = "data/UTKFace/unlabeled"
    faces_of_utk = {f"{below}/1.jpg.chip.jpg": picture(5), f"{below}/2.jpg.chip.jpg": grey}
    publish(github / "mattans" / "AgeProgression", faces_of_utk)


def test_stills_come_from_github_without_mirrors(github, tmp_path):
    publish_stills(github, faces=True)
    done = run("stills.py", tmp_path / "stills")
    assert done.returncode == 0, done.stderr
    dfdc, utkface = tmp_path / "stills" / "dfdc", tmp_path / "stills" / "utkface" / "real"
    assert sorted(f.name for f in dfdc.rglob("*.jpg")) == ["f1.jpg", "f2.jpg", "r1.jpg"]
    assert (dfdc / "faces_224" / "r1.jpg").read_bytes() == picture(0)
    assert [f.name for f in utkface.iterdir()] == ["1.jpg"]  # the grey one is left out


def test_stills_that_are_not_there_are_an_error(github, tmp_path):
    publish_stills(github, faces=False)
    done = run("stills.py", tmp_path / "stills")
    assert done.returncode and "i-Shreyansh/DeepFake-Detection has none" in done.stderr


def test_the_corpus_is_assembled_checked_and_whole(github, tmp_path, monkeypatch):
    contents = {"a.mp4": b"first video", "b.mp4": b"second video", "c.mp4": b"no video to cut"}
    publish(github / "some" / "body", contents)
    blobs = {
        name: git("rev-parse", f"HEAD:{name}", cwd=github / "some" / "body") for name in contents
    }
    rows = pd.DataFrame(
        {
            "repo": "some/body",
            "blob": [blobs[name] for name in contents],
            "path_in_repo": list(contents),
            "label": ["real", "fake", "fake"],
            "method": ["web", "Swap", "Swap"],
            "kind": ["real", "faceswap", "faceswap"],
            "group": ["g1", "g1", "g2"],
            "sha256": [hashlib.sha256(content).hexdigest() for content in contents.values()],
            **{f"crop_{side}": [None, None, 8] for side in "xywh"},
        }
    )
    rows.loc[1, "sha256"] = "0" * 64
    listed = tmp_path / "videos.tsv"
    rows.to_csv(listed, sep="\t", index=False)
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import assemble, pathlib\n"
    code += f"assemble.LIST = pathlib.Path({str(listed)!r}); sys.exit(assemble.main())"
    command = [sys.executable, "-c", code, str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1  # two are missing, and both are named with the reason
    assert "b.mp4 is another file than the one listed" in done.stdout
    assert "c.mp4: ffmpeg fails" in done.stdout and "1 of 3 videos" in done.stdout
    (video,) = (tmp_path / "corpus" / "real" / "web").iterdir()
    assert video.read_bytes() == b"first video"
    assert [*(tmp_path / "corpus").rglob("*.partial")] == []
    manifest = pd.read_csv(tmp_path / "corpus" / "manifest.csv")
    assert manifest.path.tolist() == [str(video.relative_to(tmp_path / "corpus"))]
