"""From YAML and the command line to a config. The only importer of Hydra, but for the launcher."""

import contextlib
import dataclasses
import errno
import gc
import hashlib
import itertools
import logging
import os
import pathlib
import re
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import hydra
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_eqx import extensions
from llama_eqx.advice import check_flags, check_words, instead, no_option, override_of
from llama_eqx.config import Config, load, nearest
from llama_eqx.errors import ConfigError, StorageError, UserError

# Keys whose values are text or paths: what a user types after "=" is taken as it stands, whatever commas, quotes or braces it has.
VERBATIM = (
    "prompt",
    "prompts",
    "system",
    "draft",
    "quantize_text",
    "checkpoint",
    "path",
    "against",
    "run_dir",
    "data.path",
    "data.prompt",
    "tokenizer.path",
    "init_from",
    "from",
    "to",
    "input",
    "output",
    "bundle",
    "tasks",
    "include_path",
)

# What the system says of a place that cannot be written: full, read-only, not ours, or no place at all.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
PLACED = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name", "--experimental-rerun")  # flags before a place
PLANNED = ("train", "plan")  # verbs that take the settings planned for a model on a mesh

PACKAGE = pathlib.Path(__file__).resolve().parent


def sweep_name(overrides: list[str]) -> str:
    """A folder's name for a sweep, the same for the same overrides."""
    said = re.sub(r"[^\w.=,-]+", "_", " ".join(overrides))[:60]
    return f"{said}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:6]}"


OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("registered", lambda question, name: registration().registered(question, name), replace=True)
OmegaConf.register_new_resolver("tuned", lambda *arm: registration().tuned(*arm), replace=True)


def registration() -> Any:
    from llama_eqx.studies import registration  # which knows YAML and no JAX, but few configs ask for it

    return registration


def conf_dir() -> pathlib.Path:
    """The folder of YAML: the copy inside an installed package, else the checkout's."""
    return next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if (path / "train.yaml").is_file())


def conf_dirs() -> list[pathlib.Path]:
    """That folder, and those of the extensions that have one.

    Raises `ConfigError` for a file of an extension's that this package has too, of which Hydra would take the other.
    """
    own, others = conf_dir(), [folder / "conf" for folder in extensions.folders() if (folder / "conf").is_dir()]
    for folder in others:
        for path in folder.rglob("*.yaml"):
            if (own / path.relative_to(folder)).is_file():
                raise ConfigError("this package has an option of that name", where=str(path), next="another name")
    return [own, *others]


def home(name: str) -> pathlib.Path:
    """The folder that a verb is composed from. One whose keys are also names of groups has a folder of its own, without any group."""
    own = conf_dir() / name
    return own if (own / f"{name}.yaml").is_file() else conf_dir()


def load_config(*overrides: str, name: str = "train", plan: bool = True) -> Any:
    """`conf/<name>.yaml` with Hydra overrides such as "model=llama3_2_1b" or "train.steps=100", as frozen dataclasses.

    Settings planned for the model on the mesh come first, see `planned`, unless `plan` is False.

    Raises `ConfigError` naming the key and the nearest right one.
    """
    config = resolve(compose(name, planned(name, overrides) if plan else list(overrides)))
    if not isinstance(config, Config):
        raise ConfigError(f"conf/{name}.yaml has no _target_")
    return config


def plan_file(overrides: Sequence[str]) -> pathlib.Path:
    """Where the settings planned for a model on a mesh are, or would be."""
    said = _values(overrides)
    name = pathlib.PurePath("plan", f"{said.get('model', 'llama3_1m')}_{said.get('mesh', 'local')}.yaml")
    return next((folder / name for folder in conf_dirs() if (folder / name).is_file()), conf_dir() / name)


def planned(name: str, overrides: Sequence[str]) -> list[str]:
    """`overrides` and, before them, those `from_plan`.

    Hydra's defaults lists cannot do it: what is included by an interpolated name may not choose options of groups.
    """
    return [*from_plan(name, overrides), *overrides]


def from_plan(name: str, overrides: Sequence[str]) -> list[str]:
    """What the plan has for keys and groups that `overrides` leave alone: nothing with an experiment, whose own settings it would beat.

    A microbatch of the plan's does not come with a batch of the user's that it does not divide, and neither with a recipe of the user's,
    which has sizes of its own.
    """
    path, said = plan_file(overrides), _values(overrides)
    if name not in PLANNED or not path.is_file() or "experiment" in said:
        return []

    def left_alone(override: str) -> bool:
        (key,) = _values([override])
        if "recipe" in said and key in ("train.batch_size", "train.microbatch_size", "train.seq_len"):
            return False
        return not any(key == other or key.startswith(f"{other}.") for other in said if other != "mesh")

    taken = [*filter(left_alone, yaml.safe_load(path.read_text())["overrides"])]
    batch, microbatch = said.get("train.batch_size"), _values(taken).get("train.microbatch_size")
    if batch and microbatch and not _divides(microbatch, batch):
        taken = [override for override in taken if "train.microbatch_size" not in _values([override])]
    return taken


def _values(overrides: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}


def _divides(part: str, whole: str) -> bool:
    return part == "null" or (part.isdigit() and whole.isdigit() and int(part) > 0 and int(whole) % int(part) == 0)


def run_verb(name: str, job: Callable[[Any, list[str]], None], *, log: bool = True) -> None:
    """The command line of a verb: calls `job(config, overrides)` with `conf/<name>.yaml` and the overrides in `sys.argv`, and exits.

    An error ends as one block and the exit code of `llama_eqx.errors`; its traceback goes to `log.txt` in the run directory, unless the
    verb only reads there: `log` False.
    Flags (-m for a sweep, --cfg job) are Hydra's own, but for --help, which takes Hydra seconds.
    """
    # What says float32 is to be that: left to itself, JAX multiplies with TF32 on a GPU and with bfloat16 on a TPU.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU's memory: 0.75 by itself, and conf/mesh plans for more
    # Imports and tracing make objects by the hundred thousand that stay; looking through them for garbage is a fifth of the time to trace.
    gc.set_threshold(50_000, 20, 20)
    arguments = sys.argv[1:]
    places = [argument for flag, argument in itertools.pairwise(arguments) if flag in PLACED]  # which may have a "=" too
    places += [argument for argument in arguments if argument.partition("=")[0] in PLACED and "=" in argument]
    overrides = [argument for argument in arguments if re.search(r"^[^-].*=|^~", argument) and argument not in places]
    flags = [argument for argument in arguments if argument not in overrides]
    sweep = bool({"-m", "--multirun"} & {*flags})
    taken = [] if sweep else from_plan(name, overrides)  # the jobs of a sweep take and tell it themselves
    if taken:
        batch = "; the recipe's learning rate is for the recipe's batch" * any(each.startswith("train.batch_size") for each in taken)
        print(f"note: planned for this model on this mesh: {' '.join(taken)}{batch}", file=sys.stderr)
    elif not sweep and name in PLANNED and plan_file(overrides).is_file() and "experiment" in _values(overrides):
        print("note: an experiment takes nothing of what is planned for this model on this mesh", file=sys.stderr)
    if {"-h", "--help"} & {*arguments}:
        _leave(_guarded(lambda: print(help_text(name)), name))
    if not any(argument.startswith("-") for argument in arguments):
        run = _together if log else lambda job, config, overrides: job(config, overrides)
        _leave(_guarded(lambda: run(job, load_config(*map(quoted, arguments), name=name), arguments), name))

    failed: list[Exception] = []

    def hydra_job(config: DictConfig) -> None:
        try:
            built = resolve(config)
            if "run_dir" not in _values(overrides) and hasattr(built, "run_dir"):
                built = dataclasses.replace(built, run_dir=HydraConfig.get().runtime.output_dir)
            _together(job, built, [override for override in overrides if not re.match(r"[+~]*hydra\b", override)])
        except Exception as error:  # Hydra would print a line of its own before it raises it again
            failed.append(error)

    def hydra_main() -> None:
        if sweep and name not in PLANNED:
            verbs = " and ".join(PLANNED)
            raise ConfigError(f"only {verbs} have sweeps", where=name, next=f"a command for each: python -m llama_eqx.{name} KEY=VALUE")
        check_flags(arguments, lambda: _keys(name, []))
        _check_groups(overrides)
        if not places:  # which may have more of them
            _check_recipe(overrides)
        hydra.main(version_base="1.3", config_path=str(home(name)), config_name=name)(hydra_job)()
        if failed:
            raise failed[0]

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors arrive here instead of being printed by Hydra
    if sweep:  # commas make the jobs, which take the plans of their own models and meshes
        words = [*map(quoted_options, overrides)]
    else:
        words = planned(name, overrides if "--run" in flags else [*map(quoted, overrides)])  # a job's are quoted already
    sys.argv[1:] = [*words, *flags]  # in one piece: argparse takes no overrides on both sides of a flag
    _leave(_guarded(hydra_main, name))


def help_text(name: str) -> str:
    """What `hydra.help.template` of a verb says, with the groups of `conf/` and their options."""
    folder = home(name)
    said = yaml.safe_load((folder / f"{name}.yaml").read_text())["hydra"]["help"]["template"]
    options: dict[str, list[str]] = {}
    folders = conf_dirs() if folder == conf_dir() else [folder]
    for group, option in sorted((str(path.parent.relative_to(top)), path.stem) for top in folders for path in top.glob("*/**/*.yaml")):
        if not option.startswith("_") and option != pathlib.Path(group).name:  # parts of options, and verbs with a folder of their own
            options.setdefault(group, []).append(option)
    return said.replace("$APP_CONFIG_GROUPS", "\n".join(f"{group}: {', '.join(found)}" for group, found in options.items()))


def quoted(override: str) -> str:
    """`prompt=it's` or `profile=true` as Hydra must be given it for the value to arrive unchanged."""
    key, equals, value = override.partition("=")
    if not equals or re.sub(r"^(data\.components|eval_data)\.\w+", "data", key.lstrip("+")) not in VERBATIM or value == "null":
        return quoted_options(override)
    value = os.path.expanduser(value) if key == "run_dir" else value  # not every shell does it after a "="
    value = re.sub(r"(\\*)(\"|$)", lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    return f'{key}="{value}"'.replace("${", "\\${")


def quoted_options(override: str) -> str:
    """`profile=true,false` with the names of options quoted, which Hydra would take for bools or numbers."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"(true|false|[\d.]+)(,(true|false|[\d.]+))*", value) or not key or not _is_group(key):
        return override
    return f"{key}=" + ",".join(f'"{option}"' for option in value.split(","))


def _is_group(name: str) -> bool:
    return any((folder / name).is_dir() for folder in conf_dirs())


def _together(job: Callable[[Any, list[str]], None], config: Any, overrides: list[str]) -> None:
    """Runs `job`, as one of several processes if the verb may have them and there are."""
    if not hasattr(config, "distributed"):
        return _logged(job, config, overrides)
    from llama_eqx.processes import together  # JAX, which a typo need not wait for

    with together(config) as (config, process):
        _logged(job, config, overrides, log_file=f"log.{process}.txt" if process else "log.txt")


def _leave(code: int) -> None:
    if processes := sys.modules.get("llama_eqx.processes"):
        processes.leave(code)
    sys.exit(code)


def _logged(job: Callable[[Any, list[str]], None], config: Any, overrides: list[str], log_file: str = "log.txt") -> None:
    """Runs `job`. What libraries have to say goes to `log_file` in the run directory, if the verb has one, and not to the terminal."""
    folder = getattr(config, "run_dir", None)
    if folder is None:
        return job(config, overrides)
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        log = Log(pathlib.Path(folder, log_file))
    except OSError as error:
        what = f"cannot write: {error.strerror}"
        if isinstance(error, FileExistsError | NotADirectoryError):
            what = "run_dir is a file, or within one, and not a folder"
        raise StorageError(what, where=folder, next="another place: run_dir=FOLDER") from None
    log.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    for name in ("llama_eqx", "jax", "absl", "asyncio"):  # the last two are Orbax's, and say a lot
        logger = logging.getLogger(name)
        for before in logger.handlers:
            if isinstance(before, Log):
                before.close()  # what was said after its run had ended opened it again
        logger.handlers, logger.propagate = [log], False
        logger.setLevel(logging.INFO if name == "llama_eqx" else logging.WARNING)
    try:
        job(config, overrides)
    except BaseException:
        logging.getLogger("llama_eqx").info("ended by", exc_info=True)
        raise
    finally:
        log.close()  # and is opened again if something is yet to be said


class Log(logging.FileHandler):
    """A log that a full disk ends with one line, where `logging` would print a traceback for every record."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.handle = lambda record: False  # pyright: ignore[reportAttributeAccessIssue]
        print(f"warning: {self.baseFilename} cannot be written: {error.strerror}; the run goes on without it", file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left of it has no place either
            super().close()


def _guarded(job: Callable[[], None], name: str = "train") -> int:
    """The exit code of `job` of the verb `name`, with whatever ended it said in a block; 141, as the shell's, when nobody reads any more
    what it prints.
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
    except (HydraException, OmegaConfBaseException) as error:
        said = _said_within(error) or _explained(error, name, sys.argv[1:])
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
            what = f"out of memory: {str(error).splitlines()[0]}"
            verb = pathlib.Path(sys.argv[0]).stem
            plan = f"; {shlex.join(['python', '-m', 'llama_eqx.plan', *sys.argv[1:]])} says which part to shrink" if verb == "train" else ""
            print(UserError(what, next=f"a smaller model or train.batch_size, remat=full, or more devices{plan}"), file=sys.stderr)
            return 1
        return _unexpected(error)
    return 0


def _unread() -> bool:
    """Whether the reader of what is printed has left, as `| head` does. What is yet to be printed goes nowhere then."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # that an end is closed is told unasked
    closed = [stream for stream, told in poll.poll(0) if told & (select.POLLERR | select.POLLHUP)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(closed)


def _unexpected(error: Exception) -> int:
    traceback.print_exc()
    print(UserError(f"unexpected {type(error).__name__}: {error}", next="please report this with the lines above"), file=sys.stderr)
    return 1


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The merged YAML, not yet checked against the dataclasses."""
    check_words(overrides, lambda: _keys(name, []))
    _check_groups(overrides)
    _check_recipe(overrides)
    try:
        return _compose(name, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last is Hydra's word on an option that is no text
        raise _said_within(error) or _explained(error, name, overrides) from None


def _said_within(error: BaseException | None) -> UserError | None:
    """What one of the resolvers above had to say, where that is what led to `error`."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _check_recipe(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for a recipe that is not there: that of a model is optional, so Hydra would go on without a word."""
    options = [path.stem for folder in conf_dirs() for path in (folder / "recipe").glob("*.yaml")]
    chosen = next((value for key, _, value in (override.partition("=") for override in overrides) if key == "recipe"), "")
    for option in chosen.replace('"', "").split(",") if re.fullmatch(r"[\w.,\"-]+", chosen) else ():
        if option not in options:
            raise ConfigError(f"recipe has no option {option!r}", where="recipe", next=nearest(option, options))


def _check_groups(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for `model.norm=layer`."""
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key and value and value[0] not in "{$" and _is_group(group := key.replace(".", "/")):
            raise ConfigError(f"{key} is a group, with / before its name", where=override, next=f"{group}={value}")


def resolve(config: DictConfig) -> Any:
    """Interpolations resolved once, to plain containers, then to config classes; Hydra's `instantiate` is never used."""
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        said = _said_within(error) or ConfigError(str(error).splitlines()[0], where=str(getattr(error, "full_key", "") or ""))
        raise said from None
    assert isinstance(tree, dict)
    tree.pop("hydra", None)
    return load(tree)


def _compose(name: str, overrides: list[str]) -> DictConfig:
    for group, _, option in (override.lstrip("+").partition("=") for override in overrides):
        if _is_group(group.partition("@")[0]) and (".." in option.split("/") or option.startswith("/")):
            raise no_option(group, option, group, conf_dirs())
    outer = GlobalHydra.instance().hydra  # the caller's own, if any
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(home(name)), version_base="1.3"):
            return hydra_compose(name, overrides)
    finally:
        GlobalHydra.instance().hydra = outer


def _explained(error: Exception, name: str, overrides: list[str]) -> ConfigError:
    """Hydra's exception as a sentence with the nearest key or option."""
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+/[^']+)'", text):
        group = next((str(path) for path in pathlib.PurePath(match[1]).parents if _is_group(str(path))), "")
        return no_option(group, match[1].removeprefix(f"{group}/"), override_of(group, overrides), conf_dirs())
    if match := re.search(r"Could not override '(?P<key>[^']+)'|Key '(?P<bare>[^']+)' is not in struct", text):
        key = match["key"] or match["bare"]
        advice = instead(key, _keys(name, overrides), overrides, conf_dirs())
        return ConfigError(f"no such key: {key}", where=override_of(key, overrides), next=advice)
    if "Ambiguous value" in text:
        return ConfigError(
            "several values for one key make a sweep", where=" ".join(overrides), next="add -m, or quote a value with commas"
        )
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    hint = ""
    if isinstance(error, OverrideParseException):
        hint = "values with commas, braces or = need quotes: 'key=\"value\"'"
    elif "is defined before" in text:
        hint = "in a list of defaults what overrides a group comes last"
    return ConfigError(first, where=" ".join(overrides), next=hint)


def _keys(name: str, overrides: list[str]) -> list[str]:
    """Every dotted key and every group of a verb, in the composition by those overrides that choose options and compose."""
    groups = [str(path.parent.relative_to(folder)) for folder in conf_dirs() for path in folder.rglob("*.yaml")]
    choices = [override for override in overrides if override.split("=")[0].lstrip("+") in groups]
    try:
        config = _compose(name, choices)
    except (HydraException, OmegaConfBaseException):
        config = _compose(name, [])

    def walk(node: Any, path: str) -> list[str]:
        if not isinstance(node, dict):
            return [path]
        return [path] * bool(path) + [key for name, child in node.items() for key in walk(child, f"{path}.{name}".strip("."))]

    groups = [group for group in groups if name in PLANNED or group.split("/")[0] in config]
    return sorted({*walk(OmegaConf.to_container(config), ""), *groups} - {"."})
