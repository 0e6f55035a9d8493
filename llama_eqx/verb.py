"""The process of a verb: its flags, log, error messages and exit codes."""

import contextlib
import dataclasses
import errno
import gc
import itertools
import logging
import os
import pathlib
import re
import select
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig

from llama_eqx import compose
from llama_eqx.advice import check_flags
from llama_eqx.errors import ConfigError, StorageError, UserError, first_line, unknown_option
from llama_eqx.extensions import folders
from llama_eqx.writer import refuse_links

# The system's errors for a place that cannot be written: full, read-only, not ours, or not there.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
PLACED = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name")  # flags that a place follows


def run_verb(name: str, job: Callable[[Any, list[str]], None], *, log: bool = True) -> None:
    """Runs the command line of a verb: calls `job(config, overrides)` with `conf/<name>.yaml` and the overrides in `sys.argv`, and exits.

    An error ends as one block and the exit code of `llama_eqx.errors`. Its traceback goes to `log.txt` in the run directory, unless `log`
    is False, for verbs that only read there.
    Flags (-m for a sweep, --cfg job) are Hydra's own, except --help, which takes Hydra seconds.
    """
    # float32 must mean float32: by default, JAX multiplies with TF32 on a GPU and with bfloat16 on a TPU.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU's memory: the default is 0.75, and conf/mesh plans for more
    # Imports and tracing make hundreds of thousands of lasting objects. Searching them for garbage takes a fifth of the tracing time.
    gc.set_threshold(50_000, 20, 20)
    arguments = sys.argv[1:]
    places = [argument for flag, argument in itertools.pairwise(arguments) if flag in PLACED]  # which may have a "=" too
    places += [argument for argument in arguments if argument.partition("=")[0] in PLACED and "=" in argument]
    overrides = [argument for argument in arguments if re.search(r"^[^-].*=|^~", argument) and argument not in places]
    flags = [argument for argument in arguments if argument not in overrides]
    sweep = bool({"-m", "--multirun"} & {*flags})
    taken = [] if sweep else compose.from_plan(name, overrides)  # each job of a sweep takes and reports its own
    if taken:
        batch = "; the recipe's learning rate is meant for the recipe's batch" * any(each.startswith("train.batch_size") for each in taken)
        print(f"note: the plan for this model on this mesh sets {' '.join(taken)}{batch}", file=sys.stderr)
    elif not sweep and name in compose.PLANNED and compose.plan_file(overrides).is_file() and "experiment" in compose.values(overrides):
        print("note: an experiment does not use the plan for this model on this mesh", file=sys.stderr)
    if {"-h", "--help"} & {*arguments}:
        _leave(guarded(lambda: print(help_text(name)), name))
    if not any(argument.startswith("-") for argument in arguments):
        run = _together if log else lambda job, config, overrides: job(config, overrides)
        _leave(guarded(lambda: run(job, compose.load_config(*map(compose.quoted, arguments), name=name), arguments), name))

    failed: list[Exception] = []

    def hydra_job(config: Any) -> None:
        try:
            built = compose.resolve(config)
            if "run_dir" not in compose.values(overrides) and hasattr(built, "run_dir"):
                built = dataclasses.replace(built, run_dir=HydraConfig.get().runtime.output_dir)
            _together(job, built, [override for override in overrides if not re.match(r"[+~]*hydra\b", override)])
        except Exception as error:  # Hydra would print a line of its own before it raises it again
            failed.append(error)

    def hydra_main() -> None:
        if sweep and name not in compose.PLANNED:
            verbs = " and ".join(compose.PLANNED)
            raise ConfigError(f"only {verbs} have sweeps", where=name, next=f"a command for each: python -m llama_eqx.{name} KEY=VALUE")
        check_flags(arguments, lambda: compose.keys(name, []))
        compose.check_groups(overrides)
        if not places:  # which may have more of them
            compose.check_recipe(overrides)
        hydra.main(version_base="1.3", config_path=str(compose.home(name)), config_name=name)(hydra_job)()
        if failed:
            raise failed[0]

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors arrive here instead of being printed by Hydra
    if sweep:  # commas make the jobs, which take the plans of their own models and meshes
        words = [*map(compose.quoted_options, overrides)]
    else:
        words = compose.planned(name, overrides if "--run" in flags else [*map(compose.quoted, overrides)])  # a job's are quoted already
    sys.argv[1:] = [*words, *flags]  # in one piece: argparse takes no overrides on both sides of a flag
    _leave(guarded(hydra_main, name))


def help_text(name: str) -> str:
    """The text of a verb's `hydra.help.template`, with the groups of `conf/` and their options."""
    folder = compose.home(name)
    said = yaml.safe_load((folder / f"{name}.yaml").read_text())["hydra"]["help"]["template"]
    options: dict[str, list[str]] = {}
    folders = compose.conf_dirs() if folder == compose.conf_dir() else [folder]
    for group, option in sorted((str(path.parent.relative_to(top)), path.stem) for top in folders for path in top.glob("*/**/*.yaml")):
        # Without parts of options, verbs with a folder of their own, and settings that nobody chooses by name.
        if not option.startswith("_") and option != pathlib.Path(group).name and group != "plan":
            options.setdefault(group, []).append(option)
    return said.replace("$APP_CONFIG_GROUPS", "\n".join(f"{group}: {', '.join(found)}" for group, found in options.items()))


def _together(job: Callable[[Any, list[str]], None], config: Any, overrides: list[str]) -> None:
    """Runs `job`, as one of several processes if the verb supports them and there are several."""
    if not hasattr(config, "distributed"):
        return _logged(job, config, overrides)
    from llama_eqx.processes import together  # imports JAX, which a typo need not wait for

    with together(config) as (config, process):
        _logged(job, config, overrides, log_file=f"log.{process}.txt" if process else "log.txt")


def _leave(code: int) -> None:
    if processes := sys.modules.get("llama_eqx.processes"):
        processes.leave(code)
    sys.exit(code)


def _logged(job: Callable[[Any, list[str]], None], config: Any, overrides: list[str], log_file: str = "log.txt") -> None:
    """Runs `job`. The messages of libraries go to `log_file` in the run directory, if the verb has one, and not to the terminal."""
    folder = getattr(config, "run_dir", None)
    if folder is None:
        return job(config, overrides)
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        refuse_links(pathlib.Path(folder))
        log = Log(pathlib.Path(folder, log_file))
    except OSError as error:
        what = f"cannot write: {error.strerror}"
        if isinstance(error, FileExistsError | NotADirectoryError):
            what = "run_dir is a file or within one; it must be a folder"
        raise StorageError(what, where=folder, next="another place: run_dir=FOLDER") from None
    log.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    for name in ("llama_eqx", "jax", "absl", "asyncio"):  # Orbax uses the last two, and logs a lot
        logger = logging.getLogger(name)
        for before in logger.handlers:
            if isinstance(before, Log):
                before.close()  # a message after the end of its run has opened it again
        logger.handlers, logger.propagate = [log], False
        logger.setLevel(logging.INFO if name == "llama_eqx" else logging.WARNING)
    try:
        job(config, overrides)
    except BaseException:
        logging.getLogger("llama_eqx").info("ended by", exc_info=True)
        raise
    finally:
        log.close()  # a later message opens it again


class Log(logging.FileHandler):
    """A log that ends with one line when the disk is full; `logging` would print a traceback for every record."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.handle = lambda record: False  # pyright: ignore[reportAttributeAccessIssue]
        print(f"warning: {self.baseFilename} cannot be written: {error.strerror}; the run goes on without it", file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left of it has no place either
            super().close()


def guarded(job: Callable[[], None], name: str = "train") -> int:
    """Runs `job` of the verb `name`, prints whatever ended it as a block, and returns the exit code; 141, as the shell's, when nobody reads
    its output any more.
    """
    try:
        job()
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except compose.HYDRAS as error:
        said = compose.explained(error, name, sys.argv[1:])
        print(said, file=sys.stderr)
        return said.code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 141
        if error.errno not in STORAGE:
            return _unexpected(error)
        where = str(error.filename or "")
        print(
            StorageError(f"cannot write: {error.strerror}", where=where, next="free some space, or work in another folder"), file=sys.stderr
        )
        return StorageError.code
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            what = f"out of memory: {first_line(error)}"
            verb = pathlib.Path(sys.argv[0]).stem
            plan = f"; {shlex.join(['python', '-m', 'llama_eqx.plan', *sys.argv[1:]])} says which part to shrink" if verb == "train" else ""
            print(UserError(what, next=f"a smaller model or train.batch_size, remat=full, or more devices{plan}"), file=sys.stderr)
            return 1
        if said := unknown_option(error):
            print(said, file=sys.stderr)
            return said.code
        return _unexpected(error)
    return 0


def _unread() -> bool:
    """Whether the reader of the output has left, as `| head` does. If so, further output is discarded."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # a closed end is reported unasked
    closed = [stream for stream, told in poll.poll(0) if told & (select.POLLERR | select.POLLHUP)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(closed)


def _unexpected(error: Exception) -> int:
    traceback.print_exc()
    own = tuple(f"{folder}{os.sep}" for folder in folders())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(own)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    advice = "look at this line, which is in an extension" if frames else "please report this with the lines above"
    print(UserError(f"unexpected {type(error).__name__}: {error}", where=where, next=advice), file=sys.stderr)
    return 1
