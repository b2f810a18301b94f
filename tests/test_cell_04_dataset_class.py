import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import cell_04_dataset_class as cell


@pytest.fixture
def noise():
    return torch.rand(6, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_an_item_is_the_cached_clip_with_label_and_row(clip_table):
    dataset = cell.ClipDataset(clip_table)
    clip, label, row = dataset[13]
    with np.load(clip_table.clip_file[13]) as saved:
        assert np.array_equal(clip, saved["frames"])
    assert clip.dtype == torch.uint8 and (label, row) == (clip_table.label[13], 13)


def test_several_threads_read_the_same_batches_as_one(clip_table):
    one, four = (DataLoader(cell.ClipDataset(clip_table, workers), 5) for workers in (1, 4))
    for first, second in zip(one, four, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def table(reals: int, fakes_each: int) -> pd.DataFrame:
    rows = [(0, f"g{g}") for g in range(reals)] + [(1, f"g{g}") for g in range(reals) for _ in range(fakes_each)]
    return pd.DataFrame(rows, columns=["label", "group"]).assign(original=lambda t: t.group)


def epoch_of(rows: pd.DataFrame, batch: int = 2, seed: int = 1, epoch: int = 0, **share: int) -> list[int]:
    batches = cell.PairBatches(rows, batch, seed, **share)
    batches.set_epoch(epoch)
    return [row for batch in batches for row in batch]


def test_an_epoch_pairs_every_real_video_with_a_fake_of_its_recording():
    rows = table(10, 4)
    order = epoch_of(rows)
    reals, fakes = order[::2], order[1::2]
    assert sorted(reals) == list(range(10)) and (rows.label[fakes] == 1).all()
    assert rows.group[reals].tolist() == rows.group[fakes].tolist()


def test_of_a_group_with_two_recordings_each_gets_the_fake_with_its_own_pictures():
    names = ["004", "982", "982", "004"]  # real 004 and 982, then 982_004 and 004_982: all of one group
    rows = pd.DataFrame({"label": [0, 0, 1, 1], "group": "004", "original": names})
    assert {tuple(batch) for batch in cell.PairBatches(rows, 2, 5)} == {(0, 3), (1, 2)}


def test_epochs_differ_and_repeat_with_the_seed():
    rows = table(10, 4)
    assert epoch_of(rows, epoch=2) == epoch_of(rows, epoch=2) != epoch_of(rows, epoch=1)
    assert epoch_of(rows, seed=2) != epoch_of(rows, seed=1)


def test_without_a_fake_of_its_recording_a_real_video_gets_another_and_all_take_turns():
    rows = pd.DataFrame({"label": [0] * 6 + [1] * 3, "group": list("abcdefxyz"), "original": list("abcdefxyz")})
    order = epoch_of(rows)
    assert len(order) == 12 and sorted(order[1::2]) == [6, 6, 7, 7, 8, 8]


@pytest.mark.parametrize(("batch", "sizes"), [(8, [8, 8]), (20, [20]), (32, [20]), (3, [3] * 6)])
def test_batches_are_full(batch, sizes):
    batches = cell.PairBatches(table(10, 4), batch, 1)
    assert [len(rows) for rows in batches] == sizes and len(batches) == len(sizes)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes):
    rows = table(10, 4)
    alone = cell.PairBatches(rows, 8, 1)
    shares = [cell.PairBatches(rows, 8, 1, rank, processes) for rank in range(processes)]
    together = [[row for part in parts for row in part] for parts in zip(*shares, strict=True)]
    assert together == list(alone) and {len(part) for part in shares[0]} == {8 // processes}


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ValueError, match="batches of 6 clips cannot be shared equally by 4 processes"):
        cell.PairBatches(table(10, 4), 6, 1, 0, 4)
    with pytest.raises(ValueError, match="2 training clips are too few for 4 processes"):
        cell.PairBatches(table(1, 1), 8, 1, 0, 4)


def draws(seed: int = 0, **share: int) -> cell.PairDraws:
    return cell.PairDraws(torch.device("cpu"), [seed], **share)


def test_augmentation_treats_all_frames_of_a_clip_and_both_clips_of_a_pair_alike(noise):
    frame = noise[:, :1]
    clips = frame.expand(-1, 3, -1, -1, -1).repeat_interleave(2, dim=0)
    out = cell.augment(clips, draws())
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert torch.equal(out[0::2], out[1::2])
    assert not torch.allclose(out[0], clips[0], atol=0.01) and out.min() >= 0 and out.max() <= 1


def test_pairs_differ_from_each_other_and_from_epoch_to_epoch(noise):
    same = noise[:1].expand(6, -1, -1, -1, -1)
    one = draws()
    first, second = cell.augment(same, one), cell.augment(same, one)
    assert not torch.allclose(first[0], first[2], atol=0.01) and not torch.allclose(first, second, atol=0.01)


def test_an_odd_number_of_clips_is_augmented_too(noise):
    assert cell.augment(noise[:5], draws()).shape == noise[:5].shape


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_augment_their_shares_as_one_would_augment_the_batch(noise, processes):
    whole, share = cell.augment(noise, draws(3)), len(noise) // processes
    parts = [
        cell.augment(noise[rank * share :][:share], draws(3, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_augmentation_depends_on_its_seed_alone(noise):
    first = cell.augment(noise, draws(1))
    torch.manual_seed(99)
    assert torch.equal(cell.augment(noise, draws(1)), first) and not torch.equal(cell.augment(noise, draws(2)), first)


def test_half_of_the_clips_are_mirrored_and_crops_stay_inside(noise):
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 3, 32, 32)
    out = cell.random_crop_and_flip(ramp, draws())
    slope = (out[..., 24] - out[..., 8]).mean(dim=(1, 2, 3)) / 0.5
    assert 0.4 < (slope < 0).float().mean() < 0.6
    assert (slope.abs() > 0.75).all() and (slope.abs() < 1.05).all()


def test_clips_become_normalised_floats(noise):
    clips = torch.full((2, 3, 8, 8, 3), 255, dtype=torch.uint8)
    out = cell.normalize(cell.to_float(clips))
    assert out.shape == (2, 3, 3, 8, 8)
    expected = (1 - torch.tensor(cell.IMAGENET_MEAN)) / torch.tensor(cell.IMAGENET_STD)
    assert torch.allclose(out[0, 0, :, 0, 0], expected)
