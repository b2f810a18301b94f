"""Do the heat maps point to what was done to a video?

    python build_notebook.py run demo --output runs/demo && \\
        python tests/benchmarks/explanations.py runs/demo

Of every fake in the test set of a run on the demo set, the mean heat inside the altered region is
compared with that outside of it. The region is exact: each frame is drawn twice more, with white
and with black in place of what the manipulation changes, and lies where these two differ. The
baseline is the same for a network with random weights (the sanity check of Adebayo et al., 2018):
what a map gains by knowing no more than where there is something to see. `peak` is the share of
frames whose hottest pixel is in the altered region, `area` that of a pixel drawn at random.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kaggle_cells"))
import cell_03_data_processing as cell  # noqa: E402
from cell_04_dataset_class import normalize, to_float  # noqa: E402
from cell_05_model_definition import build_model, load_detector  # noqa: E402
from cell_08_evaluation_functions import heat_maps  # noqa: E402


def altered_regions(number: int, method: str, seed: int) -> list[np.ndarray]:
    """For each frame (H, W) of a demo video, where its manipulation has changed it."""
    original, drawn = cell.manipulated, []

    def painted(colour: float):
        def manipulated(person, portrait, method, frames, rng):
            pictures = original(person, portrait, method, frames, rng)
            regions = [
                np.abs(picture - person).max(axis=2, keepdims=True) > 0.01 for picture in pictures
            ]
            return [
                np.where(region, np.float32(colour), np.float32(0)).repeat(3, axis=2)
                for region in regions
            ]

        return manipulated

    portrait = cell.load_portrait()
    for colour in (0, 1):
        cell.manipulated = painted(colour)
        try:
            drawn.append(cell.demo_frames(portrait, number, method, seed))
        finally:
            cell.manipulated = original
    black, white = drawn
    return [
        w.astype(int).mean(axis=2) - b.astype(int).mean(axis=2) > 64
        for b, w in zip(black, white, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run on the demo set")
    given = parser.parse_args()
    model, saved = load_detector(given.run / "models" / "best_model.pth")
    torch.manual_seed(0)
    untrained = build_model(SimpleNamespace(**saved["config"])).eval()
    table, rows = pd.read_csv(given.run / "data" / "test.csv"), []
    for video in table[table.label == 1].itertuples():
        number = int(Path(video.path).stem.split("__")[0])
        regions = altered_regions(number, video.method, saved["config"]["SEED"])
        with np.load(video.clip_file) as clip:
            step = len(clip["frames"]) // model.frames
            frames, squares, positions = (
                clip[name][::step] for name in ("frames", "squares", "positions")
            )
        masks = []
        for t, (left, top, side) in zip(positions, squares, strict=True):
            region = regions[t][top : top + side, left : left + side].astype(np.uint8)
            masks.append(cv2.resize(region, frames.shape[1:3], interpolation=cv2.INTER_NEAREST) > 0)
        mask, row = np.stack(masks), {"method": video.method}
        for name, network in (("", model), ("untrained ", untrained)):
            heat = heat_maps(network, normalize(to_float(torch.from_numpy(frames)[None])))[0][
                0
            ].numpy()
            hottest = heat.reshape(len(heat), -1).argmax(axis=1)
            row[f"{name}peak"] = mask.reshape(len(heat), -1)[np.arange(len(heat)), hottest].mean()
            row |= {f"{name}inside": heat[mask].mean(), f"{name}outside": heat[~mask].mean()}
        rows.append(row | {"area": mask.mean()})
    means = pd.DataFrame(rows)
    everything = pd.concat([means, means.assign(method="all")])
    result = everything.groupby("method").mean()
    for name in ("", "untrained "):
        result[f"{name}ratio"] = result[f"{name}inside"] / result[f"{name}outside"]
    result.insert(0, "fakes", everything.method.value_counts())
    print(
        result[["fakes", "ratio", "untrained ratio", "area", "peak", "untrained peak"]]
        .round(2)
        .to_string()
    )


if __name__ == "__main__":
    main()
