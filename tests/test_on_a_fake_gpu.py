"""What a GPU would do, shown without one: devices, dtypes, and that a step never waits for it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fake_gpu import GPU, Watch, fake_gpu, made_on_gpu
import cell_04_dataset_class as data
import cell_05_model_definition as models
import cell_06_loss_and_utils as utils
import cell_07_training_functions as training
import cell_08_evaluation_functions as evaluation
from cell_02_global_config import CONFIG, Config

HALF = (None, torch.float16, torch.bfloat16)
SMALL = dataclasses.replace(CONFIG, BACKBONE="resnet18", IMAGE_SIZE=32, FRAMES_PER_VIDEO=4)


def changed(**settings: Any) -> Config:
    return dataclasses.replace(SMALL, **settings)


def batch_of(config: Config, clips: int = 4, per_video: int = 1) -> data.Batch:
    """A batch as `device_batches` gives it: half of its fakes are to be self-blended."""
    frames, side = config.FRAMES_PER_VIDEO * per_video, config.IMAGE_SIZE
    pixels = torch.empty(clips, frames, side, side, 3, dtype=torch.uint8, device=GPU)
    blend = BLEND
    landmarks, labels = torch.empty(clips, frames, 5, 2, device=GPU), torch.empty(clips, device=GPU)
    return data.Batch(pixels, landmarks, labels, torch.arange(clips), blend)


BLEND = torch.tensor([False, True, False, False])


def shown(batch, config, draws):
    return data.normalize(data.augment(batch, draws, config))


def draws_of(config):
    return data.PairedGenerator(GPU, [0], same=0.5 if config.AUGMENTATION == "robust" else 1.0)


def check_augmentation(config):
    batch, draws = batch_of(config), draws_of(config)
    shown(batch, config, draws)
    with Watch() as watch:
        clips = shown(batch, config, draws)
    assert clips.device == GPU and clips.dtype == torch.float32, clips
    assert not watch.waits, watch.waits


def check_step(config, precision, **options):
    model: Any = made_on_gpu(lambda: models.build_model(config).train())
    model.precision = precision
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler, average = training.LossScaler(GPU, precision), utils.ModelEMA(model, 0.98)
    given = model, utils.build_loss(config), optimizer, scaler, 0.5, 1.0, average
    trainer = training.Trainer(*given, **options)
    batch, draws = batch_of(config), draws_of(config)
    meter = training.EpochMeter(trainer, None, 1, None)

    def step():
        output, loss, norm = trainer.step(shown(batch, config, draws), batch.labels)
        meter.update(batch, output, loss, norm)

    step()
    with Watch() as watch:
        step()
    assert not watch.waits, watch.waits
    scores, figures = meter.waiting[-1][1:]
    assert {v.dtype for v in (figures, scores.losses, scores.logits)} == {torch.float32}
    assert {v.device for v in (figures, scores.losses, scores.logits, scores.attention)} == {GPU}
    assert {(w.grad.dtype, w.grad.device) for w in model.parameters()} == {(torch.float32, GPU)}
    assert {value.device for value in average.module.state_dict().values()} == {GPU}


def test_x():
    import time
    for kind in ("none","plain","codec","robust"):
        t=time.time()
        with fake_gpu(): check_augmentation(changed(AUGMENTATION=kind))
        print(kind,time.time()-t)
def test_y():
    import time
    for p in HALF:
        t=time.time()
        with fake_gpu(): check_step(SMALL,p)
        print(p,time.time()-t)
