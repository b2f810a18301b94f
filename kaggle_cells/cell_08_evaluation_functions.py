# %% [markdown]
# ## 8. Calibration, metrics, figures, prediction
#
# A network's raw score is not a probability, and 0.5 is rarely the best place to decide. Both are put right on
# the **validation** set: one temperature that divides the logits (Guo et al., 2017), and the threshold with the
# best balanced accuracy. The test set is used for nothing but the numbers at the end.

# %%
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sklearn.metrics as skm
import torch
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure
from torch import nn

from cell_01_imports_and_setup import IN_NOTEBOOK
from cell_03_data_processing import Clip, ClipSettings, VideoError, make_clip, replacing, videos_below
from cell_04_dataset_class import ClipDataset, PairDraws, normalize, self_blend, to_float


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """P(fake) of logits, any shape."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64) / temperature, -50, 50)))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature between 0.25 and 16 with the lowest log loss."""
    candidates = np.geomspace(0.25, 16, 241)
    return float(min(candidates, key=lambda t: skm.log_loss(labels, probabilities(logits, t), labels=[0, 1])))


def fit_threshold(chances: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best balanced accuracy, halfway between neighbouring scores; the one nearest 0.5."""
    scores = np.unique(chances)
    candidates = np.append((scores[1:] + scores[:-1]) / 2, 0.5)
    quality = [np.round(skm.balanced_accuracy_score(labels, chances >= t), 9) for t in candidates]
    best = candidates[quality == np.max(quality)]
    return float(best[np.abs(best - 0.5).argmin()])


# %% [markdown]
# **Metrics.** Fake is the positive class. Those that need a threshold use the fitted one; AUC, EER and the two
# losses do not depend on it. What one class alone cannot define is `None`, never a 0 that looks like a result.


# %%
def equal_error_rate(labels: np.ndarray, chances: np.ndarray) -> float:
    """Where the share of reals called fake equals the share of fakes called real, on the interpolated ROC curve."""
    false_alarm, hit, _ = skm.roc_curve(labels, chances)
    gap = false_alarm - (1 - hit)
    after = int(np.argmax(gap >= 0))
    if after == 0:
        return float(false_alarm[0])
    weight = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_alarm[after - 1] + weight * (false_alarm[after] - false_alarm[after - 1]))


def compute_metrics(labels: np.ndarray, chances: np.ndarray, threshold: float) -> dict[str, float | None]:
    """All metrics of probabilities (N,) against labels (N,), 1 being fake."""
    called = (chances >= threshold).astype(int)
    (tn, fp), (fn, tp) = skm.confusion_matrix(labels, called, labels=[0, 1]).tolist()

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    metrics = {
        "accuracy": share(tp + tn, len(labels)),
        "balanced_accuracy": None,
        "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn),
        "specificity": share(tn, tn + fp),
        "f1": share(2 * tp, 2 * tp + fp + fn),
        "auc_roc": None,
        "auc_pr": None,
        "eer": None,
        "log_loss": float(skm.log_loss(labels, chances, labels=[0, 1])),
        "brier": float(np.mean((chances - labels) ** 2)),
    }
    if tp + fn and tn + fp:
        metrics |= {
            "balanced_accuracy": (metrics["recall"] + metrics["specificity"]) / 2,
            "auc_roc": float(skm.roc_auc_score(labels, chances)),
            "auc_pr": float(skm.average_precision_score(labels, chances)),
            "eer": equal_error_rate(labels, chances),
        }
    return metrics


def metrics_by_method(table: pd.DataFrame, threshold: float, holdout: set[str]) -> pd.DataFrame:
    """Each manipulation against all real videos of a table with label, method and probability."""
    reals, rows = table[table.label == 0], []
    for method, fakes in table[table.label == 1].groupby("method"):
        both = pd.concat([reals, fakes])
        metrics = compute_metrics(both.label.to_numpy(), both.probability.to_numpy(), threshold)
        chosen = {name: metrics[name] for name in ("auc_roc", "eer", "recall")}
        rows.append({"method": method, "fakes": len(fakes), "never_trained_on": method in holdout, **chosen})
    return pd.DataFrame(rows)


# %% [markdown]
# **Figures** share one style and two colours that colour-blind readers can tell apart. Their titles say what was
# found.

# %%
REAL_COLOUR, FAKE_COLOUR = "#0072B2", "#D55E00"
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.size": 11,
}


def save_figure(figure: Figure, file: Path, shown: DisplayHandle | None = None) -> DisplayHandle | None:
    """Write a figure, show it in a notebook, and let go of it. Given what it returned, it shows the new one there."""
    with replacing(file) as partial_file:
        figure.savefig(partial_file, dpi=150)
    if IN_NOTEBOOK and shown:
        shown.update(figure)
    elif IN_NOTEBOOK:
        shown = display(figure, display_id=True)
    plt.close(figure)
    return shown


def show_row(axes: np.ndarray, name: str, images: np.ndarray) -> None:
    """Images (N, H, W) in 0..1 or (N, H, W, 3) side by side, with a name before them."""
    for ax, image in zip(axes, images, strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel(name, rotation=0, ha="right", va="center")


@plt.rc_context(STYLE)
def plot_samples(table: pd.DataFrame, per_clip: int = 6) -> Figure:
    """One clip of each method, up to `per_clip` of its different frames in a row."""
    firsts = table.sort_values(["label", "method", "path"]).groupby("method", sort=False).head(1)
    per_clip = min(per_clip, int(firsts.distinct_frames.max()))
    figure, axes = plt.subplots(len(firsts), per_clip, figsize=(1.3 * per_clip, 1.35 * len(firsts)), squeeze=False)
    for row, sample in zip(axes, firsts.itertuples(), strict=True):
        with np.load(sample.clip_file) as saved:
            frames = saved["frames"]
        show_row(row, sample.method, frames[np.linspace(0, len(frames) - 1, per_clip).round().astype(int)])
    return figure


@plt.rc_context(STYLE)
def plot_self_blends(table: pd.DataFrame, seed: int, clips: int = 6) -> Figure:
    """A frame of up to `clips` real clips, the mask of a self-blend that training could make of it, and that."""
    reals = ClipDataset(table[table.label == 0].iloc[:clips])
    frames, landmarks, *_ = map(list, zip(*(reals[row] for row in range(len(reals))), strict=True))
    middle = slice(len(frames[0]) // 2, len(frames[0]) // 2 + 1)  # the one frame that is shown
    frames, landmarks = torch.stack(frames)[:, middle], torch.stack(landmarks)[:, middle]
    real, draws = to_float(frames).repeat_interleave(2, dim=0), PairDraws(torch.device("cpu"), [seed])
    fake, masks = self_blend(real, landmarks.repeat_interleave(2, dim=0), draws)
    pictures = {"real": real[::2, 0].movedim(1, -1), "mask": masks[::2, 0], "self-blend": fake[::2, 0].movedim(1, -1)}
    figure, axes = plt.subplots(3, len(reals), figsize=(1.3 * len(reals) + 0.8, 4.2), squeeze=False)
    for row, (name, images) in zip(axes, pictures.items(), strict=True):
        show_row(row, name, images.numpy())
    return figure


@plt.rc_context(STYLE)
def plot_history(history: pd.DataFrame) -> Figure:
    """Losses and AUCs by epoch, the best epoch marked."""
    best = history.loc[history.best].iloc[-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, quantity, name in zip(axes, ("loss", "auc"), ("loss", "AUC"), strict=True):
        ax.plot(history.epoch, history[f"train_{quantity}"], ".-", color="0.55", label="training")
        ax.plot(history.epoch, history[f"val_{quantity}"], ".-", color=FAKE_COLOUR, label="validation")
        ax.axvline(best.epoch, color="0.3", linewidth=0.8, linestyle=":")
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    figure.suptitle(
        f"Best validation AUC {best.val_auc:.3f}, in epoch {best.epoch:.0f} of {len(history)}", x=0.02, ha="left"
    )
    return figure


@plt.rc_context(STYLE)
def plot_confusion(labels: np.ndarray, chances: np.ndarray, threshold: float) -> Figure:
    """Counts and shares of what was called what."""
    counts = skm.confusion_matrix(labels, (chances >= threshold).astype(int), labels=[0, 1])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, ax = plt.subplots(figsize=(4.8, 4))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if shares[row, column] > 0.5 else "black"
        ax.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=shade, fontsize=14)
    ax.set(xticks=[0, 1], xticklabels=["real", "fake"], yticks=[0, 1], yticklabels=["real", "fake"])
    ax.set(xlabel=f"called (threshold {threshold:.2f})", ylabel="truth")
    ax.set_title(f"{counts.trace()} of {counts.sum()} videos called right")
    ax.grid(False)
    return figure


@plt.rc_context(STYLE)
def plot_curves(labels: np.ndarray, chances: np.ndarray, threshold: float) -> Figure:
    """ROC and precision-recall curves, the decision threshold marked."""
    metrics = compute_metrics(labels, chances, threshold)
    false_alarm, hit, _ = skm.roc_curve(labels, chances)
    precision, recall, _ = skm.precision_recall_curve(labels, chances)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    axes[0].plot(false_alarm, hit, color=FAKE_COLOUR)
    axes[0].plot([0, 1], [0, 1], color="0.6", linestyle=":")
    axes[0].plot(1 - metrics["specificity"], metrics["recall"], "o", color="black", label=f"threshold {threshold:.2f}")
    axes[0].set(
        xlabel="reals called fake",
        ylabel="fakes found",
        title=f"AUC {metrics['auc_roc']:.3f}, EER {metrics['eer']:.1%}",
    )
    axes[0].legend(loc="lower right")
    axes[1].plot(recall, precision, color=FAKE_COLOUR)
    axes[1].axhline(labels.mean(), color="0.6", linestyle=":")
    axes[1].set(xlabel="recall", ylabel="precision", title=f"Average precision {metrics['auc_pr']:.3f}")
    for ax in axes:
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure


@plt.rc_context(STYLE)
def plot_scores(table: pd.DataFrame, threshold: float) -> Figure:
    """Every probability as a dot, a row a method: where the two classes overlap."""
    methods = ["real", *sorted(table.method[table.label == 1].unique())]
    figure, ax = plt.subplots(figsize=(9, 1 + 0.55 * len(methods)))
    for row, method in enumerate(methods):
        chances = table.probability[
            table.label == 0 if method == "real" else (table.label == 1) & (table.method == method)
        ]
        height = row + np.random.default_rng(0).uniform(-0.25, 0.25, len(chances))
        ax.scatter(chances, height, s=18, alpha=0.6, linewidth=0, color=FAKE_COLOUR if row else REAL_COLOUR)
    ax.axvline(threshold, color="black", linewidth=1)
    ax.annotate(f" threshold {threshold:.2f}", (threshold, -0.6), va="center", fontsize=9)
    ax.set(yticks=range(len(methods)), yticklabels=methods, xlim=(-0.02, 1.02), ylim=(len(methods) - 0.5, -0.8))
    wrong = int(((table.probability >= threshold) != (table.label == 1)).sum())
    ax.set(xlabel="P(fake)", title=f"{wrong} of {len(table)} videos on the wrong side")
    ax.grid(axis="y", visible=False)
    return figure


# %% [markdown]
# **Your own videos** go the same way as the training videos did: `predict_video` for one, `predict_folder` for
# many, whose decoding runs ahead in threads while the network scores.


# %%
@dataclass(frozen=True)
class Prediction:
    """What the detector says of a video. `frame_scores` (T,) are the single frames' P(fake)."""

    probability: float
    verdict: str
    frame_scores: np.ndarray
    face_share: float


def score_clip(clip: Clip, model: nn.Module, temperature: float, threshold: float) -> Prediction:
    """The prediction for one clip. `model` is in eval mode; the clip goes to its device."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        output = model(normalize(to_float(torch.from_numpy(clip.frames)[None].to(device))))
    chance = float(probabilities(output.logit.cpu().numpy(), temperature)[0])
    frame_scores = probabilities(output.frame_logits[0].cpu().numpy(), temperature)
    return Prediction(chance, "fake" if chance >= threshold else "real", frame_scores, clip.face_share)


def predict_video(
    path: Path,
    model: nn.Module,
    settings: ClipSettings,
    detector: nn.Module | None,
    temperature: float = 1.0,
    threshold: float = 0.5,
) -> Prediction:
    """Score one video file. Raises VideoError with the reason if it cannot be used."""
    return score_clip(make_clip(Path(path), settings, detector), model, temperature, threshold)


def predict_folder(
    folder: Path,
    model: nn.Module,
    settings: ClipSettings,
    detector: nn.Module | None,
    temperature: float = 1.0,
    threshold: float = 0.5,
    workers: int = 2,
) -> pd.DataFrame:
    """Score every video below a folder (or one file): a row each, with `error` instead of a score for bad ones."""
    paths = deque(videos_below(folder) if folder.is_dir() else [folder])
    waiting: deque[tuple[Path, Future]] = deque()
    rows = []

    def prepare(path: Path) -> tuple[Clip, float]:
        started = time.perf_counter()
        return make_clip(path, settings, detector), time.perf_counter() - started

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while paths or waiting:
            while paths and len(waiting) < 2 * workers:
                waiting.append((path := paths.popleft(), pool.submit(prepare, path)))
            path, job = waiting.popleft()
            row = dict(path=str(path), probability=None, verdict=None, threshold=threshold)
            row |= dict(face_share=None, seconds=None, error="")
            rows.append(row)
            try:
                clip, seconds = job.result()
            except (VideoError, cv2.error) as error:
                row["error"] = str(error)
                continue
            started = time.perf_counter()
            found = score_clip(clip, model, temperature, threshold)
            row |= dict(probability=found.probability, verdict=found.verdict, face_share=found.face_share)
            row["seconds"] = round(seconds + time.perf_counter() - started, 3)
    columns = ["path", "probability", "verdict", "threshold", "face_share", "seconds", "error"]
    return pd.DataFrame(rows, columns=columns)
