"""The end of a run: its final model, verified, and its report."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

from alpaca.files.atomic import write_json, write_text
from alpaca.files.reading import read_json_if_any
from alpaca.text.chat.files import TEMPLATE_FILE
from alpaca.text.chat.trained_prompt import write_trained_prompt
from alpaca.text.eos import read_eos_ids
from alpaca.training.checkpoints.final import save_final
from alpaca.training.distributed import is_sharded
from alpaca.training.model.final import choose_save_dtype
from alpaca.training.planning.plan import share_of_peak
from alpaca.training.report.answers import Sample, answer_after
from alpaca.training.report.page import Record, write_report
from alpaca.training.report.scores import Scores, log_scores, score_final
from alpaca.training.report.summary import describe_summary, draw_losses, mean_rate, summarize, write_trainer_state
from alpaca.training.run import Run

logger = logging.getLogger(__name__)


def finish(run: Run, *, seconds: float, samples: list[Sample], score: Callable[[Path], Scores] | None = None) -> None:
    """Write and verify the final model and the run's report, which has the model's scores where `score` gives them.

    The report is written before the scores are known, too: they take a while, and may fail.
    """
    settings, output_dir = run.settings, run.settings.checkpoints.output_dir
    dtype = choose_save_dtype(settings, run.base)
    learned = any(entry.get("learning_rate", 0) > 0 for entry in run.progress.log_history)
    save_final(
        run.trainee.model,
        run.base,
        output_dir,
        dtype=dtype,
        learned=learned,
        world=run.world,
        write_beside=functools.partial(_write_prompt, run),
    )
    if run.world.is_main:
        history = run.progress.log_history
        summary = summarize(history, seconds=seconds)
        _write_state(run, summary)
        draw_losses(output_dir / "loss.png", history)
        record = _record(run, summary, samples)
        write_report(output_dir, record)
        logger.info("done: %s (%s), verified; %s", output_dir, str(dtype)[6:], describe_summary(summary))
    run.world.wait_for_all()
    if settings.report.eval_tasks and (scores := score_final(run, score)):
        log_scores(run, scores)
        _write_state(run, summary)
        write_report(output_dir, dataclasses.replace(record, scores=scores))


def _write_state(run: Run, summary: dict[str, object]) -> None:
    write_trainer_state(
        run.settings.checkpoints.output_dir,
        run.settings,
        run.progress.log_history,
        num_steps=run.num_steps,
        steps_per_epoch=run.steps_per_epoch,
        summary=summary,
    )


def _write_prompt(run: Run, folder: Path) -> None:
    """Say beside the weights by which prompt they are asked. Alpaca's goes unsaid, unless the base says another."""
    chosen, said = run.chosen, run.base.tokenizer.trained_prompt
    if chosen.template is not None:
        write_text(folder / TEMPLATE_FILE, chosen.template.source)
    if chosen.served != "alpaca" or said not in (None, chosen.served):
        write_trained_prompt(folder, chosen.served)
    _write_ends(run, folder)


def _write_ends(run: Run, folder: Path) -> None:
    """Name the tokens that end a turn as ends of an answer, where the base's configs do not: else it would go on."""
    base, ends, name = run.base, run.chosen.layout.ends, "generation_config.json"
    known = read_eos_ids(base.folder, base.tokenizer, vocab_size=base.tokenizer.size)
    if run.settings.model.is_full and ends:
        config = read_json_if_any(folder / name)
        write_json(folder / name, {**config, "eos_token_id": [base.tokenizer.eos_id, *sorted(ends)]})
    elif missing := ends.keys() - known:  # of an adapter: for the merged model, as the base's is what it is
        config = read_json_if_any(base.folder / name)
        write_json(folder / name, {**config, "eos_token_id": sorted(known | missing)})
        logger.warning(
            "answers of this adapter end with %s, which the base's configs do not name as EOS: merge it, or ask with "
            "that text in `stop`, or add the id to eos_token_id in the base's generation_config.json",
            ", ".join(repr(ends[token_id]) for token_id in sorted(missing)),
        )


def _record(run: Run, summary: dict[str, object], samples: list[Sample]) -> Record:
    """Collect what report.html shows. Peak memory is read first, for generating the answers takes memory, too."""
    model, peak_bytes, rate = run.trainee.model, run.memory.peak_bytes(), mean_rate(run.progress.log_history)
    if samples:
        where = {"folder": run.settings.checkpoints.output_dir, "device": run.world.device}
        samples = answer_after(samples, model, run.base.tokenizer, **where)
    return Record(
        flags=run.settings.flags,
        plan=run.plan,
        history=run.progress.log_history,
        summary=summary,
        data=run.data.report,
        held_out=run.held_out.report if run.held_out else None,
        num_processes=run.world.num_processes,
        device=run.world.device,
        peak_bytes=peak_bytes,
        tokens_per_second=rate,
        share_of_peak=share_of_peak(run.plan, rate) if run.plan else None,
        samples=samples,
        no_samples="The model was sharded: none were asked for." if is_sharded(model) else "None were asked for.",
    )
