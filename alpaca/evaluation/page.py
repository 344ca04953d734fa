"""The result of an evaluation as one page, with nothing to load from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpaca.evaluation.tasks import read_metrics
from alpaca.files.atomic import write_text
from alpaca.pages.templates import render_page

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_COUNTED = {
    "answers": "answers", "mean_tokens": "tokens, mean", "mean_words": "words, mean",
    "mean_repetition": "repetition, mean", "going_round": "going round (repetition of a half and more)",
    "empty": "empty", "refusals": "refusals",
}  # fmt: skip


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a result."""
    write_text(path, make_page(result))


def make_page(result: Mapping[str, Any]) -> str:
    roles = list(result["models"])
    name = str(result["models"][roles[0]]["name"])
    return render_page(
        _TEMPLATE,
        title=f"Evaluation: {name}",
        heading=f"How good is {name}?",
        models={role: _model_text(model) for role, model in result["models"].items()},
        roles=roles,
        scores=_score_lines(result.get("tasks"), roles),
        held_out=_held_out_lines(result.get("held_out"), roles),
        counted=_counted_lines(result.get("answers"), roles),
        answers=_answer_texts(result, roles),
        origin=_origin_rows(result["provenance"]),
    )


def _model_text(model: Mapping[str, Any]) -> str:
    kind = "an adapter on its base" if model["adapter"] else "a whole model"
    digest = f", fingerprint {model['fingerprint'][:16]}" if model["fingerprint"] else ""
    return f"{model['name']} ({kind}{digest})"


def _score_lines(tasks: Mapping[str, Any] | None, roles: list[str]) -> list[list[str]]:
    """A line a metric: its name, each model's value, and the number of questions."""
    if not tasks:
        return []
    metrics = {role: read_metrics(tasks[role]) for role in roles}
    first = tasks[roles[0]]
    lines = []
    for name in metrics[roles[0]]:
        cells = [_with_error(*metrics[role][name]) for role in roles]
        counts = first.get("n-samples", {}).get(name.split(" ")[0], {})
        lines.append([name, *cells, f"{counts['effective']:,}" if "effective" in counts else ""])
    return lines


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _held_out_lines(held_out: Mapping[str, Any] | None, roles: list[str]) -> list[list[str]]:
    if not held_out:
        return []
    rows = {"loss": ".6f", "perplexity": ".4f", "num_kept": ",", "num_targets": ",", "max_length": ","}
    names = ("loss (mean over the answers' tokens)", "perplexity", "examples", "target tokens", "cut at, tokens")
    pairs = zip(names, rows.items(), strict=True)
    return [[name, *(format(held_out[role][key], form) for role in roles), ""] for name, (key, form) in pairs]


def _counted_lines(answers: Mapping[str, Any] | None, roles: list[str]) -> list[list[str]]:
    if not answers:
        return []
    lines = [[words, *(_short(answers[role]["summary"][key]) for role in roles), ""] for key, words in _COUNTED.items()]
    reasons = sorted({reason for role in roles for reason in answers[role]["summary"]["finish_reasons"]})
    for reason in reasons:
        counts = (str(answers[role]["summary"]["finish_reasons"].get(reason, 0)) for role in roles)
        lines.append([f"ended by {reason}", *counts, ""])
    return lines


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _answer_texts(result: Mapping[str, Any], roles: list[str]) -> list[dict[str, str]]:
    if "answers" not in result:
        return []
    texts = []
    for place, prompt in enumerate(result["prompts"]):
        each = {role: result["answers"][role]["each"][place]["text"] or "(nothing)" for role in roles}
        texts.append({"prompt": _prompt_text(prompt), **each})
    return texts


def _prompt_text(record: Mapping[str, Any]) -> str:
    if record.get("messages"):
        return "\n".join(f"{message['role']}: {message['content']}" for message in record["messages"])
    return "\n".join(filter(None, (record.get("prompt", ""), record.get("input", ""))))


def _origin_rows(origin: Mapping[str, Any]) -> dict[str, str]:
    hardware = origin["hardware"]
    return {
        "device": hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores",
        **{name: str(version) for name, version in origin["versions"].items()},
        "commit": origin["commit"],
        "seed": str(origin["seed"]),
        "command": origin["command"],
    }
