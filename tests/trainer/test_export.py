"""Guards exported folders: what others load from them, without our code, is the model that was trained."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_spaces.errors import UsageError
from trainer.errors import ParityError
from trainer.export import parity
from trainer.export.huggingface import export_huggingface
from trainer.export.load import load_model, load_tokenizer
from trainer.export.parity import check_parity
from trainer.loop import train

SHAPES = {
    "qwen3": {},
    "llama": {"qk_norm": False, "tie_embeddings": False},
    "mixtral": {"ffn": "moe", "n_experts": 4, "qk_norm": False},
    "moe": {"ffn": "moe", "n_experts": 4, "ffn_dim": [32, 64], "n_active_experts": 3},
    "mistral": {"qk_norm": False, "attention": "sliding", "window": 8},
    "olmo3": {"qk_norm": "full", "norm_placement": "post", "attention": ["full", "sliding"], "window": 8},
    "gemma2": {"qk_norm": False, "norm_placement": "sandwich", "attention_softcap": 5.0, "logit_softcap": 8.0},
    "alibi": {"positions": ["alibi", "rope"], "attention": ["sliding", "full"], "window": 8, "bias": "all"},
    "odd": {
        "positions": ["none", "rope"],
        "attention": ["full", "sliding"],
        "window": 8,
        "norm": "layernorm",
        "parallel_block": True,
        "recursion": [1, 2],
        "ffn": "moe",
        "n_experts": 4,
        "n_shared_experts": 1,
        "n_dense_layers": 1,
        "balance": "bias",
        "rope_scaling": "yarn",
        "rope_factor": 2.0,
        "logit_softcap": 8.0,
        "logit_multiplier": 0.5,
        "residual_multiplier": 0.5,
    },
    "evolm": {"n_heads": [4, 2], "n_kv_heads": [2, 1], "head_dim": 8, "ffn_dim": [48, 96], "ffn": "relu2"},
}

OWN = ("evolm", "moe", "alibi", "odd")
"""Those that no stock class knows."""

CODE = ["configuration_evolm.py", "layers_evolm.py", "modeling_evolm.py", "positions_evolm.py"]

LOADER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, remote = sys.argv[1], sys.argv[2] == "remote"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
with torch.no_grad():
    logits = model(torch.arange(3, 19).unsqueeze(0)).logits[0, -1]
print(json.dumps({
    "class": type(model).__name__,
    "module": type(model).__module__,
    "logits": logits.tolist(),
    "ids": tokenizer("A tale.").input_ids,
    "ours": [name for name in sys.modules if name.split(".")[0] in ("trainer", "evolm", "search_spaces")],
}))
"""


@pytest.fixture(scope="module")
def trained(recipe_of, corpus):
    """A model of each shape after some steps."""
    return {
        name: train(recipe_of(model=shape), corpus=corpus, tokens=20 * 128).model.eval()
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def exported(trained, corpus, tmp_path_factory):
    """The folder of each, and its receipt."""
    root = tmp_path_factory.mktemp("exports")
    receipts = {
        name: export_huggingface(model, corpus.tokenizer, root / name, {"name": name})
        for name, model in trained.items()
    }
    return root, receipts


@pytest.fixture
def folder(exported, tmp_path, request):
    """A copy of the stock folder, or of the one that the test names, to be spoilt."""
    name = getattr(request, "param", "qwen3")
    source, copy = exported[0] / name, tmp_path / name
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


every_shape = pytest.mark.parametrize("name", SHAPES)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "tier"),
    [
        ("qwen3", "Qwen3ForCausalLM", "stock"),
        ("llama", "LlamaForCausalLM", "stock"),
        ("mixtral", "MixtralForCausalLM", "stock"),
        ("mistral", "MistralForCausalLM", "stock"),
        ("olmo3", "Olmo3ForCausalLM", "stock"),
        ("gemma2", "Gemma2ForCausalLM", "stock"),
        ("moe", "EvolmForCausalLM", "evolm"),
        ("alibi", "EvolmForCausalLM", "native"),
        ("odd", "EvolmForCausalLM", "evolm"),
        ("evolm", "EvolmForCausalLM", "evolm"),
    ],
)
def test_a_stock_class_is_chosen_where_there_is_one(exported, name, kind, tier):
    root, receipts = exported
    assert (receipts[name]["class"], receipts[name]["tier"]) == (kind, tier)
    assert json.loads((root / name / "config.json").read_text())["architectures"] == [kind]


@every_shape
def test_only_our_own_class_brings_code(exported, name):
    code = sorted(path.name for path in (exported[0] / name).glob("*.py"))
    assert code == (CODE if name in OWN else [])
    assert ("auto_map" in json.loads((exported[0] / name / "config.json").read_text())) is (name in OWN)


@every_shape
def test_there_is_no_pickle(exported, name):
    endings = {path.suffix for path in (exported[0] / name).iterdir()}
    assert endings <= {".json", ".safetensors", ".py", ".jinja"}


@every_shape
def test_where_the_model_comes_from_is_kept(exported, name):
    assert json.loads((exported[0] / name / "evolm.json").read_text()) == {"name": name}


@every_shape
def test_the_folder_can_be_read_by_others(exported, name):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (exported[0] / name).iterdir())


def test_an_export_replaces_an_older_one(trained, corpus, folder):
    export_huggingface(trained["llama"], corpus.tokenizer, folder, {"name": "new"})
    assert json.loads((folder / "evolm.json").read_text()) == {"name": "new"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_exporting_leaves_the_model_as_it_was(trained, corpus, tmp_path):
    model = trained["qwen3"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_huggingface(model, corpus.tokenizer, tmp_path / "hf", {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- the receipt ------------------------------------------------------------------------------------------------------


@every_shape
def test_the_receipt_says_what_was_compared(exported, corpus, name):
    root, receipts = exported
    receipt = receipts[name]
    assert json.loads((root / name / "parity.json").read_text()) == receipt
    assert receipt["tokenizer"] == corpus.tokenizer.digest
    assert set(receipt["max_logit_difference"]) == {"full", "cached", "padded"}
    assert max(receipt["max_logit_difference"].values()) <= receipt["tolerance"] < 1e-4
    assert receipt["disturbed"] > 20 * receipt["tolerance"]
    assert receipt["tokens"] == 4 * 32


def test_an_export_that_fails_the_comparison_leaves_the_older_one(trained, corpus, folder, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    with pytest.raises(ParityError):
        export_huggingface(trained["qwen3"], corpus.tokenizer, folder, {"name": "new"})
    assert json.loads((folder / "evolm.json").read_text()) == {"name": "qwen3"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_export_that_fails_the_comparison_leaves_no_folder(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    with pytest.raises(ParityError, match="logits differ by"):
        export_huggingface(trained["evolm"], corpus.tokenizer, tmp_path / "hf", {})
    assert list(tmp_path.iterdir()) == []


# --- negative controls: the comparison sees what goes wrong in exports ------------------------------------------------


def test_the_right_folder_passes(trained, folder):
    check_parity(trained["qwen3"], folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
    ],
    ids=["another rotary base", "another epsilon", "another activation"],
)
def test_a_configuration_that_says_something_else_is_seen(trained, folder, change):
    change_config(folder, **change)
    with pytest.raises(ParityError, match=r"qwen3: logits differ by"):
        check_parity(trained["qwen3"], folder)


@pytest.mark.parametrize("window", [7, 9, 16])
@pytest.mark.parametrize("folder", ["mistral", "olmo3", "odd"], indirect=True)
def test_another_window_is_seen(trained, folder, window):
    check_parity(trained[folder.name], folder)
    change_config(folder, sliding_window=window)
    with pytest.raises(ParityError):
        check_parity(trained[folder.name], folder)


@pytest.mark.parametrize("folder", ["olmo3"], indirect=True)
def test_another_rotary_base_of_sliding_layers_alone_is_seen(trained, folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 500_000.0
    change_config(folder, rope_parameters=config["rope_parameters"])
    with pytest.raises(ParityError):
        check_parity(trained["olmo3"], folder)


@pytest.mark.parametrize("folder", ["gemma2"], indirect=True)
@pytest.mark.parametrize(
    "change", [{"attn_logit_softcapping": None}, {"final_logit_softcapping": 9.0}, {"query_pre_attn_scalar": 17}]
)
def test_another_softcap_is_seen(trained, folder, change):
    change_config(folder, **change)
    with pytest.raises(ParityError):
        check_parity(trained["gemma2"], folder)


@pytest.mark.parametrize("folder", ["evolm"], indirect=True)
def test_another_function_in_our_own_class_is_seen(trained, folder):
    change_config(folder, ffn="gelu")
    with pytest.raises(ParityError):
        check_parity(trained["evolm"], folder)


def permute_rows(weights):
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].view(2, 2, 8, 32).transpose(1, 2).reshape(32, 32)


def swap_norms(weights):
    one, other = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    weights[one], weights[other] = weights[other], weights[one]


def swap_experts(weights):
    for matrix in ("w1", "w2", "w3"):
        one, other = (f"model.layers.1.block_sparse_moe.experts.{index}.{matrix}.weight" for index in (0, 3))
        weights[one], weights[other] = weights[other], weights[one]


def swap_gates(weights):
    one, other = (f"model.layers.1.block_sparse_moe.experts.2.{matrix}.weight" for matrix in ("w1", "w3"))
    weights[one], weights[other] = weights[other], weights[one]


def round_to_bf16(weights):
    for name in weights:
        weights[name] = weights[name].bfloat16().float()


@pytest.mark.parametrize("change", [permute_rows, swap_norms, round_to_bf16])
def test_weights_that_are_not_those_that_were_trained_are_seen(trained, folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ParityError):
        check_parity(trained["qwen3"], folder)


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
@pytest.mark.parametrize("change", [swap_experts, swap_gates])
def test_experts_that_are_not_those_that_were_trained_are_seen(trained, folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ParityError):
        check_parity(trained["mixtral"], folder)


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_another_number_of_experts_for_each_token_is_seen(trained, folder):
    change_config(folder, num_experts_per_tok=3)
    with pytest.raises(ParityError):
        check_parity(trained["mixtral"], folder)


def test_a_model_that_was_trained_on_is_another(trained, folder):
    with pytest.raises(ParityError):
        check_parity(trained["llama"], folder)


# --- loading ----------------------------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_loading_gives_the_same_logits(trained, exported, name):
    ids = torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    loaded = load_model(exported[0] / name)
    assert not loaded.training
    torch.testing.assert_close(loaded(ids).logits, trained[name](ids).logits, atol=1e-5, rtol=1e-5)


def test_our_class_is_known_to_transformers(exported, trained):
    loaded = AutoModelForCausalLM.from_pretrained(exported[0] / "evolm")
    assert type(loaded) is type(trained["evolm"])


@pytest.mark.parametrize("folder", ["evolm"], indirect=True)
def test_code_that_a_folder_carries_is_never_run(folder):
    for name in CODE:
        (folder / name).write_text("raise SystemExit('ran')\n")
    assert load_model(folder).config.model_type == "evolm"


@pytest.fixture(scope="module")
def elsewhere(exported, tmp_path_factory):
    """What a Python without our packages loads from a folder."""

    def load(name, remote=""):
        home = tmp_path_factory.mktemp("home")
        environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", "-c", LOADER, str(exported[0] / name), remote],
            capture_output=True,
            text=True,
            cwd=home,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return load


@pytest.mark.parametrize(
    ("name", "remote", "kind", "module"),
    [
        ("qwen3", "", "Qwen3ForCausalLM", "transformers.models.qwen3.modeling_qwen3"),
        ("mixtral", "", "MixtralForCausalLM", "transformers.models.mixtral.modeling_mixtral"),
        ("evolm", "remote", "EvolmForCausalLM", "transformers_modules."),
        ("odd", "remote", "EvolmForCausalLM", "transformers_modules."),
    ],
    ids=[
        "stock class",
        "stock mixture",
        "our class by the code in the folder",
        "many genes at once by the code in the folder",
    ],
)
@torch.no_grad()
def test_others_load_the_same_model_without_our_packages(trained, corpus, elsewhere, name, remote, kind, module):
    found = elsewhere(name, remote)
    assert found["ours"] == []
    assert found["class"] == kind
    assert found["module"].startswith(module)
    expected = trained[name](torch.arange(3, 19).unsqueeze(0)).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
    assert found["ids"] == [1, *corpus.tokenizer.encode(["A tale."])[0]]


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match="no exported model there"):
        load_model(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"no tokenizer.json there"):
        load_tokenizer(tmp_path / "gone")


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{"), ("config.json", '{"model_type": "unheard-of"}'), ("model.safetensors", None)],
    ids=["torn configuration", "unknown model", "no weights"],
)
def test_a_folder_that_cannot_be_loaded_is_said(folder, file, content):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UsageError, match=f"{folder}: cannot be loaded: "):
        load_model(folder)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@every_shape
def test_the_tokenizer_begins_every_text_as_in_training(exported, corpus, name):
    tokenizer = load_tokenizer(exported[0] / name)
    for text in ("A tale.", "", "  blanks  and\nlines\n", "Grüße, 日本語 🦜"):
        ids = tokenizer(text).input_ids
        assert ids == [1, *corpus.tokenizer.encode([text])[0]]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_pairs_are_two_texts(exported, corpus):
    ids = load_tokenizer(exported[0] / "qwen3")("one", "two").input_ids
    assert ids == [1, *corpus.tokenizer.encode(["one"])[0], 1, *corpus.tokenizer.encode(["two"])[0]]


def test_the_special_tokens_have_their_names(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported[0] / "qwen3")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 32
    assert len(tokenizer) == 320
