"""What a training run is told."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """Settings of a run. A step sees `batch * accumulate` rows of `seq` tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=8, ge=1, description="rows of a micro-batch")
    seq: int = Field(default=512, ge=2, description="tokens of a row")
    accumulate: int = Field(default=1, ge=1, description="micro-batches of a step")
    lr: float = Field(default=1e-3, ge=0)
    min_lr: float = Field(default=1e-4, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = Field(default=50, ge=0, description="steps of linear warm-up")
    decay: float = Field(default=0.2, gt=0, le=1, description="share of the steps in which `wsd` comes down")
    weight_decay: float = Field(default=0.1, ge=0, description="for weights of two and more dims")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    seed: int = 0
    save_every: int = Field(default=200, ge=1)
    eval_every: int = Field(default=0, ge=0, description="0: at the end only")
    eval_rows: int = Field(default=64, ge=1, description="held-out rows of an evaluation")
    keep: int = Field(default=2, ge=1, description="checkpoints that are kept")

    def learning_rate(self, step: int) -> float:
        """The rate of step 1, 2, ...: linear warm-up, then the schedule.

        cosine: Loshchilov and Hutter 2017, eq. 5. wsd: flat, then minus square root (Haegele et al. 2024, eq. 2).
        """
        if step <= self.warmup:
            return self.lr * step / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "cosine":
            return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        down = max(0.0, (done - (1 - self.decay)) / self.decay)
        return self.min_lr + (self.lr - self.min_lr) * (1 - math.sqrt(min(1.0, down)))
