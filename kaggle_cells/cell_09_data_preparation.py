# %% [markdown]
# ## 9. The videos become clips and splits
#
# From here on the notebook works. It finds the videos, takes at most `MAX_VIDEOS_PER_CLASS` of each class, makes a
# clip of each (or finds it in the cache), and splits them by group. On Kaggle name your dataset's folder in
# `DATA_DIR`, or leave it at `auto`.

# %%
import time
from pathlib import Path

import pandas as pd
from IPython.display import display

from cell_01_imports_and_setup import ENVIRONMENT
from cell_02_global_config import CONFIG
from cell_03_data_processing import (
    ClipSettings,
    cache_clips,
    crossing_groups,
    find_videos,
    limit_videos,
    load_face_detector,
    make_demo_set,
    save_csv,
    split_videos,
)
from cell_08_evaluation_functions import plot_samples, save_figure

preparation_started = time.perf_counter()
places = {"auto": ["/kaggle/input", "data"], "demo": []}.get(CONFIG.DATA_DIR, [CONFIG.DATA_DIR])
for DATA_ORIGIN in places:
    try:
        found = find_videos(Path(DATA_ORIGIN), CONFIG.METHODS)
        break
    except FileNotFoundError as error:
        if CONFIG.DATA_DIR != "auto":
            raise
        if Path(DATA_ORIGIN).is_dir():
            print(f"Not used: {error}")
else:
    DATA_ORIGIN = "demo set made by this notebook"
    demo_folder, demo_size = CONFIG.work_dir / f"demo_videos_{CONFIG.SEED}", CONFIG.MAX_VIDEOS_PER_CLASS or 120
    print(f"Making a demo set of {demo_size} real and {demo_size} fake videos: no dataset of yours.", flush=True)
    make_demo_set(demo_folder, demo_size, CONFIG.SEED, CONFIG.NUM_WORKERS)
    found = find_videos(demo_folder, CONFIG.METHODS)

print(f"{len(found)} videos in {found.group.nunique()} groups, from {DATA_ORIGIN}")
display(found.groupby(["dataset", "label", "method"]).size().rename("videos").to_frame())

# %%
FACE_DETECTOR = load_face_detector(ENVIRONMENT.device) if CONFIG.FACE_CROP else None
CLIP_SETTINGS = ClipSettings.of(CONFIG)
chosen_videos = limit_videos(found, CONFIG.MAX_VIDEOS_PER_CLASS, CONFIG.SEED)
print(f"Making clips of {len(chosen_videos)} videos, or finding them in {CONFIG.cache_dir}", flush=True)
usable_videos, SKIPPED = cache_clips(chosen_videos, CLIP_SETTINGS, CONFIG.cache_dir, FACE_DETECTOR, CONFIG.NUM_WORKERS)
VIDEOS = split_videos(usable_videos, CONFIG.VAL_FRACTION, CONFIG.TEST_FRACTION, CONFIG.SEED, CONFIG.HOLDOUT_METHODS)
LEAKING = crossing_groups(VIDEOS)
SPLIT_TABLES = {name: VIDEOS[VIDEOS.split == name].reset_index(drop=True) for name in ("train", "val", "test")}
for name, table in {**SPLIT_TABLES, "skipped": SKIPPED}.items():
    save_csv(table, CONFIG.work_dir / "data" / f"{name}.csv")
PREPARATION_SECONDS = time.perf_counter() - preparation_started

display(pd.crosstab([VIDEOS.label, VIDEOS.method], VIDEOS.split)[list(SPLIT_TABLES)])
if CONFIG.HOLDOUT_METHODS:
    print(f"{len(usable_videos) - len(VIDEOS)} held-out fakes set aside: their recordings are not in the test set.")
if LEAKING:
    print(f"Warning: {len(LEAKING)} groups are in more than one of the dataset's own splits, e.g. {LEAKING[:3]}.")
if CONFIG.FACE_CROP and (faceless := int((VIDEOS.face_share == 0).sum())):
    print(f"No face found in {faceless} of {len(VIDEOS)} videos: the middle of the frame is used.")
if len(SKIPPED):
    print(f"{len(SKIPPED)} videos cannot be used (all in data/skipped.csv):")
    display(SKIPPED[["path", "label", "reason"]].head(10))

# %% [markdown]
# What the network will see, a clip of each kind:

# %%
save_figure(plot_samples(VIDEOS), CONFIG.work_dir / "results" / "sample_clips.png")
