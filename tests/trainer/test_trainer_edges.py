"""What once went wrong in this room, or nearly did: each test is a case that an earlier version got wrong."""

import gzip
import math
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from search_spaces.errors import UsageError
from trainer.checkpoint import read_state
from trainer.cost import activation_bytes_per_token
from trainer.data import sources
from trainer.data.cache import cached_folder
from trainer.data.shards import open_shard, write_shard
from trainer.data.sources import Skipped, list_files, read_documents
from trainer.errors import CheckpointError, DataError
from trainer.export.huggingface import export_huggingface
from trainer.export.load import load_model, load_tokenizer
from trainer.loop import train
from trainer.model import build_model
from trainer.recipe import Source
from trainer.recipe_check import check, rule
from trainer.records import Checkpoints
from trainer.serving.engine import Engine, Sampling
from trainer.stages.pretrain import pretrain

STEP = 128


def read(path, document="auto", roots=()):
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    skipped = Skipped()
    return list(read_documents(Source(path=paths, document=document), roots, skipped)), skipped


# --- special tokens that a text spells --------------------------------------------------------------------------------

SPELT = "a <s>struck</s> word, <pad> and </s>"


def test_special_tokens_that_are_spelt_in_a_text_are_text(corpus):
    ids = corpus.tokenizer.encode([SPELT])[0]
    assert not {0, 1, 2} & set(ids)
    assert corpus.tokenizer.decode(ids) == SPELT
    assert corpus.tokenizer.bytes_per_token[ids].sum() == len(SPELT)


# --- and a prompt -----------------------------------------------------------------------------------------------------


def test_special_tokens_that_are_spelt_in_a_prompt_are_text(recipe, corpus, tmp_path):
    export_huggingface(build_model(recipe, 0), corpus.tokenizer, tmp_path / "hf", {})
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer(SPELT).input_ids == [1, *corpus.tokenizer.encode([SPELT])[0]]
    text = Engine(tmp_path / "hf").generate("<s>x</s>", Sampling(temperature=0.0, max_tokens=1))
    assert text.startswith("<s>x</s>")


# --- files and folders ------------------------------------------------------------------------------------------------


def test_a_compressed_file_with_a_flipped_bit_is_passed_over(tmp_path):
    raw = bytearray(gzip.compress(b"hello world " * 5000))
    raw[20] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(raw)
    found, skipped = read(tmp_path / "a.txt.gz")
    assert found == []
    assert skipped.counts == {"unreadable file": 1}


def test_parquet_strings_that_are_not_utf8_are_passed_over(tmp_path):
    raw = pyarrow.array([b"good", b"\xff\xfe"], type=pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    _, skipped = read(tmp_path / "a.parquet")
    assert "text that is not UTF-8" in skipped.counts or "unreadable file" in skipped.counts


def test_compressed_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.parquet.zst").write_bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))
    for name in ("b.parquet.gz", "c.parquet.zst"):
        assert read(tmp_path / name)[0] == ["a", "b"]


@pytest.mark.parametrize("values", [[b"a"], [1], [["a"]]])
def test_a_parquet_column_that_is_no_text_is_passed_over_in_words(tmp_path, values):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    found, skipped = read(tmp_path / "a.parquet")
    assert found == []
    assert skipped.counts


def test_missing_values_of_parquet_are_counted(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1].counts == {"record without text": 1}


def test_a_root_whose_name_looks_like_a_pattern_is_that_folder(tmp_path):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.txt").write_text("text")
    assert len(list_files("*.txt", [tmp_path / "run[1]"])) == 1


def test_patterns_do_not_follow_links_in_circles(tmp_path):
    """In a process of its own: two links back make the search double with every level."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "t.txt").write_text("text")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "here").symlink_to(tmp_path)
    words = f"from trainer.data.sources import list_files; print(len(list_files({str(tmp_path / '**' / '*.txt')!r})))"
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, timeout=20, cwd=Path(sources.__file__).parents[2]
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize("target", ["gone", "link"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, target):
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match="no such file or folder"):
        list_files(str(tmp_path / "link"))


def test_a_long_file_without_line_ends_loses_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 10)
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 10)
    text = "x" + "é" * 100
    (tmp_path / "a.txt").write_text(text)
    found, skipped = read(tmp_path / "a.txt", "file")
    assert "".join(found) == text
    assert not skipped.counts


def test_files_are_counted_over_all_paths_of_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PASSAGE", 4)
    monkeypatch.setattr(sources, "FEW_FILES", 3)
    for name in "abc":
        (tmp_path / name).write_text(f"{name} one\n\n{name} two")
    assert len(read([tmp_path / name for name in "abc"])[0]) == 3


def test_a_pattern_that_matches_a_folder_means_the_files_in_it(tmp_path):
    """As naming the folder does; leaving it out in silence is the worst of the three possible meanings."""
    (tmp_path / "web-1").mkdir()
    (tmp_path / "web-1" / "a.txt").write_text("text")
    assert len(list_files(str(tmp_path / "web-*"))) == 1


# --- the running Python -----------------------------------------------------------------------------------------------


def test_docstrings_in_except_and_match_blocks_are_not_in_the_code():
    """hashlib, locale, ntpath, posixpath, queue and threading define functions there."""
    code = list(read_documents(Source(path="python:stdlib"), (), Skipped()))
    queue = next(text for text in code if "class _PySimpleQueue:" in text)
    assert "Exception raised by Queue.get(block=0)/get_nowait()." not in queue


# --- held-out text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1024, 1500, 2048])
def test_held_out_text_is_at_most_the_limit(corpus, limit):
    for text in corpus.held_out("test", limit).values():
        assert limit - 16 < text.bytes_of.sum() <= limit


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("section", "field"),
    [("train", "weight_decay"), ("train", "adam_eps"), ("model", "rope_theta"), ("train", "learning_rate")],
)
def test_numbers_are_finite(section, field, value):
    genome = {"data": {"sources": {"web": {"path": "a"}}}, section: {field: value}}
    (finding,) = check(genome)
    assert finding[0] == (section, field)
    assert rule(genome).startswith(f"{section}.{field}: ")


def test_weights_are_finite():
    assert rule({"data": {"sources": {"web": {"path": "a"}}, "mix": {"web": math.inf}}}) is not None


def test_a_bad_item_of_a_list_is_said_of_the_item_alone():
    genome = {"data": {"sources": {"web": {"path": "a"}}}, "model": {"n_layers": 2, "n_heads": [4, 0]}}
    assert check(genome) == [(("model", "n_heads", 1), "must be > 0, is 0", None)]
    assert rule(genome) == "model.n_heads[1]: must be > 0, is 0"


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_record_does_not_depend_on_where_the_run_was_stopped(recipe, corpus, tmp_path):
    whole = train(recipe, corpus=corpus, tokens=8 * STEP)
    train(
        recipe,
        lambda progress: progress.tokens < 4 * STEP,
        corpus=corpus,
        tokens=8 * STEP,
        checkpoints=Checkpoints(latest=tmp_path / "latest"),
    )
    parts = train(recipe, corpus=corpus, tokens=8 * STEP, start=tmp_path / "latest")
    assert parts.train_loss == whole.train_loss


def test_a_finished_run_still_knows_its_loss(recipe, corpus, tmp_path):
    whole = train(recipe, corpus=corpus, tokens=8 * STEP, checkpoints=Checkpoints(final=tmp_path / "final"))
    again = train(recipe, corpus=corpus, tokens=8 * STEP, start=tmp_path / "final")
    assert again.train_loss == whole.train_loss  # nan today: the metrics of a trial that died while it was scored


def test_a_constant_run_with_a_ragged_end_leads_on_from_its_last_whole_batch(recipe_of, corpus, tmp_path):
    recipe = recipe_of(train={"schedule": "constant"})
    train(recipe, corpus=corpus, tokens=10 * 32, checkpoints=Checkpoints(trunk=tmp_path / "trunk"))
    continued = train(recipe, corpus=corpus, tokens=20 * 32, start=tmp_path / "trunk").model
    whole = train(recipe, corpus=corpus, tokens=20 * 32).model
    assert all(torch.equal(a, b) for a, b in zip(continued.parameters(), whole.parameters(), strict=True))


def test_a_trunk_beyond_the_decay_of_a_shorter_run_is_refused(recipe_of, corpus, tmp_path):
    recipe = recipe_of(train={"decay_fraction": 0.5})
    train(
        recipe,
        lambda progress: progress.tokens < 16 * 32,
        corpus=corpus,
        tokens=64 * 32,
        checkpoints=Checkpoints(latest=tmp_path / "latest"),
    )
    with pytest.raises(CheckpointError):  # the run to 20 sequences decays from the 8th on; this one has not
        train(recipe, corpus=corpus, tokens=20 * 32, start=tmp_path / "latest")


def test_the_size_of_micro_batches_does_not_make_it_another_recipe(recipe_of, corpus, tmp_path):
    """So that a run that ran out of memory can go on with smaller ones."""
    train(
        recipe_of(),
        lambda progress: False,
        corpus=corpus,
        tokens=8 * STEP,
        checkpoints=Checkpoints(latest=tmp_path / "latest"),
    )
    smaller = recipe_of(train={"micro_batch_tokens": 32})
    assert train(smaller, corpus=corpus, tokens=8 * STEP, start=tmp_path / "latest").finished


def test_a_checkpoint_of_another_shape_is_said_to_be_of_another_recipe(recipe_of, corpus, tmp_path):
    train(
        recipe_of(),
        lambda progress: False,
        corpus=corpus,
        tokens=8 * STEP,
        checkpoints=Checkpoints(latest=tmp_path / "latest"),
    )
    with pytest.raises(CheckpointError, match="is of another recipe"):
        train(recipe_of(model={"d_model": 48}), corpus=corpus, tokens=8 * STEP, start=tmp_path / "latest")


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [('"samples": 4', '"samples": 8'), ('"format": 1', '"format": 9')])
def test_a_changed_digit_of_the_manifest_is_noticed(recipe, corpus, tmp_path, change):
    latest = tmp_path / "latest"
    train(recipe, lambda p: False, corpus=corpus, tokens=8 * STEP, checkpoints=Checkpoints(latest=latest))
    text = (latest / "checkpoint.json").read_text()
    assert change[0] in text
    (latest / "checkpoint.json").write_text(text.replace(*change))
    with pytest.raises(CheckpointError):
        read_state(latest)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_that_died_between_its_last_step_and_its_record_is_not_trained_again(recipe, corpus, tmp_path):
    first = pretrain(recipe, corpus, tmp_path / "stage", tokens=8 * STEP, seed=0)
    steps = []
    again = pretrain(
        recipe, corpus, tmp_path / "stage", tokens=8 * STEP, seed=0, report=lambda p: steps.append(p) or True
    )
    assert steps == []
    assert again.finished
    assert again.train_loss == first.train_loss


# --- exports ----------------------------------------------------------------------------------------------------------


def test_heads_that_do_not_divide_the_width_take_another_class_where_llama_refuses_them(recipe_of, corpus, tmp_path):
    model = build_model(recipe_of(model={"qk_norm": False, "n_heads": 3, "head_dim": 10}), 0)
    receipt = export_huggingface(model, corpus.tokenizer, tmp_path / "hf", {})
    assert receipt["class"] == "MistralForCausalLM"


def test_a_right_export_passes_however_large_its_logits_are(recipe_of, corpus, tmp_path):
    """As those of a trained model are: rounding grows with them."""
    model = build_model(recipe_of(model={"d_model": 128, "n_layers": 6, "n_heads": 4, "init_std": 0.06}), 0)
    with torch.no_grad():
        model.model.norm.weight *= 20
    receipt = export_huggingface(model, corpus.tokenizer, tmp_path / "hf", {})
    assert max(receipt["max_logit_difference"].values()) <= receipt["tolerance"]


@pytest.mark.parametrize("damage", ["torn", "missing weight", "wrong shape"])
def test_weights_that_cannot_be_loaded_whole_are_said(recipe, corpus, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hf"
    export_huggingface(build_model(recipe, 0), corpus.tokenizer, folder, {})
    file = folder / "model.safetensors"
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        weights = load_file(file)
        del weights["model.norm.weight"]
        if damage == "wrong shape":
            weights["model.norm.weight"] = torch.ones(7)
        save_file(weights, file)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(folder)


def test_a_torn_tokenizer_is_said(recipe, corpus, tmp_path):
    export_huggingface(build_model(recipe, 0), corpus.tokenizer, tmp_path / "hf", {})
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError):
        load_tokenizer(tmp_path / "hf")


def test_exporting_leaves_the_global_random_state_alone(recipe, corpus, tmp_path):
    model = build_model(recipe, 0)
    before = torch.random.get_rng_state()
    export_huggingface(model, corpus.tokenizer, tmp_path / "hf", {})
    assert torch.equal(torch.random.get_rng_state(), before)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", [{"ffn": "swiglu"}, {"ffn": "gelu"}, {"ffn": "moe", "n_experts": 4}], ids=str)
def test_each_further_token_in_bf16_takes_what_the_formula_says_and_its_ids(recipe_of, ffn):
    from test_cost import bytes_kept

    recipe = recipe_of(model=ffn, train={"precision": "bf16"})
    per_token = (bytes_kept(recipe, rows=6) - bytes_kept(recipe, rows=2)) / (4 * 32)
    assert per_token == activation_bytes_per_token(recipe, 2) + 8 * 33 / 32


# --- interrupted and foreign ------------------------------------------------------------------------------------------


def test_a_replacement_that_was_cut_short_is_undone(recipe, corpus, tmp_path):
    folder = tmp_path / "latest"
    train(recipe, lambda progress: False, corpus=corpus, tokens=STEP * 2, checkpoints=Checkpoints(latest=folder))
    folder.rename(tmp_path / "latest.old-12345678")
    (tmp_path / "latest.tmp-12345678").mkdir()
    assert read_state(folder).samples > 0
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_what_a_killed_builder_left_is_cleared(tmp_path):
    left = tmp_path / "documents" / "key.tmp-0123abcd"
    left.mkdir(parents=True)
    cached_folder(tmp_path, "documents", "key", lambda folder: (folder / "x").touch())
    assert not left.exists() and (tmp_path / "documents/key/x").is_file()


def test_a_shard_without_its_offsets_is_told(corpus, tmp_path):
    split = next(iter(corpus.documents.values())).split("test")
    write_shard(tmp_path, "test", split, corpus.tokenizer)
    (tmp_path / "test.offsets.npy").unlink()
    with pytest.raises(DataError, match="not a whole shard"):
        open_shard(tmp_path, "test", corpus.tokenizer)


def test_a_docstring_beside_its_function_leaves_the_function(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text('def f(x): "What it does."\n\n\nclass C:\n    """Doc."""\n    y = 1\n')
    monkeypatch.setattr(sources, "_python_files", lambda: [tmp_path / "one.py"])
    (code,) = sources._python_code()
    assert "def f(x): ..." in code and "What it does" not in code and "Doc." not in code and "y = 1" in code


def test_an_export_replaces_only_exports(recipe, corpus, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/thesis.tex").touch()
    with pytest.raises(UsageError, match="holds something that evolm did not export"):
        export_huggingface(build_model(recipe, 0), corpus.tokenizer, tmp_path / "hf", {})
    assert (tmp_path / "hf/thesis.tex").exists()


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_that_means_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match="sampling needs"):
        Sampling(**wrong)


def test_hidden_states_and_attentions_are_given_when_asked_for(recipe):
    model = build_model(recipe, 0)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[1, 5, 7]])
    told = model(ids, output_hidden_states=True, output_attentions=True)
    layers = recipe.model.n_layers
    assert len(told.hidden_states) == layers + 1 and len(told.attentions) == layers
    assert isinstance(model(ids, return_dict=False), tuple)
