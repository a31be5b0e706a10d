"""What training does to a model leaves pos2d alone: checkpointing, compiling, bfloat16, adapters, threads,
processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families import FAMILIES, variant

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.evaluation.laws import check_siblings
from parallelmind.evaluation.probes import (
    BRANCHES,
    MAIN,
    check_close,
    check_differ,
    patched,
    plain_logits,
    sample_logits,
)
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch
from parallelmind.training.loss import Tensors, decoder_inputs, target_loss, to_tensors

ROOT = Path(__file__).resolve().parents[2]
CONFIG = RopeConfig()

families = pytest.mark.parametrize("family", FAMILIES)


def training_batch(main: list[int] = MAIN) -> Tensors:
    return to_tensors(collate([arrange(Tokens.of(main, BRANCHES), CONFIG)], pad_id=0))


def ready(family: str) -> torch.nn.Module:
    model = variant(family)
    patch(model, CONFIG)
    return model.train()


def gradients(model: torch.nn.Module, loss=target_loss) -> torch.Tensor:
    model.zero_grad()
    total, _ = loss(model, training_batch(), CONFIG.visibility)
    total.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@families
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    model = ready(family)
    plain = gradients(model)
    model.enable_input_require_grads()  # what a reentrant checkpoint needs to see a gradient at all
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-5)


@families
def test_a_shared_main_is_paid_once_and_teaches_what_separate_rows_do(family):
    """M + sum of L tokens in place of sum of (M + L), and, isolated, the same gradient."""
    config = RopeConfig(visibility="isolated", rope_2d_ratio=0)
    model = variant(family)
    patch(model, config)
    rows = [[Tokens.of(MAIN, BRANCHES)], [Tokens.of(MAIN, [branch]) for branch in BRANCHES]]
    found = []
    for samples in rows:
        batch = collate([arrange(sample, config) for sample in samples], pad_id=0)
        model.zero_grad()
        target_loss(model, to_tensors(batch), "isolated")[0].backward()
        found.append(
            torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        )
        lengths = [len(branch) for branch in BRANCHES]
        assert batch.tokens == len(samples) * len(MAIN) + sum(lengths)
    assert float((found[0] - found[1]).norm() / found[1].norm()) <= 1e-3


@families
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_the_eager_step(family):
    """Traced whole, without a break: the hooks and the coordinates become part of the graph."""
    torch.compiler.reset()
    model = ready(family)
    inputs = decoder_inputs(model, training_batch(), CONFIG.visibility)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weight = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (model, compiled):
        model.zero_grad()
        (run(**inputs).logits.log_softmax(-1) @ weight).sum().backward()
        found.append(torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_is_the_eager_loss():
    torch.compiler.reset()
    model = ready("shared")
    compiled = torch.compile(target_loss, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(model), rtol=1e-4, atol=1e-5)


@families
def test_bfloat16_stays_near_float32_and_isolates_as_well(family):
    model = variant(family)
    with patched(model, RopeConfig(visibility="isolated")) as config:
        exact = torch.cat(sample_logits(model, config))
    model = model.to(torch.bfloat16)
    with patched(model, RopeConfig(visibility="isolated")) as config:
        rough = torch.cat(sample_logits(model, config))
        changed = sample_logits(model, config, [[*BRANCHES[0][:1], 99, *BRANCHES[0][2:]], *BRANCHES[1:]])
        same = sample_logits(model, config)
    assert rough.dtype == torch.bfloat16
    check_close(rough, exact, "bfloat16 and float32", 0.25)
    for number in (0, 2, 3):
        check_close(changed[number], same[number], "a sibling in bfloat16", 0)


@families
def test_laws_hold_with_adapters_on_every_linear_layer(family):
    model = variant(family)
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0)
    base = adapted.get_base_model()
    with patched(base, RopeConfig()) as config:
        before = sample_logits(adapted, config)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # not what the tests before have left of the generator
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.1)
    with patched(base, RopeConfig()) as config:
        check_differ(torch.cat(sample_logits(adapted, config)), torch.cat(before), "an adapter")
    check_siblings(base)


@families
def test_threads_never_share_coordinates(family):
    """Two threads read different samples on one model; each gets what it gets alone, every time."""
    model = variant(family)
    texts = [BRANCHES, [branch[::-1] for branch in BRANCHES[::-1]]]
    with patched(model, RopeConfig(branch_stride=3)) as config:
        expected = [torch.cat(sample_logits(model, config, text)) for text in texts]
        with ThreadPoolExecutor(2) as pool:
            found = list(
                pool.map(lambda turn: torch.cat(sample_logits(model, config, texts[turn % 2])), range(40))
            )
    for turn, logits in enumerate(found):
        check_close(logits, expected[turn % 2], "a sample read beside another thread's and alone")


def test_threads_settle_their_own_frequencies():
    """A long text changes the frequencies of the model; a short one in another thread must not change them
    back.
    """
    model = variant("longrope")
    texts = [list(range(3, 23)), list(range(3, 93))]
    with patched(model, RopeConfig()):
        expected = [plain_logits(model, text) for text in texts]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda turn: plain_logits(model, texts[turn % 2]), range(200)))
    for turn, logits in enumerate(found):
        check_close(logits, expected[turn % 2], "a text read beside another thread's and alone")


def in_two_processes(*arguments: str) -> str:
    """What a module of these tests prints when two processes run it together."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT / 'tests'}",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_average_the_gradients_of_one():
    assert in_two_processes("ddp_step").count("gradients agree") == 2


@pytest.mark.parametrize("case", ["gradients", "resume"])
def test_two_workers_do_what_one_does(case, tmp_path):
    """Whole or sharded, adapter or full model: the same gradient to 1e-5, and after a stop the same run bit
    for bit.
    """
    assert in_two_processes("workers", case, str(tmp_path)).count("agrees") == 8
