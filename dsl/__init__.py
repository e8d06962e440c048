"""The language: text in, checked and elaborated programs out. Loads neither torch nor networkx."""
