"""One of the peers' trainings, told as JSON: its losses, rates, CPU seconds and memory.

    python -I train_peer_worker.py job.json result.json

Run by an interpreter that has transformers, PEFT and TRL; nothing of this project is imported. A job holds token ids
and labels in the order of training, so that tokenizers, prompts and shuffling are no part of the comparison.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

MASKED = -100


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    if job["trainer"] == "trl":
        import trl  # noqa: F401
    if job["lora"]:
        import peft  # noqa: F401
    memory, marks = Memory(), Marks()
    trainer = (trl_trainer if job["trainer"] == "trl" else plain_trainer)(job, marks)
    losses = record_losses(trainer)
    lengths = [len(row) for row in given_ids(trainer)]
    trainer.train()
    per_micro = job["arguments"]["gradient_accumulation_steps"]
    rows = per_micro * job["arguments"]["per_device_train_batch_size"]
    result = {
        "losses": [sum(losses[start : start + per_micro]) for start in range(0, len(losses), per_micro)],
        "tokens": [sum(lengths[start : start + rows]) for start in range(0, len(losses) // per_micro * rows, rows)],
        "seconds": marks.between("wall"), "cpu_seconds": marks.between("cpu"),
        "peak_bytes": memory.peak_bytes(), "process_peak_bytes": memory.process_peak_bytes(),
    }  # fmt: skip
    Path(result_file).write_text(json.dumps(result))


def plain_trainer(job: dict, marks: "Marks") -> Trainer:
    """transformers' Trainer as Stanford's train.py uses it: padded on the right to the longest of a micro-batch."""
    examples = [{"input_ids": ids, "labels": labels} for ids, labels in job["examples"]]

    def collate(features: list[dict]) -> dict[str, torch.Tensor]:
        ids, labels = ([torch.tensor(one[name]) for one in features] for name in ("input_ids", "labels"))
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=job["pad_id"]),
            "labels": pad_sequence(labels, batch_first=True, padding_value=MASKED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }

    settings = TrainingArguments(**job["arguments"], remove_unused_columns=False)
    return Trainer(model=load(job), args=settings, train_dataset=examples, data_collator=collate, callbacks=[marks])


def trl_trainer(job: dict, marks: "Marks") -> Trainer:
    """TRL's SFTTrainer on the same tokens; how it lays them out is its own affair."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    columns = {name: [pair[part] for pair in job["examples"]] for part, name in enumerate(("input_ids", "labels"))}
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # what a mask hides anyway
    return SFTTrainer(
        model=load(job), args=SFTConfig(**job["arguments"]), train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer, callbacks=[marks],
    )  # fmt: skip


def load(job: dict) -> torch.nn.Module:
    """The base in float32; with the padding token's row, as Stanford's recipe adds it, or with LoRA."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.config.use_cache = False
    if job["num_rows"] > model.config.vocab_size:
        old = model.config.vocab_size
        model.resize_token_embeddings(job["num_rows"], mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[old:] = layer.weight[:old].mean(0, keepdim=True)
    if job["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **job["lora"]))
    return model.train()


def given_ids(trainer: Trainer) -> list[list[int]]:
    """The rows that the trainer goes through, in its order: examples, or what TRL packed of them."""
    data = trainer.train_dataset
    return [row["input_ids"] for row in data] if isinstance(data, list) else list(data["input_ids"])


def record_losses(trainer: Trainer) -> list[float]:
    """Each micro-batch's share of its step's loss."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def recorded(*given, **named):
        found = compute(*given, **named)
        losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found

    trainer.compute_loss = recorded
    return losses


class Marks(TrainerCallback):
    """Wall and CPU time at each step's end."""

    def __init__(self) -> None:
        self._at: list[dict[str, float]] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self._at.append({"wall": time.perf_counter(), "cpu": used.ru_utime + used.ru_stime})

    def between(self, clock: str) -> list[float]:
        """Seconds of each step but the first, which warms up."""
        times = [mark[clock] for mark in self._at]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


class Memory:
    """The most anonymous memory that this process held, and how much more that was than when this was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark of the most that was held to what is held now
        self._first = _status_bytes("RssAnon")

    def process_peak_bytes(self) -> int:
        return _status_bytes("VmHWM") - _status_bytes("RssFile")

    def peak_bytes(self) -> int:
        return self.process_peak_bytes() - self._first


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
