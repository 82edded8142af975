"""In which order layers and batches are computed and committed, and which schedule a run needs."""
