"""Hydra's launcher for `-m`: in this package because Hydra takes plugins from no other. What it does is in `llama_eqx.multirun`."""

import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class Multirun(Launcher):
    """A process for every job, by submitit. See conf/hydra/launcher/ for the parameters."""

    def __init__(self, cluster: str, at_once: int, parameters: Any):
        self.cluster, self.at_once, self.parameters = cluster, at_once, dict(parameters)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from llama_eqx.compose import literal, planned, quoted, resolve  # what a single run need not wait for
        from llama_eqx.errors import ConfigError
        from llama_eqx.multirun import Job, command, labels, run_jobs
        from llama_eqx.studies.pairing import check_registered, diverged, in_the_way, is_kept
        from llama_eqx.training.identity import finished

        if not isinstance(self.at_once, int) or self.at_once < 1:
            raise ConfigError(
                f"{self.at_once} is no number of jobs", where="hydra.launcher.at_once", next="hydra.launcher.at_once=1, or more"
            )
        verb, folder = self.config.hydra.job.name, pathlib.Path(self.config.hydra.sweep.dir)
        config_dirs = [source.path for source in self.config.hydra.runtime.config_sources if source.provider == "command-line"]
        jobs, skipped, results, built = [], [], [], None
        for number, (label, overrides) in enumerate(zip(labels(job_overrides), job_overrides, strict=True), initial_job_idx):
            config = self._composed(number, overrides)
            words = list(overrides)
            if not any(override.startswith("run_dir=") for override in overrides):
                words.append(quoted(f"run_dir={folder / config.hydra.sweep.subdir}"))
            if verb == "train":  # on W&B, the sweep is a group, and its runs are named by what tells them apart
                names = {"group": folder.name} | ({"name": label} if label else {})
                words += [literal(f"tracking.wandb.{key}", name[:128]) for key, name in names.items() if not config.tracking.wandb[key]]
            settings = self._composed(number, planned(verb, words))  # as the job will be composed
            with open_dict(settings):
                del settings["hydra"]  # as Hydra does before it runs a job
            built = resolve(settings)
            # A run of a study that finished and was stopped before it was filed is filed by a start that ends at once.
            over = verb == "train" and (is_kept(built) if built.study is not None else finished(built) or diverged(built) is not None)
            if verb == "train" and not over:
                check_registered(built)
            if verb == "train" and (file := in_the_way(built)):
                label += f" (will not be filed: {file} has other settings)"
            job = Job(
                number,
                label,
                command(verb, words, config_dirs),
                pathlib.Path(built.run_dir, "console.txt"),
                diverged(built) if over else None,
            )
            (skipped if over else jobs).append(job)
            results.append(JobReturn(overrides=list(overrides), cfg=config, status=JobStatus.COMPLETED, _return_value=None))
        place = folder / ".submitit"
        run_jobs(jobs, skipped, folder=place, cluster=self.cluster, at_once=self.at_once, parameters=self.parameters, say=_say)
        if verb == "train" and (study := getattr(built, "study", None)):
            _say(f"report      python -m llama_eqx.report experiment={study.question} stage={study.stage} rung={study.rung}")
        elif verb == "train" and not any(word.startswith("run_dir=") for word in job_overrides[0]):
            _say(f"compare     python -m llama_eqx.report {shlex.quote(f'runs=[{folder}]')}")
        return results

    def _composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        return config


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
