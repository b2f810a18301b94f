# %% [markdown]
# <a id="section-5"></a>
# ## 5. The model
#
# A backbone describes each frame. A bidirectional LSTM reads the descriptions in order, so each
# frame is seen in the light of those before and after it. Self-attention lets frames compare
# themselves with each other, however far apart. Their mean and their spread over time go to a
# classifier: a face that does not quite follow the head shows in the spread. A second classifier
# scores each frame on its own, because many manipulations show in a single frame and a network
# trained on that signal too learns faster. The clip's logit is the sum of both.

# %%
import contextlib
import dataclasses
import itertools
import socket
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
import torch
import torchvision
from IPython.display import display
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from cell_01_imports_and_setup import IN_NOTEBOOK, attached_files
from cell_02_global_config import CONFIG, DAMAGE, Config, read_model_file, saved_config
from cell_04_dataset_class import compress, denormalize, device_constant, normalize


class DetectorOutput(NamedTuple):
    """What the network returns; positive logits mean fake. `attention` sums to 1 over a clip."""

    logit: torch.Tensor  # (B,)
    frame_logits: torch.Tensor  # (B, T)
    attention: torch.Tensor  # (B, T), how much the clip looks at each frame


# %%
class DeepfakeDetector(nn.Module):
    """Frames -> backbone -> BiLSTM -> multi-head self-attention -> one logit per clip.

    `backbone` maps (N, 3, S, S) to (N, `features`); `frames` is T. Without `lstm_layers` the logit
    is the mean of the frames'. For `offset` and `reference`, see `relative_scores`. `precision`:
    the backbone's, since DataParallel's threads do not inherit the caller's autocast.
    """

    precision: torch.dtype | None = None
    offset = reference = 0.0

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        lstm_hidden: int = 256,
        lstm_layers: int = 1,
        attention_heads: int = 8,
        dropout: float = 0.5,
        frames: int = 16,
    ) -> None:
        super().__init__()
        self.backbone, self.frames, width = backbone, frames, 2 * lstm_hidden
        self.frame_head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, 1))
        self.reads_order = lstm_layers > 0
        if self.reads_order:
            lstm = partial(nn.LSTM, batch_first=True, bidirectional=True)
            self.lstm = lstm(features, lstm_hidden, lstm_layers)
            self.attention = nn.MultiheadAttention(width, attention_heads, batch_first=True)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, 1))

    def forward(self, clips: torch.Tensor) -> DetectorOutput:
        """Normalised clips (B, T, 3, S, S). In evaluation, K * T frames are K interleaved clips."""
        return self.score_clip(clips) if self.training else relative_scores(self, clips)

    def score_clip(self, clips: torch.Tensor) -> DetectorOutput:
        """One clip, of any length T, for each of B videos: (B, T, 3, S, S)."""
        # DataParallel's second copy has lost the memory format of the weights.
        frames = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(clips.device.type, self.precision, enabled=self.precision is not None):
            described = self.backbone(frames).float().unflatten(0, clips.shape[:2])
        frame_logits = self.frame_head(described).squeeze(-1)
        if not self.reads_order:
            equal = torch.full_like(frame_logits, 1 / frame_logits.shape[1])
            return DetectorOutput(frame_logits.mean(dim=1), frame_logits, equal)
        if clips.shape[1] == 1:  # a still is a clip in which nothing moves, as in training
            described = described.expand(-1, self.frames, -1)
        self.lstm.flatten_parameters()  # DataParallel's replicas have scattered weights
        in_order, _ = self.lstm(described)
        attended, weights = self.attention(in_order, in_order, in_order)
        seen = self.norm(in_order + attended)
        spread = (seen.var(dim=1, correction=0) + 1e-5).sqrt()
        logit = self.head(torch.cat([seen.mean(dim=1), spread], dim=1)).squeeze(-1)
        attention = weights.mean(dim=1)[:, : clips.shape[1]]
        return DetectorOutput(logit + frame_logits.mean(1), frame_logits, attention)


# %%
def average_views(model: DeepfakeDetector, clips: torch.Tensor) -> DetectorOutput:
    """The mean over K interleaved clips; frame outputs stay in the order of the frames."""
    count = clips.shape[1] // model.frames if clips.shape[1] % model.frames == 0 else 1
    parts = model.score_clip(clips.unflatten(1, (-1, count)).transpose(1, 2).flatten(0, 1))
    logit, frames, attention = (part.unflatten(0, (-1, count)) for part in parts)
    return DetectorOutput(logit.mean(1), frames.mT.flatten(1), attention.mT.flatten(1) / count)


def relative_scores(model: DeepfakeDetector, clips: torch.Tensor) -> DetectorOutput:
    """The scores of normalised clips, less `offset` and 0.7 of those of a `reference`.

    That is the clips compressed so coarsely; 0: none. What compression leaves, such as the person
    and the light, nearly cancels out. Of interleaved clips, every second one is compressed. The
    intact clips come last: heat maps are of the last pass.
    """
    ref: Any = 0.0, 0.0
    if model.reference:
        step = 1 if clips.shape[1] % (2 * model.frames) else 2
        some = denormalize(clips[:, step - 1 :: step])
        coarse = compress(some, device_constant((model.reference,), clips.device))
        with torch.no_grad():  # heat maps need the gradient of the last pass alone
            logit, frames, _ = average_views(model, normalize(coarse))
        ref = 0.7 * logit, 0.7 * frames.repeat_interleave(step, dim=1)
    logit, frames, attention = average_views(model, clips)
    return DetectorOutput(logit - ref[0] - model.offset, frames - ref[1] - model.offset, attention)


# %% [markdown]
# **The backbone** is any classification model of torchvision, without its last linear layer.


# %%
def build_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """A torchvision model without its classifier, randomly initialised, and its feature count.

    Raises ValueError for one that cannot work on `image_size` pixels.
    """
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # side classifiers of GoogLeNet and Inception
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"BACKBONE = {name!r} has no linear classifier to replace: try resnet50")
    parent, _, last = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    try:
        with torch.no_grad():
            features = model.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except (AssertionError, RuntimeError) as error:
        message = f"BACKBONE = {name!r} cannot take IMAGE_SIZE = {image_size}: {error}"
        raise ValueError(message) from error
    return model.train(), features


# %% [markdown]
# With `GRADIENT_CHECKPOINTING` the backbone keeps only the inputs of its blocks, and computes what
# happens inside a second time for the gradients: less memory, more time.


# %%
class Recomputed(nn.Sequential):
    """A sequence whose blocks keep no activations: the backward pass computes them again."""

    def __init__(self, blocks: OrderedDict[str, nn.Module]) -> None:
        super().__init__(blocks)
        # Noted here, because the parameters of DataParallel's replicas cannot be listed.
        self.has_weights = [any(True for _ in block.parameters()) for block in self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, has_weights in zip(self, self.has_weights, strict=True):
            contexts = partial(recompute_contexts, block)
            recompute = partial(checkpoint, block, use_reentrant=False, context_fn=contexts)
            x = recompute(x) if has_weights and self.training else block(x)
        return x


def recompute_contexts(block: nn.Module) -> tuple:
    """The contexts of the first computation of a block and of the second."""
    return contextlib.nullcontext(), frozen_statistics(block)


@contextlib.contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps batch normalisation from counting the same batch twice in its running statistics."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = {part: part.momentum for part in block.modules() if isinstance(part, kinds)}
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum


def recompute_blocks(network: nn.Module) -> int:
    """Turn on gradient checkpointing in the outermost sequences, and return how many there are."""
    found = 0
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
            setattr(network, name, Recomputed(OrderedDict(child.named_children())))
            found += 1
        else:
            found += recompute_blocks(child)
    return found


# %% [markdown]
# **Weights.** ImageNet weights are by far the better start. They come from `WEIGHTS_PATH`, from
# PyTorch's cache, from a file such as `resnet50*.pth` in any dataset attached on Kaggle, or from
# the internet. If none of these has them, training starts from random weights and says so.


# %%
def local_weights(path: Path, backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for `backbone` from a state dict, or a checkpoint with one under a usual name.

    Raises ValueError for a file that is damaged or belongs to another backbone.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a dictionary of tensors: {reason}") from error
    saved = saved if isinstance(saved, dict) else {}
    for key in ("state_dict", "model_state_dict", "model"):
        saved = saved[key] if isinstance(saved.get(key), dict) else saved
    own, names = backbone.state_dict(), [name for name in saved if isinstance(name, str)]
    first = next(iter(own))  # a backbone saved as a part of something has a prefix
    prefixes = (name.removesuffix(first) for name in names if name.endswith(first))
    prefix = min(prefixes, key=len, default="")
    weights = {n.removeprefix(prefix): saved[n] for n in names if n.startswith(prefix)}
    needed = {name: value.shape for name, value in own.items() if value.ndim}  # not the counters
    wrong = [n for n, shape in needed.items() if getattr(weights.get(n), "shape", None) != shape]
    parts = {name.split(".")[0] for name in own}
    extra = [name for name in weights if name not in own and name.split(".")[0] in parts]
    wrong += extra[2:]  # two are the weight and the bias of the classifier that was removed
    if wrong:
        what = f"{len(wrong)} tensors such as {wrong[0]!r} are missing, unknown or of another shape"
        raise ValueError(f"{path} does not match this backbone: {what}")
    return {name: value for name, value in weights.items() if name in own}


# %%
def imagenet_weights(backbone: nn.Module, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """Weights from the cache, an attached dataset or the internet, and their origin.

    Raises OSError within seconds if there are none, or what a broken download raises.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    for file in [] if cached.exists() else attached_files(f"{name}*.pth"):
        try:
            return local_weights(file, backbone), f"attached file {file}"
        except ValueError as error:
            print(f"Skipped: {error}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        return weights.get_state_dict(progress=False, check_hash=True), "ImageNet (torchvision)"
    finally:
        socket.setdefaulttimeout(timeout)


def load_backbone_weights(backbone: nn.Module, name: str, pretrained: bool, path: str) -> str:
    """Load initial weights and return their origin. Raises ValueError if `path` does not match."""
    if path:
        weights, origin = local_weights(Path(path), backbone), f"file {path}"
    elif not pretrained:
        return "random"
    else:
        try:
            weights, origin = imagenet_weights(backbone, name)
        except (*DAMAGE, HTTPException) as error:  # nothing, a part, or a portal's page arrives
            reason = f"the ImageNet weights of {name} could not be downloaded ({error})"
            warnings.warn(
                f"Training starts from random weights: {reason}. Accuracy will be far lower. Turn "
                f"the internet on, attach a dataset that holds {name}.pth, or set WEIGHTS_PATH.",
                stacklevel=2,
            )
            return f"random: {reason}"
    backbone.load_state_dict(weights, strict=False)
    return origin


# %%
def build_model(config: Config | SimpleNamespace) -> DeepfakeDetector:
    """The network of a configuration, with random weights."""
    backbone, features = build_backbone(config.BACKBONE, config.IMAGE_SIZE)
    if config.GRADIENT_CHECKPOINTING and not recompute_blocks(backbone):
        raise ValueError(
            f"GRADIENT_CHECKPOINTING finds no blocks in BACKBONE = {config.BACKBONE!r}: turn it off"
        )
    sizes = config.LSTM_HIDDEN, config.LSTM_LAYERS, config.ATTENTION_HEADS
    model = DeepfakeDetector(backbone, features, *sizes, config.DROPOUT, config.FRAMES_PER_VIDEO)
    model.reference = config.REFERENCE
    return model.to(memory_format=torch.channels_last)


def load_fitting_weights(model: DeepfakeDetector, config: Config, path: str) -> tuple[str, dict]:
    """Take over the tensors of a model file that fit; returns their origin and the file's content.

    Raises ValueError if the backbone is another one.
    """
    saved = read_model_file(path)
    backbone, own = saved["config"]["BACKBONE"], model.state_dict()
    if backbone != config.BACKBONE:
        raise ValueError(f"{path} has BACKBONE = {backbone!r}, not {config.BACKBONE!r}: set that")
    sizes = {name: value.shape for name, value in own.items()}
    fits = {n: value for n, value in saved["model"].items() if sizes.get(n) == value.shape}
    model.load_state_dict(fits, strict=False)
    return f"{len(fits)} of {len(own)} tensors from {path}", saved


def fold_batch_norms(network: nn.Module) -> None:
    """Put each batch norm of a network in eval mode into the convolution registered before it.

    Outputs stay what they were, twice as fast for MobileNetV2 on a CPU.
    """
    for part in [*network.modules()]:
        for (name, convolution), (after, norm) in itertools.pairwise([*part.named_children()]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, name, fuse_conv_bn_eval(convolution, norm))
                setattr(part, after, nn.Identity())


def load_detector(path: Path, device: str | torch.device = "cpu") -> tuple[DeepfakeDetector, dict]:
    """A trained model, ready to score, and everything else in its file: config, threshold, ...

    P(fake) of a clip is `sigmoid(model(normalize(to_float(clips))).logit / temperature)`. Raises
    ValueError for a file that holds no model.
    """
    saved = read_model_file(path)
    saved["config"] = saved_config(saved)
    model = build_model(SimpleNamespace(**saved["config"]))
    model.load_state_dict(saved["model"])
    model.offset = saved.setdefault("offset", 0.0)  # files of format 1 had taken it off the bias
    fold_batch_norms(model.eval().backbone)
    return model.to(device), saved


# %% [markdown]
# What each part returns, in a small version of the network, for two clips of four frames:


# %%
def shape_table(model: DeepfakeDetector, clips: torch.Tensor) -> pd.DataFrame:
    """The parts of the network in the order of use: output shape, number of parameters."""
    rows: dict[str, dict] = {}

    def record(name: str, part: nn.Module, inputs: tuple, output: Any) -> None:
        shape = tuple((output if isinstance(output, torch.Tensor) else output[0]).shape)
        count = sum(weight.numel() for weight in part.parameters())
        rows[name] = {"output": str(shape), "parameters": f"{count:,}"}

    parts = [*model.named_children(), ("all", model)]
    hooks = [part.register_forward_hook(partial(record, name)) for name, part in parts]
    with torch.no_grad():
        model.eval()(clips)
    for hook in hooks:
        hook.remove()
    return pd.DataFrame.from_dict(rows, orient="index")


if IN_NOTEBOOK:
    small = dataclasses.replace(CONFIG, BACKBONE="resnet18", IMAGE_SIZE=64, FRAMES_PER_VIDEO=4)
    display(shape_table(build_model(small), torch.zeros(2, 4, 3, 64, 64)))
