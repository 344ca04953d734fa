"""A text that cannot fit is refused before much of it is tokenized, and whatever fits is tokenized as it always was."""

import pytest

from alpaca.errors import PromptTooLong
from alpaca.text.fitting import encode_within
from alpaca.text.hugging_face import HuggingFaceTokenizer
from alpaca.text.loading import load_tokenizer

KINDS = ["the quick brown fox ", "a", " ", "🦙", "ก", "\n", "</s>", "x y\t", "ᎣᏏᏲ"]


@pytest.fixture(params=["sentencepiece", "hugging face"])
def tokenizer(request, llama_folder, monkeypatch):
    made = load_tokenizer(llama_folder) if request.param == "sentencepiece" else HuggingFaceTokenizer(llama_folder)
    made.num_read = 0
    encode_batch = made.encode_batch

    def counting(texts):
        made.num_read += sum(map(len, texts))
        return encode_batch(texts)

    monkeypatch.setattr(made, "encode_batch", counting)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast_rows(4)
def test_what_fits_is_tokenized_as_ever(tokenizer, kind):
    for num_characters in (0, 1, 500, 70_000):
        text = (kind * (num_characters // len(kind) + 1))[:num_characters]
        ids = tokenizer.encode(text)
        assert encode_within(tokenizer, text, len(ids)) == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_characters", [100_000, 3_000_000])
def test_of_what_cannot_fit_little_is_read(tokenizer, kind, num_characters):
    text = (kind * (num_characters // len(kind) + 1))[:num_characters]
    with pytest.raises(PromptTooLong, match=rf"{num_characters:,} characters long.* context is 512 tokens"):
        encode_within(tokenizer, text, 512)
    assert tokenizer.num_read <= 1 << 16


def test_a_long_text_of_short_tokens_is_refused_by_its_beginning(tokenizer):
    per_token = tokenizer.most_characters_per_token
    text = "🦙" * (30_000 * per_token)  # as many characters as might fit, of four tokens each
    with pytest.raises(PromptTooLong, match=r"of which the first 65,536 have over [\d,]+ tokens"):
        encode_within(tokenizer, text, 30_000)
    assert tokenizer.num_read == 1 << 16


def test_no_token_stands_for_more_characters_than_said(tokenizer):
    most = tokenizer.most_characters_per_token
    lengths = [len(tokenizer.decode([tokenizer.eos_id, i])) for i in range(tokenizer.base_size)]
    assert max(lengths) <= most <= 64
