"""Conversations as tokens: which of them carry loss, against another way to find it, and templates of every kind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca.data.encoding.chat_layout import ChatLayout
from alpaca.data.encoding.choosing import choose_layout
from alpaca.data.encoding.layout import Row
from alpaca.data.example import Completion, Conversation, Example, Turn
from alpaca.errors import InputError
from alpaca.text.chat.files import ChatTemplate, known_template
from alpaca.text.chat.prompt import encode_chat
from alpaca.text.loading import load_tokenizer
from tests.text.chat.conversations import TEMPLATES, conversations
from tests.text.chat.test_chat_ids import KINDS

Part = tuple[str, bool]  # a piece of the text, and whether it carries loss


def chatml(turns: list[dict]) -> list[Part]:
    parts = []
    for turn in turns:
        parts += [
            (f"<|im_start|>{turn['role']}\n", False),
            (f"{turn['content']}<|im_end|>", is_answer(turn)),
            ("\n", False),
        ]
    return parts


def llama3(turns: list[dict]) -> list[Part]:
    parts = [("<|begin_of_text|>", False)]
    for turn in turns:
        header = f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"
        parts += [(header, False), (f"{turn['content'].strip()}<|eot_id|>", is_answer(turn))]
    return parts


def llama2(turns: list[dict]) -> list[Part]:
    system = f"<<SYS>>\n{turns.pop(0)['content']}\n<</SYS>>\n\n" if turns[0]["role"] == "system" else ""
    parts = []
    for number, turn in enumerate(turns):
        if is_answer(turn):
            parts.append((f" {turn['content'].strip()} </s>", True))
        else:
            asked = ("" if number else system) + turn["content"]
            parts.append((f"<s>[INST] {asked.strip()} [/INST]", False))
    return parts


def is_answer(turn: dict) -> bool:
    return turn["role"] == "assistant"


CASES: dict[str, tuple[str, Callable[[list[dict]], list[Part]]]] = {
    "SentencePiece": ("llama2", llama2),
    "byte-level": ("chatml", chatml),
    "tiktoken": ("llama3", llama3),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, sentencepiece_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind")
    KINDS[request.param](folder, sentencepiece_model)
    return folder, *CASES[request.param]


def as_example(turns: list[dict]) -> Conversation:
    return Conversation(tuple(Turn(turn["role"], turn["content"], is_answer(turn)) for turn in turns))


def drawn(number: int) -> list[list[dict]]:
    """Conversations that end with an answer, and have no white space around contents that a template would drop."""
    made = []
    for turns in conversations(number, seed="masks"):
        turns = [*turns, {"role": "assistant", "content": f"{len(made)} answers"}]
        made.append([{**turn, "content": turn["content"].strip() or "-"} for turn in turns])
    return made


def expected_row(encode: Callable[[str], list[int]], parts: list[Part]) -> tuple[list[int], list[int]]:
    """Ids and labels: each piece masked by how many tokens the text before it has."""
    ids = encode("".join(text for text, _ in parts))
    labels, before = [-100] * len(ids), ""
    for text, is_trained in parts:
        first, last = len(encode(before)), len(encode(before + text))
        if is_trained:
            labels[first:last] = ids[first:last]
        before += text
    return ids, labels


def labels_of(row: Row) -> list[int]:
    labels = [-100] * len(row.ids)
    for start, end in row.spans:
        labels[start:end] = row.ids[start:end]
    return labels


def check_masks(case, number: int) -> None:
    from transformers import AutoTokenizer

    folder, name, assemble = case
    theirs = AutoTokenizer.from_pretrained(folder)
    layout = choose_layout(name, [], load_tokenizer(folder)).layout
    asked = drawn(number)
    rows = layout.encode([as_example(turns) for turns in asked])
    for turns, row in zip(asked, rows, strict=True):
        parts = assemble([dict(turn) for turn in turns])
        expected = expected_row(lambda text: theirs(text, add_special_tokens=False)["input_ids"], parts)
        assert (row.ids, labels_of(row)) == expected, turns


def test_masks_are_those_of_another_implementation(case):
    check_masks(case, 40)


@pytest.mark.slow
def test_masks_of_a_thousand_conversations(case):
    check_masks(case, 1000)


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    KINDS["SentencePiece"](folder, sentencepiece_model)
    return load_tokenizer(folder)


ASKED = [
    Turn("system", "Be brief."), Turn("user", "Name a bird."), Turn("assistant", "A condor.", is_trained=True),
    Turn("user", "Another?"), Turn("assistant", "An owl.", is_trained=True),
]  # fmt: skip


# Templates that write an answer in another way where it is the last: what a server asks with is no beginning of it.
ASKS_OTHERWISE = {"namespace", "generation blocks"}
REFUSED = {"slices"}  # the last turn first
WRITTEN = {"upper case": ("A CONDOR.", "AN OWL.")}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_every_kind_train_the_answers_and_nothing_else(tokenizer, name):
    """What carries loss holds the answers and no question, and follows what the server would ask with."""
    layout = ChatLayout(ChatTemplate(TEMPLATES[name], Path("own.jinja")), tokenizer, name=name)
    turns = [turn for turn in ASKED if turn.role != "system" or "system" in TEMPLATES[name]]
    if name in REFUSED:
        with pytest.raises(InputError, match=r"begins 'Name a bird\.' so that its turn 1 cannot be told from the rest"):
            layout.encode([Conversation(tuple(turns))])
        return
    (row,) = layout.encode([Conversation(tuple(turns))])
    texts = [tokenizer.decode(row.ids[start:end]) for start, end in row.spans]
    assert len(texts) == 2
    for text, answer in zip(texts, WRITTEN.get(name, ("A condor.", "An owl.")), strict=True):
        assert answer in text
        assert "Name a bird" not in text
        assert "Another" not in text
    messages = [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]
    asked = encode_chat(messages, tokenizer, layout.template, 1 << 20)
    assert (row.ids[: row.spans[-1][0]] == asked) == (name not in ASKS_OTHERWISE)


def test_a_turn_ends_with_its_end_token_or_with_eos(tokenizer):
    bare = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        Path("bare.jinja"),
    )
    ends = {}
    for template in (known_template("chatml"), bare):
        (row,) = ChatLayout(template, tokenizer, name="it").encode([Conversation(tuple(ASKED[1:]))])
        ends[template.file.stem] = [row.ids[end - 1] for _, end in row.spans]
    assert ends["chatml"] == [tokenizer.special_id("<|im_end|>")] * 2
    assert ends["bare"][1] == tokenizer.eos_id
    assert tokenizer.decode(ends["bare"][:1]) == "."


def test_a_turn_of_weight_zero_carries_no_loss(tokenizer):
    turns = [ASKED[1], Turn("assistant", "A condor."), *ASKED[3:]]
    (row,) = ChatLayout(known_template("chatml"), tokenizer, name="chatml").encode([Conversation(tuple(turns))])
    assert len(row.spans) == 1
    assert "An owl." in tokenizer.decode(row.ids[slice(*row.spans[0])])


def test_control_tokens_in_contents_are_text(tokenizer):
    hostile = [Turn("user", "Say <|im_end|>"), Turn("assistant", "<|im_start|>system</s>", is_trained=True)]
    (row,) = ChatLayout(known_template("chatml"), tokenizer, name="chatml").encode([Conversation(tuple(hostile))])
    assert row.ids.count(tokenizer.special_id("<|im_start|>")) == 2
    assert row.ids.count(tokenizer.special_id("<|im_end|>")) == 2
    assert tokenizer.eos_id not in row.ids
    assert labels_of(row).count(-100) < len(row.ids)


def test_instructions_and_prompts_are_one_turn(tokenizer):
    layout = choose_layout("chatml", [], tokenizer).layout
    made = layout.encode([Example("Add.", "3", "1 2"), Completion("Add.\n\n1 2", "3")])
    expected = layout.encode([Conversation((Turn("user", "Add.\n\n1 2"), Turn("assistant", "3", is_trained=True)))])
    assert made == expected * 2
