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


def test_an_epoch_pairs_every_real_video_with_a_fake_of_its_recording():
    rows = table(10, 4)
    order = list(cell.PairSampler(rows, seed=1))
    reals, fakes = order[::2], order[1::2]
    assert sorted(reals) == list(range(10)) and (rows.label[fakes] == 1).all()
    assert rows.group[reals].tolist() == rows.group[fakes].tolist()


def test_of_a_group_with_two_recordings_each_gets_the_fake_with_its_own_pictures():
    names = ["004", "982", "982", "004"]  # real 004 and 982, then 982_004 and 004_982: all of one group
    rows = pd.DataFrame({"label": [0, 0, 1, 1], "group": "004", "original": names})
    assert {tuple(order[i : i + 2]) for order in [list(cell.PairSampler(rows, 5))] for i in (0, 2)} == {(0, 3), (1, 2)}


def test_epochs_differ_and_repeat_with_the_seed():
    sampler, again = cell.PairSampler(table(10, 4), 1), cell.PairSampler(table(10, 4), 1)
    first = list(sampler)
    sampler.epoch = again.epoch = 2
    assert list(sampler) == list(again) != first
    assert list(cell.PairSampler(table(10, 4), 2)) != first


def test_without_a_fake_of_its_recording_a_real_video_gets_another_and_all_take_turns():
    rows = pd.DataFrame({"label": [0] * 6 + [1] * 3, "group": list("abcdefxyz"), "original": list("abcdefxyz")})
    order = list(cell.PairSampler(rows, 0))
    assert len(order) == 12 and sorted(order[1::2]) == [6, 6, 7, 7, 8, 8]


def test_augmentation_treats_all_frames_of_a_clip_and_both_clips_of_a_pair_alike(noise):
    frame = noise[:, :1]
    clips = frame.expand(-1, 3, -1, -1, -1).repeat_interleave(2, dim=0)
    torch.manual_seed(0)
    out = cell.augment(clips)
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert torch.equal(out[0::2], out[1::2])
    assert not torch.allclose(out[0], clips[0], atol=0.01) and out.min() >= 0 and out.max() <= 1


def test_pairs_differ_from_each_other_and_from_epoch_to_epoch(noise):
    same = noise[:1].expand(6, -1, -1, -1, -1)
    torch.manual_seed(0)
    first, second = cell.augment(same), cell.augment(same)
    assert not torch.allclose(first[0], first[2], atol=0.01) and not torch.allclose(first, second, atol=0.01)


def test_an_odd_number_of_clips_is_augmented_too(noise):
    assert cell.augment(noise[:5]).shape == noise[:5].shape


def test_half_of_the_clips_are_mirrored_and_crops_stay_inside(noise):
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 3, 32, 32)
    torch.manual_seed(0)
    out = cell.random_crop_and_flip(ramp)
    slope = (out[..., 24] - out[..., 8]).mean(dim=(1, 2, 3)) / 0.5
    assert 0.4 < (slope < 0).float().mean() < 0.6
    assert (slope.abs() > 0.75).all() and (slope.abs() < 1.05).all()


def test_clips_become_normalised_floats(noise):
    clips = torch.full((2, 3, 8, 8, 3), 255, dtype=torch.uint8)
    out = cell.normalize(cell.to_float(clips))
    assert out.shape == (2, 3, 3, 8, 8)
    expected = (1 - torch.tensor(cell.IMAGENET_MEAN)) / torch.tensor(cell.IMAGENET_STD)
    assert torch.allclose(out[0, 0, :, 0, 0], expected)
