"""Scoring looks at all of a video and every face, and says where, what not, and why."""

import dataclasses
import re
import shutil
from pathlib import Path

import conftest
import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from test_odd_and_damaged_videos import cut, ffmpeg

import cell_03_data_processing as data
import cell_08_evaluation_functions as cell
from cell_03_data_processing import ClipSettings, VideoError, Window, make_clip, write_video
from cell_05_model_definition import DetectorOutput

SMALL = ClipSettings(**conftest.SMALL)
FPS = 5


class Detail(torch.nn.Module):
    """Calls faces with little detail fake: the fakes of this test are blurred."""

    frames = 4

    def __init__(self, between: float) -> None:
        super().__init__()
        self.backbone, self.between = torch.nn.Identity(), between
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, clips):
        detail = clips.diff(dim=-1).abs().mean(dim=(2, 3, 4))
        frame_logits = 12 * self.weight * torch.log(self.between / detail)
        return DetectorOutput(frame_logits.mean(dim=1), frame_logits, frame_logits)


def there_and_back(frames: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` frames of a short scene without a jump."""
    cycle = frames + frames[-2:0:-1]
    return [cycle[i % len(cycle)] for i in range(count)]


@pytest.fixture(scope="module")
def people(once) -> list[dict[str, list[np.ndarray]]]:
    """Two people, real and faked, in the same scenes of 30 frames (240, 240, 3)."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "DEMO_FRAMES", (30, 31))
            for number in (1, 7):
                frames = data.demo_frames(data.load_portrait(), number, "real", seed=3)
                frames = [cv2.resize(frame, (240, 240)) for frame in frames]
                np.save(folder / f"{number}.npy", np.stack(frames))

    folder = once("people", make)
    reals = [[*np.load(folder / f"{number}.npy")] for number in (1, 7)]
    return [
        {"real": real, "fake": [cv2.GaussianBlur(frame, (0, 0), 2) for frame in real]}
        for real in reals
    ]


@pytest.fixture(scope="module")
def predictor(people, face_detector, tmp_path_factory):
    """It tells these people's real faces from their fakes."""
    details = []
    for person in people:
        for kind in ("real", "fake"):
            file = tmp_path_factory.mktemp("clip") / "clip.mp4"
            write_video(file, person[kind], FPS)
            clip = make_clip(file, SMALL, face_detector).frames
            batch = cell.normalize(cell.to_float(torch.from_numpy(clip)[None]))
            details.append(float(batch.diff(dim=-1).abs().mean()))
    real, fake = min(details[::2]), max(details[1::2])
    assert fake < 0.8 * real, details
    return cell.Predictor(Detail((real * fake) ** 0.5), SMALL, face_detector, fingerprint="detail")


def splice(person: dict, seconds: float, start: float, length: float) -> list[np.ndarray]:
    """A real video with a fake stretch."""
    count = round(seconds * FPS)
    real, fake = (there_and_back(person[kind], count) for kind in ("real", "fake"))
    return [fake[i] if start <= i / FPS < start + length else real[i] for i in range(count)]


def judged_seconds(judged: cell.Judgement) -> float:
    return cell.seconds_in(w for w in judged.windows if w.face and not w.reason)


# Where


def test_the_crops_of_a_window_are_those_of_a_training_clip(demo_set, face_detector):
    for file in sorted(demo_set.glob("*/*.mp4"))[::6]:
        ((window,),) = data.face_windows(file, SMALL, face_detector)
        assert np.array_equal(window.clip, make_clip(file, SMALL, face_detector).frames)
        assert window.reason == "" and window.face == 1 and window.seen == 1


@pytest.mark.parametrize(
    ("length", "start"),
    [
        (3, 0),
        pytest.param(3, 61, marks=pytest.mark.slow),
        pytest.param(3, 117, marks=pytest.mark.slow),
        pytest.param(8, 0, marks=pytest.mark.slow),
        (8, 61),
        pytest.param(8, 112, marks=pytest.mark.slow),
        pytest.param(20, 0, marks=pytest.mark.slow),
        pytest.param(20, 50, marks=pytest.mark.slow),
        (20, 100),
    ],
)
def test_a_fake_stretch_in_two_minutes_is_found_in_its_place(
    length, start, people, predictor, tmp_path
):
    write_video(tmp_path / "long.mp4", splice(people[0], 120, start, length), FPS)
    judged = predictor.judge(tmp_path / "long.mp4")
    assert judged.start < start + length and start < judged.end  # they overlap
    assert abs(judged.start - start) <= 8 and abs(judged.end - start - length) <= 8
    assert judged.verdict == "fake" or length == 3  # 3 of 8 seconds: at least the place is right
    assert judged_seconds(judged) == pytest.approx(120, abs=0.5) and len(judged.faces) == 1


def test_a_real_video_is_called_real_whatever_its_length(people, predictor, tmp_path):
    write_video(tmp_path / "real.mp4", splice(people[0], 60, 0, 0), FPS)
    judged = predictor.judge(tmp_path / "real.mp4")
    assert judged.verdict == "real" and judged.probability < 0.5 and len(judged.windows) == 8


def test_of_two_people_side_by_side_the_fake_one_is_named(people, predictor, tmp_path):
    left = there_and_back(people[0]["real"], 60)
    right = there_and_back(people[1]["fake"], 60)
    frames = [np.hstack(pair) for pair in zip(left, right, strict=True)]
    write_video(tmp_path / "two.mp4", frames, FPS)
    judged = predictor.judge(tmp_path / "two.mp4")
    assert judged.verdict == "fake" and len(judged.faces) == 2
    for face, windows in judged.faces.items():
        is_right = all(window.box[0] > 220 for window in windows)
        assert is_right == (face == judged.face)
        assert all((window.probability > 0.5) == is_right for window in windows)


def test_a_face_that_leaves_and_comes_back_is_judged_while_it_is_there(people, predictor, tmp_path):
    there = there_and_back(people[0]["real"], 100)
    away = [np.full_like(there[0], 120)] * 60
    write_video(tmp_path / "leaves.mp4", [*there, *away, *there], FPS)
    judged = predictor.judge(tmp_path / "leaves.mp4")
    first, second = judged.faces.values()
    assert first[-1].end == pytest.approx(20, abs=2.1) and second[0].start >= 31.8
    assert judged_seconds(judged) == pytest.approx(40, abs=3)
    assert "no face found" in {window.reason for window in judged.windows}


def test_a_cut_between_two_people_ends_a_track(people, predictor, tmp_path):
    frames = [*there_and_back(people[0]["real"], 55), *there_and_back(people[1]["fake"], 65)]
    write_video(tmp_path / "cut.mp4", frames, FPS)
    judged = predictor.judge(tmp_path / "cut.mp4")
    assert [*judged.faces] == [1, 2] and judged.face == 2 and judged.verdict == "fake"
    assert judged.faces[1][-1].end == pytest.approx(11, abs=1.1)
    assert judged.start == pytest.approx(11, abs=1.1) and judged.end == pytest.approx(24, abs=0.2)


def test_windows_can_lie_closer_or_be_limited_and_spread_evenly(people, predictor, tmp_path):
    write_video(tmp_path / "real.mp4", splice(people[0], 40, 0, 0), FPS)

    def starts(*how) -> list[float]:
        return [round(window.start) for window in predictor.scan(tmp_path / "real.mp4", *how)]

    assert starts() == [0, 8, 16, 24, 32]
    assert starts(4.0) == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert starts(0, 3) == [0, 16, 32] and starts(4.0, 2) == [0, 32]


# What people have


def odd(kind: str, frames: list[np.ndarray], folder: Path) -> Path:
    plain, file = folder / "plain.mp4", folder / "video.mp4"
    write_video(plain, frames, FPS)
    h264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
    if kind == "phone":
        lying = ffmpeg("-i", plain, "-vf", "transpose=2", *h264, folder / "lying.mp4")
        return ffmpeg("-display_rotation", "-90", "-i", lying, "-c", "copy", file)
    if kind == "uneven":
        half = ("-vf", "select='lt(n,60)+not(mod(n,2))'", "-fps_mode", "vfr")
        return ffmpeg("-i", plain, *half, *h264, file)
    if kind == "emoji":
        return Path(shutil.copy(plain, folder / "my 😀 video.mp4"))
    if kind == "truncated":
        whole = ffmpeg("-i", plain, *h264, "-movflags", "+faststart", folder / "whole.mp4")
        return cut(whole, file, 0.6)
    if kind == "one frame":
        return ffmpeg("-i", plain, "-frames:v", "1", *h264, file)
    if kind == "folder":
        file.mkdir()
        return file
    if kind == "sound":
        return ffmpeg("-f", "lavfi", "-i", "sine=duration=2", file)
    blurred = [cv2.GaussianBlur(frame, (0, 0), 7) for frame in frames]
    small = [cv2.copyMakeBorder(cv2.resize(f, (80, 80)), 80, 80, 80, 80, 0) for f in frames]
    pictures = {"faceless": [np.full_like(frames[0], 120)] * 60, "blurred": blurred, "small": small}
    write_video(file, pictures[kind], FPS)
    return file


@pytest.mark.parametrize("kind", ["real", "fake"])
def test_a_video_of_less_than_a_second_is_judged(kind, people, predictor, tmp_path):
    write_video(tmp_path / "short.mp4", people[0][kind][:4], FPS)
    assert predictor.judge(tmp_path / "short.mp4").verdict == kind


def test_a_picture_of_many_colours_is_no_cut_after_itself():
    colours = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    assert not data.is_cut(colours[0], colours[0]) and data.is_cut(colours[0], colours[1] // 2)


def test_light_that_changes_within_seconds_is_no_cut_for_a_model_of_few_frames(
    face_detector, tmp_path
):
    portrait = cv2.resize(data.load_portrait()[20:500], (240, 225)) * 255
    turns = 2 * np.pi * (np.arange(16 * FPS) / (8 * FPS))[:, None] + [0.0, 2.1, 4.2]
    frames = [(portrait * light).astype(np.uint8) for light in 0.6 + 0.3 * np.cos(turns)]
    write_video(tmp_path / "disco.mp4", frames, FPS)
    windows = [*data.face_windows(tmp_path / "disco.mp4", SMALL, face_detector)]
    assert [[(w.face, w.reason) for w in faces] for faces in windows] == [[(1, "")], [(1, "")]]


@pytest.mark.parametrize("kind", ["phone", "uneven", "emoji", "truncated"])
def test_odd_videos_are_judged(kind, people, predictor, tmp_path):
    frames = splice(people[0], 24, 16, 8)
    file = odd(kind, frames, tmp_path)
    if kind == "truncated":
        judged = predictor.judge(file)
        assert "truncated" in judged.problem and "s are missing" in judged.problem
        assert judged.verdict == "real" and 8 <= judged_seconds(judged) < 20
        return
    judged = predictor.judge(file)
    assert judged.verdict == "fake" and judged.start == pytest.approx(16, abs=8)
    assert judged.length == pytest.approx(24, abs=1.5) and judged.problem == ""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("faceless", "no face found"), ("blurred", "too blurred"), ("small", "too small: ")],
)
def test_what_training_would_not_know_is_not_judged_and_the_reason_is_said(
    kind, reason, people, predictor, tmp_path
):
    large = dataclasses.replace(predictor, settings=dataclasses.replace(SMALL, size=160))
    judged = large.judge(odd(kind, people[0]["fake"], tmp_path))
    assert judged.verdict == "no face to judge" and np.isnan(judged.probability)
    assert reason in " ".join(window.reason for window in judged.windows)


def test_larger_crops_of_a_face_change_nothing_about_whether_it_is_judged():
    portrait = (data.load_portrait()[100:388, 121:409] * 255).astype(np.uint8)
    moments = [data.Moment(i, float(i), portrait, 1, True) for i in range(8)]
    sharpness = []
    for size in (192, 256):
        crop = cv2.resize(portrait, (size, size), interpolation=cv2.INTER_AREA)
        sharpness.append(data.measure_sharpness(crop[None]))
        settings = ClipSettings(8, 8.0, size, face_crop=True, margin=0.1)
        for face, reason in ((70.0, ""), (60.0, "too small: 60 pixels, where 64 are needed")):
            window = Window(1, 0.0, 8.0, size=face, sharpness=data.LEAST_SHARPNESS)
            assert data.why_not(window, moments, 8, settings) == reason
    assert sharpness[1] == pytest.approx(sharpness[0], rel=0.35)  # measured there, it is a half


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("one frame", "holds 1 frame"), ("sound", "sound alone"), ("folder", "without pictures")],
)
def test_what_cannot_be_decoded_says_why(kind, reason, people, predictor, tmp_path):
    file = odd(kind, people[0]["real"], tmp_path)
    with pytest.raises(VideoError, match=f"video.mp4: .*{reason}"):
        predictor.judge(file)


@pytest.mark.slow
def test_two_hours_need_no_more_memory_than_two_minutes(predictor, tmp_path):
    pictures = ("-f", "lavfi", "-i", "testsrc2=size=160x120:rate=5:duration=")
    for name, seconds in {"short": 120, "long": 7200}.items():
        source = (*pictures[:-1], f"{pictures[-1]}{seconds}")
        ffmpeg(*source, "-c:v", "libx264", "-preset", "ultrafast", tmp_path / f"{name}.mp4")
    process = psutil.Process()
    for _ in predictor.scan(tmp_path / "short.mp4"):
        pass
    before, most, last = process.memory_info().rss, 0, 0.0
    for window in predictor.scan(tmp_path / "long.mp4"):
        most, last = max(most, process.memory_info().rss), window.end
    assert last == pytest.approx(7200, abs=1) and most - before < 30 * 2**20


# Verdicts


def windows_of(logits: list[float], face: int = 1) -> list[Window]:
    return [
        Window(face, 8.0 * i, 8.0 * i + 8, logit=logit, probability=1 / (1 + np.exp(-logit)))
        for i, logit in enumerate(logits)
    ]


def test_a_single_bad_window_does_not_decide_but_a_certain_one_or_two_in_a_row_do(predictor):
    def verdict(*logits: float) -> str:
        judgement = cell.Judgement("x.mp4", windows=windows_of([*logits]))
        cell.sum_up(predictor, judgement)
        return judgement.verdict

    assert verdict(-2, -2, 1.5, -2, -2) == "real"
    assert verdict(-2, -2, 1.5, 1.5, -2) == "fake"
    assert verdict(-2, -2, 6, -2, -2) == "fake"
    assert verdict(1.5) == "fake"


def test_a_video_is_as_suspicious_as_its_most_suspicious_face(predictor):
    windows = windows_of([-3, -3, -3]) + windows_of([-1, 2, 3], face=2)
    windows.append(Window(3, 0.0, 8.0, reason="too blurred"))
    judgement = cell.Judgement("x.mp4", windows=windows)
    cell.sum_up(predictor, judgement)
    assert (judgement.face, judgement.start, judgement.end) == (2, 8, 24)
    assert len(judgement.faces) == 2 and judgement.verdict == "fake"


def test_the_faces_with_pictures_are_those_of_the_most_suspicious_stretches():
    extremes = cell.Extremes()
    windows = windows_of([4, -9])
    for face in range(2, 2 + cell.FACES_SHOWN):
        windows += windows_of([2, 2], face=face)
    for number, window in enumerate(windows, start=1):
        cell.keep_extremes(extremes, window, cell.judged_faces(windows[:number]))
    assert sorted(extremes) == [*range(2, 2 + cell.FACES_SHOWN)]


def test_the_share_with_a_face_is_that_of_what_was_looked_at():
    first, *_, last = windows_of([-1] * 20)
    judgement = cell.Judgement("x.mp4", "real", 0.3, 1, 0.0, 8.0, [first, last])
    table = cell.predictions_table([judgement], 0.5)
    assert table.face_share.tolist() == [1.0] and table.seconds_judged.tolist() == [16.0]


def test_limits_are_where_nine_in_ten_are_right_and_the_rest_is_uncertain(predictor):
    labels = np.repeat([0, 1], 200)
    logits = np.random.default_rng(0).normal(2 * labels - 1, 1.5)
    found = cell.calibrate(logits, labels)
    probs = cell.probabilities(logits - found["offset"], found["temperature"])
    called_fake, called_real = probs >= found["sure_fake"], probs <= found["sure_real"]
    assert 0.9 <= (labels[called_fake] == 1).mean() < 0.92
    assert 0.9 <= (labels[called_real] == 0).mean() < 0.92
    limits = found["sure_real"], found["sure_fake"]
    assert limits[0] < found["threshold"] < limits[1]
    judge = dataclasses.replace(predictor, limits=limits)
    assert [judge.verdict(p) for p in (0.01, 0.5, 0.99)] == ["real", "uncertain", "fake"]
    assert [predictor.verdict(p) for p in (0.01, 0.5, 0.99)] == ["real", "fake", "fake"]


def test_where_nine_in_ten_are_never_right_all_is_uncertain_and_where_all_are_nothing():
    labels = np.repeat([0, 1], 50)
    chance = cell.calibrate(np.tile(np.arange(50.0), 2), labels)
    assert chance["sure_fake"] > 1 and chance["sure_real"] < 0
    perfect = cell.calibrate(np.where(labels, 5.0, -5.0) + np.arange(100) / 100, labels)
    assert perfect["sure_fake"] == perfect["sure_real"] == perfect["threshold"]


# Many videos


@pytest.fixture
def folder(people, tmp_path) -> Path:
    """Five short videos, two of them of one name, and one that is none."""
    for number in range(4):
        (tmp_path / "videos" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        kind = "fake" if number == 3 else "real"
        file = tmp_path / "videos" / str(number % 2) / f"{number // 2}.mp4"
        write_video(file, people[0][kind][:12], FPS)
    (tmp_path / "videos" / "<b>none.mp4").write_text("no video")
    return tmp_path / "videos"


def test_each_video_gets_a_row_and_each_face_and_window_one(folder, predictor, tmp_path):
    table = cell.judge_videos(predictor, data.media_below(folder), tmp_path / "out")
    assert list(table) == cell.PREDICTION_COLUMNS
    assert table.verdict.fillna("none").tolist() == ["real", "real", "real", "fake", "none"]
    assert "not a video" in table.error[4] and table.error[:4].eq("").all()
    assert table.faces[:4].eq(1).all() and table["to"][0] == pytest.approx(2.4, abs=0.15)
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 5
    windows = pd.read_csv(tmp_path / "out" / "windows.csv")
    assert windows.path.tolist() == table.path[:4].tolist() and windows.probability.notna().all()


def test_a_stopped_run_goes_on_and_what_changed_is_judged_again(folder, predictor, tmp_path):
    videos, seen = data.media_below(folder), []

    def stop(judgement):
        seen.append(judgement.path)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cell.judge_videos(predictor, videos, tmp_path / "out", tell=stop)
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 2
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "judged").iterdir()}
    table = cell.judge_videos(predictor, videos, tmp_path / "out")
    assert len(kept) == 2 and len(table) == 5
    next(iter(kept)).write_text("")  # damaged: judged again
    repaired = cell.judge_videos(predictor, videos, tmp_path / "out")
    assert repaired.drop(columns="seconds").equals(table.drop(columns="seconds"))
    table, kept = repaired, dict([*kept.items()][1:])
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    again = cell.judge_videos(predictor, videos, tmp_path / "out")
    assert again.equals(table)  # seconds and all: nothing was judged twice
    shutil.copy(videos[3], videos[0])
    changed = cell.judge_videos(predictor, videos, tmp_path / "out")
    assert changed.verdict[0] == "fake" and changed[1:].equals(table[1:])
    other = dataclasses.replace(predictor, fingerprint="other")
    cell.judge_videos(other, videos[:1], tmp_path / "out")
    assert len([*(tmp_path / "out" / "judged").iterdir()]) == 6


def test_pictures_are_scored_like_videos_and_recalled(people, predictor, tmp_path):
    cv2.imwrite(str(tmp_path / "face.png"), people[0]["fake"][0])
    too_long = tmp_path / f"{'x' * 300}.mp4"  # the file system allows no such name
    for _ in range(2):
        table = cell.judge_videos(predictor, [tmp_path / "face.png", too_long], tmp_path / "out")
        assert table.verdict[0] == "fake" and table.face_share[0] == 1
        assert "cannot be read" in table.error[1]


# The page


@pytest.fixture
def page(folder, predictor, tmp_path) -> Path:
    cell.judge_videos(predictor, data.media_below(folder), tmp_path / "out")
    return tmp_path / "out" / "report.html"


def test_the_page_is_whole_sorted_and_escapes_names(page):
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;none.mp4" in text and "<b>none" not in text
    assert "http" not in text and 'src="data:image/jpeg' in text
    verdicts = [part.split('"')[0] for part in text.split('class="verdict ')[1:]]
    assert verdicts == ["fake", "real", "real", "real", ""]
    assert "3 real, 1 fake, 1 not readable" in text and "never proof" in text


def test_windows_that_overlap_do_not_hide_one_another_in_the_timeline(predictor):
    windows = [Window(1, 2.0 * i, 2.0 * i + 8, logit=0, probability=0.5) for i in range(3)]
    windows.append(Window(1, 20.0, 28.0, logit=0, probability=0.5))
    windows.append(Window(1, 22.0, 30.0, reason="too blurred"))
    card = cell.inline_html(cell.Judgement("x.mp4", "real", 0.5, 1, 0, 8, windows), predictor)
    spans = re.findall(r'<rect x="([-\d.]+)" width="([-\d.]+)"', card)
    ends = [(float(start), float(start) + float(width)) for start, width in spans]
    assert ends == [(0, 2), (2, 4), (4, 12), (20, 22), (22, 30)]


@pytest.mark.slow
def test_the_page_works_in_a_browser_and_on_a_phone(page):
    playwright = pytest.importorskip("playwright.sync_api")
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        view, errors = browser.new_page(viewport={"width": 390, "height": 800}), []
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        view.on("request", lambda asked: errors.append(asked.url) if "http" in asked.url else None)
        view.goto(page.as_uri())
        first = view.locator("details").first
        assert first.get_attribute("data-name") == "1.mp4" and not first.locator("svg").is_visible()
        first.locator("summary").click()
        assert first.locator("svg").is_visible() and first.locator("figure img").count() >= 1
        assert view.evaluate("document.documentElement.scrollWidth") <= 390
        view.select_option("#sort", "name")
        names = [card.get_attribute("data-name") for card in view.locator("details").all()]
        assert names == ["<b>none.mp4", "0.mp4", "0.mp4", "1.mp4", "1.mp4"] and errors == []
        browser.close()
