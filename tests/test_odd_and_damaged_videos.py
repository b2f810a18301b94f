"""What people's folders really hold: every file becomes a clip or a reason, whatever it is."""

import shutil
import subprocess
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pandas as pd
import pytest

import cell_03_data_processing as cell
from cell_03_data_processing import ClipSettings, cache_clips, check_files, find_videos, write_video

WHOLE_FRAME = ClipSettings(frames=6, seconds=8.0, size=48, face_crop=False, margin=0.25)


def ffmpeg(*arguments):
    """Run ffmpeg; where the input is `scene`, it is ten seconds of a moving test picture."""
    scene = ["-f", "lavfi", "-i", "testsrc2=size=160x120:rate=25:duration=10"]
    words = [word for given in arguments for word in (scene if given == "scene" else [str(given)])]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Path(arguments[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An ordinary H.264 video."""
    return ffmpeg(
        "scene",
        "-c:v",
        "libx264",
        "-pix_fmt",
        "yuv420p",
        tmp_path_factory.mktemp("scene") / "whole.mp4",
    )


def outcome(file: Path, tmp_path, settings=WHOLE_FRAME) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The clips and the refusals of a file put under fake/, beside an ordinary pair."""
    root = tmp_path / "set"
    for number, name in enumerate(("real/pair.mp4", "fake/pair.mp4")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (8, 48, 64, 3), np.uint8)
        write_video(root / name, list(noise), 10)
    if file.parent != root / "fake":
        shutil.move(file, root / "fake" / file.name)
    checked, refused = check_files(find_videos(root), 2)
    usable, failed = cache_clips(checked, settings, tmp_path / "cache", None, 2)
    assert len(usable) + len(refused) + len(failed) == 3  # nothing vanishes
    mine = usable[usable.path.map(lambda path: path.name == file.name)].reset_index(drop=True)
    return mine, pd.concat([refused, failed], ignore_index=True)


def frames_of(file: Path, tmp_path) -> np.ndarray:
    usable, refused = outcome(file, tmp_path)
    assert refused.empty, refused.reason.tolist()
    with np.load(usable.clip_file[0]) as saved:
        frames, positions = saved["frames"], saved["positions"]
    assert frames.shape == (6, 48, 48, 3) and usable.distinct_frames[0] == len(set(positions))
    return frames


def cut(source: Path, target: Path, share: float) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def damaged(kind: str, whole: Path, folder: Path) -> Path:
    file = folder / "video.mp4"
    if kind == "zero bytes":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("I am no video.\n" * 500)
    elif kind == "cut, index at the end":
        cut(whole, file, 0.5)
    elif kind == "cut, index at the start":
        cut(
            ffmpeg("-i", whole, "-c", "copy", "-movflags", "+faststart", folder / "fast.mp4"),
            file,
            0.5,
        )
    elif kind in ("cut avi", "cut mkv", "cut webm"):
        form = kind.split()[1]
        options = ("-c:v", "libvpx", "-cpu-used", "8") if form == "webm" else ("-c", "copy")
        source = ffmpeg("-i", whole, *options, folder / f"whole.{form}")
        file = cut(source, folder / f"video.{form}", 0.5)
    elif kind == "zeros in the middle":
        content = bytearray(whole.read_bytes())
        middle = len(content) // 2
        content[middle : middle + len(content) // 10] = bytes(len(content) // 10)
        file.write_bytes(content)
    elif kind == "header promises more frames":
        content = ffmpeg("-i", whole, "-c:v", "mpeg4", folder / "whole.avi").read_bytes()
        promise = content.index(b"vids") + 32  # where the stream's header gives its length
        file = folder / "video.avi"
        file.write_bytes(content[:promise] + (1000).to_bytes(4, "little") + content[promise + 4 :])
    elif kind == "sound alone":
        ffmpeg("-f", "lavfi", "-i", "sine=duration=2", file)
    elif kind == "one frame":
        ffmpeg("-i", whole, "-frames:v", "1", file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to(folder / "gone.mp4")
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zero bytes", "is empty"),
        ("text", "not a video, sound alone, cut off or damaged"),
        ("cut, index at the end", "cut off or damaged"),
        ("cut, index at the start", r"decoding ends after \d+ of 250 frames: truncated or damaged"),
        ("cut avi", "truncated or damaged"),
        ("cut mkv", "truncated or damaged"),
        ("cut webm", "truncated or damaged"),
        ("zeros in the middle", "truncated or damaged"),
        ("header promises more frames", "decoding ends after 250 of 1000 frames"),
        ("sound alone", "sound alone"),
        ("one frame", "holds 1 frame$"),
        ("folder", "is a folder"),
        ("dangling link", "does not exist"),
    ],
)
def test_a_bad_file_ends_in_the_list_of_skipped_ones_with_its_reason(kind, reason, whole, tmp_path):
    usable, refused = outcome(damaged(kind, whole, tmp_path), tmp_path)
    assert usable.empty and len(refused) == 1
    assert pd.Series(refused.reason).str.contains(reason).all(), refused.reason[0]


def test_a_video_cut_behind_the_stretch_that_is_used_is_as_good_as_whole(whole, tmp_path):
    long = ffmpeg(
        "-stream_loop",
        "3",
        "-i",
        whole,
        "-c",
        "copy",
        "-movflags",
        "+faststart",
        tmp_path / "long.mp4",
    )
    frames = frames_of(cut(long, tmp_path / "cut.mp4", 0.75), tmp_path / "a")
    assert np.array_equal(frames, frames_of(long, tmp_path / "b"))


def test_a_video_trimmed_by_an_edit_list_is_used_with_a_note_and_a_truncated_one_is_not(
    whole, tmp_path
):
    trimmed = ffmpeg("-ss", "6", "-i", whole, "-c", "copy", tmp_path / "trimmed.mp4")
    usable, refused = outcome(trimmed, tmp_path)
    assert refused.empty and usable.note[0].startswith("an edit list shows 100 of ")
    start_first = ["-c", "copy", "-movflags", "faststart"]
    file = ffmpeg("-ss", "6", "-i", whole, *start_first, tmp_path / "cut.mp4")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    usable, refused = outcome(file, tmp_path / "again")
    assert usable.empty and "truncated or damaged" in refused.reason[0]


@pytest.mark.parametrize("form", ["mp4", "mkv", "avi", "webm", "ts.mpg"])
def test_a_long_video_gives_the_frames_that_a_pass_from_its_start_gives(
    form, tmp_path, monkeypatch
):
    """Three minutes: the decoder jumps to the first frame wanted."""
    source = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=180")
    codec = (
        ("-c:v", "libvpx", "-cpu-used", "8") if form == "webm" else ("-c:v", "libx264", "-bf", "2")
    )
    kind = ("-f", "mpegts") if form == "ts.mpg" else ()
    file = ffmpeg(
        *source, *codec, "-pix_fmt", "yuv420p", "-g", "250", *kind, tmp_path / f"long.{form}"
    )
    jumped, positions, _ = cell.read_frames(file, 6, 8.0)
    monkeypatch.setattr(cell, "LONG_LEAD", 10**9)
    passed, same, _ = cell.read_frames(file, 6, 8.0)
    assert positions.tolist() == same.tolist() and positions[0] > 2000
    assert np.array_equal(np.stack(jumped), np.stack(passed))


@pytest.mark.parametrize("form", ["mp4", "mkv"])
def test_a_long_video_of_variable_rate_is_passed_from_its_start_since_no_seek_finds_its_frames(
    form, tmp_path, monkeypatch
):
    source = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=300")
    uneven = (
        *source,
        "-vf",
        "select='lt(n,3000)+not(mod(n,3))'",
        "-fps_mode",
        "vfr",
        "-c:v",
        "libx264",
    )
    file = ffmpeg(*uneven, "-pix_fmt", "yuv420p", tmp_path / f"long.{form}")
    frames, positions, _ = cell.read_frames(file, 6, 8.0)
    monkeypatch.setattr(cell, "LONG_LEAD", 10**9)
    assert positions[0] > 1500
    assert np.array_equal(np.stack(frames), np.stack(cell.read_frames(file, 6, 8.0)[0]))


def test_few_frames_a_second_are_spread_wider_not_repeated(tmp_path):
    file = ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=size=64x48:rate=1/2:duration=60",
        "-c:v",
        "libx264",
        tmp_path / "slow.mp4",
    )
    usable, _ = outcome(file, tmp_path)
    assert usable.distinct_frames.tolist() == [6]


def test_a_colon_in_a_relative_path_is_no_protocol(whole, tmp_path, monkeypatch):
    shutil.copy(whole, tmp_path / "10:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(cell.read_frames(Path("10:30.mp4"), 4, 8.0)[0]) == 4


@pytest.mark.parametrize(
    "name", ["UPPER.MP4", "two words (1).mp4", "emoji 😀.mp4", "王小明_视频.mp4", "ünï.Mov"]
)
def test_names_do_not_matter(name, whole, tmp_path):
    shutil.copy(whole, tmp_path / name)
    frames_of(tmp_path / name, tmp_path)


def test_fewer_frames_than_asked_for_are_repeated_evenly_and_flagged(whole, tmp_path):
    file = ffmpeg("-i", whole, "-frames:v", "3", tmp_path / "short.mp4")
    usable, _ = outcome(file, tmp_path)
    assert usable.distinct_frames.tolist() == [3]
    with np.load(usable.clip_file[0]) as saved:
        assert saved["positions"].tolist() == [0, 0, 1, 1, 2, 2]


def test_huge_frames_are_read(tmp_path):
    huge = ("-f", "lavfi", "-i", "color=c=red:size=7680x4320:rate=10:duration=0.4")
    frames = frames_of(
        ffmpeg(*huge, "-c:v", "libx264", "-preset", "ultrafast", tmp_path / "huge.mp4"), tmp_path
    )
    assert (frames[..., 0] > 200).all() and (frames[..., 1:] < 60).all()


@pytest.mark.parametrize("size", ["97x63", "33x201", "18x18"])
def test_odd_and_tiny_sizes_are_read(size, tmp_path):
    source = ("-f", "lavfi", "-i", f"color=c=blue:size={size}:rate=10:duration=2")
    frames = frames_of(
        ffmpeg(*source, "-c:v", "libx264", "-pix_fmt", "yuv444p", tmp_path / "odd.mp4"), tmp_path
    )
    assert (frames[..., 2] > 200).all() and (frames[..., :2] < 60).all()


def test_grey_video_is_read_as_rgb(whole, tmp_path):
    frames = frames_of(
        ffmpeg("-i", whole, "-c:v", "libx264", "-pix_fmt", "gray", tmp_path / "grey.mp4"), tmp_path
    )
    assert np.ptp(frames.astype(int), axis=-1).max() <= 1 and frames.std() > 20


def test_a_phone_video_held_upright_gives_upright_crops(tmp_path):
    """Stored on its side with a note to turn it, as phones do; the top of the scene is white."""
    half = "drawbox=x=0:y=0:w=iw:h=ih/2:color=white:t=fill"
    source = (
        "-f",
        "lavfi",
        "-i",
        "color=c=black:size=96x160:rate=10:duration=2",
        "-vf",
        f"{half},transpose=2",
    )
    lying = ffmpeg(*source, "-c:v", "libx264", "-pix_fmt", "yuv420p", tmp_path / "lying.mp4")
    frames = frames_of(
        ffmpeg("-display_rotation", "-90", "-i", lying, "-c", "copy", tmp_path / "phone.mp4"),
        tmp_path,
    )
    assert frames[:, :20].mean() > 200 and frames[:, 28:].mean() < 50


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx")]
)
def test_a_variable_frame_rate_is_no_damage(form, codec, tmp_path):
    """Two seconds of 25 frames a second, then every seventh: Matroska promises more frames."""
    uneven = ("scene", "-vf", "select='lt(n,50)+not(mod(n,7))'", "-fps_mode", "vfr", "-c:v", codec)
    file = ffmpeg(*uneven, tmp_path / f"uneven.{form}")
    assert frames_of(file, tmp_path).std() > 20
    capture, count = cv2.VideoCapture(str(tmp_path / "set" / "fake" / file.name)), 0
    while capture.grab():
        count += 1
    assert 70 < count < 100  # so fewer frames than the 250 that its duration and rate suggest


def test_a_video_that_changes_its_size_midway_is_told_apart_from_a_good_one(tmp_path):
    for number, size in enumerate(("160x120", "320x240")):
        source = (
            "-f",
            "lavfi",
            "-i",
            f"testsrc2=size={size}:rate=25:duration=2",
            "-c:v",
            "libx264",
            "-f",
            "mpegts",
        )
        ffmpeg(*source, tmp_path / f"{number}.ts")
    joined = tmp_path / "joined.mpg"
    joined.write_bytes((tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes())
    usable, refused = outcome(joined, tmp_path)
    assert (
        len(usable) == 1 or refused.reason[0] == "changes its frame size midway"
    )  # OpenCV versions differ
