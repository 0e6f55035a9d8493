"""A model as the lm-evaluation-harness sees one (github.com/EleutherAI/lm-evaluation-harness)."""

# pyright: reportMissingImports=false
import dataclasses
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llama_eqx.batch import Batch
from llama_eqx.data.pipeline import place
from llama_eqx.errors import ConfigError
from llama_eqx.evaluation.opened import Opened
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.text import generate_texts

SHORTEST = 32  # row lengths are powers of two from here on, so that few are compiled
NEW_TOKENS = 256  # if a task does not say how many: the harness's own default
SEED = 1234  # of tasks that sample, as the harness seeds torch


class HarnessModel(TemplateLM):
    """A model as the harness sees it. It makes tokens, prefixes and windows from text as the harness's `hf` model does, so scores are the
    same.

    Texts begin with BOS if the tokenizer adds one. Names of special tokens in a text become these tokens.
    """

    def __init__(self, opened: Opened):
        super().__init__()
        self._opened, self._length, self._batch_size = opened, opened.length, opened.batch_size

    @property
    def eot_token_id(self) -> int:
        tokenizer = self._opened.tokenizer
        found = tokenizer.bos if tokenizer.eos is None else tokenizer.eos
        if found is None:
            raise ConfigError("this tokenizer has neither BOS nor EOS, but benchmarks begin each text with one", where="tokenizer")
        return found

    @property
    def prefix_token_id(self) -> int:
        bos = self._opened.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._opened.tokenizer.encode(string, special=True)
        if add_special_tokens is False or (add_special_tokens is None and ids[:1] == [self._opened.tokenizer.bos]):
            return ids
        return [*self._opened.tokenizer.prefix, *ids]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """For each (_, context, continuation), the log-probability of the continuation, and whether greedy decoding gives it."""
        pairs = [((context + continuation)[-(self._length + 1) :], len(continuation)) for _, context, continuation in requests]
        if wrong := next((count for _, count in pairs if count > self._length), None):
            raise ConfigError(f"an answer of {wrong} tokens does not fit into rows of {self._length}", where="length")
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))  # rows of one length together, and the longest first
        with tqdm(total=len(pairs), desc="scoring", unit=" requests", disable=disable_tqdm or None) as progress:
            for first in range(0, len(order), self._batch_size):
                chosen = order[first : first + self._batch_size]
                for i, answer in zip(chosen, self._scored([pairs[i] for i in chosen]), strict=True):
                    found[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                progress.update(len(chosen))
        return found

    def _scored(self, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Scores at most a batch of (tokens, number of last tokens to score)."""
        length = min(self._length, max(SHORTEST, 1 << (max(len(ids) for ids, _ in pairs) - 2).bit_length()))
        tokens, targets = (np.zeros((self._batch_size, length), np.int32) for _ in range(2))
        mask = np.zeros((self._batch_size, length), np.float32)
        for row, (ids, count) in enumerate(pairs):
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            mask[row, len(ids) - 1 - count : len(ids) - 1] = 1
        sharding = self._opened.layout.sharding(("batch", "seq"), tokens.shape)
        scores = jax.device_get(self._opened.score(self._opened.model, place(Batch(tokens, targets, mask), sharding, self._batch_size)))
        answers = []
        for nats, correct, counted in zip(scores.nats, scores.correct, mask > 0, strict=True):
            answers.append((-float(nats[counted].sum(dtype=np.float64)), bool(correct[counted].all())))
        return answers[: len(pairs)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in disjoint windows that are as full as possible."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._length, context_len=1)
            new = [(None, *make_disjoint_window(pair)) for pair in rolling]
            windows += new
            owners += [owner] * len(new)
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = np.bincount(owners, scores, minlength=len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt, up to one of its stop strings or the end of the text."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="generating", unit=" requests", disable=disable_tqdm or None) as progress:
            for group in groups.values():
                sampling, until, count = self._settings(requests[group[0]].args[1])
                if (room := self._length - count) < 1:
                    raise ConfigError(f"{count} new tokens leave no room in rows of {self._length}", where="length")
                group.sort(key=lambda i: -len(requests[i].args[0]))
                for first in range(0, len(group), self._batch_size):
                    chosen = group[first : first + self._batch_size]
                    prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in chosen]
                    for i, ids in zip(chosen, self.continued(prompts, count, sampling, until, first), strict=True):
                        found[i] = postprocess_generated_text(self._opened.tokenizer.decode(ids), until, None)
                        self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    progress.update(len(chosen))
        return found

    def continued(self, prompts: list[list[int]], count: int, sampling: Sampling, until: list[str], first_row: int = 0) -> list[list[int]]:
        """Up to `count` new tokens for each prompt. With `first_row` as in `generate_tokens`, no two batches share their draws."""
        opened, stop = self._opened, () if self._opened.tokenizer.eos is None else (self._opened.tokenizer.eos,)
        settings = {"stop_strings": until, "stop": stop, "seed": SEED, "first_row": first_row}
        return [row.tokens for row in generate_texts(opened.model, opened.tokenizer, prompts, count, sampling, **settings)]

    def _settings(self, asked: dict[str, Any]) -> tuple[Sampling, list[str], int]:
        """How to sample, where to stop, and how many tokens at most."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
        eos = next((name for name, i in self._opened.tokenizer.special.items() if i == self.eot_token_id), None)
        until, count = handle_stop_sequences(settings.pop("until"), eos), settings.pop("max_gen_toks")
        if not settings.pop("do_sample"):
            settings = {}
        if unknown := sorted(settings.keys() - {field.name for field in dataclasses.fields(Sampling)}):
            raise ConfigError(f"a task asks for {', '.join(unknown)} in its generation_kwargs, which are not supported", where="tasks")
        return Sampling(**settings), [text for text in until if text], count
