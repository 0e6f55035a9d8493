"""Users' own packages. Their config classes are built and their YAML is found beside this package's."""

import functools
import importlib.metadata
import importlib.util
import pathlib

from llama_eqx.errors import ConfigError

PACKAGE = pathlib.Path(__file__).resolve().parent


@functools.cache
def extensions() -> tuple[str, ...]:
    """The packages installed with an entry point of the group "llama_eqx". Whoever installs one trusts it.

    Their pyproject.toml has `[project.entry-points.llama_eqx]` and below it `NAME = "PACKAGE"`. A package in the working directory does not
    count as installed, since it may have been downloaded.
    """
    found: dict[str, None] = {}
    for distribution in importlib.metadata.distributions():
        points = distribution.entry_points.select(group="llama_eqx")
        if points and pathlib.Path(str(distribution.locate_file(""))).resolve() != pathlib.Path.cwd():
            found |= dict.fromkeys(point.value for point in points)
    return tuple(found)


def folders() -> list[pathlib.Path]:
    """The folders of the extensions. Raises `ConfigError` for one that is no package."""
    return [_folder(name) for name in extensions()]


def conf_dir() -> pathlib.Path:
    """The folder of YAML: the copy inside an installed package, else the checkout's."""
    return next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if (path / "train.yaml").is_file())


def conf_dirs() -> list[pathlib.Path]:
    """`conf_dir`, and that folder of every extension that has one.

    Raises `ConfigError` for a file of an extension that this package has too: Hydra would take this package's.
    """
    own, others = conf_dir(), [folder / "conf" for folder in folders() if (folder / "conf").is_dir()]
    for folder in others:
        for path in folder.rglob("*.yaml"):
            if (own / path.relative_to(folder)).is_file():
                raise ConfigError("llama_eqx already has an option of this name", where=str(path), next="another name")
    return [own, *others]


def _folder(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"an entry point of the group llama_eqx names {name!r}, which is not a package with an __init__.py",
            where=str(spec.submodule_search_locations) if spec else "",
            next="name a folder with an __init__.py; if the package is gone, pip uninstall what installed it",
        )
    return pathlib.Path(spec.submodule_search_locations[0])


def import_all() -> None:
    """Imports every extension, whose `__init__.py` adds to registries such as that of meters. Raises `ConfigError` when one fails."""
    for name in extensions():
        imported(name)


def imported(module: str) -> object:
    """Imports a module. Raises `ConfigError` when its code fails, but `ModuleNotFoundError` when it does not exist."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{module} cannot be imported: {type(error).__name__}: {error}", where=module) from error
