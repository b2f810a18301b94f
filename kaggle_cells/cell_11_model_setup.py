# %% [markdown]
# ## 11. Model, optimizer, and where the last run stopped
#
# An interrupted run goes on from `models/last_checkpoint.pth`; a finished one is not repeated. Settings that would
# change the result must be the same then.

# %%
import dataclasses

import torch
from torch import nn

from cell_01_imports_and_setup import ENVIRONMENT
from cell_02_global_config import CONFIG, seed_everything
from cell_05_model_definition import build_model, load_backbone_weights
from cell_06_loss_and_utils import EarlyStopping, averaged, build_loss, data_fingerprint, settings_changed
from cell_09_data_preparation import VIDEOS
from cell_10_data_loaders import DEVICE, PRECISION

BEST_MODEL = CONFIG.work_dir / "models" / "best_model.pth"
LAST_CHECKPOINT = CONFIG.work_dir / "models" / "last_checkpoint.pth"
RUN_SETTINGS = {**dataclasses.asdict(CONFIG), "DATA": data_fingerprint(VIDEOS)}

seed_everything(CONFIG.SEED)
model = build_model(CONFIG)
if CONFIG.CHECKPOINT:
    start = torch.load(CONFIG.CHECKPOINT, map_location="cpu", weights_only=True)
    model.load_state_dict(start["model"])
    NEVER_TRAINED_ON = set(start["config"]["HOLDOUT_METHODS"])
    WEIGHTS_ORIGIN = f"checkpoint {CONFIG.CHECKPOINT}"
else:
    WEIGHTS_ORIGIN = load_backbone_weights(model.backbone, CONFIG.BACKBONE, CONFIG.PRETRAINED, CONFIG.WEIGHTS_PATH)
    NEVER_TRAINED_ON = set(CONFIG.HOLDOUT_METHODS)
if CONFIG.EPOCHS:
    NEVER_TRAINED_ON &= set(CONFIG.HOLDOUT_METHODS)
MODEL = model.to(DEVICE)
MODEL.precision = PRECISION
AVERAGE = averaged(MODEL, CONFIG.EMA_DECAY)
CRITERION = build_loss(CONFIG)
OPTIMIZER = torch.optim.AdamW(
    MODEL.parameters(), lr=CONFIG.LEARNING_RATE, weight_decay=CONFIG.WEIGHT_DECAY, fused=DEVICE.type == "cuda"
)
SCHEDULER = torch.optim.lr_scheduler.ReduceLROnPlateau(OPTIMIZER, factor=0.5, patience=CONFIG.LR_PATIENCE)
SCALER = torch.amp.GradScaler("cuda", enabled=torch.float16 == PRECISION and DEVICE.type == "cuda")
STOPPER = EarlyStopping(CONFIG.PATIENCE)
RESUMABLE = {"model": MODEL, "optimizer": OPTIMIZER, "scheduler": SCHEDULER, "scaler": SCALER, "stopper": STOPPER}
RESUMABLE |= {"average": AVERAGE} if AVERAGE is not None else {}
HISTORY: list[dict] = []

if CONFIG.RESUME and CONFIG.EPOCHS and LAST_CHECKPOINT.exists():
    saved_run = torch.load(LAST_CHECKPOINT, map_location="cpu", weights_only=True)
    if changed := settings_changed(saved_run["settings"], RUN_SETTINGS):
        raise ValueError(
            f"{LAST_CHECKPOINT} comes from a run with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Put them back to go on with it, set RESUME=False to start again, or choose another WORK_DIR."
        )
    for name, part in RESUMABLE.items():
        if saved_run[name]:  # the scaler's state is empty after epochs in another precision
            part.load_state_dict(saved_run[name])
    HISTORY = saved_run["history"]
    print(f"Going on after epoch {len(HISTORY)} of {LAST_CHECKPOINT}")

PARALLEL_MODEL = nn.DataParallel(MODEL) if len(ENVIRONMENT.gpus) > 1 else MODEL
parameters = sum(weight.numel() for weight in MODEL.parameters())
print(f"{CONFIG.BACKBONE} + BiLSTM + attention: {parameters / 1e6:.1f} million parameters; weights: {WEIGHTS_ORIGIN}")
