import copy
import dataclasses
import io
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cell_07_training_functions as cell
from cell_02_global_config import CONFIG
from cell_04_dataset_class import Batch, PairedGenerator, Sample
from cell_05_model_definition import DetectorOutput
from cell_06_loss_and_utils import FocalLoss, ModelEMA

CPU = torch.device("cpu")
TWO_FRAMES = dataclasses.replace(CONFIG, FRAMES_PER_VIDEO=2)


class Bright(Dataset):
    """Clips of 2 x 8 x 8 pixels whose label is their brightness."""

    def __len__(self):
        return 21

    def __getitem__(self, row):
        clip = torch.full((2, 8, 8, 3), 40 + 170 * (row % 2), dtype=torch.uint8)
        return Batch(clip, torch.zeros(2, 5, 2), torch.tensor(float(row % 2)), row, False)

    def name(self, row, self_blend):
        return f"video{row}.mp4"


class Tiny(torch.nn.Module):
    """A network without batch normalisation. `event` changes its output `at` some of its calls."""

    def __init__(self, at=(), event=None):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))
        self.calls, self.at, self.event = 0, at, event

    def forward(self, clips):
        self.calls += 1
        frame_logits = self.linear(clips.mean(dim=(2, 3, 4))[..., None]).squeeze(-1)
        if self.calls in self.at:
            frame_logits = self.event(frame_logits)
        if self.training:
            self.mean.lerp_(frame_logits.detach().mean(), 0.1)
        return DetectorOutput(
            frame_logits.mean(dim=1), frame_logits, torch.full_like(frame_logits, 0.5)
        )


def not_a_number(logits):
    return logits * math.nan


def trainer_of(model, precision=None, frame_weight=0.0, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return cell.Trainer(
        model, FocalLoss(0.0, frame_weight), optimizer, cell.LossScaler(CPU, precision), **options
    )


def run_epoch(trainer, epoch=1, batch=4, **options):
    random = PairedGenerator(CPU, [epoch])
    return cell.train_one_epoch(
        trainer, DataLoader(Bright(), batch), CPU, random, epoch, TWO_FRAMES, **options
    )


def trained(model, epochs=1, **options):
    trainer = trainer_of(model, **options)
    return [run_epoch(trainer, epoch) for epoch in range(1, epochs + 1)]


def test_training_lowers_the_loss_until_the_classes_are_separated():
    torch.manual_seed(0)
    epochs = trained(Tiny(), 8, frame_weight=0.5, gradient_clip=1.0)
    assert epochs[-1].loss < 0.5 * epochs[0].loss and epochs[-1].auc == 1.0


def test_gradients_are_clipped():
    torch.manual_seed(0)
    model = Tiny()
    trained(model, 1, gradient_clip=1e-4)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norm <= 1.001e-4


# Steps that are not finite


def test_a_batch_that_is_not_finite_is_skipped_and_counted_and_changes_nothing():
    torch.manual_seed(0)
    model = Tiny(at=[3], event=not_a_number)
    trainer = trainer_of(model, average=ModelEMA(model, 0.5))
    states = []
    take_step = trainer.step

    def step(*batch):
        result = take_step(*batch)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return result

    trainer.step = step
    scores = run_epoch(trainer)
    assert scores.skipped == 1 and math.isfinite(scores.loss) and len(scores.labels) == 17
    assert all(torch.equal(states[2][name], states[1][name]) for name in states[1])
    assert not torch.equal(states[3]["linear.weight"], states[2]["linear.weight"])
    assert (
        0 < (trainer.average.module.linear.weight - model.linear.weight).abs() < 1
    )  # it follows, at a distance
    averages = trainer.average.module.state_dict().values()
    assert all(value.isfinite().all() for value in averages)


def test_an_infinite_loss_with_finite_gradients_is_skipped_too():
    class Infinite(FocalLoss):
        def forward(self, output, labels):
            return super().forward(output, labels) + (math.inf if model.calls == 2 else 0)

    torch.manual_seed(0)
    model = Tiny()
    trainer = trainer_of(model)
    trainer.criterion = Infinite(0.0)
    assert run_epoch(trainer).skipped == 1 and model.linear.weight.isfinite().all()


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_a_stream_of_batches_that_are_not_finite_ends_the_run_and_names_the_place(precision):
    model = Tiny(at=range(2, 99), event=not_a_number)
    with pytest.raises(FloatingPointError) as caught:
        run_epoch(trainer_of(model, precision), epoch=3)
    words = str(caught.value)
    assert (
        "epoch 3, step 6" in words
        and "Loss nan" in words
        and "loss scale" in words
        and "LEARNING_RATE" in words
    )
    assert "video20.mp4" in words and "video19.mp4" not in words


def test_bad_steps_are_counted_across_epochs_of_few_steps():
    trainer = trainer_of(Tiny(at=[1, 2, 4, 5, 6, 7, 8], event=not_a_number))
    assert run_epoch(trainer, 1, batch=7).skipped == 2
    with pytest.raises(FloatingPointError, match="epoch 2: no step has a finite loss"):
        run_epoch(trainer, 2, batch=7)
    trainer = trainer_of(Tiny(at=[4, 5, 6, 7, 8], event=not_a_number))
    assert run_epoch(trainer, 1, batch=6).skipped == 1
    with pytest.raises(FloatingPointError, match="epoch 2, step 4: 5 non-finite steps in a row"):
        run_epoch(trainer, 2, batch=6)


def test_gradients_too_large_for_fp16_are_no_error_and_soon_training_goes_on():
    torch.manual_seed(0)
    model = Tiny()
    trainer = trainer_of(model, torch.float16)
    overflow = 2.0**-9  # a gradient of the unscaled loss is this much of what fp16 can hold
    model.linear.weight.register_hook(
        lambda gradient: gradient * (math.inf if trainer.scaler.get_scale() * overflow > 1 else 1)
    )
    before = model.linear.weight.item()
    scores = [run_epoch(trainer, epoch) for epoch in range(1, 6)]
    assert scores[0].skipped > 0 == scores[-1].skipped and math.isfinite(scores[-1].loss)
    assert model.linear.weight.item() != before and model.linear.weight.isfinite().all()


def test_gradients_are_clipped_at_their_true_size_when_the_loss_is_scaled():
    model, norms = Tiny(), []
    for precision in (None, torch.float16):
        trainer = trainer_of(copy.deepcopy(model), precision, gradient_clip=1.0)
        clips, labels = torch.ones(4, 2, 3, 8, 8), torch.tensor([0.0, 1, 1, 1])
        norms.append(trainer.step(clips, labels)[2].item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.01


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("precision", [None, torch.float16])
def test_gradients_whose_norm_overflows_change_nothing(limit, precision):
    """Each of them is finite, but not the sum of their squares."""
    model = Tiny()
    trainer = trainer_of(model, precision, gradient_clip=limit)
    batch = torch.ones(4, 2, 3, 8, 8), torch.tensor([0.0, 1, 1, 1])
    trainer.step(*batch)
    before = copy.deepcopy(model.state_dict())
    model.linear.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    norm = trainer.step(*batch)[2]
    assert not norm.isfinite()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Memory


def out_of_memory_above(most):
    class Greedy(Tiny):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def forward(self, clips):
            self.sizes.append(len(clips))
            if len(clips) > most:
                self.mean += 100  # a failed attempt leaves its traces
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(clips)

    return Greedy


@pytest.mark.parametrize(("batch", "most", "micro_batch"), [(4, 3, 2), (4, 1, 1), (3, 2, 2)])
def test_when_memory_runs_out_the_batch_stays_and_so_does_what_is_learned(
    batch, most, micro_batch, capsys
):
    torch.manual_seed(0)
    plain = Tiny()
    greedy = out_of_memory_above(most)()
    greedy.load_state_dict(plain.state_dict())
    expected = run_epoch(trainer_of(plain, frame_weight=0.5, gradient_clip=1.0), batch=batch)
    trainer = trainer_of(greedy, frame_weight=0.5, gradient_clip=1.0)
    scores = run_epoch(trainer, batch=batch)
    assert trainer.micro_batch == micro_batch and max(greedy.sizes[3:]) == micro_batch
    assert (
        torch.allclose(greedy.linear.weight, plain.linear.weight, atol=1e-6)
        and greedy.mean.abs() < 10
    )
    assert scores.loss == pytest.approx(expected.loss) and np.allclose(
        scores.logits, expected.logits, atol=1e-5
    )
    assert f"Memory ran out with {batch} clips at once" in capsys.readouterr().out


def test_gradients_of_a_part_that_was_done_before_memory_ran_out_do_not_count_twice():
    def out_of_memory(logits):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    torch.manual_seed(0)
    plain, failing = Tiny(), Tiny(at=[2], event=out_of_memory)
    failing.load_state_dict(plain.state_dict())
    run_epoch(trainer_of(plain))
    run_epoch(trainer_of(failing, micro_batch=2))
    assert torch.allclose(failing.linear.weight, plain.linear.weight, atol=1e-6)


def test_when_not_even_one_clip_fits_the_error_says_what_to_do():
    with pytest.raises(
        RuntimeError, match="memory ran out with 1 clips at once. Set GRADIENT_CHECKPOINTING"
    ):
        run_epoch(trainer_of(out_of_memory_above(0)()))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_when_memory_runs_out_libraries_say_it_in_many_ways(message):
    def out_of_memory(logits):
        raise RuntimeError(message)

    trainer = trainer_of(Tiny(at=[1], event=out_of_memory))
    assert len(run_epoch(trainer).labels) == 21 and trainer.micro_batch == 2


@pytest.mark.parametrize(("batch", "most"), [(8, 5), (7, 2), (21, 3)])
def test_validation_goes_on_when_memory_runs_out_and_scores_every_clip_once(batch, most, capsys):
    torch.manual_seed(0)
    plain, greedy = Tiny(), out_of_memory_above(most)()
    greedy.load_state_dict(plain.state_dict())
    expected, found = (
        cell.validate(model, DataLoader(Bright(), batch), FocalLoss(), CPU)
        for model in (plain, greedy)
    )
    assert found.rows.tolist() == list(range(21)) and found.loss == pytest.approx(expected.loss)
    assert np.allclose(found.logits, expected.logits)
    assert sum(size > most for size in greedy.sizes) <= 3, "it remembers what fits"
    assert f"Memory ran out with {batch} clips at once" in capsys.readouterr().out


def test_a_clip_that_does_not_fit_by_itself_ends_validation_with_advice():
    with pytest.raises(RuntimeError, match="memory ran out with 1 clips at once"):
        cell.validate(out_of_memory_above(0)(), DataLoader(Bright(), 4), FocalLoss(), CPU)


def test_augmentation_goes_on_in_pairs_when_memory_runs_out(monkeypatch):
    sizes, augment = [], cell.augment

    def greedy(batch, *given):
        sizes.append(len(batch.clips))
        if len(batch.clips) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return augment(batch, *given)

    monkeypatch.setattr(cell, "augment", greedy)
    scores = run_epoch(trainer_of(Tiny()), batch=6)
    assert sorted(scores.rows.tolist()) == list(range(21))
    assert sizes == [6, 4, *[2, 2, 2] * 3, 2, 1]


@pytest.mark.parametrize("device", ["meta"])  # as a GPU is, it is not the CPU
def test_a_batch_that_has_no_room_beside_the_one_before_is_sent_after_it(device, monkeypatch):
    moves, to = [], torch.Tensor.to

    def greedy(tensor, *given, **options):
        moves.append(len(moves))
        if len(moves) == 4:  # the clips of the second batch
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *given, **options)

    monkeypatch.setattr(torch.Tensor, "to", greedy)
    batches = list(cell.device_batches(DataLoader(Bright(), 4), torch.device(device)))
    assert [len(batch.clips) for batch in batches] == [4] * 5 + [1]
    assert all(part.device.type == device for batch in batches for part in batch[:3])


def test_another_error_of_the_network_is_not_taken_for_a_lack_of_memory():
    def broken(logits):
        raise RuntimeError("shapes do not agree")

    model = Tiny(at=[1], event=broken)
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        run_epoch(trainer_of(model))
    assert model.calls == 1


def test_the_progress_bar_shows_loss_auc_rate_speed_and_memory():
    with tqdm(total=6, disable=False, file=io.StringIO()) as bar:
        run_epoch(trainer_of(Tiny(at=[2], event=not_a_number)), bar=bar)
        assert bar.n == 6
        for word in ("loss=", "AUC=", "lr=1e-01", "clips/s=", "GiB", "skipped=1"):
            assert word in bar.postfix


# Validation, and the rest


def test_validation_scores_every_clip_once_in_order_whatever_the_batch_size():
    torch.manual_seed(0)
    model = Tiny()
    found = [
        cell.validate(model, DataLoader(Bright(), size), FocalLoss(2.0), CPU) for size in (1, 4, 21)
    ]
    with torch.no_grad():
        spoilt = Tiny(at=[1], event=not_a_number)
    with pytest.raises(FloatingPointError, match="validation: the loss is nan.*LEARNING_RATE"):
        cell.validate(spoilt, DataLoader(Bright(), 4), FocalLoss(2.0), CPU)
    for scores in found:
        assert scores.rows.tolist() == list(range(21)) and scores.labels.sum() == 10
        assert np.allclose(scores.logits, found[0].logits) and scores.loss == pytest.approx(
            found[0].loss
        )
        assert scores.frame_logits.shape == (21, 2)


def test_a_process_with_stills_alone_adds_its_scores_to_those_of_videos(monkeypatch):
    def scored(row, frames):
        columns = torch.ones(1), torch.ones(1), torch.tensor([row % 2.0]), torch.tensor([row])
        return cell.BatchScores(*columns, torch.ones(1, frames))

    others = [cell.concat_scores([scored(0, 2)]), None]  # the last process had nothing to score
    monkeypatch.setattr(cell, "all_gather_object", lambda own: [own, *others])
    found = cell.scores_of([scored(1, 6), scored(2, 2)], 0.0, "validation")
    assert found.rows.tolist() == [0, 1, 2] and found.loss == 1.0
    assert np.isfinite(found.frame_logits).sum(axis=1).tolist() == [2, 6, 2]


def test_what_is_too_large_for_half_precision_is_validated_in_full(capsys):
    class Large(Tiny):
        precision = torch.float16

        def forward(self, clips):
            output = super().forward(clips)
            return (
                DetectorOutput(*(value * math.nan for value in output))
                if self.precision
                else output
            )

    model = Large()
    scores = cell.validate(model, DataLoader(Bright(), 4), FocalLoss(2.0), CPU)
    assert (
        math.isfinite(scores.loss) and len(scores.rows) == 21 and model.precision == torch.float16
    )
    assert "scoring again in float32" in capsys.readouterr().out


def test_validation_changes_nothing():
    model = torch.nn.Sequential(torch.nn.BatchNorm3d(2), Tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cell.validate(model, DataLoader(Bright(), 4), FocalLoss(2.0), CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", "meta"])  # as a GPU is, a meta device is not the CPU
def test_every_batch_gets_to_the_device_in_order_and_is_read_one_ahead(device):
    read = []

    class Counting(Bright):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    batches = cell.device_batches(DataLoader(Counting(), 4), torch.device(device))
    sizes = [len(next(batches).clips)]
    if device == "meta":
        while len(read) < 8:
            time.sleep(0.01)
    assert len(read) == {"cpu": 4, "meta": 8}[device]
    for batch in batches:
        assert all(part.device.type == device for part in batch[:3])
        assert batch.blend.device == CPU, "a step may look at it without waiting"
        sizes.append(len(batch.clips))
    assert sizes == [4] * 5 + [1] and read == list(range(21))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_error_while_reading_a_batch_reaches_the_caller(device):
    class Broken(Bright):
        def __getitem__(self, row):
            if row == 9:
                raise OSError("clip 9 is gone")
            return super().__getitem__(row)

    with pytest.raises(OSError, match="clip 9 is gone"):
        list(cell.device_batches(DataLoader(Broken(), 4), torch.device(device)))


def test_precision_on_the_cpu_is_full_unless_asked_for():
    assert cell.amp_dtype("auto", CPU) is None and cell.amp_dtype("off", CPU) is None
    assert cell.amp_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_precision_on_a_gpu_follows_what_it_computes_natively(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cell.amp_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(("room", "chosen"), [(100, 8), (8, 8), (5, 4), (1, 1)])
def test_the_batch_is_the_largest_that_a_training_step_has_memory_for(monkeypatch, room, chosen):
    monkeypatch.setattr(cell, "build_model", lambda config: out_of_memory_above(room)())
    assert cell.choose_batch_size(TWO_FRAMES, CPU, None) == chosen


def test_a_device_too_small_for_one_clip_is_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(cell, "build_model", lambda config: out_of_memory_above(0)())
    with pytest.raises(RuntimeError, match="lower FRAMES_PER_VIDEO"):
        cell.choose_batch_size(TWO_FRAMES, CPU, None)


def test_another_error_ends_the_search_for_a_batch(monkeypatch):
    def broken(logits):
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr(cell, "build_model", lambda config: Tiny(at=[1], event=broken))
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        cell.choose_batch_size(TWO_FRAMES, CPU, None)


# Validation of real videos alone


def test_self_blends_in_validation_are_fakes_and_the_same_each_time():
    class Textured(Bright):
        def __getitem__(self, index):
            row, blend, _ = index if isinstance(index, Sample) else Sample(index)
            generator = torch.Generator().manual_seed(row)
            clip = torch.randint(0, 256, (2, 24, 24, 3), generator=generator).byte()
            landmarks = torch.full((2, 5, 2), math.nan)
            return Batch(clip, landmarks, torch.tensor(float(blend)), row, blend)

    class Variance(torch.nn.Module):
        def forward(self, clips):
            logits = clips.var(dim=(2, 3, 4))
            return DetectorOutput(logits.mean(dim=1), logits, torch.full_like(logits, 0.5))

    samples = [Sample(row, blend) for row in range(6) for blend in (False, True)]
    first, second, plain = (
        cell.validate(Variance(), DataLoader(Textured(), 4, sampler=chosen), FocalLoss(), CPU)
        for chosen in (samples, samples, range(6))
    )
    assert first.rows.tolist() == [row for row in range(6) for _ in range(2)]
    assert first.labels.tolist() == [0.0, 1.0] * 6
    assert np.array_equal(first.logits, second.logits)
    assert np.array_equal(first.logits[::2], plain.logits)
    assert (first.logits[1::2] != first.logits[::2]).all()


def test_twenty_steps_on_toy_clips_lower_the_loss_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    losses = cell.plot_toy_training().axes[0].lines[0].get_ydata()
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]
    assert torch.equal(torch.get_rng_state(), state)
    plt.close("all")
