"""Arrows between modules point down only, and each layer knows only the libraries it needs."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "llama_eqx"
VERBS = [
    "__main__",
    "train",
    "generate",
    "evaluate",
    "convert",
    "doctor",
    "plan",
    "prepare",
    "provenance",
    "supervise",
    "replay",
    "report",
    "dashboard",
    "multirun",
    "submission",
    "compose",
    "verb",
]
LAYERS = [  # highest first; a module belongs to its longest prefix
    VERBS,
    [
        *(f"training.{name}" for name in ("loop", "replay", "setup", "run", "identity", "program", "reporter", "ends", "traces")),
        "studies",
        "planning",
    ],
    ["diagnosis", "evaluation"],
    ["generation", "interop"],
    ["checkpoint", "tracking", "data", "training.evaluation"],
    ["training", "tracing"],
    ["model.llama"],
    ["model"],
    ["sharding", "precision", "remat", "flops", "meeting", "processes", "writer"],
    ["config", "extensions", "advice", "dims", "batch", "tag", "errors", "files", "crash", "wrapped", "__init__"],
]
LEVEL = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}
ONLY_IN = {
    "hydra": ("compose", "verb"),
    "omegaconf": ("compose",),
    "wandb": ("tracking.wandb",),
    "grain": ("data",),
    "orbax": ("checkpoint",),
    "submitit": ("submission",),
}
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def level(module: str) -> int:
    return max((len(name), value) for name, value in LEVEL.items() if f"{module}.".startswith(f"{name}."))[1]


def imports(path: pathlib.Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_module(module):
    for name in imports(MODULES[module]):
        root, _, inner = name.partition(".")
        if root == "llama_eqx":
            assert level(inner) <= level(module), f"{module} imports {name} from above"
        assert module.startswith(ONLY_IN.get(root, ("",))), f"{module} imports {root}"
        if module.startswith("model."):
            allowed = {
                "llama_eqx",
                "jax",
                "equinox",
                "jaxtyping",
                "abc",
                "collections",
                "dataclasses",
                "functools",
                "math",
                "typing",
                "zlib",
            }
            kernel = module.startswith("model.kernel.")  # the only ones that may know of a mesh, or of a platform
            assert root in allowed | ({"contextlib", "contextvars"} if kernel else set()), f"{module} imports {root}"
            assert not name.startswith(("jax.sharding", "jax.experimental")) or kernel
        if module.startswith("model.") and root == "llama_eqx":
            assert inner.startswith(("model.", "config.", "dims.", "tag.", "errors."))


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("model.")])
def test_the_math_names_no_dtype_but_float32(module):
    names = {node.attr for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"bfloat16", "float16", "float64"}
