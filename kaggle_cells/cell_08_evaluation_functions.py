# %% [markdown]
# <a id="section-8"></a>
# ## 8. Calibration, metrics, explanations, figures, prediction
#
# A network's raw score, its logit, is not a probability, and zero is rarely the best threshold.
# Both are fixed on the **validation** set. Platt scaling fits an offset and a temperature, after
# which P(fake) = 0.5 means undecided when real and fake are equally likely. The threshold is the
# one with the best balanced accuracy. Two limits decide when a verdict is given: from the upper one
# on, nine in ten videos called fake are fake; up to the lower one, nine in ten called real are
# real. In between a video is uncertain. The test set is used only for the final numbers.

# %%
import base64
import dataclasses
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import sklearn.metrics as skm
import torch
from IPython.display import HTML, display
from matplotlib.figure import Figure, SubFigure
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from cell_01_imports_and_setup import (
    FAKE_COLOUR,
    IN_NOTEBOOK,
    REAL_COLOUR,
    WIDTH,
    progress_bar,
    replacing,
    save_csv,
    show_row,
    styled,
)
from cell_03_data_processing import (
    ClipSettings,
    VideoError,
    Window,
    content_size,
    evenly,
    face_windows,
    file_identity,
    file_problem,
    load_clip,
    load_face_detector,
    make_clip,
)
from cell_04_dataset_class import ClipDataset, Sample, batches_of_one_length, normalize, to_float
from cell_05_model_definition import DeepfakeDetector, DetectorOutput, load_detector
from cell_06_loss_and_utils import FocalLoss
from cell_07_training_functions import auc_by_ranks, in_parts, validate


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
    found, alarms = (np.append(0, counts) for counts in found_and_alarms(labels == 1, probs))
    above = len(scores) - np.searchsorted(scores, candidates)  # distinct scores at or above each
    quality = (found[above] / found[-1] - alarms[above] / alarms[-1]).round(9)
    best = candidates[quality == quality.max()]
    return float(best[np.abs(best - 0.5).argmin()])


# %%
def fit_limit(probs: np.ndarray, fake: np.ndarray, threshold: float) -> float:
    """The lowest P(fake), at least `threshold`, from which 9 in 10 videos are fake; else infinite.

    Both classes weigh the same, and fewer than TOO_FEW videos say nothing.
    """
    found, alarms = found_and_alarms(fake, probs)
    shares = found / found[-1], alarms / alarms[-1]
    is_sure = (shares[0] >= 0.9 * sum(shares) - 1e-9) & (found + alarms >= TOO_FEW)
    return max(threshold, float(np.unique(probs)[::-1][is_sure].min(initial=np.inf)))


def calibrate(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What fits the scores of a validation set: temperature, offset, threshold and both limits."""
    temperature, offset = fit_calibration(logits, labels)
    probs = probabilities(logits - offset, temperature)
    threshold = fit_threshold(probs, labels)
    limits = {
        "sure_fake": fit_limit(probs, labels == 1, threshold),
        "sure_real": 1 - fit_limit(1 - probs, labels == 0, 1 - threshold),
    }
    return {"temperature": temperature, "offset": offset, "threshold": threshold, **limits}


# %% [markdown]
# **Metrics.** Fake is the positive class. A metric that the videos do not define, such as the AUC
# of a single class, is `None`, never a 0 that looks like a result. A new metric is one more line in
# a table below; its arguments are arrays (N,): is it fake, and its P(fake) or the verdict "fake".


# %%
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
METRIC_FUNCTIONS |= {
    "log_loss": lambda fake, probs: -np.log(np.abs(~fake - probs).clip(1e-15)).mean(),
    "brier": lambda fake, probs: np.square(probs - fake).mean(),
    "ece": calibration_error,
}
METRIC_NAMES = {"auc_roc": "AUC-ROC", "auc_pr": "AUC-PR", "eer": "EER", "ece": "ECE", "f1": "F1"}
METRIC_NAMES |= {f"tpr_at_{n}_fpr": f"TPR at {n} % FPR" for n in (1, 5)}
METRIC_NAMES["brier"] = "Brier score"


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
    values = []
    for _ in range(RESAMPLINGS):
        drawn = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[group] for group in drawn])
        sample = fake[rows], probs[rows], called[rows]
        values.append([measure(metric, *sample) for metric in metrics])
    ends = pd.DataFrame(values, columns=[*metrics]).quantile([0.025, 0.975]).astype(object)
    return {metric: tuple(pair) for metric, pair in ends.where(ends.notna(), None).items()}


def format_metric(value: float | None, interval: Interval = (None, None)) -> str:
    """0.944 [0.902, 0.975], or 0.944 without an interval, or undefined."""
    if pd.isna(value):
        return "undefined"
    low, high = interval
    return f"{value:.3f}" + ("" if pd.isna(low) else f" [{low:.3f}, {high:.3f}]")


def format_metrics(
    metrics: dict[str, float | None], intervals: dict[str, Interval]
) -> dict[str, str]:
    return {metric: format_metric(metrics[metric], ends) for metric, ends in intervals.items()}


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
    """One row per "method", against all real videos, or per "dataset", against its own.

    `table` has label, method, dataset, group and probability of each video; `never_trained_on` are
    methods to mark.
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
    return pd.DataFrame(rows, columns=columns + measured).astype(dict.fromkeys(measured, float))


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
    table = table.iloc[evenly(len(table), videos)]
    device, rows = next(model.parameters()).device, []
    dataset: Any = loader.dataset
    size = max(map(len, loader.batch_sampler or ()))

    def add_row(name: str, strength: float | None, logits: np.ndarray) -> None:
        probs = probabilities(logits, 1.0)
        auc = auc_with_interval(table.label.to_numpy(), probs, table.group.to_numpy())
        rows.append({"degradation": name, "strength": strength, **auc, "videos": len(table)})

    add_row("none", None, table.logit.to_numpy())
    for name, change, strength in progress_bar(CHANGES, "robustness"):
        change_clip = partial(change_frames, change, strength)
        changed = ClipDataset(table, dataset.workers, change_clip, dataset.frames)
        samples = batches_of_one_length(changed, [*map(Sample, range(len(table)))], size, size)
        batches = DataLoader(changed, batch_sampler=samples, pin_memory=loader.pin_memory)
        scores = validate(model, batches, FocalLoss(0.0), device, title=name)
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

    The heat of one model's clips is comparable, and 0 if the backbone has no feature maps.
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
            gradients = torch.autograd.grad(output.logit.sum(), maps[0]) if maps else ()
    finally:
        for hook in hooks:
            hook.remove()
    output = DetectorOutput(*(part.detach() for part in output))
    if not gradients:
        return torch.zeros_like(clips[:, :, 0]), output
    (gradient,) = gradients
    heat = (gradient.clamp(min=0) * maps[0]).sum(dim=1, keepdim=True).clamp(min=0).detach().float()
    heat = nn.functional.interpolate(heat, clips.shape[-2:], mode="bilinear", align_corners=False)
    return heat.view(*clips.shape[:2], *clips.shape[-2:]), output


def explain(model: DeepfakeDetector, clip: np.ndarray) -> tuple[np.ndarray, DetectorOutput]:
    """The heat (T, S, S) of a clip (T, S, S, 3) uint8, and the output for it."""
    batch = torch.from_numpy(clip[None].copy()).to(next(model.parameters()).device)
    heat, output = heat_maps(model, normalize(to_float(batch)))
    return heat[0].cpu().numpy(), output


def overlay_heat(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A grey frame (S, S, 3) under its heat (S, S) in 0..1."""
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)
    share = (0.15 + 0.6 * heat)[..., None]
    grey = frame.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    return ((1 - share) * grey + share * colours[..., ::-1]).astype(np.uint8)


# %% [markdown]
# **Figures.** Each title says what was found. First the clips, and training:


# %%
def title_figure(figure: Any, title: str) -> Any:
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    return figure


@styled
def plot_samples(table: pd.DataFrame, per_clip: int = 5) -> Figure:
    """One clip per method, up to `per_clip` of its different frames in a row."""
    firsts = table.sort_values(["label", "method", "path"]).groupby("method", sort=False).head(1)
    per_clip = min(per_clip, int(firsts.distinct_frames.max()))
    figure, axes = plt.subplots(len(firsts), squeeze=False, figsize=(WIDTH, 1.15 * len(firsts)))
    for ax, sample in zip(axes.flat, firsts.itertuples(), strict=True):
        frames, _ = load_clip(sample.clip_file)
        show_row(ax, sample.method, frames[evenly(len(frames), per_clip)])
    return figure


@styled
def plot_history(history: pd.DataFrame) -> Figure:
    """Loss and AUC by epoch, with the best epoch marked."""
    best = history[history.best].iloc[-1]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3))
    for ax, quantity, name in zip(axes, ("loss", "auc"), ("loss", "AUC"), strict=True):
        for part, label, ink in ("train", "training", "0.55"), ("val", "validation", FAKE_COLOUR):
            ax.plot(history.epoch, history[f"{part}_{quantity}"], ".-", color=ink, label=label)
        ax.axvline(best.epoch, color="0.3", linewidth=0.8, linestyle=":", label="best epoch")
        ax.set(xlabel="epoch", ylabel=name)
        ax.locator_params(axis="x", integer=True)
    axes[0].legend(fontsize=10)
    found = f"Best validation AUC {best.val_auc:.3f}, in epoch {best.epoch:.0f} of {len(history)}"
    return title_figure(figure, found)


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
        return title_figure(figure, "No curves: the test set has only one class")
    fpr, tpr, _ = skm.roc_curve(labels, probs)
    precision, recall, _ = skm.precision_recall_curve(labels, probs)
    left.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="chance")
    left.plot(fpr, tpr, color=FAKE_COLOUR)
    right.axhline(labels.mean(), color="0.5", linestyle=":")
    right.plot(recall, precision, color=FAKE_COLOUR)
    mark: dict[str, Any] = dict(marker="o", color="black", linestyle="none")
    mark["label"] = f"threshold {threshold:.2f}"
    left.plot(1 - metrics["specificity"], metrics["recall"], **mark)
    right.plot(metrics["recall"], metrics["precision"] or 0, **mark)
    left.set(xlabel="reals called fake", ylabel="fakes found")
    left.set_title(f"AUC {format_metric(metrics['auc_roc'], auc)}")
    title = f"AUC-PR {metrics['auc_pr']:.3f}"
    right.set(xlabel="fakes found (recall)", ylabel="precision", title=title)
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
    below.locator_params(axis="y", integer=True)
    below.legend(fontsize=10)
    ece = 100 * calibration_error(labels == 1, probs)
    ax.set_title(f"P(fake) is off by {ece:.0f} points on average (ECE)")
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
    return title_figure(figure, title)


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
    shown = evenly(len(clip), 6)
    grid = part.add_gridspec(3, 1, height_ratios=[1, 1, 1.15])
    top, middle, ax = (part.add_subplot(grid[row, 0]) for row in range(3))
    show_row(top, "", clip[shown], [str(t + 1) for t in shown])
    show_row(middle, "", np.stack([*map(overlay_heat, clip[shown], heat[shown])]))
    times = np.arange(1, len(clip) + 1)
    if np.ptp(attention) > 0:  # a network without attention looks at all frames alike
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
    found: list[Any] = []
    for _, row in examples.iterrows():
        frames, _ = load_clip(row.clip_file)
        # Where order matters, the first of the interleaved clips, else all frames.
        clip = frames[:: max(1, len(frames) // model.frames) if model.reads_order else 1]
        heat, output = explain(model, clip)
        found.append((row, clip, heat, *(part[0].cpu().numpy() for part in output[1:])))
    hottest = max(heat.max() for _, _, heat, *_ in found) or 1.0
    figure: Any = plt.figure(figsize=(WIDTH, 4.3 * len(examples)))
    parts = np.atleast_1d(figure.subfigures(len(examples), 1))
    for part, (row, clip, heat, logits, attention) in zip(parts, found, strict=True):
        draw_explanation(part, clip, heat / hottest, probabilities(logits, temperature), attention)
        title_figure(part, verdict_line(row))
    return figure


@styled
def plot_mistakes(table: pd.DataFrame, threshold: float) -> Figure:
    """The middle frame of the most confident errors, with their method and score."""
    wrong = most_confident_first(table[~table.correct], threshold)
    worst = wrong.head(9)
    rows = -(-len(worst) // 3) or 1
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
    title += f"; the {len(worst)} most confident" if len(wrong) > len(worst) else ""
    return title_figure(figure, title if len(wrong) else f"No mistakes in {len(table)} videos")


# %% [markdown]
# **Your own videos** take the same path as the training videos. The model file alone is enough, it
# holds all settings: `Predictor.load("best_model.pth").judge("video.mp4")` looks at all of a video
# and every face, `scan` yields the windows as they are scored, and `predict_video` scores one clip
# from the middle, as in training.


# %%
@dataclass(frozen=True)
class Prediction:
    """The verdict on one clip.

    `frame_scores` (T,) are P(fake) of single frames; `face_share` is the share of the inspected
    frames that show the face. If it is 0, the verdict is about the middle of the picture.
    """

    probability: float
    verdict: str
    frame_scores: np.ndarray
    face_share: float


def score_clips(model: DeepfakeDetector, clips: np.ndarray) -> DetectorOutput:
    """The network's output for clips (B, T, S, S, 3) uint8, on its device.

    Fewer at once where memory runs out.
    """
    device = next(model.parameters()).device

    def score(part: torch.Tensor) -> DetectorOutput:
        return model(normalize(to_float(part.to(device))))

    with torch.inference_mode():
        parts, _ = in_parts(score, [torch.from_numpy(clips)], 8)  # of a crowd, 8 faces at once
    return DetectorOutput(*map(torch.cat, zip(*parts, strict=True)))


def describe_model(file: Path, saved: dict) -> str:
    """A model and how good it is known to be: the first words of the card beside it, if any."""
    name = f"{file.name}, {saved['config']['BACKBONE']}. "
    card = file.with_name("README.md")
    text = card.read_text("utf-8", "replace") if card.exists() else ""
    if text.startswith(f"# Model card: {file.name}\n\n"):
        return name + " ".join(text.split("\n\n")[1].replace("**", "").split())
    trained_on = ", ".join(saved.get("trained_on", ["unknown"])) or "self-blended faces alone"
    name += f"Trained on {trained_on}; AUC {saved['val_auc']:.3f} on its validation set, "
    return f"{name}from which the best epoch was chosen. On other videos it is worse."


# %%
@dataclass(frozen=True)
class Predictor:
    """A detector, in eval mode, with everything needed to score videos as in training.

    `limits`: up to the first P(fake) a video is called real, from the second on fake. Without them,
    as in older model files, `threshold` is both, and nothing is uncertain. `info` is what else the
    model file holds: config, epoch, val_auc, ...
    """

    model: DeepfakeDetector
    settings: ClipSettings
    face_detector: nn.ModuleList | None
    temperature: float = 1.0
    threshold: float = 0.5
    limits: tuple[float, float] | None = None
    fingerprint: str = ""
    about: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, file: str | Path, device: str | torch.device = "cpu") -> "Predictor":
        """The detector in a best_model.pth."""
        file = Path(file)
        model, saved = load_detector(file, device)
        settings = ClipSettings.of(SimpleNamespace(**saved["config"]))
        faces = load_face_detector(device) if settings.face_crop else None
        limits = (saved["sure_real"], saved["sure_fake"]) if "sure_fake" in saved else None
        numbers = saved["temperature"], saved["threshold"], limits
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        about = describe_model(file, saved)
        info = {name: value for name, value in saved.items() if name != "model"}
        return cls(model, settings, faces, *numbers, fingerprint, about, info)

    def verdict(self, probability: float) -> str:
        real_to, fake_from = self.limits or (self.threshold, self.threshold)
        if probability >= fake_from:
            return "fake"
        return "real" if probability <= real_to else "uncertain"

    def predict_video(self, path: str | Path) -> Prediction:
        """Score one clip of a video. Raises VideoError, with path and reason, if it is unusable."""
        try:
            clip = make_clip(Path(path), self.settings, self.face_detector)
        except (VideoError, cv2.error) as error:
            raise VideoError(f"{path}: {error}") from error
        output = score_clips(self.model, clip.frames[None])
        prob = float(probabilities(output.logit.cpu().numpy(), self.temperature)[0])
        frame_scores = probabilities(output.frame_logits[0].cpu().numpy(), self.temperature)
        return Prediction(prob, self.verdict(prob), frame_scores, clip.face_share)

    def scan(self, path: str | Path, stride: float = 0, max_windows: int = 0) -> Iterator[Window]:
        """Every face in each window of a video, as soon as it is scored.

        Windows start `stride` seconds apart (0: side by side), at most `max_windows` of them (0:
        all). What cannot be judged has a `reason` and no probability. Raises VideoError as
        `face_windows` does.
        """
        options = self.settings, self.face_detector, stride, max_windows
        for windows in face_windows(Path(path), *options):
            judged = [window for window in windows if not window.reason]
            if judged:
                output = score_clips(self.model, np.stack([window.clip for window in judged]))
                logits = output.logit.float().cpu().numpy()
                probs = probabilities(logits, self.temperature)
                frame_logits = output.frame_logits.float().cpu().numpy()
                for row, window in enumerate(judged):
                    window.logit, window.probability = float(logits[row]), float(probs[row])
                    window.frame_logits = frame_logits[row]
            yield from windows

    def judge(
        self,
        path: str | Path,
        stride: float = 0,
        max_windows: int = 0,
        progress: Callable[[float], object] = lambda share: None,
    ) -> "Judgement":
        """All of a video as one verdict: see `scan` and `judge_video`."""
        return judge_video(self, Path(path), (stride, max_windows), progress)

    def show(self, path: str | Path) -> None:
        """Judge a video and show its card in the notebook."""
        with progress_bar(title=Path(path).name, total=100) as bar:
            judgement = self.judge(path, progress=partial(move_bar, bar, 0, 100))
        display(HTML(inline_html(judgement, self)))


# %% [markdown]
# **From windows to a verdict.** A video is as suspicious as its most suspicious face is in its
# most suspicious stretch. The highest of many scores is often a mistake, so a stretch is two
# windows in a row, and its logit their mean: one bad window cannot decide unless it is more certain
# than each neighbour is that it is real. What this costs and gains: docs/benchmarks.md.


# %%
@dataclass
class Judgement:
    """What is known about a video.

    `verdict` is fake, real, uncertain or no face to judge, or empty if nothing could be decoded;
    `face`, `start` and `end` (s) are those of the most suspicious stretch; `windows` have no clips,
    to keep memory flat; `problem` says what is wrong with the file; `pictures` are the faces as
    JPEGs in data URIs; `took` is the time for it, in s.
    """

    path: str
    verdict: str = ""
    probability: float = math.nan
    face: int = 0
    start: float = math.nan
    end: float = math.nan
    windows: list[Window] = field(default_factory=list)
    problem: str = ""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    took: float = 0.0

    @property
    def faces(self) -> dict[int, list[Window]]:
        """All windows of each face that was judged at some time."""
        faces = judged_faces(self.windows)
        return {face: [w for w in self.windows if w.face == face] for face in faces}

    @property
    def length(self) -> float:
        return max((window.end for window in self.windows), default=0.0)


# %%
def judged_faces(windows: list[Window]) -> dict[int, list[Window]]:
    """The windows that were judged, by face."""
    parts = sorted((window for window in windows if not window.reason), key=lambda w: w.face)
    return {face: [*part] for face, part in groupby(parts, key=lambda window: window.face)}


def seconds_in(windows: Iterable[Window]) -> float:
    """How many seconds of the video lie in at least one of the windows."""
    total, until = 0.0, 0.0
    for window in sorted(windows, key=lambda window: window.start):
        total += max(0.0, window.end - max(until, window.start))
        until = max(until, window.end)
    return total


def most_suspicious(windows: list[Window]) -> tuple[float, int]:
    """The highest mean logit of a stretch of a face's windows, and which of them scores most in it.

    A stretch is as long as two windows side by side; a shorter track is one. If windows overlap, it
    holds more of them. Windows that show the face for less time weigh less.
    """
    logits = np.array([window.logit for window in windows])
    times = np.array([[window.start, window.end] for window in windows])
    lengths, middles = np.maximum(times[:, 1] - times[:, 0], 1e-3), times.mean(axis=1)
    longest = lengths.max()
    begins = np.minimum(middles, middles[-1] - longest)  # a stretch for each window to begin with
    after = middles - begins[:, None]
    weights = lengths * ((after > -1e-6) & (after < 1.1 * longest))  # (stretches, windows)
    means = weights @ logits / weights.sum(axis=1)
    best = int(means.argmax())
    return float(means[best]), int(np.where(weights[best] > 0, logits, -np.inf).argmax())


def find_stretch(windows: list[Window], place: int, limit: float) -> tuple[float, float]:
    """From when to when the windows around number `place` have a P(fake) of at least `limit`."""
    low = [i for i, window in enumerate(windows) if window.probability < limit]
    first = max((i + 1 for i in low if i < place), default=0)
    end = min((i for i in low if i > place), default=len(windows))
    return windows[first].start, windows[end - 1].end


# %%
FACES_SHOWN = 3  # the most suspicious ones, with pictures
Extremes = dict[int, tuple[Window, Window]]  # the most and the least suspicious window of a face


def keep_extremes(extremes: Extremes, window: Window, faces: dict[int, list[Window]]) -> None:
    """Take in one more window; those of all `faces` so far say which are the most suspicious.

    Only the windows kept keep their clips.
    """
    seen = [*extremes.get(window.face, ()), window]
    falling = sorted(seen, key=lambda window: window.logit, reverse=True)
    extremes[window.face] = falling[0], falling[-1]
    if len(extremes) > FACES_SHOWN:
        del extremes[min(extremes, key=lambda face: most_suspicious(faces[face])[0])]


def as_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 RGB as a small JPEG in a data URI."""
    _, content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()


def frame_and_heat(
    predictor: Predictor, window: Window, is_most: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A window's frame (S, S, 3) that scores most, or least, and its heat (S, S).

    Of interleaved clips, that with the frame is explained.
    """
    clip, scores, frames = window.clip, window.frame_logits, predictor.model.frames
    t = int(scores.argmax() if is_most else scores.argmin())
    count = len(clip) // frames if len(clip) % frames == 0 else 1
    heat, _ = explain(predictor.model, clip[t % count :: count])
    return clip[t], heat[t // count]


def draw_pictures(predictor: Predictor, face: int, extremes: tuple[Window, Window]) -> list[dict]:
    """A face at its most and least suspicious moments, with heat on a common scale."""
    windows = extremes[:1] if extremes[0] is extremes[1] else extremes
    found = [frame_and_heat(predictor, window, window is extremes[0]) for window in windows]
    hottest = max(1e-9, *(heat.max() for _, heat in found))
    pictures: list[dict[str, Any]] = []
    for name, window, (frame, heat) in zip(("most", "least"), windows, found, strict=False):
        facts = dict(face=face, moment=name, start=window.start, end=window.end)
        facts |= dict(probability=window.probability, picture=as_uri(frame))
        facts |= {"heat": as_uri(overlay_heat(frame, heat / hottest))} if heat.any() else {}
        pictures.append(facts)
    return pictures


# %%
def judge_video(
    predictor: Predictor, path: Path, options: tuple[float, int], progress: Callable[[float], Any]
) -> Judgement:
    """Scan a video and sum it up; `progress` is told the share that is done.

    Raises VideoError, with path and reason, if nothing can be decoded. What is missing of a video
    that can be read in part is its `problem`.
    """
    started, judgement, extremes = time.perf_counter(), Judgement(str(path)), Extremes()
    faces = defaultdict[int, list[Window]](list)
    try:
        for window in predictor.scan(path, *options):
            judgement.windows.append(dataclasses.replace(window, clip=None, frame_logits=None))
            if not window.reason:
                faces[window.face].append(judgement.windows[-1])
                keep_extremes(extremes, window, faces)
            progress(window.done)
    except (VideoError, cv2.error) as error:
        if not judgement.windows:
            raise VideoError(f"{path}: {error}") from error
        judgement.problem = str(error)
    sum_up(predictor, judgement)
    for face in sorted(extremes, key=lambda face: (face != judgement.face, face)):
        judgement.pictures += draw_pictures(predictor, face, extremes[face])
    judgement.took = time.perf_counter() - started
    return judgement


# %%
def sum_up(predictor: Predictor, judgement: Judgement) -> None:
    """The verdict: that on the most suspicious face in its most suspicious stretch."""
    judgement.verdict, highest = "no face to judge", -math.inf
    for face, windows in judged_faces(judgement.windows).items():
        logit, place = most_suspicious(windows)
        if logit > highest:
            highest, judgement.face = logit, face
            judgement.start, judgement.end = find_stretch(windows, place, predictor.threshold)
    if judgement.face:
        judgement.probability = float(probabilities(np.array(highest), predictor.temperature))
        judgement.verdict = predictor.verdict(judgement.probability)


# %% [markdown]
# **A report to look at.** One HTML page that needs nothing else: pictures are inside, it follows
# the device's light or dark mode, and of hundreds of videos only what is unfolded is drawn. A
# video's part of it is its card, which `Predictor.show` shows in the notebook.

# %%
REPORT_STYLE = """
.dd {color-scheme: light dark; --ink: #1c1c1e; --dim: #63666d; --page: #fff; --card: #f5f5f7;
  --fake: #b84a00; --real: #0064a0; --uncertain: #7a6000; --line: #cfcfd4; color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; background: var(--page); overflow-wrap: anywhere}
@media (prefers-color-scheme: dark) {.dd {--ink: #ececf0; --dim: #a0a3ab; --page: #141416;
  --card: #212125; --fake: #ff8a45; --real: #62b6f2; --uncertain: #e0bd3a; --line: #47474d}}
.dd * {box-sizing: border-box}
.dd main {max-width: 960px; margin: auto; padding: 16px}
.dd h1 {font-size: 1.5em; margin: 0 0 8px}
.dd p, .dd ul {margin: 8px 0}
.dd .dim, .dd figcaption {color: var(--dim); font-size: .875em}
.dd .card {background: var(--card); border-radius: 10px; margin: 10px 0; padding: 4px 14px;
  content-visibility: auto; contain-intrinsic-size: auto 62px}
.dd summary {display: flex; flex-flow: wrap; align-items: center; gap: 0 12px; cursor: pointer;
  padding: 6px 0}
.dd summary img, .dd summary .none {width: 48px; height: 48px; border-radius: 6px; flex: none;
  background: var(--line)}
.dd summary b {flex: 1 1 180px; min-width: 0}
.dd .verdict {font-weight: 600; white-space: nowrap; text-align: right; margin-left: auto;
  color: var(--dim)}
.dd .fake {color: var(--fake); fill: var(--fake)} .dd .real {color: var(--real); fill: var(--real)}
.dd .uncertain {color: var(--uncertain); fill: var(--uncertain)} .dd .unjudged {fill: var(--line)}
.dd svg {display: block; width: 100%; height: 64px; background: var(--page); border-radius: 4px}
.dd svg line {stroke: var(--ink); vector-effect: non-scaling-stroke; stroke-dasharray: 4 4}
.dd rect {stroke: var(--page); vector-effect: non-scaling-stroke}
.dd .axis {display: flex; justify-content: space-between}
.dd .pictures {display: flex; flex-wrap: wrap; gap: 14px}
.dd figure {margin: 8px 0} .dd figure img {width: 132px; max-width: 46%; border-radius: 6px;
  display: inline-block}
"""

# %%
CARD = """{% set path, length = Path(video.path), [video.length, 0.04]|max %}
{% set faces, unjudged = video.faces, unjudged_places(video.windows) %}
{% set chance = "P(fake) %.2f" % video.probability %}
<details class="card" data-score="{{ video.probability if video.face else -1 }}"
 data-name="{{ path.name }}" data-length="{{ length }}" {{ "open" if is_open }}>
<summary>{% if video.pictures %}<img src="{{ video.pictures[0].picture }}" alt="">{% else %}
<span class="none"></span>{% endif %}<b>{{ path.name }}{% if path.name != video.path %}<br>
<span class="dim">{{ path.parent }}</span>{% endif %}</b>
<span class="verdict {{ video.verdict }}">{{ video.verdict or "not readable" }}{% if video.face %}
<br>{{ chance }}{% endif %}</span></summary>
<p>{% if not video.verdict %}Not readable: {{ video.problem }}.{% elif not video.face %}
No face to judge: see below why. This says nothing about the video.{% else %}
{{ "Uncertain" if video.verdict == "uncertain" else "Called " ~ video.verdict }}: {{ chance }}. Face
{{ video.face }} is most suspicious from {{ clock(video.start) }} to {{ clock(video.end) }}.
{% endif %}</p>
{% if video.verdict and video.problem %}<p>Judged in part: {{ video.problem }}.</p>{% endif %}
{% for face in [video.face] + faces|reject("eq", video.face)|list if face %}
<p class="dim">Face {{ face }}: P(fake) from 0 (bottom) to 1; dashed: where verdicts change</p>
<svg viewBox="0 0 {{ length }} 1" preserveAspectRatio="none" role="img"
 aria-label="P(fake) of face {{ face }} over time">
{% for w in faces[face] %}{% set height = 1 if w.reason else [0.02, w.probability]|max %}
{% set end = [w.end, loop.nextitem.start]|min if loop.nextitem else w.end %}
<rect x="{{ w.start }}" width="{{ end - w.start }}" y="{{ 1 - height }}" height="{{ height }}"
 class="{{ "unjudged" if w.reason else predictor.verdict(w.probability) }}"><title>
{{ clock(w.start) }} to {{ clock(w.end) }}: {{ w.reason or "P(fake) %.2f" % w.probability }}
</title></rect>{% endfor %}
{% for limit in predictor.limits or [predictor.threshold] if 0 <= limit <= 1 %}
<line x1="0" x2="{{ length }}" y1="{{ 1 - limit }}" y2="{{ 1 - limit }}"/>{% endfor %}</svg>
<div class="axis dim"><span>0:00</span><span>{{ clock(length) }}</span></div>
<div class="pictures">{% for p in video.pictures if p.face == face %}<figure>
<img src="{{ p.picture }}" alt="the face">{% if p.heat %}
<img src="{{ p.heat }}" alt="heat map">{% endif %}<figcaption>{{ p.moment }} suspicious,
{{ clock(p.start) }} to {{ clock(p.end) }}: P(fake) {{ "%.2f" % p.probability }}</figcaption>
</figure>{% endfor %}</div>{% endfor %}
{% if unjudged %}<p>Not judged:</p><ul>{% for reason, places in unjudged.items() %}
<li>{{ reason }}: {{ places[:4]|join("; ") }}{% if places[4:] %};
and {{ places|length - 4 }} more{% endif %}</li>{% endfor %}</ul>{% endif %}</details>
"""

# %%
INLINE = """<style>{{ style|safe }}</style><div class="dd">{% include "card" %}
<p class="dim">{{ predictor.about }} {{ limits(predictor) }} {{ caveat }}</p></div>"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Deepfake report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {margin: 0} {{ style|safe }}</style></head><body class="dd"><main>
<h1>Videos: {{ counts }}</h1><p class="dim">{% if predictor.about %}Model: {{ predictor.about }}
{% endif %}{{ limits(predictor) }}</p><p class="dim">{{ caveat }}</p>
<p><label>Sort by <select id="sort"><option value="score">most suspicious</option>
<option value="name">name</option><option value="length">length</option></select></label></p>
<div id="videos">{% for video in videos %}{% include "card" %}{% endfor %}</div></main><script>
const list = document.getElementById("videos"), sort = document.getElementById("sort");
sort.onchange = () => {
  const value = card => card.dataset[sort.value], byName = sort.value === "name";
  list.append(...[...list.children].sort((a, b) => byName
    ? value(a).localeCompare(value(b), undefined, {numeric: true}) : value(b) - value(a)));
};
</script></body></html>
"""
CAVEAT = """A verdict is a hint, never proof: detectors fail on manipulations, cameras and
compression unlike those they were trained on. Heat shows what the network reacts to, not what was
altered. Do not accuse or clear anyone with this."""


# %%
def clock(seconds: float) -> str:
    """Minutes and seconds: 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def unjudged_places(windows: list[Window]) -> dict[str, list[str]]:
    """Which faces were not judged, and when, by the reason."""
    places: dict[str, list[str]] = {}
    for window in windows:
        if window.reason:
            face = f"face {window.face}, " if window.face else ""
            place = f"{face}{clock(window.start)} to {clock(window.end)}"
            places.setdefault(window.reason.split(":")[0], []).append(place)
    return places


def describe_limits(predictor: Predictor) -> str:
    if predictor.limits is None:
        only = f"one threshold, {predictor.threshold:.2f}"
        return f"This model file has {only}: no video is called uncertain."
    real_to, fake_from = predictor.limits
    low = f"called real up to P(fake) {real_to:.2f}" if real_to >= 0 else "never called real"
    high = f"called fake from {fake_from:.2f} on" if fake_from <= 1 else "never called fake"
    called = " or ".join(["real"] * (real_to >= 0) + ["fake"] * (fake_from <= 1))
    right = f" With as many real as fake videos, nine in ten verdicts of {called} are right."
    return f"A video is {low}, {high}, otherwise uncertain.{right if called else ''}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.DictLoader({"card": CARD, "inline": INLINE, "page": PAGE}),
    autoescape=True,
    trim_blocks=True,
)
TEMPLATES.globals.update(clock=clock, unjudged_places=unjudged_places, limits=describe_limits)
TEMPLATES.globals.update(Path=Path, style=REPORT_STYLE, caveat=CAVEAT)


def inline_html(judgement: Judgement, predictor: Predictor) -> str:
    """A card with all it needs, to be shown within another page."""
    known = dict(video=judgement, predictor=predictor, is_open=True)
    return TEMPLATES.get_template("inline").render(known)


# %% [markdown]
# **Many videos.** Each verdict is kept in a file of its own as soon as it is there: a run that was
# stopped, or killed, goes on with the next video when it is started again.


# %%
JUDGEMENT_VERSION = 6  # part of a kept verdict's name: increased when verdicts change
PREDICTION_COLUMNS = ["path", "probability", "verdict", "threshold", "face_share", "seconds"]
PREDICTION_COLUMNS += ["error", "faces", "seconds_judged", "from", "to"]


def move_bar(bar: Any, before: float, size: float, share: float) -> None:
    """Set a bar to what came `before` plus a `share` of a video's `size`."""
    bar.update(before + share * size - bar.n)


# %%
def judge_or_recall(
    predictor: Predictor, path: Path, folder: Path, options: tuple[float, int], progress: Callable
) -> Judgement:
    """The verdict on a video, kept in `folder`; one without a verdict if it is unreadable."""
    if problem := file_problem(path):
        return Judgement(str(path), problem=problem)
    # Kept by the video's path, size and time, the model and how to scan.
    known = [JUDGEMENT_VERSION, *file_identity(path), predictor.fingerprint, *options]
    file = folder / "judged" / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.json"
    with suppress(FileNotFoundError, json.JSONDecodeError):  # not there, or damaged: judge it
        saved = json.loads(file.read_text(encoding="utf-8"))
        windows = [Window(**window) for window in saved.pop("windows")]
        return Judgement(**saved, windows=windows)
    try:
        judgement = predictor.judge(path, *options, progress=progress)
    except VideoError as error:
        return Judgement(str(path), problem=str(error).removeprefix(f"{path}: "))
    with replacing(file) as partial_file:
        partial_file.write_text(json.dumps(dataclasses.asdict(judgement)), encoding="utf-8")
    return judgement


# %%
def predictions_table(judgements: list[Judgement], threshold: float) -> pd.DataFrame:
    """One row per video, in the order given."""
    rows = []
    for judged in judgements:
        row = {"path": judged.path, "threshold": threshold, "error": judged.problem}
        row["verdict"] = judged.verdict or None
        if judged.verdict:
            with_face = [window for window in judged.windows if window.face]
            share = seconds_in(with_face) / seconds_in(judged.windows)
            row |= {"probability": judged.probability, "face_share": round(share, 3)}
            row |= {"seconds_judged": round(seconds_in(w for w in with_face if not w.reason), 2)}
            row |= {"faces": len(judged.faces), "seconds": round(judged.took, 3)}
            row |= {"from": round(judged.start, 2), "to": round(judged.end, 2)}
        rows.append(row)
    return pd.DataFrame(rows, columns=PREDICTION_COLUMNS)


def verdict_counts(table: pd.DataFrame) -> str:
    """How many videos of predictions.csv got which verdict: 3 fake, 5 real, 1 not readable."""
    counts = table.verdict.fillna("not readable").value_counts()
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) or "none"


# %%
def windows_table(judgements: list[Judgement]) -> pd.DataFrame:
    """One row per face and window."""
    columns = ["path", "face", "from", "to", "probability", "logit", "size", "sharpness", "seen"]
    rows, sides = [], ["left", "top", "right", "bottom"]
    for judged in judgements:
        for window in judged.windows:
            row = vars(window) | {"path": judged.path, "from": window.start, "to": window.end}
            rows.append(row | dict(zip(sides, window.box, strict=False)))
    return pd.DataFrame(rows, columns=[*columns, *sides, "reason"]).round(4)


def write_results(judgements: list[Judgement], predictor: Predictor, folder: Path) -> pd.DataFrame:
    """Write predictions.csv, windows.csv and report.html; returns the first."""
    table = predictions_table(judgements, predictor.threshold)
    save_csv(table, folder / "predictions.csv")
    save_csv(windows_table(judgements), folder / "windows.csv")
    falling = sorted(judgements, key=lambda j: j.probability if j.face else -1, reverse=True)
    known = dict(videos=falling, counts=verdict_counts(table), predictor=predictor)
    known["is_open"] = len(judgements) == 1
    page = TEMPLATES.get_template("page").render(known)
    with replacing(folder / "report.html") as partial_file:
        partial_file.write_bytes(page.encode("utf-8", "backslashreplace"))
    return table


# %%
def judge_videos(
    predictor: Predictor,
    paths: list[Path],
    folder: Path,
    options: tuple[float, int] = (0, 0),
    tell: Callable[[Judgement], object] = lambda judgement: None,
) -> pd.DataFrame:
    """Judge videos and `tell` of each; `options` are stride and max_windows of `Predictor.scan`.

    Returns predictions.csv, which is left in `folder` with windows.csv and report.html. What is
    done is written every 20 s, and when this is interrupted.
    """
    sizes = [0 if file_problem(path) else content_size(path) for path in paths]
    judged: list[Judgement] = []
    written = time.perf_counter()
    form = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"
    with progress_bar(title="your videos", total=sum(sizes), bar_format=form) as bar:
        try:
            for number, path in enumerate(paths):
                bar.set_postfix_str(f"{number + 1} of {len(paths)}", refresh=False)
                progress = partial(move_bar, bar, bar.n, sizes[number])
                judged.append(judge_or_recall(predictor, path, folder, options, progress))
                progress(1.0)
                tell(judged[-1])
                if time.perf_counter() - written > 20:
                    write_results(judged, predictor, folder)
                    written = time.perf_counter()
        finally:
            table = write_results(judged, predictor, folder)
    return table


# %% [markdown]
# The metrics of a toy test set, 40 videos of 20 people, whose fakes score higher on average:

# %%
if IN_NOTEBOOK:
    toy_labels, toy_groups = np.tile([0, 1], 20), np.arange(20).repeat(2)
    toy_probs = probabilities(np.random.default_rng(0).normal(2 * toy_labels - 1), 1.0)
    toy_intervals = bootstrap(toy_labels, toy_probs, 0.5, toy_groups, ["auc_roc", "eer", "f1"])
    toy_metrics = compute_metrics(toy_labels, toy_probs, 0.5)
    toy_table = pd.Series(format_metrics(toy_metrics, toy_intervals), name="toy test set")
    display(toy_table.rename(metric_name).to_frame())
