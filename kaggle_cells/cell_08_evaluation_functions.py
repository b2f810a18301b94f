# %% [markdown]
# <a id="section-8"></a>
# ## 8. Calibration, metrics, explanations, figures, prediction
#
# A network's raw score, its logit, is not a probability, and zero is rarely the best threshold.
# Both are fixed on the **validation** set. Platt scaling fits an offset and a temperature, after
# which P(fake) = 0.5 means undecided when real and fake are equally likely. The threshold is the
# one with the best balanced accuracy. The test set is used only for the final numbers.

# %%
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import sklearn.metrics as skm
import torch
from IPython.display import display
from matplotlib.figure import Figure, SubFigure
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cell_01_imports_and_setup import (
    FAKE_COLOUR,
    IN_NOTEBOOK,
    NO_BARS,
    REAL_COLOUR,
    WIDTH,
    save_csv,
    show_row,
    styled,
)
from cell_03_data_processing import (
    Clip,
    ClipSettings,
    VideoError,
    load_clip,
    load_face_detector,
    make_clip,
    videos_below,
)
from cell_04_dataset_class import ClipDataset, Sample, batches_of_one_length, normalize, to_float
from cell_05_model_definition import DeepfakeDetector, DetectorOutput, load_detector
from cell_07_training_functions import validate


# %%
def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """P(fake) of logits of any shape."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64) / temperature, -50, 50)))


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Temperature (0.25 to 16) and offset for `probabilities(logits - offset, temperature)`.

    Both classes weigh the same, whatever their number. The targets are Platt's (1999), slightly
    inside 0 and 1, so that a few perfectly separated videos do not make the model certain. Each
    video is entered with both labels, weighted by its target and by the rest.
    """
    count = np.where(labels == 1, np.sum(labels == 1), np.sum(labels == 0))
    weights, target = 1 / count, (count + 1) / (count + 2)
    centre, scale = np.average(logits, weights=weights), max(float(np.std(logits)), 1e-3)
    scores = ((logits - centre) / scale)[:, None]
    # scikit-learn's regularisation would pull the slope to 0: C = 1e6 turns it off.
    line = LogisticRegression(C=1e6).fit(
        np.concatenate([scores, scores]),
        np.concatenate([labels, 1 - labels]),
        sample_weight=np.concatenate([weights * target, weights * (1 - target)]),
    )
    slope, intercept = line.coef_[0, 0] / scale, line.intercept_[0]
    if slope <= 1 / 16:  # hardly better than chance: undecided between the two class means
        return 16.0, float(centre)
    return max(float(1 / slope), 0.25), float(centre - intercept / slope)


def fit_threshold(probs: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best balanced accuracy, midway between two scores, nearest to 0.5."""
    scores = np.unique(probs)
    candidates = np.append((scores[1:] + scores[:-1]) / 2, 0.5)
    quality = [np.round(skm.balanced_accuracy_score(labels, probs >= t), 9) for t in candidates]
    best = candidates[quality == np.max(quality)]
    return float(best[np.abs(best - 0.5).argmin()])


def calibrate(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Temperature, offset and threshold that fit the scores of a validation set."""
    temperature, offset = fit_calibration(logits, labels)
    return temperature, offset, fit_threshold(probabilities(logits - offset, temperature), labels)


# %% [markdown]
# **Metrics.** Fake is the positive class. A metric that the videos do not define, such as the AUC
# of a single class, is `None`, never a 0 that looks like a result. A new metric is one more line in
# a table below; its arguments are arrays (N,): is it fake, and its P(fake) or the verdict "fake".


# %%
def auc_by_ranks(fake: np.ndarray, probs: np.ndarray) -> float:
    """P(a fake scores higher than a real video), ties half (Mann-Whitney): fast to resample."""
    reals, fakes = np.sort(probs[~fake]), probs[fake]
    above = np.searchsorted(reals, fakes) + np.searchsorted(reals, fakes, side="right")
    return above.mean() / 2 / len(reals)


def found_and_alarms(fake: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many fakes and reals lie at or above each distinct score, from the highest downwards.

    scikit-learn's curves take a hundred times as long, which resampling would multiply.
    """
    falling = np.argsort(-probs)
    last_of_score = np.append(np.flatnonzero(np.diff(probs[falling])), len(probs) - 1)
    found = fake[falling].cumsum()[last_of_score]
    return found, last_of_score + 1 - found


def average_precision(fake: np.ndarray, probs: np.ndarray) -> float:
    found, alarms = found_and_alarms(fake, probs)
    return (np.diff(found, prepend=0) * found / (found + alarms)).sum() / found[-1]


def equal_error_rate(fake: np.ndarray, probs: np.ndarray) -> float:
    """Where the interpolated ROC curve has as many false positives as false negatives."""
    found, alarms = found_and_alarms(fake, probs)
    fpr, tpr = np.append(0, alarms / alarms[-1]), np.append(0, found / found[-1])
    return np.interp(0, fpr + tpr - 1, fpr)


def tpr_at_fpr(limit: float, fake: np.ndarray, probs: np.ndarray) -> float:
    """Share of fakes above all but `limit` of the real videos."""
    reals = np.sort(probs[~fake])[::-1]
    return (probs[fake] > reals[int(limit * len(reals) + 1e-9)]).mean()


def calibration_error(fake: np.ndarray, probs: np.ndarray) -> float:
    """The expected calibration error, with ten bins of equal width."""
    bins = np.minimum((10 * probs).astype(int), 9)
    return np.abs(np.bincount(bins, probs - fake)).sum() / len(bins)


def brier_score(fake: np.ndarray, probs: np.ndarray) -> float:
    return np.square(probs - fake).mean()


def log_loss(fake: np.ndarray, probs: np.ndarray) -> float:
    return -np.log(np.clip(np.where(fake, probs, 1 - probs), 1e-15, 1)).mean()


def share_of(flags: np.ndarray) -> float:
    """Share that is true; NaN of none at all, where `mean` would warn."""
    return flags.mean() if flags.size else np.nan


# %%
RANKING_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # need both classes
    "auc_roc": auc_by_ranks,
    "auc_pr": average_precision,
    "eer": equal_error_rate,
    "tpr_at_1_fpr": partial(tpr_at_fpr, 0.01),
    "tpr_at_5_fpr": partial(tpr_at_fpr, 0.05),
}
VERDICT_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # of verdicts
    "accuracy": lambda fake, called: (called == fake).mean(),
    "balanced_accuracy": lambda fake, called: (
        (share_of(called[fake]) + share_of(~called[~fake])) / 2
    ),
    "precision": lambda fake, called: share_of(fake[called]),
    "recall": lambda fake, called: share_of(called[fake]),
    "specificity": lambda fake, called: share_of(~called[~fake]),
    "f1": lambda fake, called: share_of(np.concatenate([fake[called], called[fake]])),
}
METRIC_FUNCTIONS = RANKING_METRICS | VERDICT_METRICS
METRIC_FUNCTIONS |= {"log_loss": log_loss, "brier": brier_score, "ece": calibration_error}
METRIC_NAMES = {"auc_roc": "AUC-ROC", "auc_pr": "AUC-PR", "eer": "EER", "ece": "ECE", "f1": "F1"}
METRIC_NAMES |= {
    "brier": "Brier score",
    "tpr_at_1_fpr": "TPR at 1 % FPR",
    "tpr_at_5_fpr": "TPR at 5 % FPR",
}


def metric_name(metric: str) -> str:
    """A metric's name as the literature writes it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def measure(metric: str, fake: np.ndarray, probs: np.ndarray, called: np.ndarray) -> float:
    """One metric of videos (N,); NaN if undefined."""
    if metric in RANKING_METRICS and (fake.all() or not fake.any()):
        return np.nan
    return METRIC_FUNCTIONS[metric](fake, called if metric in VERDICT_METRICS else probs)


def compute_metrics(
    labels: np.ndarray, probs: np.ndarray, threshold: float
) -> dict[str, float | None]:
    """All metrics of P(fake) (N,) against labels (N,), where 1 is fake; None if undefined."""
    videos = labels == 1, probs, probs >= threshold
    values = {metric: float(measure(metric, *videos)) for metric in METRIC_FUNCTIONS}
    return {metric: None if np.isnan(value) else value for metric, value in values.items()}


# %% [markdown]
# A number from 48 videos could easily have come out differently, so each has an interval. The
# bootstrap draws a thousand test sets from this one, with replacement; 95 % of their results lie
# within the interval. It draws whole groups: videos of one recording are not independent samples.

# %%
RESAMPLINGS = 1000
TOO_FEW = 5  # fewer fakes of a manipulation say nothing about it
Interval = tuple[float | None, float | None]


def middle_95(values: np.ndarray) -> Interval:
    return tuple(np.percentile(values, [2.5, 97.5]).tolist()) if len(values) else (None, None)


def bootstrap(
    labels: np.ndarray,
    probs: np.ndarray,
    threshold: float,
    groups: np.ndarray,
    metrics: Collection[str] = tuple(METRIC_FUNCTIONS),
) -> dict[str, Interval]:
    """95 % interval of each metric: percentiles over resampled groups (Efron, 1979)."""
    fake, called, rng = labels == 1, probs >= threshold, np.random.default_rng(0)
    members = list(pd.Series(range(len(groups))).groupby(groups).indices.values())
    values = np.empty((len(metrics), RESAMPLINGS))
    for turn in range(RESAMPLINGS):
        drawn = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[group] for group in drawn])
        sample = fake[rows], probs[rows], called[rows]
        values[:, turn] = [measure(metric, *sample) for metric in metrics]
    return {
        metric: middle_95(row[~np.isnan(row)]) for metric, row in zip(metrics, values, strict=True)
    }


def format_metric(value: float | None, interval: Interval = (None, None)) -> str:
    """0.944 [0.902, 0.975], or 0.944 without an interval, or undefined."""
    if pd.isna(value):
        return "undefined"
    low, high = interval
    return f"{value:.3f}" + ("" if pd.isna(low) else f" [{low:.3f}, {high:.3f}]")


def format_metrics(
    metrics: dict[str, float | None], intervals: dict[str, Interval]
) -> dict[str, str]:
    return {metric: format_metric(value, intervals[metric]) for metric, value in metrics.items()}


# %% [markdown]
# The AUC is also broken down by manipulation and by dataset. A single fake has no interval: there
# is nothing to resample.


# %%
def auc_with_interval(
    labels: np.ndarray, probs: np.ndarray, groups: np.ndarray
) -> dict[str, float | None]:
    """AUC and its interval as columns of a table; no interval if a class has a single video."""
    low, high = None, None
    if min(np.sum(labels == 0), np.sum(labels == 1)) > 1:
        low, high = bootstrap(labels, probs, 0.5, groups, ["auc_roc"])["auc_roc"]
    auc = compute_metrics(labels, probs, 0.5)["auc_roc"]
    return {"auc_roc": auc, "auc_low": low, "auc_high": high}


def metrics_by(
    column: str, table: pd.DataFrame, threshold: float, never_trained_on: Collection[str] = ()
) -> pd.DataFrame:
    """One row per manipulation, against all real videos, or per dataset, against its own.

    Args:
        column: "method" or "dataset".
        table: label, method, dataset, group and probability of each video.
        never_trained_on: methods to mark.
    """
    reals, rows = table[table.label == 0], []
    for name, part in (table[table.label == 1] if column == "method" else table).groupby(column):
        videos = pd.concat([reals, part]) if column == "method" else part
        labels, probs = videos.label.to_numpy(), videos.probability.to_numpy()
        row = {column: name, "reals": sum(labels == 0), "fakes": sum(labels == 1)}
        row |= {"never_trained_on": name in never_trained_on}
        row |= compute_metrics(labels, probs, threshold)
        rows.append(row | auc_with_interval(labels, probs, videos.group.to_numpy()))
    columns = [column, "reals", "fakes", *["never_trained_on"] * (column == "method")]
    measured = ["auc_roc", "auc_low", "auc_high", "eer", "recall", "specificity"]
    found = pd.DataFrame(rows, columns=columns + measured)
    return found.astype(dict.fromkeys(measured, float))


# %% [markdown]
# **Robustness.** A video from the internet has been compressed, downscaled and filtered. The test
# clips are scored again after each of these changes, to see how much of the result survives. (The
# face crops in the cache are changed, so each change counts more than on a whole video.)


# %%
def compress_jpeg(frame: np.ndarray, quality: float) -> np.ndarray:
    settings = [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    _, file = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), settings)
    return cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def downscale(frame: np.ndarray, share: float) -> np.ndarray:
    small = cv2.resize(frame, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, frame.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def blur_frame(frame: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(frame, (0, 0), sigma)


def add_noise(frame: np.ndarray, sigma: float) -> np.ndarray:
    rng = np.random.default_rng(int(frame.sum(dtype=np.int64)))  # reproducible, differs by frame
    return (frame + rng.normal(0, sigma, frame.shape)).round().clip(0, 255).astype(np.uint8)


def brighten(frame: np.ndarray, factor: float) -> np.ndarray:
    return (frame * factor).round().clip(0, 255).astype(np.uint8)


Degradation = Callable[[np.ndarray, float], np.ndarray]
DEGRADATIONS: dict[str, tuple[Degradation, dict[str, float | None]]] = {  # None: unchanged
    "JPEG quality": (compress_jpeg, {"none": None, "90": 90, "70": 70, "50": 50, "30": 30}),
    "resolution": (downscale, {"1": None, "1/2": 0.5, "1/4": 0.25}),
    "blur, sigma in pixels": (blur_frame, {"0": None, "1": 1, "2": 2}),
    "noise, sigma of 255": (add_noise, {"0": None, "5": 5, "10": 10}),
    "brightness": (brighten, {"0.5": 0.5, "1": None, "1.5": 1.5}),
}
CHANGES = [
    (name, change, strength)
    for name, (change, strengths) in DEGRADATIONS.items()
    for strength in strengths.values()
    if strength
]
DEGRADED_PASSES = len(CHANGES)


# %%
def change_frames(change: Degradation, strength: float, clip: np.ndarray) -> np.ndarray:
    """A clip (T, S, S, 3) uint8 with each frame changed."""
    return np.stack([change(frame, strength) for frame in clip])


def measure_robustness(
    model: DeepfakeDetector, table: pd.DataFrame, loader: DataLoader, videos: int
) -> pd.DataFrame:
    """AUC with interval after each degradation, of the table's videos or an even sample of them.

    The first row is that of the unchanged clips, from the logits in `table`; batch size and threads
    are those of `loader`.
    """
    table = table.sort_values(["label", "method"], kind="stable")
    picked = np.linspace(0, len(table) - 1, min(videos, len(table))).round().astype(int)
    table, device, rows = table.iloc[picked], next(model.parameters()).device, []
    dataset: Any = loader.dataset
    size = len(next(iter(loader.batch_sampler or ())))

    def add_row(name: str, strength: float | None, logits: np.ndarray) -> None:
        probs = probabilities(logits, 1.0)
        auc = auc_with_interval(table.label.to_numpy(), probs, table.group.to_numpy())
        rows.append({"degradation": name, "strength": strength, **auc, "videos": len(table)})

    add_row("none", None, table.logit.to_numpy())
    for name, change, strength in tqdm(CHANGES, "robustness", leave=False, disable=NO_BARS):
        change_clip = partial(change_frames, change, strength)
        changed = ClipDataset(table, dataset.workers, change_clip, dataset.frames)
        samples = batches_of_one_length(changed, [*map(Sample, range(len(table)))], size, size)
        batches = DataLoader(changed, batch_sampler=samples, pin_memory=loader.pin_memory)
        scores = validate(model, batches, nn.BCEWithLogitsLoss(), device, title=name)
        add_row(name, strength, scores.logits)
    return pd.DataFrame(rows)


# %% [markdown]
# **Explanations.** A verdict can be read in three ways: the scores of single frames, the attention
# each frame gets, and a heat map of where in a frame the evidence lies. The heat map follows
# Grad-CAM (Selvaraju et al., 2017): the backbone's feature maps, weighted by how much the clip's
# logit would rise with them. It shows what the network reacts to, not what was done to the video.
#
# Grad-CAM uses the last convolutional block and one weight per map. That is too coarse here: on
# 96 pixels, ResNet's last block has 3 x 3 fields, each of which has seen the whole face. So the
# last block with fields of at most 16 pixels is used, and a weight per field (LayerCAM, Jiang et
# al., 2021).


# %%
def heat_maps(model: DeepfakeDetector, clips: torch.Tensor) -> tuple[torch.Tensor, DetectorOutput]:
    """LayerCAM of normalised clips (B, T, 3, S, S): heat (B, T, S, S), at least 0, and the output.

    The heat of one model's clips is comparable. Raises ValueError if there are no feature maps.
    """
    maps: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            height, width = output.shape[-2:]
            if height == width >= clips.shape[-1] / 16:
                maps[:] = [output]

    hooks = [module.register_forward_hook(keep) for module in model.backbone.modules()]
    try:
        # cuDNN's LSTM has no gradient in eval mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            output = model(clips)
            if not maps:
                raise ValueError("this backbone has no feature maps to draw heat maps from")
            (gradient,) = torch.autograd.grad(output.logit.sum(), maps[0])
    finally:
        for hook in hooks:
            hook.remove()
    heat = (gradient.clamp(min=0) * maps[0]).sum(dim=1, keepdim=True).clamp(min=0).detach().float()
    heat = nn.functional.interpolate(heat, clips.shape[-2:], mode="bilinear", align_corners=False)
    heat = heat.view(*clips.shape[:2], *clips.shape[-2:])
    return heat, DetectorOutput(*(part.detach() for part in output))


# %% [markdown]
# **Figures.** Each title says what was found. First the clips, and training:


# %%
def title_figure(figure: Figure | SubFigure, title: str) -> None:
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)


@styled
def plot_samples(table: pd.DataFrame, per_clip: int = 5) -> Figure:
    """One clip per method, up to `per_clip` of its different frames in a row."""
    firsts = table.sort_values(["label", "method", "path"]).groupby("method", sort=False).head(1)
    per_clip = min(per_clip, int(firsts.distinct_frames.max()))
    size = (WIDTH, 1.15 * len(firsts))
    figure, axes = plt.subplots(len(firsts), per_clip, figsize=size, squeeze=False)
    for row, sample in zip(axes, firsts.itertuples(), strict=True):
        frames, _ = load_clip(sample.clip_file)
        picked = np.linspace(0, len(frames) - 1, per_clip).round().astype(int)
        show_row(row, sample.method, frames[np.minimum(picked, len(frames) - 1)])
    return figure


@styled
def plot_history(history: pd.DataFrame) -> Figure:
    """Loss and AUC by epoch, with the best epoch marked."""
    best = history[history.best].iloc[-1]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3))
    for ax, quantity, name in zip(axes, ("loss", "auc"), ("loss", "AUC"), strict=True):
        for split, label, colour in (
            ("train", "training", "0.55"),
            ("val", "validation", FAKE_COLOUR),
        ):
            ax.plot(history.epoch, history[f"{split}_{quantity}"], ".-", color=colour, label=label)
        ax.axvline(best.epoch, color="0.3", linewidth=0.8, linestyle=":", label="best epoch")
        ax.set(xlabel="epoch", ylabel=name)
        ax.locator_params(axis="x", integer=True)
    axes[0].legend(fontsize=10)
    found = f"Best validation AUC {best.val_auc:.3f}, in epoch {best.epoch:.0f} of {len(history)}"
    title_figure(figure, found)
    return figure


# %% [markdown]
# The test set: how well the scores rank the videos, and where the threshold stands.


# %%
@styled
def plot_curves(table: pd.DataFrame, threshold: float, auc: Interval) -> Figure:
    """ROC and precision-recall curves of all test videos; `auc` is the interval of the AUC."""
    labels, probs = table.label.to_numpy(), table.probability.to_numpy()
    metrics: dict[str, Any] = compute_metrics(labels, probs, threshold)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.9))
    if metrics["auc_roc"] is None:
        title_figure(figure, "No curves: the test set has only one class")
        return figure
    fpr, tpr, _ = skm.roc_curve(labels, probs)
    precision, recall, _ = skm.precision_recall_curve(labels, probs)
    left.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="chance")
    left.plot(fpr, tpr, color=FAKE_COLOUR)
    right.axhline(labels.mean(), color="0.5", linestyle=":")
    right.plot(recall, precision, color=FAKE_COLOUR)
    mark: dict[str, Any] = dict(marker="o", color="black", linestyle="none")
    left.plot(
        1 - metrics["specificity"], metrics["recall"], **mark, label=f"threshold {threshold:.2f}"
    )
    right.plot(metrics["recall"], metrics["precision"] or 0, **mark)
    left.set(xlabel="reals called fake", ylabel="fakes found")
    left.set_title(f"AUC {format_metric(metrics['auc_roc'], auc)}")
    right.set(xlabel="fakes found (recall)", ylabel="precision")
    right.set_title(f"AUC-PR {metrics['auc_pr']:.3f}")
    left.legend(loc="lower right", fontsize=10)
    for ax in (left, right):
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure


# %%
@styled
def plot_scores(table: pd.DataFrame, by_method: pd.DataFrame, threshold: float) -> Figure:
    """Every P(fake) as a dot, and the AUC of each manipulation, hardest first.

    Manipulations with too few fakes to say anything come last, with hollow grey marks.
    """
    methods = by_method.assign(few=by_method.fakes < TOO_FEW).sort_values(["few", "auc_roc"])
    kind, order = table.method.where(table.label == 1, "real"), ["real", *methods.method]
    palette = dict.fromkeys(order, FAKE_COLOUR) | {"real": REAL_COLOUR}
    size: Any = dict(figsize=(WIDTH, 1.4 + 0.36 * len(order)), width_ratios=[2, 1])
    figure, (left, right) = plt.subplots(1, 2, sharey=True, **size)
    style: Any = dict(order=order, palette=palette, legend=False, jitter=0.25, size=4, alpha=0.6)
    sns.stripplot(x=table.probability, y=kind, hue=kind, ax=left, **style)
    left.axvline(threshold, color="black", linewidth=1)
    left.annotate(f" threshold {threshold:.2f}", (threshold, -0.7), va="center", fontsize=10)
    for place, row in enumerate(methods.itertuples(), start=1):
        colour, fill = ("0.55", "white") if row.few else (FAKE_COLOUR, FAKE_COLOUR)
        right.plot([row.auc_low, row.auc_high], [place, place], color=colour, linewidth=2)
        right.plot(row.auc_roc, place, "o", color=colour, markerfacecolor=fill)
    right.axvline(0.5, color="0.5", linestyle=":")
    counts = kind.value_counts()
    left.set_yticks(range(len(order)), [f"{name} ({counts.get(name, 0)})" for name in order])
    left.set(xlim=(-0.02, 1.02), ylim=(len(order) - 0.5, -1), xlabel="P(fake)", ylabel="")
    right.set(xlabel="AUC; hollow: too few" if methods.few.any() else "AUC, 95 % interval")
    wrong = int(((table.probability >= threshold) != (table.label == 1)).sum())
    left.set_title(f"{wrong} of {len(table)} videos on the wrong side")
    left.grid(axis="y", visible=False)
    return figure


# %%
@styled
def plot_confusion(labels: np.ndarray, probs: np.ndarray, threshold: float) -> Figure:
    """Counts and shares of real and fake videos by verdict."""
    counts = skm.confusion_matrix(labels, (probs >= threshold).astype(int), labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cells = [f"{count}\n{share:.0%}" for count, share in zip(counts.flat, shares.flat, strict=True)]
    figure, ax = plt.subplots(figsize=(4.8, 4))
    style: Any = dict(cmap="Blues", vmin=0, vmax=1, cbar=False, square=True, ax=ax)
    style |= dict(xticklabels=["real", "fake"], yticklabels=["real", "fake"])
    sns.heatmap(shares, annot=np.reshape(cells, (2, 2)), fmt="", annot_kws={"size": 14}, **style)
    ax.set(xlabel=f"called (threshold {threshold:.2f})", ylabel="truth")
    ax.grid(False)
    ax.set_title(f"{counts.trace()} of {counts.sum()} videos called right")
    return figure


# %% [markdown]
# Calibration: of the videos with about the same P(fake), how many are fake?


# %%
@styled
def plot_calibration(labels: np.ndarray, probs: np.ndarray) -> Figure:
    """Share of fakes by P(fake), with Wilson's 95 % intervals, over a histogram of P(fake)."""
    bins = np.minimum((10 * probs).astype(int), 9)
    figure, (ax, below) = plt.subplots(2, 1, figsize=(5, 5.4), height_ratios=[3, 1], sharex=True)
    ax.plot([0, 1], [0, 1], color="0.5", linestyle=":")
    for place in np.unique(bins):
        inside, mean = labels[bins == place], probs[bins == place].mean()
        interval = binomtest(int(inside.sum()), len(inside)).proportion_ci(method="wilson")
        ax.plot([mean, mean], [interval.low, interval.high], color=FAKE_COLOUR, alpha=0.6)
        ax.plot(mean, inside.mean(), "o", color=FAKE_COLOUR)
    ax.set(ylabel="share that is fake", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    both = [probs[labels == 0], probs[labels == 1]]
    style: Any = dict(stacked=True, color=[REAL_COLOUR, FAKE_COLOUR], label=["real", "fake"])
    below.hist(both, np.linspace(0, 1, 11), **style)
    below.set(xlabel="P(fake)", ylabel="videos")
    below.legend(fontsize=10)
    ece: Any = compute_metrics(labels, probs, 0.5)["ece"]
    ax.set_title(f"P(fake) is off by {100 * ece:.0f} points on average (ECE)")
    return figure


# %%
@styled
def plot_robustness(table: pd.DataFrame) -> Figure:
    """AUC by strength of each degradation, the unchanged clips included."""
    intact, changed = table.iloc[0], table.iloc[1:]
    widths = [len(strengths) for _, strengths in DEGRADATIONS.values()]
    size = (WIDTH, 3.4)
    figure, axes = plt.subplots(1, len(widths), figsize=size, sharey=True, width_ratios=widths)
    for ax, (name, (_, strengths)) in zip(axes, DEGRADATIONS.items(), strict=True):
        part = changed[changed.degradation == name].set_index("strength")
        rows = [part.loc[strength] if strength else intact for strength in strengths.values()]
        aucs = pd.DataFrame(rows)[["auc_roc", "auc_low", "auc_high"]].astype(float).to_numpy().T
        places = np.arange(len(rows))
        ax.fill_between(places, *aucs[1:], color=FAKE_COLOUR, alpha=0.15, linewidth=0)
        ax.plot(places, aucs[0], ".-", color=FAKE_COLOUR)
        ax.axhline(0.5, color="0.5", linestyle=":")
        ax.set_xticks(places, [*strengths], fontsize=10)
        ax.set_xlabel(name.replace(", ", ",\n"), fontsize=10)
    axes[0].set(ylabel="AUC", ylim=(np.nanmin([0.45, *table.auc_low.astype(float)]), 1.01))
    title = "No AUC: the test set has only one class"
    if pd.notna(intact.auc_roc):
        worst = changed.loc[changed.auc_roc.astype(float).idxmin()]
        condition = f"{worst.degradation.split(',')[0]} {worst.strength:g}"
        title = f"AUC {intact.auc_roc:.3f} unchanged; at worst {worst.auc_roc:.3f}, {condition}"
    title_figure(figure, title)
    return figure


# %% [markdown]
# Single videos: what the most confident verdicts rest on, and the worst mistakes.


# %%
def short_name(path: str | Path, letters: int) -> str:
    """A file's name, with its middle cut out if it is longer."""
    name = Path(path).name
    return name if len(name) <= letters else f"{name[: letters - 10]}…{name[-9:]}"


def verdict_line(row: pd.Series) -> str:
    """What a test video is, its score, whether that is right, and its name."""
    truth = "real" if row.label == 0 else f"fake ({row.method})" if row.method != "fake" else "fake"
    verdict = "right" if row.correct else "wrong"
    return f"{truth}, P(fake) {row.probability:.2f}: {verdict}. {short_name(row.path, 34)}"


def most_confident_first(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    return table.sort_values("probability", key=lambda probs: -(probs - threshold).abs())


def pick_examples(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """The most confident of right and wrong verdicts on real and fake test videos."""
    firsts = most_confident_first(table, threshold).groupby(["correct", "label"]).head(1)
    return firsts.sort_values(["correct", "label"], ascending=False)


def draw_explanation(
    part: SubFigure, clip: np.ndarray, heat: np.ndarray, scores: np.ndarray, attention: np.ndarray
) -> None:
    """Up to 6 frames of a clip (T, S, S, 3), their heat (T, S, S), and the T frame scores below."""
    shown = np.linspace(0, len(clip) - 1, min(6, len(clip))).round().astype(int)
    grid = part.add_gridspec(3, len(shown), height_ratios=[1, 1, 1.15])
    for column, t in enumerate(shown):
        top, middle = (part.add_subplot(grid[row, column]) for row in (0, 1))
        top.imshow(clip[t])
        top.set_title(f"{t + 1}", fontsize=10, loc="center")
        middle.imshow(clip[t].mean(axis=-1), cmap="gray", vmin=0, vmax=255)
        middle.imshow(heat[t], cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.6 * heat[t])
        top.set_axis_off()
        middle.set_axis_off()
    times, ax = np.arange(1, len(clip) + 1), part.add_subplot(grid[2, :])
    ax.bar(times, attention / attention.max(), color="0.85", label="attention (of the largest)")
    ax.plot(times, scores, ".-", color=FAKE_COLOUR, label="P(fake) of the frame")
    ax.set(xlabel="frame", ylim=(0, 1.05), xlim=(0.4, len(clip) + 0.6))
    ax.locator_params(axis="x", integer=True)
    ax.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), borderaxespad=0.1)


# %%
@styled
def plot_explanations(
    examples: pd.DataFrame, model: DeepfakeDetector, temperature: float
) -> Figure:
    """Frames, heat maps on one common scale, frame scores and attention of each example."""
    device, clips, heats, outputs = next(model.parameters()).device, [], [], []
    for file in examples.clip_file:
        frames, _ = load_clip(file)  # its clips are interleaved: this takes the first one
        clips.append(frames[:: max(1, len(frames) // model.frames)])
        batch = torch.from_numpy(clips[-1].copy())[None].to(device)
        heat, output = heat_maps(model, normalize(to_float(batch)))
        heats.append(heat[0].cpu().numpy())
        outputs.append(output)
    hottest = max(heat.max() for heat in heats) or 1.0
    figure: Any = plt.figure(figsize=(WIDTH, 4.3 * len(examples)))
    parts = np.atleast_1d(figure.subfigures(len(examples), 1))
    for i, (part, (_, example)) in enumerate(zip(parts, examples.iterrows(), strict=True)):
        scores = probabilities(outputs[i].frame_logits[0].cpu().numpy(), temperature)
        attention = outputs[i].attention[0].cpu().numpy()
        draw_explanation(part, clips[i], heats[i] / hottest, scores, attention)
        title_figure(part, verdict_line(example))
    return figure


@styled
def plot_mistakes(table: pd.DataFrame, threshold: float, most: int = 9) -> Figure:
    """The middle frame of the most confident errors, with their method and score."""
    wrong = most_confident_first(table[~table.correct], threshold)
    worst, rows = wrong.head(most), max(1, -(-min(len(wrong), most) // 3))
    size = (WIDTH, 0.3 + 2.9 * rows if len(worst) else 1)
    figure, axes = plt.subplots(rows, 3, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, row in zip(axes.flat, worst.itertuples(), strict=False):
        frames, _ = load_clip(row.clip_file)
        ax.imshow(frames[len(frames) // 2])
        title = f"{short_name(row.path, 22)}\n{row.method}, P(fake) {row.probability:.2f}"
        ax.set_title(title, fontsize=10, loc="center")
    title = f"{len(wrong)} of {len(table)} videos called wrong"
    if len(wrong) > len(worst):
        title += f"; the {len(worst)} most confident"
    title_figure(figure, title if len(wrong) else f"No mistakes in {len(table)} videos")
    return figure


# %% [markdown]
# **Your own videos** take the same path as the training videos. The model file alone is enough, it
# holds all settings: `Predictor.load("best_model.pth").predict_video("video.mp4")`. For a folder,
# threads decode ahead while the network scores; only a few clips are in memory at a time.


# %%
@dataclass(frozen=True)
class Prediction:
    """The verdict on a video.

    `frame_scores` (T,) are P(fake) of single frames; `face_share` is the share of the inspected
    frames that show the face. If it is 0, the verdict is about the middle of the picture.
    """

    probability: float
    verdict: str
    frame_scores: np.ndarray
    face_share: float

    @property
    def face_found(self) -> bool:
        return self.face_share > 0


def clip_or_error(path: Path, *how: Any) -> tuple[Path, Clip | str, float]:
    """A video, what `make_clip` makes of it or what is wrong with it, and the seconds that took."""
    started = time.perf_counter()
    try:
        result: Clip | str = make_clip(path, *how)
    except (VideoError, cv2.error) as error:
        result = str(error)
    return path, result, time.perf_counter() - started


def clips_ahead(
    paths: list[Path], workers: int, *how: Any
) -> Iterator[tuple[Path, Clip | str, float]]:
    """`clip_or_error` of each video in order, with threads up to 2 * `workers` videos ahead."""
    ahead = deque[Future]()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for path in paths:
            if len(ahead) == 2 * workers:
                yield ahead.popleft().result()
            ahead.append(pool.submit(clip_or_error, path, *how))
        while ahead:
            yield ahead.popleft().result()


# %%
@dataclass(frozen=True)
class Predictor:
    """A detector, in eval mode, with everything needed to score videos as in training."""

    model: nn.Module
    settings: ClipSettings
    face_detector: nn.ModuleList | None
    temperature: float = 1.0
    threshold: float = 0.5

    @classmethod
    def load(cls, file: Path, device: str = "cpu") -> "Predictor":
        """The detector in a best_model.pth."""
        model, saved = load_detector(Path(file), device)
        settings = ClipSettings.of(SimpleNamespace(**saved["config"]))
        faces = load_face_detector(device) if settings.face_crop else None
        return cls(model, settings, faces, saved["temperature"], saved["threshold"])

    def predict_clip(self, clip: Clip) -> Prediction:
        """Score the result of `make_clip` on the model's device."""
        batch = torch.from_numpy(clip.frames)[None].to(next(self.model.parameters()).device)
        with torch.inference_mode():
            output = self.model(normalize(to_float(batch)))
        prob = float(probabilities(output.logit.cpu().numpy(), self.temperature)[0])
        frame_scores = probabilities(output.frame_logits[0].cpu().numpy(), self.temperature)
        verdict = "fake" if prob >= self.threshold else "real"
        return Prediction(prob, verdict, frame_scores, clip.face_share)

    def predict_video(self, path: Path) -> Prediction:
        """Score one video. Raises VideoError, with its path and the reason, if it is unusable."""
        try:
            return self.predict_clip(make_clip(Path(path), self.settings, self.face_detector))
        except VideoError as error:
            raise VideoError(f"{path}: {error}") from error

    def table_row(self, path: Path, clip: Clip | str, seconds: float) -> dict[str, object]:
        row = {"path": str(path), "threshold": self.threshold, "error": ""}
        if isinstance(clip, str):
            return row | {"error": clip}
        started = time.perf_counter()
        row |= vars(self.predict_clip(clip))
        return row | {"seconds": round(seconds + time.perf_counter() - started, 3)}

    def predict_folder(
        self, folder: Path, workers: int = 2, file: Path | None = None
    ) -> pd.DataFrame:
        """A table of the scores of all videos in a folder, or of one; bad ones get an `error`."""
        paths = videos_below(folder) if folder.is_dir() else [folder]
        columns = ["path", "probability", "verdict", "threshold", "face_share", "seconds", "error"]
        rows, saved_at = [], time.perf_counter()
        clips = clips_ahead(paths, workers, self.settings, self.face_detector)
        for clip in tqdm(clips, "your videos", len(paths), leave=False, disable=NO_BARS):
            rows.append(self.table_row(*clip))
            if file and time.perf_counter() - saved_at > 20:  # an interrupted run loses little
                save_csv(pd.DataFrame(rows, columns=columns), file)
                saved_at = time.perf_counter()
        table = pd.DataFrame(rows, columns=columns)
        if file:
            save_csv(table, file)
        return table


# %% [markdown]
# The metrics of a toy test set, 40 videos of 20 people, whose fakes score higher on average:

# %%
if IN_NOTEBOOK:
    toy_labels, toy_groups = np.tile([0, 1], 20), np.arange(20).repeat(2)
    toy_probs = probabilities(np.random.default_rng(0).normal(2 * toy_labels - 1), 1.0)
    toy_intervals = bootstrap(toy_labels, toy_probs, 0.5, toy_groups, ["auc_roc", "eer", "f1"])
    toy_metrics = compute_metrics(toy_labels, toy_probs, 0.5)
    toy_metrics = {metric: toy_metrics[metric] for metric in toy_intervals}
    toy_table = pd.Series(format_metrics(toy_metrics, toy_intervals), name="toy test set")
    display(toy_table.rename(metric_name).to_frame())
