"""Evaluate a model or an adapter: answers to questions, branch tax, attention maps, supported model types.

    python -m workloads.evaluate answers data_path=held_out.jsonl lora_path=runs/demo-HASH/adapter
    python -m workloads.evaluate answers data_path=held_out.jsonl patch_rope=false engine=batch
    python -m workloads.evaluate tax data_path=held_out.jsonl lora_path=runs/demo-HASH/adapter \\
        output_path=tax.json
    python -m workloads.evaluate attention lora_path=runs/demo-HASH/adapter main="A passage." \\
        prompts="[Who?, Where?]" output_path=map.png
    python -m workloads.evaluate support model_types=llama,gptj,mamba --csv

answers: answers the questions of every record (branches with prompt and completion) and prints exact match
and F1 as defined by SQuAD, against the best match among the completion and the branch's "references". The
first line that the model writes is its answer. engine=parallel decodes questions as branches of one sequence,
one_by_one each question in its own sequence, batch as padded rows of main and question through the generate
method of transformers. A question in the reduce is answered after all branches; branches without targets are
documents that it reads. engine=one_by_one and batch read the documents as one plain text. Nested branches
read the answers on their path, with engine=parallel alone.

tax: measures the loss on the same text at several branch counts. A count that no sample of the data reaches
is reported and skipped. Records with a reduce or nested branches are refused.

attention: draws the attention of one branch of a sample as maps with time across and branches down, and
prints its shares for main, the branch itself and its siblings in every layer. With reduce, the branch after
the last one is the reduce, with a share for the branches that it joins.

support: builds a tiny random model of every causal-LM type of the installed transformers and checks all laws
on it. All types take some minutes.
"""

from __future__ import annotations

from importlib import import_module

from parallelmind import cli
from parallelmind.errors import UserError

EVALUATIONS = ("answers", "tax", "attention", "support")  # each a module with NAMEConfig and evaluate_NAME


def main(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name in EVALUATIONS:
        module = import_module(f"{__package__}.{name}")  # late: torch and transformers take seconds
        if cli.wants_help(argv):
            cli.print_help(__doc__ or "", getattr(module, f"{name.capitalize()}Config"))
        else:
            getattr(module, f"evaluate_{name}")(argv[1:])
        return
    names = ", ".join(EVALUATIONS)
    if not cli.wants_help(argv):
        raise UserError(f"{f'evaluate {name}'.strip()}: unknown evaluation; choose one of {names}")
    print(cli.flowing(cli.as_typed(__doc__ or "")))
    print(f"\nevaluate NAME --help lists the fields of each: {names}.")
