# %% [markdown]
# <a id="section-14"></a>
# ## 14. Results for people and for programs
#
# `experiment_report.txt` is for reading, `experiment_results.json` for comparing many runs; both say which data,
# settings and weights the numbers belong to.

# %%
import dataclasses
import json
import time
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

from cell_01_imports_and_setup import (
    ENVIRONMENT,
    IN_NOTEBOOK,
    STARTED,
    duration,
    file_size,
    replacing,
)
from cell_02_global_config import CONFIG
from cell_08_evaluation_functions import VERDICT_METRICS, format_metric, metric_name
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
    SCORED,
    TEMPERATURE,
    THRESHOLD,
)


def records(table: pd.DataFrame) -> list[dict]:
    """The rows of a table for JSON, which knows null but no NaN."""
    return table.astype(object).where(table.notna(), None).to_dict(orient="records")


counts = VIDEOS.groupby(["split", "label"]).size()
results: dict[str, Any] = {
    "format": 2,
    "config": dataclasses.asdict(CONFIG),
    "environment": dataclasses.asdict(ENVIRONMENT),
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
        "with_repeated_frames": int((VIDEOS.distinct_frames < CONFIG.FRAMES_PER_VIDEO).sum()),
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
        "this_session": time.time() - STARTED,
    },
    "metrics": METRICS,
    "intervals": INTERVALS,
    "metrics_by_method": records(BY_METHOD),
    "metrics_by_dataset": records(BY_DATASET),
    "robustness": records(ROBUSTNESS_TABLE),
    "predictions": {"videos": len(SCORED), "errors": int((SCORED.error != "").sum())}
    if len(SCORED)
    else None,
}
with replacing(RESULTS / "experiment_results.json") as partial_file:
    partial_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")

# %% [markdown]
# The report:


# %%
def count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def with_interval(row: dict) -> str:
    return format_metric(row["auc_roc"], (row["auc_low"], row["auc_high"]))


def lowest(rows: list[dict]) -> list[dict]:
    """The row with the lowest AUC, if there is one."""
    return sorted(
        (row for row in rows if row["auc_roc"] is not None), key=lambda row: row["auc_roc"]
    )[:1]


sizes = results["data"]["videos"]
tested_videos = (
    f"{count(sizes['test']['real'], 'real video')} and {count(sizes['test']['fake'], 'fake')}"
)
trained = "in another run, perhaps on some of these recordings"
if HISTORY:
    trained = f"{count(len(HISTORY), 'epoch')} with {', '.join(sorted(TRAINED_ON)) or 'real videos alone'}"
notes = [
    "Numbers within one dataset say little about manipulations and cameras that it does not contain.",
    "P(fake) is meant for real and fake videos that are equally frequent.",
]
if WEIGHTS_ORIGIN.startswith("random"):
    notes.append(
        "The backbone did not start from ImageNet's weights, with which it would have learned far more."
    )
if HISTORY and not sizes["val"]["fake"]:
    notes.append(
        "Validation has no fakes: epoch, calibration and threshold were chosen on self-blends."
    )
at_chance = f"The model is hardly better than chance: validation AUC {MODEL_INFO['val_auc']:.3f}."
if MODEL_INFO["val_auc"] < 0.65:
    notes.insert(0, at_chance)
if METRICS and min(sizes["test"].values()) < 10:
    notes.insert(
        0, f"The test is tiny, {tested_videos}: neither its numbers nor their intervals say much."
    )
if LEAKING:
    notes.append(
        f"Leakage: {len(LEAKING)} groups are in several of the given splits: the test is easier than it looks"
    )
if CONFIG.FACE_CROP and (faceless := results["data"]["without_face"]):
    notes.append(
        f"In {faceless} videos no face was found; the network saw the middle of their frames."
    )
if SCORED.get("face_share", pd.Series(dtype=float)).eq(0).any():
    notes.append("In some of your own videos no face was found: their verdicts mean little.")
report = [
    "VIDEO DEEPFAKE DETECTION: EXPERIMENT REPORT",
    "",
    "Data",
    f"  {DATA_ORIGIN}: {count(len(VIDEOS), 'video')}, {count(VIDEOS.group.nunique(), 'group')}; {len(SKIPPED)} skipped",
    *(
        f"  {split:10} {n['real']:5} real, {n['fake']:5} fake"
        for split, n in sizes.items()
        if any(n.values())
    ),
    "",
    "Method",
    f"  clips      {CONFIG.CLIPS_PER_VIDEO} x {CONFIG.FRAMES_PER_VIDEO} frames a video, {CONFIG.IMAGE_SIZE} pixels, "
    + ("of the face" if CONFIG.FACE_CROP else "of the middle of the frame"),
    f"  model      {CONFIG.BACKBONE} + BiLSTM + self-attention; initial weights: {WEIGHTS_ORIGIN}",
    f"  training   {trained}; epoch {MODEL_INFO['epoch']} was the best, validation AUC {MODEL_INFO['val_auc']:.3f}",
    f"  decision   temperature {TEMPERATURE:.2f} and threshold {THRESHOLD:.3f}, fitted on the validation set",
    f"  time       preparation {duration(PREPARATION_SECONDS)}, training {duration(results['seconds']['training'])}, "
    f"evaluation {duration(EVALUATION_SECONDS)}, on {', '.join(ENVIRONMENT.gpus) or 'the CPU'}",
]
if METRICS:
    fitted, plain = FORMATTED_METRICS.values()
    unseen = (
        ", recordings never trained on" if HISTORY and not LEAKING and not CONFIG.CHECKPOINT else ""
    )
    report += [
        "",
        f"Result: test set of {tested_videos}{unseen}",
        "  Fake is the positive class; in brackets 95 % intervals, from resampled groups.",
        *(
            f"  {metric_name(name):20}{fitted[name]}"
            for name in fitted
            if name not in VERDICT_METRICS
        ),
        "",
        f"  {'':20}{f'threshold {THRESHOLD:.3f}':26}threshold 0.5",
        *(f"  {metric_name(name):20}{fitted[name]:26}{plain[name]}" for name in VERDICT_METRICS),
        *(
            f"  undefined, for the test set has no {kind} videos: the metrics that need both"
            for kind in ("real", "fake")
            if not sizes["test"][kind]
        ),
        "",
        "By manipulation: AUC against all real videos",
        *(
            f"  {row['method']:20}{with_interval(row):26}"
            f"{count(row['fakes'], 'fake')}{', never trained on' * row['never_trained_on']}"
            for row in results["metrics_by_method"]
        ),
    ]
if results["metrics_by_dataset"]:
    report += ["", "By dataset: AUC of its own videos"]
    report += [
        f"  {row['dataset'][:19]:20}{with_interval(row):26}{row['reals']} real, {count(row['fakes'], 'fake')}"
        for row in results["metrics_by_dataset"]
    ]
if results["robustness"]:
    videos = results["robustness"][0]["videos"]
    report += [
        "",
        f"Robustness: AUC of {count(videos, 'test video')} after a change to the face crops",
    ]
    for row in results["robustness"]:
        strength = f"{row['strength']:g}" if row["strength"] else ""
        report.append(f"  {row['degradation']:22} {strength:5} {with_interval(row)}")
if len(SCORED):
    verdicts, unread = SCORED.verdict.value_counts(), results["predictions"]["errors"]
    report += ["", f"Your own videos, below {CONFIG.PREDICT_DIR}"]
    report += [
        f"  {verdicts.get('fake', 0)} called fake, {verdicts.get('real', 0)} real; {unread} could not be read"
    ]
report += ["", "Caveats", *(f"  {note}" for note in notes)]
report += [
    "",
    "To use the model",
    f"  set CHECKPOINT={MODEL_FILE}, EPOCHS=0, and PREDICT_DIR to your videos;",
    "  or in Python, with kaggle_cells/ in sys.path:",
    f'  from cell_08_evaluation_functions import Predictor; Predictor.load("{MODEL_FILE}").predict_video("video.mp4")',
]
with replacing(RESULTS / "experiment_report.txt") as partial_file:
    partial_file.write_text("\n".join(report) + "\n", encoding="utf-8")
print("\n".join(report))

# %% [markdown]
# What was achieved, what to try next, and where everything is:

# %%
WHAT_FILES_ARE = {
    "models/best_model.pth": "the detector: this is the one to keep",
    "models/last_checkpoint.pth": "to go on with training",
    "results/experiment_report.txt": "the report above",
    "results/experiment_results.json": "the same and more, for programs",
    "results/test_predictions.csv": "each test video with its score",
    "results/predictions.csv": "your own videos with their scores",
    "results/training_history.csv": "a row an epoch",
    "results/evaluation/": "all figures of the test",
    "data/": "which video was used for what, and which was not, and why",
}
achieved, ideas = [], []
if METRICS:
    achieved += [
        f"**Test AUC {fitted['auc_roc']}**, accuracy {fitted['accuracy']}, on {tested_videos}."
    ]
    for row in lowest(results["metrics_by_method"]):
        achieved += [f"Hardest to tell from real: `{row['method']}`, AUC {with_interval(row)}."]
for row in lowest(results["robustness"][1:]):
    achieved += [
        f"Hardest condition: {row['degradation']} {row['strength']:g}, AUC {with_interval(row)}."
    ]
    if CONFIG.AUGMENTATION != "robust":
        ideas += [
            '`AUGMENTATION = "robust"`, if your videos are as small, blurred or dark as in the hardest condition'
        ]
if at_chance in notes:
    achieved += [at_chance]
if len(SCORED):
    achieved += [f"Your own videos: {verdicts.get('fake', 0)} of {len(SCORED)} called fake."]
else:
    ideas += [
        '`predict_video("my_video.mp4")` in a new cell, or `PREDICT_DIR`, to score videos of your own'
    ]
if DATA_ORIGIN.startswith("demo"):
    ideas += [
        "a real dataset: the demo set shows that everything works, not how well it works on deepfakes"
    ]
if WEIGHTS_ORIGIN == "random":
    ideas += ["`PRETRAINED = True`: from ImageNet weights it would learn far more"]
elif WEIGHTS_ORIGIN.startswith("random"):
    ideas += [
        f"ImageNet weights: turn the internet on, or attach a dataset that holds `{CONFIG.BACKBONE}.pth`"
    ]
if HISTORY and MODEL_INFO["epoch"] > 0.9 * CONFIG.EPOCHS:
    ideas += [f"more than {CONFIG.EPOCHS} `EPOCHS`: the best one was among the last"]
if HISTORY and len(TRAINED_ON) > 1 and not CONFIG.HOLDOUT_METHODS:
    ideas += [
        f"`HOLDOUT_METHODS = {sorted(TRAINED_ON)[:1]}`, to see how it does on fakes of a kind it never saw"
    ]
if HISTORY and 0 < CONFIG.MAX_VIDEOS_PER_CLASS < 1000:
    ideas += [
        f"more than {CONFIG.MAX_VIDEOS_PER_CLASS} videos a class, and another `SEED`: single runs differ"
    ]
summary = "\n".join(f"- {line}" for line in achieved)
if ideas:
    summary += "\n\nTo try next:\n\n" + "\n".join(f"- {idea}" for idea in ideas)
display(Markdown(summary)) if IN_NOTEBOOK else print(summary)
files = {}
for name, meaning in WHAT_FILES_ARE.items():
    parts = [CONFIG.work_dir / name, *(CONFIG.work_dir / name).rglob("*")]
    if parts[0].exists():
        size = sum(part.stat().st_size for part in parts if part.is_file())
        files[name] = {"size": file_size(size), "": meaning}
with pd.option_context("display.max_colwidth", None, "display.width", 120):
    display(pd.DataFrame([*files.values()], index=[*files]))
print("Everything is below", CONFIG.work_dir.resolve())
