"""Optimiser steps: the learning rate, the gradient in micro-batches and over workers, the average of the weights.

The gradients of data-parallel workers are added up in one exchange per step, after all micro-batches, together with
whether memory sufficed. So a worker that runs out of it never leaves the others waiting: they all take the step again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stemtune._progress import say
from stemtune.config import Config, OptimConfig
from stemtune.dataset.batches import Batch
from stemtune.errors import UserError, is_out_of_memory
from stemtune.learning.inference import autocast
from stemtune.learning.model import OrientationModel

CHECK_EVERY = 25  # steps between two looks at whether the loss is still finite
COSINE_FLOOR = 0.01  # where the cosine schedule ends, as a share of the peak


class Diverged(UserError):
    """The loss became infinite or NaN; the metrics of `WORST` have been reported."""


def chosen_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the number format of the forward pass; None is float32.

    "auto" is bfloat16 on GPUs that have it and on CPUs with instructions for it (avx512_bf16, amx), else float32:
    elsewhere bfloat16 is emulated and slow.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = any(
                bool(getattr(torch.cpu, f"_is_{name}_supported", bool)()) for name in ("avx512_bf16", "amx_tile")
            )
        return torch.bfloat16 if fast else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step (counted from 0).

    It rises linearly over `optim.warmup` epochs to `optim.lr`, times `optim.lr_decay` per epoch (exponential) or
    half a cosine that ends at 1 % (cosine).
    """
    epoch = step // steps_per_epoch
    if optim.schedule == "cosine":
        progress = min(1.0, step / max(1, epochs * steps_per_epoch))
        factor = COSINE_FLOOR + (1.0 - COSINE_FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = optim.lr_decay**epoch
    return optim.lr * factor * min(1.0, (step + 1) / max(1.0, optim.warmup * steps_per_epoch))


class WeightAverage:
    """Exponential moving average of a model's weights and running statistics.

    After `step` steps it keeps the part `decay`, and no more than (1 + step) / (10 + step), of what it was: so it
    forgets the random start within a short run as well. `raw` are the weights that training goes on with.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.mean = {name: value.clone() for name, value in self._live.items()}
        self.raw = self._live

    def update(self, step: int) -> None:
        """Take up the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean, live = list(self.mean.values()), list(self._live.values())
        get_ema_multi_avg_fn(decay)(mean, live, step)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Begin with the model's weights."""
        for name, value in self._live.items():
            self.mean[name].copy_(value)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the model hold the average; `raw` are then kept beside it."""
        self._exchange()
        self.raw = self.mean
        try:
            yield
        finally:
            self._exchange()
            self.raw = self._live

    def _exchange(self) -> None:
        for name, value in self._live.items():
            held = value.clone()
            value.copy_(self.mean[name])
            self.mean[name].copy_(held)


class _Loss(nn.Module):
    """Model and loss as one module, which can be compiled as a whole."""

    def __init__(self, model: OrientationModel, device: torch.device, precision: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision

    def forward(self, patterns: Tensor, orientation: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            output = self.model(patterns)
        return self.model.loss(output, orientation)


class Trainer:
    """Model, optimiser and step count of a run, and the passes over the data, `steps_per_epoch` optimiser steps each.

    The weights of `model` are at their start; with `world` data-parallel workers above 1 the process group must be
    initialised. A batch is worked through in `micro_batches`, more and more of them when memory does not suffice.
    """

    def __init__(
        self, config: Config, model: OrientationModel, steps_per_epoch: int, device: torch.device, world: int = 1
    ) -> None:
        self.config, self.device, self.world, self.steps_per_epoch = config, device, world, steps_per_epoch
        self.precision = chosen_precision(config.train.precision, device)
        self.micro_batches = _checked_micro_batches(config, world)
        model = model.to(device)
        if model.channels_last(device):
            model = model.to(memory_format=torch.channels_last)
        if world > 1 and device.type == "cuda":
            from timm.layers import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)
        self.model = model
        self.step = 0
        self.rate = 0.0
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        groups, self.factors = _groups(model, config.optim)
        self.optimiser = torch.optim.AdamW(groups, lr=config.optim.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.loss: nn.Module = _Loss(model, device, self.precision)
        self._compiles = config.train.compile  # until the first step has gone well
        if self._compiles:
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
            for name in model.fixed:
                setattr(model, name, torch.compiler.disable(getattr(model, name)))  # type: ignore[no-untyped-call]
            self.loss.compile()  # in place: the weights keep their names
        self.shared = _share(model, self.weights) if world > 1 else None
        self.average = WeightAverage(model, config.train.ema) if config.train.ema else None

    def averaged(self) -> AbstractContextManager[None]:
        """Return the context in which the model holds its averaged weights (`train.ema`)."""
        return self.average.in_use() if self.average else nullcontext()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the model's averaged weights."""
        state = {"step": self.step, "optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}
        return state | ({"weights": dict(self.average.raw)} if self.average else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, whose averaged weights the model holds."""
        self.step = int(state["step"])
        groups = (state["optimiser"]["param_groups"], self.optimiser.param_groups)
        before, here = ([len(group["params"]) for group in each] for each in groups)
        if before != here:
            raise UserError("the checkpoint is of a run with another `optim.pretrained_lr`; start the run anew")
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.start()
        self.model.load_state_dict(state.get("weights", {}), strict=False)  # there are none up to version 0.1

    def train(self, batches: Iterable[Batch]) -> float:
        """Take one optimiser step per batch and return the mean loss over all workers.

        Raises `Diverged` on all workers in the same step, when the loss of one is no longer finite.
        """
        self.model.train()
        total, steps = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            optim = self.config.optim
            self.rate = learning_rate(optim, self.step, self.steps_per_epoch, self.config.train.epochs)
            for group, factor in zip(self.optimiser.param_groups, self.factors, strict=True):
                group["lr"] = self.rate * factor
            total += self._gradient(batch)
            if optim.grad_clip > 0:
                self.scaler.unscale_(self.optimiser)
                nn.utils.clip_grad_norm_(self.weights, optim.grad_clip)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self._clear()
            self.step += 1
            if self.average:
                self.average.update(self.step)
            steps += 1
            if steps % CHECK_EVERY == 0:
                self._mean(total / steps)
        self._average_buffers()
        return self._mean(total / max(1, steps))

    def _gradient(self, batch: Batch) -> Tensor:
        """Leave the gradient of the mean loss over all workers in the weights; return the loss of this worker.

        Where memory does not suffice, on whichever of them, all begin the batch again in smaller micro-batches.
        """
        while True:
            loss = self._accumulate(batch)
            if self._add_up(loss is not None) and loss is not None:
                return loss
            self._clear()
            self._halve(len(batch.orientation))

    def _accumulate(self, batch: Batch) -> Tensor | None:
        """Add up the gradients of the micro-batches, each with its share; None where memory does not suffice."""
        size, total = len(batch.orientation), torch.zeros((), device=self.device)
        parts = (part.tensor_split(min(self.micro_batches, size)) for part in batch)
        try:
            for patterns, orientation in zip(*parts, strict=True):
                on_device = patterns.to(self.device, non_blocking=True)
                loss = self.loss(on_device, orientation.to(self.device, non_blocking=True))
                loss = loss * (len(orientation) / size)
                self.scaler.scale(loss).backward()
                total += loss.detach()
        except Exception as problem:
            if not is_out_of_memory(problem):
                if not self._compiles or isinstance(problem, UserError):
                    raise
                reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
                raise UserError(
                    f"the model cannot be compiled here ({reason[:160]}); install a C++ compiler, or set"
                    " train.compile=false"
                ) from None
            if any(isinstance(part, nn.SyncBatchNorm) for part in self.model.modules()):
                raise UserError(
                    f"out of memory with micro-batches of {-(-size // self.micro_batches)} patterns; set"
                    f" train.accumulate={2 * self.micro_batches}, or a smaller train.batch_size"
                ) from None  # the others wait for this one's share of their statistics
            return None
        self._compiles = False
        return total

    def _add_up(self, sufficed: bool) -> bool:
        """Make the gradients the mean over all workers; return whether memory sufficed on all of them."""
        if self.shared is None:
            return sufficed
        self.shared[-1] = 0.0 if sufficed else 1.0
        distributed.all_reduce(self.shared)
        self.shared /= self.world
        return float(self.shared[-1]) == 0

    def _clear(self) -> None:
        """Begin a new gradient."""
        if self.shared is None:
            self.optimiser.zero_grad(set_to_none=True)
        else:
            self.shared.zero_()

    def _halve(self, size: int) -> None:
        """Work through batches of `size` patterns in twice as many micro-batches from now on."""
        if self.micro_batches >= size:
            raise UserError(
                "out of memory with one pattern at a time; choose a smaller model, or a smaller model.input_size"
            )
        self.micro_batches = min(size, 2 * self.micro_batches)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.world == 1 or distributed.get_rank() == 0:
            patterns = -(-size // self.micro_batches)
            say(
                f"note: out of memory; training goes on with micro-batches of {patterns}"
                f" pattern{'s' * (patterns > 1)} (train.accumulate={self.micro_batches})"
            )

    def _mean(self, loss: Tensor) -> float:
        """Return the mean over the workers; raise `Diverged` on all of them when it is not finite."""
        if self.world > 1:
            loss = loss.clone()
            distributed.all_reduce(loss)
            loss /= self.world
        mean = float(loss)
        if not math.isfinite(mean):
            epoch = (self.step - 1) // self.steps_per_epoch + 1
            rate = self.config.optim.lr
            raise Diverged(f"the loss is {mean} in epoch {epoch}: training diverged; lower `optim.lr`, now {rate:g}")
        return mean

    def _average_buffers(self) -> None:
        """Give all workers the same running statistics (batch normalisation), the mean of theirs."""
        if self.world == 1:
            return
        kept = set(self.model.state_dict())
        for name, value in self.model.named_buffers():
            if name in kept and value.is_floating_point():
                for each in (value, self.average.mean[name]) if self.average else (value,):
                    distributed.all_reduce(each)
                    each /= self.world


def _checked_micro_batches(config: Config, world: int) -> int:
    each, wanted = config.train.batch_size // world, config.train.accumulate
    if wanted > each:
        whose = "a batch" if world == 1 else f"the batch of each of the {world} workers"
        raise UserError(f"`train.accumulate` is {wanted}, but {whose} has {each} patterns; lower it to {each} or less")
    return wanted


def _groups(model: OrientationModel, optim: OptimConfig) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the optimiser's groups of weights, and the factor on the learning rate of each.

    Vectors (biases, norms) do not decay. Pretrained weights have groups of their own where their factor is not 1.
    """
    groups, factors = list[dict[str, Any]](), list[float]()
    own = optim.pretrained_lr if model.pretrained else 1.0
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    for factor in dict.fromkeys((1.0, own)):
        chosen = [weight for name, weight in named if (own if name in model.pretrained else 1.0) == factor]
        for decayed, decay in ((True, optim.weight_decay), (False, 0.0)):
            groups.append({"params": [one for one in chosen if (one.ndim > 1) == decayed], "weight_decay": decay})
            factors.append(factor)
    return groups, factors


def _share(model: nn.Module, weights: list[nn.Parameter]) -> Tensor:
    """Give all workers the model of the first one, and the gradients of all `weights` one tensor, which is returned.

    They can be exchanged without any further memory. Its last element is free for a message.
    """
    for value in model.state_dict().values():
        distributed.broadcast(value, 0)
    shared = torch.zeros(sum(weight.numel() for weight in weights) + 1, device=weights[0].device)
    place = 0
    for weight in weights:  # with the strides of the weight, which the optimiser wants
        weight.grad = torch.as_strided(shared, weight.shape, weight.stride(), place)
        place += weight.numel()
    return shared
