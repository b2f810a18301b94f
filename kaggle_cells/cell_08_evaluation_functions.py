# %% [markdown]
# <a id="section-8"></a>
# ## 8. Calibration, metrics, explanations, figures, prediction
#
# A network's raw score is not a probability, and its zero is rarely the best place to decide. Both are put right on
# the **validation** set, by Platt scaling: an offset and a temperature, after which 0.5 means undecided where real and
# fake are equally likely. The threshold is the one with the best balanced accuracy. The test set is used for nothing
# but the numbers at the end.

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
import sklearn.metrics as skm
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cell_01_imports_and_setup import (
    FAKE_COLOUR,
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
    load_face_detector,
    make_clip,
    videos_below,
)
from cell_04_dataset_class import ClipDataset, PairDraws, normalize, self_blend, to_float
from cell_05_model_definition import DeepfakeDetector, Output, load_detector
from cell_07_training_functions import validate


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """P(fake) of logits, any shape."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64) / temperature, -50, 50)))


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Temperature (0.25 to 16) and offset that give `probabilities(logits - offset, temperature)` the least log loss.

    Both classes count half, however many videos they have. The targets are Platt's (1999), a little inside of 0 and 1,
    so that a few videos that happen to be told apart perfectly do not make the network certain of everything.
    """
    fakes, reals = np.sum(labels == 1), np.sum(labels == 0)
    targets = np.where(labels == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))
    weights = np.where(labels == 1, 0.5 / max(fakes, 1), 0.5 / max(reals, 1))
    scale = max(float(np.std(logits)), 1e-3)

    def loss(at: np.ndarray) -> float:
        chances = probabilities(logits - at[1] * scale, np.exp(at[0]))
        return -np.sum(weights * (targets * np.log(chances) + (1 - targets) * np.log1p(-chances)))

    limits = [(np.log(0.25), np.log(16)), (logits.min() / scale - 1, logits.max() / scale + 1)]
    start = [np.log(np.clip(scale, 0.25, 16)), np.median(logits) / scale]
    found = minimize(loss, start, method="L-BFGS-B", bounds=limits).x
    return float(np.exp(found[0])), float(found[1] * scale)


def fit_threshold(chances: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best balanced accuracy, halfway between neighbouring scores; the one nearest 0.5."""
    scores = np.unique(chances)
    candidates = np.append((scores[1:] + scores[:-1]) / 2, 0.5)
    quality = [np.round(skm.balanced_accuracy_score(labels, chances >= t), 9) for t in candidates]
    best = candidates[quality == np.max(quality)]
    return float(best[np.abs(best - 0.5).argmin()])


# %% [markdown]
# **Metrics.** Fake is the positive class. What the videos at hand do not define, the AUC of one class alone say, is
# `None`, never a 0 that looks like a result.
#
# A number from 48 videos could well have been another one. So each comes with an interval: the test is repeated a
# thousand times with recordings drawn from it at random, some several times, some not at all (the bootstrap), and 95 %
# of the results lie within. Whole groups are drawn, for videos of one recording are no independent witnesses.

# %%
DECISIONS = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "specificity",
    "f1",
)  # depend on the threshold
NAMES = {
    "auc_roc": "AUC-ROC",
    "auc_pr": "AUC-PR",
    "eer": "EER",
    "brier": "Brier score",
    "ece": "ECE",
    "f1": "F1",
}
NAMES |= {"tpr_at_1_fpr": "TPR at 1 % FPR", "tpr_at_5_fpr": "TPR at 5 % FPR"}
RESAMPLINGS = 1000
Interval = tuple[float | None, float | None]


def counted_metrics(
    labels: np.ndarray, chances: np.ndarray, threshold: float, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """All metrics of probabilities (N,) against labels (N,), 1 being fake, with NaN for what is undefined.

    `counts` (R, N) says how often each video counts; each metric is (R,). AUC-PR is the average precision; the rate of
    fakes found at a false alarm rate is the best one of those reached within it; the EER is on the interpolated ROC
    curve; the expected calibration error has ten bins of equal width.
    """
    fake, real, total = counts * (labels == 1), counts * (labels == 0), counts.sum(axis=1)
    fakes, reals, called = fake.sum(axis=1), real.sum(axis=1), chances >= threshold
    tp, fp = fake[:, called].sum(axis=1), real[:, called].sum(axis=1)
    falling = np.argsort(-chances, kind="stable")
    last = np.append(
        np.flatnonzero(np.diff(chances[falling])), len(chances) - 1
    )  # of those with one score
    hits, alarms = (
        np.pad(part[:, falling].cumsum(axis=1)[:, last], ((0, 0), (1, 0))) for part in (fake, real)
    )
    surprise = -np.log(np.clip(np.where(labels == 1, chances, 1 - chances), 1e-15, 1))
    bins = np.eye(10)[np.minimum((10 * chances).astype(int), 9)]
    each = np.arange(len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.where((fakes > 0) & (reals > 0), 1, np.nan)
        tpr, fpr = hits / fakes[:, None], alarms / reals[:, None]
        gap = fpr + tpr - 1  # rises from -1 to 1, and is 0 where both errors are equal
        after = np.maximum((gap >= 0).argmax(axis=1), 1)
        before, beyond = gap[each, after - 1], gap[each, after]
        steps = np.diff(hits) / fakes[:, None]
        return {
            "auc_roc": np.sum(np.diff(fpr) * (tpr[:, 1:] + tpr[:, :-1]) / 2, axis=1) * both,
            "auc_pr": np.sum(steps * np.nan_to_num(hits / (hits + alarms))[:, 1:], axis=1) * both,
            "eer": fpr[each, after - 1]
            - before / (beyond - before) * np.diff(fpr)[each, after - 1],
            "tpr_at_1_fpr": np.where(fpr <= 0.01, tpr, 0).max(axis=1) * both,
            "tpr_at_5_fpr": np.where(fpr <= 0.05, tpr, 0).max(axis=1) * both,
            "accuracy": (tp + reals - fp) / total,
            "balanced_accuracy": (tp / fakes + 1 - fp / reals) / 2,
            "precision": tp / (tp + fp),
            "recall": tp / fakes,
            "specificity": 1 - fp / reals,
            "f1": 2 * tp / (fakes + tp + fp),
            "log_loss": counts @ surprise / total,
            "brier": counts @ (chances - labels) ** 2 / total,
            "ece": np.abs(counts @ (bins * (chances - labels)[:, None])).sum(axis=1) / total,
        }


def compute_metrics(
    labels: np.ndarray, chances: np.ndarray, threshold: float
) -> dict[str, float | None]:
    """All metrics of probabilities (N,) against labels (N,), 1 being fake; see `counted_metrics`."""
    found = counted_metrics(labels, chances, threshold, np.ones((1, len(labels))))
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in found.items()}


def bootstrap(
    labels: np.ndarray, chances: np.ndarray, threshold: float, groups: np.ndarray, seed: int = 0
) -> dict[str, Interval]:
    """The 95 % interval of each metric: percentiles over resamplings of whole groups (Efron, 1979)."""
    names, group = np.unique(groups, return_inverse=True)
    rng, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLINGS // 100):
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=100)
        found.append(counted_metrics(labels, chances, threshold, drawn[:, group]))

    def interval(values: np.ndarray) -> Interval:
        values = values[~np.isnan(values)]
        return tuple(np.percentile(values, [2.5, 97.5]).tolist()) if len(values) else (None, None)

    return {name: interval(np.concatenate([part[name] for part in found])) for name in found[0]}


def auc_with_interval(
    labels: np.ndarray, chances: np.ndarray, groups: np.ndarray
) -> dict[str, float | None]:
    """What the tables of this section say of an AUC: itself, and its 95 % interval."""
    low, high = bootstrap(labels, chances, 0.5, groups)["auc_roc"]
    return {
        "auc_roc": compute_metrics(labels, chances, 0.5)["auc_roc"],
        "auc_low": low,
        "auc_high": high,
    }


def metrics_by(
    column: str, table: pd.DataFrame, threshold: float, never_trained_on: Collection[str] = ()
) -> pd.DataFrame:
    """A row for each manipulation, against all real videos; or for each dataset, against its own.

    Args:
        column: "method" or "dataset".
        table: label, method, dataset, group and probability of each video.
        never_trained_on: methods that are marked.
    """
    reals, rows = table[table.label == 0], []
    for name, part in (table[table.label == 1] if column == "method" else table).groupby(column):
        both = pd.concat([reals, part]) if column == "method" else part
        labels, chances = both.label.to_numpy(), both.probability.to_numpy()
        metrics = compute_metrics(labels, chances, threshold)
        row = {
            column: name,
            "reals": int((both.label == 0).sum()),
            "fakes": int((both.label == 1).sum()),
        }
        row |= {"never_trained_on": name in never_trained_on} if column == "method" else {}
        row |= auc_with_interval(labels, chances, both.group.to_numpy())
        rows.append(row | {key: metrics[key] for key in ("eer", "recall", "specificity")})
    return pd.DataFrame(rows)


def metric_name(metric: str) -> str:
    """A metric's name as the literature writes it."""
    return NAMES.get(metric, metric.replace("_", " "))


def in_words(value: float | None, interval: Interval = (None, None)) -> str:
    """A metric as people read it: 0.944 [0.902, 0.975], or undefined."""
    if value is None or np.isnan(value):
        return "undefined"
    return f"{value:.3f}" + ("" if interval[0] is None else " [{:.3f}, {:.3f}]".format(*interval))


# %% [markdown]
# **Robustness.** A video on the internet has been compressed, reduced and filtered on its way. The test clips are
# scored again after each of these, which says how much of the result survives. (It is the face crops in the cache that
# are changed, so a change counts more here than the same one to a whole video.)


# %%
def jpeg(frame: np.ndarray, quality: float) -> np.ndarray:
    _, file = cv2.imencode(
        ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    )
    return cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def reduced(frame: np.ndarray, share: float) -> np.ndarray:
    small = cv2.resize(frame, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, frame.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def blurred(frame: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(frame, (0, 0), sigma)


def noisy(frame: np.ndarray, sigma: float) -> np.ndarray:
    rng = np.random.default_rng(
        int(frame.sum(dtype=np.int64))
    )  # the same each time, another in each frame
    return (frame + rng.normal(0, sigma, frame.shape)).round().clip(0, 255).astype(np.uint8)


def brighter(frame: np.ndarray, factor: float) -> np.ndarray:
    return (frame * factor).round().clip(0, 255).astype(np.uint8)


DEGRADATIONS: dict[
    str, tuple[Callable[[np.ndarray, float], np.ndarray], dict[str, float | None]]
] = {
    "JPEG quality": (
        jpeg,
        {"none": None, "90": 90, "70": 70, "50": 50, "30": 30},
    ),  # None: nothing is changed
    "resolution": (reduced, {"1": None, "1/2": 0.5, "1/4": 0.25}),
    "blur, sigma in pixels": (blurred, {"0": None, "1": 1, "2": 2}),
    "noise, sigma of 255": (noisy, {"0": None, "5": 5, "10": 10}),
    "brightness": (brighter, {"0.5": 0.5, "1": None, "1.5": 1.5}),
}
DEGRADED_PASSES = sum(len(strengths) - 1 for _, strengths in DEGRADATIONS.values())


def measure_robustness(
    model: DeepfakeDetector, table: pd.DataFrame, loader: DataLoader, videos: int
) -> pd.DataFrame:
    """AUCs, with intervals, of tested videos (or an even selection of so many) after each degradation.

    `table` has the logits of the intact clips, which give the first row, as they came from `loader`.
    """
    by_kind = table.sort_values(["label", "method"], kind="stable")
    chosen = by_kind.iloc[
        np.linspace(0, len(by_kind) - 1, min(videos, len(by_kind))).round().astype(int)
    ]
    device, rows = next(model.parameters()).device, []
    dataset: Any = loader.dataset
    changes = [
        (name, change, strength)
        for name, (change, strengths) in DEGRADATIONS.items()
        for strength in strengths.values()
        if strength
    ]
    with tqdm(changes, desc="robustness", leave=False, disable=NO_BARS) as bar:
        for name, change, strength in [("none", None, None), *bar]:
            if change:
                data = ClipDataset(
                    chosen, dataset.workers, partial(change_frames, change, strength)
                )
                again = DataLoader(data, loader.batch_size, pin_memory=loader.pin_memory)
                scored = validate(model, again, nn.BCEWithLogitsLoss(), device, title=name).logits
            else:
                scored = chosen.logit.to_numpy()
            row = {"degradation": name, "strength": strength}
            row |= auc_with_interval(
                chosen.label.to_numpy(), probabilities(scored, 1.0), chosen.group.to_numpy()
            )
            rows.append(row | {"videos": len(chosen)})
    return pd.DataFrame(rows)


def change_frames(
    change: Callable[[np.ndarray, float], np.ndarray], strength: float, clip: np.ndarray
) -> np.ndarray:
    """A clip (T, S, S, 3) uint8 with each frame changed."""
    return np.stack([change(frame, strength) for frame in clip])


# %% [markdown]
# **Explanations.** Three things tell what a verdict rests on: the single frames' scores, how much the clip looks at
# each frame, and where in a frame the signs of a fake are. The last is a heat map in the manner of Grad-CAM (Selvaraju
# et al., 2017): the features that the backbone finds at a place, weighted with how much the clip's logit would rise if
# there were more of them. It shows what the network reacts to, which need not be what was done to the video.
#
# Grad-CAM takes the last convolutional block and one weight for a whole picture. On small pictures that points nowhere:
# ResNet's last block divides 96 pixels into 3 x 3 fields, each of which has seen all of the face. So the last block
# with fields of at most 16 pixels is used, with a weight for each field (LayerCAM, Jiang et al., 2021).


# %%
def heat_maps(model: DeepfakeDetector, clips: torch.Tensor) -> tuple[torch.Tensor, Output]:
    """LayerCAM of normalised clips (B, T, 3, S, S), one clip a video: heat (B, T, S, S), at least 0, and the output.

    The heat is comparable between clips of one model. Raises ValueError if the backbone has no maps of features.
    """
    maps: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        side = output.shape[-1] if isinstance(output, torch.Tensor) and output.ndim == 4 else 0
        if side and side == output.shape[-2] and 16 * side >= clips.shape[-1]:
            maps[:] = [output]

    hooks = [module.register_forward_hook(keep) for module in model.backbone.modules()]
    try:
        # Outside of training, cuDNN's LSTM has no gradient.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            output = model(clips)
            if not maps:
                raise ValueError(
                    "this backbone has no maps of features: there is nothing to draw a heat map from"
                )
            (gradient,) = torch.autograd.grad(output.logit.sum(), maps[0])
    finally:
        for hook in hooks:
            hook.remove()
    heat = (gradient.clamp(min=0) * maps[0]).sum(dim=1, keepdim=True).clamp(min=0).detach()
    heat = nn.functional.interpolate(
        heat.float(), clips.shape[-2:], mode="bilinear", align_corners=False
    )
    return heat.view(-1, *clips.shape[:2], *clips.shape[-2:])[0], Output(
        *(part.detach() for part in output)
    )


# %% [markdown]
# **Figures.** Their titles say what was found.


# %%
@styled
def plot_samples(table: pd.DataFrame, per_clip: int = 5) -> Figure:
    """One clip of each method, up to `per_clip` of its different frames in a row."""
    firsts = table.sort_values(["label", "method", "path"]).groupby("method", sort=False).head(1)
    per_clip = min(per_clip, int(firsts.distinct_frames.max()))
    figure, axes = plt.subplots(
        len(firsts), per_clip, figsize=(WIDTH, 1.15 * len(firsts)), squeeze=False
    )
    for row, sample in zip(axes, firsts.itertuples(), strict=True):
        with np.load(sample.clip_file) as saved:
            frames = saved["frames"]
        show_row(
            row,
            sample.method,
            frames[np.linspace(0, len(frames) - 1, per_clip).round().astype(int)],
        )
    return figure


@styled
def plot_self_blends(table: pd.DataFrame, seed: int, clips: int = 5) -> Figure:
    """A frame of up to `clips` real clips, the mask of a self-blend that training could make of it, and that."""
    reals = ClipDataset(table[table.label == 0].iloc[:clips])
    frames, landmarks, *_ = map(list, zip(*(reals[row] for row in range(len(reals))), strict=True))
    middle = slice(len(frames[0]) // 2, len(frames[0]) // 2 + 1)  # the one frame that is shown
    twice = [
        torch.stack(part)[:, middle].repeat_interleave(2, dim=0) for part in (frames, landmarks)
    ]
    real, draws = to_float(twice[0]), PairDraws(torch.device("cpu"), [seed])
    fake, masks = self_blend(real, twice[1], draws)
    pictures = {
        "real": real[::2, 0].movedim(1, -1),
        "mask": masks[::2, 0],
        "self-blend": fake[::2, 0].movedim(1, -1),
    }
    figure, axes = plt.subplots(3, len(reals), figsize=(WIDTH, 3.5), squeeze=False)
    for row, (name, images) in zip(axes, pictures.items(), strict=True):
        show_row(row, name, images.numpy())
    return figure


@styled
def plot_history(history: pd.DataFrame) -> Figure:
    """Losses and AUCs by epoch, the best epoch marked."""
    best = history.loc[history.best].iloc[-1]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3))
    for ax, quantity, name in zip(axes, ("loss", "auc"), ("loss", "AUC"), strict=True):
        ax.plot(history.epoch, history[f"train_{quantity}"], ".-", color="0.55", label="training")
        ax.plot(
            history.epoch, history[f"val_{quantity}"], ".-", color=FAKE_COLOUR, label="validation"
        )
        ax.axvline(best.epoch, color="0.3", linewidth=0.8, linestyle=":", label="best epoch")
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=10)
    figure.suptitle(
        f"Best validation AUC {best.val_auc:.3f}, in epoch {best.epoch:.0f} of {len(history)}",
        **{"x": 0.02, "ha": "left", "fontsize": 12},
    )
    return figure


@styled
def plot_confusion(labels: np.ndarray, chances: np.ndarray, threshold: float) -> Figure:
    """Counts and shares of what was called what."""
    counts = skm.confusion_matrix(labels, (chances >= threshold).astype(int), labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, ax = plt.subplots(figsize=(4.8, 4))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if shares[row, column] > 0.5 else "black"
        ax.text(
            column,
            row,
            f"{count}\n{shares[row, column]:.0%}",
            ha="center",
            va="center",
            color=shade,
            fontsize=14,
        )
    ax.set(xticks=[0, 1], xticklabels=["real", "fake"], yticks=[0, 1], yticklabels=["real", "fake"])
    ax.set(xlabel=f"called (threshold {threshold:.2f})", ylabel="truth")
    ax.set_title(f"{counts.trace()} of {counts.sum()} videos called right")
    ax.grid(False)
    return figure


@styled
def plot_curves(table: pd.DataFrame, threshold: float, auc: Interval) -> Figure:
    """ROC and precision-recall curves with the threshold marked, of a table with label, method and probability.

    The pale ROC curves are those of single methods against all real videos; `auc` is the interval of the whole.
    """
    labels, chances = table.label.to_numpy(), table.probability.to_numpy()
    metrics: dict[str, Any] = compute_metrics(labels, chances, threshold)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.7))
    if metrics["auc_roc"] is None:
        figure.suptitle(
            "No curves: the test set has one class alone", x=0.02, ha="left", fontsize=12
        )
        return figure
    for method in sorted(table.method[labels == 1].unique()):
        part = table[(labels == 0) | (table.method == method)]
        (single,) = axes[0].plot(
            *skm.roc_curve(part.label, part.probability)[:2], color="0.75", linewidth=1
        )
    single.set_label("single methods")
    axes[0].plot(*skm.roc_curve(labels, chances)[:2], color=FAKE_COLOUR)
    axes[0].plot([0, 1], [0, 1], color="0.5", linestyle=":")
    axes[0].plot(
        1 - metrics["specificity"],
        metrics["recall"],
        "o",
        color="black",
        label=f"threshold {threshold:.2f}",
    )
    axes[0].set(
        xlabel="reals called fake",
        ylabel="fakes found",
        title=f"AUC {in_words(metrics['auc_roc'], auc)}",
    )
    axes[0].legend(loc="lower right", fontsize=10)
    precision, recall, _ = skm.precision_recall_curve(labels, chances)
    axes[1].plot(recall, precision, color=FAKE_COLOUR)
    axes[1].plot(metrics["recall"], metrics["precision"] or 0, "o", color="black")
    axes[1].axhline(labels.mean(), color="0.5", linestyle=":")
    axes[1].set(
        xlabel="fakes found (recall)", ylabel="precision", title=f"AUC-PR {metrics['auc_pr']:.3f}"
    )
    for ax in axes:
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure


@styled
def plot_scores(table: pd.DataFrame, threshold: float) -> Figure:
    """Every probability as a dot, a row a method: where the two classes overlap."""
    methods = ["real", *sorted(table.method[table.label == 1].unique())]
    figure, ax = plt.subplots(figsize=(WIDTH, 1.2 + 0.5 * len(methods)))
    for row, method in enumerate(methods):
        chances = table.probability[
            table.label == 0 if method == "real" else (table.label == 1) & (table.method == method)
        ]
        height = row + np.random.default_rng(0).uniform(-0.25, 0.25, len(chances))
        ax.scatter(
            chances, height, s=18, alpha=0.6, linewidth=0, color=FAKE_COLOUR if row else REAL_COLOUR
        )
    ax.axvline(threshold, color="black", linewidth=1)
    ax.annotate(f" threshold {threshold:.2f}", (threshold, -0.6), va="center", fontsize=10)
    ax.set(
        yticks=range(len(methods)),
        yticklabels=methods,
        xlim=(-0.02, 1.02),
        ylim=(len(methods) - 0.5, -0.8),
    )
    wrong = int(((table.probability >= threshold) != (table.label == 1)).sum())
    ax.set(xlabel="P(fake)", title=f"{wrong} of {len(table)} videos on the wrong side")
    ax.grid(axis="y", visible=False)
    return figure


@styled
def plot_calibration(labels: np.ndarray, chances: np.ndarray) -> Figure:
    """How many of the videos with about the same P(fake) are fake, with 95 % intervals (Wilson's), and how many are."""
    bins = np.minimum((10 * chances).astype(int), 9)
    figure, (ax, below) = plt.subplots(2, 1, figsize=(5, 5.4), height_ratios=[3, 1], sharex=True)
    ax.plot([0, 1], [0, 1], color="0.5", linestyle=":")
    for place in np.unique(bins):
        here, z = labels[bins == place], 1.96
        n, share = len(here), here.mean()
        middle, half = (
            (share + z**2 / 2 / n),
            z * np.sqrt(share * (1 - share) / n + z**2 / 4 / n**2),
        )
        low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
        ax.plot(
            2 * [chances[bins == place].mean()],
            [low, high],
            color=FAKE_COLOUR,
            linewidth=1,
            alpha=0.6,
        )
        ax.plot(chances[bins == place].mean(), share, "o", color=FAKE_COLOUR)
    ax.set(ylabel="share that is fake", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    edges = np.linspace(0, 1, 11)
    both = [chances[labels == 0], chances[labels == 1]]
    below.hist(both, edges, stacked=True, color=[REAL_COLOUR, FAKE_COLOUR], label=["real", "fake"])
    below.set(xlabel="P(fake)", ylabel="videos")
    below.legend(fontsize=10)
    ece: Any = compute_metrics(labels, chances, 0.5)["ece"]
    ax.set_title(f"P(fake) is off by {100 * ece:.0f} points on average (ECE)")
    return figure


@styled
def plot_robustness(table: pd.DataFrame) -> Figure:
    """The AUC after each degradation, by its strength, with that of the intact clips among them."""
    intact, changed = table.iloc[0], table.iloc[1:]
    widths = [len(strengths) for _, strengths in DEGRADATIONS.values()]
    figure, axes = plt.subplots(
        1, len(widths), figsize=(WIDTH, 3.4), sharey=True, width_ratios=widths
    )
    for ax, (name, (_, strengths)) in zip(axes, DEGRADATIONS.items(), strict=True):
        part = changed[changed.degradation == name].set_index("strength")
        rows = [part.loc[strength] if strength else intact for strength in strengths.values()]
        values = pd.DataFrame(rows)[["auc_roc", "auc_low", "auc_high"]].astype(float)
        places = np.arange(len(values))
        ax.fill_between(
            places, values.auc_low, values.auc_high, color=FAKE_COLOUR, alpha=0.15, linewidth=0
        )
        ax.plot(places, values.auc_roc, ".-", color=FAKE_COLOUR)
        ax.axhline(0.5, color="0.5", linestyle=":")
        ax.set_xticks(places, [*strengths], fontsize=10)
        ax.set_xlabel(name.replace(", ", ",\n"), fontsize=10)
    axes[0].set(ylabel="AUC", ylim=(np.nanmin([0.45, *table.auc_low.astype(float)]), 1.01))
    if pd.isna(intact.auc_roc):
        title = "No AUC: the test set has one class alone"
    else:
        worst = changed.loc[changed.auc_roc.astype(float).idxmin()]
        title = f"AUC {intact.auc_roc:.3f} intact; at the worst {worst.auc_roc:.3f}, {worst.degradation.split(',')[0]} "
        title += f"{worst.strength:g}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    return figure


def short_name(path: str | Path, letters: int) -> str:
    """The name of a file, without its middle if it is longer."""
    name = Path(path).name
    return name if len(name) <= letters else f"{name[: letters - 10]}…{name[-9:]}"


def in_short(row: pd.Series) -> str:
    """What a test video is, what it was called, and its name."""
    truth = "real" if row.label == 0 else f"fake ({row.method})" if row.method != "fake" else "fake"
    verdict = "right" if row.correct else "wrong"
    return f"{truth}, P(fake) {row.probability:.2f}: {verdict}. {short_name(row.path, 34)}"


def surest_first(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Videos in the order of how far their probability is from the threshold."""
    return table.sort_values("probability", key=lambda chances: -(chances - threshold).abs())


def pick_examples(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Of right and wrong, real and fake test videos the most confident one each."""
    surest = surest_first(table, threshold).groupby(["correct", "label"]).head(1)
    return surest.sort_values(["correct", "label"], ascending=False)


@styled
def plot_explanations(
    examples: pd.DataFrame, model: DeepfakeDetector, temperature: float, shown: int = 6
) -> Figure:
    """Frames in order, heat maps, and a line of frame scores over bars of attention, for each row of `examples`.

    All heat maps have one scale. Of longer clips, `shown` frames are drawn, and all scores.
    """
    device, clips = next(model.parameters()).device, []
    for file in examples.clip_file:
        with np.load(file) as saved:  # one of the clips of the video
            clips.append(
                torch.from_numpy(saved["frames"])[:: max(1, len(saved["frames"]) // model.frames)]
            )
    found = [heat_maps(model, normalize(to_float(clip[None].to(device)))) for clip in clips]
    hottest = max(float(heat.max()) for heat, _ in found) or 1.0
    frames, rows = len(clips[0]), len(examples)
    shown = min(shown, frames)
    figure: Any = plt.figure(figsize=(WIDTH, 4.3 * rows))
    for part, clip, (heat, output), (_, example) in zip(
        np.atleast_1d(figure.subfigures(rows, 1)), clips, found, examples.iterrows(), strict=True
    ):
        part.suptitle(in_short(example), x=0.02, ha="left", fontsize=12)
        axes = part.subplot_mosaic(
            [
                [f"frame {i}" for i in range(shown)],
                [f"heat {i}" for i in range(shown)],
                ["scores"] * shown,
            ],
            height_ratios=[1, 1, 1.15],
        )
        places = np.linspace(0, frames - 1, shown).round().astype(int)
        for i, t in enumerate(places):
            axes[f"frame {i}"].imshow(clip[t].numpy())
            axes[f"frame {i}"].set_title(f"{t + 1}", fontsize=10, loc="center")
            axes[f"heat {i}"].imshow(clip[t].numpy().mean(axis=-1), cmap="gray", vmin=0, vmax=255)
            map_ = (heat[0, t] / hottest).cpu().numpy()
            axes[f"heat {i}"].imshow(map_, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.6 * map_)
            for ax in (axes[f"frame {i}"], axes[f"heat {i}"]):
                ax.set_axis_off()
        times, scores = (
            np.arange(1, frames + 1),
            probabilities(output.frame_logits[0].cpu().numpy(), temperature),
        )
        attention = output.attention[0].cpu().numpy()
        axes["scores"].bar(
            times, attention / attention.max(), color="0.85", label="attention (of the largest)"
        )
        axes["scores"].plot(times, scores, ".-", color=FAKE_COLOUR, label="P(fake) of the frame")
        axes["scores"].set(xlabel="frame", ylim=(0, 1.05), xlim=(0.4, frames + 0.6))
        axes["scores"].xaxis.get_major_locator().set_params(integer=True)
        axes["scores"].legend(
            fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1
        )
    return figure


@styled
def plot_mistakes(table: pd.DataFrame, threshold: float, most: int = 9) -> Figure:
    """The middle frame of the most confident errors, with what they are and what they were called."""
    wrong = surest_first(table[~table.correct], threshold)
    worst = wrong.head(most)
    columns = 3
    rows = max(1, -(-len(worst) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 0.3 + 2.9 * rows if len(worst) else 1), squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, row in zip(axes.flat, worst.itertuples(), strict=False):
        with np.load(row.clip_file) as saved:
            ax.imshow(saved["frames"][len(saved["frames"]) // 2])
        ax.set_title(
            f"{short_name(row.path, 22)}\n{row.method}, P(fake) {row.probability:.2f}",
            fontsize=10,
            loc="center",
        )
    title = (
        f"{len(wrong)} of {len(table)} videos called wrong"
        if len(wrong)
        else f"No mistake in {len(table)} videos"
    )
    title += f"; the {len(worst)} surest" * (len(wrong) > len(worst))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    return figure


# %% [markdown]
# **Your own videos** go the same way as the training videos did. A `Predictor` is made from the file of a model alone,
# with all settings in it: `Predictor.load("best_model.pth").predict_video("video.mp4")`. In a folder, decoding runs
# ahead in threads while the network scores; a few clips at a time are in memory, however many videos there are.


# %%
@dataclass(frozen=True)
class Prediction:
    """What the detector says of a video. `frame_scores` (T,) are the single frames' P(fake); `face_share` is the share
    of the frames looked at that show the face: without any, the verdict is on the middle of the picture."""

    probability: float
    verdict: str
    frame_scores: np.ndarray
    face_share: float

    @property
    def face_found(self) -> bool:
        return self.face_share > 0


@dataclass(frozen=True)
class Predictor:
    """A detector with everything that it takes to score videos as in training. `model` is in eval mode."""

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
        """Score what `make_clip` has made of a video; it goes to the device of the model."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            output = self.model(normalize(to_float(torch.from_numpy(clip.frames)[None].to(device))))
        chance = float(probabilities(output.logit.cpu().numpy(), self.temperature)[0])
        frame_scores = probabilities(output.frame_logits[0].cpu().numpy(), self.temperature)
        return Prediction(
            chance, "fake" if chance >= self.threshold else "real", frame_scores, clip.face_share
        )

    def predict_video(self, path: Path) -> Prediction:
        """Score one video file. Raises VideoError, with its path and the reason, if it cannot be used."""
        try:
            clip = make_clip(Path(path), self.settings, self.face_detector)
        except VideoError as error:
            raise VideoError(f"{path}: {error}") from error
        return self.predict_clip(clip)

    def clips(self, paths: list[Path], workers: int) -> Iterator[tuple[Path, Clip | str, float]]:
        """Each video with its clip, or with what is wrong with it, and the seconds that took; made ahead in threads."""

        def prepare(path: Path) -> tuple[Path, Clip | str, float]:
            started = time.perf_counter()
            clip: Clip | str
            try:
                clip = make_clip(path, self.settings, self.face_detector)
            except (VideoError, cv2.error) as error:
                clip = str(error)
            return path, clip, time.perf_counter() - started

        waiting, todo = deque[Future](), deque(paths)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while todo or waiting:
                while todo and len(waiting) < 2 * workers:
                    waiting.append(pool.submit(prepare, todo.popleft()))
                yield waiting.popleft().result()

    def predict_folder(
        self, folder: Path, workers: int = 2, file: Path | None = None
    ) -> pd.DataFrame:
        """Score every video below a folder (or one file): a row each, with `error` instead of a score for bad ones.

        The table so far is written to `file` every 20 seconds, so that a run that is cut short loses little.
        """
        paths = videos_below(folder) if folder.is_dir() else [folder]
        columns = ["path", "probability", "verdict", "threshold", "face_share", "seconds", "error"]
        rows, written = [], time.perf_counter()
        with tqdm(total=len(paths), desc="your videos", leave=False, disable=NO_BARS) as bar:
            for path, clip, seconds in self.clips(paths, workers):
                row = dict.fromkeys(columns) | dict(
                    path=str(path), threshold=self.threshold, error=""
                )
                started = time.perf_counter()
                if isinstance(clip, str):
                    row["error"] = clip
                else:
                    found = self.predict_clip(clip)
                    row |= dict(
                        probability=found.probability,
                        verdict=found.verdict,
                        face_share=found.face_share,
                    )
                    row["seconds"] = round(seconds + time.perf_counter() - started, 3)
                rows.append(row)
                bar.update()
                if file and time.perf_counter() - written > 20:
                    save_csv(pd.DataFrame(rows, columns=columns), file)
                    written = time.perf_counter()
        table = pd.DataFrame(rows, columns=columns)
        if file:
            save_csv(table, file)
        return table
