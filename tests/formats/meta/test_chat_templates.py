"""Chat and Instruct releases arrive with their format of conversations, base models without one."""

import json

import pytest

from alpaca.errors import InputError
from alpaca.text.chat.prompt import encode_chat
from alpaca.text.loading import load_tokenizer
from tests.formats.meta_sources import FAMILIES, random_model, run, write
from tests.text.chat.conversations import conversations

FLAGS_OF_2 = ("--llama_version", "2")


def llama_2_chat(messages: list[dict], bos: list[int], eos: list[int], encode) -> list[int]:
    """As Meta's llama/generation.py has it: each exchange is tokenized by itself, between BOS and EOS."""
    messages = [dict(message) for message in messages]
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        messages[0]["content"] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{messages[0]['content']}"
    ids: list[int] = []
    for at in range(0, len(messages) - 1, 2):
        asked, answered = (message["content"].strip() for message in messages[at : at + 2])
        ids += [*bos, *encode(f"[INST] {asked} [/INST] {answered} "), *eos]
    return [*ids, *bos, *encode(f"[INST] {messages[-1]['content'].strip()} [/INST]")]


def llama_3_instruct(messages: list[dict], special, encode) -> list[int]:
    """As Meta's llama3/chat_format.py has it: headers and contents are tokenized by themselves."""
    ids = [special("<|begin_of_text|>")]
    for message in [*messages, {"role": "assistant"}]:
        ids += [special("<|start_header_id|>"), *encode(message["role"]), special("<|end_header_id|>")]
        if "content" not in message:
            return [*ids, *encode("\n\n")]
        ids += [*encode("\n\n" + message["content"].strip()), special("<|eot_id|>")]
    raise AssertionError


def convert(tmp_path, tokenizers, family_name: str, folder: str, *flags: str):
    family = FAMILIES[family_name]
    tokenizer, vocab_size = tokenizers[family.has_tiktoken]
    write(tmp_path / "in" / folder, family, [random_model(family, vocab_size)], tokenizer)
    return run(tmp_path, *flags)


@pytest.mark.parametrize(("folder", "flags"), [("llama-2-chat", []), ("T", ["--instruct"])])
def test_llama_2_chats_format(tmp_path, tokenizers, folder, flags):
    model = convert(tmp_path, tokenizers, "LLaMA 2 70B", folder, *FLAGS_OF_2, *flags)
    tokenizer = load_tokenizer(model)
    for messages in conversations(60, seed="llama 2", further=("</s>", "<s>", "[/INST]", "<<SYS>>")):
        expected = llama_2_chat(messages, [tokenizer.bos_id], [tokenizer.eos_id], tokenizer.encode)
        assert encode_chat(messages, tokenizer, tokenizer.chat_template, 10_000) == expected
    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    for wrong in ([assistant], [user, user], [user, assistant, assistant], [user, {**user, "role": "system"}]):
        with pytest.raises(InputError, match="roles must alternate: user, assistant, user and so on"):
            encode_chat(wrong, tokenizer, tokenizer.chat_template, 10_000)
    copied = (tmp_path / "out" / "tokenizer" / "chat_template.jinja").read_bytes()
    assert copied == (model / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize("name", ["Llama 3", "Llama 3.1", "Llama 3.2"])
def test_llama_3_instructs_format(tmp_path, tokenizers, name):
    model = convert(tmp_path, tokenizers, name, "Meta-Llama-Instruct")
    tokenizer = load_tokenizer(model)
    for messages in conversations(60, seed=name, further=("<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>")):
        expected = llama_3_instruct(messages, tokenizer.special_id, tokenizer.encode)
        assert encode_chat(messages, tokenizer, tokenizer.chat_template, 10_000) == expected
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.special_id("<|eot_id|>") in ends


def test_transformers_renders_them_alike(tmp_path, tokenizers):
    from transformers import AutoTokenizer

    for number, (name, flags) in enumerate([("LLaMA 2 70B", FLAGS_OF_2), ("Llama 3.1", ())]):
        model = convert(tmp_path / str(number), tokenizers, name, "x-chat-instruct", *flags)
        ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(model)
        for messages in conversations(20, seed=name):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert encode_chat(messages, ours, ours.chat_template, 10_000) == expected


@pytest.mark.parametrize(
    ("name", "folder", "flags"),
    [("LLaMA 2 70B", "B-chat", []), ("LLaMA 2 70B", "llama-2-b", FLAGS_OF_2), ("Llama 3.1", "Llama3.1-B", [])],
)
def test_base_models_have_none(tmp_path, tokenizers, name, folder, flags):
    model = convert(tmp_path, tokenizers, name, folder, *flags)
    assert not list(tmp_path.rglob("chat_template.jinja"))
    assert load_tokenizer(model).chat_template is None
