"""Tests run on an accelerator if there is one, and uncompiled on a CPU."""

import pytest
import torch
from flexing import flex_on_cpu

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")],
)


@pytest.fixture(params=[CUDA, "cpu"])
def device(request):
    if request.param == "cuda":
        yield request.param
        return
    with flex_on_cpu():
        yield request.param
