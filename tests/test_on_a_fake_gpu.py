"""What a GPU would do, shown without one: devices, dtypes, and that no step waits for it.

Each check is run on the code as it is, then on planted mistakes that no test on a CPU would find.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fake_gpu import (
    GPU,
    Watch,
    batch_of,
    fake_gpu,
    made_on_gpu,
    trainer_of,
    watch_augmentation,
    watch_step,
    why_not,
)
from torch import nn

import cell_04_dataset_class as data
import cell_05_model_definition as models
import cell_06_loss_and_utils as utils
import cell_07_training_functions as training
import cell_08_evaluation_functions as evaluation
from cell_02_global_config import CONFIG

SMALL = dataclasses.replace(CONFIG, BACKBONE="resnet18", IMAGE_SIZE=32, FRAMES_PER_VIDEO=2)
changed = partial(dataclasses.replace, SMALL)
BLEND = torch.tensor([False, True, False, False])  # a real tensor: the CPU knows its values


def tiny_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """Two blocks, which gradient checkpointing can recompute; a twentieth of resnet18's time."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    parts = dict(stem=stem, block=block, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return nn.Sequential(OrderedDict(both=nn.Sequential(OrderedDict(parts)))), 8


@pytest.fixture(autouse=True)
def gpu(monkeypatch, request):
    if reason := why_not():
        pytest.skip(reason)
    if "resnet" not in request.node.name:
        monkeypatch.setattr(models, "build_backbone", tiny_backbone)
    # Its thread would not be in fake mode.
    monkeypatch.setattr(training, "device_batches", lambda loader, device: iter(loader))
    monkeypatch.setattr(training, "scores_of", lambda parts, *_: parts)
    if "traffic" in request.node.name:
        yield
        return
    with fake_gpu():
        yield


def model_of(config=SMALL, precision=None) -> Any:
    model: Any = made_on_gpu(lambda: models.build_model(config))
    model.precision = precision
    return model


def without_waiting(step: Callable[..., Any], *given: Any) -> Any:
    with Watch() as watch:
        result = step(*given)
    assert not watch.waits, f"the CPU waits for {watch.waits}"
    return result


def check_augmentation(kind: str = "codec", twins: float = 1.0) -> None:
    batch, draws = batch_of(SMALL, 4, BLEND), data.PairedGenerator(GPU, [0], same=twins)
    config = changed(AUGMENTATION=kind)
    data.normalize(data.augment(batch, draws, config))  # puts constants on the GPU
    clips = without_waiting(lambda: data.normalize(data.augment(batch, draws, config)))
    assert clips.device == GPU and clips.dtype == torch.float32 and clips.shape[:3] == (4, 2, 3)


def check_step(config=SMALL, precision=torch.float16, **options: Any) -> None:
    trainer: Any = trainer_of(config, precision, **options)
    batch = batch_of(config, 4, BLEND)
    meter = training.EpochMeter(trainer, None, 1, training.NO_BAR)
    clips = data.normalize(data.to_float(batch.clips))

    without_waiting(lambda: meter.update(batch, *trainer.step(clips, batch.labels)))
    ((_, scores, figures),) = meter.waiting
    results: tuple = (figures, scores.losses, scores.logits, scores.frame_logits)
    results += (*trainer.average.module.parameters(), *(w.grad for w in trainer.model.parameters()))
    kinds = {(value.device, value.dtype) for value in results}
    assert kinds == {(GPU, torch.float32)}, f"devices and dtypes {kinds}"


def check_validation(precision=None, per_video: int = 1) -> None:
    model = utils.ModelEMA(model_of(precision=precision), 0.9)
    batch, loss = batch_of(SMALL, 4, BLEND, per_video), utils.FocalLoss(2.0, 0.5)
    shown = data.normalize(data.to_float(batch.clips))  # puts constants on the GPU
    data.self_blend(shown, batch.landmarks, data.DeviceRandom(GPU, [0]))
    (scores,) = without_waiting(training.validate, model, [batch], loss, GPU)
    assert scores.frame_logits.shape == (4, 2 * per_video)
    assert {value.device for value in (scores.losses, scores.logits, scores.frame_logits)} == {GPU}


def check_heat_maps() -> None:
    clips = torch.empty(1, 2, 3, 32, 32, device=GPU)
    heat, output = evaluation.heat_maps(model_of().eval(), clips)
    assert heat.shape == (1, 2, 32, 32) and heat.device == output.logit.device == GPU


@pytest.mark.parametrize("kind", ["none", "plain", "codec", "robust"])
def test_augmentation(kind):
    check_augmentation(kind, 0.5 if kind == "robust" else 1.0)


def test_a_training_step_in_float32():
    check_step(precision=None)


def test_a_training_step_of_resnet18_in_fp16():
    check_step(precision=torch.float16)


def test_a_training_step_in_fp16_in_parts():
    check_step(micro_batch=3)


def test_a_training_step_in_bf16_that_computes_activations_again():
    check_step(changed(GRADIENT_CHECKPOINTING=True), torch.bfloat16)


@pytest.mark.parametrize(
    ("precision", "clips"), [(None, 3), (torch.float16, 1), (torch.bfloat16, 1)]
)
def test_validation(precision, clips):
    check_validation(precision, clips)


def test_heat_maps():
    check_heat_maps()


# Traffic, for 16 clips of the default setting: 16 frames of 160 pixels, ResNet50


def test_traffic_of_augmentation():
    watch = watch_augmentation(CONFIG)
    assert watch.bytes <= 5.5e9 and watch.kernels <= 200, (watch.bytes, watch.kernels)


def test_traffic_of_the_bookkeeping_around_a_resnet50():
    watch = watch_step(CONFIG, gradients=False)
    assert watch.kernels <= 100, watch.kernels


# Mistakes


def face_on_the_cpu(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values) * 1


def sent_each_time(values: tuple, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)


def drawn_on_the_cpu(self: Any, count: int, low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.empty(count, *shape).uniform_(low, high)


def taken_by_an_index(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return values[torch.tensor(rows)]


def taken_by_a_mask(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return values[values.flatten(1).amax(dim=1) >= 0]


def read_each_time(loss: Any, *given: Any) -> torch.Tensor:
    value = loss(*given)
    return value * (1.0 if value.item() > 0 else 0.5)


def first_gradient_on_the_cpu(where: Any, condition: Any, *values: Any) -> torch.Tensor:
    return torch.ones(()) if isinstance(values[0], float) else where(condition, *values)


def clipped_on_the_cpu(model: nn.Module, limit: float, scaler: Any) -> torch.Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), limit) / scaler.get_scale()


def half_frames(forward: Any, self: Any, clips: torch.Tensor) -> Any:
    self.precision = None
    return forward(self, clips.half())


def averaged_on_the_cpu(init: Any, self: Any, model: nn.Module, decay: float) -> None:
    init(self, model, decay)
    for module in self.module.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                setattr(module, name, nn.Parameter(torch.empty_like(weight, device="cpu")))


def loss_on_the_cpu(score: Any, output: Any, loss: torch.Tensor, batch: Any) -> Any:
    return score(output, loss.cpu(), batch)


Mistake = tuple[Callable, Any, str, Callable, str]  # check, where, name, mistake, what is found
DEVICES, DTYPES, READ = "device", "dtype|[Hh]alf", "_local_scalar_dense"
AUGMENT, STEP, VALIDATE, DRAWS = check_augmentation, check_step, check_validation, data.DeviceRandom
WAITS = "the CPU waits for"
MISTAKES: dict[str, Mistake] = {
    "constants on the CPU": (AUGMENT, data, "device_constant", face_on_the_cpu, DEVICES),
    "constants sent each time": (AUGMENT, data, "device_constant", sent_each_time, WAITS),
    "random numbers from the CPU": (AUGMENT, DRAWS, "uniform", drawn_on_the_cpu, DEVICES),
    "rows by an index that is sent": (AUGMENT, data, "take", taken_by_an_index, WAITS),
    "rows by a mask": (AUGMENT, data, "take", taken_by_a_mask, "nonzero"),
    "the loss read in each step": (STEP, utils.FocalLoss, "forward", read_each_time, READ),
    "a first gradient on the CPU": (STEP, torch, "where", first_gradient_on_the_cpu, DEVICES),
    "the loss scale read": (STEP, training, "clip_gradients", clipped_on_the_cpu, READ),
    "descriptions left in half": (STEP, torch.Tensor, "float", lambda self: self, DTYPES),
    "half without autocast": (STEP, models.DeepfakeDetector, "score_clip", half_frames, DTYPES),
    "averages on the CPU": (STEP, utils.ModelEMA, "__init__", averaged_on_the_cpu, DEVICES),
    "losses sent to the CPU": (VALIDATE, training.BatchScores, "of", loss_on_the_cpu, WAITS),
}
WRAPPERS: tuple = (read_each_time, first_gradient_on_the_cpu, half_frames, averaged_on_the_cpu)
WRAPPERS += (loss_on_the_cpu,)  # these get what they replace first


FEW = ("rows by a mask", "the loss read in each step", "losses sent to the CPU")  # one of a kind
REST = [pytest.param(name, marks=pytest.mark.slow) for name in MISTAKES if name not in FEW]


@pytest.mark.parametrize("name", [*FEW, *REST])
def test_a_planted_mistake_is_found(name, monkeypatch):
    check, where, attribute, mistake, message = MISTAKES[name]
    before = getattr(where, attribute)
    planted = partial(mistake, before) if mistake in WRAPPERS else mistake
    monkeypatch.setattr(where, attribute, lambda *given: planted(*given))
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=message) as found:
        check()
    print(f"{name}: {type(found.value).__name__}: {str(found.value).splitlines()[0]}")
