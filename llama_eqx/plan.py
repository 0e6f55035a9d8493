"""`python -m llama_eqx.plan`: says whether a run fits on its mesh, and estimates how fast it would be, without the mesh."""

import sys
from typing import Any

from llama_eqx.compose import conf_dirs, load_config, plan_file, quoted
from llama_eqx.verb import run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.planning.plan import make_plan, report, save, shrink  # after the config has been checked

    def variant(*more: str, plan: bool = True) -> Any:
        changed = [override.partition("=")[0] for override in more]

        def stays(override: str) -> bool:
            key = override.partition("=")[0].lstrip("+~")
            return not any(key == other or key.startswith(f"{other}.") for other in changed)

        return load_config(*map(quoted, filter(stays, overrides)), *more, name="plan", plan=plan)

    filed = ""
    if config.search:
        from llama_eqx.planning.search import MOST, check_writable, file_plan, search

        bare = [override for override in overrides if override.partition("=")[0] in ("model", "mesh")]
        path, preset = plan_file(bare), load_config(*bare, name="plan", plan=False)
        if other := [part for part in ("model", "optimizer") if getattr(config, part) != getattr(preset, part)]:
            filed = f"not written to {path}: its plan is for another {' and another '.join(other)}"
            print(f"note: the plan found is {filed}", file=sys.stderr)
        else:
            check_writable(path)
        remats = sorted(path.stem for folder in conf_dirs() for path in (folder / "remat").glob("*.yaml"))
        found = search(lambda *more: variant(*more, plan=False), overrides, remats, MOST if config.search is True else config.search)
        plan = found.plan
        if not other:
            asked = f"search={str(config.search).lower()}"
            filed = f"{path} {file_plan(path, found, asked, lambda: load_config(*bare, name='plan'))}"
    else:
        plan = make_plan(config)
    print(report(plan, "" if plan.fits else shrink(plan, variant)))
    if filed:
        print(f"{'plan':<20}{filed}")
    print(f"{'saved':<20}{save(plan, config.run_dir)}")


if __name__ == "__main__":
    run_verb("plan", main)
