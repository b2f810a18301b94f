"""Pictures as data: stills, face crops, folders of frames, alone and beside videos."""

import dataclasses
import os

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from PIL import Image

import cell_03_data_processing as cell
import cell_04_dataset_class as batches
from cell_02_global_config import CONFIG
from cell_03_data_processing import ClipSettings, cache_clips, check_files, find_videos
from cell_05_model_definition import DeepfakeDetector, load_fitting_weights

SETTINGS = ClipSettings(frames=4, seconds=8.0, size=64, face_crop=True, margin=0.25)


def picture(number: int, tight: bool) -> np.ndarray:
    """The portrait, or its face alone, recoloured: RGB (H, W, 3) uint8, different by number."""
    portrait = (cell.load_portrait()[..., ::-1] * 255).astype(np.uint8)
    x, y = cell.FACE_CENTRE
    face = portrait[y - 75 : y + 75, x - 75 : x + 75] if tight else portrait
    face = cv2.resize(face, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(face + np.random.default_rng(number).integers(-40, 40, 3), 0, 255)


def draw(root, *names, tight=True):
    """Pictures below `root`, every one of them different."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, tight).astype(np.uint8)).save(root / name)
    return root


def test_stills_are_found_like_videos_with_their_methods_and_groups(tmp_path):
    draw(tmp_path, "train/real/ann.jpg", "train/real/0001.png", "train/fake/ann__swap.jpg")
    draw(tmp_path, "test/fake/FaceSwap/bob_frame12.jpg", "test/real/bob_frame3.JPG")
    videos = find_videos(tmp_path)
    found = videos.set_index(videos.path.map(lambda path: path.name))
    assert found.method.to_dict() == {
        **{"ann.jpg": "real", "0001.png": "real", "ann__swap.jpg": "swap"},
        **{"bob_frame12.jpg": "FaceSwap", "bob_frame3.JPG": "real"},
    }
    assert found.group["ann.jpg"] == found.group["ann__swap.jpg"]
    assert found.group["bob_frame12.jpg"] == found.group["bob_frame3.JPG"]
    assert found.group.nunique() == 3 and set(found.split) == {"train", "test"}


def test_faces_224_takes_label_and_original_from_its_list(tmp_path):
    draw(tmp_path, "faces_224/a.jpg", "faces_224/b.jpg", "faces_224/c.jpg")
    (tmp_path / "metadata.csv").write_text(
        "videoname,original_width,label,original\n"
        "a.mp4,200,REAL,\nb.mp4,200,FAKE,a.mp4\nc.mp4,200,FAKE,x.mp4\ngone.mp4,200,REAL,\n"
    )
    videos, refused = check_files(find_videos(tmp_path), 1)
    assert videos.label.tolist() == [0, 1, 1] and set(videos.dataset) == {"DFDC"}
    assert videos.group[0] == videos.group[1] != videos.group[2]
    assert refused.reason.tolist() == ["does not exist"]


def test_a_folder_of_numbered_frames_is_one_clip_in_the_order_of_the_numbers(tmp_path):
    for kind in ("real/ann", "fake/ann__swap"):
        (tmp_path / kind).mkdir(parents=True)
        for number in range(1, 13):
            frame = np.full((48, 64, 3), 20 * number + kind.startswith("fake"), np.uint8)
            Image.fromarray(frame).save(tmp_path / kind / f"frame_{number}.png")
    videos, refused = check_files(find_videos(tmp_path), 1)
    assert refused.empty and len(videos) == 2 and videos.group.nunique() == 1
    plain = ClipSettings(frames=6, seconds=8.0, size=32, face_crop=False, margin=0.25)
    usable, _ = cache_clips(videos, plain, tmp_path / "cache", None, 1)
    frames, _ = cell.load_clip(usable.clip_file[0])
    first = int(usable.label[0])
    assert (frames[:, 0, 0, 0] - first).tolist() == [40, 80, 120, 160, 200, 240]
    folder, before = usable.path[0], cell.file_identity(usable.path[0])
    os.utime(folder / "frame_3.png", (0, 2**31))  # edited in place: the folder's time stays
    assert cell.file_identity(folder) != before


def test_face_crops_are_used_whole_from_where_they_are_and_photos_are_cropped(
    tmp_path, face_detector
):
    for tight in (True, False):
        root = draw(tmp_path / str(tight), "real/a.jpg", "real/b.jpg", "fake/a__x.jpg", tight=tight)
        usable, failed = cache_clips(find_videos(root), SETTINGS, root / "cache", face_detector, 1)
        assert failed.empty
        frames, landmarks = cell.load_clip(usable.clip_file[0], 64)
        assert frames.shape == (1, 64, 64, 3) and landmarks.shape == (1, 5, 2)
        assert (usable.clip_file[0] == str(usable.path[0])) == tight
        assert (root / "cache").exists() != tight
        assert 0 < landmarks[0, 0, 0] < landmarks[0, 1, 0] < 64  # the left eye, the right eye


def test_the_assumed_landmarks_of_a_face_crop_lie_on_the_face(face_detector):
    portrait = (cell.load_portrait()[..., ::-1] * 255).astype(np.uint8)
    boxes, landmarks, _ = cell.find_face([portrait], face_detector)
    left, top, right, bottom = boxes[0]
    side = (bottom - top) / 1.11  # as in DFDC's faces_224, in the median
    corner = (left + right - side) / 2, top + 0.1 * side
    found = (landmarks[0] - corner) / side
    assert np.abs(found - cell.CROP_LANDMARKS).max() < 0.06


def test_where_one_class_alone_is_face_crops_both_are_cropped(tmp_path, face_detector):
    """Else the size of the face would tell real from fake."""
    draw(tmp_path, *(f"real/{number}.png" for number in range(3)), tight=False)
    (tmp_path / "fake").mkdir()
    x, y = cell.FACE_CENTRE
    for number in range(6):
        face = Image.open(tmp_path / f"real/{number % 3}.png").resize((512, 600))
        face.crop((x - 175, y - 175, x + 175, y + 175)).save(tmp_path / f"fake/{number}.png")
    videos, cache = find_videos(tmp_path), tmp_path / "c"
    needed = cell.require_space(videos, SETTINGS, cache, face_detector)
    assert needed.startswith("9 clips to make")
    usable, _ = cache_clips(videos, SETTINGS, cache, face_detector, 1)
    eyes = np.array([np.diff(cell.load_clip(file, 64)[1][0, :2, 0]) for file in usable.clip_file])
    assert len(usable) == 9 and not {*usable.clip_file} & {*map(str, usable.path)}
    assert eyes.max() < 1.1 * eyes.min()


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_picture_that_cannot_be_decoded_is_skipped_with_the_reason(kind, tmp_path, face_detector):
    root = draw(tmp_path, "real/a.jpg", "real/b.jpg", "fake/a__x.jpg")
    content = (root / "real" / "b.jpg").read_bytes()
    bad = {"truncated": content[: len(content) // 2], "text": b"hello", "empty": b""}[kind]
    (root / "real" / "b.jpg").write_bytes(bad)
    videos, refused = check_files(find_videos(root), 1)
    usable, failed = cache_clips(videos, SETTINGS, root / "cache", face_detector, 1)
    skipped = pd.concat([refused, failed])
    assert len(usable) == 2 and [path.name for path in skipped.path] == ["b.jpg"]
    assert skipped.reason.iloc[0].startswith("is empty" if kind == "empty" else "not a picture")


def pairs(reals: dict[str, int], fakes: dict[tuple[str, str], int], **changes) -> pd.DataFrame:
    """An epoch of samples with dataset and method of each, from so many videos of each kind."""
    rows = [(0, name, "real") for name, count in reals.items() for _ in range(count)]
    rows += [(1, *kind) for kind, count in fakes.items() for _ in range(count)]
    table = pd.DataFrame(rows, columns=["label", "dataset", "method"])
    table["group"] = table["original"] = [str(row) for row in table.index]
    config = dataclasses.replace(CONFIG, SEED=1, SELF_BLEND=0.0, CLIPS_PER_VIDEO=1, **changes)
    samples = batches.PairBatches(table, 4, config).draw_epoch()
    drawn = table.iloc[[sample.row for sample in samples]].reset_index(drop=True)
    return drawn.assign(blend=[sample.self_blend for sample in samples])


def test_an_epoch_is_drawn_from_the_datasets_by_their_shares():
    few, many = {"few": 10, "many": 400}, {("few", "x"): 10, ("many", "y"): 400}
    equal = pairs(few, many, EPOCH_VIDEOS=100)
    assert len(equal) == 200 and (equal[::2].dataset == "few").sum() == 50
    uneven = pairs(few, many, EPOCH_VIDEOS=100, DATASET_SHARES=["many 3"])
    assert (uneven[::2].dataset == "few").sum() == 25
    assert (uneven.dataset[::2].to_numpy() == uneven.dataset[1::2].to_numpy()).all()


def test_methods_take_equal_parts_and_a_dataset_without_fakes_is_self_blended():
    epoch = pairs({"a": 90, "b": 30}, {("a", "rare"): 3, ("a", "common"): 300})
    fakes = epoch[1::2]
    assert (fakes.blend == (fakes.dataset == "b")).all() and fakes.blend.sum() == 30
    assert fakes[~fakes.blend].method.value_counts().to_dict() == {"rare": 45, "common": 45}


def network(layers: int) -> DeepfakeDetector:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(2))
    return DeepfakeDetector(backbone.append(torch.nn.Flatten()), 12, 4, layers, 2, frames=3).eval()


def test_without_an_lstm_a_clip_is_the_mean_of_its_frames():
    output = network(0)(torch.rand(2, 6, 3, 8, 8))
    assert torch.allclose(output.logit, output.frame_logits.mean(dim=1))
    assert torch.allclose(output.attention.sum(dim=1), torch.ones(2))


def test_a_model_of_frames_is_a_start_for_a_model_of_clips_with_the_same_backbone(tmp_path):
    frames, clips = network(0), network(1)
    config = {"BACKBONE": CONFIG.BACKBONE}
    content = {"model": frames.half().state_dict(), "config": config, "trained_on": ["FaceSwap"]}
    torch.save(content, tmp_path / "frames.pth")
    origin, saved = load_fitting_weights(clips, CONFIG, str(tmp_path / "frames.pth"))
    own = clips.state_dict()
    assert all(torch.equal(own[name], value.float()) for name, value in content["model"].items())
    assert f"{len(content['model'])} of {len(own)} tensors" in origin
    assert saved["trained_on"] == ["FaceSwap"]
    torch.save({**content, "config": {"BACKBONE": "vgg11"}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="BACKBONE = 'vgg11', not 'resnet50'"):
        load_fitting_weights(clips, CONFIG, str(tmp_path / "other.pth"))


def test_pictures_and_videos_are_trained_on_together(demo_set, tmp_path):
    root, faces = tmp_path / "data", [f"{n:03}" for n in range(12)]
    draw(root / "faces", *(f"real/{n}.jpg" for n in faces), *(f"fake/{n}__x.jpg" for n in faces))
    (root / "videos").symlink_to(demo_set)
    text = run_script(
        "cell_14_results_summary",
        tmp_path / "run",
        **dict(DATA_DIR=root, MAX_VIDEOS_PER_CLASS=0, VAL_FRACTION=0.25, TEST_FRACTION=0.25),
        **dict(FRAMES_PER_VIDEO=2, CLIPS_PER_VIDEO=2, IMAGE_SIZE=48, BACKBONE="shufflenet_v2_x0_5"),
        **dict(PRETRAINED=False, LSTM_LAYERS=0, EPOCHS=1, BATCH_SIZE=4),
        **dict(EPOCH_VIDEOS=8, DATASET_SHARES="[faces 3]", AUGMENTATION="robust", ROBUSTNESS=0),
    )
    assert "24 pictures are shown 2 times" in text
    assert "shufflenet_v2_x0_5, frame by frame\n" in text
    table = pd.read_csv(tmp_path / "run" / "results" / "test_predictions.csv")
    scored = table.groupby("dataset").frame_scores.agg(lambda s: {len(t.split()) for t in s})
    assert scored.to_dict() == {"faces": {2}, "videos": {4}}


def test_the_codec_of_twins_is_the_same_for_a_share_of_them():
    clips = torch.rand(400, 1, 3, 16, 16).repeat_interleave(2, dim=0)
    draws = batches.PairedGenerator(torch.device("cpu"), [1], same=0.5)
    changed = batches.change_quality(clips, draws)
    twins = (changed[::2] == changed[1::2]).flatten(1).all(dim=1).float().mean()
    assert twins < 0.2  # each of several draws must agree
    sizes = draws.numbers(2000, 0, 1)
    assert 0.4 < (sizes[::2] == sizes[1::2]).mean() < 0.6


def test_a_video_beside_numbered_pictures_is_found_too(tmp_path):
    draw(tmp_path, "IMG_0001.jpg", "IMG_0002.jpg")
    (tmp_path / "VID_0003.mp4").touch()
    assert cell.media_below(tmp_path) == [tmp_path, tmp_path / "VID_0003.mp4"]
    assert len(cell.media_below(tmp_path, stills=True)) == 3


def test_a_single_face_crop_of_a_class_is_used_whole(tmp_path, face_detector):
    draw(tmp_path, "real/a.jpg", "fake/a__x.jpg", "fake/a__y.jpg")
    assert cell.find_face_crops(find_videos(tmp_path), SETTINGS, face_detector).all()


def test_a_still_scores_the_same_as_the_clip_it_stands_for_in_training():
    still, model = torch.rand(2, 1, 3, 8, 8), network(1)
    output, repeated = model(still), model(still.repeat(1, 3, 1, 1, 1))
    assert torch.allclose(output.logit, repeated.logit, atol=1e-6)
    assert output.frame_logits.shape == output.attention.shape == (2, 1)
