"""Every check runs on an accelerator where there is one, and is rehearsed on a CPU, uncompiled."""

import pytest
import torch
from flexing import on_a_cpu

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")],
)


@pytest.fixture(params=[CUDA, "cpu"])
def device(request):
    if request.param == "cuda":
        yield request.param
        return
    with on_a_cpu():
        yield request.param
