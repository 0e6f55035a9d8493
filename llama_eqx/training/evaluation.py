"""The loss on held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import equinox as eqx
import jax

from llama_eqx.batch import Batch
from llama_eqx.model.llama import Llama
from llama_eqx.training.loss import Loss, LossSums


class Evaluation(NamedTuple):
    """`loss` in nats per token; `bits_per_byte` compares models whatever their tokenizers; `tokens` that were counted."""

    loss: float
    bits_per_byte: float
    tokens: int


def make_evaluate(loss: Loss) -> Callable[[Llama, Iterable[Batch], float], Evaluation]:
    @eqx.filter_jit
    def sums(model: Llama, batch: Batch) -> LossSums:
        return loss(model, batch, None)[1]

    def evaluate(model: Llama, batches: Iterable[Batch], bytes_per_token: float) -> Evaluation:
        """The mean over every target that the masks count, each with the tokens before it in its row as context."""
        losses, counts = zip(*(jax.device_get(sums(model, batch)) for batch in batches), strict=True)
        mean = math.fsum(losses) / math.fsum(counts)
        return Evaluation(mean, mean / math.log(2) / bytes_per_token, int(math.fsum(counts)))

    return evaluate
