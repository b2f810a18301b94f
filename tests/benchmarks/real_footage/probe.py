"""Which crops hold evidence? Linear probes on frozen features: minutes a line instead of hours.

    python tests/benchmarks/real_footage/probe.py CORPUS MODEL.pth [--crops 112:0 192:0.1 ...]

MODEL is a MobileNetV2 of this project, such as pretrained/deepfake_detector.pth. Four frames of
each video are cut to each size in pixels and margin around the face box, and described by the
backbone as it is: mean and deviation of its maps after five blocks. Logistic regression on three of
leave_out.py's folds scores the videos of the fourth. The AUCs are lower than after training, but
they rank the crops as training does.
"""

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from evaluate import aucs, cache_corpus
from leave_out import may_be_known, with_folds
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from cell_03_data_processing import ClipSettings, load_clip
from cell_04_dataset_class import normalize, to_float
from cell_05_model_definition import load_detector

SOURCE = ClipSettings(frames=16, seconds=8.0, size=320, face_crop=True, margin=0.25)
BLOCKS = (3, 6, 10, 13, 18)  # the last of each size of maps, and the last of all


def cut_out(frames: np.ndarray, size: int, margin: float) -> torch.Tensor:
    """Clips (1, T, 3, size, size) with another margin, from frames with that of SOURCE."""
    side = round(SOURCE.size * (1 + 2 * margin) / (1 + 2 * SOURCE.margin))
    first = (SOURCE.size - side) // 2
    middle = frames[:, first : first + side, first : first + side]
    resized = [cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in middle]
    return to_float(torch.from_numpy(np.stack(resized)[None]))


@torch.no_grad()
def describe(features: Any, clips: torch.Tensor) -> np.ndarray:
    """The description (D,) of a clip (1, T, 3, S, S) by a list of blocks: its frames' mean."""
    maps, parts = normalize(clips)[0].contiguous(memory_format=torch.channels_last), []
    for number, block in enumerate(features):
        maps = block(maps)
        if number in BLOCKS:
            parts += [maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))]
    return torch.cat(parts, dim=1).mean(dim=0).numpy()


def left_out_logits(videos: pd.DataFrame, described: np.ndarray) -> np.ndarray:
    """The logit of each video (N,) from descriptions (N, D), by the other folds' regression."""
    logits = np.full(len(videos), np.nan)
    for fold in sorted({*videos.fold}):
        tested = videos.fold == fold
        known = may_be_known(videos, tested)
        # Generators by the root of their number of videos, both classes alike.
        weight = videos[known].groupby("method").method.transform("size") ** -0.5
        weight /= weight.groupby(videos.label[known]).transform("sum")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-4, max_iter=500))
        weights = (weight * known.sum()).to_numpy()
        model.fit(described[known], videos.label[known], logisticregression__sample_weight=weights)
        logits[tested] = model.decision_function(described[tested])
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--crops", nargs="+", default=["112:0", "160:0", "192:0", "192:0.1"])
    given = parser.parse_args()
    backbone = load_detector(given.model)[0].backbone
    videos = with_folds(cache_corpus(given.corpus, SOURCE, torch.get_num_threads()))
    for crop in given.crops:
        size, margin = crop.split(":")
        files = tqdm(videos.clip_file, crop, leave=False)
        clips = (cut_out(load_clip(file)[0][1::4], int(size), float(margin)) for file in files)
        described = np.stack([describe(backbone.get_submodule("features"), clip) for clip in clips])
        scores = pd.Series(left_out_logits(videos, described), index=videos.index)
        print(f"{crop}: {aucs(videos, scores)}", flush=True)


if __name__ == "__main__":
    main()
