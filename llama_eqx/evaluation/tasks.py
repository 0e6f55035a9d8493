"""Benchmarks of the lm-evaluation-harness (Gao et al., 2021, github.com/EleutherAI/lm-evaluation-harness), on a model of this package."""

# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportTypedDictNotRequiredAccess=false
import difflib
from typing import Any, NamedTuple

import jax

from llama_eqx.config import dump
from llama_eqx.errors import ConfigError
from llama_eqx.evaluation.opened import EvaluateConfig, open_model
from llama_eqx.interop.pretrained import format_of
from llama_eqx.tracking.provenance import software


class TaskResults(NamedTuple):
    """The harness's own table, its content in plain containers (`results` by task and metric), and what the user should know."""

    table: str
    saved: dict[str, Any]
    notes: list[str]


def run_tasks(config: EvaluateConfig) -> TaskResults:
    """Runs the tasks.

    Raises `ConfigError` for tasks that are unknown or do not fit the model, or when the harness is not installed; and as `open_model` does.
    Except for tasks that do not fit, it raises before weights are loaded.
    """
    assert config.checkpoint is not None
    assert config.tasks is not None
    format_of(config.checkpoint)  # raises early: the harness takes a while to find its tasks
    if jax.process_count() > 1:
        raise ConfigError(
            "benchmarks run in a single process",
            where="tasks",
            next="start a single process: JAX_COORDINATOR_ADDRESS=localhost:1 JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0",
        )
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise ConfigError("the lm-evaluation-harness is not installed", where="tasks", next="pip install 'llama_eqx[eval]'") from None
    from llama_eqx.evaluation.harness import HarnessModel

    names = [name.strip() for name in config.tasks.split(",")]
    manager = TaskManager(include_path=config.include_path, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):  # the harness's own are thousands of files, which take a while to find
        manager = TaskManager(include_path=config.include_path)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        advice = f"did you mean {near[0]}?" if near else "include_path=FOLDER for YAML of your own"
        raise ConfigError(f"no task is called {', '.join(unknown)}", where="tasks", next=advice)
    opened = open_model(config)
    found = lm_eval.simple_evaluate(
        HarnessModel(opened), tasks=names, task_manager=manager, num_fewshot=config.num_fewshot, limit=config.limit, log_samples=False
    )
    assert found is not None
    table = make_table(found) + ("\n" + make_table(found, "groups") if found.get("groups") else "")
    kept = {key: found[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in found}
    made_by = software()
    packages = made_by.pop("versions")  # the harness calls those of its tasks so
    return TaskResults(table, {**kept, "config": dump(config), **made_by, "packages": packages}, opened.notes)
