"""pos2d with gradient checkpointing, compilation, bfloat16, adapters, threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import workers
from families import FAMILIES, variant
from safetensors.torch import load_file

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
from parallelmind.model.inputs import Tensors, decoder_inputs, to_tensors
from parallelmind.model.patch import patch
from parallelmind.model.weights import trained_weights
from parallelmind.training.checkpoint import restore
from parallelmind.training.checkpoint_manager import checkpoint_dirs
from parallelmind.training.loss import target_loss
from parallelmind.training.step import make_optimizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = RopeConfig()

families = pytest.mark.parametrize("family", FAMILIES)


def training_batch(main: list[int] = MAIN) -> Tensors:
    return to_tensors(collate([arrange(Tokens.of(main, BRANCHES), CONFIG)], pad_id=0))


def patched_variant(family: str) -> torch.nn.Module:
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
    model = patched_variant(family)
    plain = gradients(model)
    model.enable_input_require_grads()  # reentrant checkpoints need inputs with gradients
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-5)


@families
def test_a_shared_main_costs_its_tokens_once_and_gives_the_gradient_of_separate_rows(family):
    """M + sum(L) tokens instead of sum(M + L), and the same gradient with isolated visibility."""
    config = RopeConfig(visibility="isolated", rope_2d_ratio=0)
    model = variant(family)
    patch(model, config)
    rows = [[Tokens.of(MAIN, BRANCHES)], [Tokens.of(MAIN, [branch]) for branch in BRANCHES]]
    actual = []
    for samples in rows:
        batch = collate([arrange(sample, config) for sample in samples], pad_id=0)
        model.zero_grad()
        target_loss(model, to_tensors(batch), "isolated")[0].backward()
        actual.append(
            torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        )
        lengths = [len(branch) for branch in BRANCHES]
        assert batch.tokens == len(samples) * len(MAIN) + sum(lengths)
    assert float((actual[0] - actual[1]).norm() / actual[1].norm()) <= 1e-3


@families
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_the_eager_step(family):
    """Traced with fullgraph: hooks and coordinates become part of the graph."""
    torch.compiler.reset()
    model = patched_variant(family)
    inputs = decoder_inputs(model, training_batch(), CONFIG.visibility)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weight = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    actual = []
    for run in (model, compiled):
        model.zero_grad()
        (run(**inputs).logits.log_softmax(-1) @ weight).sum().backward()
        actual.append(
            torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])
        )
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_is_the_eager_loss():
    torch.compiler.reset()
    model = patched_variant("shared")
    compiled = torch.compile(target_loss, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(model), rtol=1e-4, atol=1e-5)


@families
def test_bfloat16_is_close_to_float32_and_isolates_exactly(family):
    model = variant(family)
    with patched(model, RopeConfig(visibility="isolated")) as config:
        float32_logits = torch.cat(sample_logits(model, config))
    model = model.to(torch.bfloat16)
    with patched(model, RopeConfig(visibility="isolated")) as config:
        bfloat16_logits = torch.cat(sample_logits(model, config))
        changed = sample_logits(model, config, [[*BRANCHES[0][:1], 99, *BRANCHES[0][2:]], *BRANCHES[1:]])
        same = sample_logits(model, config)
    assert bfloat16_logits.dtype == torch.bfloat16
    check_close(bfloat16_logits, float32_logits, "bfloat16 and float32", 0.25)
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
        torch.manual_seed(0)  # independent of earlier tests
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.1)
    with patched(base, RopeConfig()) as config:
        check_differ(torch.cat(sample_logits(adapted, config)), torch.cat(before), "an adapter")
    check_siblings(base)


@families
def test_threads_do_not_share_coordinates(family):
    """Two threads run different samples on one model; each gets its own logits every time."""
    model = variant(family)
    texts = [BRANCHES, [branch[::-1] for branch in BRANCHES[::-1]]]
    with patched(model, RopeConfig(branch_stride=3)) as config:
        expected = [torch.cat(sample_logits(model, config, text)) for text in texts]
        with ThreadPoolExecutor(2) as pool:
            actual = list(
                pool.map(lambda turn: torch.cat(sample_logits(model, config, texts[turn % 2])), range(40))
            )
    for turn, logits in enumerate(actual):
        check_close(logits, expected[turn % 2], "a sample read beside another thread's and alone")


def test_threads_do_not_share_dynamic_frequencies():
    """A long text changes the model's frequencies; a short one in another thread must not reset them."""
    model = variant("longrope")
    texts = [list(range(3, 23)), list(range(3, 93))]
    with patched(model, RopeConfig()):
        expected = [plain_logits(model, text) for text in texts]
        with ThreadPoolExecutor(2) as pool:
            actual = list(pool.map(lambda turn: plain_logits(model, texts[turn % 2]), range(200)))
    for turn, logits in enumerate(actual):
        check_close(logits, expected[turn % 2], "a text read beside another thread's and alone")


def in_processes(count: int, *arguments: str) -> str:
    """The output of a test module that several processes run together."""
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
        f"--nproc-per-node={count}",
        "-m",
        *arguments,
    ]
    result = subprocess.run(
        command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes_average_the_gradients_of_one():
    assert in_processes(2, "ddp_step").count("gradients agree") == 2


@pytest.mark.parametrize("case", ["gradients", "resume"])
def test_two_workers_equal_one(case, tmp_path):
    """Replicated or sharded, adapter or full model: equal gradients to 1e-5, and exact resumption."""
    assert in_processes(2, "workers", case, str(tmp_path)).count("agrees") == 8
    if case == "resume":
        check_one_worker_resumes(tmp_path)


def check_one_worker_resumes(folder: Path) -> None:
    """What two workers have written in parts, one worker reads as a whole, and without process groups."""
    for tuning in ("lora", "full"):
        config = workers.settings(base_model=str(folder / "base"), tuning=tuning)
        model = workers.fresh_model(config)
        optimizer = make_optimizer(model, config.optimizer)
        run = folder / f"full-{tuning}"
        newest = checkpoint_dirs(run / "cut")[-1]
        assert len(list(newest.glob("shard-*"))) == 2
        state = restore(newest, model, optimizer)
        assert state.step == 3
        expected = load_file(run / "trained.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in trained_weights(model).items())
        moments = [values["exp_avg_sq"] for values in optimizer.state.values()]
        assert len(moments) == len(expected)
        assert all(moment.any() for moment in moments)


def test_any_number_of_workers_computes_the_same_steps(tmp_path):
    """The same gradients and losses, also where a run resumes with another number of workers."""
    assert in_processes(4, "workers", "counts", str(tmp_path)).count("agrees") == 4
