"""What is wrong with a folder of token ids."""

import hashlib
import pathlib

import numpy as np
from tqdm import tqdm

from llama_eqx.diagnosis.files import check_files, mistaken, read_json
from llama_eqx.diagnosis.report import Finding, Report

NUMBERS = 2**24  # that are read at once


def examine_dataset(folder: pathlib.Path, weights: bool) -> Report:
    """Files against `index.json`: number and dtype of the ids, their sha256, and the range that they cover."""
