"""The training loop: patterns made on the fly, one device or several (torchrun), resumed after any kill."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.model import FCUNet, FCUNetConfig, Network, disk_radius
from ..nn.published import build_network
from ..nn.weights import load_parts, network_config, pick_device, save_weights, training_facts
from .ahead import DrawnAhead, DrawnTogether
from .calibration import calibrate
from .card import model_card
from .disks import DiskLossConfig, DiskStage, disk_losses, propose
from .evaluate import Batch, evaluate, network_detector
from .log import Moment, ProgressLine, TrainingLog
from .losses import LossConfig, Losses, compute_losses, image_losses
from .pool import check_pool
from .settings import TrainConfig

__all__ = ["TrainConfig", "Validation", "export_weights", "recalibrate", "train"]

logger = logging.getLogger(__name__)

CHECKPOINT_NAME, WEIGHTS_NAME = "checkpoint.pt", "weights"
_MEMORY_SHARE = 0.85  # of a GPU, at most, for one process


class Source(Protocol):
    """Endless training patterns; with ``state_dict`` and ``load_state_dict`` resumption is exact."""

    def batch(self, n: int, /) -> Batch:
        """The next n patterns with their truth."""
        ...


# (split, size in px, seed, dose in electrons per pattern or None for the whole range) -> patterns
SourceFactory = Callable[[str, int, int, float | None], Source]


@dataclass
class State:
    """All that changes during a training; what a checkpoint holds, beside the random generators."""

    model: Network
    ema: Network
    optimizer: torch.optim.AdamW
    source: Source
    large_source: Source | None
    step: int = 0
    samples: int = 0
    elapsed_s: float = 0.0
    best_score: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    def close(self) -> None:
        """End the processes and threads that draw patterns."""
        for source in (self.source, self.large_source):
            if isinstance(source, DrawnAhead | DrawnTogether):
                source.close()

    @property
    def moment(self) -> Moment:
        """For the log."""
        return Moment(self.step, self.samples, self.elapsed_s)


def train(
    config: TrainConfig, *, make_source: SourceFactory | None = None, progress: bool | None = None
) -> Path:
    """Train a network; returns the folder with the finished weights.

    Continues from ``config.out/checkpoint.pt`` if there is one. A run killed at any moment loses at most
    `checkpoint_every_s` of work; SIGTERM saves first. Started by ``torchrun`` it uses all its processes.

    Parameters
    ----------
    config : TrainConfig
    make_source : callable, optional
        (split, size, seed, dose) -> Source. Default: :class:`fcunet.training.dataset.PatternSource`.
    progress : bool, optional
        Show a progress line on stderr; None = if it is a terminal.

    Raises
    ------
    ValueError
        If the folder holds a training with another network.
    FileNotFoundError
        If the pool lacks patterns to train or to validate with.
    """
    if make_source is None and config.pool is not None:
        check_pool(config.pool)
    with _process_group(pick_device(config.device)) as (rank, world, device):
        make_source = make_source or partial(_pattern_source, config, device)
        return _train(config, make_source, rank, world, device, progress)


def _train(
    config: TrainConfig,
    make_source: SourceFactory,
    rank: int,
    world: int,
    device: torch.device,
    progress: bool | None,
) -> Path:
    config.out.mkdir(parents=True, exist_ok=True)
    state = _start(config, make_source, rank, world, device)
    net: nn.Module = state.model
    if config.stage == "disks":
        assert isinstance(state.model, FCUNet)
        net = DiskStage(state.model)
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    leader = Leader(config, state, make_source, world, progress) if rank == 0 else None
    try:
        with _StopFlag() as stop:
            stopped = _run_steps(config, state, net, leader, stop, world, device)
    finally:
        state.close()
    if leader is not None:
        leader.close(finished=not stopped)
    if world > 1:
        dist.barrier()
    if stopped:
        raise SystemExit(f"stopped by a signal at step {state.step}; the same command continues")
    return config.out / WEIGHTS_NAME


def _run_steps(
    config: TrainConfig,
    state: State,
    net: nn.Module,
    leader: "Leader | None",
    stop: "_StopFlag",
    world: int,
    device: torch.device,
) -> bool:
    """Steps until the end of the budget (False) or a signal (True)."""
    started, before = time.monotonic(), state.elapsed_s
    while True:
        state.elapsed_s = before + time.monotonic() - started
        done = _agree(_progress(config, state), world, device)
        if done >= 1:
            return False
        if _agree(float(stop.raised), world, device):
            return True
        rate = learning_rate(config, state.step, done)
        losses = _step(config, state, net, rate, device)
        if leader is not None:
            leader.after_step(rate, losses, done)


def _step(
    config: TrainConfig,
    state: State,
    net: nn.Module,
    rate: float,
    device: torch.device,
) -> Losses:
    source, n = state.source, config.batch
    if state.large_source is not None and (state.step + 1) % config.large_every == 0:
        source, n = state.large_source, _large_batch(config)
    batch = source.batch(n)
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    losses = losses_of(config, net, batch, device)
    state.optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    if bool(torch.isfinite(norm)):
        state.optimizer.step()
        _update_mean(state, config.ema_decay)
    else:
        logger.warning("step %d skipped: its gradient is not finite", state.step)
    state.step += 1
    state.samples += n * (dist.get_world_size() if dist.is_initialized() else 1)
    return losses


def _large_batch(config: TrainConfig) -> int:
    return max(1, round(config.batch * (config.size / config.large_size) ** 2))


def losses_of(config: TrainConfig, net: nn.Module, batch: Batch, device: torch.device) -> Losses:
    """What the stage in training gets wrong on a batch."""
    if config.stage == "disks":
        batch = batch.to(device)
        proposals = propose(batch)
        return disk_losses(
            net(batch, proposals), proposals, disk_radius(batch.probe), DiskLossConfig(**config.loss)
        )
    output = net(batch.pattern.to(device), batch.probe.to(device), binning=1)
    judge = compute_losses if config.kind == "default" else image_losses
    return judge(
        output,
        batch.spot_position.to(device),
        batch.spot_amplitude.to(device),
        batch.spot_electrons.to(device),
        LossConfig(**config.loss),
    )


def learning_rate(config: TrainConfig, step: int, done: float) -> float:
    """Linear warm-up by steps, then a cosine over the share `done` of the budget, down to a hundredth."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * cosine


def _progress(config: TrainConfig, state: State) -> float:
    shares = [state.step / config.steps] if config.steps else []
    return max(shares + ([state.elapsed_s / config.budget_s] if config.budget_s else []))


@torch.no_grad()
def _update_mean(state: State, decay: float) -> None:
    decay = min(decay, (1 + state.step) / (10 + state.step))  # forget the random start soon
    pairs = list(zip(state.ema.state_dict().values(), state.model.state_dict().values(), strict=True))
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(means, values, 1 - decay)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


def _start(
    config: TrainConfig, make_source: SourceFactory, rank: int, world: int, device: torch.device
) -> State:
    torch.manual_seed(config.seed)
    network = FCUNetConfig.from_dict(config.network)
    model = build_network(network)
    if config.start_from is not None:
        load_parts(model, config.start_from)
    if config.stage == "disks":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("reader."))
    model = model.to(device).channels_last()
    model.precision = config.precision
    ema = build_network(network).to(device).channels_last().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    ema.precision = config.precision
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda"
    )

    path = config.out / CHECKPOINT_NAME
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
    if saved is not None and FCUNetConfig.from_dict(saved["network"]) != network:
        raise ValueError(
            f"{path} belongs to another network; choose another 'out', or give the settings it was made with"
        )
    step = saved["step"] if saved else 0
    # another stream of patterns after a resumption, unless the source can restore its own state below
    seed = config.seed + 1_000_003 * rank + 7919 * step
    source = _training_source(config, make_source, config.size, config.batch, seed)
    large = None
    if config.large_every:
        large = _training_source(config, make_source, config.large_size, _large_batch(config), seed + 1)
    state = State(model, ema, optimizer, source, large)
    if saved is not None:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state.step, state.samples, state.elapsed_s = step, saved["samples"], saved["elapsed_s"]
        state.best_score, state.best = saved["best_score"], saved["best"]
        torch.set_rng_state(saved["rng"])
        ahead = config.draw_processes or config.draw_together
        if saved["source"] is not None and world == saved["world"] == 1 and not ahead:
            source.load_state_dict(saved["source"])  # type: ignore[attr-defined]
        logger.info("continuing %s at step %d", path, step)
    return state


def _save_checkpoint(config: TrainConfig, state: State, world: int) -> None:
    """Atomically: a kill leaves the old checkpoint or the new one."""
    payload = {
        "network": _plain(state.model.config.to_dict()),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "samples": state.samples,
        "elapsed_s": state.elapsed_s,
        "best_score": state.best_score,
        "best": state.best,
        "rng": torch.get_rng_state(),
        "source": state.source.state_dict() if hasattr(state.source, "state_dict") else None,
        "world": world,
    }
    path = config.out / CHECKPOINT_NAME
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class Leader:
    """What only the first process does: log, validate, save."""

    def __init__(
        self, config: TrainConfig, state: State, make_source: SourceFactory, world: int, progress: bool | None
    ):
        self.config, self.state, self.world = config, state, world
        self.log = TrainingLog(config.out, state.step)
        self.bar = ProgressLine(sys.stderr.isatty() if progress is None else progress)
        self.validation = Validation(config, make_source)
        self.last_checkpoint = self.last_validation = time.monotonic()

    def after_step(self, rate: float, losses: Losses, done: float) -> None:
        """Whatever is due."""
        config, state = self.config, self.state
        if state.step % config.log_every == 0:
            self.log.losses(state.moment, rate, losses)
            self.bar.show(done, state.moment, losses)
        if time.monotonic() - self.last_validation >= config.validate_every_s:
            self.validate()
            self.last_validation = time.monotonic()
        if time.monotonic() - self.last_checkpoint >= config.checkpoint_every_s:
            _save_checkpoint(config, state, self.world)
            self.last_checkpoint = time.monotonic()

    def validate(self) -> None:
        """Judge the running mean of the weights, and keep it if it is the best so far."""
        state, config = self.state, self.config
        figures = self.validation.figures(state.ema)
        score = selection_score([figures[d] for d in config.selection_doses])
        self.log.validation(state.moment, figures, score)
        worst = min(figures)
        logger.info(
            "step %d: score %.3f; at %g electrons recall %.3f, precision %.3f, strain rms %.2fe-3, R %.2f",
            *(state.step, score, worst),
            *(figures[worst][k] for k in ("recall", "precision", "strain_rms_1e-3", "R")),
        )
        if score <= state.best_score:
            state.best_score = score
            state.best = {k: v.detach().cpu().clone() for k, v in state.ema.state_dict().items()}

    def close(self, *, finished: bool) -> None:
        """Last checkpoint and, at the end of the budget, the finished weights."""
        self.bar.close()
        if finished:
            self.validate()
        _save_checkpoint(self.config, self.state, self.world)
        if finished:
            _finish(self.config, self.state, self.validation, self.world)


class Validation:
    """Fixed sets of patterns of held-out prototypes, one per dose, made once."""

    def __init__(self, config: TrainConfig, make_source: SourceFactory):
        self.config, self.make_source = config, make_source

    @cached_property
    def sets(self) -> dict[float, list[Batch]]:
        """Dose -> batches, on the CPU like the peaks they are compared with."""
        sets = {}
        with torch.random.fork_rng(devices=[]):
            for i, dose in enumerate(self.config.validation_doses):
                source = self.make_source("validation", self.config.validation_size, 90_001 + i, dose)
                left, batches = self.config.validation_patterns, []
                while left > 0:
                    batches.append(source.batch(min(left, 16)).to("cpu"))
                    left -= 16
                sets[dose] = batches
        return sets

    def figures(self, model: Network) -> dict[float, dict[str, float]]:
        """Figures of merit by dose."""
        model.eval()
        detector = network_detector(model)
        return {dose: evaluate(detector, batches) for dose, batches in self.sets.items()}


def selection_score(sets: list[dict[str, float]]) -> float:
    """What the kept weights minimise: log strain error plus amplitude error, mean over the low-dose sets."""
    scores = [math.log(max(s["strain_rms_1e-3"], 1e-3)) + s["R"] + 2 * (1 - s["recall"]) for s in sets]
    score = sum(scores) / len(scores)
    return score if math.isfinite(score) else math.inf


def _finish(config: TrainConfig, state: State, validation: Validation, world: int) -> None:
    """Best weights, thresholds and error bars tuned on the validation sets, model card."""
    model = build_network(state.model.config)
    model.load_state_dict(state.best or state.ema.state_dict())
    export_weights(
        model.to(next(state.ema.parameters()).device),
        validation,
        config.out / WEIGHTS_NAME,
        facts={
            "samples": state.samples,
            "steps": state.step,
            "hours": round(state.elapsed_s / 3600, 3),
            "processes": world,
            "batch": config.batch,
            "size_px": config.size,
            "learning_rate": config.learning_rate,
            "precision": config.precision,
            "seed": config.seed,
        },
    )


def export_weights(
    model: Network, validation: Validation, folder: Path, *, facts: dict[str, Any], remarks: str = ""
) -> str:
    """Tune thresholds and error bars on the validation sets, write weights and card; returns the SHA-256.

    `facts` go to the card and to ``config.json``, `remarks` (Markdown) to the end of the card.
    """
    model.eval()
    tuned = calibrate(model, validation.sets)
    figures = validation.figures(tuned)
    by_dose = {f"{dose:g}": {k: float(f"{v:.4g}") for k, v in f.items()} for dose, f in figures.items()}
    card = model_card(folder.name, tuned, facts, figures, remarks)
    return save_weights(folder, tuned, card=card, extra=facts | {"figures": by_dose})


def recalibrate(
    config: TrainConfig, weights: str | os.PathLike[str], *, make_source: SourceFactory | None = None
) -> Path:
    """Tune thresholds and error bars of `weights` on the validation sets of `config`; nothing is trained.

    Returns the folder with the weights. Their training facts are kept, their figures are measured anew.
    """
    device = pick_device(config.device)
    model = build_network(network_config(weights))
    load_parts(model, weights)
    model = model.to(device).channels_last()
    model.precision = config.precision
    validation = Validation(config, make_source or partial(_pattern_source, config, device))
    export_weights(model, validation, config.out / WEIGHTS_NAME, facts=training_facts(weights))
    return config.out / WEIGHTS_NAME


class _StopFlag:
    """Raised by SIGTERM, which SLURM sends before the end of a job; a second one kills."""

    raised = False

    def __enter__(self) -> "_StopFlag":
        self.before: Any = None
        with contextlib.suppress(ValueError):  # not in the main thread: no handler
            self.before = signal.signal(signal.SIGTERM, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, processes, device): as torchrun says, else one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        if world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index is not None:
            torch.cuda.set_device(device)
        # batches differ in size, and what is kept for reuse would leave nothing to CUDA's own libraries
        torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE)
    if world == 1:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world, device
    finally:
        dist.destroy_process_group()


def _agree(value: float, world: int, device: torch.device) -> float:
    """The largest value of all processes: they must leave the loop together."""
    if world == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)


def _training_source(config: TrainConfig, make_source: SourceFactory, size: int, n: int, seed: int) -> Source:
    """Batches of `n` training patterns, drawn in between or ahead."""
    if config.draw_together:
        return DrawnTogether(partial(make_source, "train", size, seed, None), n, config.draw_together)
    if not config.draw_processes:
        return make_source("train", size, seed, None)
    seeds = [seed + 500_009 * k for k in range(config.draw_processes)]
    return DrawnAhead([partial(make_source, "train", size, s, None) for s in seeds], n)


def _pattern_source(
    config: TrainConfig, device: torch.device, split: str, size: int, seed: int, dose: float | None
) -> Source:
    from .dataset import PatternSource
    from .library import LibrarySource
    from .pool import FolderSource

    options = config.source | ({} if dose is None else {"dose": (dose, dose)})
    if split == "validation":
        options["refresh"] = 0.0
    try:
        if config.pool is not None and config.pool.suffix == ".zarr":
            return LibrarySource(config.pool, split, size, device, seed, **options)
        if config.pool is not None:
            return FolderSource(config.pool, split, size, device, seed, **options)
        return PatternSource(split, size, device, seed, **options)
    except TypeError as err:
        what = str(err).partition("__init__() ")[2] or err
        raise ValueError(f"'source' in the settings of the training: PatternSource {what}") from err


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
