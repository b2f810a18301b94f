# %% [markdown]
# <a id="section-9"></a>
# ## 9. Videos become splits and clips
#
# Here the work starts: find the videos, split them by group, sample up to `MAX_VIDEOS_PER_CLASS` of
# each class, and make or load a cached clip of each; an interrupted run resumes. On Kaggle set
# `DATA_DIR` to your dataset's folder, or leave it at `auto`. With a trained model and `EPOCHS = 0`
# only test videos are needed; without a dataset, only `PREDICT_DIR` is scored.

# %%
import dataclasses
import time
from pathlib import Path

import pandas as pd
from IPython.display import display

import cell_03_data_processing as cell_03
from cell_01_imports_and_setup import ENVIRONMENT, RANK, plural, save_csv, show_figure
from cell_02_global_config import CONFIG
from cell_06_loss_and_utils import find_resume_checkpoint, run_settings
from cell_07_training_functions import broadcast_object, cache_clips_together
from cell_08_evaluation_functions import plot_samples

if RANK:
    raise RuntimeError("torchrun is for cell_12_training_loop.py; run later cells with python")
preparation_started = time.perf_counter()
if CONFIG.RESUME and CONFIG.EPOCHS:  # refuses a checkpoint of other settings before any work
    find_resume_checkpoint(CONFIG.last_checkpoint, dataclasses.asdict(CONFIG))
cell_03.require_own_tables(CONFIG.work_dir / "data")
for _name in ("data", "models", "results"):
    cell_03.remove_partial_files(CONFIG.work_dir / _name)


# %%
def locate_dataset() -> tuple[str, pd.DataFrame]:
    """Where the videos come from, and their table: DATA_DIR, what `auto` finds, or a demo set."""
    methods = CONFIG.METHODS and CONFIG.METHODS + CONFIG.HOLDOUT_METHODS
    places = {"auto": ["/kaggle/input", "data"], "demo": [], "none": []}
    for place in places.get(CONFIG.DATA_DIR, [CONFIG.DATA_DIR]):
        try:
            return place, cell_03.find_videos(Path(place), methods)
        except FileNotFoundError as error:
            if CONFIG.DATA_DIR != "auto":
                raise
            if {path.name for path in Path(place).glob("*")} - {*cell_03.OWN_TABLES}:
                print(f"Not used: {error}")
    only_predicts = CONFIG.DATA_DIR == "auto" and CONFIG.PREDICT_DIR and not CONFIG.EPOCHS
    if CONFIG.DATA_DIR == "none" or only_predicts:
        return "no dataset", pd.DataFrame(columns=cell_03.VIDEO_COLUMNS)
    folder = CONFIG.work_dir / f"demo_videos_{CONFIG.SEED}"
    size = CONFIG.MAX_VIDEOS_PER_CLASS or 120
    print(f"Making a demo set of {size} real and {size} fake videos.", flush=True)
    cell_03.make_demo_set(folder, size, CONFIG.SEED, CONFIG.NUM_WORKERS)
    return "demo set made by this notebook", cell_03.find_videos(folder, methods)


def count_videos(videos: pd.DataFrame) -> pd.DataFrame:
    """The number of videos by dataset, class and method, in each split."""
    classes = videos.label.map(dict(enumerate(cell_03.CLASS_NAMES))).rename("class")
    splits = videos.split.replace("", "no split given")
    counts = pd.crosstab([videos.dataset, classes, videos.method], splits)
    counts = counts[sorted(counts, key=[*cell_03.EVERY_CLASS, "no split given"].index)]
    return counts.assign(videos=counts.sum(axis=1))


DATA_ORIGIN, found_videos = locate_dataset()
if CONFIG.EPOCHS:
    cell_03.require_known("DATASET_SHARES", CONFIG.dataset_shares, found_videos.dataset)
usable_videos, SKIPPED = cell_03.check_files(found_videos, CONFIG.NUM_WORKERS)
save_csv(SKIPPED, CONFIG.work_dir / "data" / "skipped.csv")
if len(found_videos):
    display(count_videos(found_videos))
    _counts = plural(len(found_videos), "video"), plural(found_videos.group.nunique(), "group")
    print(f"{' in '.join(_counts)}, from {DATA_ORIGIN}; {len(SKIPPED)} cannot be used.")
else:
    print("No dataset: only the videos in PREDICT_DIR are scored.")

# %% [markdown]
# Each split needs both classes, unless training makes all its fakes itself or there is no training.
# Fakes without a known original and groups on both sides of a given split make a test too easy.


# %%
def report_splits() -> None:
    """Print what may make the test easier than it looks."""
    if found_videos.dataset.nunique() > 1:
        print("All of these datasets are used. To use one, set DATA_DIR to its folder.")
    with_real = usable_videos.group[usable_videos.label == 0]
    unmatched = (usable_videos.label == 1) & ~usable_videos.group.isin(with_real)
    if unmatched.any():
        print(f"{unmatched.sum()} fakes could not be matched to a real video by name or metadata.")
    if dropped := len(usable_videos) - len(videos_in_splits):
        print(f"{dropped} held-out fakes of recordings outside the test set are not used.")
    if LEAKING:
        print(f"Warning: {len(LEAKING)} groups are in more than one split of the dataset's own.")
        leaks = videos_in_splits[videos_in_splits.group.isin(LEAKING)].groupby(["group", "split"])
        names = leaks.path.agg(lambda paths: ", ".join(path.name for path in paths[:3]))
        display(names.unstack(fill_value="").head(10))


needed_classes = cell_03.EVERY_CLASS
if CONFIG.EPOCHS == 0:
    needed_classes = {"test": ()}
elif CONFIG.SELF_BLEND == 1:
    needed_classes = {"train": (0,), "val": (0,), "test": (0, 1)}
_fractions = min(CONFIG.VAL_FRACTION, 1 - CONFIG.TEST_FRACTION), CONFIG.TEST_FRACTION
videos_in_splits = usable_videos
if len(found_videos):
    videos_in_splits = cell_03.split_videos(
        usable_videos, *_fractions, CONFIG.SEED, CONFIG.HOLDOUT_METHODS, needed_classes
    )
LEAKING = cell_03.crossing_groups(videos_in_splits)
report_splits()

# %% [markdown]
# A video that fails when its clip is made is replaced by another of the same kind.

# %%
face_detector = cell_03.load_face_detector(ENVIRONMENT.device) if CONFIG.FACE_CROP else None


def prepare_clips(skipped: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample videos and cache their clips until none fails; these, and all videos skipped."""
    options = cell_03.ClipSettings.of(CONFIG), CONFIG.cache_dir, face_detector
    while True:
        left = videos_in_splits[~videos_in_splits.path.isin(skipped.path)]
        sample = cell_03.sample_per_class(left, CONFIG.MAX_VIDEOS_PER_CLASS, CONFIG.SEED)
        cell_03.require_classes(sample, needed_classes)
        if CONFIG.EPOCHS == 0:
            sample = sample[sample.split == "test"].reset_index(drop=True)
        space = cell_03.require_space(sample, *options)
        print(f"{plural(len(sample), 'video')} taken: {space}", flush=True)
        made, failed = cache_clips_together(broadcast_object(sample), *options, CONFIG.NUM_WORKERS)
        if failed.empty:
            return made, skipped
        skipped = pd.concat([skipped, failed], ignore_index=True)


def report_preparation() -> None:
    """Show the videos of each split, those skipped, and how many have no face or few frames."""
    if len(SKIPPED):
        print(f"Skipped: {plural(len(SKIPPED), 'video')}. data/skipped.csv has the reasons.")
        shown = SKIPPED.assign(video=[path.name for path in SKIPPED.path]).head(10)
        with pd.option_context("display.max_colwidth", 100, "display.width", 160):
            display(shown[["video", "method", "reason"]])
    display(count_videos(VIDEOS))
    if CONFIG.FACE_CROP and (faceless := sum(VIDEOS.face_share == 0)):
        print(f"No face found in {faceless} of {len(VIDEOS)} videos: their centre is cropped.")
    stills, wanted = VIDEOS.path.map(cell_03.is_picture).astype(bool), CONFIG.FRAMES_PER_VIDEO
    if short := VIDEOS.distinct_frames.between(2, wanted - 1).sum():
        print(f"Frames repeat in {plural(short, 'video')} of fewer than {wanted}.")
    if stills.any() and wanted > 1:
        print(
            f"{stills.sum()} pictures are shown {wanted} times, as clips in which nothing moves. "
            "FRAMES_PER_VIDEO = 1 learns as much from them in a fraction of the time."
        )
    for row in VIDEOS[VIDEOS.note.fillna("") != ""].head(5).itertuples():
        print(f"{row.path.name}: {row.note}")


# %%
VIDEOS = videos_in_splits.assign(**dict.fromkeys(cell_03.CLIP_COLUMNS))
if len(videos_in_splits):
    VIDEOS, SKIPPED = prepare_clips(SKIPPED)
SPLIT_TABLES = {s: VIDEOS[VIDEOS.split == s].reset_index(drop=True) for s in cell_03.EVERY_CLASS}
if CONFIG.RESUME and CONFIG.EPOCHS:  # refuses a checkpoint of other videos
    find_resume_checkpoint(CONFIG.last_checkpoint, run_settings(CONFIG, VIDEOS))
for _name, _table in {**SPLIT_TABLES, "skipped": SKIPPED}.items():
    if CONFIG.EPOCHS or _name in ("test", "skipped"):
        save_csv(_table, CONFIG.work_dir / "data" / f"{_name}.csv")
PREPARATION_SECONDS = time.perf_counter() - preparation_started
if len(VIDEOS):
    report_preparation()

# %% [markdown]
# What the network will see, one clip of each method:

# %%
if len(VIDEOS):
    show_figure(plot_samples(VIDEOS), CONFIG.work_dir / "results" / "sample_clips.png")
