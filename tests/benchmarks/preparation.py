"""How fast videos become clips, against what OpenCV alone can do in the same run.

    python tests/benchmarks/preparation.py [--videos 4] [--frames 16] [--folder VIDEOS]

It makes H.264 videos of 1080p, 720p and 480p with a talking-head scene (10 s, 30 frames a second, a
key frame every 8 s), or takes yours, and prints: seconds a video beside the floor (one sequential
pass of grab() up to the last frame needed, converting only those, with as many threads) and beside
16 seeks; two threads against one; a second run from the cache; the peak memory with 20 and with 200
videos.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kaggle_cells"))

import cv2
import imageio_ffmpeg
import numpy as np
import pandas as pd

import cell_03_data_processing as cell

SIZES = {"1080p": (1920, 1080), "720p": (1280, 720), "480p": (854, 480)}


def make_video(file: Path, size: tuple[int, int], number: int, seconds: float = 10) -> None:
    """A portrait that moves over a noisy background, as H.264 with long groups of pictures."""
    rng, (width, height) = np.random.default_rng(number), size
    face = (cell.load_portrait() * 255).astype(np.uint8)
    scale = height * rng.uniform(0.5, 0.9) / len(face)
    face = cv2.resize(face, None, fx=scale, fy=scale)
    noise = [rng.integers(0, 6, (height, width, 3), np.uint8) for _ in range(5)]
    backdrop = cv2.resize(rng.integers(40, 200, (height // 8, width // 8, 3), np.uint8), size)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-y",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "bgr24",
    ]
    command += [
        "-s",
        f"{width}x{height}",
        "-r",
        "30",
        "-i",
        "-",
        "-c:v",
        "libx264",
        "-preset",
        "veryfast",
    ]
    command += ["-pix_fmt", "yuv420p", "-g", "240", "-keyint_min", "240", str(file)]
    encoder = subprocess.Popen(command, stdin=subprocess.PIPE)
    pipe: Any = encoder.stdin
    for index in range(int(30 * seconds)):
        t = index / 30
        left = int((width - face.shape[1]) * (0.5 + 0.2 * np.sin(t + number)))
        top = int((height - face.shape[0]) * (0.5 + 0.4 * np.sin(1.7 * t)))
        frame = np.roll(backdrop, int(20 * t), axis=1)
        frame[top : top + face.shape[0], left : left + face.shape[1]] = face
        frame = cv2.add(frame, noise[index % 5])
        pipe.write(frame.tobytes())
    pipe.close()
    if encoder.wait():
        raise OSError(f"ffmpeg could not write {file}")


def positions_of(path: Path, frames: int) -> list[int]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    return cell.frame_positions(total, frames, fps, 8.0).tolist()


def floor(path: Path, positions: list[int]) -> None:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for number in range(positions[-1] + 1):
        capture.grab()
        if number in positions:
            capture.retrieve()


def seeks(path: Path, positions: list[int]) -> None:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for number in positions:
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        capture.read()


def seconds_of(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def one_by_one(name: str, files: list[Path], settings: cell.ClipSettings, detector) -> None:
    """Clip, floor and seeks of each video in turn, so that a busy machine slows all three."""
    rows = []
    for file in files:
        positions = positions_of(file, settings.frames)
        rows.append([seconds_of(cell.make_clip, file, settings, detector)])
        rows[-1] += [seconds_of(floor, file, positions), seconds_of(seeks, file, positions)]
    clip, base, seek = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(row[0] / row[1] for row in rows)
    faster = statistics.median(row[2] / row[0] for row in rows)
    print(
        f"{name:6} {clip:.2f} s a video, floor {base:.2f} s, ratio {ratio:.2f}; "
        f"{settings.frames} seeks {seek:.2f} s, {faster:.1f} times as long"
    )


def in_threads(files: list[Path], settings: cell.ClipSettings, detector, folder: Path) -> None:
    """All files with one and two threads, each beside its floor, and again from the cache."""
    table = pd.DataFrame({"path": files, "label": 0, "dataset": "d"})
    positions = {file: positions_of(file, settings.frames) for file in files}
    took = {}
    for workers in (1, 2):
        with ThreadPoolExecutor(workers) as pool:
            base = seconds_of(
                lambda pool=pool: list(pool.map(lambda file: floor(file, positions[file]), files))
            )
        cache = folder / f"cache{workers}"
        took[workers] = seconds_of(cell.cache_clips, table, settings, cache, detector, workers)
        again = seconds_of(cell.cache_clips, table, settings, cache, detector, workers)
        print(
            f"{cell.plural(workers, 'thread')}: {len(files)} videos in {took[workers]:.1f} s, "
            f"floor {base:.1f} s, "
            f"ratio {took[workers] / base:.2f}; again from the cache {again:.3f} s, "
            f"{100 * again / took[workers]:.2f} %"
        )
    print(f"two threads against one: {took[1] / took[2]:.2f} times as fast")


def peak_memory(file: Path, count: int, folder: Path) -> None:
    """In a process of its own: the peak with `count` copies of one video."""
    copies = folder / f"copies{count}"
    copies.mkdir(exist_ok=True)
    for number in range(count):
        shutil.copy(file, copies / f"{number}.mp4")
    settings = cell.ClipSettings(frames=16, seconds=8.0, size=160, face_crop=True, margin=0.25)
    table = pd.DataFrame({"path": sorted(copies.iterdir()), "label": 0, "dataset": "d"})
    cell.cache_clips(table, settings, folder / f"memory{count}", cell.load_face_detector("cpu"), 2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=4, help="videos of each size")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--folder", type=Path, help="videos of your own instead")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        return peak_memory(Path(given.memory[0]), int(given.memory[1]), Path(given.memory[2]))
    settings = cell.ClipSettings(
        frames=given.frames, seconds=8.0, size=160, face_crop=True, margin=0.25
    )
    detector = cell.load_face_detector("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sets = {"yours": cell.media_below(given.folder)} if given.folder else {}
        for name, size in {} if given.folder else SIZES.items():
            sets[name] = [folder / f"{name}_{number}.mp4" for number in range(given.videos)]
            for number, file in enumerate(sets[name]):
                make_video(file, size, number)
        cell.torch.set_num_threads(1)
        cell.make_clip(
            next(iter(sets.values()))[0], settings, detector
        )  # loads what is loaded once
        for name, files in sets.items():
            one_by_one(name, files, settings, detector)
        in_threads([file for files in sets.values() for file in files], settings, detector, folder)
        peaks = []
        for count in (20, 200):
            small = min(
                (file for files in sets.values() for file in files),
                key=lambda file: file.stat().st_size,
            )
            command = [sys.executable, __file__, "--memory", str(small), str(count), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(float(done.stdout.split()[-1]))
        print(
            f"peak memory: {peaks[0]:.0f} MiB with 20 videos, {peaks[1]:.0f} with 200, "
            f"ratio {peaks[1] / peaks[0]:.2f}"
        )


if __name__ == "__main__":
    main()
