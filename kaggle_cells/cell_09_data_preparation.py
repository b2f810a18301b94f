# %% [markdown]
# <a id="section-9"></a>
# ## 9. The videos become clips and splits
#
# From here on the notebook works. It finds the videos, splits them by group, takes at most `MAX_VIDEOS_PER_CLASS` of
# each class (from several datasets in equal parts) and makes a clip of each, or finds it in the cache: a run that was
# interrupted goes on where it stopped.
# On Kaggle name your dataset's folder in `DATA_DIR`, or leave it at `auto`. With a trained model and `EPOCHS = 0` only
# the test videos are needed, and where there is no dataset, none are: `PREDICT_DIR` is scored then, and no more.

# %%
import dataclasses
import time
from pathlib import Path

import pandas as pd
from IPython.display import display

from cell_01_imports_and_setup import ENVIRONMENT, RANK, save_csv, save_figure
from cell_02_global_config import CONFIG
from cell_03_data_processing import (
    CLIP_COLUMNS,
    EVERY_CLASS,
    OWN_TABLES,
    VIDEO_COLUMNS,
    ClipSettings,
    cache_clips,
    check_files,
    crossing_groups,
    find_videos,
    sample_per_class,
    load_face_detector,
    make_demo_set,
    remove_partial_files,
    require_classes,
    require_own_tables,
    require_space,
    split_videos,
)
from cell_06_loss_and_utils import run_settings, run_to_resume
from cell_08_evaluation_functions import plot_samples


def kinds_of(videos: pd.DataFrame) -> list[pd.Series]:
    """The dataset, class and method of each video, to count them by."""
    return [videos.dataset, videos.label.map({0: "real", 1: "fake"}).rename("class"), videos.method]


if RANK:
    raise RuntimeError(
        "torchrun is for cell_12_training_loop.py; run the cells after it with python"
    )
preparation_started = time.perf_counter()
if CONFIG.RESUME and CONFIG.EPOCHS:
    run_to_resume(
        CONFIG.last_checkpoint, dataclasses.asdict(CONFIG)
    )  # other settings are refused right here
require_own_tables(CONFIG.work_dir / "data")
for folder in ("data", "models", "results"):
    remove_partial_files(CONFIG.work_dir / folder)
wanted_methods = CONFIG.METHODS and CONFIG.METHODS + CONFIG.HOLDOUT_METHODS
places = {"auto": ["/kaggle/input", "data"], "demo": [], "none": []}.get(
    CONFIG.DATA_DIR, [CONFIG.DATA_DIR]
)
for DATA_ORIGIN in places:
    try:
        found = find_videos(Path(DATA_ORIGIN), wanted_methods)
        break
    except FileNotFoundError as error:
        if CONFIG.DATA_DIR != "auto":
            raise
        if Path(DATA_ORIGIN).is_dir() and {file.name for file in Path(DATA_ORIGIN).iterdir()} - {
            *OWN_TABLES
        }:
            print(f"Not used: {error}")
else:
    if CONFIG.DATA_DIR == "none" or (
        CONFIG.DATA_DIR == "auto" and CONFIG.PREDICT_DIR and not CONFIG.EPOCHS
    ):
        DATA_ORIGIN, found = "no dataset", pd.DataFrame(columns=VIDEO_COLUMNS)
    else:
        DATA_ORIGIN = "demo set made by this notebook"
        demo_folder, demo_size = (
            CONFIG.work_dir / f"demo_videos_{CONFIG.SEED}",
            CONFIG.MAX_VIDEOS_PER_CLASS or 120,
        )
        print(
            f"Making a demo set of {demo_size} real and {demo_size} fake videos: no dataset of yours.",
            flush=True,
        )
        make_demo_set(demo_folder, demo_size, CONFIG.SEED, CONFIG.NUM_WORKERS)
        found = find_videos(demo_folder, wanted_methods)

checked, refused = check_files(found, CONFIG.NUM_WORKERS)
save_csv(refused, CONFIG.work_dir / "data" / "skipped.csv")
if len(found):
    table = pd.crosstab(kinds_of(found), found.split.replace("", "no split given"))
    display(table.assign(videos=table.sum(axis=1)))
    print(
        f"{len(found)} videos in {found.group.nunique()} groups, from {DATA_ORIGIN}; {len(refused)} cannot be used"
    )
else:
    print("No dataset: only the videos in PREDICT_DIR are scored.")
if found.dataset.nunique() > 1:
    print("All of these datasets are used. To use one alone, name its folder in DATA_DIR.")
alone = checked.label.eq(1) & ~checked.group.isin(checked.group[checked.label == 0])
if alone.any():
    print(
        f"{alone.sum()} of {checked.label.sum()} fakes share no source with a real video here, as far as names and "
        "lists tell. If they were made from these, say so in names or in a manifest: the splits rely on it."
    )

# %%
needed = EVERY_CLASS  # in each split
if CONFIG.EPOCHS == 0:
    needed = {"test": ()}
elif CONFIG.SELF_BLEND == 1:  # training makes its own fakes
    needed = {"train": (0,), "val": (0,), "test": (0, 1)}
fractions = min(CONFIG.VAL_FRACTION, 1 - CONFIG.TEST_FRACTION), CONFIG.TEST_FRACTION
splits = checked
if len(found):
    splits = split_videos(checked, *fractions, CONFIG.SEED, CONFIG.HOLDOUT_METHODS, needed)
LEAKING = crossing_groups(splits)
if CONFIG.HOLDOUT_METHODS:
    print(
        f"{len(checked) - len(splits)} held-out fakes set aside: their recordings are not in the test set."
    )
if LEAKING:
    print(
        f"Warning: {len(LEAKING)} groups are in more than one split, since the dataset's own splits part them, so the "
        "test is easier than it looks. The first of them, and some of their videos:"
    )
    leaks = splits[splits.group.isin(LEAKING)].assign(name=splits.path.map(lambda path: path.name))
    display(
        leaks.pivot_table(
            index="group", columns="split", values="name", aggfunc=lambda n: ", ".join(n[:3])
        ).head(10)
    )

CLIP_SETTINGS = ClipSettings.of(CONFIG)
FACE_DETECTOR = load_face_detector(ENVIRONMENT.device) if CONFIG.FACE_CROP else None
VIDEOS, SKIPPED, more_failed = (
    splits.assign(**dict.fromkeys(CLIP_COLUMNS)),
    refused,
    len(splits) > 0,
)
while more_failed:  # a video that fails gives its place to another
    chosen_videos = sample_per_class(
        splits[~splits.path.isin(SKIPPED.path)], CONFIG.MAX_VIDEOS_PER_CLASS, CONFIG.SEED
    )
    require_classes(chosen_videos, needed)
    if CONFIG.EPOCHS == 0:
        chosen_videos = chosen_videos[chosen_videos.split == "test"].reset_index(drop=True)
    print(
        f"{len(chosen_videos)} videos taken:",
        require_space(chosen_videos, CLIP_SETTINGS, CONFIG.cache_dir),
        flush=True,
    )
    VIDEOS, failed = cache_clips(
        chosen_videos, CLIP_SETTINGS, CONFIG.cache_dir, FACE_DETECTOR, CONFIG.NUM_WORKERS
    )
    SKIPPED, more_failed = pd.concat([SKIPPED, failed], ignore_index=True), len(failed) > 0
SPLIT_TABLES = {
    name: VIDEOS[VIDEOS.split == name].reset_index(drop=True) for name in ("train", "val", "test")
}
if CONFIG.RESUME and CONFIG.EPOCHS:
    run_to_resume(CONFIG.last_checkpoint, run_settings(CONFIG, VIDEOS))  # and other videos here
for name, table in {**SPLIT_TABLES, "skipped": SKIPPED}.items():
    if CONFIG.EPOCHS or name in ("test", "skipped"):
        save_csv(table, CONFIG.work_dir / "data" / f"{name}.csv")
PREPARATION_SECONDS = time.perf_counter() - preparation_started

if len(SKIPPED):
    print(f"Skipped: {len(SKIPPED)} videos, all of them in data/skipped.csv with the reason.")
    with pd.option_context("display.max_colwidth", 100, "display.width", 160):
        display(
            SKIPPED.assign(video=[path.name for path in SKIPPED.path])[
                ["video", "method", "reason"]
            ].head(10)
        )
if len(VIDEOS):
    counts = pd.crosstab(kinds_of(VIDEOS), VIDEOS.split)
    display(counts[[name for name in SPLIT_TABLES if name in counts]])
if CONFIG.FACE_CROP and (faceless := int((VIDEOS.face_share == 0).sum())):
    print(f"No face found in {faceless} of {len(VIDEOS)} videos: the middle of the frame is used.")
if short := int((VIDEOS.distinct_frames < CONFIG.FRAMES_PER_VIDEO).sum()):
    print(
        f"{short} videos have fewer than {CONFIG.FRAMES_PER_VIDEO} frames: some of theirs are repeated."
    )

# %% [markdown]
# What the network will see, a clip of each kind:

# %%
if len(VIDEOS):
    save_figure(plot_samples(VIDEOS), CONFIG.work_dir / "results" / "sample_clips.png")
