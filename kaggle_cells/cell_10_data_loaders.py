# %% [markdown]
# ## 10. Loaders and batch size
#
# Larger batches use a GPU better, as long as they fit. With `BATCH_SIZE = 0` a few training steps on blank clips
# find out what does.

# %%
import torch
from torch.utils.data import DataLoader

from cell_01_imports_and_setup import ENVIRONMENT
from cell_02_global_config import CONFIG
from cell_04_dataset_class import ClipDataset, PairSampler
from cell_06_loss_and_utils import free_memory
from cell_07_training_functions import amp_dtype, choose_batch_size
from cell_09_data_preparation import SPLIT_TABLES

DEVICE = torch.device(ENVIRONMENT.device)
PRECISION = amp_dtype(CONFIG.AMP, DEVICE)
BATCH_SIZE_USED = CONFIG.BATCH_SIZE or choose_batch_size(CONFIG, DEVICE, PRECISION) * max(1, len(ENVIRONMENT.gpus))
free_memory()

pinned = DEVICE.type == "cuda"
datasets = {name: ClipDataset(table, CONFIG.NUM_WORKERS) for name, table in SPLIT_TABLES.items()}
TRAIN_SAMPLER = PairSampler(SPLIT_TABLES["train"], CONFIG.SEED)
TRAIN_LOADER = DataLoader(
    datasets["train"],
    BATCH_SIZE_USED,
    sampler=TRAIN_SAMPLER,
    drop_last=len(TRAIN_SAMPLER) >= BATCH_SIZE_USED,  # a last batch of one clip would upset batch normalisation
    pin_memory=pinned,
)
VAL_LOADER = DataLoader(datasets["val"], BATCH_SIZE_USED, pin_memory=pinned)
TEST_LOADER = DataLoader(datasets["test"], BATCH_SIZE_USED, pin_memory=pinned)

print(
    f"Batches of {BATCH_SIZE_USED} clips on {ENVIRONMENT.device} in {str(PRECISION or torch.float32).split('.')[1]}: "
    f"{len(TRAIN_LOADER)} for training, {len(VAL_LOADER)} for validation, {len(TEST_LOADER)} for the test"
)
