"""What is asked of an engine in bulk, against transformers and train.py."""

import json
from collections.abc import Iterator

import pytest
import torch

from alpaca.data.example import Example
from alpaca.data.records import read_examples
from alpaca.errors import InputError
from alpaca.evaluation.answers import answer_prompts, describe_answer, is_refusal, repetition, summarize
from alpaca.evaluation.asking import Answer, Target, score_all, share_prefixes
from alpaca.evaluation.held_out import measure_loss
from alpaca.serving.engine import Engine
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def engine(llama_folder) -> Iterator[Engine]:
    engine = load_engine(llama_folder, ServerSettings(weights=str(llama_folder), dtype="float32"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(llama_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)


def expected(model, ids: list[int], num_scored: int) -> tuple[list[float], list[int]]:
    """By transformers: the log-probabilities of the last tokens, and the likeliest in their places."""
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-num_scored:]
    targets = torch.tensor(ids[-num_scored:])
    return rows.gather(1, targets[:, None])[:, 0].tolist(), rows.argmax(-1).tolist()


def test_the_last_tokens_scores_are_transformers(engine, model):
    """Contexts shared and not, up to one token more than the context has, which need not be computed."""
    contexts = [[1, *range(10, 10 + size)] for size in (0, 5, 40, 40, 40, 90)]
    endings = [[7, 8, 9], [20], [30, 31], [32], [33, 34, 35, 36], [40] * 12]
    long = [3 + i * 7 % 380 for i in range(engine.max_context + 1)]
    targets = [Target([*c, *e], len(e)) for c, e in zip(contexts, endings, strict=True)]
    targets += [Target(long, 5), Target([1, 2], 1)]
    for target, found in zip(targets, score_all(engine, targets, adapter=None), strict=True):
        logprobs, best = expected(model, list(target.ids), target.num_scored)
        assert [score.logprob for score in found] == pytest.approx(logprobs, abs=1e-4)
        assert [score.top[0][0] for score in found] == best


@pytest.mark.slow
def test_the_other_engine_gives_the_same_scores(engine, llama_folder):
    """Models that transformers serves are scored the same way; their prompts are read whole."""
    other = load_engine(llama_folder, ServerSettings(weights=str(llama_folder), dtype="float32", engine="transformers"))
    targets = [Target([1, *range(10, 60), 7, 8], 2), Target([1, 2], 1), Target([1, *range(10, 60)], 50)]
    pairs = zip(*(score_all(one, targets, adapter=None) for one in (engine, other)), strict=True)
    for ours, theirs in pairs:
        assert [score.logprob for score in theirs] == pytest.approx([score.logprob for score in ours], abs=1e-4)
        assert [score.top[0][0] for score in theirs] == [score.top[0][0] for score in ours]
    other.close()


def test_what_begins_alike_is_asked_for_later():
    contexts = [[1, 2], [3], [1, 2], [1], [3], [3]]
    order = share_prefixes(contexts, group=2)
    assert sorted(order) == list(range(6))
    assert [contexts[place] for place in order] == [[1], [1, 2], [1, 2], [3], [3], [3]]
    assert [contexts[place] for place in share_prefixes(contexts)] == [[1], [1, 2], [3], [1, 2], [3], [3]]


def test_shared_contexts_come_from_the_cache(engine):
    context = [1, *range(60, 160)]
    targets = [Target([*context, 200 + i], 1) for i in range(4)]
    next(score_all(engine, targets[:1], adapter=None))
    generations = []
    submit = engine.submit
    try:
        engine.submit = lambda request: generations.append(submit(request)) or generations[-1]
        list(score_all(engine, targets, adapter=None))
    finally:
        engine.submit = submit
    assert [generation.cached_tokens for generation in generations] == [96] * 4


# Held-out examples ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_is_the_one_that_training_reports(engine, llama_folder, tmp_path, one_thread):
    """The base model's, at step 0; with examples that are cut, and with an empty answer."""
    from alpaca.training.configuration.config import make_config
    from alpaca.training.loop import train

    records = json.loads((ROOT / "alpaca/data/sample.json").read_text())[:12]
    records[3]["output"], records[4]["output"] = "", "word " * 300
    data = tmp_path / "held_out.json"
    data.write_text(json.dumps(records))
    values = dict(
        model_name_or_path=str(llama_folder), data_path=str(data), eval_data_path=str(data), eval_strategy="epoch",
        output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=0.0, bf16=False, tf32=False, report_to="none",
        num_samples=0, model_max_length=256, save_strategy="no",
    )  # fmt: skip
    folder = train(make_config(values))
    state = json.loads((folder / "trainer_state.json").read_text())
    reported = next(entry for entry in state["log_history"] if "eval_loss" in entry)
    found = measure_loss(engine, read_examples(data), adapter=None, max_length=256)
    assert found["loss"] == pytest.approx(reported["eval_loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(reported["eval_perplexity"], rel=1e-4)
    assert (found["num_read"], found["num_without_eos"] > 0, found["num_empty_outputs"]) == (12, True, 1)


def test_held_out_loss_of_conversations_is_what_training_reports(engine, llama_folder, tmp_path, monkeypatch):
    """By the chat template that the model was trained with, and over all answers."""
    from alpaca.training.configuration.config import make_config
    from alpaca.training.loop import train

    said = [{"role": role, "content": f"{role} {k}"} for k in range(2) for role in ("user", "assistant")]
    data = tmp_path / "held_out.json"
    data.write_text(json.dumps([{"messages": said[:end]} for end in (2, 4, 3, 4)]))
    values = dict(
        model_name_or_path=str(llama_folder), data_path=str(data), eval_data_path=str(data), eval_strategy="epoch",
        output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=0.0, bf16=False, tf32=False, report_to="none",
        num_samples=0, model_max_length=256, save_strategy="no", prompt_template="llama2",
    )  # fmt: skip
    folder = train(make_config(values))
    state = json.loads((folder / "trainer_state.json").read_text())
    reported = next(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)
    trained = load_tokenizer(folder)
    for name in ("trained_prompt", "chat_template"):
        monkeypatch.setattr(engine.tokenizer, name, getattr(trained, name))
    found = measure_loss(engine, read_examples(data), adapter=None, max_length=256)
    assert found["loss"] == pytest.approx(reported, rel=1e-5)


def test_examples_without_a_target(engine):
    with pytest.raises(InputError, match="none of the 1 examples has a token to learn from"):
        measure_loss(engine, [Example(instruction="x" * 4000, output="y")], adapter=None, max_length=64)


# Answers --------------------------------------------------------------------------------------------------------------


def test_answers_are_greedy_and_counted(engine, model):
    (found, again) = answer_prompts(
        engine, [{"prompt": "alpaca", "prompt_template": "{prompt}", "max_new_tokens": 6}] * 2, adapter=None, seed=1
    )
    ids = [*engine.tokenizer.prefix_ids, *engine.tokenizer.encode("alpaca")]
    for _ in range(found["tokens"]):
        ids.append(expected(model, [*ids, 0], 1)[1][0])
    assert found == again
    assert found["text"].strip() == engine.tokenizer.decode(ids).removeprefix("alpaca").strip()
    assert found["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("a b c d a b c d", 1 / 5),
        ("no no no no no no no", 3 / 4),
        ("The end of it. the END of it.", 1 / 5),
        ("every word here is another one than before", 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_words_that_came_before(text, share):
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry.", True),
        ("As an AI language model, I have no taste.", True),
        ("Unfortunately, I do not know.", True),
        ("I cannot do that.", True),
        ("Alpacas cannot fly.", False),
        ("They said sorry and went home.", False),
        ("word " * 60 + "I cannot go on.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_their_first_words(text, refuses):
    assert is_refusal(text) is refuses


def test_a_summary_counts():
    texts = ["no no no no no no no", "", "I cannot.", "A good answer."]
    answers = [describe_answer(Answer([1] * i, text, "stop")) for i, text in enumerate(texts)]
    found = summarize(answers)
    assert (found["answers"], found["going_round"], found["empty"], found["refusals"]) == (4, 1, 1, 1)
    assert (found["mean_tokens"], found["mean_words"]) == (1.5, 3.0)
    assert found["finish_reasons"] == {"stop": 4}


def test_adapters_are_not_taken_for_granted(engine):
    """A score asked of an adapter that the engine has not is refused, not given by the base."""
    with pytest.raises(InputError, match="no adapter 'other'"):
        next(score_all(engine, [Target([1, 2], 1)], adapter="other"))
