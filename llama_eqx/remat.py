"""Which activations of a block are kept for the backward pass and which are computed again."""

import abc
from collections.abc import Callable
from typing import Any, Literal

import jax

from llama_eqx.config import Config, nearest
from llama_eqx.errors import ConfigError
from llama_eqx.tag import tag

# The tags of a block, in the order of computation. "input" is the residual that enters it, "residual" the one between its halves, and
# "attention" everything that an attention kernel keeps. The embedding and the output of a block are also "residual", for traces: the
# backward pass of a block needs neither.
# A variant adds its own names: NAMES.append("head_gate").
NAMES = ["input", "q", "k", "v", "attention", "attention_out", "residual", "gate", "up", "down"]

policies = jax.checkpoint_policies
Policy = Callable[..., Any]


class Remat(Config):
    @abc.abstractmethod
    def block(self, block: Callable, *, alone: bool = False) -> Callable:
        """Wraps `block` in the policy. `alone`: it is not inside a loop, so XLA would merge the recomputation with the original."""


class RematConfig(Remat):
    """`none` keeps all, `full` only the residual that enters a block. `dots` keeps the results of matrix products with weights, and
    `dots_attention` also what the attention kernel keeps.
    """

    policy: Literal["none", "full", "dots", "dots_attention"]

    def block(self, block: Callable, *, alone: bool = False) -> Callable:
        if self.policy == "none":
            return block
        dots = policies.dots_with_no_batch_dims_saveable
        kept = {"full": None, "dots": dots, "dots_attention": either(dots, attention)}[self.policy]
        return jax.checkpoint(block, prevent_cse=alone, policy=kept)


class NamedRematConfig(Remat):
    """Keeps the activations in `names` and moves those in `offloaded` to the host's memory and back; the rest is recomputed."""

    names: tuple[str, ...]
    offloaded: tuple[str, ...]

    def block(self, block: Callable, *, alone: bool = False) -> Callable:
        def entered(module: Any, x: jax.Array, *rest: Any) -> Any:
            return block(module, tag(x, "input"), *rest)

        kept = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(self.names),
            names_which_can_be_offloaded=list(self.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
        kept = either(attention, kept) if "attention" in self.names else kept
        return jax.checkpoint(entered, prevent_cse=alone, policy=kept)

    def check(self) -> None:
        for field in ("names", "offloaded"):
            for name in getattr(self, field):
                if name not in NAMES:
                    raise ConfigError(f"no activation is called {name}", where=field, next=nearest(name, NAMES))
        if both := set(self.names) & set(self.offloaded):
            raise ConfigError(f"both kept and offloaded: {', '.join(sorted(both))}", where="offloaded", next="name each only once")


def attention(primitive: Any, *args: Any, **params: Any) -> Any:
    """Keeps what is tagged "attention", and what cuDNN's forward pass keeps: that has no names and is identified by its primitive."""
    named = policies.save_only_these_names("attention")
    return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *args, **params)


def either(first: Policy, second: Policy) -> Policy:
    return lambda *args, **params: first(*args, **params) or second(*args, **params)
