"""Placement: where each value of a graph is, on every axis of a mesh, and what it takes to change that."""
