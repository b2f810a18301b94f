# %% [markdown]
# <a id="section-12"></a>
# ## 12. Training
#
# After each epoch the model is validated, and everything needed to go on is written down. The weights of the best
# epoch, marked with a star, are kept, with the temperature and the threshold that fit them. `lr` is the learning rate.
#
# (Not on Kaggle: `torchrun --nproc_per_node=4 kaggle_cells/cell_12_training_loop.py` trains on all GPUs of a machine,
# and `python kaggle_cells/cell_14_results_summary.py` evaluates the model afterwards.)

# %%
import time

import pandas as pd

from cell_01_imports_and_setup import PROCESSES, RANK, STARTED, duration, save_csv, save_figure
from cell_02_global_config import CONFIG, seed_everything
from cell_04_dataset_class import PairDraws
from cell_06_loss_and_utils import free_memory, model_file, previous_of, save_checkpoint, unwrapped
from cell_07_training_functions import from_first, progress, train_one_epoch, validate
from cell_08_evaluation_functions import (
    DEGRADED_PASSES,
    fit_calibration,
    fit_threshold,
    plot_history,
    probabilities,
)
from cell_10_data_loaders import (
    BATCH_SIZE_USED,
    DEVICE,
    PRECISION,
    RUN_SETTINGS,
    SPLIT_TABLES,
    TEST_LOADER,
    TRAIN_BATCHES,
    TRAIN_LOADER,
    VAL_LOADER,
)
from cell_11_model_setup import (
    AVERAGE,
    BEST,
    BEST_MODEL,
    CRITERION,
    HISTORY,
    MODEL,
    OPTIMIZER,
    PARALLEL_MODEL,
    RESUMABLE,
    SCHEDULER,
    STOPPER,
    TRAINED_ON,
    TRAINER,
    WEIGHTS_ORIGIN,
)

if TRAINER.interrupted:  # its weights are those of no epoch
    raise RuntimeError(
        "Training was interrupted within an epoch: run cell 11, to go back to its start, then this one"
    )
HISTORY_FILE = CONFIG.work_dir / "results" / "training_history.csv"
CURVES_FILE = HISTORY_FILE.with_suffix(".png")
validated_model = AVERAGE or (
    MODEL if PROCESSES > 1 else PARALLEL_MODEL
)  # no process waits for another in validation
curves = None
if HISTORY and RANK == 0:  # of earlier sessions
    save_csv(pd.DataFrame(HISTORY), HISTORY_FILE)
    curves = save_figure(plot_history(pd.DataFrame(HISTORY)), CURVES_FILE)
test_share = min(1, CONFIG.ROBUSTNESS / max(1, len(SPLIT_TABLES["test"])))
test_passes = (
    2 + DEGRADED_PASSES * test_share
)  # the test itself, figures and explanations, robustness
slowest_epoch, test_seconds = HISTORY[-1]["seconds"] if HISTORY else 0.0, 0.0

while len(HISTORY) < CONFIG.EPOCHS and not STOPPER.should_stop:
    seconds_needed = 1.1 * slowest_epoch + test_passes * test_seconds
    if from_first(
        slowest_epoch > 0 and time.time() - STARTED + seconds_needed > CONFIG.time_budget
    ):  # all alike
        print(
            f"Stopped after {len(HISTORY)} of {CONFIG.EPOCHS} epochs: one more, of {duration(slowest_epoch)}, passes "
            f"the time budget of {duration(CONFIG.time_budget)}. Run again to go on, with time for an epoch at least."
        )
        break
    epoch, epoch_started = len(HISTORY) + 1, time.time()
    seed_everything(
        CONFIG.SEED, epoch, RANK
    )  # an epoch's draws depend on its number alone, so resuming repeats them
    draws = PairDraws(DEVICE, [CONFIG.SEED, epoch], RANK, PROCESSES)
    TRAIN_BATCHES.set_epoch(epoch)
    with progress(f"epoch {epoch}", TRAIN_LOADER, VAL_LOADER) as bar:
        trained = train_one_epoch(TRAINER, TRAIN_LOADER, DEVICE, draws, epoch, CONFIG, bar)
        frame_weight = CONFIG.FRAME_LOSS_WEIGHT
        validated = validate(
            validated_model, VAL_LOADER, CRITERION, DEVICE, frame_weight=frame_weight, bar=bar
        )
    learning_rate = OPTIMIZER.param_groups[0]["lr"]
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
            "skipped_steps": trained.skipped,
            "clips_per_second": len(trained.labels) / trained.seconds,
            "seconds": time.time() - epoch_started,
            "best": is_best,
        }
    )
    if is_best:
        temperature, offset = fit_calibration(validated.logits, validated.labels)
        threshold = fit_threshold(
            probabilities(validated.logits - offset, temperature), validated.labels
        )
        calibration = temperature, offset, threshold
        BEST |= model_file(unwrapped(validated_model), CONFIG, calibration, TRAINED_ON, HISTORY[-1])
    if RANK == 0:
        whole_run = {
            **{name: part.state_dict() for name, part in RESUMABLE.items()},
            "epoch": epoch,
            "history": HISTORY,
            "best": BEST,
            "settings": RUN_SETTINGS,
            "batch_size": BATCH_SIZE_USED,
            "precision": str(PRECISION),
            "initial_weights": WEIGHTS_ORIGIN,
        }
        save_checkpoint(CONFIG.last_checkpoint, whole_run, keep=previous_of(CONFIG.last_checkpoint))
        if epoch == 1:  # then the one before is of another run, which this one replaces
            previous_of(CONFIG.last_checkpoint).unlink(missing_ok=True)
        if is_best:
            save_checkpoint(BEST_MODEL, BEST)
        save_csv(pd.DataFrame(HISTORY), HISTORY_FILE)
        curves = save_figure(plot_history(pd.DataFrame(HISTORY)), CURVES_FILE, curves)
    TRAINER.interrupted = False
    slowest_epoch = max(slowest_epoch, time.time() - epoch_started)
    test_seconds = validated.seconds * len(TEST_LOADER) / max(len(VAL_LOADER), 1)
    skipped = f"  skipped steps: {trained.skipped}" if trained.skipped else ""
    print(
        f"epoch {epoch:2}  loss {trained.loss:.4f}  val loss {validated.loss:.4f}  val AUC {validated.auc:.3f}"
        f"{' *' if is_best else '  '}  lr {learning_rate:.0e}  {HISTORY[-1]['clips_per_second']:.1f} clips/s{skipped}",
        flush=True,
    )
free_memory()
if STOPPER.should_stop:
    print(
        f"Stopped: none of the last {STOPPER.patience} epochs was better than epoch {STOPPER.best_epoch}."
    )
if PROCESSES > 1:
    print(
        "Evaluate the model with the same DEEPFAKE_ variables: python kaggle_cells/cell_14_results_summary.py"
    )
