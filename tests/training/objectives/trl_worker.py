"""One of TRL's trainers over a list of records, in its order: its tokens, and each step's losses and measures.

    python trl_worker.py job.json result.json

Run by an interpreter that has TRL; nothing of this project is imported.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids", "chosen_input_ids",
          "rejected_input_ids")  # fmt: skip


def trainer_of(objective: str) -> tuple[type, type]:
    if objective == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig
    if objective == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    trainer_class, config_class = trainer_of(job["objective"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    arguments = config_class(
        output_dir=job["output_dir"], report_to="none", logging_steps=1, save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, lr_scheduler_type="constant", warmup_steps=0, num_train_epochs=1,
        train_sampling_strategy="sequential", disable_tqdm=True, seed=0, **job["arguments"],
    )  # fmt: skip
    data = Dataset.from_list(job["records"])
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    losses: list[float] = []
    compute = trainer.compute_loss

    def recorded(*given, **named):
        loss = compute(*given, **named)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    prepared = trainer.train_dataset
    tokens = {name: list(prepared[name]) for name in TOKENS if name in prepared.column_names}
    Path(result_file).write_text(json.dumps({"losses": losses, "history": history, "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
