"""Tiny models are faster on one thread than on several; and what a test starts must add up as it does
itself.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
