"""The preparation of data as users run it: whole, interrupted, repeated, and with things that go wrong."""

import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, script

from cell_03_data_processing import make_demo_set, write_video

SMALL = dict(FRAMES_PER_VIDEO=4, IMAGE_SIZE=64, VAL_FRACTION=0.25, TEST_FRACTION=0.25, WORK_DIR=".")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """40 real videos, a fake of each, and a file that is none."""
    folder = make_demo_set(tmp_path_factory.mktemp("videos"), 40, seed=3, workers=2)
    (folder / "fake" / "broken.mp4").write_text("no video")
    return folder


def preparation(work_dir: Path, videos: Path, **parameters: object) -> dict:
    """How to start cell 9 as a script in a folder of its own."""
    work_dir.mkdir(exist_ok=True)
    return script("cell_09_data_preparation", work_dir, **{**SMALL, "DATA_DIR": videos, **parameters})


def prepare(work_dir: Path, videos: Path, **parameters: object) -> str:
    """Run cell 9 to its end; returns what it printed."""
    done = subprocess.run(**preparation(work_dir, videos, **parameters), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    """A preparation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare(folder, videos)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clips(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/[!.]*.npz")}


def test_a_preparation_killed_ten_times_ends_as_if_it_never_was(videos, prepared, tmp_path):
    delays, kept = random.Random(0), {}
    for kill in range(10):
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(**preparation(tmp_path, videos), **quiet)
        while clips(tmp_path).keys() <= kept.keys() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = clips(tmp_path)
        assert kept.items() <= now.items(), "finished clips are kept, and not made again"
        assert len(now) > len(kept) or kill > 5
        kept = now
    prepare(tmp_path, videos)
    assert kept.items() <= clips(tmp_path).items()
    whole, mended = tree(prepared[0]), tree(tmp_path)
    assert sorted(mended) == sorted(whole)
    assert [name for name in whole if whole[name] != mended[name]] == []


def test_settings_that_shape_clips_make_new_ones_and_others_do_not(videos, prepared):
    folder, _ = prepared
    before = clips(folder)
    prepare(folder, videos, EPOCHS=3, SEED=7, BACKBONE="resnet18")
    assert clips(folder) == before
    prepare(folder, videos, IMAGE_SIZE=48)
    after = clips(folder)
    assert len(after) == 2 * len(before) and before.items() <= after.items()


def test_the_notebook_shows_what_was_found_and_what_was_skipped(prepared, videos):
    folder, text = prepared
    assert "81 videos in 41 groups" in text and "; 0 cannot be used" in text and "Skipped: 1 videos" in text
    assert "broken.mp4" in text and "no pictures that can be decoded" in text
    assert all(f"{method}  " in text for method in ("blend", "jitter", "lowres", "real"))
    skipped = pd.read_csv(folder / "data" / "skipped.csv")
    assert skipped.path.tolist() == [str(videos / "fake" / "broken.mp4")] and "not a video" in skipped.reason[0]
    tables = [pd.read_csv(folder / "data" / f"{name}.csv") for name in ("train", "val", "test")]
    assert sum(map(len, tables)) == 80
    assert set.intersection(*(set(table.group) for table in tables)) == set()


def test_too_little_disk_space_is_an_error_with_both_figures_before_any_work(videos, tmp_path):
    start = preparation(tmp_path, videos)
    full = "import runpy, shutil, sys; usage = shutil.disk_usage('/')._replace(free=1000)"
    full += "; shutil.disk_usage = lambda _: usage"
    start["args"][1:] = ["-c", f"{full}; runpy.run_path(sys.argv[1], run_name='__main__')", start["args"][1]]
    start["env"]["PYTHONPATH"] = str(ROOT / "kaggle_cells")
    done = subprocess.run(**start, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "81 clips to make, 12 MiB; 0.0 GiB free" in done.stderr and "Set CACHE_DIR" in done.stderr
    assert clips(tmp_path) == {}


def test_a_recording_on_both_sides_of_a_given_split_is_shown_with_its_videos(tmp_path):
    names = [f"{s}/{c}/{s}{i}.mp4" for s in ("train", "val", "test") for c in ("real", "fake") for i in "12"]
    for number, name in enumerate([*names, "train/real/004.mp4", "test/fake/004_982.mp4"]):
        frames = np.random.default_rng(number).integers(0, 256, (8, 48, 64, 3), np.uint8)
        write_video(tmp_path / "set" / name, list(frames), 10)
    text = prepare(tmp_path / "work", tmp_path / "set", FACE_CROP=False)
    assert "1 groups are in more than one split" in text
    assert "004.mp4" in text and "004_982.mp4" in text


def test_the_manifests_of_a_user_are_never_overwritten(videos, tmp_path):
    for name in ("train", "val", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.csv").write_text(f"path,label\n{videos}/real/0000.mp4,0\n")
    before = tree(tmp_path)
    done = subprocess.run(**preparation(tmp_path, "auto"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "train.csv would be overwritten" in done.stderr
    assert tree(tmp_path) == before


def test_a_video_that_fails_gives_its_place_to_another(tmp_path):
    videos = make_demo_set(tmp_path / "videos", 16, seed=3, workers=2)
    for number in range(0, 12, 2):
        (videos / "fake" / f"broken{number}.mp4").write_text(f"no video {number}")
    text = prepare(tmp_path / "work", videos, MAX_VIDEOS_PER_CLASS=14, FACE_CROP=False)
    tables = [pd.read_csv(tmp_path / "work" / "data" / f"{name}.csv") for name in ("train", "val", "test")]
    assert sum(table.label.sum() for table in tables) == 14, text
