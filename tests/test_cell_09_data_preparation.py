"""Data preparation as users run it: complete, interrupted, repeated, and with bad input."""

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_program, run_script, start_script

from cell_03_data_processing import write_video

SMALL = dict(
    FRAMES_PER_VIDEO=4, CLIPS_PER_VIDEO=1, IMAGE_SIZE=64, VAL_FRACTION=0.25, TEST_FRACTION=0.25
)


@pytest.fixture(scope="module")
def videos(demo_set, tmp_path_factory):
    """12 real videos, a fake of each, and a file that is none."""
    folder = shutil.copytree(demo_set, tmp_path_factory.mktemp("videos") / "set")
    (folder / "fake" / "broken.mp4").write_text("no video")
    return folder


def preparation(videos: Path | str, **parameters: object) -> dict:
    return {**SMALL, "DATA_DIR": videos, **parameters}


def prepare(work_dir: Path, videos: Path | str, expect: int = 0, **parameters: object) -> str:
    """Run cell 9 to its end; returns what it printed."""
    return run_script(
        "cell_09_data_preparation", work_dir, expect, **preparation(videos, **parameters)
    )


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    """A preparation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare(folder, videos)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def clips(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/[!.]*.npz")}


def test_a_share_for_a_dataset_that_is_not_there_is_refused(videos, tmp_path):
    text = prepare(tmp_path, videos, expect=1, DATASET_SHARES='["Set 3", "set 1"]')
    assert "DATASET_SHARES: Set not among set" in text


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_preparation_killed_again_and_again_ends_as_if_it_never_was(
    kills, videos, prepared, tmp_path
):
    delays, kept = random.Random(kills), {}
    for _ in range(kills):
        program = start_script("cell_09_data_preparation", tmp_path, **preparation(videos))
        while clips(tmp_path).keys() <= kept.keys() and program.is_running:
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.03))
        program.kill()
        now = clips(tmp_path)
        assert kept.items() <= now.items(), "finished clips are kept, and not made again"
        assert len(now) > len(kept) or len(kept) == 24, "each start makes some of those missing"
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
    assert (
        "25 videos in 13 groups" in text
        and "; 0 cannot be used" in text
        and "Skipped: 1 video. " in text
    )
    assert "broken.mp4" in text and "no frames can be decoded" in text
    assert all(f"{method}  " in text for method in ("blend", "jitter", "lowres", "real"))
    skipped = pd.read_csv(folder / "data" / "skipped.csv")
    assert (
        skipped.path.tolist() == [str(videos / "fake" / "broken.mp4")]
        and "not a video" in skipped.reason[0]
    )
    tables = [pd.read_csv(folder / "data" / f"{name}.csv") for name in ("train", "val", "test")]
    assert sum(map(len, tables)) == 24
    assert set.intersection(*(set(table.group) for table in tables)) == set()


def test_too_little_disk_space_is_an_error_with_both_figures_before_any_work(videos, tmp_path):
    full = """import shutil
usage = shutil.disk_usage("/")._replace(free=1000)
shutil.disk_usage = lambda _: usage
import cell_09_data_preparation
"""
    printed = run_program(full, tmp_path, expect=1, **preparation(videos))
    assert "25 clips to make, 1 MiB; 0.0 GiB free" in printed and "Set CACHE_DIR" in printed
    assert clips(tmp_path) == {}


def test_a_recording_on_both_sides_of_a_given_split_is_shown_with_its_videos(tmp_path):
    names = [
        f"{s}/{c}/{s}{i}.mp4"
        for s in ("train", "val", "test")
        for c in ("real", "fake")
        for i in "12"
    ]
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
    assert "train.csv would be overwritten" in prepare(tmp_path, "auto", expect=1)
    assert tree(tmp_path) == before


def test_a_video_that_fails_gives_its_place_to_another(demo_set, tmp_path):
    videos = shutil.copytree(demo_set, tmp_path / "videos")
    for number in range(0, 12, 2):
        (videos / "fake" / f"broken{number}.mp4").write_text(f"no video {number}")
    text = prepare(tmp_path / "work", videos, MAX_VIDEOS_PER_CLASS=10, FACE_CROP=False)
    tables = [
        pd.read_csv(tmp_path / "work" / "data" / f"{name}.csv") for name in ("train", "val", "test")
    ]
    assert sum(table.label.sum() for table in tables) == 10, text
