"""Models made from models: what matters in a model, smaller models with its weights, candidates for them.

    scores  = importance(model, batches)                         # forward passes only; Scores.save, Scores.load
    scores  = scores.with_layers(layer_importance(model, batches, metric = "bi"))
    weights = prune(teacher, model.state_dict(), student, by = scores)      # teacher, student: elaborated programs
    weights = prune(teacher, model.state_dict(), student, keep = {"layer": [0, 1, 5]})
    grid    = candidates(file, "big", {"hidden": [3072, 4096], "layers": [28, 32]}, target = 8e9)

`model` is what `heddle.compile` or `heddle.load` give, `batches` are tokens int64[batch, seq] or the model's arguments
by name; a program is `model.program`, or `check.program_of(...)`.
"""

from .importance import importance
from .layers import layer_importance, without_layers, without_window
from .pruning import Plan, prune
from .scores import Scores, Site
from .search import Candidate, candidates

__all__ = [
    "Candidate", "Plan", "Scores", "Site", "candidates", "importance", "layer_importance", "prune", "without_layers",
    "without_window",
]  # fmt: skip
