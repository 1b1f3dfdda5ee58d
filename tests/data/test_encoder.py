"""The fast ways to ids give the ids of the tokenizer itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mor.data.encoder import ByteEncoder, FastEncoder, make_encoder
from mor.data.tokenizer import END_OF_TEXT, byte_tokenizer, train_bpe

UNICODE = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4)


@given(texts=UNICODE)
def test_bytes_equal_the_byte_tokenizer(texts: list[str]):
    fast = make_encoder(byte_tokenizer())
    assert isinstance(fast, ByteEncoder)
    slow = FastEncoder(byte_tokenizer())
    assert [list(ids) for ids in fast.encode(texts)] == [list(ids) for ids in slow.encode(texts)]


def test_other_tokenizers_give_their_own_ids():
    tokenizer = train_bpe(["the cat sat on the mat, the bat and the hat"] * 3, 270)
    texts = ["the cat", "", "on  the\nhat 漢"]
    encoded = make_encoder(tokenizer).encode(texts)
    assert [list(ids) for ids in encoded] == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(["the end of text"], 260)])
def test_the_name_of_a_special_token_is_only_text(make):
    tokenizer = make()
    ids = list(make_encoder(tokenizer).encode([f"a{END_OF_TEXT}b"])[0])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_settings_of_the_tokenizer_do_not_cut_or_pad():
    tokenizer = train_bpe(["the end of text"], 260)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert [len(ids) for ids in make_encoder(tokenizer).encode(["q", "qqqqq"])] == [1, 5]
    assert tokenizer.backend_tokenizer.truncation is not None


def test_text_that_cannot_be_encoded_is_an_error():
    backend = Tokenizer(models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ValueError, match="cannot encode one of 1 documents, the first of which begins 'xyz'"):
        make_encoder(tokenizer).encode(["xyz"])
