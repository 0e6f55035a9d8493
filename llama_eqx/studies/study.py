"""What makes a run part of an experiment."""

from typing import Literal

from llama_eqx.config import Config
from llama_eqx.model.llama import LlamaConfig


class StudyConfig(Config):
    """Arm `arm` of a question. `registration` is the hash of its prereg.yaml, `path` the place of the run among those of the question.

    With `match`, `model.dims.mlp` is chosen so that the model has the parameters, or takes the FLOPs, of `reference`.
    """

    question: str
    arm: str
    stage: Literal["tune", "final"]
    rung: str
    path: str
    registration: str
    match: Literal["none", "parameters", "flops"]
    reference: LlamaConfig
