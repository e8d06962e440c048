"""Chains: pointwise math and reductions over the columns of a row, as expressions; their gradients, and what one kernel
of them loads, keeps and stores. `codegen/chains.py` prints them."""
