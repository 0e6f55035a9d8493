"""`python -m llama_eqx.prepare`: turns files of text into token shards."""

import sys
from typing import Any

from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.data.prepare import prepare

    try:
        done = prepare(config)
    except KeyboardInterrupt:
        print(f"interrupted\nkept: the work in {config.output}\nnext: the same command continues", file=sys.stderr)
        sys.exit(130)
    for split, count in done.counts.items():
        print(f"{split:<11} {count['tokens']:,} tokens, {count['documents']:,} documents, {count['bytes']:,} bytes of text")
    print(f"dropped     {done.duplicates:,} duplicates, {done.empty:,} empty, {done.refused:,} that cannot be read")
    for name in done.named:
        print(f"            {name}")
    if done.read:
        print(f"speed       {done.read / 1e6 / done.seconds:,.2f} MB/s, {done.read:,} bytes of files in {done.seconds:,.1f} s")
    if done.touched:
        print(f"warning     {len(done.touched):,} files were written to or copied after they were encoded: {', '.join(done.touched[:3])}")
        print("            if their text has changed, output=ANOTHER encodes it")
    if done.counts["val"]["tokens"]:
        print(f"train       python -m llama_eqx.train data=prepared data.path={done.folder}")
    else:
        print("train       needs held-out text: another validation_fraction")


if __name__ == "__main__":
    run_verb("prepare", main)
