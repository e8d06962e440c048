"""Source: from lowered graphs to files that run where the compiler is not."""
