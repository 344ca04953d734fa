"""Where an answer ends and what it shows, through both engines, on models that say a chain of tokens by heart."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import complete_texts
from alpaca.serving.loading import load_engine
from alpaca.serving.request import PredictionInputs, make_request
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer
from alpaca.text.tokenizer import Tokenizer
from tests.tiny import train_tokenizer

NUM_PIECES, NUM_ROWS = 400, 412
END, START, TOOL, UNLISTED = 400, 401, 402, 411
ADDED = {
    str(token_id): {"content": content, "special": special, **dict.fromkeys(["lstrip", "rstrip", "normalized"], False)}
    for token_id, content, special in [
        (END, "<|im_end|>", True),
        (START, "<|im_start|>", True),
        (TOOL, "<tool>", False),
    ]
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("source"), vocab_size=NUM_PIECES)


def save_model(folder: Path, *saying: int) -> None:
    """A LLaMA whose next token follows from the last one alone: each id of `saying` by the next."""
    config = LlamaConfig(
        vocab_size=NUM_ROWS, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.zero_()
        for axis, (token_id, after) in enumerate(pairwise(saying)):
            model.get_input_embeddings().weight[token_id, axis] = 1
            model.lm_head.weight[after, axis] = 4
    model.save_pretrained(folder)


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def folder(request, tmp_path, model_file) -> Path:
    shutil.copy(model_file, tmp_path)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **roles, "add_bos_token": True, "added_tokens_decoder": ADDED}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if request.param == "tokenizer.json":
        load_tokenizer(tmp_path).save(tmp_path)
        (tmp_path / "tokenizer.model").unlink()
    return tmp_path


@pytest.fixture(params=["llama", "transformers"])
def ask(request, folder):
    engines = []

    def ask(prompt: str, *, stop: Sequence[str] = ()) -> tuple[str, dict[str, int | float]]:
        engine = load_engine(folder, ServerSettings(engine=request.param, memory_fraction=0.02))
        engines.append(engine)
        inputs = PredictionInputs(
            prompt=prompt, prompt_template="{prompt}", temperature=0, max_new_tokens=12, stop=tuple(stop)
        )
        made = make_request(inputs, engine.tokenizer, max_context=engine.max_context)
        generation = engine.submit(made)
        (text,) = complete_texts(generation, [CompletionText(engine.tokenizer, made.prompt_ids, stop=inputs.stop)])
        return text, generation.metrics()

    yield ask
    for engine in engines:
        engine.close()


def words(folder: Path) -> tuple[Tokenizer, list[int], list[int]]:
    """A prompt, and an answer that has no token of it."""
    tokenizer = load_tokenizer(folder)
    prompt, answer = tokenizer.encode("Red"), tokenizer.encode("alpaca")
    assert not set(prompt[-1:]) & set(answer)
    assert len(set(answer)) == len(answer)
    return tokenizer, prompt, answer


@pytest.mark.parametrize("end", [END, UNLISTED])
def test_an_end_token_after_the_vocabulary_ends_the_answer(folder, ask, end):
    """UNLISTED has a row in the model and no token in the tokenizer's files; generation_config.json alone names it."""
    _, prompt, answer = words(folder)
    save_model(folder, prompt[-1], *answer, end, START, answer[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    text, metrics = ask("Red")
    assert (text, metrics["output_tokens"]) == (" alpaca", len(answer))


def test_a_stop_text_ends_the_answer_at_the_token_of_that_name(folder, ask):
    _, prompt, answer = words(folder)
    save_model(folder, prompt[-1], *answer, START, answer[0])
    assert ask("Red", stop=["<|im_start|>"])[0] == " alpaca"
    assert ask("Red")[0].startswith(" alpaca alpaca")  # hidden, and the space after it is kept


def test_an_ordinary_added_token_is_one_token_of_a_prompt_and_shows_in_the_answer(folder, ask):
    _, _, answer = words(folder)
    save_model(folder, TOOL, *answer, TOOL, END)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    text, metrics = ask("Red <tool>")
    expected = AutoTokenizer.from_pretrained(folder)("Red <tool>")["input_ids"]
    assert expected[-1] == TOOL
    assert metrics["prompt_tokens"] == len(expected)
    assert text.startswith(" alpaca<tool> alpaca<tool>")
