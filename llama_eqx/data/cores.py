"""How many processes and threads to use on this machine."""

import os

THREADS = "RAYON_NUM_THREADS"  # the tokenizers library, whose threads are Rayon's, reads it when it first encodes


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """How many threads of this process encode at once: as many as `allow` set, else one per core."""
    said = os.environ.get(THREADS, "")
    return int(said) if said.isdecimal() and int(said) else cores()


def allow(count: int) -> None:
    """Sets how many threads of this process encode, for every tokenizer."""
    os.environ[THREADS], os.environ["TOKENIZERS_PARALLELISM"] = str(count), "true" if count > 1 else "false"
