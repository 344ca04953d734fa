"""transformers' Trainer with PEFT, and TRL: LoRA as the recipe has it, on the same examples, told step by step.

Both get what makes them fast on one card: bfloat16, the fused AdamW, no recomputed activations. Their models are drawn
on the card like ours. A rate counts useful tokens (no padding) of a step over its wall time, the first step left out.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from alpaca.data.batching import collate
from alpaca.data.encoding.prompt_layout import PromptLayout
from alpaca.data.examples import MASKED_LABEL, EncodedDataset, encode_examples
from alpaca.data.records import read_examples
from alpaca.text.loading import load_tokenizer
from bench.gpu.child import Report
from bench.gpu.fine_tuning import examples_path
from bench.gpu.model import drawn_model, hollow_folder
from bench.gpu.scale import Scale, choose_scale
from bench.machine import DEVICE, synchronize

_MICRO_BATCH = 4
Feature = dict[str, object]


class StepTimer(TrainerCallback):
    """Useful tokens a second of each step, which it tells as soon as the step is over."""

    def __init__(self, report: Report, name: str, steps: int) -> None:
        self._report, self._name, self._steps = report, name, steps
        self.num_tokens = 0  # of the micro-batches since the last step; the collator counts
        self.rates: list[float] = []
        self._since = 0.0

    def counting(self, collate_features: Callable[[list[Feature]], dict]) -> Callable[[list[Feature]], dict]:
        """A collator that counts the tokens it lays out."""

        def counted(features: list[Feature]) -> dict:
            self.num_tokens += sum(len(feature["input_ids"]) for feature in features)
            return collate_features(features)

        return counted

    def on_step_end(self, *_: object, **__: object) -> None:
        """The Trainer's own call after each optimizer step; it fetches a step's micro-batches when it begins."""
        synchronize()
        now = time.perf_counter()
        if self._since:
            self.rates.append(self.num_tokens / (now - self._since))
        self._since, self.num_tokens = now, 0
        known = {"tokens_per_second": statistics.median(self.rates)} if self.rates else {}
        self._report.row(self._name, steps=self._steps, steps_done=len(self.rates) + 1, rates=self.rates, **known)


def train_with_trainer(report: Report) -> None:
    """transformers' Trainer: right-padded micro-batches of four."""
    scale, name = choose_scale(), "trainer peft lora"
    with report.guarded(name), hollow_folder(scale.shape, _dtype()) as folder:
        data, pad_id = encode(folder, scale)
        timer = StepTimer(report, name, scale.steps)

        def pad(features: list[Feature]) -> dict:
            batch = collate([(feature["input_ids"], feature["labels"]) for feature in features], pad_id=pad_id)
            return {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}

        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(
                model=adapted_model(folder), args=TrainingArguments(**trainer_settings(out, scale)),
                train_dataset=tensors_of(data), data_collator=timer.counting(pad), callbacks=[timer],
            )  # fmt: skip
            run_trainer(report, name, trainer, timer, attention=trainer.model.config._attn_implementation)


def train_with_trl(report: Report) -> None:
    """TRL's SFTTrainer without padding, and with its head that computes target positions in chunks where it has one."""
    scale, name = choose_scale(), "trl lora"
    missing = [package for package in ("trl", "datasets") if importlib.util.find_spec(package) is None]
    if missing:
        report.row(name, left_out=f"not run: {' and '.join(missing)} not installed")
        return
    import trl

    with report.guarded(name), hollow_folder(scale.shape, _dtype()) as folder:
        data, _ = encode(folder, scale)
        timer = StepTimer(report, name, scale.steps)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        with tempfile.TemporaryDirectory() as out:
            args = trl.SFTConfig(**trl_settings(trainer_settings(out, scale)))
            trainer = trl.SFTTrainer(
                model=adapted_model(folder), args=args, processing_class=tokenizer, train_dataset=table_of(data),
                callbacks=[timer],
            )  # fmt: skip
            trainer.data_collator = timer.counting(trainer.data_collator)
            attention = trainer.model.config._attn_implementation
            head = "liger" if args.use_liger_kernel else f"trl {trl.__version__}, loss_type {args.loss_type}"
            run_trainer(report, name, trainer, timer, attention=attention, head=head)


def run_trainer(report: Report, name: str, trainer: Trainer, timer: StepTimer, **more: object) -> None:
    """Train, and tell the row as a whole."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    report.row(
        name, steps=len(timer.rates) + 1, rates=timer.rates, tokens_per_second=statistics.median(timer.rates),
        peak_bytes=peak, **more,
    )  # fmt: skip


# What they are given


def trainer_settings(out: str, scale: Scale) -> dict[str, object]:
    """The recipe's step in the Trainer's words."""
    return {
        "output_dir": out, "per_device_train_batch_size": min(_MICRO_BATCH, scale.examples),
        "gradient_accumulation_steps": max(1, scale.examples // _MICRO_BATCH), "max_steps": scale.steps,
        "learning_rate": 3e-4, "lr_scheduler_type": "constant", "bf16": DEVICE == "cuda", "use_cpu": DEVICE == "cpu",
        "optim": "adamw_torch_fused" if DEVICE == "cuda" else "adamw_torch", "gradient_checkpointing": False,
        "save_strategy": "no", "report_to": [], "logging_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False,
    }  # fmt: skip


def trl_settings(settings: dict[str, object]) -> dict[str, object]:
    """The same for TRL, without padding.

    Its head computes target positions alone: liger's where that is installed, else TRL's own, the default of its
    releases since 1.6.
    """
    made = {name: value for name, value in settings.items() if name != "remove_unused_columns"}
    made |= {"max_length": None, "padding_free": True, "completion_only_loss": True}  # they are cut already
    return {**made, "use_liger_kernel": importlib.util.find_spec("liger_kernel") is not None}


def encode(folder: Path, scale: Scale) -> tuple[EncodedDataset, int]:
    """The examples as the recipe encodes them, and the id that fills up."""
    tokenizer = load_tokenizer(folder)
    data = encode_examples(
        read_examples(examples_path()), PromptLayout("alpaca", tokenizer), max_length=scale.max_length, progress=False
    )
    return data, tokenizer.fill_id


def tensors_of(data: EncodedDataset) -> Sequence[Feature]:
    """Ids and labels of each example."""
    return [dict(zip(("input_ids", "labels"), data.example(index), strict=True)) for index in range(len(data))]


def table_of(data: EncodedDataset) -> object:
    """The same as TRL reads examples that are encoded already: ids, and which of them carry loss."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    examples = [data.example(index) for index in range(len(data))]
    columns = {
        "input_ids": [ids.tolist() for ids, _ in examples],
        "completion_mask": [(labels != MASKED_LABEL).long().tolist() for _, labels in examples],
    }
    # Named by hand: datasets would hash the table, at which it fails with some releases of pyarrow (5.2 with 26).
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint="alpaca-bench")


def adapted_model(folder: Path) -> torch.nn.Module:
    """LoRA of rank 8 on query and value, as the recipe has it, on a model that was drawn on the device."""
    from peft import LoraConfig, get_peft_model

    has_flash = DEVICE == "cuda" and importlib.util.find_spec("flash_attn") is not None
    model = drawn_model(folder, _dtype(), attention="flash_attention_2" if has_flash else None)
    model.config.use_cache = False
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], bias="none"
    )
    return get_peft_model(model.train(), settings)


def _dtype() -> str:
    return "bfloat16" if DEVICE == "cuda" else "float32"
