"""Which model types are served, and how: every type that transformers loads as a causal language model, tried.

    python -m bench.model_types                         all of them; goes on where it was stopped
    python -m bench.model_types --types mamba rwkv      these
    python -m bench.model_types --table                 only writes docs/models.md again from what was found

Each type in a process of its own, which may take --limit seconds: a tiny random model of it (`bench.tiny_models`) is
saved as a folder, served as the server does it, and asked for a greedy answer and for two sampled ones, after a short
prompt and after one that is longer than a piece. The answers are held against the plain way: one forward pass of
transformers over the whole text for each token. What was found goes to bench/model_types.json, and as a table
to docs/models.md. Ends with status 1 if any answer was another than it should be.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from alpaca.errors import AlpacaError, run_command
from alpaca.files.atomic import write_json, write_text
from bench import tiny_models
from bench.provenance import ROOT, provenance

RECORD = ROOT / "bench" / "model_types.json"
TABLE = ROOT / "docs" / "models.md"
_PROMPTS = {"short": 30, "long": 530}  # tokens
_NEW_TOKENS = {"short": 12, "long": 4}
_SERVED = ("LLaMA engine", "transformers", "transformers, slowly")
_SHOWN = 240  # characters of a reason
_INTRODUCTION = """\
# Model types

[Back to the README](../README.md)

What the server does with a folder of each type that transformers {version} loads as a causal language model, of which
there are {total}. `python -m bench.model_types` made this table: it serves a tiny random model of each type and holds
greedy answers, and two sampled ones at once, against one forward pass of transformers over the whole text for each
token. {right} types gave exactly those tokens. No type gave others without a word.

Not every type keeps all of its past in a cache, nor may its prompts be cut into pieces. So at start the transformers
engine decodes a few tokens in the usual way and holds the logits against forward passes over the whole text, two
completions at once included (`alpaca/serving/hugging_face/proof.py`); on a large model that takes about as long as a
short answer. What differs is served in another way, and the log says so and what it costs. What cannot be right is
refused with the reason. A way passes where its logits are right to half of the digits of the model's precision: in
bfloat16 an error of less than 9 % of their spread is not told from rounding.

- **LLaMA engine**: many requests in the same steps, graphs, kernels, adapters.
- **transformers**: one request at a time, each token computed once. Long prompts are read in pieces, where the note
  says nothing else.
- **transformers, slowly**: no memory of the past was right (or there is none), so every token computes the whole text.
- **refused**: the server does not start, and says why.
- **not tried**: no tiny model of the type could be made here. At start the server tries the real one all the same.

"""


def main() -> None:
    options = _parse_arguments()
    if options.one:
        print(json.dumps(try_type(options.one)))
        return
    found = _read_record()
    if not options.table:
        import transformers.generation  # noqa: F401  # once, for all the processes

        import alpaca.serving.loading  # noqa: F401

        types = options.types or tiny_models.model_types()
        made_by = provenance("model_types", ("torch", "transformers"))
        left = [name for name in types if options.types or name not in found]
        for number, name in enumerate(left, 1):
            found[name] = _try_apart(name, limit_s=options.limit)
            outcome = found[name]
            print(f"[{number}/{len(left)}] {name}: {outcome['outcome']} {outcome['note']}", file=sys.stderr, flush=True)
            write_json(RECORD, {**made_by, "types": dict(sorted(found.items()))})
    write_text(TABLE, make_table(found))
    wrong = [name for name, outcome in found.items() if outcome["outcome"] == "WRONG"]
    print(json.dumps(Counter(outcome["outcome"] for outcome in found.values())))
    if wrong:
        sys.exit(f"wrong answers: {', '.join(wrong)}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="these alone, again if they were tried before")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="for each type")
    parser.add_argument("--table", action="store_true", help="try nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _read_record() -> dict[str, dict[str, str]]:
    """What was found with the installed transformers before."""
    if not RECORD.is_file():
        return {}
    record = json.loads(RECORD.read_text())
    return record["types"] if record["versions"]["transformers"] == version("transformers") else {}


def _try_apart(name: str, *, limit_s: float) -> dict[str, str]:
    """Try a type in a process that is forked from this one, which has imported what all of them need."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(try_type(name)), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return {"outcome": "not tried", "note": f"it took longer than {limit_s:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"outcome": "not tried", "note": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


# One type ---------------------------------------------------------------------------------------------------------


def try_type(name: str) -> dict[str, str]:
    """Serve a tiny model of a type, and say what became of it: `outcome`, and a `note` where there is more to say."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="alpaca-") as place:
        folder = Path(place) / "model"
        try:
            model = tiny_models.tiny_model(name)
            num_ids = min(tiny_models.VOCAB_SIZE, model.get_input_embeddings().weight.shape[0])
            model.save_pretrained(folder)
            tiny_models.tiny_config(name).save_pretrained(
                folder
            )  # the whole one, where the model has but its text part
        except Exception as error:  # any: it is transformers' code on a config made by rule
            return {"outcome": "not tried", "note": f"no tiny model: {_in_short(error)}"}
        write_tokenizer(folder, num_ids)
        return serve_and_compare(folder, num_ids)


def write_tokenizer(folder: Path, num_ids: int) -> None:
    """A tokenizer of so many ids, 260 or more: the bytes, after pad, BOS, EOS and unknown. It keeps any text."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    pieces = [*special, *sorted(ByteLevel.alphabet())]
    pieces += [f"w{number}" for number in range(len(pieces), num_ids)]
    tokenizer = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def serve_and_compare(folder: Path, num_ids: int) -> dict[str, str]:
    """Serve a folder, and hold its answers against one forward pass for each token."""
    from transformers import AutoModelForCausalLM

    from alpaca.serving.loading import load_engine
    from alpaca.serving.settings import ServerSettings

    try:
        engine = load_engine(folder, ServerSettings(dtype="float32", memory_fraction=0.02))
    except AlpacaError as error:
        return {"outcome": "refused", "note": _in_short(error, place=folder)}
    # transformers' fused attention leaves out what some types ask for (a cap of scores), so the plain one is the truth
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    try:
        for label in _PROMPTS:
            for asked in _requests(label, num_ids, engine.max_context):
                got, want = _answers(engine, asked), plain_answers(model, asked, num_ids)
                if got != want:
                    return {"outcome": "WRONG", "note": f"{label} prompt, n {asked.n}: {got} and not {want}"}
    except Exception as error:
        return {"outcome": "WRONG", "note": f"a request failed: {_in_short(error)}"}
    finally:
        engine.close()
    return _describe(engine)


def _describe(engine: Any) -> dict[str, str]:
    if type(engine).__name__ == "LlamaEngine":
        return {"outcome": _SERVED[0], "note": ""}
    return {"outcome": _SERVED[2] if engine.way.memory == "none" else _SERVED[1], "note": engine.way.cost}


def _requests(label: str, num_ids: int, max_context: int) -> list[Any]:
    from alpaca.serving.request import Request

    generator = torch.Generator().manual_seed(len(label))
    length = min(_PROMPTS[label], max_context - _NEW_TOKENS[label])
    prompt = (1, *torch.randint(4, num_ids, (length - 1,), generator=generator).tolist())
    same = dict(
        prompt_ids=prompt, max_new_tokens=_NEW_TOKENS[label], min_new_tokens=0, top_p=1.0, top_k=0, min_p=0.0,
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=3, num_beams=1,
    )  # fmt: skip
    return [Request(n=1, temperature=0.0, **same), Request(n=2, temperature=1.0, **same)]


def _answers(engine: Any, asked: Any) -> list[list[int]]:
    from alpaca.serving.engine import TokenEvent

    rows: list[list[int]] = [[] for _ in range(asked.n)]
    for event in engine.submit(asked).events():
        if isinstance(event, TokenEvent):
            rows[event.completion].append(event.token_id)
    return rows


@torch.inference_mode()
def plain_answers(model: Any, asked: Any, num_ids: int, *, eos_id: int = 2) -> list[list[int]]:
    """What the model answers by one forward pass over the whole text for each token of each completion."""
    from alpaca.serving.llama.sampling import SamplingState, commit_tokens, sample_tokens

    answers = []
    for completion in range(asked.n):
        state, text = SamplingState(asked, completion, eos_ids=[eos_id]), list(asked.prompt_ids)
        while len(text) < len(asked.prompt_ids) + asked.max_new_tokens and text[-1] != eos_id:
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[:, -1]
            chosen = sample_tokens(logits[:, :num_ids], [state])
            commit_tokens([state], chosen)
            text.append(int(chosen))
        answers.append([token_id for token_id in text[len(asked.prompt_ids) :] if token_id != eos_id])
    return answers


def _in_short(error: Exception, *, place: Path | None = None) -> str:
    text = " ".join(str(error).split())
    return (text.replace(str(place), "the folder") if place else f"{type(error).__name__}: {text}")[:_SHOWN]


# The table ----------------------------------------------------------------------------------------------------------


def make_table(found: dict[str, dict[str, str]]) -> str:
    """The page of all types that were tried."""
    right = sum(outcome["outcome"] in _SERVED for outcome in found.values())
    total = len(tiny_models.model_types())
    lines = [_INTRODUCTION.format(version=version("transformers"), total=total, right=right)]
    lines.append("| model_type | served by | note |\n|---|---|---|\n")
    for name, outcome in sorted(found.items()):
        note = outcome["note"].replace("|", "/").replace("`", "")
        lines.append(f"| `{name}` | {outcome['outcome']} | {note} |\n")
    return "".join(lines)


if __name__ == "__main__":
    run_command(main)
