"""A mixture of several sources by weight."""

import hashlib
import math
from collections.abc import Iterator

from llama_eqx.data.corpus import DataConfig, Document, Part, SourceConfig
from llama_eqx.errors import ConfigError, DataError

STEPS = 10_000  # weights are whole multiples of 1 / STEPS


class MixtureConfig(DataConfig):
    """`components` by name. The weight of each is its share of the rows, in steps of 0.0001. `prompt` and `position_offset` are the
    mixture's own.

    The held-out text is that of all components. Raises `DataError` when the weights do not sum to 1, before anything is read.
    """

    components: dict[str, DataConfig]
    weights: dict[str, float]

    def check(self) -> None:
        super().check()
        for name, component in self.components.items():
            if not isinstance(component, SourceConfig):
                raise ConfigError("a mixture cannot be part of a mixture", where=f"components.{name}")
            if component.position_offset:
                raise ConfigError(
                    "the rows of a mixture share one offset",
                    where=f"components.{name}.position_offset",
                    next="data.position_offset=N",
                )
        unmatched = sorted(self.components.keys() ^ self.weights.keys())
        wrong = [f"{name} has {'no weight' if name in self.components else 'a weight but is not a component'}" for name in unmatched]
        wrong += [f"the weight of {name} is {weight}" for name, weight in self.weights.items() if not 0 < weight <= 1]
        wrong += [f"the weight of {n} is {w}, not a multiple of {1 / STEPS}" for n, w in self.weights.items() if not _whole(w)]
        advice = "a weight between 0 and 1 for each component, with a sum of 1"
        if wrong or not self.components:
            raise ConfigError("; ".join(wrong) or "no components", where="weights", next=advice)
        if (total := sum(map(_steps, self.weights.values()))) != STEPS:
            raise DataError(f"the weights of the mixture sum to {total / STEPS}", where=f"data.weights: {self.weights}", next=advice)

    def sources(self) -> dict[str, tuple[float, SourceConfig]]:
        return {name: (self.weights[name], source) for name, source in self.components.items() if isinstance(source, SourceConfig)}

    def documents(self) -> Iterator[Document]:
        for name, component in self.components.items():
            for document in component.documents():
                yield Document(f"{name}/{document.name}", document.text)

    def parts(self) -> Iterator[Part]:
        for name, component in self.components.items():
            for split, document in component.parts():
                yield Part(split, Document(f"{name}/{document.name}", document.text))

    def identity(self) -> str:
        content = [f"{name} {component.identity()}" for name, component in self.components.items()]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


def shares(weights: list[float]) -> list[int]:
    """Weights as whole numbers without a common divisor."""
    steps = [_steps(weight) for weight in weights]
    return [step // math.gcd(*steps) for step in steps]


def _steps(weight: float) -> int:
    return round(weight * STEPS)


def _whole(weight: float) -> bool:
    return not 0 < weight <= 1 or math.isclose(weight * STEPS, _steps(weight), abs_tol=1e-6)
