import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import cell_06_loss_and_utils as cell
from cell_02_global_config import CONFIG
from cell_05_model_definition import DetectorOutput


def test_focal_loss_by_hand():
    loss = cell.FocalLoss(gamma=2.0).of(torch.tensor([0.0, math.log(9)]), torch.tensor([1.0, 1.0]))
    assert loss.item() == pytest.approx((0.5**2 * math.log(2) + 0.1**2 * -math.log(0.9)) / 2)


def test_gamma_zero_is_cross_entropy():
    logits, targets = torch.randn(50), torch.randint(0, 2, (50,)).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert torch.allclose(cell.FocalLoss(0.0).of(logits, targets), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_give_finite_gradients(gamma):
    logits = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    cell.FocalLoss(gamma).of(logits, torch.tensor([1.0, 1.0, 0.0])).backward()
    assert torch.isfinite(logits.grad).all()


def test_the_frame_loss_uses_the_clips_label():
    frames = torch.tensor([[9.0, 9.0], [-9.0, -9.0]])
    output = DetectorOutput(torch.zeros(2), frames, torch.zeros(2, 2))
    loss, labels = cell.FocalLoss(0.0, frame_weight=1.0), torch.tensor([1.0, 0.0])
    assert loss(output, labels).item() == pytest.approx(math.log(2), abs=1e-3)
    assert loss(output, 1 - labels).item() == pytest.approx(math.log(2) + 9, abs=1e-3)


def test_the_best_epoch_has_the_highest_auc_and_loss_breaks_ties():
    aucs_and_losses = [(0.7, 0.5), (0.7, 0.4), (0.6, 0.1), (0.7, 0.4)]
    history = [
        {"epoch": number, "val_auc": auc, "val_loss": loss}
        for number, (auc, loss) in enumerate(aucs_and_losses, start=1)
    ]
    best = [cell.best_epoch(history[:count]) for count in range(5)]
    assert best == [0, 1, 2, 2, 2]
    stopped = [cell.should_stop(history[:count], patience=2) for count in range(5)]
    assert stopped == [False, False, False, False, True]


def test_the_average_is_the_mean_of_few_steps_and_exponential_after_many():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    average = cell.ModelEMA(model, 0.75)
    expected = 0.0
    for step, value in enumerate((4.0, 8.0, 3.0, 7.0, 1.0, 9.0), 1):
        torch.nn.init.constant_(model[0].weight, value)
        model[1].running_mean.fill_(-value)
        model[1].num_batches_tracked.fill_(step)
        average.update(model)
        expected += max(1 / step, 0.25) * (value - expected)
        inner = cell.unwrapped(average)
        assert inner[0].weight.item() == pytest.approx(expected)
        assert (
            inner[1].running_mean.item() == pytest.approx(-expected)
            and inner[1].num_batches_tracked == step
        )
    assert not any(weight.requires_grad for weight in average.parameters())
    assert cell.unwrapped(torch.nn.DataParallel(model)) is model


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "c.pth"
    cell.save_checkpoint(file, {"epoch": 1})

    def dies_half_way(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies_half_way)
    with pytest.raises(OSError, match="disk full"):
        cell.save_checkpoint(file, {"epoch": 2})
    assert (
        torch.load(file, weights_only=True) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1
    )


def test_a_checkpoint_reads_with_weights_only_and_damage_is_noticed(tmp_path):
    """A changed bit is noticed, unless it is one that nothing depends on."""
    file = tmp_path / "c.pth"
    content = {"epoch": 1, "settings": {"SEED": 1}, "weight": torch.arange(50.0)}
    cell.save_checkpoint(file, content)
    good = bytearray(file.read_bytes())
    assert cell.is_valid_checkpoint(file)
    noticed = 0
    for position in range(len(good)):
        damaged = good.copy()
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        if cell.is_valid_checkpoint(file):
            loaded = torch.load(file, weights_only=True)
            assert torch.equal(loaded.pop("weight"), content["weight"]), position
            assert loaded == {"epoch": 1, "settings": {"SEED": 1}}, position
        else:
            noticed += 1
    assert noticed > 200 + 100  # the bytes of the weights, and of the other values
    for length in (0, 1, 64, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        assert not cell.is_valid_checkpoint(file), length


def checkpoints(folder: Path, *epochs: int, **settings: object) -> Path:
    """A models folder after some epochs; returns where its last checkpoint is."""
    last = folder / "last_checkpoint.pth"
    for epoch in epochs:
        content = {"format": cell.FORMAT, "epoch": epoch, "settings": settings}
        cell.save_checkpoint(last, content, keep=cell.previous_of(last))
    return last


def epoch_in(file: Path) -> int:
    return torch.load(file, weights_only=True)["epoch"]


def test_if_the_last_checkpoint_is_damaged_the_previous_one_is_used_and_kept(tmp_path, capsys):
    last = checkpoints(tmp_path, 1, 2, 3, SEED=1)
    assert cell.find_resume_checkpoint(last, {"SEED": 1}) == last and epoch_in(last) == 3
    last.write_bytes(last.read_bytes()[:-100])
    assert epoch_in(cell.find_resume_checkpoint(last, {"SEED": 1})) == 2
    assert f"{last} is damaged" in capsys.readouterr().out
    checkpoints(tmp_path, 3, SEED=1)
    assert epoch_in(last) == 3 and epoch_in(cell.previous_of(last)) == 2


def test_a_kill_between_the_two_renames_leaves_the_previous_one(tmp_path):
    last = checkpoints(tmp_path, 1, 2, SEED=1)
    last.unlink()
    assert epoch_in(cell.find_resume_checkpoint(last, {"SEED": 1})) == 1


def test_without_a_valid_checkpoint_there_is_nothing_to_resume(tmp_path, capsys):
    last = checkpoints(tmp_path, 1, SEED=1)
    last.write_bytes(b"")
    assert (
        cell.find_resume_checkpoint(last, {"SEED": 1}) is None
        and "damaged" in capsys.readouterr().out
    )
    assert (
        cell.find_resume_checkpoint(tmp_path / "none" / "last_checkpoint.pth", {"SEED": 1}) is None
    )


def test_on_kaggle_the_attached_run_of_these_settings_that_came_furthest_is_found(tmp_path, capsys):
    own, inputs = tmp_path / "working" / "models" / "last_checkpoint.pth", tmp_path / "input"
    checkpoints(inputs / "my-run" / "models", 1, 2, SEED=1)  # as Kaggle used to mount outputs
    furthest = checkpoints(
        inputs / "notebooks" / "me" / "my-run" / "models", 1, 2, 3, SEED=1
    )  # as it does now
    checkpoints(inputs / "other" / "models", 1, 2, 3, 4, SEED=2)
    cell.previous_of(furthest).unlink()
    found = cell.attached_checkpoints(inputs)
    assert len(found) == 3 and cell.find_resume_checkpoint(own, {"SEED": 1}, found) == furthest
    assert "other settings:\n  SEED: 2 then, 1 now" in capsys.readouterr().out
    assert (
        cell.find_resume_checkpoint(checkpoints(own.parent, 1, SEED=1), {"SEED": 1}, found) == own
    )
    with pytest.raises(ValueError, match="other settings:\n  SEED: 1 then, 5 now"):
        cell.find_resume_checkpoint(own, {"SEED": 5}, found)


def test_a_checkpoint_of_an_older_version_is_refused_and_the_message_says_what_to_do(
    tmp_path, capsys
):
    last = tmp_path / "last_checkpoint.pth"
    cell.save_checkpoint(last, {"epoch": 1, "settings": {"FORMAT": 2, "SEED": 1}})
    with pytest.raises(ValueError, match="(?s)another version of this notebook.*RESUME=False"):
        cell.find_resume_checkpoint(last, {"SEED": 1})
    elsewhere = tmp_path / "new" / "last_checkpoint.pth"
    assert cell.find_resume_checkpoint(elsewhere, {"SEED": 1}, [last]) is None
    assert f"Skipped: {last} was saved by another version" in capsys.readouterr().out


def test_a_run_is_restored_and_a_loss_scale_only_for_its_precision(tmp_path):
    def run(precision: str, origin: str = "") -> cell.RunState:
        parts = {"model": torch.nn.Linear(1, 1), "scaler": torch.nn.Linear(1, 1)}
        facts = {"settings": {}, "precision": precision, "initial_weights": origin}
        return cell.RunState(tmp_path / "last_checkpoint.pth", parts, **facts)

    saved = run("float16", "ImageNet")
    for part in saved.parts.values():
        part.bias.data.fill_(7.0)
    for epoch in (1, 2):
        saved.history.append({"epoch": epoch})
        saved.best["epoch"] = 1
        saved.save()
        assert cell.previous_of(saved.file).exists() == (epoch > 1)
    for precision, is_kept in {"float16": True, "bfloat16": False}.items():
        saved.best_file.unlink()
        restored = run(precision)
        restored.load(saved.file, write=True)
        assert restored.history == saved.history and restored.best == {"epoch": 1}
        assert restored.facts["initial_weights"] == "ImageNet" and epoch_in(saved.best_file) == 1
        assert restored.parts["model"].bias == 7
        assert (restored.parts["scaler"].bias == 7) == is_kept


def test_only_settings_that_shape_the_result_keep_a_run_from_resuming(tmp_path):
    saved = dataclasses.asdict(CONFIG)
    last = checkpoints(tmp_path, 1, **saved)
    harmless = {**saved, "EPOCHS": 99, "WORK_DIR": "elsewhere", "NUM_WORKERS": 7}
    assert cell.why_not_resumable(last, harmless) == ""
    reason = cell.why_not_resumable(last, {**saved, "LEARNING_RATE": 0.5, "BACKBONE": "resnet18"})
    assert reason.splitlines()[1:] == [
        "  BACKBONE: 'resnet50' then, 'resnet18' now",
        "  LEARNING_RATE: 0.0001 then, 0.5 now",
    ]


def test_the_fingerprint_of_the_data_ignores_where_it_is_mounted():
    rows = pd.DataFrame(
        {
            "path": ["/a/x.mp4", "/a/y.mp4"],
            "method": ["real", "x"],
            "group": ["g", "h"],
            "split": ["train"] * 2,
        }
    )
    moved = rows.assign(path=["/b/x.mp4", "/b/y.mp4"], group=["data/g", "data/h"])
    known = cell.run_settings(CONFIG, rows)
    assert known == cell.run_settings(CONFIG, moved.iloc[::-1])
    assert known != cell.run_settings(CONFIG, rows.assign(split=["train", "val"]))


def test_the_model_file_holds_no_paths_of_this_machine():
    config = dataclasses.replace(CONFIG, DATA_DIR="/home/me/data", WORK_DIR="/home/me/work")
    model = torch.nn.ModuleDict(
        {"frame_head": torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))}
    )
    torch.nn.init.constant_(model.frame_head[1].weight, 3)
    torch.nn.init.constant_(model.frame_head[1].bias, 1)
    row = {"epoch": 3, "val_auc": 0.9, "val_loss": 0.1}
    calibration = {"temperature": 1.5, "offset": 0.25, "threshold": 0.4}
    content = cell.model_file(model, config, calibration, {"FaceSwap"}, row)
    model.frame_head[1].weight.data += 1
    assert content["model"]["frame_head.1.weight"].item() == 3  # a copy: it does not learn on
    assert content["model"]["frame_head.1.bias"].item() == 1
    assert "/home/me" not in str(content) and content["epoch"] == 3 and content["format"] == 2
    assert [content[name] for name in ("temperature", "offset", "threshold")] == [1.5, 0.25, 0.4]
    assert content["trained_on"] == ["FaceSwap"]


def test_focal_loss_is_drawn_below_cross_entropy():
    cross_entropy, focal = (line.get_ydata() for line in cell.plot_losses([0, 2]).axes[0].lines)
    assert all(low <= high for low, high in zip(focal, cross_entropy, strict=True))
