import dataclasses
import math

import pandas as pd
import pytest
import torch

import cell_06_loss_and_utils as cell
from cell_02_global_config import CONFIG


def test_focal_loss_by_hand():
    loss = cell.FocalLoss(gamma=2.0)(torch.tensor([0.0, math.log(9)]), torch.tensor([1.0, 1.0]))
    assert loss.item() == pytest.approx((0.5**2 * math.log(2) + 0.1**2 * -math.log(0.9)) / 2)


def test_gamma_zero_is_cross_entropy():
    logits, targets = torch.randn(50), torch.randint(0, 2, (50,)).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert torch.allclose(cell.FocalLoss(0.0)(logits, targets), expected)
    assert cell.build_loss(dataclasses.replace(CONFIG, LOSS="bce")).gamma == 0
    assert cell.build_loss(CONFIG).gamma == CONFIG.FOCAL_GAMMA


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_give_finite_gradients(gamma):
    logits = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    cell.FocalLoss(gamma)(logits, torch.tensor([1.0, 1.0, 0.0])).backward()
    assert torch.isfinite(logits.grad).all()


def test_early_stopping_counts_epochs_without_a_better_auc_and_loss_breaks_ties():
    stopper = cell.EarlyStopping(patience=2)
    assert stopper.update(1, 0.7, 0.5)
    assert stopper.update(2, 0.7, 0.4)
    assert not stopper.update(3, 0.6, 0.1) and not stopper.should_stop
    assert not stopper.update(4, 0.7, 0.4) and stopper.should_stop
    assert stopper.best_epoch == 2


def test_early_stopping_survives_a_checkpoint(tmp_path):
    stopper = cell.EarlyStopping(3)
    stopper.update(1, 0.7, 0.5)
    stopper.update(2, 0.6, 0.5)
    cell.save_checkpoint(tmp_path / "c.pth", {"stopper": stopper.state_dict()})
    again = cell.EarlyStopping(3)
    again.load_state_dict(torch.load(tmp_path / "c.pth", weights_only=True)["stopper"])
    assert vars(again) == vars(stopper)


def test_the_average_follows_weights_and_statistics():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = cell.averaged(model, 0.9)
    average.update_parameters(model)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 1
    average.update_parameters(model)
    inner = cell.unwrapped(average)
    assert torch.allclose(inner[0].weight, before + 0.1)
    assert torch.allclose(inner[1].running_mean, torch.full((2,), 0.1))
    assert cell.averaged(model, 0.0) is None and cell.unwrapped(torch.nn.DataParallel(model)) is model


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "c.pth"
    cell.save_checkpoint(file, {"epoch": 1})

    def dies_half_way(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies_half_way)
    with pytest.raises(OSError, match="disk full"):
        cell.save_checkpoint(file, {"epoch": 2})
    assert torch.load(file, weights_only=True) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


def test_only_settings_that_shape_the_result_keep_a_run_from_going_on():
    saved = dataclasses.asdict(CONFIG)
    assert cell.settings_changed(saved, {**saved, "EPOCHS": 99, "WORK_DIR": "elsewhere", "NUM_WORKERS": 7}) == []
    assert cell.settings_changed(saved, {**saved, "LEARNING_RATE": 0.5, "BACKBONE": "resnet18"}) == [
        "BACKBONE: 'resnet50' then, 'resnet18' now",
        "LEARNING_RATE: 0.0001 then, 0.5 now",
    ]


def test_the_fingerprint_of_the_data_ignores_where_it_is_mounted():
    rows = pd.DataFrame(
        {"path": ["/a/x.mp4", "/a/y.mp4"], "method": ["real", "x"], "group": ["g", "h"], "split": ["train"] * 2}
    )
    moved = rows.assign(path=["/b/x.mp4", "/b/y.mp4"], group=["data/g", "data/h"])
    assert cell.data_fingerprint(rows) == cell.data_fingerprint(moved.iloc[::-1])
    assert cell.data_fingerprint(rows) != cell.data_fingerprint(rows.assign(split=["train", "val"]))


def test_the_model_file_holds_no_paths_of_this_machine():
    config = dataclasses.replace(CONFIG, DATA_DIR="/home/me/data", WORK_DIR="/home/me/work")
    content = cell.model_file(torch.nn.Linear(1, 1), config, 1.5, 0.4, {"epoch": 3, "val_auc": 0.9, "val_loss": 0.1})
    assert "/home/me" not in str(content) and content["temperature"] == 1.5 and content["epoch"] == 3
