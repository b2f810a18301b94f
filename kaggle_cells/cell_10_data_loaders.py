# %% [markdown]
# ## 10. Loaders and batch size
#
# Larger batches use a GPU better, as long as they fit. With `BATCH_SIZE = 0` a few training steps on blank clips
# find out what does. An interrupted run keeps the batches that it had, whatever it goes on with.

# %%
import dataclasses

import torch
from torch.utils.data import DataLoader

from cell_01_imports_and_setup import ENVIRONMENT, PROCESSES, RANK
from cell_02_global_config import CONFIG
from cell_04_dataset_class import ClipDataset, PairBatches
from cell_06_loss_and_utils import attached_checkpoints, data_fingerprint, free_memory, run_to_resume
from cell_07_training_functions import amp_dtype, choose_batch_size, from_first, gathered, join_processes

DEVICE = torch.device(ENVIRONMENT.device)
PRECISION = amp_dtype(CONFIG.AMP, DEVICE)
FOUND = None
if RANK == 0:  # what the first process has prepared is sent to the others, which wait for it here
    from cell_09_data_preparation import LAST_CHECKPOINT, SPLIT_TABLES, VIDEOS

    RUN_SETTINGS = {"FORMAT": 2, **dataclasses.asdict(CONFIG), "DATA": data_fingerprint(VIDEOS)}
    RESUME_FROM, batch_size = None, CONFIG.BATCH_SIZE
    if CONFIG.RESUME and CONFIG.EPOCHS:
        RESUME_FROM = run_to_resume(LAST_CHECKPOINT, RUN_SETTINGS, attached_checkpoints())
    if RESUME_FROM:
        batch_size = torch.load(RESUME_FROM, map_location="cpu", weights_only=True, mmap=True)["batch_size"]
    FOUND = LAST_CHECKPOINT, SPLIT_TABLES, RUN_SETTINGS, RESUME_FROM, batch_size
join_processes(DEVICE)
LAST_CHECKPOINT, SPLIT_TABLES, RUN_SETTINGS, RESUME_FROM, BATCH_SIZE_USED = from_first(FOUND)
if not BATCH_SIZE_USED:
    fitting = min(gathered(choose_batch_size(CONFIG, DEVICE, PRECISION)))
    BATCH_SIZE_USED = fitting * max(PROCESSES, len(ENVIRONMENT.gpus))
    free_memory()

pinned = DEVICE.type == "cuda"
datasets = {name: ClipDataset(table, CONFIG.NUM_WORKERS) for name, table in SPLIT_TABLES.items()}
TRAIN_BATCHES = PairBatches(SPLIT_TABLES["train"], BATCH_SIZE_USED, CONFIG.SEED, RANK, PROCESSES)
TRAIN_LOADER = DataLoader(datasets["train"], batch_sampler=TRAIN_BATCHES, pin_memory=pinned)
VAL_LOADER, TEST_LOADER = (
    DataLoader(data, TRAIN_BATCHES.share, sampler=range(RANK, len(data), PROCESSES), pin_memory=pinned)
    for data in (datasets["val"], datasets["test"])
)

shared = f", shared by {PROCESSES} processes" if PROCESSES > 1 else ""
print(
    f"Batches of {BATCH_SIZE_USED} clips{shared} on {ENVIRONMENT.device} in "
    f"{str(PRECISION or torch.float32).removeprefix('torch.')}: {len(TRAIN_LOADER)} for training, {len(VAL_LOADER)} "
    f"for validation, {len(TEST_LOADER)} for the test"
)
