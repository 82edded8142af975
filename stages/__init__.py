"""The work: calibrate measures a model, export makes checkpoints of that; below, what both stand on."""
