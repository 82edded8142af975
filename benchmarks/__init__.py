"""The costs that Holdfast promises, measured side by side in one run: `make bench`."""

import os

# Before any library is imported, here and in the processes that export: no network, and nothing said between
# the tables.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
