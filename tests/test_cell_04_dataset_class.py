import dataclasses
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import cell_04_dataset_class as cell
from cell_02_global_config import CONFIG

CONFIG = dataclasses.replace(CONFIG, FRAMES_PER_VIDEO=3)
KINDS = ("none", "plain", "codec", "robust")


@pytest.fixture
def noise():
    """Clips as they lie in the cache."""
    return torch.randint(
        0, 256, (6, 3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def landmarks_in(clips: torch.Tensor) -> torch.Tensor:
    """An upright face in the middle of each frame, (B, T, 5, 2)."""
    size = clips.shape[2]
    face = torch.tensor(cell.STANDARD_FACE) * size / 4 + (size - 1) / 2
    return face.expand(*clips.shape[:2], 5, 2)


def shown(clips, random, blend=None, landmarks=None, **changes) -> torch.Tensor:
    """What `augment` makes of uint8 clips, without self-blends unless `blend` asks for them."""
    blend = torch.zeros(len(clips), dtype=torch.bool) if blend is None else torch.tensor(blend)
    landmarks = landmarks_in(clips) if landmarks is None else landmarks
    batch = cell.Batch(clips, landmarks, torch.zeros(len(clips)), torch.arange(len(clips)), blend)
    return cell.augment(batch, random, dataclasses.replace(CONFIG, **changes))


def test_an_item_is_the_cached_clip_with_landmarks_label_and_row(clip_table):
    dataset = cell.ClipDataset(clip_table)
    item = dataset[13]
    with np.load(clip_table.clip_file[13]) as saved:
        assert np.array_equal(item.clips, saved["frames"])
        assert np.array_equal(item.landmarks, saved["landmarks"])
    assert item.clips.dtype == torch.uint8 and not item.blend
    assert (item.labels, item.rows) == (clip_table.label[13], 13)
    assert dataset.name(13) == str(clip_table.path[13])


def test_the_self_blend_of_a_real_clip_is_that_clip_called_fake(clip_table):
    dataset, real = cell.ClipDataset(clip_table), int(clip_table.index[clip_table.label == 0][2])
    fake = dataset[cell.Sample(real, self_blend=True)]
    assert torch.equal(fake.clips, dataset[real].clips) and dataset[real].labels == 0
    assert (fake.labels, fake.rows, fake.blend) == (1, real, True)
    assert dataset.name(real, True) == f"{clip_table.path[real]} (self-blended)"


def test_one_of_the_clips_that_are_interleaved_in_a_file_is_loaded(clip_table):
    dataset = cell.ClipDataset(clip_table)
    whole, one = dataset[3], dataset[cell.Sample(3, clip=slice(1, None, 2))]
    assert len(one.clips) == len(one.landmarks) == 2 < len(whole.clips)
    assert torch.equal(one.clips, whole.clips[1::2])
    assert torch.equal(one.landmarks, whole.landmarks[1::2])


def test_batches_keep_the_names_of_an_item(clip_table):
    dataset = cell.ClipDataset(clip_table)
    samples = [[cell.Sample(2), cell.Sample(2, True)]]
    (batch,) = DataLoader(dataset, batch_sampler=samples)
    assert isinstance(batch, cell.Batch) and batch.clips.shape[:2] == (2, 4)
    assert batch.rows.tolist() == [2, 2] and batch.blend.tolist() == [False, True]


def test_several_threads_read_the_same_batches_as_one(clip_table):
    one, four = (DataLoader(cell.ClipDataset(clip_table, workers), 5) for workers in (1, 4))
    for first, second in zip(one, four, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def table(reals: int, fakes_each: int) -> pd.DataFrame:
    rows = [(0, f"g{g}") for g in range(reals)] + [
        (1, f"g{g}") for g in range(reals) for _ in range(fakes_each)
    ]
    return pd.DataFrame(rows, columns=["label", "group"]).assign(
        original=lambda t: t.group, dataset="d", method=lambda t: t.label.map(str)
    )


def batches_of(rows: pd.DataFrame, size: int, *share: int, **changes: Any) -> cell.PairBatches:
    """Batches of whole videos without self-blends, unless `changes` ask for them."""
    plain: dict = {"SEED": 1, "SELF_BLEND": 0.0, "CLIPS_PER_VIDEO": 1}
    return cell.PairBatches(rows, size, dataclasses.replace(CONFIG, **plain | changes), *share)


def samples_of(rows: pd.DataFrame, epoch: int = 0, **changes: Any) -> list[cell.Sample]:
    batches = batches_of(rows, 2, **changes)
    batches.set_epoch(epoch)
    return [sample for batch in batches for sample in batch]


def epoch_of(rows: pd.DataFrame, **options: Any) -> list[int]:
    return [sample.row for sample in samples_of(rows, **options)]


def test_an_epoch_pairs_every_real_video_with_a_fake_of_its_recording():
    rows = table(10, 4)
    order = epoch_of(rows)
    reals, fakes = order[::2], order[1::2]
    assert sorted(reals) == list(range(10)) and (rows.label[fakes] == 1).all()
    assert rows.group[reals].tolist() == rows.group[fakes].tolist()


def test_of_a_group_with_two_recordings_each_gets_the_fake_with_its_own_pictures():
    names = [
        "004",
        "982",
        "982",
        "004",
    ]  # real 004 and 982, then 982_004 and 004_982: all of one group
    rows = pd.DataFrame(
        {"label": [0, 0, 1, 1], "group": "004", "original": names, "dataset": "d", "method": "m"}
    )
    pairs = {tuple(sample.row for sample in batch) for batch in batches_of(rows, 2)}
    assert pairs == {(0, 3), (1, 2)}


def test_epochs_differ_and_repeat_with_the_seed():
    rows = table(10, 4)
    assert epoch_of(rows, epoch=2) == epoch_of(rows, epoch=2) != epoch_of(rows, epoch=1)
    assert epoch_of(rows, SEED=2) != epoch_of(rows, SEED=1)


def test_without_a_fake_of_its_recording_a_real_video_gets_another_and_all_take_turns():
    rows = pd.DataFrame(
        {"label": [0] * 6 + [1] * 3, "group": list("abcdefxyz"), "original": list("abcdefxyz")}
    ).assign(dataset="d", method="m")
    order = epoch_of(rows)
    assert len(order) == 12 and sorted(order[1::2]) == [6, 6, 7, 7, 8, 8]


@pytest.mark.parametrize(("batch", "sizes"), [(8, [8, 8]), (20, [20]), (32, [20]), (3, [3] * 6)])
def test_batches_are_full(batch, sizes):
    batches = batches_of(table(10, 4), batch)
    assert [len(rows) for rows in batches] == sizes and len(batches) == len(sizes)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes):
    rows = table(10, 4)
    alone = batches_of(rows, 8)
    shares = [batches_of(rows, 8, rank, processes) for rank in range(processes)]
    together = [[row for part in parts for row in part] for parts in zip(*shares, strict=True)]
    assert together == list(alone) and {len(part) for part in shares[0]} == {8 // processes}


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ValueError, match="4 processes cannot share batches of 6 equally"):
        batches_of(table(10, 4), 6, 0, 4)
    with pytest.raises(ValueError, match="2 training clips are too few for 4 processes"):
        batches_of(table(1, 1), 8, 0, 4)


def draws(seed: int = 0, **share: int) -> cell.PairedGenerator:
    return cell.PairedGenerator(torch.device("cpu"), [seed], **share)


def test_plain_augmentation_treats_all_frames_of_a_clip_and_both_clips_of_a_pair_alike(noise):
    clips = noise[:, :1].expand(-1, 3, -1, -1, -1).repeat_interleave(2, dim=0)
    out = shown(clips, draws(), AUGMENTATION="plain")
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert torch.equal(out[0::2], out[1::2])
    assert (
        not torch.allclose(out[0], cell.to_float(clips)[0], atol=0.01)
        and out.min() >= 0
        and out.max() <= 1
    )


def test_robust_augmentation_treats_pairs_alike_and_frames_too_but_for_the_noise_of_the_sensor(
    noise,
):
    clips = noise[:1, :1].expand(400, 3, -1, -1, -1)
    out = shown(clips, draws(), AUGMENTATION="robust")
    assert torch.equal(out[0::2], out[1::2]) and out.min() >= 0 and out.max() <= 1
    apart = (out - out[:, :1]).abs().amax(dim=(1, 2, 3, 4))
    assert 0.2 < (apart == 0).float().mean() < 0.4  # 70 % have noise, which compression may swallow


def test_without_augmentation_clips_are_as_they_were(noise):
    assert torch.equal(shown(noise, draws(), AUGMENTATION="none"), cell.to_float(noise))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_pairs_differ_from_each_other_and_from_epoch_to_epoch(noise, kind):
    same, one = noise[:1].expand(6, -1, -1, -1, -1), draws()
    first, second = shown(same, one, AUGMENTATION=kind), shown(same, one, AUGMENTATION=kind)
    assert not torch.allclose(first[0], first[2], atol=0.01) and not torch.allclose(
        first, second, atol=0.01
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_number_of_clips_is_augmented_too(noise, kind):
    assert shown(
        noise[:5], draws(), [False, True, False, False, True], AUGMENTATION=kind
    ).shape == (5, 3, 3, 32, 32)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_augment_their_shares_as_one_would_augment_the_batch(noise, processes):
    """Twins may be in different processes, and must look alike there too."""
    share = len(noise) // processes
    whole = shown(noise, draws(3))
    parts = [
        shown(noise[rank * share :][:share], draws(3, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_self_blends_of_a_process_leave_the_draws_of_others_alone(noise):
    alone = shown(noise, draws(3, rank=0, processes=2), AUGMENTATION="plain")
    blend = [True] + [False] * 5
    blended = shown(noise, draws(3, rank=0, processes=2), blend, AUGMENTATION="plain")
    assert torch.equal(blended[1:], alone[1:]) and not torch.equal(blended[0], alone[0])


def test_augmentation_depends_on_its_seed_alone(noise):
    first = shown(noise, draws(1))
    torch.manual_seed(99)
    assert torch.equal(shown(noise, draws(1)), first) and not torch.equal(
        shown(noise, draws(2)), first
    )


def test_half_of_the_clips_are_mirrored_and_crops_stay_inside():
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 3, 32, 32)
    out = cell.crop_and_flip(ramp, draws())
    slope = (out[..., 24] - out[..., 8]).mean(dim=(1, 2, 3)) / 0.5
    assert 0.4 < (slope < 0).float().mean() < 0.6
    assert (slope.abs() > 0.75).all() and (slope.abs() < 1.05).all()


def test_clips_become_normalised_floats():
    clips = torch.full((2, 3, 8, 8, 3), 255, dtype=torch.uint8)
    out = cell.normalize(cell.to_float(clips))
    assert out.shape == (2, 3, 3, 8, 8)
    expected = (1 - torch.tensor(cell.IMAGENET_MEAN)) / torch.tensor(cell.IMAGENET_STD)
    assert torch.allclose(out[0, 0, :, 0, 0], expected)


# Self-blends


def portrait(size: int = 96, clips: int = 16) -> torch.Tensor:
    """Clips of one smooth picture with some texture, as they lie in the cache."""
    picture = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 1, (size, size, 3)), (0, 0), 1.5)
    picture = (255 * (picture - picture.min()) / np.ptp(picture)).astype(np.uint8)
    return torch.from_numpy(picture).expand(clips, 3, -1, -1, -1)


def blended(count: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real clips in 0..1, their self-blends and the masks."""
    clips = portrait(clips=2 * count)
    out, masks = cell.self_blend(cell.to_float(clips), landmarks_in(clips), draws(5))
    return cell.to_float(clips), out, masks


def test_a_self_blend_changes_nothing_outside_its_mask_and_something_inside():
    real, fake, masks = blended()
    outside = (masks == 0)[:, :, None].expand_as(real)
    assert torch.equal(fake[outside], real[outside]) and 0.2 < outside.float().mean() < 0.9
    inside = (masks == 1)[:, :, None].expand_as(real)
    changed = [(fake[i][inside[i]] - real[i][inside[i]]).abs().mean() for i in range(len(real))]
    assert min(changed) > 0.001 and np.mean(changed) > 0.01 and fake.min() >= 0 and fake.max() <= 1


def test_masks_lie_on_the_face_and_follow_it():
    clips = portrait(clips=2)
    landmarks = landmarks_in(clips).clone()
    landmarks[:, 2] += torch.tensor([20.0, -10.0])
    _, masks = cell.self_blend(cell.to_float(clips), landmarks, draws(1))
    assert torch.equal(masks[:, 0], masks[:, 1]) and not torch.equal(masks[:, 0], masks[:, 2])
    assert torch.allclose(masks[:, 2, :80, 24:], masks[:, 0, 10:90, 4:76], atol=1e-4)
    assert (masks[:, 0, 48, 48] > 0.9).all(), "the nose is inside"


def test_without_landmarks_the_face_is_taken_to_be_in_the_middle():
    clips = portrait(clips=2)
    nowhere = torch.full((2, 3, 5, 2), torch.nan)
    first, second = (
        cell.self_blend(cell.to_float(clips), marks, draws())[0]
        for marks in (nowhere, landmarks_in(clips))
    )
    assert torch.allclose(first, second, atol=1e-4) and first.isfinite().all()


def test_some_self_blends_tremble_from_frame_to_frame_and_their_twins_never():
    real, fake, _ = blended(count=50)
    between = (fake[::2, 1:] - fake[::2, :-1]).abs().mean(dim=(1, 2, 3, 4))
    assert between.max() > 5 * between.min() + 0.001 and torch.equal(real[:, 0], real[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_blend_tells_a_twin_from_its_self_blend(kind):
    """The same crop, colours, codec and noise: far from the face, twins are equal."""
    clips = portrait(clips=40)
    landmarks = landmarks_in(clips) * 0.4  # a small face in one corner
    out = shown(clips, draws(2), [False, True] * 20, landmarks, AUGMENTATION=kind)
    real, fake = out[0::2], out[1::2]
    equal = (real - fake).abs().amax(dim=(1, 2)) < (
        0.01 if kind in ("none", "plain") else 0.08
    )  # contrast takes a mean
    assert equal.flatten(1).float().mean(dim=1).min() > 0.5
    assert (real - fake).abs().amax(dim=(1, 2, 3, 4)).min() > 0.02


def test_only_rows_that_ask_for_it_are_blended():
    clips = portrait(clips=4)
    out = shown(clips, draws(), [False, False, True, False], AUGMENTATION="none")
    same = [torch.equal(clip, cell.to_float(clips)[0]) for clip in out]
    assert same == [True, True, False, True]


def test_a_share_of_the_partners_are_self_blends_others_in_each_epoch():
    rows, blended = table(10, 4), set()
    for epoch in range(20):
        samples = samples_of(rows, SELF_BLEND=0.3, epoch=epoch)
        assert sorted(sample.row for sample in samples[::2]) == list(range(10))
        assert not any(sample.self_blend for sample in samples[::2])
        made = [
            pair for pair in zip(samples[::2], samples[1::2], strict=True) if pair[1].self_blend
        ]
        assert len(made) == 3 and all(real.row == fake.row for real, fake in made)
        blended |= {real.row for real, _ in made}
    assert blended == set(range(10))


@pytest.mark.parametrize("self_blend", [0.5, 1.0])
def test_real_videos_are_enough_for_then_all_fakes_are_self_blends(self_blend):
    samples = samples_of(table(6, 0), SELF_BLEND=self_blend)
    assert all(sample.self_blend for sample in samples[1::2])
    assert [sample.row for sample in samples[::2]] == [sample.row for sample in samples[1::2]]
    assert sorted(sample.row for sample in samples[::2]) == list(range(6))


def test_a_pair_shows_the_same_clip_of_a_video_and_all_clips_have_their_turn():
    rows, shown_clips = table(10, 1), set()
    for epoch in range(10):
        samples = samples_of(rows, CLIPS_PER_VIDEO=3, epoch=epoch)
        assert [real.clip for real in samples[::2]] == [fake.clip for fake in samples[1::2]]
        assert all(sample.clip.step == 3 for sample in samples)
        shown_clips |= {sample.clip.start for sample in samples}
    assert shown_clips == {0, 1, 2}


def test_without_pairs_partners_are_any_fakes():
    rows = table(40, 1)
    order = epoch_of(rows, PAIRS=False)
    assert sorted(order) == list(range(80))
    assert (rows.group[order[::2]].to_numpy() != rows.group[order[1::2]].to_numpy()).mean() > 0.8


# What videos go through


def test_the_landmarks_of_a_frame_have_the_coordinates_of_the_standard_face():
    face = torch.tensor(cell.STANDARD_FACE)
    turned = 18 * torch.stack([-face[:, 1], face[:, 0]], dim=1) + torch.tensor([20.0, 17.0])
    to_frame, to_face = (each[0, 0] for each in cell.face_transforms(turned[None, None], 40))
    found = face @ to_frame[:2, :2].T + to_frame[:2, 2]
    assert torch.allclose(found, (2 * turned + 1) / 40 - 1, atol=1e-5)
    assert torch.allclose(to_frame @ to_face, torch.eye(3), atol=1e-5)


def images(clips: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(clips, 2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [1.0, 0.7, 0.25])
def test_fewer_pixels_keep_what_is_even_and_lose_what_is_fine(factor):
    clips = images()
    even = torch.full_like(clips, 0.3)
    assert torch.allclose(cell.lower_resolution(even, factor), even, atol=1e-5)
    worse = cell.lower_resolution(clips, factor)
    assert torch.allclose(worse, clips) if factor == 1 else worse.std() < factor * clips.std()


def test_robust_augmentation_degrades_some_pairs_and_leaves_most_alone():
    clips = images(400)
    changed = (cell.change_resolutions(clips, draws()) != clips).flatten(1).any(dim=1)
    assert torch.equal(changed[::2], changed[1::2]) and 0.3 < changed.float().mean() < 0.55


@pytest.mark.parametrize("size", [32, 45])
def test_compression_loses_about_what_jpeg_does(size):
    picture = cv2.GaussianBlur(
        np.random.default_rng(0).uniform(0, 1, (size, size, 3)).astype(np.float32), (0, 0), 1
    )
    picture = (picture - picture.min()) / np.ptp(picture)
    clips = torch.from_numpy(picture).permute(2, 0, 1).expand(4, 2, -1, -1, -1)
    out = cell.compress(clips, torch.tensor([0.0, 0.2, 1.0, 1.7]).view(4, 1, 1, 1, 1))
    losses = (out - clips).square().mean(dim=(1, 2, 3, 4)).sqrt()
    assert losses[0] < 1e-3
    for loss, quality in zip(losses[1:].tolist(), (90, 50, 30), strict=True):
        whole_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        coding = [cv2.IMWRITE_JPEG_QUALITY, quality, *whole_colour]
        _, file = cv2.imencode(".jpg", (picture * 255).round().astype(np.uint8), coding)
        jpeg = np.sqrt(np.mean((cv2.imdecode(file, cv2.IMREAD_COLOR) / 255 - picture) ** 2))
        assert 0.5 < loss / jpeg < 1.5, (loss, jpeg, quality)


def test_figures_of_self_blends_show_up_to_five_clips(clip_table):
    for table, shown in ((clip_table, 5), (clip_table[clip_table.label == 0][:2], 2)):
        rows = [ax.images[0].get_array() for ax in cell.plot_self_blends(table, seed=1).axes]
        assert len(rows) == 3 and all(row.shape[1] // row.shape[0] == shown for row in rows)
    plt.close("all")


def test_the_picture_of_the_augmentation_shows_each_step():
    (ax,) = cell.plot_augmentation().axes
    assert [text.get_text() for text in ax.texts] == [
        "real",
        "augmented",
        "perturbed",
        "warped",
        "mask",
        "self-blend",
    ]
    plt.close("all")
