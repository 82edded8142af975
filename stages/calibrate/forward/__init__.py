"""The forward itself: the whole model, or one decoder layer at a time."""
