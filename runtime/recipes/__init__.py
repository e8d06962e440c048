"""Recipes: models made from models and data, step by step, each result a folder that is made once."""

from .plan import Plan, planned
from .run import run_recipe
from .values import Step

__all__ = ["Plan", "Step", "planned", "run_recipe"]
