"""Request bodies become tokenized requests, or errors that name the field."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asgi import ingress_app, make_ingress, post_json, send_request
from chat_checks import chat_ids, random_conversation
from chat_templates import CHAT_KINDS, chat_tokenizer
from pydantic import ValidationError
from tiny import tiny_tokenizer

import parallelmind as pm
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from serving.config import AppConfig
from serving.engine.messages import EngineRequest
from serving.ingress.chat_prompts import ChatPrompts
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.branches import BranchesRequest, ForkRequest, Segment
from serving.protocol.errors import ErrorInfo, user_error
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

TOKENIZER = tiny_tokenizer()
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]


def make_preprocessor(
    context: int | None = 4096, template: str | None = TOKENIZER.chat_template, **settings: Any
) -> RequestPreprocessor:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return RequestPreprocessor(AppConfig.of({"base_model": "tiny", **settings}), tokenizer, context)


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return token_ids


def sample_of(request: EngineRequest) -> TokenizedRequest:
    """The only sample of a request."""
    (sample,) = request.samples
    return sample


def token_ids(request: EngineRequest) -> list[list[int]]:
    """Token ids of main and of the branches of a request of one sample."""
    return sample_of(request).tokens.split()


def params_of(request: EngineRequest) -> list[SamplingParams]:
    """The settings of all branches."""
    return [params for sample in request.samples for params in sample.params]


def complete(preprocessor: RequestPreprocessor | None = None, **fields: Any) -> EngineRequest:
    return (preprocessor or make_preprocessor()).completion(
        CompletionRequest(**{"model": "tiny", "prompt": "who", **fields})
    )


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("branches", {"branches": [{"messages": TALK}] * 65}),
        ("documents", {"documents": ["a"] * 65, "reduce": "b"}),
    ],
)
def test_too_many_branches_are_refused_before_any_is_rendered(
    monkeypatch: pytest.MonkeyPatch, field: str, body: dict[str, Any]
) -> None:
    """Each would hold the whole conversation."""
    monkeypatch.setattr(ChatPrompts, "_render", lambda *arguments: pytest.fail("rendered"))
    request = BranchesRequest(**{"model": "tiny", "messages": TALK, **body})
    with pytest.raises(pm.UserError, match=f"^{field}: 65 branches, 64 allowed in one request"):
        make_preprocessor().branches(request)


def chat(preprocessor: RequestPreprocessor | None = None, **fields: Any) -> EngineRequest:
    return (preprocessor or make_preprocessor()).chat(
        ChatRequest(**{"model": "tiny", "messages": TALK, **fields})
    )


def branch(preprocessor: RequestPreprocessor | None = None, **fields: Any) -> EngineRequest:
    return (preprocessor or make_preprocessor()).branches(
        BranchesRequest(**{"model": "tiny", "branches": [{"text": "who"}], **fields})
    )


def error_of(call: Any, *args: Any, **kwargs: Any) -> ErrorInfo:
    """The error that a client receives."""
    with pytest.raises(pm.UserError) as error:
        call(*args, **kwargs)
    info = user_error(str(error.value)).info
    assert "\n" not in info.message
    return info


PROMPT_FORMS: list[Any] = ["who", ["who", "what is"], [5, 6, 7], [[5], [6, 7]], ["who", [5]]]
PROMPTS_OF_FORMS = [
    [ids("who")],
    [ids("who"), ids("what is")],
    [[5, 6, 7]],
    [[5], [6, 7]],
    [ids("who"), [5]],
]


@pytest.mark.parametrize(("prompt", "prompts"), list(zip(PROMPT_FORMS, PROMPTS_OF_FORMS, strict=True)))
def test_every_form_of_prompt_becomes_samples_in_order_with_n_branches(
    prompt: Any, prompts: list[list[int]]
) -> None:
    samples = [sample.tokens.split() for sample in complete(prompt=prompt).samples]
    assert samples == [[[], ids] for ids in prompts]
    request = complete(prompt=prompt, n=3)
    samples = [sample.tokens.split() for sample in request.samples]
    assert samples == [[ids[:-1], *[ids[-1:]] * 3] for ids in prompts]
    assert {sample.branch_number for sample in request.samples} == {0}
    assert request.num_prompt_tokens == sum(map(len, prompts))
    coupled = complete(prompt=prompt, n=3, visibility="columnar")
    assert token_ids(coupled) == [[], *(ids for ids in prompts for _ in range(3))]
    assert sample_of(coupled).branch_number is None
    assert coupled.num_prompt_tokens == sum(map(len, prompts))


def test_what_prompts_begin_with_is_the_main_of_one_sample() -> None:
    text = list(range(10, 30))
    request = complete(prompt=[[*text, 5, 6], [*text, 7], [*text, 5]])
    assert token_ids(request) == [text, [5, 6], [7], [5]]
    assert request.num_prompt_tokens == 3 * len(text) + 4
    request = complete(prompt=[text, [*text, 7]], n=2)  # every branch begins with a token
    assert token_ids(request) == [text[:-1], text[-1:], text[-1:], [*text[-1:], 7], [*text[-1:], 7]]
    short = complete(prompt=[[*text[:5], 5], [*text[:5], 6]])
    assert [sample.tokens.split()[0] for sample in short.samples] == [[], []]


@pytest.mark.parametrize("prompt", [[], [1, "who"], [True], 5, None, {"text": "who"}, [[1, [2]]]])
def test_other_forms_of_prompt_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError, match="prompt"):
        complete(prompt=prompt)


@pytest.mark.parametrize(
    ("prompt", "n", "at"), [("", 1, 0), (["who", ""], 1, 1), ([[]], 1, 0), (["who", ""], 3, 1)]
)
def test_an_empty_prompt_is_named_by_its_index(prompt: Any, n: int, at: int) -> None:
    info = error_of(complete, prompt=prompt, n=n)
    assert info.param == info.message.split(":")[0] == f"prompt[{at}]"


def test_a_text_with_a_lone_surrogate_is_refused() -> None:
    """JSON can escape half a surrogate pair."""
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
        (complete, {"prompt": [[5] * 4, [6] * 7]}, "prompt", (7, 6)),
        (complete, {"prompt": [[5] * 4, [6] * 3], "visibility": "columnar"}, "prompt", (7, 6)),
        (complete, {"max_tokens": 51}, "max_tokens", (51, 50)),
        (branch, {"max_tokens": 51}, "max_tokens", (51, 50)),
        (branch, {"branches": [{"text": "a", "max_tokens": 51}], "max_tokens": 5}, "max_tokens", (51, 50)),
    ],
)
def test_an_exceeded_limit_names_field_value_and_limit(
    call: Any, fields: dict[str, Any], field: str, numbers: tuple[int, int]
) -> None:
    info = error_of(call, make_preprocessor(**NARROW), **fields)
    assert info.param == field
    assert all(str(number) in info.message for number in numbers)


def test_a_request_at_the_limits_is_served() -> None:
    request = complete(make_preprocessor(**NARROW), prompt=[[5] * 6, [6]], n=2, max_tokens=50)
    assert [sample.tokens.split() for sample in request.samples] == [[[5] * 5, [5], [5]], [[], [6], [6]]]
    limited = branch(
        make_preprocessor(**NARROW), main=[5], branches=[{"text": [6]}] * 3, reduce=[7, 8], max_tokens=50
    )
    assert sample_of(limited).tokens.tree.is_reduce.tolist() == [False] * 4 + [True]
    assert (
        "7 tokens"
        in error_of(
            branch, make_preprocessor(**NARROW), branches=[{"text": [6]}], reduce=[7] * 6, max_tokens=5
        ).message
    )
    late = Segment(text=[5] * 6, max_tokens=50)
    assert make_preprocessor(**NARROW).added_segment(late).text == [5] * 6
    longer = late.model_copy(update={"text": [5] * 7})
    assert "7" in error_of(make_preprocessor(**NARROW).added_segment, longer).message


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
def test_an_error_names_a_field_of_the_request(call: Any, kind: Any, fields: dict[str, Any]) -> None:
    blamed = error_of(call, make_preprocessor(max_prompt_tokens=40, max_new_tokens=50), **fields).param or ""
    assert blamed.split("[")[0] in list(kind.model_fields)


@pytest.mark.parametrize("call", [complete, chat, branch])
def test_the_error_of_an_unknown_model_lists_the_served_ones(call: Any) -> None:
    preprocessor = make_preprocessor(adapters={"legal": "somewhere"})
    info = error_of(call, preprocessor, model="gpt-4")
    assert (info.param, info.code) == ("model", "model_not_found")
    assert all(name in info.message for name in ('"gpt-4"', "tiny", "base:legal"))
    assert len(error_of(call, preprocessor, model="x" * 10**6).message) < 300
    assert call(preprocessor, model="base:legal").model == "base:legal"
    assert call(preprocessor, model="base").model == "base"


def test_a_seed_is_kept_and_a_missing_one_is_drawn() -> None:
    assert [params.seed for params in params_of(complete(prompt=["a", "b"], seed=7))] == [7, 7]
    first, second, *others = [params.seed for params in params_of(complete(prompt=["a", "b"], n=2, seed=7))]
    assert first == 7 != second
    assert others == [first, second]
    drawn = [params.seed for _ in range(2) for params in params_of(complete(prompt=["a", "b"], n=2))]
    assert len(set(drawn)) == 8
    assert None not in drawn
    request = branch(branches=[{"text": "a", "seed": 0}, {"text": "b"}], reduce="c")
    assert params_of(request)[0].seed == 0
    assert None not in (params.seed for params in params_of(request))
    assert request.num_branches == 3
    assert make_preprocessor().added_segment(Segment(text="a", seed=3)).sampling["seed"] == 3
    assert make_preprocessor().added_segment(Segment(text="a")).sampling["seed"] is not None


def test_drawn_seeds_differ_after_every_start(tmp_path: Path) -> None:
    """Every process starts with the same state of torch's generator, and there are several ingresses."""
    seeds = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(67280421310721)  # what torch starts with
            seeds.append(params_of(complete(make_ingress(tmp_path).preprocessor))[0].seed)
    assert seeds[0] != seeds[1]


def test_settings_of_a_branch_override_those_of_the_request() -> None:
    shared = {"temperature": 0.5, "max_tokens": 7, "stop": "end", "top_k": 3, "seed": 1, "logprobs": 2}
    own = [{}, {"temperature": 0, "stop": None}, {"max_tokens": 3, "seed": 2, "logit_bias": {"5": 1}}]
    request = branch(
        branches=[{"text": "a", **settings} for settings in own], reduce="all", main="passage", **shared
    )
    base = {"temperature": 0.5, "max_new_tokens": 7, "stop": ["end"], "top_k": 3, "seed": 1, "logprobs": 2}
    changed = [{}, {"temperature": 0, "stop": []}, {"max_new_tokens": 3, "seed": 2, "logit_bias": {5: 1}}]
    assert params_of(request) == [SamplingParams(**{**base, **settings}) for settings in (*changed, {})]
    assert token_ids(request) == [ids("passage"), *[ids("a")] * 3, ids("all")]
    (params,) = params_of(branch())
    assert (params.max_new_tokens, params.temperature) == (64, 0)


def test_a_conversation_is_main_and_the_header_of_the_assistant_begins_every_branch() -> None:
    spelled = "<s>system\nbe brief</s>\n<s>user\nwho</s>\n"
    request = chat(n=3, stop=["a", "b"], seed=4)
    assert token_ids(request) == [ids(spelled), *[ids("<s>assistant\n")] * 3]
    assert {params.stop for params in params_of(request)} == {("a", "b")}
    assert len({params.seed for params in params_of(request)}) == 3
    assert sample_of(request).branch_number == 1
    assert request.num_prompt_tokens == len(ids(spelled + "<s>assistant\n"))
    coupled = chat(n=3, seed=4, visibility="columnar")
    assert (sample_of(coupled).branch_number, {params.seed for params in params_of(coupled)}) == (None, {4})
    pieces = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    assert token_ids(chat(messages=[{"role": "system", "content": pieces}, TALK[1]])) == token_ids(chat())


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_main_and_branch_of_a_chat_are_the_token_ids_of_the_chat_template(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    preprocessor = RequestPreprocessor(AppConfig.of({"base_model": "tiny"}), tokenizer, None)
    rng = random.Random(kind)
    for turns in (1, 2, 3):
        messages = random_conversation(kind, rng, turns)[:-1]
        main, branch = token_ids(chat(preprocessor, messages=messages))
        assert main + branch == chat_ids(tokenizer, messages, add_generation_prompt=True)
        assert main
        assert branch


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_main_and_a_question_are_the_token_ids_of_the_chat_template(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    preprocessor = RequestPreprocessor(AppConfig.of({"base_model": "tiny"}), tokenizer, None)
    messages = random_conversation(kind, random.Random(kind), 2)
    questions = ["who likes rice?", "where is it?", "?", "\nwho"]
    main, *branches = token_ids(chat(preprocessor, messages=messages, questions=questions))
    for question, ids in zip(questions, branches, strict=True):
        turns = [*messages, {"role": "user", "content": question}]
        assert main + ids == chat_ids(tokenizer, turns, add_generation_prompt=True)
        alone = token_ids(chat(preprocessor, messages=messages, questions=[question]))
        assert alone == [main, ids]
    assert len(main) > max(map(len, branches))  # the conversation is read once


def test_every_question_has_n_answers() -> None:
    request = chat(questions=["a", "b"], n=2)
    main, *branches = token_ids(request)
    assert (branches[0], branches[2]) == (branches[1], branches[3])
    assert request.num_prompt_tokens == len(main) + len(branches[0]) + len(branches[2])
    info = error_of(chat, make_preprocessor(max_branches=2), questions=["a", "b", "c"])
    assert info.param == "questions"
    with pytest.raises(ValidationError, match="questions"):
        chat(questions=[])


def test_prompts_after_a_main_are_branches_of_one_sample() -> None:
    request = complete(prompt=["who", [5]], n=2, main="passage")
    assert token_ids(request) == [ids("passage"), ids("who"), ids("who"), [5], [5]]
    assert sample_of(request).branch_number == 1
    assert request.num_prompt_tokens == len(ids("passage")) + len(ids("who")) + 1
    assert token_ids(complete(prompt=["who"], main="passage", visibility="columnar")) == token_ids(
        branch(main="passage", branches=["who"])
    )


def test_branches_are_texts_token_ids_or_messages() -> None:
    turn = {"role": "user", "content": "where"}
    request = branch(main="passage", branches=["who", [5, 6], {"text": "who", "max_tokens": 3}])
    assert token_ids(request) == [ids("passage"), ids("who"), [5, 6], ids("who")]
    assert [params.max_new_tokens for params in params_of(request)] == [64, 64, 3]
    asked, marker = token_ids(chat(questions=["where"])), ids("<s>user\n")
    request = branch(messages=TALK, branches=[turn, [turn], {"messages": [turn], "seed": 3}])
    assert token_ids(request) == [asked[0], *asked[1:] * 3]
    assert params_of(request)[2].seed == 3
    rest = ids("where</s>\n<s>assistant\n")
    assert token_ids(branch(main="passage", branches=[turn])) == [[*ids("passage"), *marker], rest]
    assert token_ids(branch(branches=[turn, turn])) == [marker, rest, rest]
    assert error_of(branch, main="passage", messages=TALK).param == "main"
    mixed = branch(messages=TALK, branches=[turn, "who"])  # a text follows no marker of a turn
    assert token_ids(mixed) == [asked[0][: -len(marker)], [*marker, *rest], ids("who")]
    mixed = branch(main="passage", branches=[turn, "who"])
    assert token_ids(mixed) == [ids("passage"), [*marker, *rest], ids("who")]
    for wrong in ({}, {"text": "who", "messages": [turn]}, {"messages": []}, [{"role": "user"}], 5):
        with pytest.raises(ValidationError, match="branches"):
            branch(branches=[wrong])


def test_a_template_that_renders_the_header_first_is_tokenized_as_one_text() -> None:
    main, turn = token_ids(
        chat(
            make_preprocessor(
                template="{% if add_generation_prompt %}answer {% endif %}{{ messages[0]['content'] }}"
            )
        )
    )
    assert main + turn == ids("answer be brief")


BROKEN = [
    (None, "no chat"),
    ("{{ raise_exception('only\\nusers') }}", "(only)"),
    ("{{ messages[7].a }}", "("),
    ("{% if %}", "("),
]


@pytest.mark.parametrize(("template", "part"), BROKEN)
def test_the_error_of_a_broken_template_is_one_line(template: str | None, part: str) -> None:
    info = error_of(chat, make_preprocessor(template=template))
    assert info.param == "messages"
    assert part in info.message


def test_max_tokens_of_a_chat_defaults_to_the_room_in_the_context() -> None:
    def max_new_tokens_of(preprocessor: RequestPreprocessor | None = None, **fields: Any) -> int:
        return params_of(chat(preprocessor, **fields))[0].max_new_tokens

    read = sum(map(len, token_ids(chat())))
    assert max_new_tokens_of() == 1024
    assert max_new_tokens_of(make_preprocessor(context=None)) == 1024
    assert max_new_tokens_of(make_preprocessor(context=read + 20)) == 20
    assert max_new_tokens_of(make_preprocessor(max_new_tokens=9)) == 9
    assert max_new_tokens_of(max_tokens=5) == 5
    assert max_new_tokens_of(max_tokens=5, max_completion_tokens=6) == 6


def test_text_and_tokens_convert_both_ways() -> None:
    tokens = make_preprocessor().tokenize(TokenizeRequest(prompt="who is ü?"))
    assert tokens == ids("who is ü?")
    assert make_preprocessor().detokenize(DetokenizeRequest(tokens=tokens)) == "who is ü?"
    assert (
        error_of(make_preprocessor().tokenize, TokenizeRequest(prompt="who", model="gpt-4")).param == "model"
    )
    for token in (-1, 300, 2**70):
        info = error_of(make_preprocessor().detokenize, DetokenizeRequest(tokens=[5, token]))
        assert (info.param, info.message) == ("tokens", f"tokens={token}: give ids from 0 to 299")


def test_fields_at_their_defaults_are_accepted_and_biases_are_keyed_by_token_id() -> None:
    idle = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "user": "me",
        "stream_options": None,
        "logit_bias": None,
    }
    assert params_of(complete(best_of=1, echo=False, suffix=None, seed=1, **idle)) == params_of(
        complete(seed=1)
    )
    assert token_ids(
        chat(tools=None, tool_choice="none", response_format={"type": "text"}, **idle)
    ) == token_ids(chat())
    assert params_of(complete(logit_bias={"7": -100, "05": 1.5}))[0].logit_bias == (
        (5, 1.5),
        (7, -100.0),
    )


TREE: dict[str, Any] = {
    "main": "passage",
    "branches": [
        "who",
        {"text": "what", "branches": ["is", {"text": [5, 6], "max_tokens": 0}], "reduce": {"text": "all"}},
    ],
    "reduce": {"text": "so", "branches": [[7]], "temperature": 0.5},
}


def test_nested_segments_become_those_of_a_sample() -> None:
    request = branch(**TREE, max_tokens=9, seed=2)
    assert token_ids(request) == [
        *map(ids, ("passage", "who", "what", "is")),
        [5, 6],
        *map(ids, ("all", "so")),
        [7],
    ]
    tree = request.samples[0].tokens.tree
    assert tree.parents.tolist() == [-1, 0, 0, 2, 2, 2, 0, 6]
    assert np.flatnonzero(tree.is_reduce).tolist() == [5, 6]
    params = params_of(request)
    assert [own.max_new_tokens for own in params] == [9, 9, 9, 0, 9, 9, 9]
    assert [own.temperature for own in params] == [0, 0, 0, 0, 0, 0.5, 0]
    assert {own.seed for own in params} == {2}


def nested(depth: int, leaf: dict[str, Any]) -> dict[str, Any]:
    """Branches in branches. depth: how many segments follow each other."""
    for _ in range(depth - 1):
        leaf = {"text": "a", "branches": [leaf]}
    return leaf


@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({"branches": [nested(65, {"text": "a"})]}, "branches", ["64 deep"]),
        ({"branches": [nested(5, {"text": "a"})], "reduce": "b"}, "branches", ["6 branches, 5 allowed"]),
        ({"branches": [nested(2, {"text": ""})]}, "branches[0].branches[0].text", ["no token"]),
        ({"branches": [{"text": "a", "reduce": "b"}]}, "branches[0].reduce", ["no branches"]),
        (
            {"branches": ["a"], "reduce": {"text": "a", "branches": [{"text": ""}]}},
            "reduce.branches[0].text",
            ["no token"],
        ),
        ({"branches": [nested(2, {"text": "a", "top_p": 7})]}, "top_p", ["7"]),
    ],
)
def test_a_bad_tree_is_refused_and_its_field_named(
    fields: dict[str, Any], param: str, parts: list[str]
) -> None:
    limit = 100 if "64 deep" in parts else 5
    info = error_of(branch, make_preprocessor(max_branches=limit), **fields)
    assert info.param == param
    assert all(part in info.message for part in parts)


@pytest.mark.parametrize("depth", [240, 252, 300, 5000, 100_000])
def test_branches_nested_without_end_are_refused(depth: int, tmp_path: Path) -> None:
    branches = '{"text": "a", "branches": [' * depth + "]}" * depth
    body = f'{{"model": "tiny", "branches": [{branches}]}}'.encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    app = ingress_app(tmp_path, max_body_bytes=10_000_000)
    reply = asyncio.run(send_request(app, "POST", "/v1/branches", headers, [body]))
    assert (reply.status, "\n" in reply.error["message"]) == (400, False)
    assert depth > 300 or reply.error["param"] == "branches"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"text": "a", "branches": "b"}, "branches[0].branches"),
        ({"text": "a", "branches": [{"text": "b", "txt": "b"}]}, "branches[0].branches[0].txt"),
        ({"text": "a", "branches": [5]}, "branches[0].branches[0]"),
    ],
)
def test_a_wrong_type_in_a_tree_is_named_by_its_path(wrong: Any, param: str, tmp_path: Path) -> None:
    body = {"model": "tiny", "branches": [wrong]}
    reply = asyncio.run(post_json(ingress_app(tmp_path), "/v1/branches", body))
    assert (reply.status, reply.error["param"]) == (400, param)


def test_a_fork_has_settings_for_all_of_its_segments() -> None:
    request = ForkRequest(branches=["a", {"text": "b", "branches": ["c"], "max_tokens": 3}], max_tokens=7)
    first, second = make_preprocessor().fork(request)
    (below,) = second.branches
    assert isinstance(below, pm.Segment)
    lengths = [segment.sampling["max_new_tokens"] for segment in (first, second, below)]
    assert (lengths, below.text) == ([7, 3, 7], ids("c"))
    assert None not in (segment.sampling["seed"] for segment in (first, second, below))
    info = error_of(make_preprocessor(max_branches=2).fork, request)
    assert (info.param, "3 branches" in info.message) == ("branches", True)
