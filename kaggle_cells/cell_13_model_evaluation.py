# %% [markdown]
# <a id="section-13"></a>
# ## 13. The test set, and your own videos
#
# The best model meets recordings that it has not seen in any form. Everything below is computed from the file
# that you would take away, in full precision, with the calibration and threshold stored in it.

# %%
import time
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display

from cell_01_imports_and_setup import duration, save_csv, save_figure
from cell_02_global_config import CONFIG
from cell_05_model_definition import load_detector
from cell_07_training_functions import progress, validate
from cell_08_evaluation_functions import (
    DECISIONS,
    Predictor,
    bootstrap,
    compute_metrics,
    format_metric,
    measure_robustness,
    metric_name,
    metrics_by,
    pick_examples,
    plot_calibration,
    plot_confusion,
    plot_curves,
    plot_explanations,
    plot_mistakes,
    plot_robustness,
    plot_scores,
    probabilities,
)
from cell_09_data_preparation import CLIP_SETTINGS, FACE_DETECTOR, SPLIT_TABLES
from cell_10_data_loaders import DEVICE, TEST_LOADER
from cell_11_model_setup import CRITERION, TRAINED_ON
from cell_12_training_loop import BEST_MODEL

evaluation_started = time.perf_counter()
RESULTS = CONFIG.work_dir / "results"
FIGURES = RESULTS / "evaluation"
MODEL_FILE = Path(CONFIG.CHECKPOINT) if CONFIG.EPOCHS == 0 else BEST_MODEL
DETECTOR, MODEL_INFO = load_detector(MODEL_FILE, DEVICE)
TEMPERATURE, THRESHOLD = MODEL_INFO["temperature"], MODEL_INFO["threshold"]
PREDICTIONS = SPLIT_TABLES["test"].drop(columns="split")
METRICS, INTERVALS, IN_WORDS = {}, {}, {}  # by threshold
BY_METHOD, BY_DATASET, ROBUSTNESS_TABLE = 3 * [pd.DataFrame()]

if len(PREDICTIONS):
    with progress("test", TEST_LOADER) as bar:
        tested = validate(DETECTOR, TEST_LOADER, CRITERION, DEVICE, title="test", bar=bar)
    PREDICTIONS["logit"] = tested.logits
    PREDICTIONS["probability"] = probabilities(tested.logits, TEMPERATURE)
    PREDICTIONS["verdict"] = np.where(PREDICTIONS.probability >= THRESHOLD, "fake", "real")
    PREDICTIONS["frame_scores"] = [
        " ".join(f"{score:.3f}" for score in scores)
        for scores in probabilities(tested.frame_logits, TEMPERATURE)
    ]
    PREDICTIONS["correct"] = (PREDICTIONS.verdict == "fake") == (PREDICTIONS.label == 1)
    save_csv(PREDICTIONS.drop(columns="clip_file"), RESULTS / "test_predictions.csv")

    labels, chances = PREDICTIONS.label.to_numpy(), PREDICTIONS.probability.to_numpy()
    for name, threshold in {"at_fitted_threshold": THRESHOLD, "at_0.5": 0.5}.items():
        METRICS[name] = compute_metrics(labels, chances, threshold)
        INTERVALS[name] = bootstrap(labels, chances, threshold, PREDICTIONS.group.to_numpy())
        IN_WORDS[name] = {
            m: format_metric(value, INTERVALS[name][m]) for m, value in METRICS[name].items()
        }
    fitted, plain = IN_WORDS.values()
    both = pd.DataFrame(
        {f"threshold {THRESHOLD:.3f}": pd.Series(fitted), "threshold 0.5": pd.Series(plain)}
    )
    undecided = (
        both.iloc[:, :1].drop(index=[*DECISIONS]).set_axis(["test set [95 % interval]"], axis=1)
    )
    display(undecided.rename(index=metric_name), both.loc[[*DECISIONS]].rename(index=metric_name))

# %% [markdown]
# Each manipulation against all real videos of the test set, and each dataset by itself if there are several:

# %%
if len(PREDICTIONS):
    unseen = {*PREDICTIONS.method} - TRAINED_ON
    BY_METHOD = metrics_by("method", PREDICTIONS, THRESHOLD, unseen)
    save_csv(BY_METHOD, RESULTS / "metrics_by_method.csv")
    display(BY_METHOD.round(3))
    if PREDICTIONS.dataset.nunique() > 1:
        BY_DATASET = metrics_by("dataset", PREDICTIONS, THRESHOLD)
        save_csv(BY_DATASET, RESULTS / "metrics_by_dataset.csv")
        display(BY_DATASET.round(3))

# %%
if len(PREDICTIONS):
    auc_interval = INTERVALS["at_fitted_threshold"]["auc_roc"]
    save_figure(plot_curves(PREDICTIONS, THRESHOLD, auc_interval), FIGURES / "roc_pr_curves.png")
    save_figure(plot_scores(PREDICTIONS, THRESHOLD), FIGURES / "score_distribution.png")
    save_figure(plot_confusion(labels, chances, THRESHOLD), FIGURES / "confusion_matrix.png")
    save_figure(plot_calibration(labels, chances), FIGURES / "calibration.png")

# %% [markdown]
# How much of this survives what happens to videos on their way through the internet?

# %%
if len(PREDICTIONS) and CONFIG.ROBUSTNESS:
    ROBUSTNESS_TABLE = measure_robustness(DETECTOR, PREDICTIONS, TEST_LOADER, CONFIG.ROBUSTNESS)
    save_figure(plot_robustness(ROBUSTNESS_TABLE), FIGURES / "robustness.png")

# %% [markdown]
# What do verdicts rest on? The most confident right and wrong ones, for real and fake videos: frames in order, signs
# of a fake in them, and each frame's own score over how much attention it got. Then the surest of all mistakes.

# %%
if len(PREDICTIONS):
    examples = pick_examples(PREDICTIONS, THRESHOLD)
    save_figure(plot_explanations(examples, DETECTOR, TEMPERATURE), FIGURES / "explanations.png")
    save_figure(plot_mistakes(PREDICTIONS, THRESHOLD), FIGURES / "mistakes.png")
EVALUATION_SECONDS = time.perf_counter() - evaluation_started

# %% [markdown]
# **Your own videos.** `predict_video("my_video.mp4")` scores one, right here. With `PREDICT_DIR`, all videos below a
# folder are scored; no labels are needed. A verdict on a face that was not found (`face_share` 0) means little, as does
# any on videos that are unlike those in training.

# %%
PREDICTOR = Predictor(DETECTOR, CLIP_SETTINGS, FACE_DETECTOR, TEMPERATURE, THRESHOLD)
predict_video = PREDICTOR.predict_video
SCORED = pd.DataFrame()
if CONFIG.PREDICT_DIR:
    prediction_started = time.perf_counter()
    SCORED = PREDICTOR.predict_folder(
        Path(CONFIG.PREDICT_DIR), CONFIG.NUM_WORKERS, RESULTS / "predictions.csv"
    )
    seconds = time.perf_counter() - prediction_started
    verdicts, unread, faceless = (
        SCORED.verdict.value_counts(),
        (SCORED.error != "").sum(),
        SCORED.face_share.eq(0).sum(),
    )
    print(
        f"{len(SCORED)} videos below {CONFIG.PREDICT_DIR} in {duration(seconds)}: {verdicts.get('fake', 0)} called "
        f"fake, {verdicts.get('real', 0)} real"
        + (f"; {unread} could not be read" if unread else "")
        + (f"; in {faceless} no face was found" if faceless else "")
        + f". All are in {RESULTS / 'predictions.csv'}"
    )
    display(SCORED.sort_values("probability", ascending=False).head(20))
