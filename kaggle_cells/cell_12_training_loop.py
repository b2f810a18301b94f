# %% [markdown]
# <a id="section-12"></a>
# ## 12. Training
#
# After each epoch the model is validated, and everything needed to resume is saved. The weights of
# the best epoch, marked with a star, are kept with their calibration. `lr` is the learning rate.
#
# (Not on Kaggle: `torchrun --nproc_per_node=4 kaggle_cells/cell_12_training_loop.py` trains on all
# GPUs of a machine, and `python kaggle_cells/cell_14_results_summary.py` evaluates the model.)

# %%
import time

import pandas as pd
from IPython.display import DisplayHandle

import cell_01_imports_and_setup as cell_01
from cell_02_global_config import CONFIG, seed_everything
from cell_04_dataset_class import PairedGenerator
from cell_06_loss_and_utils import best_epoch, free_memory, model_file, should_stop, unwrapped
from cell_07_training_functions import Scores, broadcast_object, train_one_epoch, validate
from cell_08_evaluation_functions import CHANGES, calibrate, plot_history
from cell_10_data_loaders import DEVICE, SPLIT_TABLES, TEST_LOADER, TRAIN_LOADER, VAL_LOADER
from cell_11_model_setup import HISTORY, RUN_STATE, SCHEDULER, TRAINED_ON, TRAINER

BEST_MODEL = RUN_STATE.best_file


def history_row(epoch: int, trained: Scores, validated: Scores) -> dict:
    """An epoch's row in the history, without what is known only at its end."""
    return {
        "epoch": epoch,
        "train_loss": trained.loss,
        "train_auc": trained.auc,
        "val_loss": validated.loss,
        "val_auc": validated.auc,
        "learning_rate": TRAINER.optimizer.param_groups[0]["lr"],
        "skipped_steps": trained.skipped,
        "clips_per_second": len(trained.labels) / trained.seconds,
    }


def show_history(shown: DisplayHandle | None = None) -> DisplayHandle | None:
    """Write the history as a table and as curves, which take the place of those shown before."""
    table, file = pd.DataFrame(HISTORY), CONFIG.work_dir / "results" / "training_history.csv"
    cell_01.save_csv(table, file)
    return cell_01.show_figure(plot_history(table), file.with_suffix(".png"), shown)


def print_epoch(row: dict) -> None:
    skipped = f"  skipped steps: {row['skipped_steps']}" if row["skipped_steps"] else ""
    print(
        f"epoch {row['epoch']:2}  loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  "
        f"val AUC {row['val_auc']:.3f}{' *' if row['best'] else '  '}  "
        f"lr {row['learning_rate']:.0e}  {row['clips_per_second']:.1f} clips/s{skipped}",
        flush=True,
    )


# %% [markdown]
# **Time budget.** Training stops while there is time left for the results: the test itself, figures
# and explanations, and the degraded copies of the test videos.


# %%
def is_out_of_time(epoch_seconds: float, test_seconds: float) -> bool:
    """Whether another epoch, and the results, would pass the budget: the same in all processes.

    Takes the seconds of the slowest epoch so far (0 before the first) and of a pass over the test.
    """
    degraded = min(1, CONFIG.ROBUSTNESS / max(1, len(SPLIT_TABLES["test"]))) * len(CHANGES)
    needed = 1.1 * epoch_seconds + (2 + degraded) * test_seconds
    passed = time.time() - cell_01.STARTED + needed > CONFIG.time_budget
    return broadcast_object(epoch_seconds > 0 and passed)


# %%
if TRAINER.interrupted:  # its weights are those of no epoch
    raise RuntimeError("Training was interrupted within an epoch: run section 11, then this one")
# No process waits for another in validation.
trained_model = unwrapped(TRAINER.model) if cell_01.WORLD_SIZE > 1 else TRAINER.model
scored_model = TRAINER.average or trained_model
curves = show_history() if HISTORY and cell_01.RANK == 0 else None  # of earlier sessions
slowest_epoch, test_seconds = max((row["seconds"] for row in HISTORY), default=0.0), 0.0

while len(HISTORY) < CONFIG.EPOCHS and not should_stop(HISTORY, CONFIG.PATIENCE):
    if is_out_of_time(slowest_epoch, test_seconds):
        needed, budget = map(cell_01.duration, (slowest_epoch, CONFIG.time_budget))
        print(
            f"Stopped after {len(HISTORY)} of {CONFIG.EPOCHS} epochs: one more, of {needed}, passes"
            f" the time budget of {budget}. Run again to resume, with time for one epoch or more."
        )
        break
    epoch, epoch_started = len(HISTORY) + 1, time.time()
    # The draws of an epoch depend on its number alone, so that a resumed run repeats them.
    seed_everything(CONFIG.SEED, epoch, cell_01.RANK)
    same = 0.5 if CONFIG.AUGMENTATION == "robust" else 1.0
    draws = PairedGenerator(DEVICE, [CONFIG.SEED, epoch], cell_01.RANK, cell_01.WORLD_SIZE, same)
    TRAIN_LOADER.batch_sampler.set_epoch(epoch)
    batches = len(TRAIN_LOADER) + len(VAL_LOADER)
    with cell_01.progress_bar(title=f"epoch {epoch}", total=batches, unit="batch") as bar:
        trained = train_one_epoch(TRAINER, TRAIN_LOADER, DEVICE, draws, epoch, CONFIG, bar)
        validated = validate(scored_model, VAL_LOADER, TRAINER.criterion, DEVICE, bar=bar)
    row = history_row(epoch, trained, validated)
    SCHEDULER.step(validated.loss)
    HISTORY.append(row | {"seconds": time.time() - epoch_started})
    HISTORY[-1]["best"] = best_epoch(HISTORY) == epoch
    if HISTORY[-1]["best"]:
        calibration = calibrate(validated.logits, validated.labels)
        network = unwrapped(scored_model)
        RUN_STATE.best |= model_file(network, CONFIG, calibration, TRAINED_ON, row)
    if cell_01.RANK == 0:
        RUN_STATE.save()
        curves = show_history(curves)
    TRAINER.interrupted = False
    slowest_epoch = max(slowest_epoch, time.time() - epoch_started)
    test_seconds = validated.seconds * len(TEST_LOADER) / max(len(VAL_LOADER), 1)
    print_epoch(HISTORY[-1])

# %%
free_memory()
if should_stop(HISTORY, CONFIG.PATIENCE):
    print(f"Stopped: {CONFIG.PATIENCE} epochs in a row were not better than {best_epoch(HISTORY)}.")
if cell_01.WORLD_SIZE > 1:
    print("Evaluate with the same variables set: python kaggle_cells/cell_14_results_summary.py")
