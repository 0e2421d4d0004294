"""Models, quantized teachers and tokenizers of every kind: right numbers, or a refusal before anything is sampled.

Some models are examined here. `python tests/sweep` examines all of them, and writes docs/models.md.
"""

import os

import pytest
from helpers import architectures
from sweep import page
from sweep.findings import CATEGORIES, Finding, examine_all

MODELS = (
    # attention over all tokens; heads that are tied, scaled, capped or have a bias
    *("gemma2", "granite", "llama", "llama, tied", "olmo2", "phi", "qwen2", "qwen3", "smollm3"),
    # attention in windows or chunks, or to selected tokens; layers that differ
    *("cohere2", "deepseek_v32", "deepseek_v4", "gemma3n_text", "gemma4_text", "gpt_neo", "llama4_text", "mistral"),
    # experts
    *("deepseek_v3", "gpt_oss", "mixtral", "phimoe", "qwen3_moe"),
    # recurrent layers
    *("bamba", "falcon_h1", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h", "qwen3_5_text"),
    *("recurrent_gemma", "rwkv", "xlstm", "zamba2"),
    # positions: learnt, by the attention mask, or by the lengths in a batch
    *("bloom", "falcon", "gpt2", "opt", "llama, rope dynamic", "llama, rope yarn", "phi3, rope longrope"),
    # decoders of encoder-decoders, masked language models, caches of the model
    *("bart", "bert", "bert, encoder", "electra", "minimax", "moshi", "reformer", "xlnet", "whisper"),
    # text models with vision or audio
    *("gemma3", "gemma4", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl_moe", "voxtral"),
)
ITEMS = [(category, name) for category, names in CATEGORIES.items() for name in names if category != "model"]
ITEMS += [("model", name) for name in MODELS]


@pytest.fixture(scope="module")
def findings() -> dict[tuple[str, str], Finding]:
    workers = min(2, os.cpu_count() or 1)
    return {(each.category, each.name): each for each in examine_all(ITEMS, ("training", "lora"), workers)}


@pytest.mark.parametrize("item", ITEMS, ids=": ".join)
def test_numbers_are_right_or_the_model_is_refused(findings, item):
    outcomes = findings[item].outcomes
    assert {use: each for use, each in outcomes.items() if each.kind not in ("right", "refused")} == {}


@pytest.mark.parametrize("item", ITEMS, ids=": ".join)
def test_page_has_this_outcome(findings, item):
    category, _ = item
    assert page.row(category, findings[item]) == page.read_rows(page.PATH)[item]


def test_page_lists_every_type_and_nothing_wrong():
    """The rows of vLLM may: it is another implementation."""
    rows = page.read_rows(page.PATH)
    listed = {name for table, name in rows if table in ("model", "not built")}
    assert listed == {*architectures.CAUSAL, *architectures.MULTIMODAL, *architectures.VARIANTS}
    cells = {cell for (table, _), row in rows.items() if table not in ("not built", "vllm") for cell in row[1:-1]}
    assert cells == {"yes", "refused"}
