"""What quantizing costs: a checkpoint's own forward beside its source's, on held-out text."""
