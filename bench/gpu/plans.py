"""The four parts: their jobs in order of importance, their seconds, and what their rows should reach."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.gpu.jobs import JobPlan
from bench.targets import Target

Row = Mapping[str, object]
Rows = Mapping[str, Row]

MACHINE = JobPlan(name="machine", limit_s=60, module="bench.gpu.machine_job")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One call of the kit. The jobs of a stage run side by side, so only those whose times do not count share one."""

    name: str
    help: str
    budget_s: float
    stages: tuple[tuple[JobPlan, ...], ...]
    make_targets: Callable[[Rows], list[Target]]


def figure(rows: Rows, name: str, key: str) -> float | None:
    """A figure of a row, or None where there is none."""
    value = rows.get(name, {}).get(key)
    return float(value) if isinstance(value, (int, float)) else None


def ratio(rows: Rows, over: str, under: str, *, least: float | None = None) -> Target:
    """The rate of one row over that of another."""
    upper, lower = (figure(rows, name, "tokens_per_s") for name in (over, under))
    return Target(label=f"{over} / {under}", value=upper / lower if upper and lower else None, least=least)


# What rows should reach: ratios on the card at hand, so that they hold for any.


def check_targets(rows: Rows) -> list[Target]:
    """All tests pass, the real model's text is the published one, no kernel spills."""
    right = rows.get("real 260K float32", {}).get("is_right")
    names = [f"kernels {kind}" for kind in ("none", "int8", "nf4", "adapters and optimizer")]
    spilling = [rows[name]["spilling"] for name in names if "spilling" in rows.get(name, {})]
    whole = figure(rows, "tests", "shards_done") == figure(rows, "tests", "shards")
    return [
        Target(label="GPU tests that failed", value=figure(rows, "tests", "failed") if whole else None, most=0),
        Target(label="the real model's text, float32", value=None if right is None else float(right), least=1),
        Target(label="kernels that spill", value=sum(map(len, spilling)) if spilling else None, most=0),
        Target(label="decode 1: share of bandwidth", value=figure(rows, "decode 1", "share_of_bandwidth"), least=0.74),
    ]


def serve_targets(rows: Rows) -> list[Target]:
    """The engine against the card's bandwidth and against transformers."""
    return [
        Target(label="batch 1: share of bandwidth", value=figure(rows, "batch 1", "share_of_bandwidth"), least=0.74),
        ratio(rows, "batch 1", "generate eager", least=3.0),
        ratio(rows, "batch 1", "generate compiled", least=1.5),
        ratio(rows, "32 streams", "continuous batching 32 streams", least=1.3),
        *(_sampling_cost(rows, kind) for kind in ("temperature", "top_p and top_k")),
        ratio(rows, "int8 batch 1", "batch 1", least=1.6),
        ratio(rows, "nf4 batch 1", "batch 1", least=2.0),
        Target(
            label="first token alone: median ms", value=figure(rows, "first token alone", "first_token_ms_p50"), most=20
        ),
        ratio(rows, "server 32 streams", "32 streams"),
    ]


def _sampling_cost(rows: Rows, kind: str) -> Target:
    greedy, sampled = (figure(rows, name, "tokens_per_s") for name in ("32 streams", f"32 streams {kind}"))
    value = 1 - sampled / greedy if greedy and sampled else None
    return Target(label=f"32 streams: cost of {kind}", value=value, most=0.03)


def train_targets(rows: Rows) -> list[Target]:
    """Fine-tuning against the card's own matrix rate, against the Trainer, and within the planned memory."""
    rates = {name: figure(rows, name, "tokens_per_second") for name in ("lora", "trainer peft lora", "trl lora")}

    def over(peer: str) -> float | None:
        return rates["lora"] / rates[peer] if rates["lora"] and rates[peer] else None

    peak, planned = figure(rows, "qlora", "peak_bytes"), [figure(rows, name, "peak_over_planned") for name in ("lora", "full fast", "qlora")]  # fmt: skip  # noqa: E501
    errors = [abs(value - 1) for value in planned if value]
    return [
        Target(
            label="full fast: share of the matrix rate", value=figure(rows, "full fast", "share_of_matrix_rate"),
            least=0.43,
        ),
        Target(label="lora / Trainer with PEFT", value=over("trainer peft lora"), least=1.4),
        Target(label="lora / TRL", value=over("trl lora"), least=1.0),
        Target(label="qlora: peak GiB", value=peak / 2**30 if peak else None, most=7.4),
        Target(label="largest error of a planned peak", value=max(errors, default=None), most=0.10),
    ]  # fmt: skip


def start_targets(rows: Rows) -> list[Target]:
    """Start to first token with built kernels."""
    name = "engine, kernels cached"
    server = "server, kernels cached"
    return [
        Target(label=f"{name}: s to the first token", value=figure(rows, name, "first_token_s"), most=20),
        Target(label=f"{server}: s to the first token", value=figure(rows, server, "first_token_s"), most=20),
    ]


PARTS = {
    part.name: part
    for part in (
        Part(
            name="check",
            help="GPU tests, the real 260K model's text, every kernel built, decoding and one LoRA step at 7B's shape",
            budget_s=200,
            stages=(
                tuple(
                    JobPlan(name=name, limit_s=115)
                    for name in ("tests", "real", "kernels-none", "kernels-int8", "kernels-nf4", "kernels-other")
                ),
                (JobPlan(name="decode", limit_s=75),),
                (JobPlan(name="lora", limit_s=60),),
            ),
            make_targets=check_targets,
        ),
        Part(
            name="serve",
            help="bf16, int8 and nf4, sampling, first tokens, prefill, Cog's server; beside transformers",
            budget_s=300,
            stages=(
                (JobPlan(name="engine", limit_s=165),),
                (JobPlan(name="int8", limit_s=60),),
                (JobPlan(name="nf4", limit_s=60),),
                (JobPlan(name="compiled", limit_s=110, least_s=30),),
                (JobPlan(name="server", limit_s=90, least_s=30),),
            ),
            make_targets=serve_targets,
        ),
        Part(
            name="train",
            help="LoRA, full with --numerics fast and QLoRA of 7B's shape; beside Trainer with PEFT, and TRL",
            budget_s=300,
            stages=(
                (JobPlan(name="lora", limit_s=75),),
                (JobPlan(name="trainer", limit_s=75),),
                (JobPlan(name="full", limit_s=90),),
                (JobPlan(name="qlora", limit_s=100, least_s=30),),
                (JobPlan(name="trl", limit_s=75, least_s=20),),
            ),
            make_targets=train_targets,
        ),
        Part(
            name="start",
            help="process start to first token, phase by phase, with kernels cached and built anew",
            budget_s=120,
            stages=((JobPlan(name="starts", limit_s=120),),),
            make_targets=start_targets,
        ),
    )
}
