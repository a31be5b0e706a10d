"""What a body asks for, in tokens; and what is refused of it, with the field that is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asgi import front
from pydantic import ValidationError
from tiny import tiny_tokenizer

import parallelmind as pm
from parallelmind.engine.sampling_params import SamplingParams
from serving.config import AppConfig
from serving.engine.messages import EngineRequest
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.branches import AddBranchRequest, BranchesRequest
from serving.protocol.errors import refusal
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorInfo,
    TokenizeRequest,
)

TOKENIZER = tiny_tokenizer()
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]


def asker(
    context: int | None = 4096, template: str | None = TOKENIZER.chat_template, **settings: Any
) -> RequestPreprocessor:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return RequestPreprocessor(AppConfig.of({"base_model": "tiny", **settings}), tokenizer, context)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return found


def parts(work: EngineRequest) -> list[list[int]]:
    """Main and the branches."""
    return work.asked.tokens.split()


def complete(to: RequestPreprocessor | None = None, **fields: Any) -> EngineRequest:
    return (to or asker()).completion(CompletionRequest(**{"model": "tiny", "prompt": "who", **fields}))


def chat(to: RequestPreprocessor | None = None, **fields: Any) -> EngineRequest:
    return (to or asker()).chat(ChatRequest(**{"model": "tiny", "messages": TALK, **fields}))


def branch(to: RequestPreprocessor | None = None, **fields: Any) -> EngineRequest:
    return (to or asker()).branches(
        BranchesRequest(**{"model": "tiny", "branches": [{"text": "who"}], **fields})
    )


def problem(call: Any, *args: Any, **kwargs: Any) -> ErrorInfo:
    """How a client hears of what is refused."""
    with pytest.raises(pm.UserError) as error:
        call(*args, **kwargs)
    found = refusal(str(error.value)).problem
    assert "\n" not in found.message
    return found


FORMS: list[Any] = ["who", ["who", "what is"], [5, 6, 7], [[5], [6, 7]], ["who", [5]]]
FOUND = [[ids("who")], [ids("who"), ids("what is")], [[5, 6, 7]], [[5], [6, 7]], [ids("who"), [5]]]


@pytest.mark.parametrize(("prompt", "branches"), list(zip(FORMS, FOUND, strict=True)))
def test_every_form_of_prompts_becomes_branches_in_order_each_n_times(
    prompt: Any, branches: list[list[int]]
) -> None:
    assert parts(complete(prompt=prompt)) == [[], *branches]
    assert parts(complete(prompt=prompt, n=3)) == [[], *(each for each in branches for _ in range(3))]


@pytest.mark.parametrize("prompt", [[], [1, "who"], [True], 5, None, {"text": "who"}, [[1, [2]]]])
def test_other_forms_of_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError, match="prompt"):
        complete(prompt=prompt)


@pytest.mark.parametrize(
    ("prompt", "n", "at"), [("", 1, 0), (["who", ""], 1, 1), ([[]], 1, 0), (["who", ""], 3, 1)]
)
def test_an_empty_prompt_is_named_by_its_place_among_those_given(prompt: Any, n: int, at: int) -> None:
    found = problem(complete, prompt=prompt, n=n)
    assert found.param == found.message.split(":")[0] == f"prompt[{at}]"


def test_a_text_that_is_no_unicode_is_refused() -> None:
    """JSON can spell half a surrogate pair."""
    with pytest.raises((pm.UserError, ValidationError)):
        complete(prompt="\ud800")
    with pytest.raises((pm.UserError, ValidationError)):
        chat(messages=[{"role": "user", "content": "\ud800"}])


NARROW = {"max_branches": 4, "max_prompt_tokens": 6, "max_new_tokens": 50}


@pytest.mark.parametrize(
    ("call", "fields", "field", "numbers"),
    [
        (complete, {"prompt": ["a"] * 5}, "prompt", (5, 4)),
        (complete, {"prompt": ["a"] * 3, "n": 2}, "n", (6, 4)),
        (complete, {"n": 10**12}, "n", (10**12, 4)),
        (chat, {"n": 5}, "n", (5, 4)),
        (branch, {"branches": [{"text": "a"}] * 5}, "branches", (5, 4)),
        (branch, {"branches": [{"text": "a"}] * 4, "reduce": "b"}, "branches", (5, 4)),
        (complete, {"prompt": [[5] * 4, [6] * 3]}, "prompt", (7, 6)),
        (complete, {"max_tokens": 51}, "max_tokens", (51, 50)),
        (branch, {"max_tokens": 51}, "max_tokens", (51, 50)),
        (branch, {"branches": [{"text": "a", "max_tokens": 51}], "max_tokens": 5}, "max_tokens", (51, 50)),
    ],
)
def test_a_limit_names_the_field_what_was_asked_and_what_is_allowed(
    call: Any, fields: dict[str, Any], field: str, numbers: tuple[int, int]
) -> None:
    found = problem(call, asker(**NARROW), **fields)
    assert found.param == field
    assert all(str(number) in found.message for number in numbers)


def test_what_is_just_allowed_is_served() -> None:
    work = complete(asker(**NARROW), prompt=[[5] * 2, [6]], n=2, max_tokens=50)
    assert parts(work) == [[], [5, 5], [5, 5], [6], [6]]
    assert branch(
        asker(**NARROW), main=[5], branches=[{"text": [6]}] * 3, reduce=[7, 8], max_tokens=50
    ).asked.reduce
    assert (
        "7 tokens"
        in problem(branch, asker(**NARROW), branches=[{"text": [6]}], reduce=[7] * 6, max_tokens=5).message
    )
    late = AddBranchRequest(text=[5] * 6, max_tokens=50)
    assert asker(**NARROW).joining(late)[0] == [5] * 6
    assert "7" in problem(asker(**NARROW).joining, late.model_copy(update={"text": [5] * 7})).message


@pytest.mark.parametrize(
    ("call", "kind", "fields"),
    [
        (complete, CompletionRequest, {"prompt": [2**70]}),
        (complete, CompletionRequest, {"max_tokens": 0}),
        (complete, CompletionRequest, {"logprobs": 21}),
        (chat, ChatRequest, {"messages": [*TALK, *TALK]}),
        (chat, ChatRequest, {"max_completion_tokens": 51}),
        (chat, ChatRequest, {"top_logprobs": 3}),
        (branch, BranchesRequest, {"main": [5] * 50}),
        (branch, BranchesRequest, {"branches": [{"text": ""}]}),
    ],
)
def test_what_is_to_blame_is_a_field_of_the_request(call: Any, kind: Any, fields: dict[str, Any]) -> None:
    blamed = problem(call, asker(max_prompt_tokens=40, max_new_tokens=50), **fields).param or ""
    assert blamed.split("[")[0] in list(kind.model_fields)


@pytest.mark.parametrize("call", [complete, chat, branch])
def test_an_unknown_model_is_told_with_those_that_are_served(call: Any) -> None:
    serving = asker(adapters={"legal": "somewhere"})
    found = problem(call, serving, model="gpt-4")
    assert (found.param, found.code) == ("model", "model_not_found")
    assert all(name in found.message for name in ("'gpt-4'", "tiny", "base:legal"))
    assert len(problem(call, serving, model="x" * 10**6).message) < 300
    assert call(serving, model="base:legal").model == "base:legal"
    assert call(serving, model="base").model == "base"


def test_a_given_seed_is_kept_and_a_missing_one_is_drawn_anew() -> None:
    assert [each.seed for each in complete(prompt=["a", "b"], seed=7).asked.params] == [7, 7]
    drawn = [each.seed for _ in range(2) for each in complete(prompt=["a", "b"], n=2).asked.params]
    assert len(set(drawn)) == 8
    assert None not in drawn
    work = branch(branches=[{"text": "a", "seed": 0}, {"text": "b"}], reduce="c")
    assert work.asked.reduce
    assert work.asked.params[0].seed == 0
    assert None not in (work.asked.params[1].seed, work.asked.reduce.params.seed)
    assert asker().joining(AddBranchRequest(text="a", seed=3))[1].seed == 3
    assert asker().joining(AddBranchRequest(text="a"))[1].seed is not None


def test_requests_without_a_seed_are_drawn_otherwise_after_every_start(tmp_path: Path) -> None:
    """Every process begins with the same state of torch's generator, and fronts are several."""
    seeds = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(67280421310721)  # what torch starts with
            seeds.append(complete(front(tmp_path).asker).asked.params[0].seed)
    assert seeds[0] != seeds[1]


def test_a_branch_has_the_settings_it_brings_and_those_of_all_for_the_rest() -> None:
    everybody = {"temperature": 0.5, "max_tokens": 7, "stop": "end", "top_k": 3, "seed": 1, "logprobs": 2}
    own = [{}, {"temperature": 0, "stop": None}, {"max_tokens": 3, "seed": 2, "logit_bias": {"5": 1}}]
    work = branch(branches=[{"text": "a", **each} for each in own], reduce="all", main="passage", **everybody)
    base = {"temperature": 0.5, "max_new_tokens": 7, "stop": ["end"], "top_k": 3, "seed": 1, "logprobs": 2}
    changed = [{}, {"temperature": 0, "stop": []}, {"max_new_tokens": 3, "seed": 2, "logit_bias": {5: 1}}]
    assert work.asked.params == [SamplingParams(**{**base, **each}) for each in changed]
    assert work.asked.reduce
    assert (work.asked.reduce.token_ids, work.asked.reduce.params) == (ids("all"), SamplingParams(**base))
    assert parts(work) == [ids("passage"), *[ids("a")] * 3]
    assert (branch().asked.params[0].max_new_tokens, branch().asked.params[0].temperature) == (64, 0)


def test_a_conversation_is_main_and_the_assistants_turn_begins_every_branch() -> None:
    spelled = "<s>system\nbe brief</s>\n<s>user\nwho</s>\n"
    work = chat(n=3, stop=["a", "b"], seed=4)
    assert parts(work) == [ids(spelled), *[ids("<s>assistant\n")] * 3]
    assert {(each.seed, each.stop) for each in work.asked.params} == {(4, ("a", "b"))}
    pieces = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    assert parts(chat(messages=[{"role": "system", "content": pieces}, TALK[1]])) == parts(chat())


def test_a_template_that_rewrites_the_conversation_for_an_answer_is_read_as_a_whole() -> None:
    main, turn = parts(
        chat(asker(template="{% if add_generation_prompt %}answer {% endif %}{{ messages[0]['content'] }}"))
    )
    assert main + turn == ids("answer be brief")


BROKEN = [
    (None, "no chat"),
    ("{{ raise_exception('only\\nusers') }}", "(only)"),
    ("{{ messages[7].a }}", "("),
    ("{% if %}", "("),
]


@pytest.mark.parametrize(("template", "told"), BROKEN)
def test_a_template_that_cannot_be_used_is_told_in_one_line(template: str | None, told: str) -> None:
    found = problem(chat, asker(template=template))
    assert found.param == "messages"
    assert told in found.message


def test_an_answer_is_as_long_as_asked_or_else_as_the_context_has_room_for() -> None:
    def most(to: RequestPreprocessor | None = None, **fields: Any) -> int:
        return chat(to, **fields).asked.params[0].max_new_tokens

    read = sum(map(len, parts(chat())))
    assert most() == 1024
    assert most(asker(context=None)) == 1024
    assert most(asker(context=read + 20)) == 20
    assert most(asker(context=5)) == 1  # the engine will say that it is too long
    assert most(asker(max_new_tokens=9)) == 9
    assert most(max_tokens=5) == 5
    assert most(max_tokens=5, max_completion_tokens=6) == 6


def test_tokens_and_text_are_translated_both_ways() -> None:
    tokens = asker().tokenize(TokenizeRequest(prompt="who is ü?"))
    assert tokens == ids("who is ü?")
    assert asker().detokenize(DetokenizeRequest(tokens=tokens)) == "who is ü?"
    assert problem(asker().tokenize, TokenizeRequest(prompt="who", model="gpt-4")).param == "model"
    for token in (-1, 300, 2**70):
        found = problem(asker().detokenize, DetokenizeRequest(tokens=[5, token]))
        assert (found.param, found.message) == ("tokens", f"tokens={token}: give ids from 0 to 299")


def test_fields_at_their_defaults_do_no_harm_and_biases_go_by_id() -> None:
    idle = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "user": "me",
        "stream_options": None,
        "logit_bias": None,
    }
    assert (
        complete(best_of=1, echo=False, suffix=None, seed=1, **idle).asked.params
        == complete(seed=1).asked.params
    )
    assert parts(chat(tools=None, tool_choice="none", response_format={"type": "text"}, **idle)) == parts(
        chat()
    )
    assert complete(logit_bias={"7": -100, "05": 1.5}).asked.params[0].logit_bias == ((5, 1.5), (7, -100.0))
