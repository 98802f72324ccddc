"""The template, the end token exactly once, truncation, and tokenizers that cannot serve."""

import json

import pytest
import tokenizers

from pyqemb.data.tokenizer import END_TOKEN, TEMPLATE, Tokenizer
from pyqemb.errors import ConfigError, DataError
from pyqemb.testing.tiny import TEXTS, tiny_tokenizer, write_tiny_folder


@pytest.fixture
def folder(tmp_path):
    return write_tiny_folder(tmp_path)


def test_the_end_token_comes_once_and_last(folder):
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    for text, ids in zip(TEXTS, tokenizer.encode_documents(TEXTS), strict=True):
        assert ids == [*plain.encode(text).ids, tokenizer.end_id]


def test_saved_tokenizers_do_not_append_twice(folder, tmp_path):
    first = Tokenizer.from_folder(folder)
    first.save(tmp_path / "..")
    first.save(tmp_path)
    second = Tokenizer.from_folder(tmp_path)
    assert second.encode_documents(TEXTS) == first.encode_documents(TEXTS)


def test_a_text_that_spells_the_end_token_still_gets_its_own():
    tokenizer = tiny_tokenizer()
    assert tokenizer.encode_documents([f"x{END_TOKEN}"])[0][-2:] == [tokenizer.end_id] * 2
    assert tokenizer.encode_documents([""]) == [[tokenizer.end_id]]


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7, 100])
def test_truncation_keeps_the_end_token(limit):
    text = "0123456789 word"
    full = tiny_tokenizer(None).encode_documents([text])[0]
    cut = tiny_tokenizer(limit).encode_documents([text])[0]
    assert len(cut) == min(limit, len(full))
    assert cut == [*full[:-1][: limit - 1], full[-1]]


def test_queries_follow_the_template_byte_for_byte():
    tokenizer = tiny_tokenizer(None)
    assert TEMPLATE == "Instruct: {task}\nQuery:{query}"
    expected = tokenizer.encode_documents(["Instruct: Find {it}\nQuery:where?"])
    assert tokenizer.encode_queries(["where?"], "Find {it}") == expected
    assert tokenizer.encode_queries(["where?"]) == tokenizer.encode_documents(["where?"])
    mixed = tokenizer.encode_queries(["a", "b"], ["Find", None])
    assert mixed == tokenizer.encode_documents(["Instruct: Find\nQuery:a", "b"])
    with pytest.raises(ValueError, match="one instruction for each of 2 texts, got 1"):
        tokenizer.encode_queries(["a", "b"], ["Find"])


def test_one_text_is_not_a_list_of_letters():
    with pytest.raises(TypeError, match="expected a list of texts, got one text"):
        tiny_tokenizer().encode_documents("abc")


def test_no_texts():
    assert tiny_tokenizer().encode_documents([]) == [] == tiny_tokenizer().encode_queries([], "Find")


def test_the_file_may_ask_for_padding_and_truncation_but_does_not_get_it(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    assert [len(ids) for ids in Tokenizer.from_folder(folder).encode_documents(["01234", "0"])] == [6, 2]


def test_the_stored_length_limit_is_used_unless_another_is_given(folder):
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4, "do_lower_case": False}))
    assert Tokenizer.from_folder(folder).max_length == 4
    assert Tokenizer.from_folder(folder, max_length=9).max_length == 9


def test_other_files_of_the_tokenizer_are_handed_on(folder, tmp_path):
    (folder / "merges.txt").write_text("a b")
    stored = {"tokenizer_class": "TokenizersBackend", "auto_map": {"x": "y"}, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    out = tmp_path / "out"
    out.mkdir()
    Tokenizer.from_folder(folder, max_length=77).save(out)
    assert (out / "merges.txt").read_text() == "a b"
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "padding_side": "left",
        "model_max_length": 77,
    }


def test_what_cannot_serve_is_refused_by_name(folder):
    path = folder / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole.replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(DataError, match=rf"{folder}: the tokenizer has no token '<\|endoftext\|>'"):
        Tokenizer.from_folder(folder)
    path.write_text(whole[:100])
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_folder(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(folder)
    with pytest.raises(ConfigError, match="max_length must be at least 1"):
        tiny_tokenizer(0)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "continuing\\u005fsubword_prefix"])
@pytest.mark.parametrize("merge", ["ab é", ["ab", "é"]])
def test_a_merge_without_the_prefix_of_the_file_is_refused(folder, key, merge):
    """tokenizers would cut the letter in two, and end the process."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= {
        "type": "BPE",
        "vocab": {"<|endoftext|>": 0, "ab": 1, "é": 2},
        "merges": [merge],
        "PREFIX": "/",
    }
    content["model"].pop("continuing_subword_prefix", None)
    path.write_text(json.dumps(content, ensure_ascii=False).replace("PREFIX", key))
    with pytest.raises(DataError, match=rf"^{path}: the second part of the merge .*, which is '/'$"):
        Tokenizer.from_folder(folder)


def test_merges_with_the_prefix_of_the_file_are_read(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = {"<|endoftext|>": 0, "a": 1, "##b": 2, "ab": 3}
    content["model"] |= {"vocab": vocab, "merges": [["a", "##b"]], "continuing_subword_prefix": "##"}
    path.write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).vocab_size >= 4
