# %% [markdown]
# <a id="section-14"></a>
# ## 14. Results to read, and results for programs
#
# `experiment_report.txt` is for reading, `experiment_results.json` for comparing many runs. Both
# name the data, settings and weights that the numbers belong to.

# %%
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

import cell_01_imports_and_setup as cell_01
from cell_02_global_config import CONFIG
from cell_08_evaluation_functions import TOO_FEW, format_metric, verdict_counts
from cell_09_data_preparation import DATA_ORIGIN, LEAKING, PREPARATION_SECONDS, SKIPPED, VIDEOS
from cell_10_data_loaders import BATCH_SIZE_USED, PRECISION
from cell_11_model_setup import HISTORY, TRAINED_ON, WEIGHTS_ORIGIN
from cell_13_model_evaluation import (
    BY_DATASET,
    BY_METHOD,
    EVALUATION_SECONDS,
    FORMATTED_METRICS,
    INTERVALS,
    METRICS,
    MODEL_FILE,
    MODEL_INFO,
    RESULTS,
    ROBUSTNESS_TABLE,
    SCORE_TABLE,
    SCORED,
    TEMPERATURE,
    THRESHOLD,
    VERDICT_TABLE,
)


# %%
def json_rows(table: pd.DataFrame) -> list[dict]:
    """The rows of a table, with None for NaN, which JSON does not know."""
    return table.astype(object).where(table.notna(), None).to_dict(orient="records")


counts = VIDEOS.groupby(["split", "label"]).size()
repeats = VIDEOS.distinct_frames.between(2, CONFIG.FRAMES_PER_VIDEO - 1)  # a picture has one frame
predictions = {"videos": len(SCORED), "errors": int(SCORED.verdict.isna().sum())}
results: dict[str, Any] = {
    "format": 2,  # counts changes of the keys
    "config": dataclasses.asdict(CONFIG),
    "environment": dataclasses.asdict(cell_01.ENVIRONMENT),
    "data": {
        "origin": DATA_ORIGIN,
        "datasets": VIDEOS.dataset.value_counts().to_dict(),
        "groups": VIDEOS.group.nunique(),
        "groups_in_several_splits": LEAKING,
        "videos": {
            split: {"real": int(counts.get((split, 0), 0)), "fake": int(counts.get((split, 1), 0))}
            for split in ("train", "val", "test")
        },
        "methods": VIDEOS.method[VIDEOS.label == 1].value_counts().to_dict(),
        "without_face": int((VIDEOS.face_share == 0).sum()) if CONFIG.FACE_CROP else None,
        "with_repeated_frames": int(repeats.sum()),
        "skipped": [{"path": str(row.path), "reason": row.reason} for row in SKIPPED.itertuples()],
    },
    "model": {
        "file": str(MODEL_FILE),
        "initial_weights": WEIGHTS_ORIGIN,
        "trained_on": sorted(TRAINED_ON),
        "epoch": MODEL_INFO["epoch"],
        "validation_auc": MODEL_INFO["val_auc"],
        "temperature": TEMPERATURE,
        "threshold": THRESHOLD,
    },
    "training": {
        "epochs": len(HISTORY),
        "skipped_steps": sum(epoch["skipped_steps"] for epoch in HISTORY),
        "batch_size": BATCH_SIZE_USED,
        "precision": str(PRECISION or "torch.float32").removeprefix("torch."),
    },
    "seconds": {
        "preparation": PREPARATION_SECONDS,
        "training": sum(epoch["seconds"] for epoch in HISTORY),
        "evaluation": EVALUATION_SECONDS,
        "this_session": time.time() - cell_01.STARTED,
    },
    "metrics": METRICS,
    "intervals": INTERVALS,
    "metrics_by_method": json_rows(BY_METHOD),
    "metrics_by_dataset": json_rows(BY_DATASET),
    "robustness": json_rows(ROBUSTNESS_TABLE),
    "predictions": predictions if len(SCORED) else None,
}
with cell_01.replacing(RESULTS / "experiment_results.json") as partial_file:
    partial_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
print("results/experiment_results.json has", ", ".join(results))

# %% [markdown]
# The report says how far its own numbers can be trusted:


# %%
SPLIT_SIZES = results["data"]["videos"]
TESTED_VIDEOS = f"{cell_01.plural(SPLIT_SIZES['test']['real'], 'real video')} and "
TESTED_VIDEOS += cell_01.plural(SPLIT_SIZES["test"]["fake"], "fake")


def caveats() -> Iterator[str]:
    if METRICS and min(SPLIT_SIZES["test"].values()) < 10:
        yield f"The test is tiny ({TESTED_VIDEOS}): its numbers and their intervals say little."
    if (auc := MODEL_INFO["val_auc"]) < 0.65:
        yield f"The model is hardly better than chance: validation AUC {auc:.3f}."
    yield "Numbers from one dataset say little about manipulations and cameras it does not contain."
    yield "P(fake) assumes that real and fake videos are equally frequent."
    if WEIGHTS_ORIGIN.startswith("random"):
        yield "The backbone did not start from ImageNet weights, which would have helped much."
    if HISTORY and not SPLIT_SIZES["val"]["fake"]:
        yield "Without fakes in validation, epoch and threshold were chosen on self-blends."
    if LEAKING:
        yield f"Leakage: {len(LEAKING)} groups are in several splits, which makes the test easier."
    if faceless := results["data"]["without_face"]:
        yield f"In {faceless} videos no face was found; the network saw the middle of their frames."
    if SCORED.verdict.eq("no face to judge").any():
        yield "In some of your own videos there is no face to judge: report.html says why."


# %%
def setup_text() -> str:
    """Data, method and training, as the report says it."""
    methods = ", ".join(sorted(TRAINED_ON)) or "real videos alone"
    trained = f"{cell_01.plural(len(HISTORY), 'epoch')}; it has seen {methods}"
    groups = cell_01.plural(VIDEOS.group.nunique(), "group")
    times = {name: cell_01.duration(seconds) for name, seconds in results["seconds"].items()}
    return f"""\
Data
  {DATA_ORIGIN}: {cell_01.plural(len(VIDEOS), "video")}, {groups}
  {len(SKIPPED)} skipped; of each split:
{pd.DataFrame(SPLIT_SIZES).T.to_string()}

Method
  clips      {CONFIG.CLIPS_PER_VIDEO} x {CONFIG.FRAMES_PER_VIDEO} frames per video
  crop       {CONFIG.IMAGE_SIZE} pixels of the {"face" if CONFIG.FACE_CROP else "frame's middle"}
  model      {CONFIG.BACKBONE}{", BiLSTM, attention" if CONFIG.LSTM_LAYERS else ", frame by frame"}
             initial weights: {WEIGHTS_ORIGIN}
  training   {trained if HISTORY else "in another run, perhaps on some of these recordings"}
             best epoch {MODEL_INFO["epoch"]}, validation AUC {MODEL_INFO["val_auc"]:.3f}
  decision   temperature {TEMPERATURE:.2f}, threshold {THRESHOLD:.3f}, fitted on validation
  time       preparation {times["preparation"]}, training {times["training"]}
             evaluation {times["evaluation"]}
  machine    {", ".join(cell_01.ENVIRONMENT.gpus) or "the CPU"}
"""


def metrics_text() -> str:
    """The metrics of the test set, those that depend on the threshold at both thresholds."""
    new = HISTORY and not (LEAKING or CONFIG.CHECKPOINT or CONFIG.INITIAL_MODEL)
    text = f"Result: test set of {TESTED_VIDEOS}{', recordings never trained on' if new else ''}\n"
    text += "  Fake is the positive class; in brackets 95 % intervals, from resampled groups.\n\n"
    text += f"{SCORE_TABLE.to_string(header=False)}\n\n{VERDICT_TABLE.to_string()}\n"
    for kind, number in SPLIT_SIZES["test"].items():
        if not number:
            text += f"  metrics that need {kind} videos are undefined: the test set has none\n"
    return text


# %%
def format_auc(row: Any) -> str:
    return format_metric(row.auc_roc, (row.auc_low, row.auc_high))


def auc_text(title: str, table: pd.DataFrame) -> str:
    """What a table of AUCs is about, then each AUC with its interval."""
    columns = ["method", "dataset", "degradation", "strength", "videos", "reals", "fakes"]
    aucs = [format_auc(row) for row in table.itertuples()]
    shown = table.filter([*columns, "never_trained_on"]).assign(AUC=aucs)
    return f"{title}\n{shown.to_string(index=False, na_rep='')}\n"


def use_text() -> str:
    """Your own videos, caveats, and how to use the model."""
    text = f"Your own videos, below {CONFIG.PREDICT_DIR}\n" if len(SCORED) else ""
    text += f"  {verdict_counts(SCORED)}; see report.html\n\n" if len(SCORED) else ""
    lines = "".join(f"  {caveat}\n" for caveat in caveats())
    return f"""{text}Caveats
{lines}
To use the model
  set CHECKPOINT={MODEL_FILE}, EPOCHS=0, and PREDICT_DIR to your videos;
  or in Python, with kaggle_cells/ in sys.path:
  from cell_08_evaluation_functions import Predictor
  Predictor.load("{MODEL_FILE}").judge("video.mp4")
"""


AUC_TABLES = {
    "By manipulation, against all real videos": BY_METHOD,
    "By dataset": BY_DATASET,
    "Robustness: after a change to the face crops": ROBUSTNESS_TABLE,
}
sections = ["VIDEO DEEPFAKE DETECTION: EXPERIMENT REPORT\n", setup_text()]
sections += [metrics_text()] if METRICS else []
sections += [auc_text(title, table) for title, table in AUC_TABLES.items() if len(table)]
report = "\n".join([*sections, use_text()])
with cell_01.replacing(RESULTS / "experiment_report.txt") as partial_file:
    partial_file.write_text(report, encoding="utf-8")
print(report)

# %% [markdown]
# What was achieved, what to try next, and where everything is:


# %%
def hardest(table: pd.DataFrame) -> Any:
    """The row with the lowest AUC, if any; manipulations with too few fakes do not count."""
    known = table.dropna(subset=["auc_roc"]) if len(table) else table
    known = known[known.fakes >= TOO_FEW] if "fakes" in known else known
    return known.loc[known.auc_roc.astype(float).idxmin()] if len(known) else None


def achievements() -> Iterator[str]:
    if METRICS:
        fitted = FORMATTED_METRICS["at_fitted_threshold"]
        yield f"**Test AUC {fitted['auc_roc']}**, accuracy {fitted['accuracy']}; {TESTED_VIDEOS}."
    if (row := hardest(BY_METHOD)) is not None:
        yield f"Hardest to tell from real: `{row.method}`, AUC {format_auc(row)}."
    if (row := hardest(ROBUSTNESS_TABLE[1:])) is not None:
        yield f"Hardest condition: {row.degradation} {row.strength:g}, AUC {format_auc(row)}."


def ideas() -> Iterator[str]:
    if len(ROBUSTNESS_TABLE) and CONFIG.AUGMENTATION != "robust":
        yield '`AUGMENTATION = "robust"`, if your videos look like the hardest condition'
    if not len(SCORED):
        yield '`show_video("my_video.mp4")` in a new cell, or `PREDICT_DIR`, for your own videos'
    if DATA_ORIGIN.startswith("demo"):
        yield "a real dataset: the demo set shows that everything works, not how well"
    if WEIGHTS_ORIGIN.startswith("random"):
        file = f"{CONFIG.BACKBONE}.pth"
        yield f"ImageNet weights: `PRETRAINED = True`, and internet on or a dataset with `{file}`"
    if HISTORY and MODEL_INFO["epoch"] > 0.9 * CONFIG.EPOCHS:
        yield f"more than {CONFIG.EPOCHS} `EPOCHS`: the best one was among the last"
    if HISTORY and len(TRAINED_ON) > 1 and not CONFIG.HOLDOUT_METHODS:
        yield f"`HOLDOUT_METHODS = {sorted(TRAINED_ON)[:1]}`, to test on fakes of an unseen kind"
    if HISTORY and 0 < CONFIG.MAX_VIDEOS_PER_CLASS < 1000:
        yield f"more than {CONFIG.MAX_VIDEOS_PER_CLASS} videos per class, and another `SEED`"


summary = "\n".join(f"- {line}" for line in achievements())
if next_steps := "\n".join(f"- {idea}" for idea in ideas()):
    summary += f"\n\nTo try next:\n\n{next_steps}"
display(Markdown(summary)) if cell_01.IN_NOTEBOOK else print(summary)

# %%
WHAT_FILES_ARE = {
    "models/best_model.pth": "the detector: this is the one to keep",
    "models/last_checkpoint.pth": "to resume training",
    "results/experiment_report.txt": "the report above",
    "results/experiment_results.json": "the same and more, for programs",
    "results/test_predictions.csv": "each test video with its score",
    "results/report.html": "your own videos: verdicts, timelines, faces",
    "results/predictions.csv": "the same as a table; windows.csv has every window",
    "results/training_history.csv": "one row per epoch",
    "results/evaluation/": "all figures of the test",
    "data/": "which video was used for what, and which was skipped, and why",
}
files = {}
for name, meaning in WHAT_FILES_ARE.items():
    parts = [CONFIG.work_dir / name, *(CONFIG.work_dir / name).rglob("*")]
    if parts[0].exists():
        size = sum(part.stat().st_size for part in parts if part.is_file())
        files[name] = {"size": cell_01.file_size(size), "": meaning}
with pd.option_context("display.max_colwidth", None, "display.width", 120):
    display(pd.DataFrame([*files.values()], index=[*files]))
print("Everything is below", CONFIG.work_dir.resolve())
