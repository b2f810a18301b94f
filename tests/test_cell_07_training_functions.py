import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import cell_07_training_functions as cell
from cell_02_global_config import CONFIG
from cell_05_model_definition import Output
from cell_06_loss_and_utils import FocalLoss

CPU = torch.device("cpu")


class Bright(Dataset):
    """Clips of 2 x 8 x 8 pixels whose label is their brightness."""

    def __len__(self):
        return 21

    def __getitem__(self, row):
        clip = torch.full((2, 8, 8, 3), 40 + 170 * (row % 2), dtype=torch.uint8)
        return clip, torch.tensor(float(row % 2)), row


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, clips):
        frame_logits = self.linear(clips.mean(dim=(2, 3, 4))[..., None]).squeeze(-1)
        return Output(frame_logits.mean(dim=1), frame_logits, torch.full_like(frame_logits, 0.5))


def trained(model, epochs=1, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    loader = DataLoader(Bright(), 4)
    return [
        cell.train_one_epoch(model, loader, FocalLoss(0.0), optimizer, scaler, CPU, **options) for _ in range(epochs)
    ]


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


def test_a_loss_that_is_not_a_number_ends_the_run_with_advice():
    model = Tiny()
    with torch.no_grad():
        model.linear.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="epoch 3: the loss is nan.*LEARNING_RATE"):
        trained(model, title="epoch 3")


def test_validation_scores_every_clip_once_in_order_whatever_the_batch_size():
    torch.manual_seed(0)
    model = Tiny()
    found = [cell.validate(model, DataLoader(Bright(), size), FocalLoss(2.0), CPU) for size in (1, 4, 21)]
    for scores in found:
        assert scores.rows.tolist() == list(range(21)) and scores.labels.sum() == 10
        assert np.allclose(scores.logits, found[0].logits) and scores.loss == pytest.approx(found[0].loss)
        assert scores.frame_logits.shape == scores.attention.shape == (21, 2)


def test_validation_changes_nothing():
    model = torch.nn.Sequential(torch.nn.BatchNorm3d(2), Tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cell.validate(model, DataLoader(Bright(), 4), FocalLoss(2.0), CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_error_while_reading_a_batch_reaches_the_caller():
    class Broken(Bright):
        def __getitem__(self, row):
            if row == 9:
                raise OSError("clip 9 is gone")
            return super().__getitem__(row)

    with pytest.raises(OSError, match="clip 9 is gone"):
        list(cell.device_batches(DataLoader(Broken(), 4), CPU))


def test_the_frame_loss_uses_the_clips_label():
    output = Output(torch.zeros(2), torch.tensor([[9.0, 9.0], [-9.0, -9.0]]), torch.zeros(2, 2))
    criterion, labels = FocalLoss(0.0), torch.tensor([1.0, 0.0])
    assert cell.total_loss(output, labels, criterion, 1.0).item() == pytest.approx(math.log(2), abs=1e-3)
    assert cell.total_loss(output, 1 - labels, criterion, 1.0).item() == pytest.approx(math.log(2) + 9, abs=1e-3)


def test_precision_on_the_cpu_is_full_unless_asked_for():
    assert cell.amp_dtype("auto", CPU) is None and cell.amp_dtype("off", CPU) is None
    assert cell.amp_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_precision_on_a_gpu_follows_what_it_computes_natively(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cell.amp_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(("room", "chosen"), [(100, 8), (5, 4), (1, 1)])
def test_the_batch_is_the_largest_that_fits(monkeypatch, room, chosen):
    monkeypatch.setattr(cell, "step_fits", lambda config, device, precision, batch: batch <= room)
    assert cell.choose_batch_size(CONFIG, torch.device("cuda"), None) == chosen


def test_a_gpu_too_small_for_one_clip_is_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(cell, "step_fits", lambda *_: False)
    with pytest.raises(RuntimeError, match="lower FRAMES_PER_VIDEO"):
        cell.choose_batch_size(CONFIG, torch.device("cuda"), None)


def test_a_step_that_runs_out_of_memory_does_not_fit(monkeypatch):
    class Greedy(Tiny):
        def forward(self, clips):
            if len(clips) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(clips)

    monkeypatch.setattr(cell, "build_model", lambda config: Greedy())
    assert cell.step_fits(CONFIG, CPU, None, 2) and not cell.step_fits(CONFIG, CPU, None, 4)
