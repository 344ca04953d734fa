"""lm-eval's harness with this project's engine: its tasks, prompts and metrics, our log-likelihoods and answers.

Ids and scores are those of lm-eval's own `hf` backend: BOS before each text, where the tokenizer has one, contexts cut
on the left, and a continuation that begins where its context's ids end. Only what is asked for is computed: logits of
the continuations alone, and a context that several of them share once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from alpaca.errors import InputError
from alpaca.evaluation.asking import GREEDY, Target, answer_all, score_all, share_prefixes
from alpaca.serving.engine import Engine
from alpaca.serving.request import Request

_DEFAULT_NEW_TOKENS = 256  # lm-eval's, where a task names no number
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class EngineLM(TemplateLM):
    """A model of this project as lm-eval asks models.    adapter: the one to use; None for the base alone."""

    def __init__(self, engine: Engine, *, adapter: str | None, shows_progress: bool = True) -> None:
        super().__init__()
        self._engine, self._adapter = engine, adapter
        self._tokens = engine.tokenizer
        self._progress: dict[str, Any] = {"disable": None if shows_progress else True}
        self.max_length = engine.max_context

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.eos_id if self._tokens.bos_id is None else self._tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        prefix = [] if add_special_tokens is False else self._tokens.prefix_ids
        return [*prefix, *self._tokens.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether each token is the likeliest in its place) of each continuation after its context."""
        order = share_prefixes([context for _, context, _ in requests])
        targets = (self._target(*requests[place][1:]) for place in order)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scored = zip(order, score_all(self._engine, targets, adapter=self._adapter), strict=True)
        for place, scores in tqdm(scored, total=len(requests), desc="log-likelihoods", **self._progress):
            continuation = requests[place][2][-len(scores) :]
            is_likeliest = all(
                score.top[0][0] == token_id for score, token_id in zip(scores, continuation, strict=True)
            )
            found[place] = (sum(score.logprob for score in scores), is_likeliest)
        return found

    def _target(self, context: list[int], continuation: list[int]) -> Target:
        """What does not fit is cut on the left; the last token is scored, and need not be computed."""
        ids = [*context, *continuation][-(self.max_length + 1) :]
        return Target(ids, min(len(continuation), len(ids) - 1))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's context where it is longer."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [(None, *window) for own in windows for window in own]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        cut = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(utils.make_disjoint_window, cut)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each answer up to the first of its task's stop texts, decoded by itself as lm-eval's `hf` backend does."""
        asked = [self._generation(*request.args) for request in requests]
        answers = answer_all(self._engine, [(request, stop, False) for request, stop in asked])
        texts = []
        rows = zip(asked, answers, strict=True)
        for (_, stop), answer in tqdm(rows, total=len(requests), desc="answers", **self._progress):
            text = self._tokens.decode(answer.ids)
            texts.append(postprocess_generated_text(text, list(stop), None))
        return texts

    def _generation(self, context: str, given: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
        wanted = normalize_gen_kwargs(dict(given), _DEFAULT_NEW_TOKENS)
        stop = handle_stop_sequences(wanted.pop("until", None), eos=None)
        new = wanted.pop("max_gen_toks")
        if not 0 < new < self.max_length:
            raise InputError(f"a task asks for {new} new tokens, and the model's context is {self.max_length}")
        wanted.pop("do_sample", None)
        if unknown := sorted(set(wanted) - {*_SAMPLING}):
            raise InputError(f"a task's generation_kwargs name {', '.join(unknown)}; known are {', '.join(_SAMPLING)}")
        ids = self.tok_encode(context)[-(self.max_length - new) :]
        values = {**GREEDY, **wanted}
        request = Request(**values, prompt_ids=tuple(ids), max_new_tokens=new, adapter=self._adapter)
        return request, tuple(filter(None, stop))
