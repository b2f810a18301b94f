# %% [markdown]
# <a id="section-10"></a>
# ## 10. Loaders and batch size
#
# Larger batches use a GPU better, as long as they fit. With `BATCH_SIZE = 0` a few training steps on blank clips
# find out what does. An interrupted run keeps its batch size, even if it goes on with another GPU.

# %%
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import DataLoader

from cell_01_imports_and_setup import ENVIRONMENT, PROCESSES, RANK, save_figure
from cell_02_global_config import CONFIG
from cell_04_dataset_class import ClipDataset, PairBatches
from cell_06_loss_and_utils import (
    attached_checkpoints,
    free_memory,
    peek,
    run_settings,
    run_to_resume,
)
from cell_07_training_functions import (
    amp_dtype,
    choose_batch_size,
    from_first,
    gathered,
    join_processes,
)
from cell_08_evaluation_functions import plot_self_blends

DEVICE = torch.device(ENVIRONMENT.device)
PRECISION = amp_dtype(CONFIG.AMP, DEVICE)
if (
    RANK == 0
):  # the first process prepares the data; others, if there are any, wait in `join_processes`
    from cell_09_data_preparation import SPLIT_TABLES
join_processes(DEVICE)
SPLIT_TABLES = from_first(SPLIT_TABLES if RANK == 0 else None)

RUN_SETTINGS = run_settings(CONFIG, pd.concat(SPLIT_TABLES.values()))


def checkpoint_to_resume() -> Path | None:
    """Where this run goes on from, as things are now: the same for all processes."""
    resumes = CONFIG.RESUME and CONFIG.EPOCHS and RANK == 0
    return from_first(
        run_to_resume(CONFIG.last_checkpoint, RUN_SETTINGS, attached_checkpoints())
        if resumes
        else None
    )


BATCH_SIZE_USED = CONFIG.BATCH_SIZE
if interrupted_run := checkpoint_to_resume():
    BATCH_SIZE_USED = peek(interrupted_run)["batch_size"]
if CONFIG.EPOCHS and not BATCH_SIZE_USED:
    fits = (
        choose_batch_size(CONFIG, DEVICE, PRECISION) if DEVICE.type == "cuda" else 8
    )  # main memory has room
    fits_everywhere = min(gathered(fits))
    BATCH_SIZE_USED = fits_everywhere * max(PROCESSES, len(ENVIRONMENT.gpus))
    free_memory()

pinned = DEVICE.type == "cuda"
datasets = {name: ClipDataset(table, CONFIG.NUM_WORKERS) for name, table in SPLIT_TABLES.items()}
scored_at_once = 8 * max(1, len(ENVIRONMENT.gpus))
TRAIN_BATCHES: Any = None
TRAIN_LOADER: Any = []
if CONFIG.EPOCHS:
    TRAIN_BATCHES = PairBatches(
        SPLIT_TABLES["train"],
        BATCH_SIZE_USED,
        CONFIG.SEED,
        RANK,
        PROCESSES,
        pairs=CONFIG.PAIRS,
        self_blend=CONFIG.SELF_BLEND,
    )
    TRAIN_LOADER = DataLoader(datasets["train"], batch_sampler=TRAIN_BATCHES, pin_memory=pinned)
    scored_at_once = min(scored_at_once, TRAIN_BATCHES.share)
scored_rows = {name: [*range(len(datasets[name]))] for name in ("val", "test")}
if CONFIG.EPOCHS and not SPLIT_TABLES["val"].label.any():
    print(
        "Validation has no fakes: self-blends of its real videos stand in, for the choice of epoch and threshold too."
    )
    scored_rows["val"] = [row for real in scored_rows["val"] for row in (real, ~real)]
VAL_LOADER, TEST_LOADER = (  # process 1 of 3 scores the clips 1, 4, 7, ...
    DataLoader(datasets[name], scored_at_once, sampler=rows[RANK::PROCESSES], pin_memory=pinned)
    for name, rows in scored_rows.items()
)

shared = f", shared by {PROCESSES} processes" if PROCESSES > 1 else ""
if len(TEST_LOADER):
    print(
        f"Batches of {BATCH_SIZE_USED or scored_at_once} clips{shared} on {ENVIRONMENT.device} in "
        f"{str(PRECISION or torch.float32).removeprefix('torch.')}: {len(TRAIN_LOADER)} for training, "
        f"{len(VAL_LOADER)} for validation, {len(TEST_LOADER)} for the test"
    )

# %% [markdown]
# `SELF_BLEND` of the fakes that training shows are made on the spot from real clips, other ones in each epoch:

# %%
if CONFIG.SELF_BLEND and CONFIG.EPOCHS and RANK == 0:
    blends = plot_self_blends(SPLIT_TABLES["train"], CONFIG.SEED)
    save_figure(blends, CONFIG.work_dir / "results" / "self_blends.png")
