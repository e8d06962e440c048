"""Training: the loop, its optimizer, its checkpoints."""

from .config import TrainConfig
from .loop import Report, evaluate, train

__all__ = ["Report", "TrainConfig", "evaluate", "train"]
