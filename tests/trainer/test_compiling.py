"""Guards compiled blocks: when they are, decided by what is known before the run, and that they compute the same."""

import pytest
import torch

from trainer.compiling import ASSUMED_RATE, BREAK_EVEN_SECONDS, compiled_blocks, compiles
from trainer.model import build_model

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning")]
"""The compiler of torch warns of its own code."""

LONG = ASSUMED_RATE * BREAK_EVEN_SECONDS


@pytest.mark.parametrize(
    ("wanted", "device", "flops", "decided"),
    [
        ("auto", "cpu", 100 * LONG, False),
        ("auto", "cuda", 1.01 * LONG, True),
        ("auto", "cuda", 0.99 * LONG, False),
        ("never", "cuda", 100 * LONG, False),
        ("always", "cuda", 1.0, True),
        ("always", "cpu", 1.0, True),
    ],
)
def test_where_it_pays(recipe_of, wanted, device, flops, decided):
    assert compiles(recipe_of(train={"compile": wanted}), torch.device(device), flops) is decided


def test_a_run_compiles_as_its_whole_length_says(recipe_of, corpus, monkeypatch):
    """The decision is of the run's FLOPs, whether it is stopped or goes on: its parts must round alike."""
    from trainer.cost import costs
    from trainer.loop import train

    asked = []
    monkeypatch.setattr("trainer.loop.compiles", lambda recipe, device, flops: asked.append(flops) or False)
    recipe = recipe_of()
    train(recipe, lambda progress: False, corpus=corpus, tokens=1024)
    assert asked == [1024 * costs(recipe).flops_per_token]


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were compiled, by a compiler that leaves them as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def test_blocks_alike_share_a_graph_and_compute_the_same(recipe_of, graphs):
    model = build_model(recipe_of(model={"n_layers": 4}), 0)
    ids = torch.arange(3, 19).unsqueeze(0)
    expected = model.model(ids, use_cache=False).last_hidden_state
    with compiled_blocks(model, True):
        found = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_more_shapes_than_torch_expects_are_compiled_too(recipe_of, graphs):
    """torch gives up after eight graphs of one function unless told otherwise."""
    widths = [32 * (index + 1) for index in range(10)]
    model = build_model(recipe_of(model={"n_layers": 10, "ffn_dim": widths}), 0)
    with compiled_blocks(model, True):
        model.model(torch.arange(3, 19).unsqueeze(0), use_cache=False)
    assert len(graphs) == 10


@pytest.mark.usefixtures("graphs")
def test_an_error_leaves_the_blocks_as_they_were(recipe_of):
    model = build_model(recipe_of(), 0)
    with pytest.raises(ZeroDivisionError), compiled_blocks(model, True):
        _ = 1 / 0
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_unwanted_it_does_nothing(recipe_of):
    model = build_model(recipe_of(), 0)
    with compiled_blocks(model, False):
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)
