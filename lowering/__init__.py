"""Graphs, ops and passes: from an elaborated program to graphs that code can be generated from."""
