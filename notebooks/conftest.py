"""Surroundings of `pytest --nbval`: without progress bars, whose widgets would be outputs that no committed notebook has."""

import os

os.environ["TQDM_DISABLE"] = "1"  # the kernels' too
