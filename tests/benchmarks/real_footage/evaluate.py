"""How good is a model on real footage? Scores the videos that assemble.py brought.

    python tests/benchmarks/real_footage/evaluate.py FOLDER MODEL.pth [--output TABLE.csv]
        [--frames 8] [--size 256] [--reference 1.7] [--final CALIBRATED.pth]

Prints the AUC of all videos and of each kind and generator, against all real videos, with 95 %
intervals from resampled groups (people and sources); in groups that hold both, how often a fake
scores higher than a real one; the AUC and how many videos are called fake, intact and after blur,
compression and fewer pixels; what picture size, sharpness and bytes a second reach alone, either
way round: where these come near the model's, the sources of the videos tell the classes apart; and
what a calibration on half of the groups is worth on the other half.

`--frames` are those of each video, `--size` the pixels of a crop, `--reference` scores relative to
the same frames compressed so coarsely (REFERENCE; 0: not at all); otherwise as the model file says,
which for stage one is a single frame.

The numbers count only if the model was trained on none of these videos: see leave_out.py. Then
`--final` writes the model in half precision, calibrated on them.
"""

import argparse
import itertools
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupShuffleSplit
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "kaggle_cells"))

from cell_03_data_processing import (  # noqa: E402
    ClipSettings,
    cache_clips,
    find_videos,
    load_clip,
    load_face_detector,
)
from cell_04_dataset_class import ClipDataset, Sample, batches_of_one_length  # noqa: E402
from cell_05_model_definition import DeepfakeDetector, load_detector  # noqa: E402
from cell_06_loss_and_utils import FocalLoss, save_checkpoint  # noqa: E402
from cell_07_training_functions import validate  # noqa: E402
from cell_08_evaluation_functions import (  # noqa: E402
    auc_with_interval,
    blur_frame,
    calibrate,
    change_frames,
    compress_jpeg,
    compute_metrics,
    downscale,
    format_metric,
    probabilities,
)


def blur(frame: np.ndarray, sigma: float) -> np.ndarray:
    """A crop blurred as much as one of 192 pixels by `sigma` pixels."""
    return blur_frame(frame, sigma * len(frame) / 192)


HARM = {"blur": (blur, 1.5), "JPEG 30": (compress_jpeg, 30), "1/3 size": (downscale, 1 / 3)}


def find_corpus(folder: Path) -> pd.DataFrame:
    """The videos of a corpus, with the `kind` of each, and whether it was `cut` from another."""
    videos = find_videos(folder / "manifest.csv")
    listed = pd.read_csv(folder / "manifest.csv")
    listed["path"] = [folder / path for path in listed.path]
    return videos.merge(listed[["path", "kind", "cut"]], on="path", validate="1:1")


def cache_corpus(folder: Path, settings: ClipSettings, workers: int) -> pd.DataFrame:
    """The corpus with cached clips, made below `folder` if they are not there."""
    detector = load_face_detector("cpu")
    usable, skipped = cache_clips(
        find_corpus(folder), settings, folder / "cache", detector, workers
    )
    for row in skipped.itertuples():
        print(f"skipped: {row.path.name}: {row.reason}")
    return usable.reset_index(drop=True)


def score(
    model: DeepfakeDetector, table: pd.DataFrame, change: Any = lambda clip: clip
) -> np.ndarray:
    """The logit of each video (N,), after a `change` of its clip."""
    dataset = ClipDataset(table, os.cpu_count() or 1, change, model.frames)
    samples = batches_of_one_length(dataset, [*map(Sample, range(len(table)))], 4, 64)
    loader = DataLoader(dataset, batch_sampler=samples)
    return validate(model, loader, FocalLoss(0.0), torch.device("cpu")).logits


def trivia(row: Any) -> dict[str, float]:
    """What has nothing to do with manipulation: pixels, bytes a second, sharpness of the crop."""
    video = cv2.VideoCapture(str(row.path))
    width, height, fps, frames = (video.get(kind) for kind in (3, 4, 5, 7))
    clip, _ = load_clip(row.clip_file)
    sharpness = cv2.Laplacian(cv2.cvtColor(clip[len(clip) // 2], cv2.COLOR_RGB2GRAY), cv2.CV_64F)
    rate = os.path.getsize(row.path) * fps / max(frames, 1)
    return {
        "picture size": width * height,
        "bytes a second": rate,
        "sharpness": float(sharpness.var()),
    }


def with_trivia(table: pd.DataFrame) -> pd.DataFrame:
    cues = [trivia(row) for row in table.itertuples()]
    return table.join(pd.DataFrame(cues, index=table.index))


def auc_row(name: str, table: pd.DataFrame, scores: pd.Series) -> dict:
    """A line of the table: AUC with its interval."""
    ranks = scores.rank(pct=True).to_numpy()
    auc = auc_with_interval(table.label.to_numpy(), ranks, table.group.to_numpy())
    text = format_metric(auc["auc_roc"], (auc["auc_low"], auc["auc_high"]))
    return {"": name, "fakes": int(table.label.sum()), "reals": int((table.label == 0).sum())} | {
        "AUC": text
    }


def fake_above_real(table: pd.DataFrame) -> tuple[float, int]:
    """The share of pairs within groups whose fake scores higher, and the number of groups."""
    shares = []
    for _, group in table.groupby("group"):
        reals, fakes = (group.logit[group.label == label] for label in (0, 1))
        if len(reals) and len(fakes):
            shares.append(np.mean([f > r for f, r in itertools.product(fakes, reals)]))
    return float(np.mean(shares)), len(shares)


def against_reals(table: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """The fakes of each value of a column, with all real videos."""
    reals = table[table.label == 0]
    kinds = table[table.label == 1].groupby(column)
    return {str(name): pd.concat([reals, fakes]) for name, fakes in kinds}


def aucs(videos: pd.DataFrame, scores: pd.Series) -> str:
    """The AUC of all videos and of each kind of fakes against all real ones, with intervals."""
    parts = {"all": videos} | against_reals(videos, "kind")
    found = [
        f"{name} {auc_row('', part, scores[part.index])['AUC']}" for name, part in parts.items()
    ]
    return ", ".join(found)


def print_spread(table: pd.DataFrame) -> None:
    """How much of the logit a video's group decides, and the AUC if that were taken off."""
    reals = table[table.label == 0].groupby("group").logit
    within = np.sqrt((reals.var() * (reals.size() - 1)).sum() / (reals.size() - 1).sum())
    both = table[table.groupby("group").label.transform("nunique") == 2]
    centred = both.logit - both.groupby("group").logit.transform("mean")
    print(
        f"Logits of real videos: standard deviation {reals.mean().std():.2f} between groups, "
        f"{within:.2f} within. AUC of the {len(both)} videos in groups that hold both: "
        f"{roc_auc_score(both.label, both.logit):.3f}; without each group's mean, "
        f"{roc_auc_score(both.label, centred):.3f}"
    )


def print_report(table: pd.DataFrame) -> None:
    """AUC of all videos, by kind, by generator, and of what should not matter; pairs in groups."""
    parts = {"all": table, "without those cut out of others": table[~table.cut]}
    for column in ("kind", "method"):
        for name, part in against_reals(table, column).items():
            if column == "kind" or part.label.sum() >= 5:
                parts[f"{column} {name}"] = part
    rows = [auc_row(name, part, part.logit) for name, part in parts.items()]
    for name in ("picture size", "bytes a second", "sharpness"):
        ahead = table[name] if table[name].corr(table.label, "spearman") > 0 else -table[name]
        rows.append(auc_row(f"{name} alone", table, ahead))
    print(pd.DataFrame(rows).to_string(index=False))
    share, groups = fake_above_real(table)
    print(f"\nIn {groups} groups that hold both, the fake scores higher in {share:.0%} of pairs")
    print_spread(table)


def degraded_logits(model: DeepfakeDetector, table: pd.DataFrame) -> pd.DataFrame:
    """The logits of the videos, a column for intact clips (from the table) and for each of HARM."""
    logits = {"intact": table.logit.to_numpy()}
    for name, (change, strength) in HARM.items():
        logits[name] = score(model, table, partial(change_frames, change, strength))
    return pd.DataFrame(logits, index=table.index)


def print_degraded(
    table: pd.DataFrame, degraded: pd.DataFrame, calibration: dict[str, float]
) -> None:
    """The AUC of `degraded_logits`, and which share of either class reaches the threshold."""
    odds = np.log(calibration["threshold"] / (1 - calibration["threshold"]))
    limit, rows = calibration["offset"] + calibration["temperature"] * odds, []
    for name, logits in degraded.items():
        called = (logits >= limit).groupby(table.label).mean()
        row = auc_row(str(name), table, logits)
        rows.append(row | {"reals called fake": called[0], "fakes called fake": called[1]})
    print(f"\n{pd.DataFrame(rows).round(3).to_string(index=False)}")


def calibrated_on_others(known: pd.DataFrame, tested: pd.DataFrame) -> dict[str, float]:
    """How the calibration on some videos fits others; both classes weigh the same."""
    found = calibrate(known.logit.to_numpy(), known.label.to_numpy())
    labels = tested.label.to_numpy()
    probs = probabilities(tested.logit.to_numpy() - found["offset"], found["temperature"])
    metrics: dict[str, Any] = compute_metrics(labels, probs, found["threshold"])
    row = {name: metrics[name] for name in ("log_loss", "brier", "ece", "balanced_accuracy")}
    for verdict, called in (
        ("real", probs <= found["sure_real"]),
        ("fake", probs >= found["sure_fake"]),
    ):
        reals, fakes = called[labels == 0].mean(), called[labels == 1].mean()
        right = reals if verdict == "real" else fakes
        row |= {f"reals called {verdict}": reals, f"fakes called {verdict}": fakes}
        row[f"right if called {verdict}"] = right / (reals + fakes) if called.any() else np.nan
    return row


def print_cross_fitted(table: pd.DataFrame, halves: int = 40) -> None:
    """What a calibration on half of the groups is worth on the other half: mean, and 90 % of it."""
    splits = GroupShuffleSplit(halves, test_size=0.5, random_state=0)
    rows = [
        calibrated_on_others(table.iloc[known], table.iloc[tested])
        for known, tested in splits.split(table, groups=table.group)
    ]
    shown = pd.DataFrame(rows).describe([0.05, 0.95]).T[["count", "mean", "5%", "95%"]]
    print(f"\nCalibrated on half of the groups, on the other half\n{shown.round(3).to_string()}")


def write_final(model: Path, calibration: dict[str, float], file: Path, **settings: Any) -> None:
    """A model in half precision with the calibration of scores of videos that it did not know.

    They had the offsets of their models taken off: so its own is taken off, too. `settings` are the
    parameters that the scores were made with, if not as in training.
    """
    content = torch.load(model, weights_only=True)
    content["config"] |= settings
    content |= calibration | {"offset": calibration["offset"] + content["offset"]}
    content["model"] = {
        name: value.half() if value.is_floating_point() else value
        for name, value in content["model"].items()
    }
    save_checkpoint(file, content)
    size = file.stat().st_size / 2**20
    print(f"{file}: {size:.1f} MiB; {calibration}, and its own offset in addition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--final", type=Path)
    parser.add_argument("--reference", type=float, help="if not as in the file; 0: none")
    parser.add_argument("--frames", type=int, help="of each video, if not as many as in the file")
    parser.add_argument("--size", type=int, help="of a crop in pixels, if not as in the file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    model, saved = load_detector(given.model)
    model.reference = model.reference if given.reference is None else given.reference
    settings = ClipSettings.of(SimpleNamespace(**saved["config"]))
    frames, size = given.frames or settings.frames, given.size or settings.size
    settings = replace(settings, frames=frames, size=size)
    table = cache_corpus(given.folder, settings, given.workers)
    table["logit"] = score(model, table)
    table["probability"] = probabilities(table.logit.to_numpy(), saved["temperature"])
    table = with_trivia(table)
    print_report(table)
    calibration = saved | {"offset": 0.0}  # its own has been taken off the logits
    if given.final:
        calibration = calibrate(table.logit.to_numpy(), table.label.to_numpy())
        clips = frames // model.frames
        changes = dict(CLIPS_PER_VIDEO=clips, IMAGE_SIZE=size, REFERENCE=model.reference)
        write_final(given.model, calibration, given.final, **changes)
    print_cross_fitted(table)
    print_degraded(table, degraded_logits(model, table), calibration)
    if given.output:
        table.drop(columns="clip_file").to_csv(given.output, index=False)


if __name__ == "__main__":
    main()
