"""Rows of bench.train that other people's programs train: transformers' Trainer, PEFT under it, and TRL.

trainer:           Stanford's recipe: micro-batches of 4, padded on the right, logits for every position.
trainer lora:      and PEFT's LoRA, with the ranks and places that --method lora has.
trl:               TRL's SFTTrainer with its own padding.
trl padding_free:  its examples end to end.
trl packed:        its rows of --max_length, each filled by best fit. A step has other examples than ours, about as many
                   tokens, so only its rate is comparable.

Each has the random model, the examples in the order, and the settings of our rows, and runs in a process of an
environment of its own.
"""

import json
import math
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from alpaca.data.batching import step_examples
from alpaca.data.encoding.prompt_layout import PromptLayout
from alpaca.data.examples import encode_examples
from alpaca.data.records import read_examples
from alpaca.text.loading import load_tokenizer
from bench.environments import environment
from bench.provenance import ROOT
from bench.targets import Target

PEERS: dict[str, dict[str, object]] = {
    "trainer": {},
    "trainer lora": {"lora": True},
    "trl": {"trainer": "trl"},
    "trl padding_free": {"trainer": "trl", "arguments": {"padding_free": True}},
    "trl packed": {"trainer": "trl", "arguments": {"packing": True, "packing_strategy": "bfd"}, "packs": True},
}
OURS = {name: "lora" if "lora" in name else "packed" for name in PEERS}  # the row of ours that each is held against
TRL = "trl==1.16.0"
MICRO_BATCH = 4
_SEED, _WARMUP = 42, 0.03  # train.py's defaults
_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
Example = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all rows do. examples: ids and labels in the order of training, a step's after another's.

    num_tokens: of the tokenizer, the padding token that full fine-tuning adds included.
    """

    model: Path
    examples: list[Example]
    steps: int
    batch: int
    learning_rate: float
    max_length: int
    pad_id: int
    num_tokens: int


def make_work(
    model: Path, data_path: str, *, steps: int, batch: int, learning_rate: float, max_length: int
) -> Work:  # fmt: skip
    """Encode the examples as train.py does, in the order in which it takes them."""
    tokenizer = load_tokenizer(model)
    layout = PromptLayout("alpaca", tokenizer)
    tokenizer.add_pad_token()
    data = encode_examples(read_examples(data_path), layout, max_length=max_length, progress=False)
    taken = [step_examples(len(data), global_batch_size=batch, seed=_SEED, step=step).tolist() for step in range(steps)]
    pairs = [data.example(index) for step in taken for index in step]
    return Work(
        model=model, examples=[(ids.tolist(), labels.tolist()) for ids, labels in pairs], steps=steps,
        batch=len(taken[0]), learning_rate=learning_rate, max_length=max_length, pad_id=tokenizer.pad_id,
        num_tokens=tokenizer.size,
    )  # fmt: skip


def make_job(name: str, work: Work, output_dir: str) -> dict[str, object]:
    """What a peer's process is told. Its arguments are the recipe's in the Trainer's words."""
    peer = PEERS[name]
    is_trl, is_adapter = peer.get("trainer") == "trl", bool(peer.get("lora"))  # an adapter's base has no added row
    per_step, examples = work.batch, work.examples
    if peer.get("packs"):
        tokens = sum(len(ids) for ids, _ in examples)
        per_step = max(1, round(tokens / work.steps / work.max_length))
    micro = min(MICRO_BATCH, per_step)
    arguments = {
        "output_dir": output_dir, "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, per_step // micro), "max_steps": work.steps,
        "learning_rate": work.learning_rate, "lr_scheduler_type": "cosine", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "warmup_steps": math.ceil(_WARMUP * work.steps), "bf16": False, "use_cpu": True, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "seed": _SEED,
    }  # fmt: skip
    if is_trl:  # examples are cut already, and TRL enforces a length only where it packs
        arguments["max_length"] = work.max_length if peer.get("packs") else None
    return {
        "trainer": "trl" if is_trl else "transformers", "model": str(work.model), "examples": examples,
        "pad_id": 0 if is_adapter else work.pad_id, "num_rows": 0 if is_adapter else work.num_tokens,
        "lora": _LORA if is_adapter else None, "arguments": {**arguments, **peer.get("arguments", {})},
    }  # fmt: skip


def their_python() -> Path:
    """TRL's environment, which has transformers and PEFT, too: the releases that this project itself runs with."""
    same = [f"{name}=={version(name)}" for name in ("transformers", "peft")]
    return environment("trl", [TRL, *same], torch=version("torch").split("+")[0])


def run_peer(name: str, work: Work, folder: Path, *, seconds: float) -> dict:
    """A row's sample; a failure is a sample, too. folder: for what the peer writes."""
    files = [folder / f"{name.replace(' ', '-')}.{kind}.json" for kind in ("job", "result")]
    files[0].write_text(json.dumps(make_job(name, work, str(folder / "peer"))))
    worker = ROOT / "bench" / "train_peer_worker.py"
    command = [str(their_python()), "-I", str(worker), *map(str, files)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "TRL_EXPERIMENTAL_SILENCE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failure": f"ended after {seconds:.0f} s"}
    if done.returncode:
        return {"failure": done.stderr.strip()[-1500:]}
    return as_sample(json.loads(files[1].read_text()))


def as_sample(result: dict) -> dict:
    """A worker's result as bench.train's rows are: medians over the steps after the first."""
    later = result["tokens"][1:]
    return {
        "losses": result["losses"],
        "tokens_per_second": _median_rate(later, result["seconds"]),
        "tokens_per_cpu_second": _median_rate(later, result["cpu_seconds"]),
        "peak_bytes": result["peak_bytes"],
        "process_peak_bytes": result["process_peak_bytes"],
    }


def _median_rate(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(one / took for one, took in zip(tokens, seconds, strict=True))


def compare_losses(results: dict[str, dict]) -> dict[str, float]:
    """The largest relative difference between a peer's losses and those of our row, over the steps of both.

    Packed rows are other batches. LoRA draws its matrices and its dropout by itself, so there only the first step
    says something: before it an adapter changes nothing.
    """
    found = {}
    for name, ours in OURS.items():
        pair = [results.get(row, {}).get("losses") for row in (name, ours)]
        if None in pair or PEERS[name].get("packs"):
            continue
        steps = list(zip(*pair, strict=True))[: 1 if PEERS[name].get("lora") else None]
        found[name] = max(abs(theirs / mine - 1) for theirs, mine in steps)
    return found


def make_peer_targets(results: dict[str, dict]) -> list[Target]:
    """Ours against each peer of the run: rates by the clock and by CPU time, memory, and whether losses are equal."""
    targets = []
    for name, ours in OURS.items():
        theirs, mine = results.get(name, {}), results.get(ours, {})
        if "tokens_per_second" not in theirs or "tokens_per_second" not in mine:
            continue
        is_goal = name == "trainer"
        ratios = {
            key: mine[key] / theirs[key] for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_bytes")
        }  # fmt: skip
        targets += [
            Target(
                label=f"{ours} / {name}, useful tokens/s",
                value=ratios["tokens_per_second"],
                least=2.4 if is_goal else None,
            ),
            Target(label=f"{ours} / {name}, by CPU time", value=ratios["tokens_per_cpu_second"]),
            Target(label=f"{ours} / {name}, peak memory", value=ratios["peak_bytes"], most=0.7 if is_goal else None),
        ]
    targets += [
        Target(label=f"losses of {name} and {OURS[name]}, relative", value=value, most=1e-5)
        for name, value in compare_losses(results).items()
    ]
    return targets
