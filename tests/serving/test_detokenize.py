"""Text as it comes: whole characters, exactly the text, stop strings never show."""

import random

import pytest

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.stops import StopTexts
from alpaca.text.hugging_face import HuggingFaceTokenizer
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import write_llama_tokenizer

TEXTS = [
    "Hello there", " two  spaces ", "รามาเกียรติ์ เป็นวรรณคดี", "🦙👩‍👩‍👧 and 🇵🇪", "a\n\n### b\n",
    "é ﬁ", "", "   ", "x" * 50,
]  # fmt: skip


@pytest.fixture(scope="module", params=["sentencepiece", "hugging face"])
def tokenizer(request, llama_folder):
    return load_tokenizer(llama_folder) if request.param == "sentencepiece" else HuggingFaceTokenizer(llama_folder)


def pieces_of(tokenizer, ids, prompt_ids=(1,), **options) -> list[str]:
    text = CompletionText(tokenizer, prompt_ids, **options)
    pieces = []
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            break
    return [*pieces, text.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_never_break_a_character(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_continuation_is_what_follows_the_prompt(tokenizer, text):
    prompt = (1, *tokenizer.encode("Prompt:"))
    assert "".join(pieces_of(tokenizer, tokenizer.encode("Prompt:" + text)[len(prompt) - 1 :], prompt)) == text


def test_leading_space_is_dropped_where_asked(tokenizer):
    ids, prompt = tokenizer.encode("   \n word  x "), (1, *tokenizer.encode("Prompt:"))
    assert "".join(pieces_of(tokenizer, ids, prompt, strip_leading=True)) == "word  x "
    assert "".join(pieces_of(tokenizer, tokenizer.encode("   "), prompt, strip_leading=True)) == ""


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["###"], "one two "),
        (["# three", "###"], "one two "),
        (["two", "one two"], ""),
        (["three\n"], "one two ### "),
        (["wo ###"], "one t"),
        (["### threes"], "one two ### three\nfour ##"),
        (["######"], "one two ### three\nfour ##"),
        (["####", "## four"], "one two ### three\nfour ##"),
        (["r ##"], "one two ### three\nfou"),
    ],
)
def test_stop_strings_never_show_and_nothing_else_is_lost(tokenizer, stop, expected):
    ids = tokenizer.encode("one two ### three\nfour ##")
    pieces = pieces_of(tokenizer, ids, stop=stop)
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:  # at no moment has a client seen more than the final text
        shown += piece
        assert expected.startswith(shown)


def test_nothing_comes_after_a_stop(tokenizer):
    text = CompletionText(tokenizer, (1,), stop=["b"])
    for token_id in tokenizer.encode("a b c"):
        text.push(token_id)
    assert text.stopped
    assert (text.push(tokenizer.encode("d")[0]), text.finish()) == ("", "")


def test_special_tokens_are_no_text(tokenizer):
    assert "".join(pieces_of(tokenizer, [1, *tokenizer.encode("a"), 2])) == "a"


@pytest.fixture(scope="module", params=["sentencepiece", "hugging face"])
def chat_tokenizer(request, llama_folder, tmp_path_factory):
    """With the tokens of a chat after the vocabulary: ids 400 and 401."""
    folder = tmp_path_factory.mktemp("chat")
    size = load_tokenizer(llama_folder).size
    added = {"<|im_end|>": size, "<|im_start|>": size + 1}
    write_llama_tokenizer(llama_folder / "tokenizer.model", folder, added=added)
    return load_tokenizer(folder) if request.param == "sentencepiece" else HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("stop", [["<|im_end|>"], ["never", "<|im_end|>"], ["</s>", "<|im_end|>", "<|im_start|>"]])
def test_a_stop_text_that_names_a_special_token_stops_at_its_id(chat_tokenizer, stop):
    end = chat_tokenizer.special_id("<|im_end|>")
    text = CompletionText(chat_tokenizer, (1,), stop=stop)
    ids = [*chat_tokenizer.encode("good day <"), end, *chat_tokenizer.encode("more")]
    pieces = []
    while not text.stopped:
        pieces.append(text.push(ids.pop(0)))
    assert "".join(pieces) == "good day <"  # what could have been the beginning of the stop text is given out
    assert (text.push(ids[0]), text.finish()) == ("", "")
    assert len(ids) == len(chat_tokenizer.encode("more"))


def test_other_special_tokens_do_not_stop_and_never_show(chat_tokenizer):
    start, end = map(chat_tokenizer.special_id, ("<|im_start|>", "<|im_end|>"))
    ids = [*chat_tokenizer.encode("a"), start, *chat_tokenizer.encode("b"), end]
    pieces = pieces_of(chat_tokenizer, ids, stop=["<|im_start"])
    assert "".join(pieces) == "a b"


def test_a_stop_text_written_out_stops_too(chat_tokenizer):
    ids = chat_tokenizer.encode("a<|im_end|>b")
    assert chat_tokenizer.special_id("<|im_end|>") not in ids
    assert "".join(pieces_of(chat_tokenizer, ids, stop=["<|im_end|>"])) == "a"


@pytest.mark.parametrize("prompt", ["", "say"])
def test_a_space_after_a_hidden_special_token_is_kept(chat_tokenizer, prompt):
    start, word = chat_tokenizer.special_id("<|im_start|>"), chat_tokenizer.encode("word")
    prompt_ids = [1, *chat_tokenizer.encode(prompt), start]
    shown = "".join(pieces_of(chat_tokenizer, [*word, start, start, *word, 2], prompt_ids))
    assert shown == (" word word" if prompt else "word word")


@pytest.mark.parametrize("prompt", ["ᎣᏏᏲ", "ខ្ញុំ", "ሰላም", "x🦙", "ก" * 40, "\ufffd\ufffd\ufffd", "한국어 ሰ"])
@pytest.mark.parametrize("answer", ["Ꭳ", "ឋ", "🦙🦙", " x ሰ", "\n"])
def test_a_prompt_in_a_script_without_tokens_is_continued_readably(tokenizer, prompt, answer):
    ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer)
    assert whole[: len(ids)] == ids
    pieces = pieces_of(tokenizer, whole[len(ids) :], [1, *ids])
    assert "".join(pieces) == answer
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(list(filter(None, pieces))) >= len(answer.strip())  # each character as soon as it is whole


def cut(text: str, stop: list[str]) -> str:
    """`text` before the stop text that ends first, and of several before the longest."""
    ends = [(end, -len(s)) for end in range(len(text) + 1) for s in stop if text[:end].endswith(s)]
    end, minus_length = min(ends, default=(len(text), 0))
    return text[: end + minus_length]


@pytest.mark.parametrize("alphabet", ["ab c\n#", "ab"])
def test_random_stops_equal_cutting_the_whole_text(tokenizer, alphabet):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(30))
        stop = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
        pieces = pieces_of(tokenizer, tokenizer.encode(text), stop=stop)
        assert "".join(pieces) == cut(text, stop), (text, stop)


def test_what_is_held_back_is_what_a_stop_text_may_begin_with(tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        text, stop = "".join(rng.choice("ab") for _ in range(20)), ["abab", "bbb", "aabba"]
        shown = CompletionText(tokenizer, (1,), stop=stop)
        given, ids = "", tokenizer.encode(text)
        for read in range(1, len(ids) + 1):
            given += shown.push(ids[read - 1])
            if shown.stopped:
                break
            so_far = tokenizer.decode(ids[:read])
            ends = [so_far[len(so_far) - n :] for n in range(min(6, len(so_far) + 1))]
            held = max(len(end) for end in ends if any(s.startswith(end) for s in stop))
            assert given == so_far[: len(so_far) - held]


def test_many_stops_cost_no_more_than_one(tokenizer):
    """Steps are counted, not seconds: each character is read once, and each falls back at most as often as it rose."""
    stops = StopTexts(f"{'a' * (number % 200)}{number}" for number in range(2000))
    num_steps = 0

    class Counted(dict):
        def __contains__(self, key: object) -> bool:
            nonlocal num_steps
            num_steps += 1
            return super().__contains__(key)

    stops._next = [Counted(state) for state in stops._next]
    state, text = 0, "aab1" * 500 + "a" * 3000
    for character in text:
        state = stops.step(state, character)
    assert 0 < num_steps <= 2 * len(text)
