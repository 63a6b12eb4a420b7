"""The settings of a training, from YAML or keywords."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..nn.model import FCUNetConfig
from .disks import DiskLossConfig
from .losses import LossConfig


class TrainConfig(BaseModel):
    """One training: what, how long, on what. Loadable from YAML; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path = Field(
        Path("runs/train"), description="folder of checkpoints, logs and weights; resumes what is there"
    )
    network: dict[str, Any] = Field(default_factory=dict, description="architecture, see FCUNetConfig")
    stage: Literal["maps", "disks"] = Field(
        "maps",
        description="what is trained: the maps, or the second stage that reads the disks they find "
        "(needs network: {reader_width: ...}; the maps stay as they are)",
    )
    start_from: str | None = Field(
        None, description="weights to begin with (packaged name or folder); parts they lack start at random"
    )
    loss: dict[str, Any] = Field(
        default_factory=dict,
        description="weights and widths of the losses, see LossConfig, or DiskLossConfig for the disks",
    )
    source: dict[str, Any] = Field(default_factory=dict, description="simulated patterns, see PatternSource")
    pool: Path | None = Field(
        None,
        description="folder of scattered orientations, or library NAME.zarr; None = scatter while training",
    )
    size: int = Field(128, ge=32, multiple_of=16, description="side of the training patterns, px")
    large_size: int = Field(
        256, ge=32, multiple_of=16, description="side of the occasional larger patterns, px"
    )
    large_every: int = Field(0, ge=0, description="every so many steps a batch of larger patterns; 0 = never")
    batch: int = Field(16, ge=1, description="patterns per step and process; fewer when they are larger")

    draw_processes: int = Field(
        0,
        ge=0,
        description="processes that draw patterns ahead of the training, for free cores; 0 = none",
    )
    draw_together: int = Field(
        0,
        ge=0,
        description="batches that a thread draws at once, ahead of the training, for a GPU: 4; 0 = none",
    )

    steps: int | None = Field(None, ge=1, description="optimiser steps in all")
    budget_s: float | None = Field(
        None, gt=0, description="wall-clock seconds in all; the schedule ends on time"
    )
    learning_rate: float = Field(2.5e-3, gt=0, description="peak, after the warm-up; falls as a cosine")
    warmup_steps: int = Field(100, ge=1, description="linear rise of the learning rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW, on convolution and matrix weights")
    clip_norm: float = Field(2.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        0.998, ge=0, lt=1, description="running mean of the weights, which is what is kept"
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="arithmetic of the trunk")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    seed: int = Field(0, ge=0, description="of weights and patterns")

    log_every: int = Field(20, ge=1, description="steps between rows of log.csv")
    validate_every_s: float = Field(
        300.0, ge=0, description="seconds between validations; one more at the end"
    )
    validation_patterns: int = Field(96, ge=1, description="held-out patterns per dose")
    validation_size: int = Field(
        128, ge=32, multiple_of=16, description="side of the validation patterns, px"
    )
    validation_doses: tuple[float, ...] = Field(
        (2e3, 1e4, 1e5, 1e7), description="electrons per validation pattern"
    )
    selection_doses: tuple[float, ...] = Field(
        (2e3, 1e4, 1e5), description="doses whose figures choose the weights kept"
    )
    checkpoint_every_s: float = Field(60.0, ge=0, description="seconds between checkpoints")

    @field_validator("network")
    @classmethod
    def _check_network(cls, value: dict[str, Any]) -> dict[str, Any]:
        FCUNetConfig.from_dict(value)
        return value

    @property
    def kind(self) -> str:
        """Of the network: "default", "paper" or "paired"."""
        return FCUNetConfig.from_dict(self.network).kind

    @model_validator(mode="after")
    def _check_stage(self) -> "TrainConfig":
        known = (DiskLossConfig if self.stage == "disks" else LossConfig).__dataclass_fields__
        unknown = set(self.loss) - set(known)
        if unknown:
            raise ValueError(f"setting 'loss': unknown {sorted(unknown)}; known are {sorted(known)}")
        if self.stage == "disks" and not FCUNetConfig.from_dict(self.network).reader_width:
            raise ValueError(
                "stage 'disks' trains the second stage, but the network has none; "
                "add network: {reader_width: 160}"
            )
        return self

    @model_validator(mode="after")
    def _check_drawing(self) -> "TrainConfig":
        if self.draw_processes and self.draw_together:
            raise ValueError(
                f"draw_processes: {self.draw_processes} and draw_together: {self.draw_together} exclude each "
                "other; the first is for free cores, the second for a GPU"
            )
        return self

    @model_validator(mode="after")
    def _check_length(self) -> "TrainConfig":
        if self.steps is None and self.budget_s is None:
            raise ValueError(
                "say how long to train: steps or budget_s (or both) in the settings, or --minutes"
            )
        if not set(self.selection_doses) <= set(self.validation_doses):
            raise ValueError(f"selection_doses {self.selection_doses} must be among validation_doses")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "TrainConfig":
        """Settings from a YAML file (may be None) and `overrides` (stronger; None means not given).

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            For an unknown key (the nearest known one is suggested) or a value that does not fit.
        """
        values: dict[str, Any] = {}
        if path is not None:
            if not Path(path).is_file():
                raise FileNotFoundError(f"no such settings file: {path}")
            values = yaml.safe_load(Path(path).read_text()) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{path} holds a {type(values).__name__}, needed are 'key: value' lines")
        try:
            return cls(**(values | {k: v for k, v in overrides.items() if v is not None}))
        except ValidationError as err:
            raise ValueError(_explain(err)) from None


def _explain(err: ValidationError) -> str:
    lines = []
    for item in err.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, TrainConfig.model_fields, n=1, cutoff=0.5)
            lines.append(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            lines.append(
                f"setting {key!r}: {item['msg'].removeprefix('Value error, ')}"
                if key
                else item["msg"].removeprefix("Value error, ")
            )
    return "; ".join(lines)
