"""Hugging Face folders in and out, by the checkpoint maps that specs declare."""

from .exporting import export_folder
from .folders import open_folder
from .importing import import_folder

__all__ = ["export_folder", "import_folder", "open_folder"]
