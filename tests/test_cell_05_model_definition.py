import copy
import dataclasses
import pickle
import time
from http.client import IncompleteRead

import pytest
import torch
import torchvision

import cell_05_model_definition as cell
from cell_02_global_config import CONFIG
from cell_04_dataset_class import compress, denormalize, normalize

SMALL = dataclasses.replace(
    CONFIG, BACKBONE="resnet18", IMAGE_SIZE=64, LSTM_HIDDEN=16, ATTENTION_HEADS=2, DROPOUT=0.0
)


def small_model(**changes) -> cell.DeepfakeDetector:
    torch.manual_seed(0)
    return cell.build_model(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize(
    "name",
    [
        *("resnet50", "mobilenet_v3_small", "efficientnet_b0"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "densenet121",
                "convnext_tiny",
                "regnet_y_400mf",
                "shufflenet_v2_x0_5",
                "vgg11",
            )
        ),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "swin_t")),
    ],
)
def test_any_torchvision_classifier_is_a_backbone(name):
    backbone, features = cell.build_backbone(name, 64)
    assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, features)


def test_the_output_has_a_logit_a_clip_and_a_frame_and_attention_that_sums_to_one():
    output = small_model().eval()(torch.rand(2, 5, 3, 64, 64))
    assert output.logit.shape == (2,)
    assert output.frame_logits.shape == output.attention.shape == (2, 5)
    assert torch.allclose(output.attention.sum(dim=1), torch.ones(2))


def test_mixed_precision_acts_inside_the_model_and_stays_close():
    model, clips = small_model().eval(), torch.rand(2, 4, 3, 64, 64)
    with torch.no_grad():
        full = model(clips).logit
        model.precision = torch.bfloat16
        mixed = model(clips).logit
    assert not torch.equal(full, mixed) and torch.allclose(full, mixed, atol=0.1)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_in_mixed_precision_all_after_the_backbone_is_in_float32(precision):
    model, seen = small_model().train(), dict[str, torch.dtype]()
    model.precision = precision

    def watch(name: str, module: torch.nn.Module) -> None:
        def note(module, given, made):
            seen[name] = (made[0] if isinstance(made, tuple) else made).dtype

        module.register_forward_hook(note)

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.LSTM, torch.nn.Linear)):
            watch(name, module)
    output = model(torch.rand(2, 4, 3, 64, 64))
    assert {part.dtype for part in output} == {torch.float32}
    in_backbone = {dtype for name, dtype in seen.items() if name.startswith("backbone")}
    after = {dtype for name, dtype in seen.items() if not name.startswith("backbone")}
    assert in_backbone == {precision} and after == {torch.float32}


def test_convolutions_run_in_channels_last_where_weights_have_lost_it():
    """As in DataParallel's second copy: weights are flattened when they are sent to its GPU."""
    model, seen = small_model().train().to(memory_format=torch.contiguous_format), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, given, made: seen.append(made))
    model(torch.rand(2, 4, 3, 64, 64))
    assert len(seen) == 20
    assert all(made.is_contiguous(memory_format=torch.channels_last) for made in seen)


def test_clips_do_not_influence_each_other_but_the_order_of_frames_counts():
    model, clips = small_model().eval(), torch.rand(3, 4, 3, 64, 64)
    with torch.no_grad():
        together = model(clips).logit
        alone = torch.cat([model(clip[None]).logit for clip in clips])
        reordered = model(clips[:, [2, 0, 3, 1]]).logit
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, reordered, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [("squeezenet1_0", 64, "no linear"), ("vit_b_16", 160, "IMAGE_SIZE = 160")],
)
def test_a_backbone_that_cannot_work_is_a_clear_error(name, size, says):
    with pytest.raises(ValueError, match=says):
        cell.build_backbone(name, size)


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    clips = torch.rand(2, 3, 3, 64, 64)
    plain, recomputing = small_model(), small_model(GRADIENT_CHECKPOINTING=True)
    recomputing = copy.deepcopy(pickle.loads(pickle.dumps(recomputing)))
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    saved = []
    for model in (plain, recomputing):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved[-1].append(t.numel()) or t, lambda t: t
        ):
            saved.append([])
            model(clips).logit.sum().backward()
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.allclose(
            a.grad if a.grad is not None else a, b.grad if b.grad is not None else b, atol=1e-5
        )
    for (name, a), b in zip(plain.named_buffers(), recomputing.buffers(), strict=True):
        assert name.endswith("num_batches_tracked") or torch.allclose(a, b, atol=1e-6), name
    assert sum(saved[1]) < 0.6 * sum(saved[0])


def test_gradient_checkpointing_that_could_not_act_is_an_error():
    with pytest.raises(ValueError, match="finds no blocks in BACKBONE = 'inception_v3'"):
        small_model(BACKBONE="inception_v3", IMAGE_SIZE=96, GRADIENT_CHECKPOINTING=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {
            "epoch": 7,
            "model": {f"backbone.{k}": v for k, v in w.items() if not k.startswith("fc.")},
        },
    ],
)
def test_local_weights_are_loaded_plain_or_wrapped(tmp_path, wrap):
    torch.manual_seed(1)
    source = torchvision.models.resnet18()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    backbone, _ = cell.build_backbone("resnet18", 64)
    origin = cell.load_backbone_weights(backbone, "resnet18", True, str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.conv1.weight, source.conv1.weight) and "weights.pth" in origin


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    backbone, _ = cell.build_backbone("resnet50", 64)
    with pytest.raises(
        ValueError, match=r"weights.pth does not match this backbone: \d+ tensors such as"
    ):
        cell.load_backbone_weights(backbone, "resnet50", True, str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no weights",
        b"PK\x03\x04 cut off",
        pickle.dumps(print),
        None,
        [1, 2],
        {"model": "vgg"},
    ],
)
def test_a_file_that_holds_no_weights_is_a_clear_error(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "weights.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "weights.pth")
    backbone, _ = cell.build_backbone("resnet18", 64)
    with pytest.raises(
        ValueError,
        match=r"weights.pth (cannot be read as a dictionary|does not match this backbone)",
    ):
        cell.load_backbone_weights(backbone, "resnet18", True, str(tmp_path / "weights.pth"))


def test_on_kaggle_attached_weights_are_found_and_others_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    for name, model in {"resnet18-a.pth": "resnet34", "resnet18-b.pth": "resnet18"}.items():
        torch.manual_seed(3)
        torch.save(torchvision.models.get_model(model).state_dict(), tmp_path / name)
    monkeypatch.setattr(cell, "attached_files", lambda pattern: sorted(tmp_path.glob(pattern)))
    backbone, _ = cell.build_backbone("resnet18", 64)
    assert cell.load_backbone_weights(backbone, "resnet18", False, "") == "random"
    origin = cell.load_backbone_weights(backbone, "resnet18", True, "")
    assert origin == f"attached file {tmp_path / 'resnet18-b.pth'}"
    torch.manual_seed(3)
    assert torch.equal(backbone.conv1.weight, torchvision.models.resnet18().conv1.weight)
    assert "Skipped: " in capsys.readouterr().out


def test_the_cache_goes_before_attached_files(tmp_path, monkeypatch):
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(cell, "attached_files", lambda pattern: pytest.fail("looked elsewhere"))
    backbone, _ = cell.build_backbone("resnet18", 64)
    assert cell.load_backbone_weights(backbone, "resnet18", True, "") == "ImageNet (torchvision)"


def test_without_internet_training_starts_from_random_weights_with_a_warning_within_seconds(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    backbone, _ = cell.build_backbone("resnet18", 64)
    before, started = backbone.conv1.weight.clone(), time.monotonic()
    with pytest.warns(UserWarning, match="could not be downloaded.*WEIGHTS_PATH"):
        origin = cell.load_backbone_weights(backbone, "resnet18", True, "")
    assert time.monotonic() - started < 20
    assert origin.startswith("random") and torch.equal(before, backbone.conv1.weight)


@pytest.mark.parametrize(
    "error", [RuntimeError("invalid hash value"), IncompleteRead(b"a part")], ids=repr
)
def test_so_it_does_after_a_broken_download(monkeypatch, tmp_path, error):
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", broken)
    backbone, _ = cell.build_backbone("resnet18", 64)
    with pytest.warns(UserWarning, match="could not be downloaded"):
        assert cell.load_backbone_weights(backbone, "resnet18", True, "").startswith("random")


@pytest.mark.parametrize(
    "backbone", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5"]
)
def test_a_saved_detector_scores_the_same_without_its_batch_norms(tmp_path, backbone):
    model, clips = small_model(BACKBONE=backbone), torch.rand(2, 4, 3, 64, 64)
    model(clips)  # statistics other than those of a new network
    saved = {
        "model": model.eval().state_dict(),
        "config": dataclasses.asdict(SMALL) | {"BACKBONE": backbone},
        "threshold": 0.4,
        "temperature": 1.2,
    }
    torch.save(saved, tmp_path / "best_model.pth")
    loaded, content = cell.load_detector(tmp_path / "best_model.pth")
    with torch.no_grad():
        assert torch.allclose(loaded(clips).logit, model(clips).logit, atol=1e-4)
    assert content["threshold"] == 0.4 and not loaded.training
    left = sum(isinstance(part, torch.nn.BatchNorm2d) for part in loaded.modules())
    assert (left == 0) == (backbone != "densenet121"), "some of its norms come before convolutions"


def test_a_model_file_from_before_several_clips_is_scored_with_one(tmp_path):
    config = {
        name: value
        for name, value in dataclasses.asdict(SMALL).items()
        if name != "CLIPS_PER_VIDEO"
    }
    torch.save({"model": small_model().state_dict(), "config": config}, tmp_path / "best_model.pth")
    _, saved = cell.load_detector(tmp_path / "best_model.pth")
    assert saved["config"]["CLIPS_PER_VIDEO"] == 1


def test_the_offset_of_the_calibration_is_applied_once_and_older_files_have_it_in_the_bias(
    tmp_path,
):
    """P(fake) = sigmoid((logit - offset) / temperature), in files of format 1 and 2 alike."""
    model, clips = small_model().eval(), torch.rand(2, 4, 3, 64, 64)
    with torch.no_grad():
        expected = model(clips)
    folded = {**model.state_dict(), "frame_head.1.bias": model.frame_head[1].bias.data - 0.75}
    config = dataclasses.asdict(SMALL)
    files = ({"model": folded}, {"model": model.state_dict(), "offset": 0.75})
    for content, offset in zip(files, (0.0, 0.75), strict=True):
        torch.save({**content, "config": config}, tmp_path / "best_model.pth")
        detector, saved = cell.load_detector(tmp_path / "best_model.pth")
        with torch.no_grad():
            output = detector(clips)
        assert torch.allclose(output.logit, expected.logit - 0.75, atol=1e-5)
        assert torch.allclose(output.frame_logits, expected.frame_logits - 0.75, atol=1e-5)
        assert saved["offset"] == offset


def test_scores_with_a_reference_are_relative_to_the_same_frames_compressed():
    clips = normalize(torch.rand(2, 6, 3, 64, 64))
    model = small_model(FRAMES_PER_VIDEO=6, REFERENCE=1.7).eval()
    coarse = normalize(compress(denormalize(clips), torch.tensor([1.7])))
    with torch.no_grad():
        relative, both = model(clips), model.score_clip(torch.cat([clips, coarse]))
    for found, parts in ((relative.logit, both.logit), (relative.frame_logits, both.frame_logits)):
        expected = parts[:2] - 0.7 * parts[2:]
        assert torch.allclose(found, expected, atol=1e-4) and found.abs().max() > 1e-3
    assert torch.allclose(relative.attention, both.attention[:2], atol=1e-4)
    model.offset = 0.5
    with torch.no_grad():
        assert torch.allclose(model(clips).logit, relative.logit - 0.5, atol=1e-4)
        flat = normalize(torch.full_like(clips, 0.4))  # what compression does not change
        kept = 0.3 * model.score_clip(flat).logit
        assert torch.allclose(model(flat).logit, kept - 0.5, atol=0.02)


def test_of_interleaved_clips_every_second_one_is_the_reference():
    model = small_model(FRAMES_PER_VIDEO=1, LSTM_LAYERS=0, REFERENCE=1.7).eval()
    clips = normalize(torch.rand(2, 4, 3, 64, 64))
    coarse = normalize(compress(denormalize(clips), torch.tensor([1.7])))
    with torch.no_grad():
        found = model(clips)
        intact, reference = model.score_clip(clips), model.score_clip(coarse).frame_logits[:, 1::2]
    expected = intact.frame_logits - 0.7 * reference.repeat_interleave(2, dim=1)
    assert torch.allclose(found.frame_logits, expected, atol=1e-4)
    assert torch.allclose(found.logit, expected.mean(dim=1), atol=1e-4)


def test_several_clips_of_a_video_are_averaged():
    clips, model = torch.rand(2, 6, 3, 64, 64), small_model(FRAMES_PER_VIDEO=3).eval()
    with torch.no_grad():
        parts = [model(clips[:, start::2]) for start in (0, 1)]
        together = model(clips)
    assert torch.allclose(together.logit, (parts[0].logit + parts[1].logit) / 2, atol=1e-5)
    for start in (0, 1):
        frame_logits = together.frame_logits[:, start::2]
        assert torch.allclose(frame_logits, parts[start].frame_logits, atol=1e-5)
        attention = 2 * together.attention[:, start::2]
        assert torch.allclose(attention, parts[start].attention, atol=1e-5)


def test_the_table_of_shapes_has_every_part_and_leaves_the_model_as_it_was():
    model = small_model()
    table = cell.shape_table(model, torch.zeros(2, 3, 3, 64, 64))
    assert table.output["backbone"] == "(6, 512)" and table.output["lstm"] == "(2, 3, 32)"
    assert table.output["all"] == "(2,)" and set(table.index) == {
        *dict(model.named_children()),
        "all",
    }
    assert not any(module._forward_hooks for module in model.modules())
