"""Checks a whole small run: training, then decoding with the adapter."""

from __future__ import annotations

import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from parallelmind.config import TrainConfig
from parallelmind.remote import RemotePath
from workloads.doctor.check import CheckResult
from workloads.doctor.config import DoctorConfig
from workloads.doctor.storage_probe import temporary_subdir

_STEPS, _BRANCHES = 3, 2


def check_end_to_end(config: DoctorConfig) -> CheckResult:
    """Train and decode in a temporary folder. Raises UserError for a problem that the user can solve."""
    if not config.end_to_end:
        return CheckResult("skip", "end_to_end=false")
    started = time.monotonic()
    with (
        temporary_subdir(config.local_dir) as folder,
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        run_dir = config.output_path.child(folder.name)
        try:
            texts = _train_and_decode(config, run_dir)
        finally:
            run_dir.delete_remote()
    seconds = time.monotonic() - started
    return CheckResult(
        "ok", f"trained {_STEPS} steps and decoded {len(texts)} branches with the adapter, in {seconds:.0f} s"
    )


def _train_and_decode(config: DoctorConfig, run_dir: RemotePath) -> list[str]:
    """Train on generated facts; returns the texts of the branches of one more sample."""
    import parallelmind as pm
    from parallelmind.evaluation.facts import facts_records, write_facts
    from workloads.train.run import run_training

    data = run_dir.child("train.jsonl")
    write_facts(data.local, _STEPS, seed=1, branches=_BRANCHES)
    data.upload()
    train = TrainConfig(
        name="doctor",
        base_model=config.base_model,
        data_path=data.location,
        output_dir=run_dir.location,
        mlflow_uri=f"sqlite:///{run_dir.local}/mlflow.db",
        ray_address=config.ray_address,
        use_gpu=config.use_gpu,
        batch_size=1,
        lora_rank=4,
    )
    adapter = run_training(train).result
    model, tokenizer = pm.load_model_with_lora(base_model=config.base_model, lora_path=adapter.location)
    (record,) = facts_records(1, seed=2, branches=_BRANCHES)
    sample = pm.Sample(record["main"], [branch["prompt"] for branch in record["branches"]])
    return pm.generate(model, tokenizer, sample, max_new_tokens=4)
