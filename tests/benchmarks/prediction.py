"""How long scoring takes and how much memory it needs, for short and long videos.

    python tests/benchmarks/prediction.py [--seconds 10 120 1200] [--rounds 3] [--model FILE] ...

It makes H.264 videos (see preparation.py) with a face, and takes the model that comes with the
project. For each length it prints seconds of: the bare decoder, which grabs every frame; the whole
judgement; the network alone, on as many clips, and heat maps; the rest of the judgement as a
multiple of the bare decoder; and how much memory the process had at most. These are medians of
`--rounds`. It uses the GPU if there is one.
"""

import argparse
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import psutil
from preparation import SIZES, make_video

from cell_01_imports_and_setup import ENVIRONMENT
from cell_03_data_processing import open_video
from cell_08_evaluation_functions import Judgement, Predictor, frame_and_heat, score_clips

PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained" / "deepfake_detector.pth"


def timed(work) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def longer(video: Path, seconds: int, file: Path) -> Path:
    """The video repeated until it is `seconds` long, without encoding it again."""
    words = ["-v", "error", "-y", "-stream_loop", "-1", "-i", video, "-t", seconds, "-c", "copy"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *map(str, [*words, file])]
    subprocess.run(command, check=True)
    return file


def decode(path: Path) -> int:
    """The bare decoder: the number of frames."""
    capture, count = open_video(path), 0
    while capture.grab():
        count += 1
    return count


def network_alone(predictor: Predictor, judged: Judgement) -> float:
    """Seconds for as many clips as were judged, and the heat maps of the report's pictures."""
    settings = predictor.settings
    clip = np.zeros((1, settings.frames, settings.size, settings.size, 3), np.uint8)
    score_clips(predictor.model, clip)
    window = next(window for window in judged.windows if not window.reason)
    window = replace(window, clip=clip[0], frame_logits=np.zeros(len(clip[0])))

    def work() -> None:
        for _ in range(sum(not window.reason for window in judged.windows)):
            score_clips(predictor.model, clip).logit.cpu()
        for _ in judged.pictures:
            frame_and_heat(predictor, window, True)

    return timed(work)[0]


def measure(predictor: Predictor, path: Path) -> tuple[float, ...]:
    """Seconds of decoder, judgement and network, rest/decoder, windows, MiB at most."""
    process, most = psutil.Process(), [0]

    def watch(_: float) -> None:
        most[0] = max(most[0], process.memory_info().rss)

    decoder, _ = timed(lambda: decode(path))
    taken, judged = timed(lambda: predictor.judge(path, progress=watch))
    assert isinstance(judged, Judgement)
    network = network_alone(predictor, judged)
    rest = (taken - network) / decoder
    return decoder, taken, network, rest, len(judged.windows), most[0] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 120, 1200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", choices=list(SIZES), default="720p")
    parser.add_argument("--model", type=Path, default=PRETRAINED)
    given = parser.parse_args()
    predictor = Predictor.load(given.model, ENVIRONMENT.device)
    print(f"{given.resolution}, {ENVIRONMENT.device}, {cv2.__version__}; seconds, MiB")
    print("length  decoder  judge  network  rest/decoder  windows  memory at most")
    with tempfile.TemporaryDirectory() as place:
        short = Path(place, "short.mp4")
        make_video(short, SIZES[given.resolution], 0)
        predictor.judge(short)
        for seconds in given.seconds:
            path = longer(short, seconds, Path(place, f"{seconds}.mp4"))
            rounds = [measure(predictor, path) for _ in range(given.rounds)]
            decoder, taken, network, rest, windows, memory = np.median(rounds, axis=0)
            print(
                f"{seconds:6}  {decoder:7.2f}  {taken:5.1f}  {network:7.2f}  {rest:12.2f}  "
                f"{windows:7.0f}  {memory:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
