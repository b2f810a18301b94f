# %% [markdown]
# <a id="section-5"></a>
# ## 5. The model
#
# A backbone describes each frame. A bidirectional LSTM reads the descriptions in order, so that each one is seen
# in the light of what came before and after. Self-attention lets the frames compare themselves with each other,
# however far apart. Their mean and their spread over time go to a classifier: a face that does not quite follow the
# head shows in the spread. A second voice comes straight from the frames, for many manipulations show in a single
# one, and a network that is told so learns faster.
#
# ```
# clip (B, T, 3, S, S)
#   ▼
# backbone (B, T, C) ──┐
#   ▼                  ▼
# BiLSTM (B, T, 2H)  linear
#   ▼                (B, T)
# self-attention       │
#   ▼                  ▼
# mean, spread       mean
#   ▼                  │
# linear               │
#   └──────▶ + ◀───────┘
#            ▼
#        logit (B,)
# ```

# %%
import contextlib
import pickle
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from cell_01_imports_and_setup import attached_files
from cell_02_global_config import Config, saved_config


class Output(NamedTuple):
    """What the network says of clips: positive logits mean fake."""

    logit: torch.Tensor  # (B,)
    frame_logits: torch.Tensor  # (B, T)
    attention: torch.Tensor  # (B, T), how much the clip looks at each frame; sums to 1


class DeepfakeDetector(nn.Module):
    """Frames -> backbone -> BiLSTM -> multi-head self-attention -> one logit a clip.

    Args:
        backbone: takes (N, 3, S, S) and gives (N, `features`).
        features: size of a frame's description.
        lstm_hidden, lstm_layers: units in each direction, and layers.
        attention_heads: must divide 2 * lstm_hidden.
        dropout: before each classifier.
        frames: T, the frames of a clip.
        mirror: in evaluation, look at the mirror image as well.

    In evaluation an input (B, K * T, 3, S, S) is K clips of a video, which have its frames in turn; their outputs are
    averaged, and those of their mirror images. Any other number of frames is one clip, as everything is in training.

    Set `precision` to a dtype for mixed precision. It acts inside `forward`, because DataParallel's threads would not
    take over an outer autocast's dtype.
    """

    precision: torch.dtype | None = None

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        lstm_hidden: int = 256,
        lstm_layers: int = 1,
        attention_heads: int = 8,
        dropout: float = 0.5,
        frames: int = 16,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        width = 2 * lstm_hidden
        self.backbone = backbone
        self.frame_head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, 1))
        self.lstm = nn.LSTM(
            features, lstm_hidden, lstm_layers, batch_first=True, bidirectional=True
        )
        self.attention = nn.MultiheadAttention(width, attention_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, 1))
        self.frames, self.mirror = frames, mirror

    def train(self, mode: bool = True) -> "DeepfakeDetector":
        super().train(mode)
        if not any(weight.requires_grad for weight in self.backbone.parameters()):
            self.backbone.eval()  # a frozen backbone keeps its statistics too
        return self

    def forward(self, clips: torch.Tensor) -> Output:
        """Normalised clips (B, T, 3, S, S), float; in evaluation (B, K * T, 3, S, S) too."""
        with torch.autocast(clips.device.type, self.precision, enabled=self.precision is not None):
            return self._one(clips) if self.training else self._average(clips)

    def _average(self, clips: torch.Tensor) -> Output:
        """The mean over clips of one video and their mirror images; the frames' outputs in the order of the frames."""
        turns = clips.shape[1] // self.frames if clips.shape[1] % self.frames == 0 else 1
        views = clips.unflatten(1, (-1, turns)).transpose(1, 2).flatten(0, 1)
        output = self._one(torch.cat([views, views.flip(-1)]) if self.mirror else views)
        logit, frame_logits, attention = (
            part.unflatten(0, (-1, len(clips), turns)).mean(dim=0) for part in output
        )
        return Output(
            logit.mean(dim=1),
            frame_logits.transpose(1, 2).flatten(1),
            attention.transpose(1, 2).flatten(1) / turns,
        )

    def _one(self, clips: torch.Tensor) -> Output:
        batch, frames = clips.shape[:2]
        described = self.backbone(clips.flatten(0, 1)).unflatten(0, (batch, frames))
        frame_logits = self.frame_head(described).squeeze(-1)
        self.lstm.flatten_parameters()  # DataParallel's copies are not in one piece
        in_order, _ = self.lstm(described)
        attended, weights = self.attention(in_order, in_order, in_order)
        seen = self.norm(in_order + attended)
        spread = (seen.var(dim=1, correction=0) + 1e-5).sqrt()
        logit = self.head(torch.cat([seen.mean(dim=1), spread], dim=1)).squeeze(
            -1
        ) + frame_logits.mean(dim=1)
        return Output(logit, frame_logits, weights.mean(dim=1))


# %% [markdown]
# **The backbone** is any classification model of torchvision. Its last linear layer, which would name one of
# ImageNet's classes, is taken off.


# %%
def build_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """A torchvision classification model without its last layer, with random weights, and its feature count.

    Raises ValueError for one that cannot work on `image_size` pixels.
    """
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    for auxiliary in (
        "aux1",
        "aux2",
        "AuxLogits",
    ):  # the side classifiers of GoogLeNet and Inception
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"BACKBONE = {name!r} has no linear classifier to replace; choose another, resnet50 say"
        )
    parent, _, last = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    try:
        with torch.no_grad():
            features = model.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"BACKBONE = {name!r} cannot take IMAGE_SIZE = {image_size}: {error}"
        ) from error
    return model.train(), features


def choose_trainable(backbone: nn.Module, which: str) -> None:
    """Freeze a backbone's weights but for those that `which` says: all, norms (normalisation layers) or head (none)."""
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    for module in backbone.modules():
        learns = which == "all" or (which == "norms" and isinstance(module, norms))
        for weight in module.parameters(recurse=False):
            weight.requires_grad_(learns)


class Recomputed(nn.Module):
    """Mixed into a block: its activations are not kept for the backward pass but computed a second time."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*inputs)

        def contexts() -> tuple:  # of the first computation and of the second
            return contextlib.nullcontext(), frozen_statistics(self)

        return checkpoint(super().forward, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """The second computation must not count the same batch twice in the running statistics."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = [(module, module.momentum) for module in block.modules() if isinstance(module, kinds)]
    try:
        for module, _ in norms:
            module.momentum = 0.0
        yield
    finally:
        for module, momentum in norms:
            module.momentum = momentum


def recompute_blocks(backbone: nn.Module) -> None:
    """Turn on gradient checkpointing for the blocks of the outermost sequences of a backbone, as far as it has any."""
    for child in backbone.children():
        if not isinstance(child, nn.Sequential):
            recompute_blocks(child)
            continue
        for block in child:
            if any(True for _ in block.parameters()):
                block.__class__ = type(
                    "Recomputed" + type(block).__name__, (Recomputed, type(block)), {}
                )


# %% [markdown]
# **Weights.** ImageNet's are the better start by far. They come from `WEIGHTS_PATH`, from PyTorch's cache, from a file
# such as `resnet50*.pth` in any dataset attached on Kaggle, or from the internet. If none of these has them the run
# goes on with random ones, says so, and its results say so too.


# %%
def local_weights(path: Path, backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The weights for `backbone` in a file: a state dict, or a checkpoint that has one under `state_dict` or `model`.

    Names may have a prefix (`module.`, `backbone.`, ...). Raises ValueError for a file that does not fit or is damaged.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a dictionary of tensors: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        saved = saved.get(key, saved) if isinstance(saved, dict) else {}
    own, names = backbone.state_dict(), [name for name in saved if isinstance(name, str)]
    first = next(iter(own))
    prefix = min(
        (name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")),
        key=len,
        default="",
    )
    weights = {name: saved.get(prefix + name) for name in own}
    odd = [
        name
        for name, value in own.items()
        if value.ndim and getattr(weights[name], "shape", None) != value.shape
    ]
    parts = {name.split(".")[0] for name in own}
    extra = [
        name for name in names if name.startswith(prefix) and name.removeprefix(prefix) not in own
    ]
    odd += [name for name in extra if name.removeprefix(prefix).split(".")[0] in parts][
        2:
    ]  # two are the last layer's
    if odd:
        raise ValueError(
            f"{path} is not for this backbone: {len(odd)} tensors such as {odd[0]!r} do not fit"
        )
    return {name: value for name, value in weights.items() if value is not None}


def imagenet_weights(name: str) -> dict[str, torch.Tensor]:
    """torchvision's default weights of a model, from its cache or downloaded. Raises OSError within seconds."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    finally:
        socket.setdefaulttimeout(patience)


def load_backbone_weights(backbone: nn.Module, name: str, pretrained: bool, path: str) -> str:
    """Put weights into the backbone and say in a few words where they came from.

    Raises ValueError if the file named does not fit the backbone. A failed download is a warning.
    """
    if path:
        weights, origin = local_weights(Path(path), backbone), f"file {path}"
    elif not pretrained:
        return "random"
    else:
        try:
            weights, origin = attached_weights(backbone, name) or (
                imagenet_weights(name),
                "ImageNet (torchvision)",
            )
        except OSError as error:
            reason = f"the ImageNet weights of {name} could not be downloaded ({error})"
            warnings.warn(
                f"Training starts from random weights: {reason}. Accuracy will be far lower. Turn the internet on, "
                f"attach a dataset that holds them as {name}.pth, or name a file in WEIGHTS_PATH.",
                stacklevel=2,
            )
            return f"random: {reason}"
    backbone.load_state_dict(weights, strict=False)
    return origin


def attached_weights(backbone: nn.Module, name: str) -> tuple[dict[str, torch.Tensor], str] | None:
    """Weights in a dataset attached on Kaggle, and where. None if none fit, or PyTorch's cache has them already."""
    cached = Path(
        torch.hub.get_dir(),
        "checkpoints",
        Path(torchvision.models.get_model_weights(name).DEFAULT.url).name,
    )
    for file in [] if cached.exists() else attached_files(f"{name}*.pth"):
        try:
            return local_weights(file, backbone), f"attached file {file}"
        except ValueError as error:
            print(f"Not used: {error}")
    return None


def build_model(config: Config | SimpleNamespace) -> DeepfakeDetector:
    """The network of a configuration, with random weights."""
    backbone, features = build_backbone(config.BACKBONE, config.IMAGE_SIZE)
    if config.GRADIENT_CHECKPOINTING:
        recompute_blocks(backbone)
        if not any(isinstance(module, Recomputed) for module in backbone.modules()):
            raise ValueError(
                f"GRADIENT_CHECKPOINTING finds no blocks in BACKBONE = {config.BACKBONE!r}: turn it off"
            )
    model = DeepfakeDetector(
        backbone,
        features,
        config.LSTM_HIDDEN,
        config.LSTM_LAYERS,
        config.ATTENTION_HEADS,
        config.DROPOUT,
        config.FRAMES_PER_VIDEO,
        config.MIRROR_TEST,
    )
    return model.to(memory_format=torch.channels_last)


def load_detector(path: Path, device: str | torch.device = "cpu") -> tuple[DeepfakeDetector, dict]:
    """A trained model, ready to score, and everything else its file holds: config, threshold, temperature, ...

    The probability of a clip is `sigmoid(model(normalize(to_float(clips))).logit / temperature)`.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved["config"] = saved_config(saved)
    model = build_model(SimpleNamespace(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), saved
