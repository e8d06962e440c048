"""A second opinion on layouts, by spmd_types."""
