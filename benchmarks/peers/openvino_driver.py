"""OpenVINO GenAI's continuous batching with prefix caching. Arguments: exported model, dtype."""

from __future__ import annotations

import os
import sys
from itertools import count

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.protocol import Decode, Request, run_arrivals, serve

_PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


def load() -> Decode:
    """Load the exported model; a cache of 1 GiB holds every text of a measurement."""
    model, dtype = sys.argv[1:]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 1024
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
    numbers = count()

    def decode(requests: list[Request]) -> list[list[int]]:
        handles = []

        def submit(request: Request) -> None:
            for text in request.texts:
                ids = openvino.Tensor(np.array([text], dtype=np.int64))
                handles.append(pipeline.add_request(next(numbers), ids, _generation(request.new_tokens)))

        run_arrivals(requests, submit, pipeline.step, pipeline.has_non_finished_requests)
        return [list(handle.read_all()[0].generated_ids) for handle in handles]

    return decode


def _generation(new_tokens: int) -> openvino_genai.GenerationConfig:
    """Settings of a greedy text of exactly this length."""
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = new_tokens
    settings.ignore_eos = True
    settings.do_sample = False
    return settings


if __name__ == "__main__":
    serve(load)
