"""`python -m llama_eqx` does nothing itself: it names the verbs."""

import sys

from llama_eqx.errors import ConfigError

VERBS = "train, prepare, convert, generate, evaluate, doctor, plan, supervise, replay, provenance, report, dashboard"

if __name__ == "__main__":
    print(ConfigError(f"llama_eqx alone is not a verb; use one of: {VERBS}", next="python -m llama_eqx.train --help"), file=sys.stderr)
    sys.exit(ConfigError.code)
