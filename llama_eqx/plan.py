"""`python -m llama_eqx.plan`: says whether a run fits on its mesh, and estimates how fast it would be, without the mesh."""

from typing import Any

from llama_eqx.compose import conf_dir, load_config, plan_file, run_verb


def main(config: Any, overrides: list[str]) -> None:
    from llama_eqx.planning.plan import make_plan, report, save, shrink  # after the config has been checked

    def variant(*more: str, plan: bool = True) -> Any:
        keys = {override.partition("=")[0] for override in more}
        return load_config(*(o for o in overrides if o.partition("=")[0] not in keys), *more, name="plan", plan=plan)

    if config.search:
        from llama_eqx.planning.search import MOST, search

        remats = sorted(path.stem for path in (conf_dir() / "remat").glob("*.yaml"))
        enough = MOST if config.search is True else config.search
        plan = search(lambda *more: variant(*more, plan=False), overrides, remats, plan_file(overrides), enough)
    else:
        plan = make_plan(config)
    print(report(plan, "" if plan.fits else shrink(plan, variant)))
    print(f"{'saved':<20}{save(plan, config.run_dir)}")


if __name__ == "__main__":
    run_verb("plan", main)
