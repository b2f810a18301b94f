"""A GPU that is not there: tensors with shapes, strides, dtypes and devices, but without values.

torch's FakeTensorMode says what a GPU would compute, and that is enough to find tensors on the
wrong device, dtypes that do not go together, and operations for which the CPU waits for its GPU.
What depends on values or on kernels it does not find. There are no streams and no memory here.
cuDNN is off, because its LSTM asks a real GPU. Autograd's engine starts a thread for each GPU, so
`backward` below does its work in Python.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import cell_04_dataset_class as data
import cell_05_model_definition as models
import cell_06_loss_and_utils as utils
import cell_07_training_functions as training

GPU = torch.device("cuda:1")  # not 0: something made on "cuda" would be on another GPU
CACHED: tuple[Any, ...] = (data.device_constant, data.codec_constants)


def nodes_before(root: Any) -> collections.Counter:
    """How many nodes of a graph pass a gradient to each node, from its root."""
    expected, todo = collections.Counter[Any](), [root]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                expected[node] += 1
                todo += [node] if expected[node] == 1 else []
    return expected


def as_expected(gradient: torch.Tensor, node: Any, slot: int) -> torch.Tensor:
    """A gradient in the shape and dtype of what it belongs to. Raises RuntimeError for a device."""
    is_leaf = hasattr(node, "variable")
    like = node.variable if is_leaf else node._input_metadata[slot]
    if gradient.device != like.device:
        raise RuntimeError(f"{node.name()} gets a gradient on {gradient.device}")
    shape = torch.Size(like.shape)
    return (gradient if gradient.shape == shape else gradient.sum_to_size(shape)).to(like.dtype)


@torch.no_grad()
def backward(root: Any, gradient: Any = None, wanted: Any = None) -> list[torch.Tensor]:
    """Gradients into `.grad` of the weights as autograd's engine does, or of one tensor wanted."""
    first = torch.ones_like(root) if gradient is None else gradient
    if (first.device, first.shape) != (root.device, root.shape):
        raise RuntimeError(f"the first gradient is {first.shape} on device {first.device}")
    expected, ready, found = nodes_before(root.grad_fn), [root.grad_fn], []
    arrived: dict[Any, dict[int, torch.Tensor]] = {root.grad_fn: {root.output_nr: first}}
    while ready:
        node = ready.pop()
        given = arrived.pop(node, {})
        if wanted is not None and node is wanted.grad_fn:
            found.append(given[wanted.output_nr])
        if hasattr(node, "variable"):
            if given and wanted is None:
                weight = node.variable
                weight.grad = given[0] if weight.grad is None else weight.grad + given[0]
            continue
        results = node(*map(given.get, range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,)
        for (after, slot), value in zip(node.next_functions, results, strict=False):
            if after is None:
                continue
            if value is not None:
                sums, value = arrived.setdefault(after, {}), as_expected(value, after, slot)
                sums[slot] = sums[slot] + value if slot in sums else value
            expected[after] -= 1
            ready += [] if expected[after] else [after]
    return found


def why_not() -> str:
    """Why this torch cannot have a fake GPU; empty if it can."""
    if torch.version.cuda is None:
        return "this torch is built for CPUs, and does not know what a GPU would do"
    try:
        with FakeTensorMode():
            torch.empty(2, device=GPU)[0]
    except RuntimeError as error:  # torch 2.5 looks for the driver
        reason = str(error).splitlines()[0]
        return f"torch {torch.__version__} has no fake GPUs without a driver: {reason}"
    return ""


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors made in here on `GPU` are on a GPU that is not there."""
    generator: Callable = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 0)  # checkpoint() asks for it
        patch.setattr(torch.Tensor, "backward", lambda *given, **_: backward(*given[:2]) and None)
        patch.setattr(
            torch.autograd, "grad", lambda root, wanted, **_: backward(root, None, wanted)
        )
        for function in CACHED:
            function.cache_clear()
        torch.clear_autocast_cache()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.backends.cudnn.flags(False):
                yield
        finally:
            for function in CACHED:
                function.cache_clear()  # what they keep is fake


def on_gpu(model: nn.Module) -> nn.Module:
    """A network whose weights become fake ones with the same strides."""
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                layout: Any = value.size(), value.stride()
                fake: Any = torch.empty_strided(*layout, dtype=value.dtype, device=GPU)
                if name in module._parameters:
                    fake = nn.Parameter(fake, value.requires_grad)
                setattr(module, name, fake)
    return model


def made_on_gpu(make: Callable[[], nn.Module]) -> nn.Module:
    """A network that is made outside, where its values can be known, and then put on the GPU."""
    with unset_fake_temporarily():
        model = make()
    return on_gpu(model)


READS_A_NUMBER = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
ONLY_WRITES = ("copy_", "uniform_", "normal_", "zero_", "fill_", "_foreach_copy_")
TENSORS_A_LAUNCH = 50  # of the kernels that go through a list; torch takes 24 to 110, by its kind


def tensors_in(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    nested = values if isinstance(values, (list, tuple)) else ()
    return [tensor for value in nested for tensor in tensors_in(value)]


def bytes_of(tensor: torch.Tensor) -> int:
    """What a tensor takes in memory: not the dimensions that are expanded."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


class Watch(TorchDispatchMode):
    """Sees each operation on a GPU: for which the CPU waits, how many kernels and bytes it takes.

    A CPU also waits where it sends numbers over that are not in pinned memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = tensors_in([*args, *(kwargs or {}).values()]), tensors_in(result)
        devices = {tensor.device.type for tensor in [*given, *made]}
        if "cuda" in devices:
            self.look(function, args, given, made, len(devices) > 1)
        return result

    def look(self, function: Any, args: Any, given: list, made: list, across: bool) -> None:
        name = function.overloadpacket.__name__
        moves = name in ("_to_copy", "copy_") and across
        masks = [index for index in tensors_in(args[1:2]) if index.dtype == torch.bool]
        indexes = name in ("index", "index_put_") and (masks or across)
        if moves or indexes or name in READS_A_NUMBER:
            self.waits.append(name)
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        is_free = name.startswith(("empty", "new_empty", "_unsafe_view"))
        if is_view or is_free or function.namespace != "aten":
            return
        read = given[len(tensors_in(args[:1])) :] if name in ONLY_WRITES else given
        written = made or tensors_in(args[:1])
        self.bytes += sum(map(bytes_of, [*read, *written]))
        self.kernels += -(-max(1, len(tensors_in(args[:1]))) // TENSORS_A_LAUNCH)


def batch_of(config: Any, count: int, blend: torch.Tensor, per_video: int = 1) -> data.Batch:
    """A batch as `device_batches` gives it; `blend` is real, because the CPU knows its values."""
    frames, side = config.FRAMES_PER_VIDEO * per_video, config.IMAGE_SIZE
    pixels = torch.empty(count, frames, side, side, 3, dtype=torch.uint8, device=GPU)
    landmarks = torch.empty(count, frames, 5, 2, device=GPU)
    return data.Batch(pixels, landmarks, torch.empty(count, device=GPU), torch.arange(count), blend)


def trainer_of(config: Any, precision: torch.dtype | None, **options: Any) -> training.Trainer:
    """What section 11 makes, on the fake GPU."""
    model: Any = made_on_gpu(lambda: models.build_model(config)).train()
    model.precision = precision
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler, average = training.LossScaler(GPU, precision), utils.ModelEMA(model, 0.98)
    given: Any = model, utils.FocalLoss(2.0, 0.5), optimizer, scaler, 1.0, average
    return training.Trainer(*given, **options)


def watch_augmentation(config: Any, count: int = 16) -> Watch:
    """What it takes to augment clips of which a quarter is self-blended."""
    blend = torch.arange(count) % 4 == 1
    with fake_gpu():
        batch, draws = batch_of(config, count, blend), data.PairedGenerator(GPU, [0])
        data.normalize(data.augment(batch, draws, config))  # puts constants on the GPU
        with Watch() as watch:
            data.normalize(data.augment(batch, draws, config))
    return watch


def watch_step(config: Any, count: int = 16, gradients: bool = True) -> Watch:
    """What a step in fp16 takes; without `gradients` all but forward and backward."""
    with fake_gpu():
        trainer = trainer_of(config, torch.float16)
        meter = training.EpochMeter(trainer, None, 1, training.NO_BAR)
        batch = batch_of(config, count, torch.zeros(count, dtype=torch.bool))

        def nothing(count: int, clips: Any, labels: Any) -> tuple:
            for weight in trainer.model.parameters():
                weight.grad = torch.empty_like(weight)
            frames = torch.empty(count, config.FRAMES_PER_VIDEO, device=GPU)
            return [torch.empty(count, device=GPU), frames, frames], torch.empty((), device=GPU)

        if not gradients:
            trainer.add_gradients = nothing  # type: ignore[method-assign]
        clips = torch.empty_like(batch.clips.movedim(-1, 2), dtype=torch.float32)
        for _ in range(2):  # the first one makes the optimizer's averages
            with Watch() as watch:
                meter.update(batch, *trainer.step(clips, batch.labels))
    return watch
