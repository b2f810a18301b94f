"""How long still pictures take on their way into training, against decoding them.

    python tests/benchmarks/pictures.py [--pictures 5000] [--folder STILLS]

It makes face crops of 224 pixels, or takes the pictures of a folder, and prints microseconds of one
core a picture: finding and grouping them, checking the files, reading each once to see that it is
whole, reading it for training; and `cv2.imdecode` of the same files. The picture of a face crop is
its own clip, so nothing is written.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kaggle_cells"))

import cv2
import numpy as np
import pandas as pd

from cell_03_data_processing import (
    ClipSettings,
    cache_clips,
    check_files,
    find_videos,
    load_clip,
    load_portrait,
    reshaped,
)

SIZE = 112


def make_pictures(folder: Path, count: int) -> Path:
    """Half of them real, half fake, each with pixels of its own."""
    rng = np.random.default_rng(0)
    face = cv2.resize(reshaped(load_portrait(), rng)[120:360, 145:385], (224, 224))
    for number in range(count):
        file = folder / ("real", "fake")[number % 2] / f"{number // 2:06}.jpg"
        file.parent.mkdir(exist_ok=True)
        noisy = face + rng.normal(0, 0.03, face.shape)
        pixels = (255 * noisy.clip(0, 1)).astype(np.uint8)
        file.write_bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes())
    return folder


def measure(folder: Path) -> pd.Series:
    """Microseconds of CPU a picture for each step."""
    settings, seconds = ClipSettings(1, 8.0, SIZE, False, 0.0), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        seconds[name] = time.process_time() - started
        return result

    found = timed("find and group", lambda: find_videos(folder))
    good, _ = timed("check files", lambda: check_files(found, 1))
    made, _ = timed("read once", lambda: cache_clips(good, settings, folder / "cache", None, 1))
    timed("read for training", lambda: [load_clip(file, SIZE) for file in made.clip_file])
    contents = [np.fromfile(path, np.uint8) for path in made.clip_file]
    timed("bare decoder", lambda: [cv2.imdecode(content, 1) for content in contents])
    return pd.Series(seconds) / len(found) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cost = measure(given.folder or make_pictures(Path(place), given.pictures))
    table = pd.DataFrame({"us a picture": cost, "of the decoder": cost / cost["bare decoder"]})
    before = cost[["find and group", "check files", "read once"]].sum() / cost["bare decoder"]
    print(table.round(2).to_string())
    print(f"Before training: {before:.1f} times the bare decoder")


if __name__ == "__main__":
    main()
