"""What was registered about an experiment before its runs, and the learning rates that its tuning found."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Literal, get_origin

import yaml

from llama_eqx.config import Config, dump, load, nearest, read_yaml
from llama_eqx.errors import ConfigError
from llama_eqx.files import reading, write

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
Contrast = dict[str, float]
LOSS = r"val/(loss|loss_at_\d+|.+/loss)"  # the metrics in nats per token


class Rule(Config):
    """How `verdict` judges a contrast. It stands here so that the hash covers it: another rule is another registration.

    `equivalence` is tested first, by two one-sided tests within the margin: a p below alpha is "no effect". Otherwise the contrast is a
    `difference` when the two-sided paired t test and its `confirmation`, the sign-flip permutation test, are both below alpha.
    `adjustment` applies to the p of the first two, over the contrasts; controls and the confirmation are not adjusted.
    """

    equivalence: Literal["tost"]
    difference: Literal["paired_t"]
    confirmation: Literal["sign_flip"]
    adjustment: Literal["holm"]

    def __str__(self) -> str:
        return f"{self.equivalence} within the margin, else {self.difference} and {self.confirmation}; {self.adjustment} over the contrasts"


class Registration(Config):
    """`prereg.yaml`. A contrast is a weighted sum of arms, with weights that sum to 0: {rounded: 1, exact: -1}.

    `metric` is compared at the end of the schedule. It is a loss in nats per token: val/loss, val/loss_at_POSITION or val/NAME/loss. What
    is better where it is higher, such as val/accuracy, is refused: a higher value is "worse" everywhere.

    `contrasts` are the family that is adjusted. Negative controls are expected to be equivalent within `margin`, positive ones to show a
    loss. `same_data` lists groups of arms that must have seen the same batches; it is empty when all must. Parameters that the arms of a
    contrast share must have begun with the same values, whatever the arms' groups, unless they differ in `model.init`. `doses` are
    pictures by name: contrasts over a quantity. `tune_arms` are tuned over `rates` and `tune_seeds`; any other arm takes the rate of the
    first of them. Without `tune_arms` there is one rate, which every arm takes.
    """

    question: str
    metric: str
    margin: float
    alpha: float
    rule: Rule
    arms: tuple[str, ...]
    same_data: tuple[tuple[str, ...], ...]
    tune_arms: tuple[str, ...]
    rates: tuple[float, ...]
    tune_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    contrasts: dict[str, Contrast]
    negative_controls: dict[str, Contrast]
    positive_controls: dict[str, Contrast]
    doses: dict[str, dict[str, float]]
    stopping: str
    exclusion: str

    def check(self) -> None:
        if not re.fullmatch(LOSS, self.metric):
            raise ConfigError(
                f"{self.metric} is no loss in nats per token",
                where="metric",
                next="metric: val/loss, or val/loss_at_64 of one position, or val/NAME/loss of a component or an eval_data.NAME",
            )
        if not (0 < self.alpha < 0.5 and self.margin > 0):
            raise ConfigError("alpha must lie between 0 and 0.5, and the margin above 0", where="alpha, margin")
        lists = {name: getattr(self, name) for name in ("arms", "tune_arms", "rates", "tune_seeds", "seeds")}
        lists["contrasts and controls"] = (*self.contrasts, *self.negative_controls, *self.positive_controls)
        for where, names in lists.items():
            if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
                raise ConfigError(f"{twice} is there twice", where=where)
        for name, contrast in self.all_contrasts().items():
            for arm in contrast:
                self.known(arm, f"{name}.{arm}")
            if not contrast or not all(contrast.values()):
                raise ConfigError("a contrast is of arms, none with a weight of 0", where=name)
            if not abs(sum(contrast.values())) <= 1e-9:  # NaN too
                raise ConfigError(f"the weights sum to {sum(contrast.values())}, not 0", where=name)
        for name, doses in self.doses.items():
            for contrast in doses:
                if contrast not in self.all_contrasts():
                    raise ConfigError(f"no contrast is called {contrast}", where=name, next=nearest(contrast, self.all_contrasts()))
        for arm in (*self.tune_arms, *(arm for group in self.same_data for arm in group)):
            self.known(arm, arm)
        if self.same_data and (alone := [arm for arm in self.arms if not any(arm in group for group in self.same_data)]):
            raise ConfigError(f"{', '.join(alone)} in no group", where="same_data", next="a group of its own, if its data is its own")
        if not self.tune_arms:
            if len(self.rates) != 1:
                raise ConfigError("without tune_arms every arm takes one rate", where="rates", next="rates: [0.004], or tune_arms")
        elif len(self.rates) < 3 or list(self.rates) != sorted(self.rates):
            raise ConfigError("tuning wants three rates or more, rising, so that the best can lie between others", where="rates")

    def known(self, arm: str, where: str) -> None:
        if arm not in self.arms:
            raise ConfigError(f"no arm is called {arm}", where=where, next=nearest(arm, self.arms))

    def all_contrasts(self) -> dict[str, Contrast]:
        return self.contrasts | self.negative_controls | self.positive_controls

    def hash(self) -> str:
        """The hash of everything in it but the comments and the order of keys."""
        return hashlib.sha256(json.dumps(dump(self), sort_keys=True).encode()).hexdigest()[:16]


# Each key of a registration, with what to write where there is nothing to say.
EMPTY = {field.name: {dict: "{}", tuple: "[]"}.get(get_origin(field.type), "…") for field in dataclasses.fields(Registration)}


def folder(question: str) -> pathlib.Path:
    """`experiments/<question>` here, or else in the checkout of this package."""
    here = pathlib.Path("experiments", question)
    return here if here.is_dir() else CHECKOUT / here


def load_registration(question: str) -> Registration:
    """The registration of a question. Raises `ConfigError` when there is none or it contradicts itself."""
    path = folder(question) / "prereg.yaml"
    if not path.exists():
        raise ConfigError("this question is not registered yet", where=str(path), next="write that file, and commit it, before any run")
    try:
        with reading(path, ConfigError, "this is no registration", next="bring back the file as it was committed"):
            known = {**(read_yaml(path.read_text(encoding="utf-8")) or {})}
            if missing := [name for name in EMPTY if name not in known]:
                lines = ", ".join(f"{name}: {EMPTY[name]}" for name in missing)
                raise ConfigError(f"missing: {', '.join(missing)}", next=f"add {lines}; docs/experiments.md has a whole one")
            rule = known["rule"]
            rule = {**rule, "_target_": f"{__name__}.Rule"} if isinstance(rule, dict) else rule
            return load({**known, "rule": rule, "_target_": f"{__name__}.Registration"})
    except ConfigError as error:
        where = f"{path}: {error.where}" if error.where not in ("", str(path)) else str(path)
        raise ConfigError(error.what, where=where, next=error.next) from None


def registered(question: str, name: str) -> str:
    """For YAML: a list of the registration as the values of a sweep, with "final_arms" for its `arms`; or its `hash`.

    Raises `ConfigError` when the list is empty.
    """
    found = load_registration(question)
    if name == "hash":
        return found.hash()
    values = getattr(found, name := name.removeprefix("final_"))
    if not values:
        advice = f"python -m llama_eqx.train -m experiment={question}, without stage=tune" if name.startswith("tune") else ""
        raise ConfigError(f"no {name} are registered", where=str(folder(question) / "prereg.yaml"), next=advice)
    return ",".join(map(str, values))


def write_tuned(question: str, rung: str, rates: dict[str, float]) -> pathlib.Path:
    path = folder(question) / "tuned.yaml"
    said = "# Found by stage=tune, read by stage=final: the peak learning rate of each arm, by rung. Another arm takes that of the first.\n"
    write(path, (said + yaml.safe_dump({**_all_rates(path), rung: rates}, sort_keys=False)).encode())
    return path


def _all_rates(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """The learning rates in a tuned.yaml, by rung and arm; empty without one. Raises `ConfigError` when it is damaged."""
    if not path.exists():
        return {}
    advice = "remove the file; python -m llama_eqx.report with stage=tune writes it anew, for each rung"
    with reading(path, ConfigError, "these are no learning rates", next=advice):
        found = {rung: {arm: float(rate) for arm, rate in of.items()} for rung, of in (read_yaml(path.read_text()) or {}).items()}
        if wrong := [f"{arm}: {rate}" for of in found.values() for arm, rate in of.items() if not 0 < rate < math.inf]:
            raise ValueError(wrong[0])
        return found


def tuned(question: str, rung: str, arm: str) -> float:
    """For YAML: the peak learning rate of an arm: that in tuned.yaml, or the only one registered. Raises `ConfigError` when it has not been
    tuned.
    """
    path = folder(question) / "tuned.yaml"
    rates, registration = _all_rates(path).get(rung, {}), load_registration(question)
    if not registration.tune_arms:
        return rates.get(arm, registration.rates[0])
    rate = rates.get(arm, rates.get(registration.tune_arms[0]) if arm not in registration.tune_arms else None)
    if rate is None:
        tuning = f"python -m llama_eqx.train -m experiment={question} stage=tune, then python -m llama_eqx.report with the same"
        raise ConfigError(f"{arm} has no learning rate at {rung} yet", where=str(path), next=tuning)
    return rate
