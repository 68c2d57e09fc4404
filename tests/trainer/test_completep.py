"""Guards CompleteP: the table of factors, the run at the base, and activations that stay as sizes grow."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from trainer.completep import branch_multiplier, factors, growth, logit_multiplier
from trainer.model import build_model
from trainer.optim import build_optimizer, set_learning_rate
from trainer.parameter_groups import kind_of, parameter_groups
from trainer.recipe import Recipe
from trainer.scaling import scaled

VOCABULARY, LENGTH, ROWS = 320, 32, 2

MOE = {"ffn": "moe", "n_experts": 4}


def recipe_of(width, depth, parameterization, optimizer="adamw", **model):
    """Of the base 64 x 2, with heads of 32."""
    train = {"parameterization": parameterization, "base_d_model": 64, "base_n_layers": 2, "optimizer": optimizer}
    return Recipe.model_validate(
        {
            "data": {
                "sources": {"text": {"path": "text"}},
                "tokenizer": {"vocab_size": VOCABULARY},
                "sequence_length": LENGTH,
            },
            "model": {"d_model": width, "n_layers": depth, "n_heads": width // 32, "ffn_dim": 2 * width, **model},
            "train": {**train, "batch_tokens": LENGTH},
        }
    )


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "std", "rate", "eps"),
    [
        ("embedding", 1, 1, 1 / 4),
        ("hidden", 1 / 2, 1 / 4, 1 / 12),
        ("router", 1 / 2, 1 / 4, 1 / 12),
        ("head", 1, 1, 1 / 4),
        ("vector", 1, 1, 1 / 12),
    ],
)
def test_factors_are_those_of_the_table_at_four_times_the_width_and_three_times_the_depth(kind, std, rate, eps):
    found = factors(kind, recipe_of(256, 6, "completep"))
    assert (found.std, found.rate, found.eps) == pytest.approx((std, rate, eps))


def test_branches_and_logits_are_multiplied_besides_what_the_recipe_says():
    recipe = recipe_of(256, 6, "completep", residual_multiplier=0.5, logit_multiplier=2.0)
    assert growth(recipe) == (4, 3)
    assert branch_multiplier(recipe) == pytest.approx(0.5 / 3) and logit_multiplier(recipe) == 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_weights_forget_as_fast_at_every_width(optimizer):
    for width in (64, 512):
        recipe = recipe_of(width, 2, "completep", optimizer=optimizer, **MOE)
        for group in parameter_groups(build_model(recipe, 0), recipe):
            decay = 0 if group["kind"] in ("embedding", "vector") else recipe.train.weight_decay
            assert group["scale"] * group["weight_decay"] == pytest.approx(decay)


def test_initial_weights_have_the_deviations_of_the_table():
    """Those that write to the stream: 0.02 / sqrt(2 * 2) at the base, and no less because the model is deep."""
    recipe = recipe_of(256, 8, "completep", tie_embeddings=False, **MOE)
    for name, parameter in build_model(recipe, 0).named_parameters():
        if parameter.ndim > 1:
            expected = 0.02 if name in ("model.embed_tokens.weight", "lm_head.weight") else 0.01
            expected /= 2 if "o_proj" in name or "down_proj" in name else 1
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    "model", [{}, {"tie_embeddings": False}, {**MOE, "residual_multiplier": 0.5}], ids=["tied", "untied", "mixture"]
)
def test_at_the_base_the_run_is_bit_by_bit_the_standard_one(model):
    trained = [steps(recipe_of(64, 2, arm, **model), 3, 0.01, 0)[0] for arm in ("standard", "completep")]
    for (name, one), other in zip(trained[0].named_parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_scaled_recipe_begins_as_wide_as_it_is_tuned():
    """What `scaled` makes of a standard recipe is held against the table, not against `factors`."""
    small = recipe_of(64, 2, "standard")
    recipe = scaled(small, width=2, depth=2)
    assert growth(recipe) == (2, 2)
    groups = {group["kind"]: group for group in parameter_groups(build_model(recipe, 0), recipe)}
    assert groups["hidden"]["scale"] == 0.5 and groups["embedding"]["scale"] == groups["vector"]["scale"] == 1


# --- the coordinate check ---------------------------------------------------------------------------------------------
# Yang et al. 2022 (arXiv 2203.03466, appendix D.1): a few steps on the same data, at several widths. Where the mean
# size of an activation grows or vanishes with the width, so would the best learning rate move with it.


def batch_of(seed):
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def steps(recipe, count, rate, seed):
    """A model after so many steps on one batch, and that batch."""
    model, batch = build_model(recipe, seed), batch_of(seed)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, rate)
    for _ in range(count):
        logits = model(batch[:, :-1], use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, batch


WATCHED = {"self_attn": "attention", "mlp": "feed-forward", "gate": "router"}


def activations(recipe, rate, seed):
    """Mean absolute value of what each kind of part gives, of the last stream and of the logits, after five steps."""
    model, batch = steps(recipe, 5, rate, seed)
    seen = {}

    def note(kind, output):
        values = output[0] if isinstance(output, tuple) else output
        seen.setdefault(kind, []).append(values.abs().mean().item())

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in WATCHED:
            module.register_forward_hook(lambda module, given, output, kind=WATCHED[last]: note(kind, output))
    model.model.norm.register_forward_hook(lambda module, given, output: note("stream", given))
    with torch.no_grad():
        note("logits", model(batch[:, :-1]).logits)
    return {kind: sum(values) / len(values) for kind, values in seen.items()}


def ratios(sizes, parameterization, *, seeds=6, rate=2**-8, **model):
    """By how much means over seeds grow from one size to the next; and over all, for each doubling."""
    totals = []
    for width, depth in sizes:
        recipe = recipe_of(width, depth, parameterization, **model)
        each = [activations(recipe, rate, seed) for seed in range(seeds)]
        totals.append({kind: sum(one[kind] for one in each) for kind in each[0]})
    doublings = math.log2(math.prod(sizes[-1]) / math.prod(sizes[0]))
    steps = [after[kind] / before[kind] for before, after in itertools.pairwise(totals) for kind in before]
    return steps, {kind: (totals[-1][kind] / totals[0][kind]) ** (1 / doublings) for kind in totals[0]}


WIDTHS = [(64, 2), (128, 2), (256, 2)]
DEPTHS = [(64, 2), (64, 4), (64, 8)]

ARCHITECTURES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "no qk-norm": {"qk_norm": False},
    "mixture": MOE,
    "recursion": {"recursion": 2},
}

every_architecture = pytest.mark.parametrize("model", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())


@every_architecture
def test_activations_stay_within_a_tenth_as_the_width_doubles(model):
    """The slope over all widths; a single step may be further off, by the noise of six seeds."""
    steps, slopes = ratios(WIDTHS, "completep", **model)
    assert {"attention", "feed-forward", "stream", "logits"} <= set(slopes)
    assert all(0.9 <= slope <= 1.1 for slope in slopes.values()), slopes
    assert all(0.75 <= step <= 1.25 for step in steps), steps


@every_architecture
def test_activations_stay_nearly_as_the_depth_doubles(model):
    _, slopes = ratios(DEPTHS, "completep", seeds=3, **model)
    assert all(0.75 <= slope <= 1.25 for slope in slopes.values()), slopes


def test_the_check_fails_in_the_standard_parameterisation():
    """In width all of them grow; in depth the stream does, and what the initial weights took off is missing."""
    _, wide = ratios([WIDTHS[0], WIDTHS[2]], "standard", seeds=2, **MOE)
    assert all(ratio > 1.25 for ratio in wide.values()), wide
    _, deep = ratios([DEPTHS[0], DEPTHS[2]], "standard", seeds=3)
    assert not all(0.75 <= ratio <= 1.25 for ratio in deep.values()), deep


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 2**-8), ("adafactor", 2**-9)])
def test_so_it_is_with_other_optimisers(optimizer, rate):
    _, slopes = ratios([WIDTHS[0], WIDTHS[2]], "completep", seeds=3, rate=rate, optimizer=optimizer, **MOE)
    assert all(0.8 <= slope <= 1.2 for slope in slopes.values()), slopes


def test_kinds_are_told_by_name():
    model = build_model(recipe_of(64, 2, "standard", tie_embeddings=False, **MOE), 0)
    kinds = sorted({(kind_of(name, p), name.split(".")[-2]) for name, p in model.named_parameters()})
    grouped = {kind: {part for _, part in parts} for kind, parts in itertools.groupby(kinds, key=lambda pair: pair[0])}
    assert grouped["embedding"] == {"embed_tokens"} and grouped["head"] == {"lm_head"}
    assert grouped["router"] == {"gate"} and grouped["hidden"] == {"experts", "k_proj", "o_proj", "q_proj", "v_proj"}
