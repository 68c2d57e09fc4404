"""Guards memory: a micro-batch that is predicted to fit, one that is halved where it does not, and blocks that are run
twice. None of it may change what is learned."""

import functools
import itertools
import json

import pytest
import torch

from trainer.checkpoint import read_state
from trainer.cost import costs, train_memory
from trainer.engines import Ranks, Setup, build_engine
from trainer.loop import train
from trainer.memory import largest_micro_batch, micro_batch, out_of_memory, recompute_blocks
from trainer.model import build_model
from trainer.objective import training_loss
from trainer.records import Checkpoints
from trainer.stages.pretrain import pretrain

STEP = 128
MOE = {"ffn": "moe", "n_experts": 4}


def weights(record):
    return torch.cat([parameter.detach().flatten() for parameter in record.model.parameters()])


# --- prediction -------------------------------------------------------------------------------------------------------


def test_what_the_recipe_says_is_taken(recipe_of):
    recipe = recipe_of(train={"micro_batch_tokens": 96})
    assert [micro_batch(recipe, torch.device(kind)) for kind in ("cpu", "cuda")] == [3, 3]


@pytest.mark.parametrize(("batch", "sequences"), [(128, 4), (16_384, 128)])
def test_on_a_cpu_it_is_some_thousand_tokens(recipe_of, batch, sequences):
    assert micro_batch(recipe_of(train={"batch_tokens": batch}), torch.device("cpu")) == sequences


@pytest.mark.parametrize(
    ("free", "cached", "share"),
    [(10**6, 0, 1), (2 * 10**6, 10**6, 3), (10**12, 0, 10**6)],
    ids=["little", "some", "all"],
)
def test_on_a_gpu_it_is_what_its_free_memory_holds(recipe_of, monkeypatch, free, cached, share):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached + 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    recipe = recipe_of(train={"batch_tokens": 8192})
    assert micro_batch(recipe, torch.device("cuda")) == largest_micro_batch(recipe, 0.8 * share * 10**6)


def test_the_largest_that_fits_is_taken_and_a_batch_is_enough(recipe_of):
    def needs(sequences):
        named = {"batch_tokens": 8192, "micro_batch_tokens": 32 * sequences, "attention_kernel": "sdpa"}  # a GPU's
        return costs(recipe_of(train=named)).train_memory

    recipe = recipe_of(train={"batch_tokens": 8192})
    assert largest_micro_batch(recipe, needs(256)) == 256
    assert largest_micro_batch(recipe, 1e18) == 256
    assert largest_micro_batch(recipe, needs(256) - 1) == 128
    assert largest_micro_batch(recipe, needs(16)) == 16
    assert largest_micro_batch(recipe, 1.0) == 1


def test_room_is_looked_for_before_the_model_takes_it(recipe_of, corpus, monkeypatch):
    """What the model takes is in the prediction: free memory without it would count it twice."""
    order = []
    for name, does in (("micro_batch", micro_batch), ("build_engine", build_engine)):
        noted = functools.partial(lambda name, does, *args: order.append(name) or does(*args), name, does)
        monkeypatch.setattr(f"trainer.loop.{name}", noted)
    train(recipe_of(), corpus=corpus, tokens=STEP)
    assert order == ["micro_batch", "build_engine"]


def test_ranks_that_share_a_model_have_room_for_more(recipe_of):
    """Devices that hold the model of one process and a single sequence."""
    recipe = recipe_of(model={"n_layers": 24}, train={"batch_tokens": 8192})
    room = train_memory(recipe_of(model={"n_layers": 24}, train={"micro_batch_tokens": 32})).total
    fsdp, ddp = (Setup(engine=engine, ranks=Ranks(0, 8)) for engine in ("fsdp", "ddp"))
    assert largest_micro_batch(recipe, room) == largest_micro_batch(recipe, room, ddp) == 1
    assert largest_micro_batch(recipe, room, fsdp) > 1


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_are_of_memory(error, found):
    assert out_of_memory(error) is found


# --- a device that is too small ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A device that holds so many sequences in training, after so many forward passes."""

    def limit(sequences, after=0):
        calls = itertools.count()

        def refuse(module, inputs):
            if module.training and next(calls) >= after and len(inputs[0]) > sequences:
                raise torch.OutOfMemoryError("out of memory")

        def built(*args):
            model = build_model(*args)
            model.model.register_forward_pre_hook(refuse)
            return model

        monkeypatch.setattr("trainer.engines.single.build_model", built)

    return limit


@pytest.mark.parametrize(("fits", "backoffs"), [(3, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("after", [0, 5], ids=["at once", "later"])
@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "moe"])
def test_too_large_a_micro_batch_is_halved_and_nothing_else_changes(
    recipe_of, corpus, small, fits, backoffs, after, model
):
    """Adam's epsilon is large here: it makes of a rounding error in a gradient near zero a step of full size."""
    recipe, seen = recipe_of(model=model, train={"adam_eps": 1e-2}), []
    whole = train(recipe, corpus=corpus, tokens=8 * STEP + 64)
    small(fits, after)
    halved = train(recipe, lambda progress: seen.append(progress) or True, corpus=corpus, tokens=8 * STEP + 64)
    assert (whole.oom_backoffs, whole.micro_batch_tokens) == (0, 128)
    assert (halved.oom_backoffs, halved.micro_batch_tokens) == (backoffs, 128 >> backoffs)
    assert [progress.oom_backoffs for progress in seen] == [0] * after + [backoffs] * (9 - after)
    assert [progress.tokens for progress in seen] == [STEP * step for step in range(1, 9)] + [8 * STEP + 64]
    torch.testing.assert_close(weights(halved), weights(whole), atol=1e-6, rtol=1e-5)


def test_the_gradient_of_what_did_fit_is_forgotten(recipe_of, corpus, monkeypatch):
    """The second micro-batch of a step fails, once: the step begins anew, and the first is not counted twice."""
    recipe = recipe_of(train={"adam_eps": 1e-3, "micro_batch_tokens": 64})
    whole, calls = train(recipe, corpus=corpus, tokens=4 * STEP), itertools.count()

    def failing(*args, **options):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return training_loss(*args, **options)

    monkeypatch.setattr("trainer.engines.single.training_loss", failing)
    halved = train(recipe, corpus=corpus, tokens=4 * STEP)
    assert (halved.oom_backoffs, halved.micro_batch_tokens) == (1, 32)
    torch.testing.assert_close(weights(halved), weights(whole), atol=1e-6, rtol=1e-5)


def test_one_sequence_that_does_not_fit_ends_the_run(recipe, corpus, small):
    small(0)
    with pytest.raises(torch.OutOfMemoryError):
        train(recipe, corpus=corpus, tokens=STEP)


def test_other_errors_are_no_reason_to_halve(recipe, corpus, monkeypatch):
    calls = []

    def broken(*args, **options):
        calls.append(1)
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("trainer.engines.single.training_loss", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train(recipe, corpus=corpus, tokens=STEP)
    assert len(calls) == 1


def test_what_was_found_out_is_in_the_checkpoint_and_in_the_log(recipe_of, corpus, small, tmp_path):
    recipe = recipe_of(train={"micro_batch_tokens": 128})
    small(2)
    stopped = pretrain(recipe, corpus, tmp_path, tokens=8 * STEP, seed=0, report=lambda p: p.tokens < 3 * STEP)
    state = read_state(tmp_path / "checkpoints" / "latest")
    assert (stopped.finished, state.oom_backoffs, state.micro_batch) == (False, 1, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(line["oom_backoffs"], line["micro_batch_tokens"]) for line in lines} == {(1, 64)}
    small(4)  # there is room again, but another size would round otherwise
    rest = pretrain(recipe, corpus, tmp_path, tokens=8 * STEP, seed=0)
    assert (rest.oom_backoffs, rest.micro_batch_tokens) == (1, 64)


def test_a_size_that_the_recipe_changes_is_taken_where_memory_was_no_reason(recipe_of, corpus, tmp_path):
    checkpoints = Checkpoints(latest=tmp_path / "latest")
    one, other = (recipe_of(train={"micro_batch_tokens": size}) for size in (32, 64))
    train(one, lambda progress: False, corpus=corpus, tokens=2 * STEP, checkpoints=checkpoints)
    assert train(other, corpus=corpus, tokens=2 * STEP, start=tmp_path / "latest").micro_batch_tokens == 64


# --- blocks that are run twice ----------------------------------------------------------------------------------------


def saved_and_gradients(recipe, corpus, recomputed):
    """Bytes that autograd keeps beside the weights, and the gradients."""
    model = build_model(recipe, 0).train()
    if recomputed:
        recompute_blocks(model)
    batch = torch.from_numpy(corpus.loader(0).batch(0, 4))
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = training_loss(model, recipe, batch)
    size = sum(kept.values())
    (losses.objective if losses.balance is None else losses.objective + losses.balance).backward()
    return size, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("model", [{"n_layers": 6}, {"n_layers": 6, **MOE}], ids=["dense", "moe"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_blocks_give_the_same_gradients_for_less_memory(recipe_of, corpus, model, precision):
    recipe = recipe_of(model=model, train={"precision": precision})
    (much, plain), (little, again) = (saved_and_gradients(recipe, corpus, recomputed) for recomputed in (False, True))
    assert little < 0.4 * much
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "moe"])
def test_a_run_with_recomputed_blocks_is_the_same_run(recipe_of, corpus, model):
    plain, again = (
        train(recipe_of(model=model, train={"gradient_checkpointing": on}), corpus=corpus, tokens=4 * STEP)
        for on in (False, True)
    )
    assert torch.equal(weights(plain), weights(again))


BIASED = {**MOE, "balance": "bias", "balance_rate": 0.05}


def test_the_balance_of_experts_too_is_that_of_a_step_that_was_not_begun_anew(recipe_of, corpus, monkeypatch):
    recipe, calls = recipe_of(model=BIASED, train={"adam_eps": 1e-3, "micro_batch_tokens": 64}), itertools.count()
    whole = train(recipe, corpus=corpus, tokens=4 * STEP)

    def failing(*args, **options):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return training_loss(*args, **options)

    monkeypatch.setattr("trainer.engines.single.training_loss", failing)
    told = []
    halved = train(recipe, lambda p: told.append(p.details()) or True, corpus=corpus, tokens=4 * STEP)
    monkeypatch.undo()
    plain = []
    train(recipe, lambda p: plain.append(p.details()) or True, corpus=corpus, tokens=4 * STEP)
    for (name, one), other in zip(halved.model.named_buffers(), whole.model.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert [one["loss/tales"] for one in told] == pytest.approx([one["loss/tales"] for one in plain], abs=1e-5)
