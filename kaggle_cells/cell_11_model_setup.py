# %% [markdown]
# <a id="section-11"></a>
# ## 11. Model, optimizer, and where the last run stopped
#
# An interrupted run resumes from `models/last_checkpoint.pth`; a finished one is not repeated. The
# settings that shape the result must be the same then.

# %%
import torch
from IPython.display import display
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import cell_05_model_definition as cell_05
from cell_01_imports_and_setup import ENVIRONMENT, RANK, WORLD_SIZE
from cell_02_global_config import CONFIG, read_model_file, seed_everything
from cell_06_loss_and_utils import FocalLoss, ModelEMA, RunState, should_stop
from cell_07_training_functions import LossScaler, Trainer, broadcast_object
from cell_10_data_loaders import (
    BATCH_SIZE_USED,
    DEVICE,
    PRECISION,
    RUN_SETTINGS,
    SPLIT_TABLES,
    checkpoint_to_resume,
)


def load_initial_weights(model: cell_05.DeepfakeDetector) -> tuple[str, set[str]]:
    """Load what training starts from; returns its origin and the manipulations it has seen."""
    if CONFIG.INITIAL_MODEL:
        origin, saved = cell_05.load_fitting_weights(model, CONFIG, CONFIG.INITIAL_MODEL)
        return origin, {*saved.get("trained_on", ())}
    if not CONFIG.CHECKPOINT:
        wanted = CONFIG.BACKBONE, CONFIG.PRETRAINED, CONFIG.WEIGHTS_PATH
        return cell_05.load_backbone_weights(model.get_submodule("backbone"), *wanted), set()
    saved = read_model_file(CONFIG.CHECKPOINT)
    model.load_state_dict(saved["model"])
    # The oldest files do not say what they were trained on.
    likely = {*SPLIT_TABLES["test"].method} - {"real", *saved["config"]["HOLDOUT_METHODS"]}
    return f"checkpoint {CONFIG.CHECKPOINT}", {*saved.get("trained_on", likely)}


def parallelise(model: nn.Module) -> nn.Module:
    """The model as it is trained: on one device, on several, or in several processes."""
    if WORLD_SIZE > 1:
        devices = [DEVICE] if DEVICE.type == "cuda" else None
        if devices and CONFIG.syncs_batch_norm(BATCH_SIZE_USED // WORLD_SIZE):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    gpus = ENVIRONMENT.gpu_ids
    return nn.DataParallel(model, gpus) if len(gpus) > 1 else model


# %%
seed_everything(CONFIG.SEED)
MODEL = cell_05.build_model(CONFIG)
TRAINED_ON = {*SPLIT_TABLES["train"].method} - {"real"}  # manipulations
resume_from, initial_weights = checkpoint_to_resume(), ""
# The processes of torchrun get initial weights from the first one.
if CONFIG.CHECKPOINT or CONFIG.INITIAL_MODEL or (RANK == 0 and not resume_from):
    initial_weights, earlier_methods = load_initial_weights(MODEL)
    TRAINED_ON |= earlier_methods
MODEL.to(DEVICE)
MODEL.precision = PRECISION
PARALLEL_MODEL = parallelise(MODEL)
AVERAGE = ModelEMA(MODEL, CONFIG.EMA_DECAY) if CONFIG.EMA_DECAY else None

CRITERION = FocalLoss(CONFIG.FOCAL_GAMMA, CONFIG.FRAME_LOSS_WEIGHT)
rate, decay, patience = CONFIG.LEARNING_RATE, CONFIG.WEIGHT_DECAY, CONFIG.LR_PATIENCE
OPTIMIZER = torch.optim.AdamW(MODEL.parameters(), lr=rate, weight_decay=decay, fused=True)
SCHEDULER = ReduceLROnPlateau(OPTIMIZER, factor=0.5, patience=patience)
SCALER = LossScaler(DEVICE, PRECISION)
TRAINER = Trainer(PARALLEL_MODEL, CRITERION, OPTIMIZER, SCALER, CONFIG.GRADIENT_CLIP, AVERAGE)

# %% [markdown]
# The state of the run is what a checkpoint holds, and what is restored if there is one:

# %%
parts = dict(model=MODEL, optimizer=OPTIMIZER, scheduler=SCHEDULER, scaler=SCALER)
RUN_STATE = RunState(
    CONFIG.last_checkpoint,
    parts | ({"average": AVERAGE} if AVERAGE else {}),
    settings=RUN_SETTINGS,
    batch_size=BATCH_SIZE_USED,
    precision=str(PRECISION),
    initial_weights=broadcast_object(initial_weights),
)
if resume_from:
    RUN_STATE.load(resume_from, write=RANK == 0)
HISTORY, WEIGHTS_ORIGIN = RUN_STATE.history, RUN_STATE.facts["initial_weights"]

one_frame = torch.zeros(1, 1, 3, CONFIG.IMAGE_SIZE, CONFIG.IMAGE_SIZE, device=DEVICE)
display(cell_05.shape_table(MODEL, one_frame))
print(f"Initial weights: {WEIGHTS_ORIGIN}")
if resume_from:
    finished = len(HISTORY) >= CONFIG.EPOCHS or should_stop(HISTORY, CONFIG.PATIENCE)
    what = "Training is finished" if finished else "Resuming"
    print(f"{what} after epoch {len(HISTORY)} of {resume_from}")
