# %% [markdown]
# ## 12. Training
#
# After each epoch the model is validated, and everything needed to go on is written down. The weights of the best
# epoch are kept, with the temperature and the threshold that fit them.

# %%
import time

import pandas as pd

from cell_01_imports_and_setup import STARTED
from cell_02_global_config import CONFIG, seed_everything
from cell_03_data_processing import save_csv
from cell_06_loss_and_utils import free_memory, model_file, save_checkpoint, unwrapped
from cell_07_training_functions import train_one_epoch, validate
from cell_08_evaluation_functions import fit_temperature, fit_threshold, plot_history, probabilities, save_figure
from cell_10_data_loaders import DEVICE, TRAIN_LOADER, TRAIN_SAMPLER, VAL_LOADER
from cell_11_model_setup import (
    AVERAGE,
    BEST_MODEL,
    CRITERION,
    HISTORY,
    LAST_CHECKPOINT,
    OPTIMIZER,
    PARALLEL_MODEL,
    RESUMABLE,
    RUN_SETTINGS,
    SCALER,
    SCHEDULER,
    STOPPER,
)

HISTORY_FILE = CONFIG.work_dir / "results" / "training_history.csv"
last_seconds = 0.0  # of this session's last epoch
while len(HISTORY) < CONFIG.EPOCHS and not STOPPER.should_stop:
    if last_seconds and (time.time() - STARTED + 1.5 * last_seconds) / 3600 > CONFIG.TIME_BUDGET_HOURS:
        print(f"Another epoch would pass TIME_BUDGET_HOURS = {CONFIG.TIME_BUDGET_HOURS}: run again to go on.")
        break
    epoch = len(HISTORY) + 1
    epoch_started = time.time()
    seed_everything(CONFIG.SEED + epoch)  # an epoch's draws depend on its number alone, so a resumed run repeats them
    TRAIN_SAMPLER.epoch = epoch
    learning_rate = OPTIMIZER.param_groups[0]["lr"]
    trained = train_one_epoch(
        PARALLEL_MODEL,
        TRAIN_LOADER,
        CRITERION,
        OPTIMIZER,
        SCALER,
        DEVICE,
        frame_weight=CONFIG.FRAME_LOSS_WEIGHT,
        gradient_clip=CONFIG.GRADIENT_CLIP,
        average=AVERAGE,
        title=f"epoch {epoch}",
    )
    candidate = AVERAGE or PARALLEL_MODEL
    validated = validate(candidate, VAL_LOADER, CRITERION, DEVICE, frame_weight=CONFIG.FRAME_LOSS_WEIGHT)
    last_seconds = time.time() - epoch_started
    is_best = STOPPER.update(epoch, validated.auc, validated.loss)
    SCHEDULER.step(validated.loss)
    HISTORY.append(
        {
            "epoch": epoch,
            "train_loss": trained.loss,
            "train_auc": trained.auc,
            "val_loss": validated.loss,
            "val_auc": validated.auc,
            "learning_rate": learning_rate,
            "clips_per_second": len(trained.labels) / trained.seconds,
            "seconds": last_seconds,
            "best": is_best,
        }
    )
    if is_best:
        temperature = fit_temperature(validated.logits, validated.labels)
        threshold = fit_threshold(probabilities(validated.logits, temperature), validated.labels)
        save_checkpoint(BEST_MODEL, model_file(unwrapped(candidate), CONFIG, temperature, threshold, HISTORY[-1]))
    states = {name: part.state_dict() for name, part in RESUMABLE.items()}
    save_checkpoint(LAST_CHECKPOINT, {**states, "history": HISTORY, "settings": RUN_SETTINGS})
    save_csv(pd.DataFrame(HISTORY), HISTORY_FILE)
    print(
        f"epoch {epoch:2}  loss {trained.loss:.4f}  val loss {validated.loss:.4f}  val AUC {validated.auc:.3f}"
        f"{' *' if is_best else '  '}  lr {learning_rate:.0e}  {HISTORY[-1]['clips_per_second']:.1f} clips/s",
        flush=True,
    )
free_memory()

# %%
if HISTORY:
    save_csv(pd.DataFrame(HISTORY), HISTORY_FILE)
    save_figure(plot_history(pd.DataFrame(HISTORY)), CONFIG.work_dir / "results" / "training_history.png")
    if STOPPER.should_stop:
        print(f"Stopped: none of the last {STOPPER.patience} epochs was better than {STOPPER.best_epoch}.")
