"""Training that is killed, runs out of memory or is shared by processes ends as if undisturbed."""

import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import processes
import pytest
import torch
from conftest import CI, in_environment, program_file
from conftest import run_program as run

TIMES = ["seconds", "clips_per_second"]
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
SECTION_12 = "import cell_12_training_loop"


@pytest.fixture(scope="module")
def shared(its_clips):
    """Parameters of three epochs on the clips that are there already: three batches an epoch."""
    return {
        **CI,
        **its_clips,
        "BACKBONE": "shufflenet_v2_x0_5",
        "EMA_DECAY": 0.9,
        "EPOCHS": 3,
        "LR_PATIENCE": 0,
    }


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "training_history.csv").drop(columns=TIMES)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "models" / "last_checkpoint.pth", weights_only=True)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, without times."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            k: v
            for key, part in items
            if key not in TIMES
            for k, v in flat(part, f"{name}/{key}").items()
        }
    return {name: value}


def same_end(first: Path, second: Path) -> None:
    """Bit for bit: history, weights, average, optimizer, scheduler, and the best model."""
    assert history(first).equals(history(second))
    one, two = flat(checkpoint(first)), flat(checkpoint(second))
    assert one.keys() == two.keys() and any("average" in name for name in one)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[name]), name
        elif "settings" not in name:
            assert value == two[name], name
    models = [
        torch.load(folder / "models" / "best_model.pth", weights_only=True)
        for folder in (first, second)
    ]
    assert all(
        torch.equal(models[0]["model"][name], value) for name, value in models[1]["model"].items()
    )


@pytest.fixture(scope="module")
def uninterrupted(shared, tmp_path_factory) -> Path:
    """Three epochs at once."""
    folder = tmp_path_factory.mktemp("training") / "whole"
    run(SECTION_12, folder, **shared)
    saved = checkpoint(folder)
    parts = {"model", "average", "optimizer", "scheduler", "scaler"}
    figures = {
        "format",
        "epoch",
        "history",
        "best",
        "settings",
        "batch_size",
        "precision",
        "initial_weights",
    }
    assert len(history(folder)) == saved["epoch"] == 3 and saved.keys() == parts | figures
    assert (
        history(folder).learning_rate.min() < CI["LEARNING_RATE"]
    )  # LR_PATIENCE 0: some epoch was worse
    return folder


def at_step(number: int, event: str) -> str:
    """A program in which something happens instead of one of the training's steps."""
    return f"""
import cell_07_training_functions as cell
steps, take_step = [], cell.Trainer.step
def step(self, *batch):
    steps.append(batch)
    if len(steps) == {number}:
        {event}
    return take_step(self, *batch)
cell.Trainer.step = step
"""


# Killed


def test_a_run_killed_in_the_middle_of_an_epoch_resumes_to_the_identical_end(
    shared, uninterrupted, tmp_path
):
    run(at_step(8, KILL) + SECTION_12, tmp_path, expect=-9, **shared)
    assert checkpoint(tmp_path)["epoch"] == len(history(tmp_path)) == 2
    assert "Resuming after epoch 2" in run(SECTION_12, tmp_path, **shared)
    same_end(uninterrupted, tmp_path)


@pytest.mark.parametrize(
    ("moment", "program"),
    [
        pytest.param(
            "half of it written",
            f"""
import torch
save = torch.save
def half(content, file):
    save(content, file)
    if content.get("epoch") == 2 and "optimizer" in content:
        os.truncate(file, os.path.getsize(file) // 2)
        {KILL}
torch.save = half
""",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "the old one moved, the new one not yet in its place",
            f"""
replace = os.replace
def between(source, target):
    is_last = os.path.basename(target) == "last_checkpoint.pth"
    if is_last and os.path.exists("models/previous_checkpoint.pth"):
        {KILL}
    replace(source, target)
os.replace = between
""",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_killed_while_it_writes_its_checkpoint_resumes_from_a_good_one(
    shared, uninterrupted, tmp_path, moment, program
):
    run(program + SECTION_12, tmp_path, expect=-9, **shared)
    assert "Resuming after epoch" in run(SECTION_12, tmp_path, **shared), moment
    same_end(uninterrupted, tmp_path)
    assert not list((tmp_path / "models").glob(".partial-*"))


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    shared, uninterrupted, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "models" / "last_checkpoint.pth"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    output = run(SECTION_12, tmp_path, **shared)
    assert "last_checkpoint.pth is damaged" in output and "Resuming after epoch 2" in output
    same_end(uninterrupted, tmp_path)


def test_a_run_that_replaces_an_older_one_never_falls_back_to_that(shared, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    run(at_step(5, KILL) + SECTION_12, tmp_path, expect=-9, **{**shared, "RESUME": False})
    (tmp_path / "models" / "last_checkpoint.pth").write_bytes(b"damaged")
    output = run(SECTION_12, tmp_path, **shared)
    assert "is damaged or not a checkpoint" in output and "Resuming" not in output
    same_end(uninterrupted, tmp_path)


def test_a_finished_run_is_not_repeated_and_its_best_model_is_restored(
    shared, uninterrupted, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "best_model.pth").unlink()
    output = run(SECTION_12, tmp_path, **shared)
    assert "Training is finished after epoch 3" in output and "\nepoch " not in output
    same_end(uninterrupted, tmp_path)


def test_a_resumed_run_asks_for_no_pretrained_weights_and_still_says_with_which_it_began(
    shared, tmp_path
):
    program = """
import cell_05_model_definition as cell
def refused(*given):
    print("asked for weights")
    raise OSError("no internet")
cell.imagenet_weights = refused
"""
    parameters = {**shared, "PRETRAINED": True}
    first = run(program + SECTION_12, tmp_path, **{**parameters, "EPOCHS": 1})
    assert "asked for weights" in first
    section_11 = "from cell_11_model_setup import WEIGHTS_ORIGIN\nprint(WEIGHTS_ORIGIN)\n"
    resumed = run(program + section_11, tmp_path, **{**parameters, "EPOCHS": 2})
    assert "asked for weights" not in resumed and "starts from random weights" not in resumed
    assert resumed.rstrip().endswith("could not be downloaded (no internet)")


def test_stopped_by_hand_in_a_notebook_training_asks_to_go_back_to_the_last_whole_epoch(
    shared, uninterrupted, tmp_path
):
    program = (
        at_step(8, "raise KeyboardInterrupt")
        + """
import importlib
try:
    import cell_12_training_loop
except KeyboardInterrupt:
    pass
try:
    import cell_12_training_loop
except RuntimeError as error:
    print(error)
import cell_11_model_setup
importlib.reload(cell_11_model_setup)
import cell_12_training_loop
"""
    )
    output = run(program, tmp_path, **shared)
    assert "interrupted within an epoch: run section 11" in output
    assert "Resuming after epoch 2" in output
    same_end(uninterrupted, tmp_path)


def test_on_kaggle_training_resumes_from_an_attached_output(shared, uninterrupted, tmp_path):
    attached = f"""
import cell_06_loss_and_utils as cell
cell.attached_checkpoints = lambda: [{{}}]
{SECTION_12}
"""
    before = tmp_path / "before"
    (before / "models").mkdir(parents=True)
    second_epoch = uninterrupted / "models" / "previous_checkpoint.pth"
    shutil.copy(second_epoch, before / "models" / "last_checkpoint.pth")
    found = attached.format(
        f"__import__('pathlib').Path({str(before / 'models' / 'last_checkpoint.pth')!r})"
    )
    after = tmp_path / "after"
    assert f"Resuming after epoch 2 of {before}" in run(found, after, **shared)
    same_end(uninterrupted, after)


# Settings


def test_another_seed_gives_another_history(shared, uninterrupted, tmp_path):
    run(SECTION_12, tmp_path, **{**shared, "EPOCHS": 1, "SEED": 43})
    assert history(tmp_path).train_loss[0] != history(uninterrupted).train_loss[0]


def test_other_settings_are_refused_before_anything_is_overwritten(shared, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.[cp][st][vh]")}
    output = run(
        SECTION_12,
        tmp_path,
        expect=1,
        **{**shared, "MAX_VIDEOS_PER_CLASS": 8, "LEARNING_RATE": 0.01},
    )
    assert "MAX_VIDEOS_PER_CLASS: 12 then, 8 now\n  LEARNING_RATE: 0.0003 then, 0.01 now" in output
    assert len(before) > 5 and before == {file: file.stat().st_mtime_ns for file in before}


def test_other_videos_are_refused_before_the_tables_are_overwritten(
    shared, uninterrupted, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "data" / "train.csv").read_bytes()
    table = pd.concat(
        pd.read_csv(tmp_path / "data" / f"{name}.csv") for name in ("train", "val", "test")
    )
    fewer = table.drop(index=table.index[table.split == "train"][:1])
    fewer[["path", "label", "method", "group", "split"]].to_csv(tmp_path / "fewer.csv", index=False)
    output = run(SECTION_12, tmp_path, expect=1, **{**shared, "DATA_DIR": tmp_path / "fewer.csv"})
    assert "DATA: '24 videos" in output and (tmp_path / "data" / "train.csv").read_bytes() == before


def test_an_interrupted_run_without_time_for_another_epoch_ends_with_what_it_has(
    shared, uninterrupted, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    output = run(SECTION_12, tmp_path, **{**shared, "EPOCHS": 4, "TIME_BUDGET_HOURS": 1e-6})
    assert "Stopped after 3 of 4 epochs" in output and len(history(tmp_path)) == 3


def test_training_stops_while_there_is_time_left_for_the_results(shared, tmp_path):
    """Epochs of five minutes in a quarter of an hour: the third would end on the last second."""
    program = """
import time, cell_07_training_functions as cell
clock, passed, take_step = time.time, [], cell.Trainer.step
time.time = lambda: clock() + 100 * len(passed)
def step(self, *batch):
    passed.append(batch)
    return take_step(self, *batch)
cell.Trainer.step = step
"""
    output = run(program + SECTION_12, tmp_path, **{**shared, "TIME_BUDGET_HOURS": 0.25})
    assert (
        "Stopped after 2 of 3 epochs: one more, of 5 min" in output
        and "time budget of 15 min" in output
    )
    assert len(history(tmp_path)) == 2


def test_memory_that_runs_out_does_not_end_the_run(shared, tmp_path):
    program = """
import torch, cell_05_model_definition as cell
forward = cell.DeepfakeDetector.forward
def greedy(self, clips):
    if self.training and len(clips) > 2:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return forward(self, clips)
cell.DeepfakeDetector.forward = greedy
"""
    output = run(program + SECTION_12, tmp_path, **{**shared, "EPOCHS": 2})
    assert output.count("Memory ran out with 4 clips at once") == 1 and len(history(tmp_path)) == 2


# Several processes


def torchrun(program: str, folder: Path, **parameters: Any) -> str:
    """A program in two processes, started by the users' command; returns what both printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return processes.command(
        [*launch, program_file(folder, program)], folder, **in_environment(parameters)
    )


def together(count: int, program: str, folder: Path, expect: int = 0, **parameters: Any) -> str:
    """A program in several processes that find each other as those of torchrun do.

    All end when one fails. Returns what all printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": count,
    }
    file = program_file(folder, program)
    ranks = [{**meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    started = [
        processes.Program([file], folder, **rank, **in_environment(parameters)) for rank in ranks
    ]
    try:
        while any(process.is_running for process in started) and not any(
            process.status for process in started
        ):
            time.sleep(0.05)
        failed = [process.status for process in started if process.status]
    finally:
        for process in started:
            process.kill()
        print(printed := "\n".join(process.output for process in started))
    assert failed[:1] == [expect] * bool(expect)
    return printed


def manifest(folder: Path, run_folder: Path, val: slice) -> Path:
    """The videos of a finished run, with fewer of them to validate on."""
    tables = {
        name: pd.read_csv(run_folder / "data" / f"{name}.csv") for name in ("train", "val", "test")
    }
    tables["val"] = tables["val"].sort_values("group").iloc[val]
    file = folder / "videos.csv"
    pd.concat(tables.values())[["path", "label", "method", "group", "split"]].to_csv(
        file, index=False
    )
    return file


def two_forks(program: str, folder: Path, **parameters: Any) -> str:
    return together(2, program, folder, **parameters)


@pytest.mark.parametrize("start", [two_forks, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_validate_every_clip_once(
    start, finished_run, shared, tmp_path
):
    """Five clips to validate do not divide by two.

    Without what processes draw for themselves, or do not synchronise on CPUs: augmentation,
    dropout, batch normalisation.
    """
    videos = manifest(tmp_path, finished_run.folder, slice(5))
    alike = {"AUGMENTATION": "none", "SELF_BLEND": 0, "DROPOUT": 0.0, "LEARNING_RATE": 1e-5}
    parameters = {**shared, **alike, "DATA_DIR": videos, "EPOCHS": 2}
    program = f"""
import cell_01_imports_and_setup as helpers
if os.environ.get("RANK") == "1":
    helpers.replacing = None  # through which everything is written
import cell_05_model_definition as model
from torch import nn
layers = nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
model.build_backbone = lambda name, image_size: (nn.Sequential(*layers), 32)
{SECTION_12} as cell
print("validated", cell.validated.rows.tolist())
"""
    outputs = (
        run(program, tmp_path / "one", **parameters),
        start(program, tmp_path / "two", **parameters),
    )
    assert all("validated [0, 1, 2, 3, 4]" in output for output in outputs)
    assert (
        "Batches of 4 clips, shared by 2 processes" in outputs[1]
        and outputs[1].count("videos taken") == 1
    )
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    for column in ("val_loss", "val_auc", "train_loss", "train_auc"):
        assert two[column].to_numpy() == pytest.approx(one[column].to_numpy(), abs=1e-3), column
    weights = [
        torch.load(tmp_path / name / "models" / "best_model.pth", weights_only=True)
        for name in ("one", "two")
    ]
    assert weights[0]["model"].keys() == weights[1]["model"].keys()


PREPARATION = f"""
import cell_03_data_processing as cell
rank, made, make_clip = os.environ.get("RANK", "0"), [], cell.make_clip
def noted(path, *how):
    made.append(path)
    with open(f"made-{{rank}}.txt", "a") as stream:
        print(path.name, file=stream)
    if len(made) == int(os.environ.get("KILLED_AT", 0)) and rank == "1":
        {KILL}
    if path.name == "0003.mp4":
        raise cell.VideoError("damaged")
    return make_clip(path, *how)
cell.make_clip = noted
import cell_10_data_loaders
"""


def clips_made(folder: Path) -> dict[int, list[str]]:
    """Names of the videos whose clips each process has begun to make."""
    return {
        rank: (folder / f"made-{rank}.txt").read_text().splitlines()
        for rank in range(2)
        if (folder / f"made-{rank}.txt").exists()
    }


def split_tables(folder: Path) -> list[pd.DataFrame]:
    """What section 9 has written, without the place of the cache."""
    tables = [
        pd.read_csv(folder / "data" / f"{s}.csv") for s in ("train", "val", "test", "skipped")
    ]
    return [table.drop(columns="clip_file", errors="ignore") for table in tables]


@pytest.fixture(scope="module")
def prepared_alone(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preparation") / "alone"
    run(PREPARATION, folder, **{**shared, "CACHE_DIR": folder / "cache", "NUM_WORKERS": 1})
    return folder


def test_processes_prepare_a_share_each_and_all_have_the_tables_of_one(
    shared, prepared_alone, tmp_path
):
    parameters = {**shared, "CACHE_DIR": tmp_path / "cache", "NUM_WORKERS": 1}
    together(2, PREPARATION, tmp_path, **parameters)
    (alone,), shares = clips_made(prepared_alone).values(), clips_made(tmp_path)
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    assert abs(len(shares[0]) - len(shares[1])) <= 2
    for one, two in zip(split_tables(prepared_alone), split_tables(tmp_path), strict=True):
        pd.testing.assert_frame_equal(one, two)
    assert "damaged" in split_tables(tmp_path)[-1].reason.tolist()


@pytest.mark.slow
def test_when_one_process_is_killed_the_next_run_makes_only_what_is_missing(
    shared, prepared_alone, tmp_path
):
    parameters = {**shared, "CACHE_DIR": tmp_path / "cache", "NUM_WORKERS": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILLED_AT", "4")
        together(2, PREPARATION, tmp_path, expect=-9, **parameters)
    begun = clips_made(tmp_path)
    assert len(begun[1]) == 4
    for file in tmp_path.glob("made-*.txt"):
        file.unlink()
    together(2, PREPARATION, tmp_path, **parameters)
    again = [name for names in clips_made(tmp_path).values() for name in names]
    assert not {*begun[1][:3]} & {*again} and begun[1][3] in again
    for one, two in zip(split_tables(prepared_alone), split_tables(tmp_path), strict=True):
        pd.testing.assert_frame_equal(one, two)
    assert not list((tmp_path / "cache").glob(".partial-*"))


@pytest.mark.slow
def test_there_may_be_fewer_clips_to_validate_than_processes(finished_run, shared, tmp_path):
    videos = manifest(tmp_path, finished_run.folder, slice(2))
    parameters = {**shared, "DATA_DIR": videos, "EPOCHS": 1, "BATCH_SIZE": 0}
    program = f"""
{SECTION_12} as cell
from cell_10_data_loaders import BATCH_SIZE_USED
print("validated", cell.validated.rows.tolist(), BATCH_SIZE_USED)
"""
    assert "validated [0, 1] 24" in together(3, program, tmp_path, **parameters)
    resumed = run(program, tmp_path, **{**parameters, "EPOCHS": 2})
    assert "Batches of 24 clips on cpu" in resumed and "Resuming after epoch 1" in resumed


def test_a_batch_that_processes_cannot_share_ends_all_of_them_with_the_reason(shared, tmp_path):
    output = together(2, SECTION_12, tmp_path, expect=1, **{**shared, "BATCH_SIZE": 3})
    assert (
        "BATCH_SIZE = 3 is not a multiple of the 2 processes" in output
        and "videos taken" not in output
    )


def test_the_cells_after_training_are_not_for_torchrun(shared, tmp_path):
    output = together(
        2, "import cell_13_model_evaluation", tmp_path, expect=1, **{**shared, "EPOCHS": 1}
    )
    assert "torchrun is for cell_12_training_loop.py" in output
