# %% [markdown]
# <a id="section-10"></a>
# ## 10. Loaders and batch size
#
# Larger batches use a GPU better, as long as they fit. `BATCH_SIZE = 0` finds the size with a few
# training steps on blank clips. A resumed run keeps its batch size, even on another GPU.

# %%
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import display
from torch.utils.data import DataLoader

import cell_04_dataset_class as cell_04
import cell_06_loss_and_utils as cell_06
import cell_07_training_functions as cell_07
from cell_01_imports_and_setup import ENVIRONMENT, RANK, WORLD_SIZE, show_figure
from cell_02_global_config import CONFIG
from cell_03_data_processing import ClipSettings, load_face_detector

DEVICE = torch.device(ENVIRONMENT.device)
PRECISION = cell_07.amp_dtype(CONFIG.AMP, DEVICE)
cell_07.join_processes(DEVICE)
if RANK == 0:
    from cell_09_data_preparation import SPLIT_TABLES

    cell_07.broadcast_object(SPLIT_TABLES)
else:
    mtcnn = load_face_detector(ENVIRONMENT.device) if CONFIG.FACE_CROP else None
    options = ClipSettings.of(CONFIG), CONFIG.cache_dir, mtcnn, CONFIG.NUM_WORKERS
    SPLIT_TABLES = cell_07.help_to_prepare(*options)
RUN_SETTINGS = cell_06.run_settings(CONFIG, pd.concat(SPLIT_TABLES.values()))


# %%
def checkpoint_to_resume() -> Path | None:
    """The checkpoint this run resumes from, if any: the same in all processes."""
    if RANK or not (CONFIG.RESUME and CONFIG.EPOCHS):
        return cell_07.broadcast_object(None)
    places = CONFIG.last_checkpoint, RUN_SETTINGS, cell_06.attached_checkpoints()
    return cell_07.broadcast_object(cell_06.find_resume_checkpoint(*places))


def batch_size_to_use() -> int:
    """Clips in a step of all devices together; 0 without training."""
    if interrupted_run := checkpoint_to_resume():
        return cell_06.read_checkpoint_metadata(interrupted_run)["batch_size"]
    if CONFIG.BATCH_SIZE or not CONFIG.EPOCHS:
        return CONFIG.BATCH_SIZE
    fits = cell_07.choose_batch_size(CONFIG, DEVICE, PRECISION) if DEVICE.type == "cuda" else 8
    cell_06.free_memory()
    return min(cell_07.all_gather_object(fits)) * max(WORLD_SIZE, len(ENVIRONMENT.gpus))


def scored_samples(name: str) -> list[cell_04.Sample]:
    """All clips of a split, and for a validation set without fakes self-blends of the real ones."""
    table = SPLIT_TABLES[name]
    needs_fakes = name == "val" and CONFIG.EPOCHS and not table.label.any()
    if needs_fakes:
        print("Validation has no fakes: self-blends replace them to choose epoch and threshold.")
    kinds = (False, True) if needs_fakes else (False,)
    return [cell_04.Sample(row, blend) for row in range(len(table)) for blend in kinds]


def make_loader(name: str, batches: Any = None) -> DataLoader:
    """A loader of `batches` of samples, or else of all of a split."""
    dataset = cell_04.ClipDataset(
        SPLIT_TABLES[name], CONFIG.NUM_WORKERS, frames=CONFIG.FRAMES_PER_VIDEO
    )
    if batches is None:  # process 1 of 3 scores the clips 1, 4, 7, ...
        samples, stills = scored_samples(name)[RANK::WORLD_SIZE], CONFIG.CLIPS_PER_VIDEO
        batches = cell_04.batches_of_one_length(
            dataset, samples, SCORED_AT_ONCE, SCORED_AT_ONCE * stills
        )
    return DataLoader(dataset, batch_sampler=batches, pin_memory=DEVICE.type == "cuda")


# %%
BATCH_SIZE_USED = batch_size_to_use()
TRAIN_LOADER: Any = []
SCORED_AT_ONCE = 8 * max(1, len(ENVIRONMENT.gpus))
if CONFIG.EPOCHS:
    TRAIN_BATCHES = cell_04.PairBatches(
        SPLIT_TABLES["train"], BATCH_SIZE_USED, CONFIG, RANK, WORLD_SIZE
    )
    TRAIN_LOADER = make_loader("train", TRAIN_BATCHES)
    SCORED_AT_ONCE = min(SCORED_AT_ONCE, TRAIN_BATCHES.share)
VAL_LOADER, TEST_LOADER = make_loader("val"), make_loader("test")
if len(TEST_LOADER):
    shared = f", shared by {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    dtype = str(PRECISION or torch.float32).removeprefix("torch.")
    print(f"Batches of {BATCH_SIZE_USED or SCORED_AT_ONCE} clips{shared} on {DEVICE} in {dtype}:")
    lengths = [len(loader) for loader in (TRAIN_LOADER, VAL_LOADER, TEST_LOADER)]
    display(pd.DataFrame({"batches": lengths}, index=["training", "validation", "test"]))

# %% [markdown]
# `SELF_BLEND` of the fakes in training are made from real clips, like these:

# %%
if CONFIG.SELF_BLEND and CONFIG.EPOCHS and RANK == 0:
    blends = cell_04.plot_self_blends(SPLIT_TABLES["train"], CONFIG.SEED)
    show_figure(blends, CONFIG.work_dir / "results" / "self_blends.png")
