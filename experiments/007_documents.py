"""Do documents as branches answer as well as the same documents as one text?

    python -m experiments._documents path/to/xquad.en.json

trains an adapter of each kind with three seeds, evaluates them with 2, 4 and 8 documents, and records the
row `branches.documents_f1_vs_concatenated`. The same command resumes after an
interruption. This configuration trains on documents; the other one differs in `data_path` alone.
"""

from parallelmind.config import TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        name="documents",
        data_path="runs/data/documents.train.jsonl",
        dtype="bfloat16",
        visibility="isolated",
        positions="time",
        max_branch_tokens=6144,
        max_sample_tokens=6144,
        batch_size=4,
        batch_by_samples=True,
        learning_rate=5e-4,
        checkpoint_every=10,
        log_every=10,
    )
