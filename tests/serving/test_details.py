"""Documents say what the texts say; those of a stream, put together, are the one of the whole answer."""

import json
import random

import pytest

from alpaca.serving.details import complete_details, stream_details
from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import Generation, TokenScore, complete_texts
from alpaca.text.loading import load_tokenizer
from alpaca.text.tokenizer import Tokenizer
from tests.serving.llama.test_llama_engine import request

PROMPT = (1, 100)


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json", "bytes"])
def tokenizer(request, llama_folder, tmp_path_factory) -> Tokenizer:
    """SentencePiece's, the same by `tokenizers`, and one of a vocabulary over bytes."""
    own = load_tokenizer(llama_folder)
    if request.param == "tokenizer.model":
        return own
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "tokenizer.json":
        own.save(folder)
        (folder / "tokenizer.model").unlink()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return load_tokenizer(folder)
    return save_bytes_tokenizer(folder)


def save_bytes_tokenizer(folder) -> Tokenizer:
    """Byte-level, with few merges, so that most characters beyond ASCII take several tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["an alpaca and a llama walk and walk"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return load_tokenizer(folder)


def answer(tokenizer: Tokenizer, rows: list[list[int]], *, sends: int | None = None, **changes) -> Generation:
    """A generation whose engine has given these tokens: all at once, or `sends` at a time."""
    made = request(prompt_ids=PROMPT, n=len(rows), reads_along=sends is not None, **{"logprobs": 1, **changes})
    generation = Generation(made)
    generation.prompt_scores = [TokenScore(-2.5, ((5, -0.5),))] if made.echo else []
    generation.start()
    for completion, ids in enumerate(rows):
        for place, token_id in enumerate(ids):
            score = None if made.logprobs is None else TokenScore(-place / 8, ((token_id, -place / 8),))
            generation.put_token(completion, token_id, score)
            if sends and place % sends == sends - 1:
                generation.flush()
        generation.finish(completion, at_limit=completion == 0)
    generation.flush()
    return generation


def read(documents) -> list[dict]:
    return [json.loads(document) for document in documents]


def texts(tokenizer: Tokenizer, count: int, **options) -> list[CompletionText]:
    return [CompletionText(tokenizer, PROMPT, **options) for _ in range(count)]


def test_a_document_of_each_completion(tokenizer):
    rows = [tokenizer.encode("an alpaca"), tokenizer.encode("a llama 🦙 walks")]
    (first, second) = read(complete_details(answer(tokenizer, rows), texts(tokenizer, 2), tokenizer))
    plain = list(complete_texts(answer(tokenizer, rows), texts(tokenizer, 2)))
    assert [first["text"], second["text"]] == plain
    assert {name: value for name, value in first.items() if name not in ("text", "logprobs")} == {
        "index": 0, "finish_reason": "length", "stop": None, "prompt_tokens": 2, "output_tokens": len(rows[0]),
        "seed": 3,
    }  # fmt: skip
    assert (second["index"], second["finish_reason"], second["output_tokens"]) == (1, "stop", len(rows[1]))
    for document, ids in zip((first, second), rows, strict=True):
        assert [entry["id"] for entry in document["logprobs"]] == ids
        assert [entry["logprob"] for entry in document["logprobs"]] == [-place / 8 for place in range(len(ids))]
        for entry in document["logprobs"]:
            assert entry["top"] == [{name: entry[name] for name in ("id", "text", "bytes", "logprob")}]
        joined = b"".join(bytes(entry["bytes"]) for entry in document["logprobs"])
        assert joined.decode() == document["text"]


def test_what_is_not_asked_for_is_not_there(tokenizer):
    ids = tokenizer.encode("an alpaca")
    (document,) = read(complete_details(answer(tokenizer, [ids], logprobs=None), texts(tokenizer, 1), tokenizer))
    assert list(document) == ["index", "text", "finish_reason", "stop", "prompt_tokens", "output_tokens", "seed"]
    (document,) = read(complete_details(answer(tokenizer, [ids], logprobs=0), texts(tokenizer, 1), tokenizer))
    assert "prompt_logprobs" not in document


def test_a_character_of_several_tokens_has_its_bytes_in_them(tokenizer):
    ids = tokenizer.encode("🦙é")
    (document,) = read(complete_details(answer(tokenizer, [ids]), texts(tokenizer, 1), tokenizer))
    pieces = [bytes(entry["bytes"]) for entry in document["logprobs"]]
    assert b"".join(pieces).decode().strip() == "🦙é"
    for entry, piece in zip(document["logprobs"], pieces, strict=True):
        assert entry["text"] == piece.decode(errors="replace")
    if tokenizer.size == 300:
        assert len(pieces) == 6  # one a byte
        assert document["logprobs"][0]["text"] == "\ufffd"


def test_the_prompts_tokens_begin_with_one_that_nothing_precedes(tokenizer):
    generation = answer(tokenizer, [tokenizer.encode("an")], echo=True)
    (document,) = read(complete_details(generation, texts(tokenizer, 1), tokenizer))
    first, second = document["prompt_logprobs"]
    assert first == {"id": 1, "text": "", "bytes": [], "logprob": None, "top": []}
    assert (second["id"], second["logprob"]) == (100, -2.5)
    assert [(entry["id"], entry["logprob"]) for entry in second["top"]] == [(5, -0.5)]


def test_json_has_no_infinity(tokenizer):
    generation = Generation(request(prompt_ids=PROMPT, logprobs=1))
    generation.put_token(0, 100, TokenScore(-0.5, ((101, float("-inf")),)))
    generation.finish(0, at_limit=True)
    generation.flush()
    (document,) = read(complete_details(generation, texts(tokenizer, 1), tokenizer))
    assert document["logprobs"][0]["top"][0]["logprob"] == -9999.0


@pytest.mark.parametrize("stop", [[], ["alpaca"], ["🦙"], ["wa"], ["l", " walk"], ["zzz"], ["é and"]])
@pytest.mark.parametrize("strip_leading", [False, True])
def test_a_streams_documents_are_the_whole_answers(tokenizer, stop, strip_leading):
    ids = tokenizer.encode("  an alpacé and alpaca 🦙🦙 walk é")
    options = {"stop": stop, "strip_leading": strip_leading}
    (whole,) = read(complete_details(answer(tokenizer, [ids], echo=True), texts(tokenizer, 1, **options), tokenizer))
    (plain,) = complete_texts(answer(tokenizer, [ids]), texts(tokenizer, 1, **options))
    assert whole["text"] == plain
    assert whole["stop"] == next(
        (text for text in stop if text not in plain and whole["finish_reason"] == "stop"), None
    )
    for sends in (1, 2, 5, 100):
        generation = answer(tokenizer, [ids], echo=True, sends=sends)
        pieces = read(stream_details(generation, texts(tokenizer, 1, **options)[0], tokenizer))
        assert {piece["index"] for piece in pieces} == {0}
        assert all(piece["text"] for piece in pieces[:-1])
        assert all("finish_reason" not in piece for piece in pieces[:-1])
        assert ["prompt_logprobs" in piece for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        joined = {
            **pieces[0], **pieces[-1],
            "text": "".join(piece["text"] for piece in pieces),
            "logprobs": [entry for piece in pieces for entry in piece["logprobs"]],
        }  # fmt: skip
        assert joined == whole
        assert generation.metrics()["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_text_cuts_the_tokens_that_begin_behind_it(tokenizer, seed):
    """Against a slow rule: a token is listed if its text begins before the end of the whole text without the stop."""
    chance = random.Random(seed)
    text = "an alpaca 🦙 and é llama walk and walk"
    ids = tokenizer.encode(text)
    pieces = [tokenizer.bytes_inside(token_id) for token_id in ids]
    whole = b"".join(pieces)
    for _ in range(20):
        start = chance.randrange(1, len(text) - 4)
        stop = text[start : start + chance.randint(1, 4)]
        made = CompletionText(tokenizer, PROMPT, stop=[stop])
        (document,) = read(complete_details(answer(tokenizer, [ids]), [made], tokenizer))
        cut = whole.index(stop.encode())
        assert document["text"].encode() == whole[:cut]
        starts = [sum(map(len, pieces[:place])) for place in range(len(ids))]
        # A character counts where its first byte is: its other tokens begin where it does.
        begins = [len(whole[:at].decode(errors="ignore").encode()) for at in starts]
        assert [entry["id"] for entry in document["logprobs"]] == [
            token_id for token_id, at in zip(ids, begins, strict=True) if at < cut
        ]
        assert (document["finish_reason"], document["stop"]) == ("stop", stop)


def test_a_special_token_that_is_a_stop_text_is_not_part_of_the_answer(tokenizer):
    ids = tokenizer.encode("an alpaca")
    generation = answer(tokenizer, [[*ids, 1, 100]])
    (document,) = read(complete_details(generation, texts(tokenizer, 1, stop=["<s>"]), tokenizer))
    assert [entry["id"] for entry in document["logprobs"]] == ids
    assert (document["finish_reason"], document["stop"], document["output_tokens"]) == ("stop", "<s>", len(ids) + 1)


def test_reasons_are_in_order_of_the_completions(tokenizer):
    ids = tokenizer.encode("an alpaca")
    generation = answer(tokenizer, [ids, ids, tokenizer.encode("walk")], limit="context")
    assert "finish_reason" not in generation.metrics()
    list(complete_texts(generation, texts(tokenizer, 3)))
    assert generation.metrics()["finish_reason"] == ["context", "stop", "stop"]
    generation = answer(tokenizer, [ids], limit="context")
    list(complete_texts(generation, texts(tokenizer, 1)))
    assert generation.metrics()["finish_reason"] == "context"
