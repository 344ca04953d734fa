"""Other people's clients against the real server: their answers are the Predictor's own."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from deploy.local_server import LocalServer
from tests.conftest import ROOT
from tests.web.openai.real_server import clients_python, node_environment, real_server

pytestmark = pytest.mark.slow

RAW = {"prompt_template": "{prompt}", "details": True}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
SAID = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def folder(real, tmp_path_factory) -> Path:
    """A trained LLaMA of 260,000 weights, with a chat template."""
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    output = tmp_path_factory.mktemp("stories")
    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(output)]
    made = Path(shutil.copytree(convert(parse_arguments(flags)), output / "storyteller"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def running(folder) -> Iterator[tuple[LocalServer, str]]:
    with real_server(["--weights", str(folder), "--max_context", "256"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running[1], api_key="any", max_retries=0) as client:
        yield client


def documents(server: LocalServer, **inputs: object) -> list[dict]:
    return [json.loads(item) for item in server.predict({"temperature": 1.0, **RAW, **inputs})["output"]]


# OpenAI's client ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 3, "n": 3}, {"seed": 4, "top_p": 0.8, "stop": ["."]}])
def test_completions_are_the_predictors(running, client, fields):
    reply = client.completions.create(model="storyteller", prompt="One day", max_tokens=30, **fields)
    own = documents(running[0], prompt="One day", max_new_tokens=30, **fields)
    assert [(c.text, c.finish_reason) for c in reply.choices] == [(d["text"], d["finish_reason"]) for d in own]
    assert reply.usage.completion_tokens == sum(document["output_tokens"] for document in own)
    assert reply.usage.prompt_tokens == own[0]["prompt_tokens"]
    stream = client.completions.create(model="storyteller", prompt="One day", max_tokens=30, stream=True, **fields)
    texts = dict.fromkeys(range(len(own)), "")
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [document["text"] for document in own]


def test_a_chat_is_the_predictors(running, client):
    fields = {"model": "storyteller", "messages": SAID, "temperature": 0, "max_tokens": 20}
    reply = client.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
    given = {"messages": SAID, "temperature": 0, "max_new_tokens": 20, "details": True, "logprobs": 3}
    own = json.loads(running[0].predict(given)["output"][0])
    entries = reply.choices[0].logprobs.content
    assert reply.choices[0].message.content == own["text"]
    assert [entry.bytes for entry in entries] == [entry["bytes"] for entry in own["logprobs"]]
    for found, expected in zip(entries, own["logprobs"], strict=True):
        assert found.logprob == pytest.approx(expected["logprob"], abs=1e-5)
        assert [other.token for other in found.top_logprobs] == [other["text"] for other in expected["top"]]
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**fields, stream=True)]
    assert "".join(pieces) == own["text"]


def test_a_response_format(running, client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    reply = client.chat.completions.create(
        model="storyteller", messages=SAID, response_format=asked, seed=3, max_tokens=100
    )
    assert reply.choices[0].finish_reason == "stop"
    person = json.loads(reply.choices[0].message.content)
    assert (set(person), type(person["age"])) == ({"name", "age"}, int)
    own = documents(running[0], messages=SAID, json_schema=schema, seed=3, max_new_tokens=100, prompt_template="alpaca")
    assert own[0]["text"] == reply.choices[0].message.content
    broken = {**asked, "json_schema": {"name": "person", "schema": {**schema, "not": {}}}}
    with pytest.raises(openai.BadRequestError, match=r"(?i)json_schema: Unimplemented keys"):
        client.chat.completions.create(model="storyteller", messages=SAID, response_format=broken)


def test_an_echo_is_the_text_of_its_tokens(client):
    for prompt in ("Once upon a time", " there was", "ไทย"):
        reply = client.completions.create(model="storyteller", prompt=prompt, max_tokens=4, echo=True, logprobs=2)
        choice = reply.choices[0]
        tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
        spelled = [bytes.fromhex(t[6:].replace("\\x", "")) if t[:6] == "bytes:" else t.encode() for t in tokens]
        assert b"".join(spelled).decode() == choice.text
        assert [len(b"".join(spelled[:i]).decode(errors="ignore")) for i in range(len(tokens))] == offsets


def test_a_chat_without_a_limit_goes_on_to_the_contexts_end(client):
    reply = client.chat.completions.create(model="storyteller", messages=SAID, temperature=0)
    assert (reply.choices[0].finish_reason, reply.usage.total_tokens) == ("length", 256)


def test_a_prompt_too_long(client):
    with pytest.raises(openai.BadRequestError, match="the model's context is") as error:
        client.completions.create(model="storyteller", prompt="word " * 5000)
    assert error.value.code == "context_length_exceeded"


def test_bounds_are_the_predictors(client):
    with pytest.raises(openai.BadRequestError, match="temperature: 9 is greater than the maximum of 5") as error:
        client.completions.create(model="storyteller", prompt="x", temperature=9)
    assert error.value.param == "temperature"


# Clients in an environment of their own -----------------------------------------------------------------------------


def run_client(*command: str, **environment: str) -> str:
    made = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "any", **environment}
    done = subprocess.run(
        [str(clients_python()), *command], cwd=ROOT, env=made, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_langchain(running):
    server, url = running
    found = json.loads(
        run_client(str(Path(__file__).with_name("ask_langchain.py")), url, "storyteller").splitlines()[-1]
    )
    given = {"messages": SAID, "temperature": 0, "max_new_tokens": 12}
    (chat,) = server.predict(given)["output"]
    raw = [
        documents(server, prompt=text, temperature=0, max_new_tokens=12)[0]["text"]
        for text in ("Once upon a time", "The dog")
    ]
    assert found == {
        "whole": chat, "usage": 12, "streamed": chat, "asynchronous": chat, "raw": raw[0], "batch": raw,
    }  # fmt: skip


def test_the_ai_sdk(running):
    """The OpenAI-compatible provider of the AI SDK: a chat, a stream, a completion, and an error."""
    server, url = running
    node, folder = node_environment()
    script = Path(shutil.copy(Path(__file__).with_name("ask_ai_sdk.mjs"), folder))  # beside its node_modules
    command = [str(node), script.name, url, "storyteller"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    given = {"temperature": 0, "max_new_tokens": 12, "details": True}
    said = {"messages": [{"role": "user", "content": "Once upon a time"}]}
    (chat,) = (json.loads(item) for item in server.predict({**given, **said})["output"])
    written = "user:\nOnce upon a time\n\nassistant:\n"  # what the provider makes of a prompt for /v1/completions
    (raw,) = documents(server, prompt=written, stop=["\nuser:"], temperature=0, max_new_tokens=12)
    found = json.loads(done.stdout.splitlines()[-1])
    assert "no-such-model" in found.pop("refused")
    assert found == {
        "whole": chat["text"], "usage": [chat["prompt_tokens"], 12], "finish": "length", "streamed": chat["text"],
        "streamedUsage": 12, "raw": raw["text"],
    }  # fmt: skip


QUESTIONS = [
    {"question": "Once upon a", "choices": [" time", " dog", " tree, there"], "answer": 0},
    {"question": "Tom and Lily were playing in the", "choices": [" park", " lion", " park with their"], "answer": 0},
    {"question": "The sun was", "choices": [" shining", " walking"], "answer": 0},
]
TASKS = {
    "which_word": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "what_next": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks over one file of questions: which choice is likelier, and what comes next."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}}, "test_split": "test"}
    for name, task in TASKS.items():  # JSON is YAML
        content = {"task": name, **data, "doc_to_text": "{{question}}", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    return folder


def evaluate(tasks: Path, output: Path, model: str, task: str, arguments: str, *flags: str) -> list[dict]:
    """The samples that lm_eval logged, in order."""
    run_client(
        "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", task, "--include_path", str(tasks),
        "--output_path", str(output), "--log_samples", *flags, HF_HOME=str(output / "home"),
    )  # fmt: skip
    (file,) = output.rglob(f"samples_{task}*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def log_likelihood(folder: Path, context: str, choice: str) -> tuple[float, bool]:
    """By transformers: of the choice's tokens, and whether each is the likeliest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, num_context = tokenizer.encode(context + choice), len(tokenizer.encode(context))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    scores = logits.log_softmax(-1)[num_context - 1 : -1]
    targets = torch.tensor(ids[num_context:])
    return scores.gather(1, targets[:, None]).sum().item(), bool((scores.argmax(-1) == targets).all())


def test_lm_eval_of_choices(running, folder, tasks, tmp_path):
    """local-completions, with texts: its log-likelihoods are those of transformers."""
    arguments = f"model=storyteller,base_url={running[1]}/completions,tokenizer={folder},tokenizer_backend=huggingface"
    arguments += ",tokenized_requests=False,max_length=256,num_concurrent=4"
    samples = evaluate(tasks, tmp_path, "local-completions", "which_word", arguments)
    assert len(samples) == len(QUESTIONS)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        expected = [log_likelihood(folder, question["question"], choice) for choice in question["choices"]]
        for (found,), (score, is_likeliest) in zip(sample["resps"], expected, strict=True):
            assert float(found[0]) == pytest.approx(score, abs=1e-3)
            assert str(found[1]) == str(is_likeliest)


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_lm_eval_of_answers(running, folder, tasks, tmp_path, model):
    server, url = running
    if model == "local-completions":
        arguments = f"model=storyteller,base_url={url}/completions,tokenizer_backend=None"
        flags = []
    else:
        arguments = f"model=storyteller,base_url={url}/chat/completions"
        flags = ["--apply_chat_template"]
    samples = evaluate(tasks, tmp_path, model, "what_next", arguments, *flags)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        text = question["question"]
        given = {"prompt": text, **RAW}
        if flags:
            given = {"messages": [{"role": "user", "content": text}], "details": True}
        given |= {"temperature": 0, "max_new_tokens": 12, "stop": ["."]}
        assert sample["resps"] == [[json.loads(server.predict(given)["output"][0])["text"]]]
