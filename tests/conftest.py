"""Tiny models are faster on one thread than on several; and what a test starts must add up as it does
itself.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # of the processes that tests start, which reserve more CPUs

import torch
from hypothesis import settings

# An example takes as long as the machine lets it, which other work may slow down.
settings.register_profile("parallelmind", deadline=None)
settings.load_profile("parallelmind")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
