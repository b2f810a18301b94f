"""What only a GPU can tell, in at most ten minutes on one or two of them.

    python tests/benchmarks/gpu.py [--minutes 10]
    python tests/benchmarks/gpu.py --dry

It checks that a step never waits for the GPU, that running out of memory is answered, that a step
which is not finite changes nothing, that DataParallel trains in channels_last on every GPU, and
that all precisions agree; it makes the smallest run of the notebook in fp16 and in bf16; and it
measures where the time of a step goes, the memory of its parts, and clips per second, waiting and
memory of the default setting against the loop of `training.py`. A check that fails does not stop
the others. The last lines are a table of PASS, FAIL and figures; the exit status is 1 after a FAIL.
With one GPU, DataParallel is left out. --dry runs it small on the CPU, to show that it would run.
"""

import argparse
import copy
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
if "--dry" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kaggle_cells"))

import numpy as np
import torch
from torch import nn
from training import DEVICE, FromDevice, Ours, Peak, make_clips, plain_loop

import cell_03_data_processing as preparation
import cell_04_dataset_class as data
import cell_05_model_definition as models
import cell_06_loss_and_utils as utils
import cell_07_training_functions as training
import cell_08_evaluation_functions as evaluation
from cell_02_global_config import CONFIG, Config, seed_everything

DRY, STARTED = "--dry" in sys.argv, time.time()
BUILDER = Path(__file__).resolve().parents[2] / "build_notebook.py"
ON_GPU = DEVICE.type == "cuda"
SMALL: dict[str, Any] = dict(BACKBONE="resnet18", IMAGE_SIZE=64, FRAMES_PER_VIDEO=4)
CFG = dataclasses.replace(CONFIG, **(SMALL if DRY else {}))
HALF = torch.bfloat16 if DRY else training.amp_dtype("auto", DEVICE)
PRECISIONS = (None, torch.bfloat16) if DRY else (None, torch.float16, torch.bfloat16)
ONES = (1, 1, 1, 1)
CHECKS: list[Callable[[], str]] = []


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Register a check, which returns its figures, raises, or begins with `left out`."""
    CHECKS.append(function)
    return function


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def batch_of(count: int, config: Config = CFG) -> data.Batch:
    """Noise on the device, half of the fakes to be self-blended."""
    rng, side, frames = torch.Generator().manual_seed(0), config.IMAGE_SIZE, config.FRAMES_PER_VIDEO
    shape = (count, frames, side, side, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    landmarks, rows = torch.full((count, frames, 5, 2), math.nan), torch.arange(count)
    moved = [part.to(DEVICE) for part in (clips, landmarks, (rows % 2).float())]
    return data.Batch._make([*moved, rows, rows % 4 == 1])


def trainer_of(precision: Any = HALF, config: Config = CFG, parallel: bool = False) -> Any:
    torch.manual_seed(0)
    model = models.build_model(config).to(DEVICE).train()
    model.precision = precision
    network = nn.DataParallel(model) if parallel else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaler, average = training.LossScaler(DEVICE, precision), utils.ModelEMA(model, 0.98)
    given: Any = network, utils.FocalLoss(2.0, 0.5), optimizer, scaler, 1.0, average
    return training.Trainer(*given)


def shown(batch: data.Batch, config: Config = CFG) -> torch.Tensor:
    return data.normalize(data.augment(batch, data.PairedGenerator(DEVICE, [0]), config))


def gib_of(work: Callable[[], Any]) -> float:
    """What some work takes of the GPU beyond what is there already; 0 on the CPU."""
    utils.free_memory()
    if not ON_GPU:
        work()
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def milliseconds(work: Callable[[], Any], rounds: int = 10) -> str:
    """Medians: until the GPU has finished, and until the CPU has launched everything."""
    ended, launched = [], []
    for turn in range(3 if DRY else rounds + 3):
        wait()
        started = time.perf_counter()
        work()
        launch = time.perf_counter()
        wait()
        if turn > 1:
            launched.append(1e3 * (launch - started))
            ended.append(1e3 * (time.perf_counter() - started))
    return f"{statistics.median(ended):.1f} ms (CPU {statistics.median(launched):.1f})"


# Right


@check
def versions() -> str:
    if not ON_GPU:
        return f"torch {torch.__version__} on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cudnn = torch.backends.cudnn.version()
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, {names}, {HALF}"


@check
def no_step_waits_for_the_gpu() -> str:
    """torch's own debug mode raises an error where the CPU waits."""
    for changes in ({}, {"AUGMENTATION": "robust"}, {"GRADIENT_CHECKPOINTING": True}):
        config, batch = dataclasses.replace(CFG, **changes), batch_of(4)
        for precision in PRECISIONS:
            trainer = trainer_of(precision, config)
            for turn in range(3):
                wait()
                if ON_GPU and turn == 2:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    _, loss, _ = trainer.step(shown(batch, config), batch.labels)
                finally:
                    if ON_GPU:
                        torch.cuda.set_sync_debug_mode("default")
            assert loss.isfinite(), (changes, precision, loss)
    return ""


@check
def the_network_is_in_half_and_the_lstm_in_float32() -> str:
    for precision in PRECISIONS:
        model: Any = trainer_of(precision).model
        seen: list = []
        for part in (model.backbone, model.lstm):
            part.register_forward_hook(lambda _, given, made, s=seen: s.append((given[0], made)))
        model(shown(batch_of(2)))
        assert seen[0][1].dtype == (precision or torch.float32), seen[0][1].dtype
        assert seen[1][0].dtype == seen[1][1][0].dtype == torch.float32, seen[1][0].dtype
    clip = torch.rand(8, CFG.FRAMES_PER_VIDEO, model.lstm.input_size, device=DEVICE)
    return f"LSTM forward and backward {milliseconds(lambda: model.lstm(clip)[0].sum().backward())}"


@check
def data_parallel_trains_in_channels_last_on_every_gpu() -> str:
    if torch.cuda.device_count() < 2:
        return "left out: needs two GPUs"
    trainer, layouts = trainer_of(parallel=True), dict[Any, list[int]]()

    def look(module: nn.Module, given: Any, made: torch.Tensor) -> None:
        is_last = made.is_contiguous(memory_format=torch.channels_last)
        layouts.setdefault(made.device.index, [0, 0])[is_last] += made.shape[-1] > 1

    for module in trainer.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    for size in (8, 3, 1):
        batch = batch_of(size)
        norm = trainer.step(shown(batch), batch.labels)[2]
    assert norm.isfinite() and len(layouts) == 2
    assert all(others == 0 for others, _ in layouts.values()), layouts
    return f"convolutions in (NCHW, NHWC) by GPU: {layouts}"


@check
def two_gpus_drop_other_units() -> str:
    if torch.cuda.device_count() < 2:
        return "left out: needs two GPUs"
    seed_everything(1)
    masks = [nn.functional.dropout(torch.ones(999, device=f"cuda:{i}")).cpu() for i in range(2)]
    assert not torch.equal(*masks)
    return ""


@check
def a_step_that_is_not_finite_changes_nothing() -> str:
    for precision in PRECISIONS:
        trainer, batch = trainer_of(precision), batch_of(2)
        clips = shown(batch)
        trainer.step(clips, batch.labels)
        before = copy.deepcopy(trainer.model.state_dict())
        norm = trainer.step(clips * math.nan, batch.labels)[2]
        assert not norm.isfinite()
        after = trainer.model.state_dict()
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert not changed, changed[:3]
    return ""


@check
def precisions_agree() -> str:
    torch.manual_seed(0)
    model, clips = models.build_model(CFG).to(DEVICE).eval(), shown(batch_of(4))
    with torch.no_grad():
        exact = copy.deepcopy(model).cpu()(clips.cpu()).logit
        words = []
        for precision, limit in zip(PRECISIONS, (1e-3, 0.05, 0.2), strict=False):
            model.precision = precision
            off = float((model(clips).logit.cpu() - exact).abs().max())
            words.append(f"{precision or torch.float32} {off:.5f}")
            assert off < (0.2 if DRY else limit), words
    return f"largest difference from the CPU's logits: {', '.join(words)}"


@check
def heat_maps_do_not_change_the_verdict() -> str:
    model, clips = models.build_model(CFG).to(DEVICE).eval(), shown(batch_of(1))
    with torch.inference_mode():
        logit = model(clips).logit.item()
    heat, output = evaluation.heat_maps(model, clips)
    assert heat.isfinite().all() and abs(output.logit.item() - logit) < 0.01
    model.train()(clips).logit.sum().backward()
    return ""


@check
def running_out_of_memory_is_answered() -> str:
    """With room for a part of a batch, in a training step and in validation."""
    if not ON_GPU:
        return "left out: needs a GPU"
    trainer, batch = trainer_of(), batch_of(8)
    clips = shown(batch)
    trainer.step(clips[:2], batch.labels[:2])
    utils.free_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 1.5 * 2**30
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        _, loss, norm = trainer.step(clips, batch.labels)
        fits = training.choose_batch_size(CFG, DEVICE, HALF)
        rows: Any = [batch_of(64)]
        trainer.model.precision = None
        scores = training.score_batches(
            trainer.average, rows, trainer.criterion, DEVICE, training.NO_BAR
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.micro_batch and loss.isfinite() and norm.isfinite(), trainer.micro_batch
    assert sum(len(part.logits) for part in scores) == 64
    words = f"parts of {trainer.micro_batch} clips in training, {len(scores)} parts in validation"
    everything = training.choose_batch_size(CFG, DEVICE, HALF)
    return f"{words}; batch size {fits} with 1.5 GiB, {everything} with all"


@check
def faces_in_several_threads_are_the_same() -> str:
    with tempfile.TemporaryDirectory() as folder:
        videos = sorted(preparation.make_demo_set(Path(folder), 2, 1, 2).rglob("*.mp4"))
        frames = [preparation.read_frames(video, 8, 8.0)[0] for video in videos]
    detector, seconds = preparation.load_face_detector(str(DEVICE)), dict[int, float]()
    boxes: dict[int, list] = {}
    for threads in (1, 1, 4):  # the first time loads libraries
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            boxes[threads] = [*pool.map(lambda clip: preparation.find_face(clip, detector), frames)]
        seconds[threads] = time.perf_counter() - started
    off = max(np.abs(a[0] - b[0]).max() for a, b in zip(boxes[1], boxes[4], strict=True))
    assert off < 1, off
    return f"{len(frames)} videos in {seconds[1]:.2f} s, in 4 threads {seconds[4]:.2f} s"


def smallest_run(precision: str) -> str:
    """The notebook with ci.yaml, from its demo set to its report."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(BUILDER), "run", "ci", "--output", folder, "-p", "AMP"]
        done = subprocess.run([*words, precision], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-500:] or done.stdout[-500:]
        report = Path(folder, "results", "experiment_report.txt").read_text(encoding="utf-8")
    return next((line.strip() for line in report.splitlines() if "AUC" in line), "")


@check
def the_smallest_run_in_fp16() -> str:
    return smallest_run("fp16") if ON_GPU else "left out: needs a GPU"


@check
def the_smallest_run_in_bf16() -> str:
    return smallest_run("bf16")


# Fast


@check
def where_the_time_of_a_step_goes() -> str:
    """Where the CPU is busy as long as the whole takes, the GPU waits for the CPU."""
    trainer, batch = trainer_of(), batch_of(2 if DRY else 8)
    clips, model, random = shown(batch), trainer.model, data.PairedGenerator(DEVICE, [0])
    host = batch.clips.cpu().pin_memory() if ON_GPU else batch.clips
    plain = data.to_float(batch.clips)
    flat = training.flat_statistics(model)
    finite = torch.zeros((), dtype=torch.bool, device=DEVICE)

    def network() -> None:
        trainer.optimizer.zero_grad()
        trainer.add_gradients(len(clips), clips, batch.labels)

    parts = {
        "whole step": lambda: trainer.step(shown(batch), batch.labels),
        "copy to the GPU": lambda: host.to(DEVICE, non_blocking=True),
        "augmentation": lambda: data.augment(batch, random, CFG),
        ".. of it compression": lambda: data.compress(
            plain, random.sometimes(len(plain), 0.7, 1, *ONES)
        ),
        "forward and backward": network,
        "clipping": lambda: training.clip_gradients(model, 1.0, trainer.scaler),
        "optimizer": trainer.optimizer.step,
        "statistics kept": lambda: training.roll_back(model, flat, finite),
        "average": lambda: trainer.average.update(model),
    }
    words = [f"{name} {milliseconds(part)}" for name, part in parts.items()]
    if ON_GPU:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            words.append(f"forward and backward, cudnn.benchmark {milliseconds(network)}")
    return "; ".join(words)


@check
def memory_of_the_parts() -> str:
    count, trainer = 2 if DRY else 8, trainer_of()
    batch, model = batch_of(count), trainer.model
    clips = shown(batch)
    words = [f"augmentation {gib_of(lambda: shown(batch)):.2f}"]
    words += [f"training step {gib_of(lambda: trainer.step(clips, batch.labels)):.2f}"]
    for precision in (HALF, None):
        model.precision = precision
        with torch.no_grad():
            words.append(f"scoring in {precision} {gib_of(lambda: model(clips)):.2f}")
    return f"GiB for {count} clips: {', '.join(words)}"


@check
def against_the_plain_loop() -> str:
    """The default setting: clips a second, share of the time that waits for data, peak memory."""
    count, batch = (16, 4) if DRY else (96, 8)
    with tempfile.TemporaryDirectory() as folder:
        table = make_clips(Path(folder), count, CFG)
        plain, plain_gib = plain_loop(table, CFG, batch)
        utils.free_memory()
        memory, ours = Peak(), Ours(table, CFG, batch)
        ours.warm_up()
        speed, gib = ours.epoch(), memory.gib()
        waits = 1 - speed / ours.epoch(FromDevice(ours.loader))
        words = f"plain loop in float32 {plain:.1f} clips/s, {plain_gib:.2f} GiB; "
        words += f"ours {speed:.1f} clips/s, {gib:.2f} GiB, ratio {speed / plain:.2f}, "
        words += f"{100 * waits:.0f} % of the time waits for data"
        if torch.cuda.device_count() > 1:
            both = Ours(table, CFG, 2 * batch, parallel=True)
            both.warm_up()
            words += f"; on two GPUs {both.epoch():.1f} clips/s"
    return words


def run(function: Callable[[], str]) -> tuple[str, str, float]:
    """The verdict on a check, its figures, its seconds."""
    started = time.perf_counter()
    try:
        words = function()
        verdict = "----" if words.startswith("left out") else "PASS"
    except Exception as error:
        traceback.print_exc(limit=4)
        verdict, words = "FAIL", f"{type(error).__name__}: {str(error)[:300]}"
    utils.free_memory()
    return verdict, words, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="small, on the CPU")
    parser.add_argument("--minutes", type=float, default=10, help="no check begins later than this")
    given = parser.parse_args()
    if not (ON_GPU or given.dry):
        parser.error("no GPU that torch can use; --dry runs it small on the CPU")
    lines, failed = [], 0
    for function in CHECKS:
        verdict, words, seconds = "----", "left out: no time", 0.0
        if time.time() - STARTED < 60 * given.minutes:
            verdict, words, seconds = run(function)
        failed += verdict == "FAIL"
        name = function.__name__.replace("_", " ")
        lines.append(f"{verdict}  {name} ({seconds:.0f} s)" + (f": {words}" if words else ""))
        print(lines[-1], flush=True)
    print(f"\n{len(lines)} checks, {failed} failed, {(time.time() - STARTED) / 60:.1f} minutes")
    print(*(line.replace("; ", ";\n        ") for line in lines), sep="\n")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
