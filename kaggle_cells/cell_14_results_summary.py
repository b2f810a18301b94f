# %% [markdown]
# ## 14. Results for people and for programs
#
# `experiment_report.txt` is for reading, `experiment_results.json` for comparing many runs; both say which data,
# settings and weights the numbers belong to.

# %%
import dataclasses
import json
import time

from cell_01_imports_and_setup import ENVIRONMENT, STARTED
from cell_02_global_config import CONFIG
from cell_03_data_processing import replacing
from cell_09_data_preparation import DATA_ORIGIN, LEAKING, PREPARATION_SECONDS, SKIPPED, VIDEOS
from cell_10_data_loaders import BATCH_SIZE_USED, PRECISION
from cell_11_model_setup import HISTORY, WEIGHTS_ORIGIN
from cell_13_model_evaluation import (
    BY_METHOD,
    EVALUATION_SECONDS,
    METRICS,
    MODEL_FILE,
    MODEL_INFO,
    RESULTS,
    TEMPERATURE,
    THRESHOLD,
)

counts = VIDEOS.groupby(["split", "label"]).size()
results = {
    "format": 1,
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
    "metrics": {name.replace(" ", "_"): values for name, values in METRICS.items()},
    "metrics_by_method": BY_METHOD.to_dict(orient="records"),
}
with replacing(RESULTS / "experiment_results.json") as partial_file:
    partial_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")

# %%
fitted, plain = METRICS.values()
trained = (
    f"{len(HISTORY)} epoch{'s' * (len(HISTORY) != 1)}"
    if HISTORY
    else "in another run, perhaps on some of these recordings"
)
sizes = results["data"]["videos"]
on_blends = bool(HISTORY) and not sizes["val"]["fake"]
unseen = " of recordings never trained on" if HISTORY and not LEAKING and not CONFIG.CHECKPOINT else ""


def in_words(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


report = [
    "Video deepfake detection: experiment report",
    "",
    f"Data       {DATA_ORIGIN}: {len(VIDEOS)} videos in {VIDEOS.group.nunique()} groups, {len(SKIPPED)} skipped",
    *(f"           {split:5} {size['real']:5} real, {size['fake']:5} fake" for split, size in sizes.items()),
    f"Clips      {CONFIG.FRAMES_PER_VIDEO} frames of {CONFIG.IMAGE_SIZE} x {CONFIG.IMAGE_SIZE} pixels"
    + (f"; no face found in {results['data']['without_face']} videos" if CONFIG.FACE_CROP else "; face crop off"),
    f"Model      {CONFIG.BACKBONE} + BiLSTM + self-attention; initial weights: {WEIGHTS_ORIGIN}",
    f"Training   {trained}; epoch {MODEL_INFO['epoch']} was the best, validation AUC {MODEL_INFO['val_auc']:.3f}",
    f"Time       preparation {PREPARATION_SECONDS:.0f} s, training {results['seconds']['training']:.0f} s, "
    f"evaluation {EVALUATION_SECONDS:.0f} s, on {', '.join(ENVIRONMENT.gpus) or 'the CPU'}",
    *(["Validation has no fakes: epoch, temperature and threshold were chosen on self-blends"] * on_blends),
    *(
        [f"Leakage    {len(LEAKING)} groups are in several of the given splits: the test is easier than it looks"]
        if LEAKING
        else []
    ),
    "",
    f"Test set, {sizes['test']['real']} real and {sizes['test']['fake']} fake videos{unseen}; "
    "fake is the positive class:",
    "",
    f"{'':20}at {THRESHOLD:.3f}    at 0.500",
    *(f"{name.replace('_', ' '):18}{in_words(fitted[name]):>10}  {in_words(plain[name]):>10}" for name in fitted),
    "",
    "AUC by manipulation, each against all real videos:",
    *(
        f"{row['method']:18}{in_words(row['auc_roc']):>10}  {row['fakes']} fakes"
        f"{', never trained on' * row['never_trained_on']}"
        for row in results["metrics_by_method"]
    ),
    "",
    "The threshold and the temperature were fitted on the validation set. Numbers within one dataset say little",
    "about manipulations and cameras that it does not contain.",
    "",
    f"To use the model, set CHECKPOINT={MODEL_FILE}, EPOCHS=0 and PREDICT_DIR to your videos.",
]
with replacing(RESULTS / "experiment_report.txt") as partial_file:
    partial_file.write_text("\n".join(report) + "\n", encoding="utf-8")
print("\n".join(report))
