import dataclasses
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
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
    face = torch.view_as_real(cell.standard_face(clips.device) * size / 4 + (0.5 + 0.5j) * size)
    return face.expand(*clips.shape[:2], 5, 2)


def shown(clips, draws, rows=None, landmarks=None, **changes) -> torch.Tensor:
    """What `augment` makes of uint8 clips, without self-blends unless `rows` asks for them."""
    rows = torch.arange(len(clips)) if rows is None else torch.tensor(rows)
    landmarks = landmarks_in(clips) if landmarks is None else landmarks
    return cell.augment(clips, landmarks, rows, draws, dataclasses.replace(CONFIG, **changes))


def test_an_item_is_the_cached_clip_with_landmarks_label_and_row(clip_table):
    dataset = cell.ClipDataset(clip_table)
    clip, landmarks, label, row = dataset[13]
    with np.load(clip_table.clip_file[13]) as saved:
        assert np.array_equal(clip, saved["frames"]) and np.array_equal(
            landmarks, saved["landmarks"]
        )
    assert clip.dtype == torch.uint8 and (label, row) == (clip_table.label[13], 13)
    assert dataset.name(13) == str(clip_table.path[13])


def test_the_self_blend_of_a_real_clip_is_that_clip_called_fake(clip_table):
    dataset, real = cell.ClipDataset(clip_table), int(clip_table.index[clip_table.label == 0][2])
    clip, _, label, row = dataset[~real]
    assert (
        torch.equal(clip, dataset[real][0]) and dataset[real][2] == 0 and (label, row) == (1, ~real)
    )
    assert dataset.name(~real) == f"{clip_table.path[real]} (self-blended)"


def test_several_threads_read_the_same_batches_as_one(clip_table):
    one, four = (DataLoader(cell.ClipDataset(clip_table, workers), 5) for workers in (1, 4))
    for first, second in zip(one, four, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def table(reals: int, fakes_each: int) -> pd.DataFrame:
    rows = [(0, f"g{g}") for g in range(reals)] + [
        (1, f"g{g}") for g in range(reals) for _ in range(fakes_each)
    ]
    return pd.DataFrame(rows, columns=["label", "group"]).assign(original=lambda t: t.group)


def epoch_of(
    rows: pd.DataFrame, batch: int = 2, seed: int = 1, epoch: int = 0, **share: Any
) -> list[int]:
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
    names = [
        "004",
        "982",
        "982",
        "004",
    ]  # real 004 and 982, then 982_004 and 004_982: all of one group
    rows = pd.DataFrame({"label": [0, 0, 1, 1], "group": "004", "original": names})
    assert {tuple(batch) for batch in cell.PairBatches(rows, 2, 5)} == {(0, 3), (1, 2)}


def test_epochs_differ_and_repeat_with_the_seed():
    rows = table(10, 4)
    assert epoch_of(rows, epoch=2) == epoch_of(rows, epoch=2) != epoch_of(rows, epoch=1)
    assert epoch_of(rows, seed=2) != epoch_of(rows, seed=1)


def test_without_a_fake_of_its_recording_a_real_video_gets_another_and_all_take_turns():
    rows = pd.DataFrame(
        {"label": [0] * 6 + [1] * 3, "group": list("abcdefxyz"), "original": list("abcdefxyz")}
    )
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
    with pytest.raises(
        ValueError, match="batches of 6 clips cannot be shared equally by 4 processes"
    ):
        cell.PairBatches(table(10, 4), 6, 1, 0, 4)
    with pytest.raises(ValueError, match="2 training clips are too few for 4 processes"):
        cell.PairBatches(table(1, 1), 8, 1, 0, 4)


def draws(seed: int = 0, **share: int) -> cell.PairDraws:
    return cell.PairDraws(torch.device("cpu"), [seed], **share)


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
    assert shown(noise[:5], draws(), [0, ~0, 1, 2, ~2], AUGMENTATION=kind).shape == (
        5,
        3,
        3,
        32,
        32,
    )


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_augment_their_shares_as_one_would_augment_the_batch(noise, processes):
    rows, share = [0, ~0, 1, ~1, 2, ~2], len(noise) // processes
    whole = shown(noise, draws(3), rows)
    parts = [
        shown(
            noise[rank * share :][:share],
            draws(3, rank=rank, processes=processes),
            rows[rank * share :][:share],
        )
        for rank in range(processes)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_augmentation_depends_on_its_seed_alone(noise):
    first = shown(noise, draws(1))
    torch.manual_seed(99)
    assert torch.equal(shown(noise, draws(1)), first) and not torch.equal(
        shown(noise, draws(2)), first
    )


def test_half_of_the_clips_are_mirrored_and_crops_stay_inside():
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 3, 32, 32)
    out = cell.separable(ramp, *cell.random_crop_and_flip(ramp, draws()))
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
    """The same crop, colours, codec and noise: far from the face the two clips of a pair are equal."""
    clips = portrait(clips=40)
    landmarks = landmarks_in(clips) * 0.4  # a small face in one corner
    rows = [row for real in range(20) for row in (real, ~real)]
    out = shown(clips, draws(2), rows, landmarks, AUGMENTATION=kind)
    real, fake = out[0::2], out[1::2]
    equal = (real - fake).abs().amax(dim=(1, 2)) < (
        0.01 if kind in ("none", "plain") else 0.08
    )  # contrast takes a mean
    assert equal.flatten(1).float().mean(dim=1).min() > 0.5
    assert (real - fake).abs().amax(dim=(1, 2, 3, 4)).min() > 0.02


def test_only_rows_that_ask_for_it_are_blended():
    clips = portrait(clips=4)
    out = shown(clips, draws(), [0, 1, ~2, 3], AUGMENTATION="none")
    same = [torch.equal(clip, cell.to_float(clips)[0]) for clip in out]
    assert same == [True, True, False, True]


def test_a_share_of_the_partners_are_self_blends_others_in_each_epoch():
    rows = table(10, 4)
    epochs = [epoch_of(rows, self_blend=0.3, epoch=epoch) for epoch in range(20)]
    for order in epochs:
        partners = dict(zip(order[::2], order[1::2], strict=True))
        assert sorted(partners) == list(range(10))
        assert sum(fake < 0 for fake in partners.values()) == 3
        assert all(fake == ~real for real, fake in partners.items() if fake < 0)
    assert {
        real
        for order in epochs
        for real, fake in zip(order[::2], order[1::2], strict=True)
        if fake < 0
    } == set(range(10))


def test_real_videos_are_enough_if_all_fakes_are_self_blends():
    rows = table(6, 0)
    order = epoch_of(rows, self_blend=1.0)
    assert [~row for row in order[::2]] == order[1::2] and sorted(order[::2]) == list(range(6))
    with pytest.raises(ValueError, match=r"no fakes to train on: SELF_BLEND = 0.5 needs some"):
        cell.PairBatches(rows, 2, 1, self_blend=0.5)


def test_without_pairs_partners_are_any_fakes():
    rows = table(40, 1)
    order = epoch_of(rows, pairs=False)
    assert sorted(order) == list(range(80))
    assert (rows.group[order[::2]].to_numpy() != rows.group[order[1::2]].to_numpy()).mean() > 0.8


# What videos go through


def test_the_landmarks_of_a_frame_have_the_coordinates_of_the_standard_face():
    turned = torch.tensor(cell.STANDARD_FACE) * 9j + (
        20 + 17j
    )  # 18 pixels between the eyes would be 18j
    where, turn, middle = cell.face_coordinates(torch.view_as_real(turned)[None, None], 40)
    face = cell.standard_face(torch.device("cpu"))
    assert torch.allclose(face * turn[0, 0, 0, 0] + middle[0, 0, 0, 0], turned, atol=1e-4)
    assert torch.allclose((turn * where + middle)[0, 0, 3, 7], torch.tensor(7 + 3j), atol=1e-4)


def images(clips: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(clips, 2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_cropping_and_mirroring_by_matrix_is_bilinear_sampling():
    clips = images()
    scale, across, down = (
        torch.tensor([0.8, -0.9, 1.0]),
        torch.tensor([0.2, -0.05, 0.0]),
        torch.tensor([-0.1, 0.1, 0.0]),
    )
    theta = torch.zeros(3, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = (
        scale,
        scale.abs(),
        across,
        down,
    )
    grid = F.affine_grid(theta, [3, 1, 32, 32], align_corners=False)
    expected = F.grid_sample(
        clips.flatten(1, 2), grid, padding_mode="border", align_corners=False
    ).view_as(clips)
    rows, columns = (
        cell.crop_matrix(clips, down, scale.abs()),
        cell.crop_matrix(clips, across, scale),
    )
    assert torch.allclose(cell.separable(clips, rows, columns), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.7, 0.25])
def test_fewer_pixels_keep_what_is_even_and_lose_what_is_fine(factor):
    clips = images()
    matrix = cell.resolution_matrix(clips, torch.full((3, 1, 1), factor))
    assert torch.allclose(
        cell.separable(torch.full_like(clips, 0.3), matrix, matrix), torch.tensor(0.3), atol=1e-5
    )
    worse = cell.separable(clips, matrix, matrix)
    assert (
        torch.allclose(worse, clips, atol=1e-5)
        if factor == 1
        else worse.std() < factor * clips.std()
    )


def test_blur_is_a_gaussian():
    clips, sigmas = images(), torch.tensor([0.0, 1.0, 2.0])
    matrix = cell.blur_matrix(clips, sigmas.view(3, 1, 1))
    blurred = cell.separable(clips, matrix, matrix)
    assert torch.allclose(blurred[0], clips[0], atol=1e-5)
    for i in (1, 2):
        expected = cv2.GaussianBlur(
            clips[i, 0].permute(1, 2, 0).numpy(), (25, 25), float(sigmas[i])
        )[8:-8, 8:-8]
        assert np.allclose(blurred[i, 0].permute(1, 2, 0).numpy()[8:-8, 8:-8], expected, atol=0.01)


@pytest.mark.parametrize("size", [32, 45])
def test_compression_loses_about_what_jpeg_does(size):
    picture = cv2.GaussianBlur(
        np.random.default_rng(0).uniform(0, 1, (size, size, 3)).astype(np.float32), (0, 0), 1
    )
    picture = (picture - picture.min()) / np.ptp(picture)
    clips = torch.from_numpy(picture).permute(2, 0, 1).expand(4, 2, -1, -1, -1)
    out = cell.compress(clips, torch.tensor([0.0, 0.2, 1.0, 1.7]).view(4, 1, 1))
    losses = (out - clips).square().mean(dim=(1, 2, 3, 4)).sqrt()
    assert losses[0] < 1e-3
    for loss, quality in zip(losses[1:].tolist(), (90, 50, 30), strict=True):
        whole_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        coding = [cv2.IMWRITE_JPEG_QUALITY, quality, *whole_colour]
        _, file = cv2.imencode(".jpg", (picture * 255).round().astype(np.uint8), coding)
        jpeg = np.sqrt(np.mean((cv2.imdecode(file, cv2.IMREAD_COLOR) / 255 - picture) ** 2))
        assert 0.5 < loss / jpeg < 1.5, (loss, jpeg, quality)


def test_a_lost_frame_shows_the_one_before():
    times = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(400, 8, 3, 2, 2)
    out = cell.lose_frames(times, draws())[:, :, 0, 0, 0]
    kept = out == torch.arange(8)
    assert 0.02 < (~kept.all(dim=1)).float().mean() < 0.2 and kept[:, 0].all()
    assert torch.equal(out, torch.where(kept, out, 0).cummax(dim=1).values)


def test_what_hides_a_part_of_the_face_moves_with_it():
    clips = images(400, 48)[:, :1].expand(-1, 2, -1, -1, -1)
    landmarks = landmarks_in(torch.zeros(400, 2, 48, 48, 3)).clone()
    landmarks[:, 1, :, 0] += 5
    hidden = (cell.cut_out(clips, landmarks, draws()) != clips).any(dim=2)
    assert 0.05 < hidden[:, 0].flatten(1).any(dim=1).float().mean() < 0.25
    assert torch.equal(hidden[:, 1, :, 5:], hidden[:, 0, :, :-5])


def test_training_draws_one_of_the_clips_that_lie_interleaved():
    clips = torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(200, 6, 8, 8, 3)
    landmarks = torch.arange(6.0).view(1, 6, 1, 1).expand(200, 6, 5, 2)
    some, marks = cell.choose_frames(clips, landmarks, 3, draws())
    assert {tuple(clip) for clip in some[..., 0, 0, 0].tolist()} == {(0, 2, 4), (1, 3, 5)}
    assert torch.equal(marks[..., 0, 0], some[..., 0, 0, 0].float())
    assert torch.equal(cell.choose_frames(clips, landmarks, 6, draws())[0], clips)
