"""Conversations as tokens: which of them carry loss, against another way to find it, and templates of every kind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca.data.encoding.chat_layout import ChatLayout
from alpaca.data.encoding.choosing import choose_layout
from alpaca.data.encoding.layout import Row
from alpaca.data.example import Completion, Conversation, Example, Turn
from alpaca.data.examples import encode_examples
from alpaca.errors import InputError
from alpaca.text.chat.files import ChatTemplate, known_template
from alpaca.text.chat.prompt import encode_chat
from alpaca.text.loading import load_tokenizer
from alpaca.text.markers import MarkedText
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
        with pytest.raises(InputError, match=r"begins 'Name a bird\.': .* its turn 1 cannot be told from the rest"):
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


THINKING = """{%- set ns = namespace(last_user=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_user %}
            {%- set content = '<think>\n' + thought + '\n</think>\n\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.mark.parametrize(
    ("answers", "written"),
    [
        (("One.", "Two."), ("One.", "<think>\n\n</think>\n\nTwo.")),
        (("<think>\na\n</think>\n\nOne.", "Two."), ("One.", "<think>\n\n</think>\n\nTwo.")),
        (("One.", "<think>\nb c\n</think>\n\nTwo."), ("One.", "<think>\nb c\n</think>\n\nTwo.")),
        (("<think>a</think>One.", "<think>b</think>Two."), ("One.", "<think>\nb\n</think>\n\nTwo.")),
        (("<think>a</think>", "Two."), ("", "<think>\n\n</think>\n\nTwo.")),
        (("One.", "<think>\nb\n</think>"), ("One.", "<think>\nb\n</think>\n\n")),
        (("", ""), ("", "<think>\n\n</think>\n\n")),
    ],
)
def test_thoughts_are_learnt_where_the_template_writes_them(tokenizer, answers, written):
    """As Qwen3's: a thought is left out of turns before the last question, and written, if empty, in the last one."""
    layout = ChatLayout(ChatTemplate(THINKING, Path("own.jinja")), tokenizer, name="it")
    turns = [turn for k in (0, 1) for turn in (Turn("user", f"q{k}"), Turn("assistant", answers[k], is_trained=True))]
    (row,) = layout.encode([Conversation(tuple(turns))])
    parts = [
        part
        for k in (0, 1)
        for part in (
            (f"<|im_start|>user\nq{k}<|im_end|>\n<|im_start|>assistant\n", False),
            (f"{written[k]}<|im_end|>", True),
            ("\n", False),
        )
    ]
    encode = tokenizer.marked_encoder
    whole = "".join(text for text, _ in parts)
    assert row.ids == encode.encode(encode.with_keys(MarkedText(whole, encode.find(whole))))
    end = tokenizer.special_id("<|im_end|>")
    assert [row.ids[stop - 1] for _, stop in row.spans] == [end, end]
    assert [tokenizer.decode(row.ids[a:b]).strip() for a, b in row.spans] == [text.strip() for text in written]
    assert not row.is_asked_otherwise


LAST_ONLY = """{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- for message in (messages[1:] if system is not none else messages) %}
    {%- if message.role == 'user' %}
        {{- '<|user|> ' + (system + '\n' if loop.last and system is not none else '') + message.content + '<|end|>' }}
    {%- else %}{{- ' ' + message.content | trim + eos_token }}{% endif %}
{%- endfor %}"""


def test_a_system_text_that_only_a_last_question_gets_is_counted(tokenizer):
    """As Mistral's: with an answer behind it no question is the last one, so a server asks by another prompt."""
    layout = ChatLayout(ChatTemplate(LAST_ONLY, Path("own.jinja")), tokenizer, name="it")
    told, untold = layout.encode([Conversation(tuple(ASKED)), Conversation(tuple(ASKED[1:]))])
    assert (told.is_asked_otherwise, untold.is_asked_otherwise) == (True, False)
    assert (told.ids, told.spans) == (untold.ids, untold.spans)
    assert told.ids[told.spans[0][0] - 1] == tokenizer.special_id("<|end|>")
    report = encode_examples([Conversation(tuple(ASKED))] * 2, layout, progress=False).report
    assert "2 whose chat template asks for an answer by another prompt than it writes before it here" in report.lines()


def test_a_template_that_refuses_names_the_conversation(tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    layout = ChatLayout(ChatTemplate(strict, Path("own.jinja")), tokenizer, name="it")
    with pytest.raises(InputError, match=r"the conversation that begins 'Hi\.': .*refuses .*: roles must alternate"):
        layout.encode([Conversation((Turn("assistant", "Hi.", is_trained=True),))])


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
