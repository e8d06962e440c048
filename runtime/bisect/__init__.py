"""Where two runs of one model begin to differ: layouts, dtypes, kernels, weights."""
