"""The analysis of a data set for the report: counts, tokens, verbs, languages, copies and suspicious examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from alpaca.data.analysis.checks import RULES, Finding, find_suspicious
from alpaca.data.analysis.duplicates import Copy, Duplicates, find_duplicates
from alpaca.data.analysis.languages import detect_language
from alpaca.data.analysis.verbs import Root, find_root
from alpaca.data.encoding.choosing import AUTO, choose_layout
from alpaca.data.example import AnyExample
from alpaca.data.sources.formats import RecordReader
from alpaca.errors import InputError
from alpaca.text.tokenizer import Tokenizer

_CHUNK = 1024  # examples tokenized at once


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of each example before any cut, as the recipe encodes it: prompt, answer, BOS and EOS; and of its prompt.

    The prompt's tokens carry no loss. What a cut to `max_length` loses is worked out from the two.
    """

    lengths: list[int]
    prompt_lengths: list[int]
    max_length: int

    @cached_property
    def num_cut(self) -> int:
        """Examples longer than max_length: they lose their EOS and more."""
        return sum(length > self.max_length for length in self.lengths)

    @cached_property
    def num_tokens_lost(self) -> int:
        return sum(max(0, length - self.max_length) for length in self.lengths)

    @cached_property
    def num_all_masked(self) -> int:
        """Number of examples whose prompt alone fills max_length: training drops them, since no label is left."""
        pairs = zip(self.lengths, self.prompt_lengths, strict=True)
        return sum(min(length, self.max_length) <= max(prompt, 1) for length, prompt in pairs)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that carry loss after the cut."""
        pairs = zip(self.lengths, self.prompt_lengths, strict=True)
        return sum(max(0, min(length, self.max_length) - max(prompt, 1)) for length, prompt in pairs)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The analysis of a data set. Every index counts records from 0, unreadable ones included.

    unreadable: index and reason.   roots, languages: of each example, in order; languages of instruction and output.
    """

    data_path: str
    num_records: int
    unreadable: list[tuple[int, str]]
    examples: dict[int, AnyExample]
    tokens: TokenCounts | None
    roots: list[Root]
    languages: list[tuple[str, str]]
    findings: dict[str, list[Finding]]
    duplicates: Duplicates

    @cached_property
    def num_suspicious(self) -> int:
        """Examples with at least one finding."""
        return len({finding.index for findings in self.findings.values() for finding in findings})


def analyse(
    data_path: str | Path,
    records: Sequence[tuple[str, object]],
    reader: RecordReader,
    tokenizer: Tokenizer | None = None,
    *,
    max_length: int = 512,
    progress: bool = True,
) -> Analysis:
    """The analysis of records as `read_records` gives them; without a tokenizer no tokens are counted.

    Raises InputError when not one record is an example.
    """
    examples, unreadable = _split_readable(records, reader)
    if not examples:
        reason = unreadable[0][1] if unreadable else "it is empty"
        raise InputError(f"{data_path} holds no examples; expected records with instruction and output ({reason})")
    listed = list(examples.values())
    return Analysis(
        data_path=str(data_path),
        num_records=len(records),
        unreadable=unreadable,
        examples=examples,
        tokens=count_tokens(listed, tokenizer, max_length=max_length, progress=progress) if tokenizer else None,
        roots=[find_root(example.instruction) for example in _bar(listed, "parse", progress)],
        languages=[
            (detect_language(example.instruction), detect_language(example.output))
            for example in _bar(listed, "languages", progress)
        ],
        findings=find_suspicious(examples.items(), total=len(examples), progress=progress),
        duplicates=_place(find_duplicates(listed, progress=progress), list(examples)),
    )


def _split_readable(
    records: Sequence[tuple[str, object]], reader: RecordReader
) -> tuple[dict[int, AnyExample], list[tuple[int, str]]]:
    examples, unreadable = {}, []
    for index, (where, record) in enumerate(records):
        try:
            examples[index] = reader.convert(record, where)
        except InputError as error:
            unreadable.append((index, str(error)))
    return examples, unreadable


def _bar(listed: Sequence[AnyExample], name: str, progress: bool) -> tqdm:
    return tqdm(listed, desc=name, unit=" examples", delay=1, disable=None if progress else True)


def _place(found: Duplicates, indices: Sequence[int]) -> Duplicates:
    """The copies, with the indices of records in place of those of examples."""

    def placed(copies: Sequence[Copy]) -> list[Copy]:
        return [Copy(indices[copy.index], indices[copy.of], copy.overlap) for copy in copies]

    return Duplicates(exact=placed(found.exact), conflicting=placed(found.conflicting), near=placed(found.near))


def count_tokens(
    examples: Sequence[AnyExample], tokenizer: Tokenizer, *, max_length: int = 512, progress: bool = True
) -> TokenCounts:
    """Lengths in tokens of examples as `examples.encode_examples` lays them out; their prompts' up to the first answer.

    Raises InputError where no layout fits them.
    """
    layout = choose_layout(AUTO, examples, tokenizer).layout
    lengths, prompt_lengths = [], []
    with _bar(examples, "tokenize", progress) as bar:
        for start in range(0, len(examples), _CHUNK):
            rows = layout.encode(examples[start : start + _CHUNK])
            prompt_lengths += [row.spans[0][0] for row in rows]
            lengths += [len(row.ids) for row in rows]
            bar.update(len(rows))
    return TokenCounts(lengths=lengths, prompt_lengths=prompt_lengths, max_length=max_length)


def summary_lines(analysis: Analysis) -> list[str]:
    """The report in a few lines, for a terminal."""
    examples, copies = analysis.examples.values(), analysis.duplicates
    with_input = sum(example.input != "" for example in examples)
    lines = [
        f"{len(examples):,} examples, {with_input:,} ({with_input / len(examples):.1%}) with an input",
        f"with a suspicious trait: {analysis.num_suspicious:,}",
        f"{len(copies.exact):,} exact copies, {len(copies.conflicting):,} prompts answered again in other words, "
        f"{len(copies.near):,} near copies",
    ]
    if analysis.unreadable:
        lines.insert(1, f"{len(analysis.unreadable):,} records cannot be read")
    if tokens := analysis.tokens:
        lines.append(
            f"{sum(tokens.lengths):,} tokens, {sum(tokens.lengths) / len(tokens.lengths):.1f} an example; a cut to "
            f"{tokens.max_length} shortens {tokens.num_cut:,} examples"
        )
    found = Counter({rule.name: len(analysis.findings[rule.name]) for rule in RULES})
    return lines + [f"  {name}: {count:,}" for name, count in found.most_common() if count]
