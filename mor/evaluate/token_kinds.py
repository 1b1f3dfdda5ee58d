"""What kind of token a token is: function word, other word, piece of a word, punctuation, digits, white space.

Function words are the closed classes of English by list (articles, pronouns, prepositions, conjunctions, auxiliaries),
which needs no tagger; all other words are open-class or names, told apart by their first letter.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
from torch import Tensor

FUNCTION_WORDS: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "article": "a an the this that these those",
        "pronoun": "i you he she it we they me him her us them my your his its our their who whom which what",
        "preposition": "of in on at by for with from to into over under between through about after before during",
        "conjunction": "and or but nor so yet if because although while when as than that whether",
        "auxiliary": "is are was were be been being am have has had do does did will would can could may might must "
        "shall should not",
    }.items()
}
UNDECODABLE = "\ufffd"  # a token of some of the bytes of a character
KINDS = (
    *FUNCTION_WORDS,
    "lower-case word",
    "capitalised word",
    "inside a word",
    "punctuation",
    "digits",
    "space",
    "end",
)


def token_kinds(tokenizer: Any) -> Tensor:
    """(V,) each token's index in `KINDS`; special tokens are `end`.

    A word begins where a token has white space before it or is the first of a line; a token of letters without it goes
    on with a word, except in tokenizers without such tokens, where nothing else can be told.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    special = set(tokenizer.all_special_ids)
    kinds = [KINDS.index("end")] * size
    for index in set(tokenizer.get_vocab().values()) - special:
        kinds[index] = KINDS.index(kind_of(tokenizer.decode([index], clean_up_tokenization_spaces=False)))
    return torch.tensor(kinds)


def kind_of(text: str) -> str:
    """The kind of a token's text, its leading space included."""
    word = text.strip()
    if not word:
        return "space"
    if word[0].isdigit():
        return "digits"
    if not word[0].isalpha():
        is_part = word[0] == UNDECODABLE or unicodedata.category(word[0]).startswith(("M", "C"))
        return "inside a word" if is_part else "punctuation"
    if not text[0].isspace():
        return "inside a word"
    for name, words in FUNCTION_WORDS.items():
        if word.lower() in words:
            return name
    return "capitalised word" if word[0].isupper() else "lower-case word"
