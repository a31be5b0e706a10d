"""lm-eval: log-likelihoods and texts by local-completions, texts by local-chat-completions.

The log-likelihoods and the texts are those that the same model has in transformers. The command of
docs/serving.md runs with tasks of this file, as those of lm-eval read their data from the hub.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

URL, MODEL, FOLDER = sys.argv[1:4]
PAIRS = [("The sky is", " blue"), ("The sky is", " a red table"), ("Two and two", " are four")]
STOP: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0}


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=item, idx=index) for index, item in enumerate(arguments)
    ]


@cache
def transformers_model() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(FOLDER).float(), AutoTokenizer.from_pretrained(FOLDER)


def logprobs(text: str) -> torch.Tensor:
    """`[tokens - 1]` log-probabilities of the tokens of a text after the first."""
    model, tokenizer = transformers_model()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    return scores[:-1].gather(1, ids[0, 1:, None])[:, 0]


def check_scores(batch_size: int) -> None:
    lm = LocalCompletionsAPI(
        base_url=f"{URL}/completions",
        model=MODEL,
        tokenizer=FOLDER,
        tokenizer_backend="huggingface",
        max_retries=1,
        batch_size=batch_size,
    )
    for (context, continuation), (value, _) in zip(
        PAIRS, lm.loglikelihood(requests("loglikelihood", *PAIRS)), strict=True
    ):
        num_context = len(logprobs(context))
        wanted = float(logprobs(context + continuation)[num_context:].sum())
        assert abs(value - wanted) < 1e-3, (continuation, value, wanted)
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("The sky is blue today.",)))
    assert rolling < 0
    texts = lm.generate_until(requests("generate_until", *((context, dict(STOP)) for context, _ in PAIRS)))
    assert all(isinstance(text, str) for text in texts)
    assert texts[0] == texts[1]


def check_chat() -> None:
    lm = LocalChatCompletion(base_url=f"{URL}/chat/completions", model=MODEL, max_retries=1)
    context = lm.apply_chat_template([{"role": "user", "content": "Name a colour."}])
    for until in (["\n"], []):
        settings = {**STOP, "until": until}
        assert isinstance(lm.generate_until(requests("generate_until", (context, settings)))[0], str)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TASKS = "arc_easy,gsm8k"  # of the documented command
TASK: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}"}
OPTIONS = [" blue", " a red table", " four"]


def documented_command() -> list[str]:
    (text,) = re.findall(r"^lm_eval (?:.*\\\n)*.*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(text.replace("\\\n", " "))


def write_tasks(folder: Path) -> None:
    """Tasks whose right answers are what transformers computes, so that all scores are 1."""
    prompts = [prompt for prompt, _ in PAIRS[1:]]
    rows = [
        {"prompt": prompt, "best": best_option(prompt), "text": continuation(prompt)} for prompt in prompts
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}}}
    options: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_choice": OPTIONS,
        "doc_to_target": "{{best}}",
        "metric_list": [{"metric": "acc"}],
    }
    texts: dict[str, Any] = {
        "output_type": "generate_until",
        "generation_kwargs": STOP,
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, special in {"options": options, "texts": texts}.items():
        text = json.dumps({"task": name, "target_delimiter": "", **task, **special})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def best_option(prompt: str) -> int:
    """The option with the highest log-probability."""
    start = len(logprobs(prompt))
    return max(
        range(len(OPTIONS)), key=lambda number: float(logprobs(prompt + OPTIONS[number])[start:].sum())
    )


def continuation(prompt: str) -> str:
    """The greedy continuation in transformers, until STOP."""
    model, tokenizer = transformers_model()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    new = model.generate(ids, do_sample=False, max_new_tokens=STOP["max_gen_toks"])[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).split("\n")[0]


def check_documented_command() -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(folder)
        here = {"http://127.0.0.1:8000/v1": URL, "model=demo-HASH": f"model={MODEL}", TASKS: "options,texts"}
        command = documented_command()
        for documented, used in [*here.items(), ("HuggingFaceTB/SmolLM2-135M-Instruct", FOLDER)]:
            assert documented in " ".join(command), documented
            command = [word.replace(documented, used) for word in command]
        command += ["--include_path", str(folder), "--output_path", str(folder / "results.json")]
        subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)
        (file,) = folder.glob("results*.json")
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        assert results["options"]["acc,none"] == 1, results
        assert results["texts"]["exact_match,none"] == 1, results


def main() -> None:
    check_scores(batch_size=1)
    check_scores(batch_size=2)
    check_chat()
    check_documented_command()


if __name__ == "__main__":
    main()
