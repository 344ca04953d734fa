"""Chooses the engine for a folder and starts it: reads the weights, divides the memory, warms up, logs what it did."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError, MissingInput, NotEnoughSpace, UnsupportedModel
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.pickled import open_model_weights
from alpaca.formats.hf.saved.unpacking import saved_quantization
from alpaca.memory import free_memory
from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import Engine, complete_texts
from alpaca.serving.housekeeping import Phases
from alpaca.serving.kernels.cpu_linear import cpu_multiplies
from alpaca.serving.kernels.native.library import load as load_native
from alpaca.serving.llama.adapters import check_for_llama, largest_ranks, with_adapters
from alpaca.serving.llama.cache import BlockPool
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.planning import BLOCK_SIZE, PREFILL_TOKENS, MemoryPlan, advice, plan_memory
from alpaca.serving.llama.runner import Runner
from alpaca.serving.llama.scheduler import Scheduler
from alpaca.serving.llama.weights import load_llama, read_llama, reading_size
from alpaca.serving.request import PredictionInputs, make_request
from alpaca.serving.served_model import (
    ServedModel,
    adapter_names,
    check_tokenizers,
    describe_other_bases,
    obey_saved_quantization,
    open_served_model,
)
from alpaca.serving.settings import ServerSettings
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import RAW_TEMPLATE
from alpaca.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_TEMPLATE_TOKENS = 200  # more than the filled template has with any tokenizer


def load_engine(folder: Path, settings: ServerSettings, phases: Phases | None = None) -> Engine:
    """Start the engine that ALPACA_ENGINE names. auto takes the LLaMA engine if that supports the model.

    `folder` holds a model, or an adapter, whose base model is found by its config or the setting.
    Raises the errors of `alpaca.errors`.
    """
    phases = phases or Phases()
    try:
        served = open_served_model(folder, settings)
        settings = obey_saved_quantization(served.base, settings)
        for name, adapter in served.adapters.items():
            logger.info("adapter %s: %s, from %s", name, adapter.describe(), adapter.path)
        for text in describe_other_bases(served, settings):
            logger.warning("%s", text)
        engine = _choose_engine(served, settings, phases)
        engine.prepare()
        phases.end("constraints")
        answer_one_request(engine)
    except torch.OutOfMemoryError as error:
        raise NotEnoughSpace(
            f"the GPU's memory does not suffice for {folder}, quantization {settings.quantization}: "
            f"{str(error).splitlines()[0]} {advice(settings)}; a lower ALPACA_MEMORY_FRACTION leaves more for a step"
        ) from error
    phases.end("first request")
    return engine


def answer_one_request(engine: Engine) -> None:
    """Answer one request, so that the first client need not wait. The Alpaca preamble stays in the cache.

    Raises what the request fails with.
    """
    template = "alpaca" if engine.max_context > _TEMPLATE_TOKENS else RAW_TEMPLATE
    asked = PredictionInputs(prompt="Hello", prompt_template=template, max_new_tokens=8, min_new_tokens=2)
    request = make_request(asked, engine.tokenizer, max_context=engine.max_context, adapters=engine.adapters)
    generation = engine.submit(request)
    list(complete_texts(generation, [CompletionText(engine.tokenizer, request.prompt_ids)]))


def _choose_engine(served: ServedModel, settings: ServerSettings, phases: Phases) -> Engine:
    folder = served.base
    if not (folder / "config.json").is_file():
        raise MissingInput(f"{folder} holds no model: no config.json; found: {list_folder(folder)}")
    if settings.engine == "transformers":
        return _load_transformers(served, settings, phases)
    try:
        config = read_llama(folder)
    except UnsupportedModel as error:
        if settings.engine == "llama":
            raise
        logger.info("served by transformers: %s", error)
        return _load_transformers(served, settings, phases)
    return _load_llama(served, config, settings, phases)


def _load_transformers(served: ServedModel, settings: ServerSettings, phases: Phases) -> Engine:
    from alpaca.serving.hugging_face.engine import load_transformers_engine  # importing transformers takes 2 s

    phases.end("importing transformers")
    engine = load_transformers_engine(served.base, settings, served.adapters)
    phases.end("weights")
    return engine


def _load_llama(served: ServedModel, config: ModelDescription, settings: ServerSettings, phases: Phases) -> LlamaEngine:
    """Start a LLaMA engine on the GPU, or on the CPU if there is none."""
    check_for_llama(served.adapters, config)  # before the weights are read
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, held = choose_dtypes(settings, device)
    if settings.max_context is not None and settings.max_context > config.max_context:
        logger.warning(
            "ALPACA_MAX_CONTEXT %d is cut to the model's context of %d tokens", settings.max_context, config.max_context
        )
    tokenizer = _load_tokenizer(served, config)
    phases.end("tokenizer")
    model = with_adapters(
        _load_model(served.base, config, settings, device=device, dtype=dtype, held=held), served.adapters
    )
    phases.end("weights")
    plan = plan_memory(
        config, settings, free_bytes=free_memory(device), device=device.type, dtype=dtype,
        adapter_bytes=model.adapters.num_bytes if model.adapters else 0, num_ranks=largest_ranks(served.adapters),
    )  # fmt: skip
    eos_ids = read_eos_ids(served.base, tokenizer, vocab_size=config.vocab_size)
    vocab_size = min(config.vocab_size, max([tokenizer.size, *(token_id + 1 for token_id in eos_ids)]))
    runner, scheduler = _make_runner(model, plan, vocab_size=vocab_size, eos_ids=eos_ids)
    phases.end("cache")
    _warm_up(runner, plan)
    phases.end("kernels and graphs")
    _log_loaded(served, settings, runner, plan, held=held)
    return LlamaEngine(
        runner,
        scheduler,
        tokenizer,
        max_context=plan.max_context,
        beams=_beams(served, settings, runner, tokenizer, plan.max_context),
        launches_ahead=device.type == "cuda",
        adapters=adapter_names(served.adapters),
    )


def _load_tokenizer(served: ServedModel, config: ModelDescription) -> Tokenizer:
    """The base model's tokenizer. Raises InputError if the model has too few rows for it, or an adapter has another."""
    tokenizer = load_tokenizer(served.base)
    tokenizer.require_rows(config.vocab_size, served.base)
    check_tokenizers(served.adapters, tokenizer)
    return tokenizer


def _log_loaded(
    served: ServedModel, settings: ServerSettings, runner: Runner, plan: MemoryPlan, *, held: torch.dtype | None
) -> None:
    """Log one line: what is served, in which precision, and what the memory is used for."""
    model, config = runner.model, runner.model.config
    precision = (f"{model.dtype} of {held} weights" if held else str(model.dtype)).replace("torch.", "")
    logger.info(
        "%s: %.1f M weights, %s on %s, quantization %s, %.2f GB; context %d tokens, %d blocks of %d tokens (%.2f GB), "
        "up to %d sequences a step; %s%s",
        served.base, config.num_parameters / 1e6,
        precision, model.device, settings.quantization, model.num_bytes / 1e9,
        plan.max_context, plan.num_blocks, BLOCK_SIZE, plan.kv_bytes / 1e9, plan.max_running,
        f"graphs for {runner.graphs.buckets} sequences" if runner.graphs else "no graphs",
        f"; {len(served.adapters)} adapters, {plan.adapter_bytes / 1e9:.2f} GB" if served.adapters else "",
    )  # fmt: skip


def _load_model(
    folder: Path,
    config: ModelDescription,
    settings: ServerSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    held: torch.dtype | None,
) -> LlamaModel:
    from tqdm import tqdm

    saved = saved_quantization(read_json(folder / "config.json"))
    quantization = settings.quantization if saved == "none" else "none"  # what was saved whole beside it stays whole
    weights = open_model_weights(folder, dtype=dtype if quantization == "none" else None)
    total = reading_size(config, weights)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None, file=sys.stderr) as bar:
        return load_llama(
            weights,
            config,
            device=device,
            dtype=dtype,
            quantization=quantization,
            num_positions=config.max_context,
            ops=choose_ops(device, dtype=dtype, head_width=config.head_width),
            held=held,
            progress=bar.update,
        )


def choose_dtypes(settings: ServerSettings, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype that is computed in, and the one that weights are held in where that is another one that was asked for.

    Without ALPACA_DTYPE, bfloat16 on a GPU and float32 on a CPU. A CPU without units for bfloat16 or float16 takes
    several times as long with them as with float32, so there they are but held.
    Raises InputError if the GPU lacks bfloat16.
    """
    wanted = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, wanted)
    if device.type == "cuda":
        if wanted == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError("this GPU has no bfloat16 (Ampere and later have): set ALPACA_DTYPE to float16")
        return dtype, None
    if dtype == torch.float32 or cpu_multiplies(dtype) or load_native() is None:
        return dtype, None
    logger.info("this CPU has no units for %s: weights are held so, and multiplied in float32", wanted)
    return torch.float32, dtype


def choose_ops(device: torch.device, *, dtype: torch.dtype, head_width: int) -> ModuleType:
    """The module with the network's fused operations: Triton's kernels, our C++ ones, or torch."""
    if device.type == "cuda":
        from alpaca.serving.kernels import triton_ops

        return triton_ops
    from alpaca.serving.kernels.native import ops as native_ops

    if native_ops.fits(head_width=head_width, block_size=BLOCK_SIZE, dtype=dtype):
        return native_ops
    from alpaca.serving.kernels import ops

    return ops


def _make_runner(
    model: LlamaModel, plan: MemoryPlan, *, vocab_size: int, eos_ids: frozenset[int]
) -> tuple[Runner, Scheduler]:
    cache = KeyValueCache(
        model.config, num_blocks=plan.num_blocks, block_size=BLOCK_SIZE, dtype=model.dtype, device=model.device
    )
    runner = Runner(
        model,
        cache,
        max_running=plan.max_running,
        max_context=plan.max_context,
        vocab_size=vocab_size,
        eos_ids=eos_ids,
    )
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, BLOCK_SIZE),
        max_running=plan.max_running,
        max_step_tokens=plan.max_running + PREFILL_TOKENS[model.device.type],
        window=model.config.longest_window,
    )
    return runner, scheduler


def _warm_up(runner: Runner, plan: MemoryPlan) -> None:
    """Build the kernels and capture the graphs before the first request pays for them.

    Experts are counted on the host in every step, which no graph can hold.
    """
    if runner.model.device.type == "cuda":
        runner.compile_prefill()
        if runner.model.config.num_experts:
            return
        graphs = runner.make_graphs()
        graphs.capture()
        runner.graphs = graphs


def _beams(
    served: ServedModel, settings: ServerSettings, runner: Runner, tokenizer: Tokenizer, max_context: int
) -> Callable[[], Engine]:
    places = {
        name: adapter.path for name, adapter in served.adapters.items()
    }  # not the tensors: they are on the device
    base = served.base

    def load() -> Engine:
        from alpaca.serving.hugging_face.engine import TransformersEngine
        from alpaca.serving.hugging_face.shared_weights import as_transformers

        adapters = {name: open_adapter(place) for name, place in places.items()}
        twin = as_transformers(runner.model, base, with_adapters=bool(adapters))
        if twin is not None:
            return TransformersEngine(
                twin, tokenizer, max_context=max_context, eos_ids=runner.eos_ids, adapters=adapters
            )
        if settings.beam_search != "copy" or runner.model.device.type == "cuda":
            raise InputError(
                "beam search with experts, or with adapters on packed or quantized weights, needs the model a second "
                "time: leave num_beams at 1, or start the server with ALPACA_ENGINE=transformers, or on a CPU with "
                "ALPACA_BEAM_SEARCH=copy"
            )
        logger.info("beam search: transformers loads the model a second time now")
        return _load_transformers(ServedModel(base=base, adapters=adapters), settings, Phases())

    return load
