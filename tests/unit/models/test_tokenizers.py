"""A loaded tokenizer reads text like its tokenizer.json, or the difference is one error."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from helpers.tokenizers import CHATML, byte_level, write_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from opdctl.errors import ErrorKind, ExitCode, OpdctlError
from opdctl.models.directory import toy_model_names
from opdctl.models.tokenizers import TEXTS, TokenizerSource, load_tokenizer

DIGITS = [("1", "2"), ("Ġ", "1")]
"""Merges that the class of Qwen2 never applies: it reads each digit by itself."""


def load(folder: Path, source: TokenizerSource = "auto", *, trust_remote_code: bool = False):
    return load_tokenizer(folder, source, trust_remote_code=trust_remote_code)


def assert_reads_like_its_file(tokenizer, folder: Path) -> None:
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    for text in (*TEXTS, "<|im_start|>user\n12 1<|im_end|>\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == file.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def rejection(folder: Path, source: TokenizerSource = "auto", kind: ErrorKind = "unsupported_model") -> OpdctlError:
    """Return the error of loading, which must name the directory."""
    with pytest.raises(OpdctlError) as caught:
        load(folder, source)
    assert caught.value.kind == kind
    assert str(folder) in caught.value.message
    return caught.value


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ── Class and file ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_file_is_compared_with_sentencepiece(model_type, tmp_path):
    """transformers 5 reads a Unigram file by LlamaTokenizer as BPE."""
    model = io.BytesIO()
    options = {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    trained = {"model_type": model_type, "vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 2} | options
    names = {"normalization_rule_name": "identity", "user_defined_symbols": ["<|im_start|>", "<|im_end|>"]}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 9), model_writer=model, **trained, **names)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type == "bpe":
        load(tmp_path)
    else:
        assert "tokenizer.model" in rejection(tmp_path).message
        assert type(load(tmp_path, "class")).__name__ == "LlamaTokenizer"


def test_model_file_of_another_library_is_not_compared(tmp_path):
    folder = write_tokenizer(tmp_path, byte_level(DIGITS), model_type="gpt2", tokenizer_class="GPT2Tokenizer")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("".join(" ".join(merge) + "\n" for merge in model["merges"]))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("IQ== 0\n")  # as tiktoken writes it
    assert type(load(folder)).__name__ == "GPT2Tokenizer"


def test_class_that_reads_like_the_file_is_used(tmp_path, capsys):
    folder = write_tokenizer(tmp_path, byte_level(DIGITS), model_type="gpt2", tokenizer_class="GPT2Tokenizer")
    tokenizer = load(folder)
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert_reads_like_its_file(tokenizer, folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "LlamaTokenizerFast"), ("llama", "LlamaTokenizer"), ("gemma2", "GemmaTokenizer")]
)
def test_file_is_used_where_the_class_loses_text(tmp_path, capsys, model_type, name):
    folder = write_tokenizer(tmp_path, model_type=model_type, tokenizer_class=name)
    tokenizer = load(folder)
    assert type(load(folder, "class")) is not type(tokenizer)
    assert_reads_like_its_file(tokenizer, folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.chat_template == (folder / "chat_template.jinja").read_text()
    warning = capsys.readouterr().err
    assert "warning" in warning
    assert str(folder) in warning
    load(folder)
    assert capsys.readouterr().err == ""


def test_file_is_used_where_the_directory_names_no_class(tmp_path, capsys):
    """transformers reads every tokenizer of a Qwen2 model by its class, whatever tokenizer_config.json names."""
    folder = write_tokenizer(tmp_path, byte_level(DIGITS), model_type="qwen2")
    assert type(load(folder, "class")).__name__ == "Qwen2Tokenizer"
    assert_reads_like_its_file(load(folder), folder)
    assert str(folder) in capsys.readouterr().err


def test_tokens_that_a_class_adds_to_the_file_are_no_ids(tmp_path, capsys):
    special = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    folder = write_tokenizer(tmp_path, byte_level(special=special), model_type="hyperclovax_vision_v2")
    assert len(load(folder, "class")) == 260  # with <|endoftext|>
    assert len(load(folder)) == 259
    assert str(folder) in capsys.readouterr().err


def test_other_difference_is_refused_until_the_recipe_chooses(tmp_path):
    folder = write_tokenizer(tmp_path, byte_level(DIGITS), model_type="qwen2", tokenizer_class="Qwen2Tokenizer")
    error = rejection(folder)
    assert error.code == ExitCode.USAGE
    assert "'Ġ1'" in error.message  # the file's reading of TEXTS[0]
    assert "'Ġ' '1'" in error.message  # that of the class
    assert load(folder, "class").tokenize(" 12") == ["Ġ", "1", "2"]
    assert load(folder, "file").tokenize("12 1") == ["12", "Ġ1"]
    assert_reads_like_its_file(load(folder, "file"), folder)


def test_difference_in_special_tokens_alone_is_found(tmp_path):
    folder = write_tokenizer(tmp_path, split_special_tokens=True)
    rejection(folder)
    assert_reads_like_its_file(load(folder, "file"), folder)
    assert len(load(folder, "class").encode("<|im_start|>")) > 1


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    stored = byte_level()
    stored.enable_truncation(4)
    stored.enable_padding(length=64, pad_id=0, pad_token="<|endoftext|>")
    folder = write_tokenizer(tmp_path, stored)
    assert_reads_like_its_file(load(folder), folder)


def test_text_that_the_file_loses_as_well_is_no_difference(tmp_path):
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    tokenizer = load(write_tokenizer(tmp_path, lower))
    assert tokenizer.decode(tokenizer.encode("ABC")) == "abc"


def test_special_token_of_the_config_is_added_to_those_of_the_file(tmp_path):
    folder = write_tokenizer(tmp_path, pad_token="<|pad|>")
    assert load(folder).convert_tokens_to_ids("<|pad|>") == len(load(folder)) - 1
    assert_reads_like_its_file(load(folder), folder)


def test_installed_packages_do_not_decide(tmp_path):
    """With the package mistral-common, transformers would ignore tokenizer.json and the chat template."""
    folder = write_tokenizer(tmp_path, byte_level(DIGITS), model_type="mistral", tokenizer_class="LlamaTokenizer")
    (folder / "tekken.json").write_text("{}")
    assert_reads_like_its_file(load(folder), folder)
    assert load(folder).chat_template == CHATML


def test_decoding_does_not_tidy_the_text(tmp_path):
    words = Tokenizer(models.WordLevel({"<|im_end|>": 0, "a": 1, " ": 2, ".": 3, "'": 4}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = load(write_tokenizer(tmp_path, words, clean_up_tokenization_spaces=True))
    assert tokenizer.batch_decode([tokenizer.encode("a . '")]) == ["a . '"]


def test_template_of_a_processor_is_used_where_the_tokenizer_has_none(tmp_path):
    folder = write_tokenizer(tmp_path, template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert load(folder).chat_template == CHATML
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load(folder).chat_template == "{{ messages }}"


@pytest.mark.parametrize("name", toy_model_names())
def test_toy_models_have_no_difference(name, capsys):
    from opdctl.models.directory import find_or_download
    from opdctl.recipe.schema import Model

    load(find_or_download(Model(model=name), "model"))
    assert capsys.readouterr().err == ""


def test_file_is_not_mended_by_settings(tmp_path):
    """fix_mistral_regex replaces the pre-tokenizer of a large tokenizer.json of a Mistral model."""
    content = json.loads(byte_level([("'", "t"), ("1", "2")]).to_str())
    content["model"]["vocab"] |= {f"x{i}": 300 + i for i in range(100_001)}
    large = Tokenizer.from_str(json.dumps(content))
    folder = write_tokenizer(tmp_path, large, model_type="mistral", rows=200_000, fix_mistral_regex=True)
    assert load(folder, "class").tokenize("12") == ["1", "2"]
    assert load(folder, "file").tokenize("12") == ["12"]
    assert_reads_like_its_file(load(folder, "file"), folder)
    rejection(folder)


# ── Files without a class, classes without a file ────────────────────────────────────────────────────────────────────


def test_directory_without_tokenizer_json_is_read_by_its_class(tmp_path):
    content = json.loads(byte_level(DIGITS).to_str())["model"]
    folder = write_tokenizer(tmp_path, model_type="gpt2", tokenizer_class="GPT2Tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n1 2\nĠ 1\n")
    assert load(folder).tokenize("12 1") == ["12", "Ġ1"]
    rejection(folder, "file", "missing_file")


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gpt2", "mamba"])
def test_directory_without_a_tokenizer_is_refused(tmp_path, model_type):
    folder = write_tokenizer(tmp_path, model_type=model_type)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
        if name == "tokenizer.json":
            rejection(folder, kind="missing_file")
    assert rejection(folder, kind="missing_file").code == ExitCode.USAGE


# ── Invalid files ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer", "decoder", "model", "post_processor"])
def test_type_that_the_library_does_not_know_is_refused(tmp_path, part):
    folder = write_tokenizer(tmp_path)
    edit_json(folder / "tokenizer.json", **{part: {"type": "NewIn2030"}})
    assert "update" in (rejection(folder).hint or "")
    rejection(folder, "file")


@pytest.mark.parametrize("source", ["auto", "file"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "change",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[]", lambda data: b"\xef\xbb\xbf" + data],
    ids=["cut", "empty", "list", "byte order mark"],
)
def test_corrupt_file_is_named(tmp_path, source, name, change):
    folder = write_tokenizer(tmp_path)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    error = rejection(folder, source, "invalid_model")
    assert str(folder / name) in error.message
    assert error.code == ExitCode.BAD_DATA


def test_changed_file_is_read_again(tmp_path):
    folder = write_tokenizer(tmp_path)
    assert load(folder).tokenize("12") == ["1", "2"]
    (folder / "tokenizer.json").write_text("{")
    rejection(folder, kind="invalid_model")
    byte_level(DIGITS).save(str(folder / "tokenizer.json"))
    assert load(folder).tokenize("12") == ["12"]


# ── Code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path("{marker}").touch()
class Custom(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["custom.Custom", None]}, ["custom.Custom", None]], ids=type)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_code_of_the_directory_runs_only_if_trusted(tmp_path, monkeypatch, auto_map, model_type):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_tokenizer(tmp_path / "model", model_type=model_type, auto_map=auto_map)
    marker = tmp_path / "ran"
    (folder / "custom.py").write_text(CODE.format(marker=marker))
    assert "trust_remote_code" in (rejection(folder).hint or "")
    assert_reads_like_its_file(load(folder, "file"), folder)
    assert not marker.exists()
    assert type(load(folder, trust_remote_code=True)).__name__ == "Custom"
    assert marker.exists()


def test_error_of_trusted_code_names_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_tokenizer(tmp_path / "model", auto_map={"AutoTokenizer": ["custom.Custom", None]})
    (folder / "custom.py").write_text("raise ZeroDivisionError('in the code')\n")
    with pytest.raises(OpdctlError) as caught:
        load(folder, trust_remote_code=True)
    assert caught.value.kind == "unsupported_model"
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("source", ["auto", "file"])
def test_pattern_that_takes_too_many_steps_is_refused(tmp_path, source):
    """The error of the library is no Exception."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.|.)+(?=\d\z)"), "isolated")
    with pytest.raises(OpdctlError) as caught:
        load_tokenizer(write_tokenizer(tmp_path, tokenizer), source, trust_remote_code=False)
    assert (caught.value.kind, caught.value.code) == ("invalid_model", ExitCode.BAD_DATA)
    assert f"{tmp_path}: the tokenizer fails" in caught.value.message
