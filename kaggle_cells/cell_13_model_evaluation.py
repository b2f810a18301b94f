# %% [markdown]
# ## 13. The test set, and your own videos
#
# The best model meets recordings that it has not seen in any form. Everything below is computed from the file
# that you would take away, in full precision, with the temperature and threshold stored in it.

# %%
import time
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display

from cell_02_global_config import CONFIG
from cell_03_data_processing import save_csv
from cell_05_model_definition import load_detector
from cell_07_training_functions import progress, validate
from cell_08_evaluation_functions import (
    compute_metrics,
    metrics_by_method,
    plot_confusion,
    plot_curves,
    plot_scores,
    predict_folder,
    probabilities,
    save_figure,
)
from cell_09_data_preparation import CLIP_SETTINGS, FACE_DETECTOR, SPLIT_TABLES
from cell_10_data_loaders import DEVICE, TEST_LOADER
from cell_11_model_setup import CRITERION, NEVER_TRAINED_ON
from cell_12_training_loop import BEST_MODEL

evaluation_started = time.perf_counter()
RESULTS = CONFIG.work_dir / "results"
MODEL_FILE = Path(CONFIG.CHECKPOINT) if CONFIG.EPOCHS == 0 else BEST_MODEL
DETECTOR, MODEL_INFO = load_detector(MODEL_FILE, DEVICE)
TEMPERATURE, THRESHOLD = MODEL_INFO["temperature"], MODEL_INFO["threshold"]

with progress("test", TEST_LOADER) as bar:
    tested = validate(DETECTOR, TEST_LOADER, CRITERION, DEVICE, title="test", bar=bar)
PREDICTIONS = (
    SPLIT_TABLES["test"]
    .drop(columns=["split", "clip_file"])
    .assign(logit=tested.logits, probability=probabilities(tested.logits, TEMPERATURE))
)
PREDICTIONS["verdict"] = np.where(PREDICTIONS.probability >= THRESHOLD, "fake", "real")
PREDICTIONS["frame_scores"] = [
    " ".join(f"{score:.3f}" for score in scores) for scores in probabilities(tested.frame_logits, TEMPERATURE)
]
PREDICTIONS["correct"] = (PREDICTIONS.verdict == "fake") == (PREDICTIONS.label == 1)
labels, chances = PREDICTIONS.label.to_numpy(), PREDICTIONS.probability.to_numpy()
METRICS = {
    "at fitted threshold": compute_metrics(labels, chances, THRESHOLD),
    "at 0.5": compute_metrics(labels, chances, 0.5),
}
BY_METHOD = metrics_by_method(PREDICTIONS, THRESHOLD, NEVER_TRAINED_ON)
save_csv(PREDICTIONS, RESULTS / "test_predictions.csv")
save_csv(BY_METHOD, RESULTS / "metrics_by_method.csv")
EVALUATION_SECONDS = time.perf_counter() - evaluation_started

display(pd.DataFrame(METRICS).round(3), BY_METHOD.round(3))

# %%
save_figure(plot_curves(labels, chances, THRESHOLD), RESULTS / "evaluation" / "roc_pr_curves.png")
save_figure(plot_scores(PREDICTIONS, THRESHOLD), RESULTS / "evaluation" / "score_distribution.png")
save_figure(plot_confusion(labels, chances, THRESHOLD), RESULTS / "evaluation" / "confusion_matrix.png")

# %% [markdown]
# With `PREDICT_DIR`, the model scores your own videos; no labels are needed. Give it the whole shot: a verdict on
# a face that the detector did not find (`face_share` 0) means little.

# %%
if CONFIG.PREDICT_DIR:
    scored = predict_folder(
        Path(CONFIG.PREDICT_DIR), DETECTOR, CLIP_SETTINGS, FACE_DETECTOR, TEMPERATURE, THRESHOLD, CONFIG.NUM_WORKERS
    )
    save_csv(scored, RESULTS / "predictions.csv")
    fine = int((scored.error == "").sum())
    print(f"{fine} of {len(scored)} videos below {CONFIG.PREDICT_DIR} scored, in {RESULTS / 'predictions.csv'}")
    display(scored.head(20))
