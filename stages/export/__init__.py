"""The export stage: a run and its source in, a checkpoint out, as often as one likes."""
