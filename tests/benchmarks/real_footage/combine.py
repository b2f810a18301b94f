"""How do frames become a video's score? Rules compared on the models that leave_out.py trained.

    python tests/benchmarks/real_footage/combine.py CORPUS RUNS [--also MORE_RUNS]

RUNS is leave_out.py's --output. Each video is scored by the model of its fold, frame by frame, as
it is and mirrored. Prints the AUC, with intervals, of each way to sum up 16 frames: of all videos
and of each kind of fakes. With --also, those of the sum with another leave_out.py's scores, too.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from evaluate import cache_corpus
from leave_out import with_folds
from probe import aucs
from tqdm import tqdm

from cell_03_data_processing import ClipSettings, load_clip
from cell_05_model_definition import DeepfakeDetector, load_detector
from cell_08_evaluation_functions import probabilities, score_clips

Rule = Callable[[np.ndarray], np.ndarray]


def sorted_part(first: int, end: int) -> Rule:
    """The mean of the frames from rank `first` to before rank `end`."""
    return lambda logits: np.sort(logits, axis=1)[:, first:end].mean(axis=1)


RULES: dict[str, Rule] = {  # from logits (N, 16) to scores (N,)
    "mean of logits (as shipped)": lambda logits: logits.mean(axis=1),
    "mean of probabilities": lambda logits: probabilities(logits, 1.0).mean(axis=1),
    "median": sorted_part(7, 9),
    "mean of the middle half": sorted_part(4, 12),
    "mean of the highest quarter": sorted_part(12, 16),
    "mean of the lowest quarter": sorted_part(0, 4),
    "one frame": lambda logits: logits[:, 8],
    "four frames": lambda logits: logits[:, 2::4].mean(axis=1),
    "less half the deviation": lambda logits: logits.mean(axis=1) - 0.5 * logits.std(axis=1),
}


def model_of(runs: Path, fold: str) -> tuple[DeepfakeDetector, ClipSettings]:
    model, saved = load_detector(runs / fold / "run/models/best_model.pth")
    return model, ClipSettings.of(SimpleNamespace(**saved["config"]))


def left_out_frames(corpus: Path, runs: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """The videos and their frames' logits (N, 2, T), as they are and mirrored."""
    _, settings = model_of(runs, "A")
    videos = with_folds(cache_corpus(corpus, settings, torch.get_num_threads()))
    logits = np.zeros((len(videos), 2, settings.frames))
    for fold in sorted({*videos.fold}):
        model, _ = model_of(runs, fold)
        for row in tqdm(np.flatnonzero(videos.fold == fold), fold, leave=False):
            clip, _ = load_clip(videos.clip_file.iloc[row], settings.size)
            pair = np.stack([clip, clip[:, :, ::-1]])
            logits[row] = score_clips(model, pair).frame_logits.float().numpy()
    return videos, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--also", type=Path)
    given = parser.parse_args()
    videos, logits = left_out_frames(given.corpus, given.runs)
    scores = {name: rule(logits[:, 0]) for name, rule in RULES.items()}
    scores["mean of logits, with the mirror image"] = logits.mean(axis=(1, 2))
    if given.also:
        others, also = left_out_frames(given.corpus, given.also)
        assert (others.path == videos.path).all()
        scores["mean of logits, the other runs"] = also[:, 0].mean(axis=1)
        scores["mean of logits, both runs"] = logits[:, 0].mean(axis=1) + also[:, 0].mean(axis=1)
    for name, values in scores.items():
        print(f"{name}: {aucs(videos, pd.Series(values, index=videos.index))}", flush=True)


if __name__ == "__main__":
    main()
