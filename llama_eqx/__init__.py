"""A research framework for Llama models in Equinox.

The names below are imported when they are first used, so that the command line answers quickly.
"""

import os
import sys

# `python -m llama_eqx.VERB` looks for every module in the working directory first, and a downloaded model may have a `typing.py`.
if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and any(word.removeprefix("-m").startswith(__name__) for word in sys.orig_argv)
    and os.path.realpath(sys.path[0]) != os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
):
    del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_eqx.compose import load_config
    from llama_eqx.generation.decode import generate_tokens
    from llama_eqx.interop.conversion import save_pretrained
    from llama_eqx.interop.pretrained import find_tokenizer, load_pretrained
    from llama_eqx.model.llama import build_model
    from llama_eqx.tracing import trace

__all__ = ["build_model", "find_tokenizer", "generate_tokens", "load_config", "load_pretrained", "save_pretrained", "trace"]

_HOMES = {
    "build_model": "llama_eqx.model.llama",
    "find_tokenizer": "llama_eqx.interop.pretrained",
    "generate_tokens": "llama_eqx.generation.decode",
    "load_config": "llama_eqx.compose",
    "load_pretrained": "llama_eqx.interop.pretrained",
    "save_pretrained": "llama_eqx.interop.conversion",
    "trace": "llama_eqx.tracing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llama_eqx' has no attribute {name!r}")
