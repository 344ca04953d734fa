"""The loop against an independent plain one, against itself with other micro-batches, and its end."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alpaca.data.batching import collate, step_examples
from alpaca.data.examples import EncodedDataset
from alpaca.errors import InputError, NotEnoughSpace
from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import alpaca_prompt
from alpaca.training import gradients
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import resolve_settings
from alpaca.training.dataset import encode_data
from alpaca.training.guards import Interrupted, stoppable
from alpaca.training.loop import TrainingStopped, train

Configure = Callable[..., TrainConfig]


def history(folder: Path, key: str = "loss") -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def largest_difference(left: Path, right: Path) -> float:
    tensors = [load_file(folder / "model.safetensors") for folder in (left, right)]
    assert tensors[0].keys() == tensors[1].keys()
    return max((tensors[0][name] - tensors[1][name]).abs().max().item() for name in tensors[0])


# The original's recipe, plainly ---------------------------------------------------------------------------------


def plain_examples(records: Path, model_file: Path, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels: joint tokenization, EOS, cut, and the prompt's labels masked."""
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
        "\n\n### Response:"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    )
    pieces, examples = SentencePieceProcessor(model_file=str(model_file)), []
    for record in json.loads(records.read_text()):
        prompt = (with_input if record.get("input") else without).format_map(record)
        source = [1, *pieces.encode(prompt)][:max_length]
        ids = [1, *pieces.encode(prompt + record["output"]), 2][:max_length]
        labels = [-100] * len(source) + ids[len(source) :]
        examples.append((ids, labels))
    return examples


def plain_training(
    model, examples, batches, *, micro: int, lr: float, num_steps: int, average: str, pad_id: int = 480
) -> list[float]:
    """Losses of the original's padded recipe; `average` "micro_batch" is the mean of transformers' own losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    warmup, losses = math.ceil(0.03 * num_steps), []
    for step, batch in enumerate(batches):
        share = (step - warmup) / max(1, num_steps - warmup)
        optimizer.param_groups[0]["lr"] = lr * (
            step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        )
        parts = [batch[start : start + micro] for start in range(0, len(batch), micro)]
        num_targets = sum(label != -100 for index in batch for label in examples[index][1][1:])
        total = 0.0
        for part in parts:
            longest = max(len(examples[index][0]) for index in part)
            ids = torch.tensor([examples[i][0] + [pad_id] * (longest - len(examples[i][0])) for i in part])
            labels = torch.tensor([examples[i][1] + [-100] * (longest - len(examples[i][1])) for i in part])
            output = model(input_ids=ids, labels=labels, attention_mask=ids.ne(pad_id).long())
            own = (labels[:, 1:] != -100).sum()
            loss = output.loss * own / num_targets if average == "token" else output.loss / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("average", ["token", "micro_batch"])
@pytest.mark.fast_rows(1)
def test_losses_equal_a_plain_implementation(
    average: str, configure: Configure, tiny_llama: Path, sentencepiece_model: Path, records: Path
):
    config = configure(loss_average=average, num_train_epochs=2, per_device_train_batch_size=3, model_max_length=160)
    train(config)
    examples = plain_examples(records, sentencepiece_model, config.model_max_length)
    assert any(len(ids) == 160 for ids, _ in examples)  # some are cut
    taught = [pair for pair in examples if any(label != -100 for label in pair[1])]
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.resize_token_embeddings(481, mean_resizing=False)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        table.data[480] = table.data[:480].mean(0)
    num_steps = 2 * (len(taught) // 8)
    batches = [
        step_examples(len(taught), global_batch_size=8, seed=42, step=step).tolist() for step in range(num_steps)
    ]
    expected = plain_training(model.train(), taught, batches, micro=3, lr=1e-3, num_steps=num_steps, average=average)
    assert history(Path(config.output_dir)) == pytest.approx(expected, abs=2e-5)
    final = load_file(Path(config.output_dir) / "model.safetensors")
    for name, parameter in model.state_dict().items():
        assert torch.allclose(final[name], parameter, atol=2e-5), name


# Equalities with itself -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulation_8_times_1_is_1_times_8(configure: Configure, tmp_path: Path):
    layouts = [(8, 1), (1, 8), (3, 3)]
    folders = [
        train(
            configure(
                output_dir=str(tmp_path / f"{micro}x{accumulation}"),
                learning_rate=2e-4,
                max_steps=6,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation,
            )
        )
        for micro, accumulation in layouts
    ]
    for folder in folders[1:]:
        assert history(folder) == pytest.approx(history(folders[0]), abs=1e-5)
        assert history(folder, "grad_norm") == pytest.approx(history(folders[0], "grad_norm"), rel=1e-4)
        assert largest_difference(folder, folders[0]) < 1e-5


def test_a_mean_of_means_does_depend_on_the_micro_batches(configure: Configure, tmp_path: Path):
    folders = [
        train(
            configure(
                output_dir=str(tmp_path / str(micro)),
                per_device_train_batch_size=micro,
                loss_average="micro_batch",
                max_steps=1,
            )
        )
        for micro in (8, 2)
    ]
    assert abs(history(folders[0])[0] - history(folders[1])[0]) > 1e-4


@pytest.mark.slow
def test_recomputed_activations_change_nothing(configure: Configure, tmp_path: Path):
    folders = [
        train(configure(output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, num_train_epochs=1))
        for on in (False, True)
    ]
    assert history(folders[0]) == history(folders[1])
    assert largest_difference(*folders) == 0


def test_the_log_says_what_was_done(configure: Configure):
    heard: list[dict] = []
    folder = train(configure(num_train_epochs=2, logging_steps=3), on_step=heard.append)
    assert [entry["step"] for entry in heard] == list(range(1, 11))
    assert {entry["max_steps"] for entry in heard} == {10}
    assert heard[0]["learning_rate"] == 0
    assert heard[1]["learning_rate"] == 1e-3
    assert history(folder, "step") == [3, 6, 9, 10]
    losses = [entry["loss"] for entry in heard]
    windows = [losses[start : start + 3] for start in (0, 3, 6, 9)]
    assert history(folder) == pytest.approx([sum(window) / len(window) for window in windows])
    assert all(rate > 0 for rate in history(folder, "tokens_per_second"))
    assert history(folder, "epoch") == [0.6, 1.2, 1.8, 2.0]


def test_a_set_smaller_than_the_batch_is_one_step_an_epoch(configure: Configure):
    heard: list[dict] = []
    train(configure(global_batch_size=128, num_train_epochs=2), on_step=heard.append)
    assert [entry["epoch"] for entry in heard] == [1.0, 2.0]


# What the model learns ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_model_learns_its_examples_by_heart(configure: Configure, records: Path, tmp_path: Path):
    few = [r for r in json.loads(records.read_text()) if len(r["output"]) < 60 and len(r.get("input") or "") < 40][:6]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(few))
    folder = train(
        configure(
            data_path=str(path), max_steps=50, learning_rate=1e-2, global_batch_size=6, per_device_train_batch_size=6
        )
    )  # fmt: skip
    assert history(folder)[-1] < 0.02
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    for record in few[:3]:
        prompt = [
            *tokenizer.prefix_ids,
            *tokenizer.encode(alpaca_prompt(record["instruction"], record.get("input") or "")),
        ]
        output = model.generate(torch.tensor([prompt]), max_new_tokens=100, attention_mask=torch.ones(1, len(prompt)))
        answer = tokenizer.decode(output[0, len(prompt) :].tolist())
        assert answer.strip() == record["output"].strip()
    ids = AutoTokenizer.from_pretrained(folder)("Name a fruit.")["input_ids"]
    assert ids == [*tokenizer.prefix_ids, *tokenizer.encode("Name a fruit.")]


@pytest.mark.slow
def test_bf16_training_stays_near_float32(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = train(configure(output_dir=str(tmp_path / "float32"), max_steps=4))
    monkeypatch.setattr("alpaca.training.configuration.resolving._has_bf16", lambda device: True)
    half = train(configure(output_dir=str(tmp_path / "bf16"), bf16=True, max_steps=4))
    assert history(half) == pytest.approx(history(full), abs=0.05)
    assert history(half) != history(full)
    assert load_file(half / "model.safetensors")["lm_head.weight"].dtype == torch.float32


# Evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_held_out_loss_is_a_mean_over_tokens_before_during_and_after(configure: Configure, tmp_path: Path):
    config = configure(
        val_set_size=6, eval_strategy="steps", eval_steps=3, num_train_epochs=2, per_device_eval_batch_size=4
    )
    folder = train(config)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 3, 6, 8]
    other = configure(
        val_set_size=6,
        eval_strategy="epoch",
        num_train_epochs=2,
        per_device_eval_batch_size=1,
        output_dir=str(tmp_path / "other"),
    )
    losses = history(train(other), "eval_loss")
    assert len(losses) == 3
    assert [losses[0], losses[-1]] == pytest.approx([history(folder, "eval_loss")[i] for i in (0, -1)], abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_evaluation_on_a_file_leaves_the_training_alone(configure: Configure, records: Path, tmp_path: Path):
    plain = train(configure(output_dir=str(tmp_path / "plain"), num_train_epochs=1))
    config = configure(
        output_dir=str(tmp_path / "evaluated"), num_train_epochs=1, eval_data_path=str(records), eval_strategy="epoch"
    )
    evaluated = train(config)
    assert history(plain) == history(evaluated)
    assert len(history(evaluated, "eval_loss")) == 2
    assert largest_difference(plain, evaluated) == 0


# Ends -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_the_run_and_saves_nothing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
):
    config, real = configure(save_steps=2, save_total_limit=9), gradients.sum_losses
    calls = iter(range(1000))

    def broken(*arguments, **given):
        return real(*arguments, **given) * (math.nan if next(calls) >= 2 * 5 else 1)  # 2 micro-batches a step

    monkeypatch.setattr(gradients, "sum_losses", broken)
    with pytest.raises(InputError, match=r"step 6: the loss is nan .* nothing was saved over the last checkpoint"):
        train(config)
    names = {path.name for path in Path(config.output_dir).iterdir()}
    assert names == {"checkpoint-2", "checkpoint-4", "train_config.json"}


@pytest.mark.parametrize("num_asked", [1, 2, 5])
def test_one_that_nobody_wants_ends_within_a_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, num_asked: int
):
    """Once before the model is loaded, then before each micro-batch; of the first step there are two."""
    config, real, summed, asked = configure(save_steps=1), gradients.sum_losses, [], []
    monkeypatch.setattr(gradients, "sum_losses", lambda *given, **named: summed.append(1) or real(*given, **named))
    with (
        stoppable(lambda: asked.append(1) or len(asked) == num_asked),
        pytest.raises(Interrupted, match="the training was stopped"),
    ):
        train(config)
    assert len(summed) == max(0, num_asked - 3)


def test_a_caller_can_stop_it(configure: Configure):
    config = configure(num_train_epochs=5)
    answers = iter([False, False, True])
    with pytest.raises(
        TrainingStopped, match=r"stopped after step 3 of 25, saved in .*checkpoint-3; go on with"
    ) as stopped:
        train(config, should_stop=lambda: next(answers))
    assert stopped.value.signal == 0
    assert (Path(config.output_dir) / "checkpoint-3" / "trainer_state.json").is_file()


def test_too_little_memory_says_what_to_lower(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments, **given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(gradients, "sum_losses", full)
    with pytest.raises(
        NotEnoughSpace, match=r"in step 1: CUDA out of memory.*2.00 GiB.\nlower --per_device_train_batch"
    ):
        train(configure())


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.fast_rows(1)
def test_smoothed_labels_are_transformers(configure: Configure, padding_free: bool):
    """The first step's loss is that of the Trainer's LabelSmoother; evaluation stays without."""
    from transformers.trainer_pt_utils import LabelSmoother

    folder = train(
        configure(
            label_smoothing_factor=0.1, padding_free=padding_free, max_steps=1, learning_rate=0.0, val_set_size=8,
            seed=3, eval_strategy="epoch",
        )
    )  # fmt: skip
    plain = train(configure(output_dir=f"{folder}-plain", max_steps=1, learning_rate=0.0, val_set_size=8, seed=3))
    model, data = AutoModelForCausalLM.from_pretrained(folder), read_run_data(configure(val_set_size=8, seed=3))
    order = step_examples(len(data), global_batch_size=8, seed=3, step=0)
    batch = collate([data.example(index) for index in order.tolist()], pad_id=0)
    outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    expected = LabelSmoother(epsilon=0.1)({"logits": outputs.logits}, batch.labels, shift_labels=True)
    assert history(folder)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert history(folder)[0] != pytest.approx(history(plain)[0], rel=1e-4)
    assert history(folder, "eval_loss")[0] == history(folder, "eval_loss")[-1]


def read_run_data(config: TrainConfig) -> EncodedDataset:
    """What a run trains on."""
    settings = resolve_settings(config, num_processes=1, device=torch.device("cpu"))
    return encode_data(settings.data, load_tokenizer(config.model_name_or_path), progress=False).train
