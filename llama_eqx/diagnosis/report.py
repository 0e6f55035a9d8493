"""What the doctor was asked, and what it found."""

import dataclasses
import pathlib
from collections import Counter
from typing import Literal

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, UserError

Severity = Literal["error", "warning", "note"]


class DoctorConfig(Config):
    """`path` is a folder, None for the environment. `against` is a second folder, or "transformers" to let it read the same one.

    `weights` says whether every number is read, or only names, shapes and settings. `tolerance` bounds a comparison's differences, as a
    fraction of the root mean square of the activations of each part.
    """

    path: str | None
    against: str | None
    weights: bool
    tolerance: float

    def check(self) -> None:
        if self.against is not None and self.path is None:
            raise ConfigError("there is nothing to compare it with", where="against", next="path=FOLDER against=OTHER")
        if not self.tolerance > 0:
            raise ConfigError(f"{self.tolerance} is not above 0", where="tolerance", next="tolerance=1e-4")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong (error), may be wrong (warning) or is good to know (note); `next` is what to do about it."""

    severity: Severity
    where: str
    what: str
    next: str = ""

    def __str__(self) -> str:
        return f"{self.severity:<7}  {self.where}: {self.what}" + (f". Next: {self.next}" if self.next else "")


def finding_of(error: UserError, folder: pathlib.Path, otherwise: str) -> Finding:
    """The finding for an error that a reader raised. Its place is a file of the folder, or `otherwise` if the error names none."""
    place, root = pathlib.Path(error.where).resolve(), folder.resolve()
    inside = place != root and place.is_relative_to(root)
    where = str(place.relative_to(root)) if inside else otherwise
    return Finding("error", where, "; ".join(error.what.splitlines()), error.next)


@dataclasses.dataclass(frozen=True)
class Report:
    """`facts` say what was looked at and what was right about it, or could not be told."""

    title: str
    facts: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> bool:
        return any(finding.severity != "note" for finding in self.findings)

    def __str__(self) -> str:
        order = {"error": 0, "warning": 1, "note": 2}
        findings = sorted(self.findings, key=lambda finding: order[finding.severity])
        counts = Counter(finding.severity for finding in findings)
        total = ", ".join(f"{counts[kind]} {kind}{'s' * (counts[kind] > 1)}" for kind in order if counts[kind])
        return "\n".join([self.title, *(f"  {fact}" for fact in self.facts), "", *map(str, findings), total or "nothing wrong found"])
