"""Chat templates that do what published ones do, each in another way, and conversations for them."""

import random
from collections.abc import Iterator

# name: template. All take conversations of user and assistant in turns, most of them with a system message before.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
        "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "chatml with a default system message": """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou answer.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "system merged into the first user's turn": """
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set opening = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user, assistant, user') }}
    {%- endif %}
    {%- set content = opening + message['content'] if loop.first else message['content'] %}
    {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "header tokens": """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "date": """{{ bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}
{% for message in messages %}
  {% if loop.first and message.role != 'system' %}
<|im_start|>system
Today is {{ day }}.<|im_end|>
  {% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
""",
    "namespace": """{%- set ns = namespace(system='', last_user=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}
    {%- if message['role'] == 'user' %}{% set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages if message['role'] != 'system' %}
    {%- if message['role'] == 'user' %}
        {{- '<|user|>' + message['content'] + ('!' if loop.last else '') }}
    {%- else %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|assistant|>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "markers made of roles": (
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] "
        "+ '<|end|>\\n' }}{% endfor %}<|assistant|>\n"
    ),
    "json": (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>"
        "{{ message.content | tojson(indent=2) }}{% endfor %}<|im_start|>"
    ),
    "break and continue": """{{ bos_token }}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if loop.index > 6 %}{% break %}{% endif %}
  {{- '<|im_start|>' ~ message.role ~ ': ' ~ message.content }}{{ '<|im_end|>' -}}
{%- endfor %}
{{- '<|im_start|>assistant: ' }}""",
    "generation blocks": """{% for message in messages %}{% if message.role == 'assistant' %}
{%- generation %}{% set shown = message.content %}{{ shown + eos_token }}{% endgeneration %}
{%- else %}{{ bos_token if loop.first }}<|user|>
{{ message['content'] }}
{% endif %}{% endfor %}<|assistant|>
""",
    "macro and set block": """{%- macro turn(message) -%}
<|im_start|>{{ message.role }}
{{ caller() }}<|im_end|>
{% endmacro -%}
{%- for message in messages %}{% set text %}{{ message.content }}
{% endset %}{% call turn(message) %}{{ text }}{% endcall %}{% endfor -%}
<|im_start|>assistant
""",
    "parts": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' or 'text' in part %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}{{ '<|im_start|>assistant\\n' }}""",
    "slices": (
        "{{ bos_token }}{% for message in messages[::-1] %}{{ '<|im_start|>' + message.content[:40] + '|' "
        "+ message.content[-3:] + (message.content | length | string) + '<|im_end|>' }}{% endfor %}"
    ),
    "no control tokens": (
        "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n\n{% endfor %}ASSISTANT:"
    ),
    "upper case": "{{ bos_token }}{% for message in messages %}<|user|>{{ message.content | upper }}{% endfor %}",
}
CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip
_PIECES = (
    "Name three colours.", "alpaca", " ", "  ", "\n", "\n\n", "รามาเกียรติ์", "🦙", "a < b > c", "x|y", "<b>bold</b>",
    '{"key": "value\\n"}', "[INST]", "if (a) {\n\treturn b;\n}", "é", "e\u0301", "Don't", "1234567", "<|", "|>", "s>",
    "</think>", "It's", "\t", "…", "user", "{{ messages }}",
)  # fmt: skip


def draw_content(draw: random.Random, further: tuple[str, ...] = ()) -> str:
    return "".join(draw.choice(_PIECES + further) for _ in range(draw.choice((0, 1, 2, 5, 9))))


def draw_conversation(draw: random.Random, further: tuple[str, ...] = ()) -> list[dict]:
    """Turns of user and assistant, the last one the user's; before them a system message or none."""
    turns = 2 * draw.choice((0, 0, 1, 1, 2, 4)) + 1
    messages = [{"role": "user" if turn % 2 == 0 else "assistant"} for turn in range(turns)]
    if draw.random() < 0.5:
        messages.insert(0, {"role": "system"})
    return [{**message, "content": draw_content(draw, further)} for message in messages]


def conversations(number: int, *, seed: str, further: tuple[str, ...] = ()) -> Iterator[list[dict]]:
    """Conversations that depend on the seed alone.   further: more pieces of contents."""
    draw = random.Random(seed)
    return (draw_conversation(draw, further) for _ in range(number))
