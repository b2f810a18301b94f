import collections
import dataclasses
import gc
import json
import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conftest
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cell_03_data_processing as cell
from cell_01_imports_and_setup import replacing, save_csv
from cell_03_data_processing import VideoError, find_videos, read_frames, split_videos

SLOW = pytest.mark.slow
SMALL = cell.ClipSettings(**conftest.SMALL)
PLAIN = cell.ClipSettings(frames=4, seconds=8.0, size=32, face_crop=False, margin=0.25)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def counting_video(file, frames=60, size=(96, 64), fps=10.0):
    """A video whose frame i is a grey of 4 * i."""
    cell.write_video(
        file, [np.full((size[1], size[0], 3), 4 * i, np.uint8) for i in range(frames)], fps
    )
    return file


# Finding


def film(root, *names):
    """Tiny videos, every one of them different, below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(list(str(root / name).encode())).integers(
            0, 256, (4, 24, 32, 3), np.uint8
        )
        cell.write_video(root / name, list(noise), 10)
    return root


def by_name(videos):
    return videos.set_index(videos.path.map(lambda path: path.name))


def test_the_users_layout_gives_labels_and_its_own_splits(tmp_path):
    names = [
        f"{s}/{c}/video{i}.mp4"
        for s in ("train", "val", "test")
        for c in ("real", "fake")
        for i in (1, 2)
    ]
    videos = find_videos(film(tmp_path / "mine", *names))
    assert len(videos) == 12 and set(videos.dataset) == {"mine"}
    assert all(row.split in row.path.parts for row in videos.itertuples())
    assert all(("fake" in row.path.parts) == bool(row.label) for row in videos.itertuples())
    assert (
        cell.crossing_groups(videos) == []
    )  # video1 of train and video1 of test are two recordings


@pytest.mark.parametrize(
    "names",
    [
        (
            "train/real/1.mp4",
            "train/fake/2.mp4",
            "val/fake/1.mp4",
            "test/real/3.mp4",
        ),  # a split with one class
        (
            "real/train/1.mp4",
            "fake/Train/2.mp4",
            "fake/valid/1.mp4",
            "real/test/3.mp4",
        ),  # splits below the classes
        (
            "train/a/real/1.mp4",
            "train/a/fake/2.mp4",
            "val/a/fake/3.mp4",
            "test/a/real/3.mp4",
        ),  # above a dataset
    ],
)
def test_given_splits_are_kept_whichever_way_the_folders_are_nested(tmp_path, names):
    videos = find_videos(film(tmp_path, *names))
    assert sorted(videos.split) == ["test", "train", "train", "val"] and set(videos.method) == {
        "real",
        "fake",
    }
    assert videos.dataset.nunique() == 1
    assert cell.crossing_groups(videos) == []  # numbers alone say nothing of recordings


def test_times_in_phone_names_are_no_recording_numbers(tmp_path):
    film(tmp_path, *(f"{c}/20240501_10000{i}.mp4" for i in range(5) for c in ("real", "fake")))
    assert find_videos(tmp_path).group.nunique() == 5


def test_a_dataset_reached_twice_is_used_once(tmp_path):
    film(tmp_path, "set/real/a.mp4", "set/fake/a.mp4")
    (tmp_path / "again").symlink_to(tmp_path / "set")
    assert len(find_videos(tmp_path)) == 2


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        ("004.mp4", "004_982.mp4"),
        ("ffpp_youtube_634.mp4", "ffpp_faceswap_634_660.mp4"),
        ("Ann.mp4", "ann__swap.mp4"),
        ("ann.mp4", "ann__swap.mp4"),
        ("id3_0007.mp4", "id9_id3_0001.mp4"),
        ("a-1.mp4", "df_a-1.mp4"),
    ],
)
def test_one_recording_on_both_sides_of_a_given_split_is_found(tmp_path, real, fake):
    film(tmp_path, f"train/real/{real}", "train/fake/x.mp4", "test/real/y.mp4", f"test/fake/{fake}")
    (crossing,) = cell.crossing_groups(videos := find_videos(tmp_path))
    assert {path.name for path in videos.path[videos.group == crossing]} == {real, fake}


def test_plain_folders_take_method_and_group_from_names_and_subfolders(tmp_path):
    film(tmp_path, "real/ann.mp4", "fake/ann__swap.MP4", "fake/lipsync/bob.mov")
    touch(tmp_path, "fake/.hidden.mp4", "fake/notes.txt", "fake/.cache/c.mp4")
    videos = by_name(find_videos(tmp_path))
    assert set(videos.index) == {"ann.mp4", "ann__swap.MP4", "bob.mov"}
    assert videos.group["ann.mp4"] == videos.group["ann__swap.MP4"] != videos.group["bob.mov"]
    assert videos.method.to_dict() == {
        "ann.mp4": "real",
        "ann__swap.MP4": "swap",
        "bob.mov": "lipsync",
    }


@pytest.mark.parametrize(
    ("stem", "sources"),
    [
        ("004_982", ["004", "982"]),
        ("id0_id16_0003", ["id0_0003", "id0", "id16"]),
        ("id0_0003", ["id0_0003", "id0"]),
        ("01_27__walk_down_hall__yvgy8lok", ["01__walk_down_hall", "01", "27"]),
        ("01__walk_down_hall", ["01__walk_down_hall", "01"]),
        ("ann_lee__swap", ["ann_lee"]),
        ("ann_lee_smiles_2", ["ann_lee"]),
        ("fake-ann_lee-bob", ["ann_lee", "bob"]),
        ("bob__carl__v2", ["bob"]),
        ("王_伪造", ["王"]),
        ("annabel", ["annabel"]),
        ("ann_annabel", ["ann"]),
        ("fake_004_982", ["004", "982"]),
        ("20240501_100004", ["20240501_100004"]),
    ],
)
def test_sources_are_read_from_names(stem, sources):
    assert cell.named_sources(stem, {"ann", "ann_lee", "bob", "王"}) == sources


FF_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")


@pytest.mark.parametrize("mount", ["datasets/xdxd003/ff-c23", "ff-c23"])
def test_faceforensics_on_kaggle_is_found_in_both_mount_layouts_and_grouped_by_source(
    tmp_path, mount
):
    root = tmp_path / mount / "FaceForensics++_C23"
    film(root, "original/004.mp4", "original/982.mp4", "original/100.mp4")
    touch(root, "csv/original.csv")
    for method in FF_METHODS:
        film(root, f"{method}/004_982.mp4", f"{method}/100_101.mp4")
    film(root, "DeepFakeDetection/01_02__outside_talking__YVGY8LOK.mp4")
    with pytest.warns(UserWarning, match="1 DeepFakeDetection videos are left out"):
        videos = find_videos(tmp_path)
    assert len(videos) == 11 and "DeepFakeDetection" not in set(videos.method)
    sources = videos[videos.path.map(lambda p: p.stem in ("004", "982", "004_982"))]
    assert len(sources) == 6 and sources.group.nunique() == 1 and videos.group.nunique() == 2
    assert (
        sources.original.str.contains("982").sum(),
        sources.original.str.contains("004").sum(),
    ) == (1, 5)
    asked = find_videos(tmp_path, ["DeepFakeDetection"])
    assert sorted(asked.method) == ["DeepFakeDetection", "real", "real", "real"]


def test_fakes_of_four_methods_with_one_name_stay_apart(tmp_path):
    film(tmp_path, "original/004.mp4", *(f"{method}/004_982.mp4" for method in FF_METHODS))
    usable, _ = cell.cache_clips(find_videos(tmp_path), PLAIN, tmp_path / "cache", None, 2)
    assert usable.clip_file.nunique() == 5 and set(usable.method) == {"real", *FF_METHODS}
    for row in usable.itertuples():
        with np.load(row.clip_file) as saved:
            assert np.array_equal(saved["frames"], cell.make_clip(row.path, PLAIN, None).frames)


def test_a_recording_number_in_the_name_of_a_real_video_links_it_to_the_fakes_of_its_pairs(
    tmp_path,
):
    film(tmp_path, "real/real_004.mp4", "real/real_100.mp4", "fake/fake_004_982.mp4")
    videos = by_name(find_videos(tmp_path))
    assert videos.group["real_004.mp4"] == videos.group["fake_004_982.mp4"]
    assert videos.original["real_004.mp4"] == videos.original["fake_004_982.mp4"]
    assert videos.group["real_100.mp4"] != videos.group["real_004.mp4"]


def test_the_official_faceforensics_tree_is_found_without_masks_and_actors_come_when_asked_for(
    tmp_path,
):
    film(
        tmp_path / "FF",
        "original_sequences/youtube/c23/videos/004.mp4",
        "original_sequences/youtube/c40/videos/004.mp4",
    )
    film(tmp_path / "FF", "original_sequences/actors/c23/videos/01__exit_phone_room.mp4")
    film(
        tmp_path / "FF", *(f"manipulated_sequences/{m}/c23/videos/004_982.mp4" for m in FF_METHODS)
    )
    film(tmp_path / "FF", "manipulated_sequences/Deepfakes/masks/videos/004_982.mp4")
    film(
        tmp_path / "FF",
        "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__exit_phone_room__YVGY8LOK.mp4",
    )
    with pytest.warns(UserWarning, match="2 DeepFakeDetection videos are left out"):
        videos = find_videos(tmp_path)
    assert (
        sorted(videos.method) == sorted([*FF_METHODS, "real", "real"])
        and videos.group.nunique() == 1
    )
    asked = find_videos(tmp_path, ["DeepFakeDetection", "FaceSwap"])
    actors = asked[asked.path.map(lambda path: "__" in path.name)]
    assert (
        len(asked) == 5
        and sorted(actors.label) == [0, 1]
        and actors.group.nunique() == actors.original.nunique() == 1
    )


def test_dfdc_parts_are_one_dataset_whose_metadata_gives_labels_and_originals(tmp_path):
    parts = {
        "dfdc_00": {
            "aaa.mp4": ("FAKE", "real1.mp4"),
            "real1.mp4": ("REAL", None),
            "gone.mp4": ("FAKE", "real1.mp4"),
        },
        "nested/dfdc_01": {"bbb.mp4": ("FAKE", "real1.mp4"), "real2.mp4": ("REAL", None)},
    }
    for part, entries in parts.items():
        film(tmp_path / part, *(name for name in entries if name != "gone.mp4"))
        lines = {
            n: {"label": label, "split": "train"} | ({"original": o} if o else {})
            for n, (label, o) in entries.items()
        }
        (tmp_path / part / "metadata.json").write_text(json.dumps(lines))
    videos = by_name(find_videos(tmp_path))
    assert set(videos.dataset) == {"DFDC"} and set(videos.split) == {"train"}
    assert videos.label.to_dict() == {
        "aaa.mp4": 1,
        "real1.mp4": 0,
        "gone.mp4": 1,
        "bbb.mp4": 1,
        "real2.mp4": 0,
    }
    assert (
        videos.group["aaa.mp4"]
        == videos.group["bbb.mp4"]
        == videos.group["real1.mp4"]
        != videos.group["real2.mp4"]
    )
    checked, refused = cell.check_files(find_videos(tmp_path), 2)
    assert len(checked) == 4 and [path.name for path in refused.path] == ["gone.mp4"]
    assert refused.reason[0] == "does not exist"


def test_a_metadata_file_of_another_kind_is_no_dfdc_and_a_damaged_one_is_told(tmp_path):
    film(tmp_path, "a/real/x.mp4", "a/fake/x.mp4", "b/y.mp4")
    (tmp_path / "a" / "metadata.json").write_text('{"title": "mine", "x.mp4": {"label": "cat"}}')
    (tmp_path / "b" / "metadata.json").write_text('{"y.mp4": {"label": "FA')
    with pytest.warns(UserWarning, match=r"metadata in .*/b is not used"):
        assert len(find_videos(tmp_path)) == 2


def test_a_list_of_faces_without_any_is_no_dataset(tmp_path):
    film(tmp_path, "real/x.mp4", "fake/x.mp4")
    (tmp_path / "more" / "faces").mkdir(parents=True)
    (tmp_path / "more" / "metadata.csv").write_text("videoname,label,original\n")
    assert len(find_videos(tmp_path)) == 2


def test_celeb_df_takes_labels_from_folders_since_1_means_real_in_its_list(tmp_path):
    reals = [f"Celeb-real/id{i}_000{j}.mp4" for i in range(4) for j in range(2)] + [
        "YouTube-real/00170.mp4"
    ]
    fakes = [f"Celeb-synthesis/id{i}_id{i ^ 1}_000{j}.mp4" for i in range(4) for j in range(2)]
    film(tmp_path / "Celeb-DF-v2", *reals, *fakes, "YouTube-real/00001.mp4")
    listed = [
        "1 YouTube-real/00170.mp4",
        "1 Celeb-real/id0_0000.mp4",
        "0 Celeb-synthesis/id0_id1_0000.mp4",
    ]
    (tmp_path / "Celeb-DF-v2" / "List_of_testing_videos.txt").write_text("\n".join(listed) + "\n")
    videos = by_name(find_videos(tmp_path))
    assert all((videos.label == 1) == videos.path.map(lambda path: "Celeb-synthesis" in path.parts))
    assert set(videos.index[videos.split == "test"]) == {
        "00170.mp4",
        "id0_0000.mp4",
        "id0_id1_0000.mp4",
    }
    assert videos.original["id2_id3_0001.mp4"] == videos.original["id2_0001.mp4"]
    groups = videos.group[["id0_0000.mp4", "id1_0001.mp4", "id0_id1_0001.mp4"]]
    assert (
        groups.nunique() == 1
        and videos.group["id2_0000.mp4"] != groups.iloc[0] != videos.group["00170.mp4"]
    )
    assert cell.crossing_groups(videos) == [
        groups.iloc[0]
    ]  # their own test list shares identities with training
    split = split_videos(videos.reset_index(drop=True), 0.3, 0.2, 1)
    assert not set(split.group[split.split == "train"]) & set(split.group[split.split == "val"])


@pytest.mark.parametrize("named", [True, False])
def test_a_manifest_gives_everything_and_may_be_named_itself(tmp_path, named):
    film(tmp_path, "clips/a 1.mp4", "clips/b.mp4", "elsewhere/c.mp4", "clips/real/unlisted.mp4")
    rows = (
        "Path;Label;method;group;split",
        "clips\\a 1.mp4;REAL;;p1;train",
        "clips/b.mp4;1;swap;p1;",
    )
    rows = *rows, f"{tmp_path}/elsewhere/c.mp4;fake;;;Validation"
    (tmp_path / "list.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    videos = by_name(find_videos(tmp_path / "list.csv" if named else tmp_path))
    assert videos.label.to_dict() == {"a 1.mp4": 0, "b.mp4": 1, "c.mp4": 1}
    assert videos.method.to_dict() == {"a 1.mp4": "real", "b.mp4": "swap", "c.mp4": "fake"}
    assert videos.split.to_dict() == {"a 1.mp4": "train", "b.mp4": "", "c.mp4": "val"}
    assert videos.group["a 1.mp4"] == videos.group["b.mp4"] != videos.group["c.mp4"]
    assert all(path.is_file() for path in videos.path)


def test_manifests_named_like_splits_are_splits(tmp_path):
    film(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "train.csv").write_text("path,label\na.mp4,0\n")
    (tmp_path / "test.csv").write_text("path,label\nb.mp4,1\n")
    assert by_name(find_videos(tmp_path)).split.to_dict() == {"a.mp4": "train", "b.mp4": "test"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.mp4,0\nb.mp4,cat\n", "list.csv, line 3: label 'cat'"),
        ("path,label,split\na.mp4,0,tests\n", "list.csv, line 2: label '0', split 'tests'"),
        ("path,label\n\u738b.mp4,0\n", "list.csv is not a CSV file in UTF-8"),
    ],
)
def test_a_wrong_manifest_is_an_error_that_names_the_place(tmp_path, text, message):
    (tmp_path / "list.csv").write_bytes(text.encode("gbk"))
    with pytest.raises(ValueError, match=message):
        find_videos(tmp_path)


def test_tables_that_are_no_manifests_are_left_alone(tmp_path):
    film(tmp_path, "real/a.mp4", "fake/a.mp4")
    (tmp_path / "train.csv").write_text(
        "path,label,clip_file\nx.mp4,0,y.npz\n"
    )  # as written by cell 9
    (tmp_path / "images.csv").write_text("path,label\nx.jpg,cat\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "one column.csv").write_text("a\nb\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 4)
    assert set(find_videos(tmp_path).dataset) == {tmp_path.name} and len(find_videos(tmp_path)) == 2


def test_all_datasets_below_one_root_are_found_and_their_numbers_kept_apart(tmp_path):
    film(tmp_path, "a/real/001.mp4", "a/fake/001_002.mp4", "b/real/001.mp4", "b/fake/001_002.mp4")
    film(
        tmp_path, "a/more/Celeb-real/id0_0000.mp4", "a/more/Celeb-synthesis/id0_id1_0000.mp4"
    )  # inside another one
    videos = find_videos(tmp_path)
    assert (
        videos.dataset.value_counts().to_dict() == {"a": 2, "b": 2, "Celeb-DF": 2}
        and videos.group.nunique() == 3
    )


def test_a_linked_folder_is_entered_and_a_loop_of_links_ends(tmp_path):
    film(tmp_path / "elsewhere", "a.mp4")
    film(tmp_path / "set", "real/b.mp4", "fake/b.mp4")
    (tmp_path / "set" / "real" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "real" / "loop").symlink_to(tmp_path / "set" / "real")
    (tmp_path / "set" / "itself").symlink_to(tmp_path / "set" / "itself")
    assert [path.name for path in find_videos(tmp_path / "set").path] == ["b.mp4", "b.mp4", "a.mp4"]


def test_folders_that_cannot_be_read_are_told_and_the_rest_is_found(tmp_path, monkeypatch):
    film(
        tmp_path, "set/real/b.mp4", "set/fake/b.mp4", "set/fake/locked/c.mp4", "private/real/d.mp4"
    )
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name in ("locked", "private"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match="private is not searched: Permission denied"):
        videos = find_videos(tmp_path)
    checked, refused = cell.check_files(videos, 1)
    assert len(checked) == 2 and [path.name for path in refused.path] == ["locked"]


def test_an_unknown_folder_is_an_error_that_says_what_is_there(tmp_path):
    touch(tmp_path, "clips/one.mp4", "readme.md")
    with pytest.raises(
        FileNotFoundError,
        match=r"2 entries \(clips/, readme.md\) and 1 videos.*CSV manifest, FaceForensics",
    ):
        find_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_videos(tmp_path / "nowhere")


def test_an_unknown_method_is_an_error_that_names_the_known_ones(tmp_path):
    film(tmp_path, "real/a.mp4", "fake/x/a.mp4")
    message = re.escape(f"METHODS below {tmp_path}: Faceswap not among x")
    with pytest.raises(ValueError, match=f"^{message}$"):
        find_videos(tmp_path, ["Faceswap"])


def test_a_file_reached_by_several_ways_is_one_row_and_the_row_with_a_split_counts(tmp_path):
    film(tmp_path / "set", "real/a.mp4", "fake/b.mp4", "all/c.mp4")
    (tmp_path / "set/real/again.mp4").symlink_to(tmp_path / "set/real/a.mp4")
    (tmp_path / "set/fake/more").symlink_to(tmp_path / "set/all")
    (tmp_path / "set/lists").mkdir()
    (tmp_path / "set/lists/all.csv").write_text("path,label\n../real/a.mp4,0\n../all/c.mp4,1\n")
    (tmp_path / "set/lists/test.csv").write_text("path,label\n../all/c.mp4,1\n")
    videos = find_videos(tmp_path / "set")
    assert len(videos) == 3 and sorted(videos.split) == ["", "", "test"]


def test_a_csv_that_cannot_be_opened_does_not_hide_the_folder(tmp_path):
    film(tmp_path, "real/a.mp4", "fake/a.mp4")
    (tmp_path / "notes.csv").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match="notes.csv is not read: No such file"):
        assert len(find_videos(tmp_path)) == 2


def test_a_manifest_from_a_spreadsheet_is_read(tmp_path):
    film(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.csv").write_text(
        'path,label,method,group,,\n a.mp4 ,Fake, real ,NA,,\n,,,,,\n"b.mp4",0,, NA,,\n'
    )
    videos = by_name(find_videos(tmp_path / "list.csv"))
    assert (
        videos.method.to_dict() == {"a.mp4": "fake", "b.mp4": "real"}
        and videos.group.nunique() == 1
    )
    (tmp_path / "list.csv").write_text("path,label\na.mp4,0\n\n\nb.mp4,x\n")
    with pytest.raises(ValueError, match="line 5: label 'x'"):
        find_videos(tmp_path / "list.csv")


def test_a_file_that_is_no_manifest_is_an_error_that_says_what_is_needed(tmp_path):
    (tmp_path / "my.csv").write_text("file,class\na.mp4,0\n")
    with pytest.raises(ValueError, match="my.csv is not a CSV file with columns path and label"):
        find_videos(tmp_path / "my.csv")


def test_a_list_of_test_videos_that_names_none_is_told(tmp_path):
    film(tmp_path, "Celeb-real/id0_0000.mp4", "Celeb-synthesis/id0_id1_0000.mp4")
    (tmp_path / "List_of_testing_videos.txt").write_text("1 Celeb-real/id7_0001.mp4\r\n")
    with pytest.warns(UserWarning, match="names none of the videos"):
        assert set(find_videos(tmp_path).split) == {""}
    (tmp_path / "List_of_testing_videos.txt").write_text("Celeb-real\\id0_0000.mp4\r\n")
    assert sorted(find_videos(tmp_path).split) == ["test", "train"]


# Checking files


def test_files_that_cannot_be_videos_are_refused_with_reasons_before_anything_is_decoded(tmp_path):
    film(tmp_path, "real/a.mp4", "fake/a.mp4", "fake/full.mp4/inside.mp4")
    touch(tmp_path, "fake/nothing.mp4")
    (tmp_path / "fake" / "folder.mp4").mkdir()
    (tmp_path / "fake" / "dangling.mp4").symlink_to(tmp_path / "gone")
    checked, refused = cell.check_files(find_videos(tmp_path), 2)
    assert {path.name for path in checked.path} == {"a.mp4", "inside.mp4"}
    assert by_name(refused).reason.to_dict() == {
        "dangling.mp4": "does not exist",
        "folder.mp4": "is a folder",
        "nothing.mp4": "is empty",
    }


def test_a_name_that_is_not_utf8_is_refused_since_opencv_would_crash(tmp_path):
    film(tmp_path, "real/a.mp4", "fake/b.mp4")
    os.rename(tmp_path / "fake/b.mp4", os.fsencode(tmp_path) + b"/fake/na\xefve.mp4")
    _, refused = cell.check_files(find_videos(tmp_path), 1)
    assert refused.reason.tolist() == ["its name is not valid UTF-8: rename it"]
    save_csv(refused, tmp_path / "skipped.csv")
    assert "na\\udcefve.mp4" in (tmp_path / "skipped.csv").read_text()
    with pytest.raises(VideoError, match="not valid UTF-8"):
        read_frames(Path(os.fsdecode(os.fsencode(tmp_path) + b"/fake/na\xefve.mp4")), 4, 8.0)


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    film(tmp_path, "real/a.mp4", "fake/b.mp4")
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "b.mp4"
    )  # root may read everything
    _, refused = cell.check_files(find_videos(tmp_path), 1)
    assert refused.reason.tolist() == ["cannot be read: no permission"]


def test_one_content_under_both_labels_is_contradictory_and_copies_under_one_are_a_group(tmp_path):
    film(
        tmp_path,
        "train/real/a.mp4",
        "train/real/ok.mp4",
        "train/fake/b.mp4",
        "test/fake/c.mp4",
        "test/real/d.mp4",
    )
    shutil.copy(tmp_path / "train/real/a.mp4", tmp_path / "test/fake/copy.mp4")
    shutil.copy(tmp_path / "train/fake/b.mp4", tmp_path / "test/fake/b again.mp4")
    checked, refused = cell.check_files(find_videos(tmp_path), 2)
    reasons = by_name(refused).reason
    assert set(reasons.index) == {"a.mp4", "copy.mp4"} and "contradictory" in reasons["a.mp4"]
    assert (
        "copy.mp4, which is labelled fake" in reasons["a.mp4"]
        and "a.mp4, which is labelled real" in reasons["copy.mp4"]
    )
    (crossing,) = cell.crossing_groups(checked)
    assert {path.name for path in checked.path[checked.group == crossing]} == {
        "b.mp4",
        "b again.mp4",
    }


# Groups, limits and splits


def table_of(groups: list[list[tuple[int, str]]]) -> pd.DataFrame:
    rows = [
        {
            "path": Path(f"{g}-{i}"),
            "label": label,
            "method": method,
            "group": f"g{g:04}",
            "original": f"g{g:04}",
        }
        for g, group in enumerate(groups)
        for i, (label, method) in enumerate(group)
    ]
    return pd.DataFrame(rows).assign(split="", dataset="d")


def pairs(count: int, methods=("x", "y")) -> pd.DataFrame:
    return table_of([[(0, "real"), (1, methods[i % len(methods)])] for i in range(count)])


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), max_size=40))
def test_videos_share_a_group_exactly_if_a_chain_of_sources_links_them(sources):
    groups = cell.connected_groups([[str(s) for s in names] for names in sources])
    reach = {s: {s} for names in sources for s in names}
    for _ in range(len(reach)):
        for names in sources:
            together = set().union(*(reach[s] for s in names))
            for s in together:
                reach[s] |= together
    for i, first in enumerate(sources):
        for j, second in enumerate(sources):
            assert (groups[i] == groups[j]) == (second[0] in reach[first[0]])


@st.composite
def source_graphs(draw):
    """Videos of one or two datasets of arbitrary sources, with fractions and seed of a split."""
    rows = []
    for dataset in draw(st.sampled_from([["d"], ["d", "e"]])):
        sources = st.lists(st.integers(0, draw(st.integers(2, 40))), min_size=1, max_size=3)
        for method, names in draw(
            st.lists(
                st.tuples(st.sampled_from(["real", "x", "y"]), sources), min_size=1, max_size=60
            )
        ):
            named = [f"{dataset}/{name}" for name in names]
            path = Path(f"{dataset}/{len(rows)}.mp4")
            rows.append(
                dict(
                    path=path,
                    label=int(method != "real"),
                    method=method,
                    sources=named,
                    dataset=dataset,
                )
            )
    videos = pd.DataFrame(rows).assign(split="")
    videos["group"] = cell.connected_groups(videos.sources.tolist())
    return (
        videos,
        draw(st.floats(0.05, 0.4)),
        draw(st.floats(0.05, 0.4)),
        draw(st.integers(0, 2**31 - 1)),
    )


@settings(deadline=None, max_examples=20)
@given(source_graphs())
def test_no_group_crosses_a_split_and_the_seed_alone_decides(drawn):
    videos, val, test, seed = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cell, "require_classes", lambda *_: None
        )  # so few videos may leave a split empty
        split = split_videos(videos, val, test, seed)
        again = split_videos(videos.sample(frac=1, random_state=1), val, test, seed)
    assert split.path.tolist() == videos.path.tolist() and set(split.split) <= {
        "train",
        "val",
        "test",
    }
    assert cell.crossing_groups(split) == []
    assert split.set_index("path").split.to_dict() == again.set_index("path").split.to_dict()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=4), min_size=40, max_size=80
    ),
    st.floats(0.1, 0.3),
    st.floats(0.1, 0.3),
    st.integers(0, 99),
)
def test_every_split_gets_about_its_share_of_both_classes_whatever_the_groups(
    fakes, val, test, seed
):
    """Within 4 videos of the share, or a fifth of it: 40 to 80 originals with 1 to 4 fakes each."""
    videos = table_of([[(0, "real"), *((1, method) for method in methods)] for methods in fakes])
    split = split_videos(videos, val, test, seed)
    for label, total in videos.label.value_counts().items():
        for name, share in {"train": 1 - val - test, "val": val, "test": test}.items():
            count = ((split.split == name) & (split.label == label)).sum()
            assert abs(count - share * total) <= max(4, 0.2 * share * total), (
                name,
                label,
                count,
                share * total,
            )


def test_each_split_gets_its_share_of_every_method():
    split = split_videos(pairs(100), 0.15, 0.2, 7)
    counts = pd.crosstab(split.split, split.method)
    assert counts.loc["train"].tolist() == pytest.approx([65, 33, 33], abs=2)
    assert counts.loc["val"].tolist() == pytest.approx([15, 8, 8], abs=2)
    assert counts.loc["test"].tolist() == pytest.approx([20, 10, 10], abs=2)


def test_a_given_split_is_kept_and_a_missing_one_is_taken_from_training():
    given_split = pairs(40).assign(split=["train"] * 60 + ["test"] * 20)
    split = split_videos(given_split, 0.25, 0.2, 1)
    assert (split.split[60:] == "test").all() and set(split.split[:60]) == {"train", "val"}
    assert (split.split == "val").sum() == pytest.approx(0.25 / 0.8 * 60, abs=4)


@pytest.mark.parametrize("splits", [["train"] * 60, ["train"] * 40 + ["val"] * 20])
def test_all_can_be_test_videos_though_the_dataset_calls_them_training(splits):
    split = split_videos(pairs(30).assign(split=splits), 0, 1, 1, needed={"test": ()})
    assert (split.split == "test").sum() == splits.count("train")


def test_what_a_dataset_assigns_to_no_split_trains_even_if_all_else_is_tested():
    given_split = pairs(30).assign(split=[""] * 40 + ["val"] * 8 + ["test"] * 12)
    split = split_videos(given_split, 0, 1, 1, needed={"test": ()})
    assert split.split.tolist() == ["train"] * 40 + ["val"] * 8 + ["test"] * 12


def test_a_dataset_with_all_its_splits_is_left_as_it_is():
    given_split = pairs(30).assign(split=["train"] * 40 + ["val"] * 8 + ["test"] * 12)
    assert split_videos(given_split, 0.15, 0.2, 1).split.tolist() == given_split.split.tolist()


def test_each_dataset_is_split_by_itself():
    mine, given_split = (
        pairs(30),
        pairs(30).assign(dataset="e", split=["train"] * 40 + ["val"] * 8 + ["test"] * 12),
    )
    both = pd.concat([mine, given_split.assign(group="e" + given_split.group)], ignore_index=True)
    split = split_videos(both, 0.2, 0.2, 1)
    assert split.split[60:].tolist() == given_split.split.tolist()
    assert (split.split[:60] == "test").sum() == pytest.approx(12, abs=2)


def test_held_out_methods_are_only_ever_tested():
    split = split_videos(pairs(60), 0.15, 0.25, 3, holdout=["y"])
    assert set(split.split[split.method == "y"]) == {"test"} and (split.method == "y").sum() >= 5
    with pytest.raises(ValueError, match="HOLDOUT_METHODS: z not among x, y"):
        split_videos(pairs(60), 0.15, 0.25, 3, holdout=["z"])


def test_too_few_recordings_are_an_error_with_the_counts():
    with pytest.raises(
        ValueError, match=r"(?s)a split lacks a class: 4 usable videos in 2 groups.*real +fake"
    ):
        split_videos(pairs(2), 0.2, 0.2, 0)


def test_recordings_of_held_out_fakes_alone_are_tested_not_dropped():
    split = split_videos(
        table_of([[(0, "real"), (1, "x")]] * 30 + [[(1, "y")]] * 20), 0.15, 0.2, 3, holdout=["y"]
    )
    assert len(split) == 80 and (split.split[split.method == "y"] == "test").all()


def test_a_copy_in_another_dataset_goes_where_the_given_split_has_it():
    given_split = pairs(30).assign(split=["train"] * 40 + ["val"] * 8 + ["test"] * 12)
    other = pairs(30).assign(dataset="e", group=["e" + name for name in pairs(30).group])
    other.loc[:1, "group"] = given_split.group[
        58
    ]  # the first pair is a copy of a test video of the other dataset
    split = split_videos(pd.concat([given_split, other], ignore_index=True), 0.2, 0.2, 1)
    assert split.split[60:62].tolist() == ["test", "test"] and cell.crossing_groups(split) == []


def whole(methods="wxyz", originals=50):
    """Originals with a fake of each method, split."""
    return split_videos(
        table_of([[(0, "real"), *((1, name) for name in methods)]] * originals), 0.2, 0.2, 0
    )


def test_training_copies_follow_the_split_that_another_dataset_gives():
    complete = pairs(30).assign(split=["train"] * 40 + ["val"] * 8 + ["test"] * 12)
    partial = pairs(30).assign(
        dataset="e", split=["train"] * 50 + ["test"] * 10
    )  # the same groups: all of them copies
    split = split_videos(pd.concat([complete, partial[:40]], ignore_index=True), 0.2, 0.2, 1)
    assert (split.split[60:] == "train").all() and cell.crossing_groups(split) == []


def test_one_class_alone_is_an_error_that_names_the_missing_one():
    with pytest.raises(ValueError, match="no fake videos among the 5"):
        split_videos(table_of([[(0, "real")]] * 5), 0.2, 0.2, 0)


def test_of_several_datasets_each_gives_as_many_real_as_fake_videos():
    large = table_of([[(0, "real"), (1, "w"), (1, "x")]] * 90).assign(dataset="a")
    other = table_of([[(0, "real")] + [(1, "y")] * 9] * 30).assign(dataset="b")
    few = table_of([[(0, "real"), (1, "z")]] * 10).assign(dataset="c")
    both = [
        t.assign(group=t.dataset + t.group, original=t.dataset + t.group)
        for t in (large, other, few)
    ]
    both = split_videos(pd.concat(both, ignore_index=True), 0.2, 0.2, 0)
    taken = cell.sample_per_class(both, 50, seed=1)
    assert pd.crosstab(taken.dataset, taken.label).to_numpy().tolist() == [
        [20, 20],
        [20, 20],
        [10, 10],
    ]
    assert cell.sample_per_class(both, 400, seed=1).label.value_counts().to_dict() == {
        1: 400,
        0: 130,
    }


def test_a_sample_of_one_class_or_of_nothing_is_what_there_is():
    videos = whole()
    assert len(cell.sample_per_class(videos[videos.label == 1], 8, seed=1)) == 8
    assert len(cell.sample_per_class(videos[videos.label == 0], 80, seed=1)) == 50
    assert cell.sample_per_class(videos[:0], 8, seed=1).empty


@pytest.mark.parametrize(("methods", "limit"), [(5, 10), (60, 120), (120, 120), (4, 3)])
def test_every_split_keeps_its_share_however_many_methods_there_are(methods, limit):
    taken = cell.sample_per_class(whole([f"m{i:03}" for i in range(methods)], 200), limit, seed=1)
    counts = pd.crosstab(taken.split, taken.label).loc[["train", "val", "test"]].to_numpy()
    assert counts.sum(axis=0).tolist() == [limit, limit]
    assert (
        np.abs(counts - limit * np.array([[0.6], [0.2], [0.2]])) <= 1
    ).all() and counts.min() >= 1


def test_a_sample_does_not_depend_on_the_order_of_rows_and_hardly_on_a_video_that_is_missing():
    videos = whole()
    first = cell.sample_per_class(videos, 20, 1)
    assert set(first.path) == set(
        cell.sample_per_class(videos.sample(frac=1, random_state=3), 20, 1).path
    )
    without = cell.sample_per_class(videos[videos.path != first.path[0]], 20, 1)
    assert len(without) == len(first) and len(set(first.path) - set(without.path)) <= 4


def test_limiting_takes_fakes_evenly_over_methods_and_of_the_recordings_that_are_taken():
    few = cell.sample_per_class(whole(), 20, seed=1)
    assert collections.Counter(few.method) == {"real": 20, "w": 5, "x": 5, "y": 5, "z": 5}
    assert set(few.original[few.label == 1]) <= set(few.original[few.label == 0])
    assert (
        few.original[few.label == 1].nunique() >= 15
    )  # not four fakes of the same five recordings
    assert few.split[few.label == 0].value_counts().to_dict() == {"train": 12, "val": 4, "test": 4}
    assert set(few.group) != set(cell.sample_per_class(whole(), 20, seed=2).group)
    assert len(cell.sample_per_class(whole(), 0, seed=1)) == 250


def test_a_second_fake_of_a_taken_original_comes_before_one_whose_original_is_not_taken():
    with_fakes, without = [[(0, "real")] + [(1, "x")] * 12] * 30, [[(0, "real")]] * 30
    few = cell.sample_per_class(
        split_videos(table_of(with_fakes + without), 0.2, 0.2, 0), 24, seed=1
    )
    assert few.label.value_counts().to_dict() == {0: 24, 1: 24}
    assert set(few.original[few.label == 1]) < set(few.original[few.label == 0])


def test_a_larger_sample_keeps_the_smaller_ones_real_videos_where_they_were():
    small, large = (cell.sample_per_class(whole(), count, seed=1) for count in (10, 30))
    both = small[small.label == 0].merge(large[large.label == 0], on="path")
    assert len(both) == 10 and (both.split_x == both.split_y).all()


def test_a_rare_method_leaves_its_share_to_the_others_and_held_out_ones_keep_theirs():
    videos = split_videos(
        table_of([[(0, "real"), (1, "w"), (1, "x")]] * 40 + [[(0, "real"), (1, "y")]] * 3),
        0.2,
        0.2,
        0,
    )
    assert collections.Counter(cell.sample_per_class(videos, 23, 1).method) == {
        "real": 23,
        "w": 10,
        "x": 10,
        "y": 3,
    }
    held = cell.sample_per_class(
        split_videos(whole().assign(split=""), 0.2, 0.2, 0, holdout=["w"]), 20, seed=1
    )
    assert (held.method == "w").sum() == 5 and set(held.split[held.method == "w"]) == {"test"}


# Frames


def test_positions_span_the_middle_seconds_whatever_the_length():
    short, long = cell.frame_positions(400, 16, 25, 8), cell.frame_positions(500, 16, 25, 8)
    assert np.ptp(short) == np.ptp(long) and (short >= 100).all() and (short < 300).all()
    assert cell.frame_positions(10, 4, 25, 8).tolist() == [1, 3, 6, 8]
    assert cell.frame_positions(2, 4, 25, 8).tolist() == [0, 0, 1, 1]
    assert cell.frame_positions(8, 4, 0, 8).tolist() == [1, 3, 5, 7]


def test_the_frames_read_are_those_at_the_positions(tmp_path):
    frames, positions, _ = read_frames(counting_video(tmp_path / "count.mp4"), 6, 8.0)
    assert positions.tolist() == [5, 15, 25, 35, 45, 55]
    assert [round((frame.mean() + 3) / 4) for frame in frames] == [
        5,
        15,
        25,
        35,
        45,
        55,
    ]  # the codec darkens by 3
    assert frames[0].shape == (64, 96, 3) and frames[0].dtype == np.uint8


def test_frames_are_rgb_and_huge_ones_are_reduced(tmp_path):
    blue = np.zeros((1200, 2400, 3), np.uint8)
    blue[..., 0] = 255
    cell.write_video(tmp_path / "blue.mp4", [blue] * 3, 10)
    frame = read_frames(tmp_path / "blue.mp4", 1, 8.0)[0][0]
    assert frame.shape == (960, 1920, 3) and frame[..., 2].mean() > 200 > 60 > frame[..., 0].mean()


def test_a_video_that_does_not_tell_its_length_is_counted(tmp_path, monkeypatch):
    real_capture = cv2.VideoCapture

    class Silent:
        """A capture without a frame count; a subclass would crash the garbage collector."""

        def __init__(self, *arguments):
            self.capture = real_capture(*arguments)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def get(self, which):
            return 0 if which == cv2.CAP_PROP_FRAME_COUNT else self.capture.get(which)

    file = counting_video(tmp_path / "count.mp4")
    told, *_ = read_frames(file, 6, 8.0)
    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    assert np.array_equal(told, read_frames(file, 6, 8.0)[0])


def broken(kind, tmp_path):
    file = tmp_path / "video.mp4"
    if kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to(tmp_path / "gone.mp4")
    elif kind in ("empty", "text"):
        file.write_bytes(b"" if kind == "empty" else b"not a video at all\n" * 100)
    elif kind == "cut in half":
        whole = counting_video(tmp_path / "whole.avi").read_bytes()
        file = tmp_path / "video.avi"
        file.write_bytes(whole[: len(whole) // 2])
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("folder", "is a folder"),
        ("dangling link", "does not exist"),
        ("empty", "is empty"),
        ("text", "not a video, sound alone, cut off or damaged"),
        ("cut in half", "truncated or damaged"),
    ],
)
def test_a_bad_video_is_refused_with_its_reason(tmp_path, kind, reason):
    with pytest.raises(VideoError, match=reason):
        read_frames(broken(kind, tmp_path), 8, 8.0)


# Faces


def boxes(*corners):
    return np.array([[x, y, x + side, y + side] for x, y, side in corners], float).reshape(-1, 4)


def followed(found):
    """The index of the followed face among the boxes of each frame, or None."""
    faces = [
        [cell.Face(time, box, np.zeros((5, 2))) for box in boxes]
        for time, boxes in enumerate(found)
    ]
    track = {face.time: face.box.tolist() for face in cell.follow_face(faces)}
    return [
        boxes.tolist().index(track[time]) if time in track else None
        for time, boxes in enumerate(found)
    ]


def test_the_face_that_stays_wins_against_a_larger_one_that_passes():
    found = [boxes((10, 10, 50)), boxes((12, 10, 50), (200, 0, 90)), boxes((14, 10, 50)), boxes()]
    assert followed(found) == [0, 0, 0, None]
    walks_in = [boxes((10, 10, 50))] * 4 + [
        boxes((200, 0, 100), (10, 10, 50))
    ] * 4  # for half of the clip
    assert followed(walks_in) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert followed([boxes(), boxes()]) == [None, None]


def test_a_face_in_front_of_the_followed_one_is_not_taken_for_it():
    assert followed([boxes((40, 40, 50)), boxes((0, 0, 140)), boxes((42, 40, 50))]) == [0, None, 0]


def test_a_face_is_followed_across_the_frame():
    found = [
        boxes((40 * t, 0, 60), (500, 200, 50)) for t in range(8)
    ]  # far from where it was, never a width a step
    assert followed(found) == [0] * 8


def test_of_two_that_stay_the_larger_wins():
    assert followed([boxes((0, 0, 20), (99, 0, 40)), boxes((99, 2, 41), (0, 0, 20))]) == [1, 0]


def test_crops_are_squares_of_one_size_inside_the_frame():
    tracked = np.array([[0.0, 0, 40, 50], [80, 60, 119, 110], [50, 30, 90, 82]])
    squares = cell.crop_squares(tracked, height=120, width=160, margin=0.2)
    left, top, side = squares.T
    assert len(set(side)) == 1 and side[0] == 70
    assert (
        (left >= 0).all()
        and (top >= 0).all()
        and (left + side <= 160).all()
        and (top + side <= 120).all()
    )
    assert abs(left[1] + 35 - 99.5) <= 1 and abs(top[1] + 35 - 85) <= 1
    assert cell.crop_squares(np.full((2, 4), np.nan), 120, 160, 0.2).tolist() == [[20, 0, 120]] * 2


def test_the_crop_follows_the_demo_face(demo_set, face_detector):
    clip = cell.make_clip(sorted((demo_set / "real").glob("*.mp4"))[0], SMALL, face_detector)
    assert (
        clip.frames.shape == (4, 64, 64, 3)
        and clip.frames.dtype == np.uint8
        and clip.face_share == 1
    )
    eyes, mouth = clip.landmarks[:, :2].mean(axis=1), clip.landmarks[:, 3:].mean(axis=1)
    assert (
        (abs(eyes[:, 0] - 32) < 10).all()
        and (eyes[:, 1] < mouth[:, 1]).all()
        and (mouth[:, 1] < 64).all()
    )


def test_a_second_larger_person_walking_in_does_not_steal_the_crop(face_detector):
    """One face stays at the left; for half of the clip one twice its size is at the right."""
    portrait = (cell.load_portrait()[..., ::-1] * 255).astype(np.uint8)[60:420, 80:440]
    small, large = (
        cv2.resize(portrait, (side, side), interpolation=cv2.INTER_AREA) for side in (220, 440)
    )
    frames = []
    for t in range(12):
        frame = np.full((480, 960, 3), 90, np.uint8)
        frame[200:420, 20 + 3 * t : 240 + 3 * t] = small
        if t >= 6:
            frame[20:460, 500:940] = large
        frames.append(frame)
    boxes, landmarks, share = cell.find_face(frames, face_detector)
    assert share == 1 and (boxes[:, 2] < 300).all() and (landmarks[..., 0] < 300).all()
    assert abs(np.diff(boxes[:, 0])).max() < 12  # and moves with the face, 3 pixels a frame


@pytest.mark.parametrize("size", [(18, 18), (33, 201), (64, 2000)])
def test_frames_of_any_shape_go_through_the_detector(size, face_detector):
    frames = [np.full((*size, 3), 127, np.uint8)] * 3
    boxes, _, share = cell.find_face(frames, face_detector)
    assert share == 0 and np.isnan(boxes).all()


def test_a_video_without_a_face_is_cropped_in_the_middle_and_flagged(tmp_path, face_detector):
    clip = cell.make_clip(counting_video(tmp_path / "grey.mp4"), SMALL, face_detector)
    assert (
        clip.face_share == 0
        and np.isnan(clip.landmarks).all()
        and clip.frames.shape == (4, 64, 64, 3)
    )


# Cache


def cache(table, folder, settings_=SMALL):
    return cell.cache_clips(table, settings_, folder, None, 2)


@pytest.fixture
def two_videos(tmp_path):
    files = [
        counting_video(tmp_path / f"{name}.mp4", frames) for name, frames in (("a", 40), ("b", 60))
    ]
    return pd.DataFrame({"path": files, "label": [0, 1], "dataset": "d"})


def test_a_clip_is_made_once_and_then_found(two_videos, tmp_path, monkeypatch):
    first, _ = cache(two_videos, tmp_path / "cache", PLAIN)
    monkeypatch.setattr(cell, "make_clip", None)
    second, skipped = cache(two_videos, tmp_path / "cache", PLAIN)
    pd.testing.assert_frame_equal(first, second)
    assert skipped.empty and len(list((tmp_path / "cache").iterdir())) == 2


def test_another_setting_or_another_video_of_the_name_makes_another_clip(two_videos, tmp_path):
    first, _ = cache(two_videos, tmp_path / "cache", PLAIN)
    larger, _ = cache(two_videos, tmp_path / "cache", cell.ClipSettings(4, 8.0, 48, False, 0.25))
    shutil.copy(two_videos.path[1], two_videos.path[0])
    other, _ = cache(two_videos, tmp_path / "cache", PLAIN)
    assert first.clip_file[0] != larger.clip_file[0] and first.clip_file[0] != other.clip_file[0]
    assert first.clip_file[1] == other.clip_file[1]


@SLOW
def test_threads_can_read_clips_while_garbage_is_collected(tmp_path):
    """Python 3.11 then mixes up the headers that two threads parse (cpython gh-106905)."""
    file = tmp_path / "clip.npz"
    np.savez(file, frames=np.zeros((2, 8, 8, 3), np.uint8), landmarks=np.zeros((2, 5, 2)))

    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):  # lets other threads run
            sum(range(999))

    def read(depth):
        if depth:  # of calls, which the threads mix up
            return read(depth - 1)
        return [(Garbage(), cell.load_clip(file)[0].shape)[1] for _ in range(2000)]

    before, pause = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            shapes = [*pool.map(read, (0, 3, 6, 9))]
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(pause)
    assert {shape for part in shapes for shape in part} == {(2, 8, 8, 3)}


def test_a_damaged_cache_file_is_made_again(two_videos, tmp_path):
    file = Path(cache(two_videos, tmp_path / "cache", PLAIN)[0].clip_file[0])
    whole = file.read_bytes()
    flipped = [
        bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]])
        for place in (60, len(whole) // 2)
    ]
    for content in (whole[: len(whole) // 2], b"", b"text", *flipped):
        file.write_bytes(content)
        cache(two_videos, tmp_path / "cache", PLAIN)
        assert file.read_bytes() == whole


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as partial_file:
        partial_file.write_text("half of the n")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "old"


def test_half_written_files_of_dead_processes_are_removed_but_not_those_of_other_machines(tmp_path):
    names = [f".partial-{2**30}-1-{node}-clip.npz" for node in (platform.node(), "other")]
    for name in names:
        (tmp_path / name).touch()
    cell.remove_partial_files(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == names[1:]


def test_bad_videos_are_listed_with_reasons_and_the_rest_goes_on(two_videos, tmp_path):
    bad = [tmp_path / "c.mp4", tmp_path / "dangling.mp4"]
    bad[0].write_text("hello")
    bad[1].symlink_to(tmp_path / "gone.mp4")
    table = pd.concat([two_videos, pd.DataFrame({"path": bad, "label": 1})], ignore_index=True)
    usable, skipped = cache(table, tmp_path / "cache", PLAIN)
    assert len(usable) == 2 and skipped.path.tolist() == bad
    assert "not a video" in skipped.reason[2] and "No such file" in skipped.reason[3]


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_failing_face_detector_is_the_videos_reason_but_a_failing_gpu_is_not(two_videos, error):
    class Failing(torch.nn.Module):
        min_face_size = 20

        def detect(self, *_, **__):
            raise self.error

    detector = torch.nn.ModuleList([Failing()])
    detector[0].error = RuntimeError("torch.cat(): expected a non-empty list of Tensors")
    with pytest.raises(VideoError, match="face detector failed: torch.cat"):
        cell.make_clip(two_videos.path[0], SMALL, detector)
    detector[0].error = error
    with pytest.raises(RuntimeError, match="CUDA|CUDNN"):
        cell.make_clip(two_videos.path[0], SMALL, detector)


def test_a_full_disk_ends_the_run_instead_of_skipping_videos(two_videos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        cache(two_videos, tmp_path / "cache", PLAIN)


# The demo set


def test_the_demo_set_depends_on_the_seed_alone_and_is_kept(tmp_path):
    first = cell.make_demo_set(tmp_path / "a", 2, seed=1, workers=2)
    second = cell.make_demo_set(tmp_path / "b", 2, seed=1, workers=1)
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*.mp4"))
    assert names == [
        "fake/0000__blend.mp4",
        "fake/0001__lowres.mp4",
        "real/0000.mp4",
        "real/0001.mp4",
    ]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    written = (first / names[0]).stat().st_mtime_ns
    cell.make_demo_set(first, 2, seed=1, workers=2)
    assert (first / names[0]).stat().st_mtime_ns == written


@pytest.mark.parametrize("method", cell.DEMO_METHODS)
def test_a_demo_fake_differs_from_its_original_in_the_face_only(method):
    portrait = cell.load_portrait()
    rng = np.random.default_rng(0)
    for picture in cell.manipulated(portrait, portrait, method, 3, rng):
        change = np.abs(picture - portrait).max(axis=2)
        assert change[150:300, 200:330].mean() > 0.02
        assert (
            change[:60].max() < 1e-3 and change[400:].max() < 1e-3 and change[:, :100].max() < 1e-3
        )


@pytest.mark.parametrize(("pairs", "low", "high"), [(24, 0.25, 0.75), (60, 0.35, 0.65)])
@SLOW
def test_nothing_trivial_tells_the_demo_classes_apart(pairs, low, high, tmp_path, face_detector):
    """AUC near 0.5 from file size, frame count, colours, and all that is outside the face crop."""
    videos = find_videos(cell.make_demo_set(tmp_path, pairs, seed=7, workers=2))
    two_frames = dataclasses.replace(SMALL, frames=2)
    rows = []
    for path in videos.path:
        frames = np.stack(read_frames(path, 2, 8.0)[0]).astype(np.float32)
        squares = cell.make_clip(path, two_frames, face_detector).squares
        outside = frames.copy()
        for frame, (left, top, side) in zip(outside, squares, strict=True):
            frame[top : top + side, left : left + side] = np.nan
        capture = cv2.VideoCapture(str(path))
        filled = np.nan_to_num(outside[0], nan=float(np.nanmean(outside[0])))
        row = {
            "file size": path.stat().st_size,
            "frame count": capture.get(cv2.CAP_PROP_FRAME_COUNT),
        }
        row |= {"height": frames.shape[1], "width": frames.shape[2]}
        row |= {f"mean of channel {c}": frames[..., c].mean() for c in range(3)}
        row |= {f"variance of channel {c}": frames[..., c].var() for c in range(3)}
        row |= {f"outside, mean of channel {c}": np.nanmean(outside[..., c]) for c in range(3)}
        row |= {f"outside, variance of channel {c}": np.nanvar(outside[..., c]) for c in range(3)}
        row |= {f"outside, pixel {i}": v for i, v in enumerate(cv2.resize(filled, (6, 6)).ravel())}
        rows.append(row)
    features = pd.DataFrame(rows)
    single = features[[name for name in features if "pixel" not in name]]
    for name in single:
        assert low <= roc_auc_score(videos.label, single[name]) <= high, name
    for part in (features.filter(like="outside"), single):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        folds = GroupKFold(5).split(part, videos.label, videos.group)
        scores = cross_val_predict(
            model, part, videos.label, cv=list(folds), method="predict_proba"
        )[:, 1]
        assert low <= roc_auc_score(videos.label, scores) <= high


def test_section_3_shows_a_demo_person_and_its_fakes_with_their_face_crops():
    figure = cell.plot_demo_person()
    top, below = figure.axes
    assert [text.get_text() for text in top.texts] == ["real", *cell.DEMO_METHODS]
    (height, width, _), (side, crops_width, _) = (
        ax.images[0].get_array().shape for ax in (top, below)
    )
    assert side < height < width / 4 and crops_width == 4 * (side + side // 20)
    plt.close(figure)
