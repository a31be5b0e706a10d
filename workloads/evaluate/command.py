"""Measure a model or its adapter on held-out text, look into it, or see which models can hold parallel
branches.

    python -m workloads.evaluate answers data_path=held_out.jsonl lora_path=runs/demo-HASH/adapter
    python -m workloads.evaluate answers data_path=held_out.jsonl patch_rope=false engine=batch
    python -m workloads.evaluate tax data_path=held_out.jsonl lora_path=runs/demo-HASH/adapter output_path=tax.json
    python -m workloads.evaluate attention lora_path=runs/demo-HASH/adapter main="A passage." prompts="[Who?, Where?]" \\
        output_path=map.png
    python -m workloads.evaluate support model_types=llama,gptj,mamba --csv

answers: the questions of every record (branches with prompt and completion) are answered; exact match and F1
are those of SQuAD, against the best of the completion and the branch's "references". The answer is the first
line that the model writes. engine=parallel asks in branches of one sequence, one_by_one in a sequence for
each question, batch in padded rows of main and question through Hugging Face's generate, each row a lone
branch.

tax: the loss on the same text at several branch counts. A count that no sample of the data comes to is said,
and left out.

attention: where a branch of one sample looks, as maps with time across and branches down, and what it gives
to main, to itself and to its siblings in every layer.

support: a tiny random model of every causal-LM type of the installed transformers is built, patched and held
against every law, which takes some minutes for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from parallelmind import cli
from parallelmind.config import FrozenConfig
from parallelmind.errors import UserError
from workloads.evaluate.answers import AnswersConfig, answers
from workloads.evaluate.attention import AttentionConfig, attention
from workloads.evaluate.support import SupportConfig, support
from workloads.evaluate.tax import TaxConfig, tax

_KINDS: dict[str, tuple[type[FrozenConfig], Callable[[list[str]], None]]] = {
    "answers": (AnswersConfig, answers),
    "tax": (TaxConfig, tax),
    "attention": (AttentionConfig, attention),
    "support": (SupportConfig, support),
}


def main(argv: list[str]) -> None:
    kind = argv[0] if argv else ""
    if kind not in _KINDS:
        if cli.wants_help(argv):
            return print(
                f"{cli.flowing(__doc__ or '')}\n\nevaluate KIND --help lists the fields of each: {', '.join(_KINDS)}."
            )
        raise UserError(
            f"{f'evaluate {kind}'.strip()}: unknown evaluation; choose one of {', '.join(_KINDS)}"
        )
    fields, run = _KINDS[kind]
    return cli.print_help(__doc__ or "", fields) if cli.wants_help(argv) else run(argv[1:])
