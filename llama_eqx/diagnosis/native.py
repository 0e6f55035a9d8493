"""What is wrong with a run directory, or a folder of the same shape that holds weights alone."""

import pathlib
from collections.abc import Mapping

import equinox as eqx
import jax
import numpy as np

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, TOKENIZER, read_model_config
from llama_eqx.data.tokenizer import load_tokenizer
from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.diagnosis.settings import check_settings
from llama_eqx.errors import UserError
from llama_eqx.model.llama import LlamaConfig
