"""How fast a folder of videos is scored, with the default setting.

    python tests/benchmarks/prediction.py [--videos 8] [--backbone resnet50] [--frames 16] ...

It makes H.264 videos (see preparation.py) and a network with random weights, and prints: videos a
second of `predict_folder`, which decodes ahead in threads, beside the same videos one by one;
milliseconds of the network alone, for a clip and for a video; and how much memory four times as
many videos need. It uses the GPU if there is one.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import psutil
import torch
from preparation import SIZES, make_video

from cell_01_imports_and_setup import ENVIRONMENT
from cell_02_global_config import CONFIG
from cell_03_data_processing import ClipSettings, load_face_detector
from cell_05_model_definition import build_model
from cell_08_evaluation_functions import Predictor


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--resolution", choices=list(SIZES), default="720p")
    given = parser.parse_args()
    config = dataclasses.replace(
        CONFIG,
        BACKBONE=given.backbone,
        FRAMES_PER_VIDEO=given.frames,
        CLIPS_PER_VIDEO=given.clips,
        IMAGE_SIZE=given.size,
    )
    device, workers = torch.device(ENVIRONMENT.device), os.cpu_count() or 1
    model = build_model(config).to(device).eval()
    predictor = Predictor(model, ClipSettings.of(config), load_face_detector(ENVIRONMENT.device))

    with tempfile.TemporaryDirectory() as place:
        few, many = Path(place, "few"), Path(place, "many")
        few.mkdir()
        many.mkdir()
        for number in range(given.videos):
            make_video(few / f"{number}.mp4", SIZES[given.resolution], number)
            for copy in range(4):
                os.link(few / f"{number}.mp4", many / f"{number}-{copy}.mp4")
        paths = sorted(few.glob("*.mp4"))
        predictor.predict_video(paths[0])
        rounds = [
            (
                seconds(lambda: [predictor.predict_video(path) for path in paths]),
                seconds(lambda: predictor.predict_folder(few, workers)),
            )
            for _ in range(3)
        ]
        in_turn, together = (sorted(times)[1] for times in zip(*rounds, strict=True))
        print(f"{given.videos} videos of {given.resolution}, 10 s, on {device}, {workers} threads:")
        print(f"  one after the other  {given.videos / in_turn:.2f} videos/s")
        faster = f"{in_turn / together:.2f} times as fast"
        print(f"  predict_folder       {given.videos / together:.2f} videos/s, {faster}")
        process = psutil.Process()
        before = process.memory_info().rss
        predictor.predict_folder(many, workers)
        grown = (process.memory_info().rss - before) / 2**20
        print(f"  {4 * given.videos} videos           {grown:+.0f} MiB of {before / 2**20:.0f} MiB")

    def network(frames: int) -> float:
        clips = torch.rand(1, frames, 3, given.size, given.size, device=device)

        def score() -> None:
            with torch.inference_mode():
                model(clips).logit.cpu()

        score()
        return 1000 * sorted(seconds(score) for _ in range(9))[4]

    clip, video = network(given.frames), network(given.frames * given.clips)
    print(f"  the network alone    {clip:.0f} ms a clip, {video:.0f} ms a video")


if __name__ == "__main__":
    main()
