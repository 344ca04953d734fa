"""A report on any instruction data set as one HTML page, and a mended copy of the set.

    python -m alpaca.data.report --data_path alpaca_data.json --output report.html --tokenizer weights/llama-7b
    python -m alpaca.data.report --data_path alpaca_data.json --clean alpaca_clean.json

It goes on past records that cannot be read, and lists them. The figure of verbs is written as PNG beside the page.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alpaca.data.analysis.cleaning import Change, clean_records, log_path, write_clean
from alpaca.data.analysis.page import make_page
from alpaca.data.analysis.summary import analyse, summary_lines
from alpaca.data.analysis.verb_plot import count_verbs, draw_png
from alpaca.data.records import AUTO, DATA_FORMATS, make_reader, one_answer_expected, read_records
from alpaca.data.sources.formats import RESPONSE_MARK
from alpaca.errors import InputError, run_command
from alpaca.files.atomic import write_bytes, write_text
from alpaca.files.outputs import check_overwrite
from alpaca.text.loading import load_tokenizer


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alpaca.data.report", description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="JSON, CSV, Parquet, or a Hugging Face data set's name")
    parser.add_argument("--data_format", choices=DATA_FORMATS, default=AUTO, help="the records' form; default: seen")
    parser.add_argument("--response_mark", default=RESPONSE_MARK, help="of plain texts: what the answer stands behind")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page; default report.html")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of the model to train, to count tokens")
    parser.add_argument("--model_max_length", type=int, default=512, help="tokens an example is cut to; default 512")
    parser.add_argument("--clean", type=Path, metavar="OUT", help="write the mended set here, its log to OUT.log.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser.parse_args(arguments)


def png_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}-verbs.png")


def write_outputs(arguments: argparse.Namespace) -> list[Path]:
    """Read, analyse, write the page, its PNG, and the mended set if asked for; returns the files written."""
    _check_outputs(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    records = list(read_records(arguments.data_path))
    reader = make_reader(records, data_format=arguments.data_format, response_mark=arguments.response_mark)
    if reader.format.judges:
        raise InputError(f"{arguments.data_path}: {one_answer_expected(reader)}")
    analysis = analyse(arguments.data_path, records, reader, tokenizer, max_length=arguments.model_max_length)
    for line in reader.lines():
        print(line)
    kept, changes = clean_records(records, reader)
    png = draw_png(count_verbs(analysis.roots))
    page = make_page(analysis, changes, png=png, cleaned=arguments.clean)
    for line in summary_lines(analysis):
        print(line)
    written = [png_path(arguments.output), arguments.output]
    if arguments.clean:
        written += [arguments.clean, write_clean(arguments.clean, kept, changes)]
        print(_clean_line(kept, changes))
    write_bytes(written[0], png)
    write_text(written[1], page)
    return written


def _clean_line(kept: Sequence[object], changes: Sequence[Change]) -> str:
    dropped = sum(change.field is None for change in changes)
    mended = len({change.index for change in changes if change.field is not None})
    return f"mended set: {len(kept):,} records; {dropped:,} dropped, {mended:,} changed"


def _check_outputs(arguments: argparse.Namespace) -> None:
    if arguments.model_max_length < 1:
        raise InputError(f"--model_max_length must be 1 or more, found {arguments.model_max_length}")
    for path in filter(None, (arguments.output, arguments.clean)):
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
    outputs = [arguments.output, png_path(arguments.output)]
    if arguments.clean:
        outputs += [arguments.clean, log_path(arguments.clean)]
    read = Path(arguments.data_path).resolve()
    places = [path.resolve() for path in outputs]
    if read in places or len(set(places)) < len(places):
        raise InputError(
            f"the outputs must be files of their own, not {arguments.data_path} or one another: "
            + ", ".join(map(str, outputs))
        )
    for path in outputs:
        check_overwrite(path, arguments.overwrite, is_folder=False)
        path.parent.mkdir(parents=True, exist_ok=True)


def main() -> None:
    for path in write_outputs(parse_arguments()):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
