"""The calibrate stage: a model and text in, a run out, committed as it goes."""
