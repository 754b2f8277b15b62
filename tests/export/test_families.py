"""Every family: packed ONNX = packed torch = the plain Hugging Face forward pass of each pair on its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from csrm.errors import ConfigError
from csrm.export.packed_onnx import export_packed_graph
from csrm.scoring.labels import ESCI_LABELS, expected_gain
from csrm.scoring.packing import Group, Pack, build_packs
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PackScorer
from csrm.training.model.attention import PackAttention
from csrm.training.model.base import BaseModel
from csrm.training.model.families import check_config, check_model
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from tests.training.model.test_relevance import MISTAKES

TOLERANCE = 1e-4
LABEL_IDS = (3, 4, 5, 6)
GAINS = np.array([label.gain for label in ESCI_LABELS])

SMALL = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied, sliding": (
        "Qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen3 untied, all heads, yarn": (
        "Qwen3",
        {"tie_word_embeddings": False, "head_dim": 8, "num_key_value_heads": 4, "rope_scaling": YARN},
    ),
    "llama": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_scaling": LLAMA3}),
    "llama untied, linear": (
        "Llama",
        {
            "tie_word_embeddings": False,
            "head_dim": 16,
            "attention_bias": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "head_dim": 8, "sliding_window": None}),
    "mistral sliding": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 9}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window": 64}),
    "gemma3 long, capped": ("Gemma3", {**GEMMA, "sliding_window": 9, "final_logit_softcapping": 5.0}),
}


class Exported(NamedTuple):
    """A tiny model in its three forms."""

    plain: transformers.PreTrainedModel
    torch_scorer: PackScorer
    onnx_scorer: PackScorer


def tiny_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    family, settings = FAMILIES[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(
        config_class(**{**SMALL, **settings}, pad_token_id=0)
    )
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    plain = tiny_model(request.param)
    model = PackedRelevanceModel(tiny_model(request.param), LABEL_IDS).eval()
    path = tmp_path_factory.mktemp("family") / "model.onnx"
    export_packed_graph(model, path)
    return Exported(plain, torch_pack_scorer(model), load_pack_scorer(path, "cpu", threads=1)[0])


def random_groups(seed: int = 0) -> list[Group]:
    """Five queries with one to six products; some products are one token long; prompts of 4 to 42 tokens."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return rng.integers(7, 159, size=length).tolist()

    lengths = [(12, [1, 9, 30, 5]), (3, [1, 1]), (20, [7]), (8, [2, 3, 17, 1, 25, 6]), (5, [11, 4])]
    return [Group(tokens(prefix), [tokens(length) for length in suffixes]) for prefix, suffixes in lengths]


@pytest.fixture(scope="module")
def alone(exported: Exported) -> np.ndarray:
    """Label logits of each pair's plain prompt through the Hugging Face model, without any of our code."""
    rows = []
    with torch.inference_mode():
        for prefix_ids, suffixes in random_groups():
            for suffix_ids in suffixes:
                logits = exported.plain(input_ids=torch.tensor([[*prefix_ids, *suffix_ids]])).logits
                rows.append(logits[0, -1, list(LABEL_IDS)].numpy())
    return np.stack(rows)


def packed(
    scorer: PackScorer,
    groups: list[Group],
    pack_tokens: int,
    change: Callable[[Pack], Pack] = lambda pack: pack,
) -> np.ndarray:
    return np.concatenate([scorer(change(pack)) for pack in build_packs(groups, pack_tokens)])


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Scores within 1e-4, logits within 1e-4 of their range."""
    assert np.abs(expected_gain(actual, GAINS) - expected_gain(expected, GAINS)).max() <= TOLERANCE
    assert np.abs(actual - expected).max() <= TOLERANCE * np.ptp(expected)


def test_the_model_tells_pairs_apart(alone: np.ndarray) -> None:
    assert (alone[:, -1] - alone[:, 0]).std() >= 1
    assert expected_gain(alone, GAINS).std() >= 0.1


# One pair in most packs; two queries in some; all queries in one.
@pytest.mark.parametrize("pack_tokens", [42, 60, 500])
def test_packs_give_each_pair_the_logits_of_its_prompt_alone(
    exported: Exported, alone: np.ndarray, pack_tokens: int
) -> None:
    assert_same(packed(exported.torch_scorer, random_groups(), pack_tokens), alone)
    assert_same(packed(exported.onnx_scorer, random_groups(), pack_tokens), alone)


def test_a_pack_with_one_pair_of_two_tokens(exported: Exported) -> None:
    groups = [Group([7], [[8]])]
    with torch.inference_mode():
        expected = exported.plain(input_ids=torch.tensor([[7, 8]])).logits[0, -1:, list(LABEL_IDS)].numpy()
    assert_same(packed(exported.onnx_scorer, groups, 500), expected)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_pack_is_seen(exported: Exported, alone: np.ndarray, mistake: Callable[[Pack], Pack]) -> None:
    """Negative control: off by a hundred times what is allowed, in scores and in logits."""
    actual = packed(exported.onnx_scorer, random_groups(), 500, mistake)
    assert np.abs(expected_gain(actual, GAINS) - expected_gain(alone, GAINS)).max() >= 100 * TOLERANCE
    assert np.abs(actual - alone).max() >= 100 * TOLERANCE * np.ptp(alone)


@pytest.mark.parametrize("name", ["qwen2 untied, sliding", "mistral sliding", "gemma3 long, capped"])
def test_a_window_that_is_ignored_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of sliding windows: the longest prompts see 42 tokens instead of 9."""
    model = PackedRelevanceModel(tiny_model(name), LABEL_IDS)
    expected = packed(torch_pack_scorer(model), random_groups(), 500)
    biases = PackAttention.biases
    monkeypatch.setattr(PackAttention, "biases", lambda self, window: biases(self, None))
    actual = packed(torch_pack_scorer(model), random_groups(), 500)
    assert np.abs(actual - expected).max() >= 100 * TOLERANCE * np.ptp(expected)


PROMPT_TOKENS = 352


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(),
        transformers.T5Config(),
        transformers.MambaConfig(),
        transformers.Qwen3MoeConfig(),
        transformers.MixtralConfig(),
        transformers.GPT2Config(),
        transformers.Gemma2Config(),
    ],
    ids=lambda config: config.model_type,
)
def test_other_models_are_refused_with_the_list_of_what_is_supported(config: transformers.PretrainedConfig) -> None:
    expected = r"model of type '\w+': supported are Qwen2 and Qwen2\.5 \(qwen2\), Qwen3 .* Gemma 3 \(text\)"
    with pytest.raises(ConfigError, match=expected):
        check_config(config, PROMPT_TOKENS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0, expected none"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "expected a causal model"),
        (
            transformers.LlamaConfig(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            "rotary scaling dynamic, expected one of default, linear",
        ),
        (transformers.Qwen2Config(max_position_embeddings=256), "may take 352 tokens, but the model was made for 256"),
    ],
)
def test_settings_that_packs_do_not_honour_are_refused(config: transformers.PretrainedConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config, PROMPT_TOKENS)


def test_a_model_with_code_of_its_own_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="supported are Qwen2"):
        check_model(BaseModel(folder=str(tmp_path)), PROMPT_TOKENS)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    transformers.Qwen2Config().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"got pickles \['pytorch_model\.bin'\].* call save_pretrained"):
        check_model(BaseModel(folder=str(tmp_path)), PROMPT_TOKENS)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    check_model(BaseModel(folder=str(tmp_path)), PROMPT_TOKENS)
