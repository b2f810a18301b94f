# %% [markdown]
# <a id="section-11"></a>
# ## 11. Model, optimizer, and where the last run stopped
#
# An interrupted run goes on from `models/last_checkpoint.pth`; a finished one is not repeated. Settings that would
# change the result must be the same then.

# %%
from typing import Any

import pandas as pd
import torch
from IPython.display import display
from torch import nn

from cell_01_imports_and_setup import ENVIRONMENT, PROCESSES, RANK
from cell_02_global_config import CONFIG, seed_everything
from cell_05_model_definition import build_model, choose_trainable, load_backbone_weights
from cell_06_loss_and_utils import EarlyStopping, WeightAverage, build_loss, peek, save_checkpoint
from cell_07_training_functions import LossScaler, Trainer, from_first, synchronise_batch_norm
from cell_10_data_loaders import DEVICE, PRECISION, SPLIT_TABLES, checkpoint_to_resume

BEST_MODEL = CONFIG.last_checkpoint.with_name("best_model.pth")

seed_everything(CONFIG.SEED)
MODEL = build_model(CONFIG)
TRAINED_ON, WEIGHTS_ORIGIN = (
    {*SPLIT_TABLES["train"].method} - {"real"},
    "",
)  # manipulations; where weights are from
resume_from = checkpoint_to_resume()
if CONFIG.CHECKPOINT:
    start = torch.load(CONFIG.CHECKPOINT, map_location="cpu", weights_only=True)
    MODEL.load_state_dict(start["model"])
    tested = {*SPLIT_TABLES["test"].method} - {"real"}
    TRAINED_ON |= {
        *start.get("trained_on", tested - {*start["config"]["HOLDOUT_METHODS"]})
    }  # older files lack it
    WEIGHTS_ORIGIN = f"checkpoint {CONFIG.CHECKPOINT}"
    del start
elif resume_from:
    WEIGHTS_ORIGIN = peek(resume_from)["initial_weights"]
elif RANK == 0:  # the other processes get their weights from the first one
    WEIGHTS_ORIGIN = load_backbone_weights(
        MODEL.backbone, CONFIG.BACKBONE, CONFIG.PRETRAINED, CONFIG.WEIGHTS_PATH
    )
WEIGHTS_ORIGIN = from_first(WEIGHTS_ORIGIN)
choose_trainable(MODEL.backbone, CONFIG.TRAINABLE)
MODEL.to(DEVICE)
MODEL.precision = PRECISION

PARALLEL_MODEL: nn.Module = MODEL
if PROCESSES > 1:
    synchronise_batch_norm(MODEL, DEVICE)
    devices = [DEVICE] if DEVICE.type == "cuda" else None
    PARALLEL_MODEL = nn.parallel.DistributedDataParallel(
        MODEL, devices, gradient_as_bucket_view=True
    )
elif len(ENVIRONMENT.gpus) > 1:
    PARALLEL_MODEL = nn.DataParallel(MODEL, ENVIRONMENT.gpu_ids)
if CONFIG.COMPILE and isinstance(PARALLEL_MODEL, nn.DataParallel):
    print("COMPILE is left out: DataParallel cannot use it, torchrun can (section 12).")
elif CONFIG.COMPILE:
    MODEL.backbone.compile()

AVERAGE = WeightAverage(MODEL, CONFIG.EMA_DECAY) if CONFIG.EMA_DECAY else None
CRITERION = build_loss(CONFIG)
backbone_rate = CONFIG.LEARNING_RATE * (
    1.0 if WEIGHTS_ORIGIN.startswith("random") else CONFIG.BACKBONE_LR
)
weights_by_rate: dict[float, list] = {CONFIG.LEARNING_RATE: [], backbone_rate: []}
for name, weight in MODEL.named_parameters():
    if weight.requires_grad:
        weights_by_rate[
            backbone_rate if name.startswith("backbone.") else CONFIG.LEARNING_RATE
        ].append(weight)
groups = [
    {"params": weights, "lr": rate, "initial_lr": rate}
    for rate, weights in weights_by_rate.items()
    if weights
]
OPTIMIZER = torch.optim.AdamW(groups, weight_decay=CONFIG.WEIGHT_DECAY, fused=True)
SCHEDULER = torch.optim.lr_scheduler.ReduceLROnPlateau(
    OPTIMIZER, factor=0.5, patience=CONFIG.LR_PATIENCE
)
SCALER = LossScaler(DEVICE, PRECISION)
STOPPER = EarlyStopping(CONFIG.PATIENCE)
TRAINER = Trainer(
    PARALLEL_MODEL,
    CRITERION,
    OPTIMIZER,
    SCALER,
    CONFIG.FRAME_LOSS_WEIGHT,
    CONFIG.GRADIENT_CLIP,
    AVERAGE,
    CONFIG.WARMUP_EPOCHS,
)
RESUMABLE: dict[str, Any] = {
    "model": MODEL,
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "scaler": SCALER,
    "stopper": STOPPER,
}
if AVERAGE is not None:
    RESUMABLE["average"] = AVERAGE
HISTORY: list[dict] = []
BEST: dict = {}  # what best_model.pth holds; every checkpoint has a copy

if resume_from:
    saved_run = torch.load(resume_from, map_location="cpu", weights_only=True)
    for name, part in RESUMABLE.items():
        if name != "scaler" or saved_run["precision"] == str(
            PRECISION
        ):  # a scale found for fp16 is for fp16
            part.load_state_dict(saved_run[name])
    HISTORY, BEST = saved_run["history"], saved_run["best"]
    del saved_run
    if RANK == 0:
        save_checkpoint(
            BEST_MODEL, BEST
        )  # it may be missing, or of an epoch that this checkpoint does not know
    finished = len(HISTORY) >= CONFIG.EPOCHS or STOPPER.should_stop
    print(
        f"Going on after epoch {len(HISTORY)} of {resume_from}"
        + ": training is finished." * finished
    )

width, features = 2 * CONFIG.LSTM_HIDDEN, MODEL.lstm.input_size
parts = {
    f"backbone, {CONFIG.BACKBONE}": (MODEL.backbone, f"{features} a frame"),
    "BiLSTM": (MODEL.lstm, f"{width} a frame"),
    "self-attention, normalisation": (
        nn.ModuleList([MODEL.attention, MODEL.norm]),
        f"{width} a frame",
    ),
    "classifiers of clip and frames": (nn.ModuleList([MODEL.head, MODEL.frame_head]), "1 a clip"),
    "all": (MODEL, ""),
}
counts = {
    name: f"{sum(weight.numel() for weight in part.parameters()):,}"
    for name, (part, _) in parts.items()
}
display(
    pd.DataFrame({"parameters": pd.Series(counts), "gives": [given for _, given in parts.values()]})
)
print(f"Weights: {WEIGHTS_ORIGIN}")
