"""`python -m llama_eqx.prepare`: turns files of text into token shards."""

import sys
from typing import Any

from llama_eqx.compose import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.data.prepare import prepare

    try:
        done = prepare(config)
    except KeyboardInterrupt:
        print(f"interrupted\nkept: the work in {config.output}\nnext: the same command continues", file=sys.stderr)
        sys.exit(130)
    for split, count in done.counts.items():
        print(f"{split:<11} {count['tokens']:,} tokens, {count['documents']:,} documents, {count['bytes']:,} bytes of text")
    megabytes = sum(count["bytes"] for count in done.counts.values()) / 1e6
    speed = f"{done.seconds:,.1f} s, {megabytes / done.seconds:,.1f} MB/s" if done.seconds else "was done before"
    print(f"dropped     {done.duplicates:,} duplicates, {done.empty:,} empty, {done.refused:,} that cannot be read")
    for name in done.named:
        print(f"            {name}")
    print(f"time        {speed}")
    print(f"train       python -m llama_eqx.train data=prepared data.path={done.folder}")


if __name__ == "__main__":
    run_verb("prepare", main)
