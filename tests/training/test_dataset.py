"""The data of a run: several sets with weights, the prompt they are laid out by, and that the server asks by it."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.data.encoding.choosing import choose_layout
from alpaca.data.example import Conversation, Example, Turn
from alpaca.errors import InputError
from alpaca.formats.hf.export import export
from alpaca.serving.request import AdapterNames, PredictionInputs, make_request
from alpaca.serving.served_model import adapter_names, open_served_model
from alpaca.serving.settings import ServerSettings
from alpaca.text.chat.trained_prompt import CHAT, read_trained_prompt, write_trained_prompt
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import write_llama_tokenizer
from alpaca.training.configuration.flags import parse_flags
from alpaca.training.configuration.resolving import resolve_settings
from alpaca.training.dataset import encode_data, parse_sources
from alpaca.training.loop import train
from convert.export_hf_checkpoint import parse_arguments


def write(path: Path, records: object) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def talk(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_sources_and_their_weights(tmp_path: Path):
    strange = write(tmp_path / "a,b=2", [])
    assert parse_sources(strange) == [(strange, 1.0)]
    assert parse_sources("a.json,b.json=2,c/d=0.25") == [("a.json", 1.0), ("b.json", 2.0), ("c/d", 0.25)]
    for wrong in ("a.json,", "a.json=0", "a.json=5000"):
        with pytest.raises(InputError, match=r"expected PATH or PATH=WEIGHT between commas"):
            parse_sources(wrong)


def test_the_flag_may_be_given_more_than_once():
    given = parse_flags(["--model_name_or_path", "m", "--data_path", "a.json=2", "--data_path=b.json"])
    assert given.data_path == "a.json=2,b.json"


@pytest.fixture
def encode(configure, tiny_llama):
    """Encode what a configuration says, with the tiny LLaMA's tokenizer."""

    def run(**values: object):
        return encode_data(
            resolve_settings(configure(**values), num_processes=1, device=torch.device("cpu")).data,
            load_tokenizer(tiny_llama),
            progress=False,
        )

    return run


def texts(dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(dataset.example(index)[0].tolist()) for index in range(len(dataset))]


def test_weights_say_how_often_an_example_occurs(encode, tmp_path, tiny_llama):
    first = write(tmp_path / "a.json", [{"instruction": f"a{k}", "output": "x"} for k in range(10)])
    second = write(tmp_path / "b.json", [{"prompt": f"b{k}", "completion": "x"} for k in range(8)])
    data = encode(data_path=f"{first}=2,{second}=0.5")
    found = texts(data.train, load_tokenizer(tiny_llama))
    assert [sum(f"a{k}\n" in text for text in found) for k in range(10)] == [2] * 10
    halves = [sum(text.startswith(f"b{k}") for text in found) for k in range(8)]
    assert sorted(halves) == [0] * 4 + [1] * 4
    assert texts(encode(data_path=f"{first}=2,{second}=0.5").train, load_tokenizer(tiny_llama)) == found


def test_held_out_examples_are_in_no_copy(encode, tmp_path, tiny_llama):
    path = write(tmp_path / "a.json", [{"instruction": f"a{k}", "output": "x"} for k in range(10)])
    data = encode(data_path=f"{path}=3", val_set_size=3)
    tokenizer = load_tokenizer(tiny_llama)
    held_out = set(texts(data.held_out, tokenizer))
    assert len(held_out) == 3
    assert len(data.train) == 21
    assert not held_out & set(texts(data.train, tokenizer))


def test_the_format_is_said_and_the_seam_counted(encode, tmp_path, caplog):
    path = write(tmp_path / "a.json", [talk("Name a bird.", "A condor.")] * 3)
    with caplog.at_level(logging.INFO):
        encode(data_path=path)
    assert f"{path}: read as messages (OpenAI's): messages, a list of turns with role and content" in caplog.messages
    assert "examples are laid out by the Alpaca prompt; prompts that have a completion as they are" in caplog.messages


@pytest.mark.parametrize(
    ("flags", "served"),
    [
        ({"prompt_template": "llama2"}, CHAT),
        ({"prompt_template": "alpaca_newline"}, "alpaca_newline"),
        ({"prompt_template": "Q: {prompt}\nA:"}, "Q: {prompt}\nA:"),
        ({}, None),
        ({"prompt_template": "llama2", "method": "lora"}, CHAT),
    ],
    ids=["llama2", "line feed", "own", "Alpaca's", "adapter"],
)
def test_a_model_is_asked_by_the_prompt_it_was_trained_with(configure, tmp_path, tiny_llama, flags, served):
    """What the server sends for an instruction is, token by token, what stood before the answer in training."""
    path = write(tmp_path / "talks.json", [talk("Name a bird.", "A condor.")] * 8)
    config = configure(data_path=path, max_steps=1, **flags)
    train(config)
    out = tmp_path / "out"
    assert read_trained_prompt(out) == served

    layout = choose_layout(config.prompt_template, [], load_tokenizer(tiny_llama)).layout
    turns = (Turn("user", "Name a bird."), Turn("assistant", "A condor.", is_trained=True))
    (row,) = layout.encode([Conversation(turns)])
    if "method" in flags:
        opened = open_served_model(out, ServerSettings(base_model=str(tiny_llama)))
        tokenizer, adapters = load_tokenizer(opened.base), adapter_names(opened.adapters)
    else:
        tokenizer, adapters = load_tokenizer(out), AdapterNames()
    asked = PredictionInputs(prompt="Name a bird.")
    made = make_request(asked, tokenizer, max_context=256, adapters=adapters)
    assert list(made.prompt_ids) == row.ids[: row.spans[0][0]]


def test_an_adapter_of_another_prompt_than_its_bases_says_so(configure, tmp_path, tiny_llama):
    """Else it would be asked by the base's."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    write_trained_prompt(base, "alpaca_newline")
    folder = train(configure(model_name_or_path=str(base), max_steps=1, method="lora"))
    assert read_trained_prompt(folder) == "alpaca"
    opened = open_served_model(folder, ServerSettings(base_model=str(base)))
    made = make_request(
        PredictionInputs(prompt="Hi."),
        load_tokenizer(opened.base),
        max_context=256,
        adapters=adapter_names(opened.adapters),
    )
    assert load_tokenizer(base).decode(made.prompt_ids).endswith("### Response:")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_token_that_ends_a_turn_ends_an_answer(
    configure, tmp_path, tiny_llama, sentencepiece_model, caplog, method
):
    """Also where the base's configs do not name it: in the trained folder, and in what an adapter is merged to."""
    base, template = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    size = load_tokenizer(base).size
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(size + 1)
    model.save_pretrained(base)
    write_llama_tokenizer(sentencepiece_model, base, added={"<turn>": size})
    path = write(tmp_path / "talks.json", [talk("Name a bird.", "A condor.")] * 8)
    values = dict(model_name_or_path=str(base), data_path=path, max_steps=2, prompt_template=str(template))
    with caplog.at_level(logging.WARNING):
        folder = train(configure(**values, method=method))
    if method == "lora":
        assert "answers of this adapter end with '<turn>', which the base's configs do not name as EOS" in caplog.text
        merged = tmp_path / "merged"
        export(parse_arguments(["--adapter", str(folder), "--base_model", str(base), "--output_dir", str(merged)]))
        assert read_trained_prompt(merged) == CHAT
        folder = merged
    tokenizer = load_tokenizer(folder)
    ends = read_eos_ids(folder, tokenizer, vocab_size=tokenizer.size)
    assert tokenizer.special_id("<turn>") in ends
    assert tokenizer.eos_id in ends


def test_split_prompts_end_in_their_own_last_token(tiny_llama):
    """Trained apart, the prompt's tokens are those that the server sends, whatever the answer begins with."""
    tokenizer = load_tokenizer(tiny_llama)
    layout = choose_layout("alpaca", [], tokenizer, boundary="split").layout
    examples = [Example("Smile.", answer) for answer in (")", ": x", " \n", "", "été", "a")]
    asked = make_request(PredictionInputs(prompt="Smile."), tokenizer, max_context=256)
    for example, row in zip(examples, layout.encode(examples), strict=True):
        ((start, end),) = row.spans
        assert row.ids[:start] == list(asked.prompt_ids)
        assert tokenizer.decode(row.ids).endswith(f"Response:{example.output}")
        assert end == len(row.ids)


BAD = {
    "unknown": ("chatlm", r"--prompt_template: expected one of auto, alpaca, .*found 'chatlm'"),
    "tokens": ("llama3", r"tokenizer has no control token <\|start_header_id\|>, .*learnt as plain text"),
    "no template": ("model", r"this model has no chat template"),
    "missing file": ("nothing.jinja", r"nothing\.jinja cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_templates_that_cannot_be_used(tiny_llama, kind):
    asked, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        choose_layout(asked, [], load_tokenizer(tiny_llama))


def test_a_chat_template_has_no_boundary_to_split(tiny_llama):
    with pytest.raises(InputError, match=r"--prompt_boundary split is for prompt templates"):
        choose_layout("llama2", [], load_tokenizer(tiny_llama), boundary="split")
