"""Training: the loop, its optimizer, its checkpoints."""

from .config import TrainConfig
from .held_out import evaluate
from .loop import Report, train

__all__ = ["Report", "TrainConfig", "evaluate", "train"]
