# %% [markdown]
# <a id="section-13"></a>
# ## 13. The test set, and your own videos
#
# The best model now meets recordings that it has not seen in any form. Everything below is computed
# from the model file that you would take away, in full precision, with the calibration and the
# threshold stored in it.

# %%
import time
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display

import cell_08_evaluation_functions as cell_08
from cell_01_imports_and_setup import duration, plural, progress_bar, save_csv, show_figure
from cell_02_global_config import CONFIG
from cell_03_data_processing import media_below
from cell_07_training_functions import validate
from cell_09_data_preparation import SPLIT_TABLES
from cell_10_data_loaders import DEVICE, TEST_LOADER
from cell_11_model_setup import CRITERION, TRAINED_ON
from cell_12_training_loop import BEST_MODEL

evaluation_started = time.perf_counter()
RESULTS = CONFIG.work_dir / "results"
FIGURES = RESULTS / "evaluation"
MODEL_FILE = Path(CONFIG.CHECKPOINT) if CONFIG.EPOCHS == 0 else BEST_MODEL
PREDICTOR = cell_08.Predictor.load(MODEL_FILE, DEVICE)
DETECTOR, TEMPERATURE, THRESHOLD = PREDICTOR.model, PREDICTOR.temperature, PREDICTOR.threshold
MODEL_INFO = PREDICTOR.info
PREDICTIONS = SPLIT_TABLES["test"].drop(columns="split")
METRICS, INTERVALS, FORMATTED_METRICS = {}, {}, {}  # by threshold
SCORE_TABLE, VERDICT_TABLE, BY_METHOD, BY_DATASET, ROBUSTNESS_TABLE = 5 * [pd.DataFrame()]

# %%
if len(PREDICTIONS):
    with progress_bar(title="test", total=len(TEST_LOADER), unit="batch") as bar:
        test_scores = validate(DETECTOR, TEST_LOADER, CRITERION, DEVICE, title="test", bar=bar)
    PREDICTIONS["logit"] = test_scores.logits
    PREDICTIONS["probability"] = cell_08.probabilities(test_scores.logits, TEMPERATURE)
    PREDICTIONS["verdict"] = np.where(PREDICTIONS.probability >= THRESHOLD, "fake", "real")
    frame_probs = cell_08.probabilities(test_scores.frame_logits, TEMPERATURE)
    PREDICTIONS["frame_scores"] = [
        " ".join(f"{prob:.3f}" for prob in row if prob == prob) for row in frame_probs
    ]
    PREDICTIONS["correct"] = (PREDICTIONS.verdict == "fake") == (PREDICTIONS.label == 1)
    save_csv(PREDICTIONS.drop(columns="clip_file"), RESULTS / "test_predictions.csv")
    display(PREDICTIONS[["method", "group", "probability", "verdict", "correct"]].head())

# %% [markdown]
# All metrics, with 95 % intervals. Only some of them depend on the threshold.

# %%
if len(PREDICTIONS):
    test_labels, test_probs = PREDICTIONS.label.to_numpy(), PREDICTIONS.probability.to_numpy()
    test_groups = PREDICTIONS.group.to_numpy()
    for name, threshold in {"at_fitted_threshold": THRESHOLD, "at_0.5": 0.5}.items():
        METRICS[name] = cell_08.compute_metrics(test_labels, test_probs, threshold)
        INTERVALS[name] = cell_08.bootstrap(test_labels, test_probs, threshold, test_groups)
        FORMATTED_METRICS[name] = cell_08.format_metrics(METRICS[name], INTERVALS[name])
    formatted = pd.DataFrame(FORMATTED_METRICS).set_axis([f"at {THRESHOLD:.3f}", "at 0.5"], axis=1)
    of_verdicts = formatted.index.isin([*cell_08.VERDICT_METRICS])
    formatted = formatted.rename(index=cell_08.metric_name)
    SCORE_TABLE, VERDICT_TABLE = formatted[~of_verdicts].iloc[:, :1], formatted[of_verdicts]
    display(SCORE_TABLE.set_axis(["test set"], axis=1), VERDICT_TABLE)

# %% [markdown]
# Each manipulation against all real videos of the test set, and each dataset by itself if there are
# several:

# %%
if len(PREDICTIONS):
    never_trained_on = {*PREDICTIONS.method} - TRAINED_ON
    BY_METHOD = cell_08.metrics_by("method", PREDICTIONS, THRESHOLD, never_trained_on)
    save_csv(BY_METHOD, RESULTS / "metrics_by_method.csv")
    display(BY_METHOD.round(3))
    if PREDICTIONS.dataset.nunique() > 1:
        BY_DATASET = cell_08.metrics_by("dataset", PREDICTIONS, THRESHOLD)
        save_csv(BY_DATASET, RESULTS / "metrics_by_dataset.csv")
        display(BY_DATASET.round(3))

# %%
if len(PREDICTIONS):
    scores = cell_08.plot_scores(PREDICTIONS, BY_METHOD, THRESHOLD)
    show_figure(scores, FIGURES / "score_distribution.png")
    auc_interval = INTERVALS["at_fitted_threshold"]["auc_roc"]
    ranking = cell_08.plot_curves(PREDICTIONS, THRESHOLD, auc_interval)
    show_figure(ranking, FIGURES / "roc_pr_curves.png")

# %% [markdown]
# What the verdicts got right, and whether P(fake) is calibrated:

# %%
if len(PREDICTIONS):
    confusion = cell_08.plot_confusion(test_labels, test_probs, THRESHOLD)
    show_figure(confusion, FIGURES / "confusion_matrix.png")
    show_figure(cell_08.plot_calibration(test_labels, test_probs), FIGURES / "calibration.png")

# %% [markdown]
# How much of this survives what happens to videos on the internet?

# %%
if len(PREDICTIONS) and CONFIG.ROBUSTNESS:
    ROBUSTNESS_TABLE = cell_08.measure_robustness(
        DETECTOR, PREDICTIONS, TEST_LOADER, CONFIG.ROBUSTNESS
    )
    show_figure(cell_08.plot_robustness(ROBUSTNESS_TABLE), FIGURES / "robustness.png")

# %% [markdown]
# What do the verdicts rest on? The most confident right and wrong ones: frames in order, where the
# network sees signs of a fake, and each frame's score and attention. Then the worst mistakes.

# %%
if len(PREDICTIONS):
    examples = cell_08.pick_examples(PREDICTIONS, THRESHOLD)
    explanations = cell_08.plot_explanations(examples, DETECTOR, TEMPERATURE)
    show_figure(explanations, FIGURES / "explanations.png")
    show_figure(cell_08.plot_mistakes(PREDICTIONS, THRESHOLD), FIGURES / "mistakes.png")
EVALUATION_SECONDS = time.perf_counter() - evaluation_started

# %% [markdown]
# **Your own videos.** `show_video("my_video.mp4")` judges all of one, every face, and shows what it
# found, right here. `PREDICT_DIR` does so with all videos below a folder; no labels are needed.
# Verdicts mean little on videos that are unlike the training videos.

# %%
predict_video, show_video = PREDICTOR.predict_video, PREDICTOR.show
SCORED = pd.DataFrame(columns=["verdict", "error"])
if CONFIG.PREDICT_DIR:
    prediction_started, found = time.perf_counter(), media_below(Path(CONFIG.PREDICT_DIR))
    SCORED = cell_08.judge_videos(PREDICTOR, found, RESULTS)
    seconds = time.perf_counter() - prediction_started
    print(f"{plural(len(SCORED), 'video')} below {CONFIG.PREDICT_DIR} in {duration(seconds)}:")
    print(cell_08.verdict_counts(SCORED))
    print(f"All are in {RESULTS / 'report.html'}, predictions.csv and windows.csv")
    display(SCORED.sort_values("probability", ascending=False).head(20))
