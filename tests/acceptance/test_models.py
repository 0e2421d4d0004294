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
    *("gemma2", "granite", "llama, tied", "phi", "qwen3"),
    # attention in windows or chunks, or to selected tokens; layers that differ
    *("cohere2", "deepseek_v32", "gemma3n_text", "gpt_neo", "llama4_text"),
    # experts
    *("deepseek_v3", "gpt_oss", "qwen3_moe"),
    # recurrent layers
    *("bamba", "lfm2", "mamba2", "qwen3_5_text", "rwkv", "xlstm"),
    # positions: learnt, by the attention mask, or by the lengths in a batch
    *("bloom", "gpt2", "llama, rope dynamic"),
    # decoders of encoder-decoders, masked language models, caches of the model
    *("bart", "bert", "minimax", "xlnet"),
    # text models with vision or audio
    *("gemma3", "qwen2_5_vl", "voxtral"),
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
