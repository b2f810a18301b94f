"""How do frames become a video's score? Rules compared on real footage.

    python tests/benchmarks/real_footage/combine.py CORPUS MODEL.pth [--also MODEL2.pth]

MODEL must not have been trained on the corpus. Prints the AUC, with intervals, of each way to sum
up 16 frames: of all videos and of each kind of fakes. With --also, those of a second model and of
the sum of both.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from evaluate import aucs, cache_corpus
from tqdm import tqdm

from cell_03_data_processing import ClipSettings, load_clip
from cell_05_model_definition import load_detector
from cell_08_evaluation_functions import probabilities, score_clips

FRAMES = 16
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


def score_frames(file: Path, corpus: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """The videos and their frames' logits (N, 2, T), as they are and mirrored."""
    model, saved = load_detector(file)
    settings = ClipSettings.of(SimpleNamespace(**saved["config"]))
    videos = cache_corpus(corpus, replace(settings, frames=FRAMES), torch.get_num_threads())
    logits = np.zeros((len(videos), 2, FRAMES))
    for row, clip_file in enumerate(tqdm(videos.clip_file, file.name, leave=False)):
        clip, _ = load_clip(clip_file, settings.size)
        pair = np.stack([clip, clip[:, :, ::-1]])
        logits[row] = score_clips(model, pair).frame_logits.float().numpy()
    return videos, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--also", type=Path)
    given = parser.parse_args()
    videos, logits = score_frames(given.model, given.corpus)
    scores = {name: rule(logits[:, 0]) for name, rule in RULES.items()}
    scores["mean of logits, with the mirror image"] = logits.mean(axis=(1, 2))
    if given.also:
        _, also = score_frames(given.also, given.corpus)
        first, second = (part[:, 0].mean(axis=1) for part in (logits, also))
        scores["mean of logits, the second model"] = second
        scores["mean of logits, both models"] = first / first.std() + second / second.std()
    for name, values in scores.items():
        print(f"{name}: {aucs(videos, pd.Series(values, index=videos.index))}", flush=True)


if __name__ == "__main__":
    main()
