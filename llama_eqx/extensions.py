"""Packages of users' own, whose config classes are built and whose YAML is found beside this package's."""

import functools
import importlib.metadata
import importlib.util
import pathlib


@functools.cache
def extensions() -> tuple[str, ...]:
    """The packages that were installed with an entry point of the group "llama_eqx", by which whoever installed them trusts them.

    In their pyproject.toml: `[project.entry-points.llama_eqx]`, and below it `NAME = "PACKAGE"`.
    """
    return tuple(dict.fromkeys(point.value for point in importlib.metadata.entry_points(group="llama_eqx")))


def folders() -> list[pathlib.Path]:
    """Where the extensions are. One that cannot be found has none, and is missed when its first class is."""
    specs = [importlib.util.find_spec(name.partition(".")[0]) for name in extensions()]
    return [pathlib.Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]


def import_all() -> None:
    """Imports every extension: what one adds to a registry, as of meters, its `__init__.py` adds."""
    for name in extensions():
        importlib.import_module(name)
