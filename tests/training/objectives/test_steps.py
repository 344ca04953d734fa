"""Preference objectives against plain loops over single sequences by transformers' model, and against themselves."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import LlamaForCausalLM

from alpaca.data.batching import step_examples
from alpaca.training.checkpoints.state import REFERENCE_NAME
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.loop import train
from tests.samples import sampled
from tests.training.checkpoints.test_checkpoint import Crash, assert_same_run, crash_after
from tests.training.objectives.conftest import BATCH, CUT, NUM, VALUES
from tests.training.test_loop import largest_difference, plain_examples

Configure = Callable[..., TrainConfig]
Sequence = tuple[list[int], list[int]]  # ids and labels
STEPS, RATE = 3, 1e-3
BETAS = {"dpo": 0.3, "orpo": 0.4, "kto": 0.2}


def entries(folder: Path, key: str = "loss") -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if key in entry]


# A plain implementation -----------------------------------------------------------------------------------------


def answers(pairs: Path, model_file: Path, tmp_path: Path, max_length: int = CUT) -> list[Sequence]:
    """The chosen and the rejected sequence of each pair, one behind the other."""
    both = []
    for name in ("chosen", "rejected"):
        path = tmp_path / name
        path.write_text(json.dumps([{**one, "output": one[name]} for one in json.loads(pairs.read_text())]))
        both.append(plain_examples(path, model_file, max_length))
    return [sequence for pair in zip(*both, strict=True) for sequence in pair]


def token_logps(model: LlamaForCausalLM, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens but the first, and which of them are the answer's."""
    ids, labels = (torch.tensor(part) for part in sequence)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return -cross_entropy(logits, ids[1:], reduction="none"), labels[1:] != -100


def logp(model: LlamaForCausalLM, sequence: Sequence) -> Tensor:
    values, is_answer = token_logps(model, sequence)
    return values[is_answer].sum()


def plain_dpo(model, before, pairs: list[tuple[Sequence, Sequence]]) -> tuple[Tensor, dict[str, float]]:
    losses, rewards = [], []
    for chosen, rejected in pairs:
        with torch.no_grad():
            old = [logp(before, chosen), logp(before, rejected)]
        good, bad = logp(model, chosen) - old[0], logp(model, rejected) - old[1]
        losses.append(-0.9 * logsigmoid(0.3 * (good - bad)) - 0.1 * logsigmoid(0.3 * (bad - good)))
        rewards.append((0.3 * good.item(), 0.3 * bad.item()))
    return torch.stack(losses).mean(), measures_of(rewards)


def plain_orpo(model, pairs: list[tuple[Sequence, Sequence]], *, with_prompts: bool) -> tuple[Tensor, dict[str, float]]:
    crosses, ratios, rewards = [], [], []
    for chosen, rejected in pairs:
        values, is_answer = token_logps(model, chosen)
        crosses.append(-values if with_prompts else -values[is_answer])
        other, is_other = token_logps(model, rejected)
        good, bad = values[is_answer].mean().double(), other[is_other].mean().double()
        odds = [torch.log(torch.exp(mean) / (1 - torch.exp(mean))) for mean in (good, bad)]
        ratios.append(logsigmoid(odds[0] - odds[1]).float())
        rewards.append((0.4 * good.item(), 0.4 * bad.item()))
    cross = torch.cat(crosses).mean()
    return cross - 0.4 * torch.stack(ratios).mean(), {**measures_of(rewards), "nll_loss": cross.item()}


def plain_kto(
    model, before, own: list[Sequence], mismatched: list[Sequence], is_good: list[bool]
) -> tuple[Tensor, dict[str, float]]:
    with torch.no_grad():
        kl = max(0.0, sum((logp(model, one) - logp(before, one)).item() for one in mismatched) / len(mismatched))
        old = [logp(before, one) for one in own]
    losses, rewards = [], {True: [], False: []}
    for one, was, good in zip(own, old, is_good, strict=True):
        ratio = logp(model, one) - was
        value = torch.sigmoid(0.2 * (ratio - kl)) if good else torch.sigmoid(0.2 * (kl - ratio))
        losses.append((1.5 if good else 0.5) * (1 - value))
        rewards[good].append(0.2 * ratio.item())
    means = {name: sum(rewards[good]) / len(rewards[good]) for good, name in ((True, "chosen"), (False, "rejected"))}
    return torch.stack(losses).mean(), {"kl": kl, **{f"rewards/{name}": mean for name, mean in means.items()}}


def measures_of(rewards: list[tuple[float, float]]) -> dict[str, float]:
    num = len(rewards)
    return {
        "rewards/chosen": sum(good for good, _ in rewards) / num,
        "rewards/rejected": sum(bad for _, bad in rewards) / num,
        "rewards/margins": sum(good - bad for good, bad in rewards) / num,
        "rewards/accuracies": sum(good > bad for good, bad in rewards) / num,
    }


def mismatch(uncut: list[Sequence], indices: list[int], partners: dict[int, int]) -> list[Sequence]:
    made = []
    for index in indices:
        ids, labels = uncut[index]
        other_ids, other_labels = uncut[partners[index]]
        start = next(k for k, label in enumerate(labels) if label != -100)
        behind = next(k for k, label in enumerate(other_labels) if label != -100)
        made.append(((ids[:start] + other_ids[behind:])[:CUT], (labels[:start] + other_labels[behind:])[:CUT]))
    return made


def grown(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(481, mean_resizing=False)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        table.data[480] = table.data[:480].mean(0)
    return model.train()


def plain_partners(num: int) -> dict[int, int]:
    """Of each example the one before it in its first epoch's batch."""
    partners = {}
    for step in range(num // BATCH):
        own = step_examples(num, global_batch_size=BATCH, seed=42, step=step).tolist()
        partners |= {index: own[place - 1] for place, index in enumerate(own)}
    return partners


LAYOUTS = [(True, 8), (True, 2), (False, 3)]  # whether without padding, and examples of a micro-batch
FAST = [("dpo", LAYOUTS[1]), ("orpo with prompts", LAYOUTS[2]), ("kto", LAYOUTS[1])]


@pytest.mark.parametrize("kind", sampled(itertools.product(VALUES, LAYOUTS), *FAST))
def test_steps_equal_a_plain_implementation(
    kind: tuple[str, tuple[bool, int]], prefer: Configure, tiny_llama: Path, sentencepiece_model: Path, pairs: Path,
    tmp_path: Path,
):  # fmt: skip
    case, (padding_free, micro) = kind
    folder = train(
        prefer(case, max_steps=STEPS, padding_free=padding_free, per_device_train_batch_size=micro, save_strategy="no")
    )
    sequences = answers(pairs, sentencepiece_model, tmp_path)
    uncut = answers(pairs, sentencepiece_model, tmp_path, 10**6)
    assert len(sequences) == 2 * NUM
    assert any(len(ids) == CUT for ids, _ in sequences)
    num = 2 * NUM if case == "kto" else NUM
    model, before, partners = grown(tiny_llama), grown(tiny_llama), plain_partners(num)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-8, weight_decay=0.0)
    for step, entry in enumerate(entries(folder)):
        indices = step_examples(num, global_batch_size=BATCH, seed=42, step=step).tolist()
        own = [(sequences[2 * index], sequences[2 * index + 1]) for index in indices] if case != "kto" else []
        if case == "dpo":
            loss, measured = plain_dpo(model, before, own)
        elif case == "kto":
            others = mismatch(uncut, indices, partners)
            goods = [index % 2 == 0 for index in indices]
            loss, measured = plain_kto(model, before, [sequences[index] for index in indices], others, goods)
        else:
            loss, measured = plain_orpo(model, own, with_prompts="prompts" in case)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert entry["loss"] == pytest.approx(loss.item(), abs=2e-5)
        for name, value in measured.items():
            assert entry[name] == pytest.approx(value, abs=2e-4), name
    final = load_file(folder / "model.safetensors")
    for name, parameter in model.state_dict().items():
        assert torch.allclose(final[name], parameter, atol=3e-5), name


@pytest.mark.parametrize("case", ["dpo", "orpo", "kto"])
@pytest.mark.fast_rows(1)
def test_held_out_examples_are_measured_alike(case: str, prefer: Configure, pairs: Path):
    """What is held out is what was trained on: the evaluation after a step is the next step's own entry."""
    one_batch = {"global_batch_size": NUM * (2 if case == "kto" else 1), "max_steps": 3, "save_strategy": "no"}
    folder = train(prefer(case, eval_data_path=str(pairs), eval_strategy="steps", eval_steps=1, **one_batch))
    trained, held_out = entries(folder), entries(folder, "eval_loss")
    assert "eval_perplexity" not in held_out[0]
    exact = [name for name in trained[0] if "/" in name or name in ("loss", "nll_loss", "log_odds_ratio")]
    assert {"rewards/margins", "logps/chosen", "loss"} <= set(exact)
    for own, evaluated in zip(trained, held_out, strict=False):
        for name in exact:
            wide = {"abs": 0.05} if case == "kto" else {"abs": 2e-4}  # held-out answers are mismatched otherwise
            assert evaluated[f"eval_{name}"] == pytest.approx(own[name], **wide), name


# Runs that are killed, sharded, adapted -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", sampled(["full", "lora"], "full"))
@pytest.mark.parametrize("case", sampled(["dpo", "kto"], "dpo"))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    case: str, method: str, prefer: Configure, pairs: Path, tmp_path: Path
):
    held_out = str(pairs.with_name("held_out.json"))
    values = {"method": method, "max_steps": 6, "save_steps": 2, "logging_steps": 4, "eval_data_path": held_out}
    values |= {"eval_strategy": "steps", "eval_steps": 3}
    whole = train(prefer(case, output_dir=str(tmp_path / "whole"), **values))
    killed = prefer(case, output_dir=str(tmp_path / "resumed"), **values)
    with pytest.raises(Crash, match="on purpose"):
        train(killed, on_step=crash_after(3))
    assert (tmp_path / "resumed" / "checkpoint-2" / REFERENCE_NAME).is_file()
    resumed = train(prefer(case, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint="auto", **values))
    if method == "full":
        assert_same_run(whole, resumed)
        return
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_an_adapters_reference_is_its_base(
    prefer: Configure, tiny_llama: Path, sentencepiece_model: Path, pairs: Path, tmp_path: Path
):
    """A run that has moved compares with what the base alone, without an adapter, says of every answer."""
    folder = train(prefer("dpo", method="lora", max_steps=4, save_steps=4, learning_rate=1e-2))
    assert abs(entries(folder)[0]["rewards/margins"]) < 1e-4
    assert abs(entries(folder)[-1]["rewards/margins"]) > 0.1
    reference = load_file(folder / "checkpoint-4" / REFERENCE_NAME)["train.sequences"]
    base = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([logp(base, one) for one in answers(pairs, sentencepiece_model, tmp_path)])
    assert torch.allclose(reference, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.slow
def test_micro_batches_change_nothing(prefer: Configure, tmp_path: Path):
    folders = [
        train(
            prefer("kto", output_dir=str(tmp_path / str(micro)), per_device_train_batch_size=micro, max_steps=4,
                   learning_rate=2e-4, save_strategy="no")
        )
        for micro in (8, 1)
    ]  # fmt: skip
    for one, other in zip(*map(entries, folders), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-3)
    assert largest_difference(*folders) < 2e-5
