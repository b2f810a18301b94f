"""Which rule for a video's score finds a fake stretch in two minutes, and which believes mistakes?

    python tests/benchmarks/stretches.py MODEL.pth [--people 13] [--seed 7]

MODEL is `models/best_model.pth` of a run on the demo set; the people here are others. Each is shown
for two minutes, real and fake, and scored in windows side by side. Then stretches of 3, 8 and 20
seconds at the beginning, in the middle and at the end become fake, a frame at a time. For each rule
it prints the AUC of these videos against the real ones, how often the window with the highest score
overlaps the stretch, and how many reals below the threshold pass it once the logit of one window,
each in turn, is 1.5, a P(fake) of 0.82.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kaggle_cells"))
import cell_03_data_processing as data
from cell_01_imports_and_setup import ENVIRONMENT
from cell_08_evaluation_functions import Predictor, most_suspicious, score_clips

SECONDS, FPS = 120, 5
LENGTHS = (3, 8, 20)
MISTAKE = 1.5  # a logit


def two_in_a_row(logits: np.ndarray) -> float:
    """The product's own rule."""
    windows = [data.Window(1, 8.0 * n, 8.0 * n + 8, logit=x) for n, x in enumerate(logits)]
    return most_suspicious(windows)[0]


def in_threes(logits: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(np.pad(logits, 1, "edge"), 3)


RULES: dict[str, Callable[[np.ndarray], float]] = {
    "highest window": lambda logits: logits.max(),
    "two windows in a row": two_in_a_row,
    "1/4, 1/2, 1/4": lambda logits: (in_threes(logits) @ [0.25, 0.5, 0.25]).max(),
    "median of three": lambda logits: np.median(in_threes(logits), axis=1).max(),
}


def windows_of(
    predictor: Predictor, number: int, method: str, seed: int, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """The clips (N, T, S, S, 3) of one person's two minutes, and their calibrated logits (N,)."""
    frames = data.demo_frames(data.load_portrait(), number, method, seed)
    data.write_video(folder / "video.mp4", frames, FPS)
    windows = [window for window in predictor.scan(folder / "video.mp4") if not window.reason]
    assert len(windows) == SECONDS // predictor.settings.seconds, f"{len(windows)} windows"
    logits = np.array([window.logit for window in windows])
    return np.stack([window.clip for window in windows]), logits / predictor.temperature


def score_person(
    predictor: Predictor, number: int, seed: int, folder: Path
) -> list[tuple[int, bool, np.ndarray]]:
    """(length, place right, logits (N,)) of a real video, of length 0, and of its splices."""
    method = data.DEMO_METHODS[number % len(data.DEMO_METHODS)]
    (real, below), (fake, above) = (
        windows_of(predictor, number, kind, seed, folder) for kind in ("real", method)
    )
    count, frames = real.shape[:2]
    window = SECONDS / count
    times = window * (np.arange(count)[:, None] + (np.arange(frames) + 0.5) / frames)
    found = [(0, False, below)]
    for length in LENGTHS:
        for start in (0, (SECONDS - length) / 2, SECONDS - length):
            is_fake = (times >= start) & (times < start + length)
            spliced = np.where(is_fake.all(axis=1), above, below)
            mixed = is_fake.any(axis=1) & ~is_fake.all(axis=1)
            clips = np.where(is_fake[mixed, :, None, None, None], fake[mixed], real[mixed])
            if mixed.any():
                logits = score_clips(predictor.model, clips).logit.cpu().numpy()
                spliced[mixed] = logits / predictor.temperature
            found.append((length, bool(is_fake[spliced.argmax()].any()), spliced))
    return found


def summarize(scored: list[tuple[int, bool, np.ndarray]], limit: float) -> pd.DataFrame:
    """A row a rule; `limit` is the logit of the threshold."""
    reals = [logits for length, _, logits in scored if not length]
    rows = {}
    for name, rule in RULES.items():
        row, below = {}, [rule(logits) for logits in reals]
        for length in LENGTHS:
            above = [rule(logits) for n, _, logits in scored if n == length]
            labels = [0] * len(below) + [1] * len(above)
            row[f"AUC {length} s"] = roc_auc_score(labels, below + above)
        with_mistake = [
            rule(np.where(np.arange(len(logits)) == place, MISTAKE, logits)) >= limit
            for logits, score in zip(reals, below, strict=True)
            if score < limit
            for place in range(len(logits))
        ]
        rows[name] = row | {"fake by one mistake": np.mean(with_mistake)}
    return pd.DataFrame(rows).T


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--people", type=int, default=13)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    predictor = Predictor.load(given.model, ENVIRONMENT.device)
    data.DEMO_FRAMES = (SECONDS * FPS, SECONDS * FPS + 1)
    scored = []
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(given.people), "people"):
            scored += score_person(predictor, number, given.seed, Path(folder))
    limit = np.log(predictor.threshold / (1 - predictor.threshold))
    reals = [two_in_a_row(logits) for length, _, logits in scored if not length]
    print(summarize(scored, limit).round(2).to_string())
    for length in LENGTHS:
        right = np.mean([place for n, place, _ in scored if n == length])
        print(f"{length:2} s: the highest window overlaps the stretch in {right:.0%}")
    print(f"{np.mean([score >= limit for score in reals]):.0%} of the real videos are called fake")


if __name__ == "__main__":
    main()
