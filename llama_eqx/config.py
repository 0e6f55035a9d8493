"""The base class of every config, and the only way to build one from YAML."""

import contextlib
import dataclasses
import difflib
import importlib.util
import keyword
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, dataclass_transform

import yaml
from beartype.door import is_bearable

from llama_eqx.errors import ConfigError, first_line
from llama_eqx.extensions import extensions, imported

TYPO = 0.75  # difflib's ratio where one letter of four differs; below that a likeness is chance


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """A frozen, keyword-only dataclass whose values are checked against its annotations.

    A subclass only lists its fields. None has a default: YAML says everything, so a missing or unknown key is an error.
    Lists become tuples and an int becomes a float where a float is declared. Invariants between fields go into `check`.

    Raises `ConfigError` on construction when a value does not fit.
    """

    # jaxtyping's import hook would check `__init__` before `__post_init__` has converted the values.
    __no_type_check__ = True
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            hint: Any = field.type
            value = _converted(getattr(self, field.name), hint)
            if not _fits(value, hint):
                raise ConfigError(f"{_said(value)} does not fit: {_wanted(hint, value)}", where=field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{value} is not a finite number", where=field.name)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other."""

    def within(self, low: int | float, high: int | float, *names: str) -> None:
        """Raises `ConfigError` unless each of these fields that the config has is at least `low` and below `high`."""
        for name in names:
            if not low <= (value := getattr(self, name, low)) < high:
                bounds = f"at least {low:g}" + (f" and below {high:g}" if high < float("inf") else "")
                raise ConfigError(f"{value} is not {bounds}", where=name)


def load(node: Any, path: str = "") -> Any:
    """Builds `Config`s from a resolved tree of dicts, lists and scalars: a dict with `_target_` becomes that class.

    Nothing but a `Config` of this package and its `extensions` is ever imported or called, so a downloaded config is only data.

    Raises `ConfigError` naming the place in the tree.
    """
    if isinstance(node, list | tuple):
        return tuple(load(child, f"{path}[{i}]") for i, child in enumerate(node))
    if not isinstance(node, Mapping):
        return node
    children = {key: load(child, f"{path}.{key}".lstrip(".")) for key, child in node.items() if key != "_target_"}
    if "_target_" not in node:
        return children
    children = {_field(key): child for key, child in children.items()}
    cls = _config_class(str(node["_target_"]), path)
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in children:
        if key not in fields:
            raise ConfigError(f"no such key: {key}", where=path, next=nearest(str(key), fields))
    if missing := [name for name in fields if name not in children]:
        raise ConfigError(f"missing: {', '.join(missing)}", where=path)
    try:
        return cls(**children)
    except ConfigError as error:
        if error.where.startswith(path) and path:
            raise
        raise ConfigError(error.what, where=f"{path}.{error.where}".strip("."), kept=error.kept, next=error.next) from None


def dump(value: Any) -> Any:
    """The inverse of `load`: plain containers, with `_target_` where a `Config` stood.

    Raises `ConfigError` for a class that `load` would not build.
    """
    if isinstance(value, Config):
        target = f"{type(value).__module__}.{type(value).__qualname__}"
        _config_class(target, "")
        fields = {field.name.rstrip("_"): dump(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_target_": target, **fields}
    if isinstance(value, Mapping):
        return {key: dump(child) for key, child in value.items()}
    return [dump(child) for child in value] if isinstance(value, tuple) else value


class _Plain(yaml.SafeLoader):
    """Neither tags nor aliases: by these, a kilobyte can stand for terabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ValueError(f"line {alias.start_mark.line + 1} has the alias *{alias.anchor}; write the value itself in its place")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """The content of YAML that somebody else may have written. Raises `ValueError` with a reason of one line."""
    try:
        return _Plain(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


class Difference(typing.NamedTuple):
    """A key whose value differs; as text "train.seq_len: 256 -> 512"."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"

    def within(self, keys: Iterable[str]) -> bool:
        """Whether the key is one of `keys`, or below one of them."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


def differences(old: Any, new: Any, path: str = "") -> list[Difference]:
    """Every key whose value differs between two trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    return [] if old == new else [Difference(path, old, new)]


def known_to_both(tree: Any, other: Any) -> Any:
    """`tree` without the keys that `other` lacks because older, or newer, code wrote it."""
    if isinstance(tree, dict) and isinstance(other, dict):
        return {key: known_to_both(value, other[key]) for key, value in tree.items() if key in other}
    return tree


def nearest(word: str, options: Iterable[str], most: int = 30) -> str:
    """A sentence naming the option most like `word`, or all options when none is near, if they are `most` or fewer."""
    options = sorted(options)
    if near := difflib.get_close_matches(word, options, 1, TYPO):
        return f"did you mean {near[0]}?"
    return f"one of: {', '.join(options)}" if len(options) <= most else "--cfg job shows all of them"


def _field(key: str) -> str:
    """The name of a key's field: a Python keyword, such as `from`, gets an underscore behind it."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _config_class(target: str, path: str) -> type[Config]:
    module, _, name = target.rpartition(".")
    packages, where, cls = ("llama_eqx", *extensions()), f"{path}._target_".lstrip("."), None
    if f"{module}.".startswith(tuple(f"{package}." for package in packages)):
        with contextlib.suppress(ModuleNotFoundError):
            if module.startswith("llama_eqx.") or _defines(module, name):
                cls = getattr(imported(module), name, None)
    if not (isinstance(cls, type) and issubclass(cls, Config) and cls is not Config):
        raise ConfigError(
            f"{target} is not a config class of {' or '.join(packages)}, and only these are built",
            where=where,
            next="" if module.split(".")[0] in packages else "a package of your own needs an entry point: docs/variants.md",
        )
    return cls


def _defines(module: str, name: str) -> bool:
    """Whether the source of an extension's module has a class of that name. A script in a package must not run because it is named."""
    if module in extensions():
        return True
    imported(module.rpartition(".")[0])
    get_source = getattr(getattr(importlib.util.find_spec(module), "loader", None), "get_source", None)
    return get_source is not None and re.search(rf"^class {re.escape(name)}\b", get_source(module) or "", re.MULTILINE) is not None


def _converted(value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    inner = next((typing.get_args(option)[-1 if isinstance(value, Mapping) else 0] for option in options if typing.get_args(option)), None)
    if isinstance(value, list | tuple):
        return tuple(_converted(child, inner) for child in value)
    if isinstance(value, Mapping):
        return {key: _converted(child, inner) for key, child in value.items()}
    if type(value) is int and float in options and int not in options:
        return float(value) if abs(value) < 2**1000 else math.inf  # which is refused
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether every part of a value has its type. beartype alone samples containers, and takes a bool for an int."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) is bool and bool not in options:
        return False
    inner = next((typing.get_args(option)[-1] for option in options if typing.get_origin(option) is dict), None)
    inner = next((typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple), inner)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return is_bearable(value, hint) and all(_fits(part, inner) for part in parts)  # pyright: ignore[reportArgumentType]


def _said(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _wanted(hint: Any, value: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    if isinstance(value, tuple) and (inner := next((typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple), None)):
        wrong = [part for part in value if not _fits(part, inner)]
        return _wanted(inner, wrong[0]) if wrong else "wanted another number of elements"
    if literal := next((option for option in options if typing.get_origin(option) is typing.Literal), None):
        return nearest(str(value), map(str, typing.get_args(literal)))
    if any(typing.get_origin(option) is tuple for option in options) and not isinstance(value, tuple):
        return f"wanted a list, [{value}]"
    if isinstance(value, float) and int in options and value.is_integer():
        return f"wanted int, {int(value)}"
    return f"wanted {hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace('typing.', '')}"
