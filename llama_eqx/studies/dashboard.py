"""A question's dashboard on W&B, as code: a saved view of its runs, and a report to write on."""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
from typing import Any

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, first_line
from llama_eqx.studies.registration import Registration, load_registration

# Sections of the view with their metrics, one panel each; over tokens, so that arms with different batch sizes can be compared.
PANELS = {
    "Loss": ("train/loss", "val/loss", "val/bits_per_byte"),
    "Optimisation": ("optim/lr", "optim/grad_norm", "optim/update_norm", "optim/withheld"),
    "Speed": ("perf/tokens_per_second", "perf/mfu", "data/starved_fraction"),
}


class DashboardConfig(Config):
    """`experiment` is a question with runs in `entity`/`project` on W&B. Their group is the question, their job type the arm."""

    experiment: str | None
    entity: str | None
    project: str
    push: bool

    def check(self) -> None:
        if self.experiment is None:
            raise ConfigError("which question?", where="experiment", next="experiment=rotary_precision")
        if self.push and self.entity is None:
            raise ConfigError("a view is saved for a user or a team", where="entity", next="entity=NAME")


def dashboard(config: DashboardConfig) -> list[str]:
    """Builds the view and the report, and saves them on W&B if `push`. Returns lines to print.

    Raises `ConfigError` when the question is not registered, wandb-workspaces is missing or W&B refuses.
    """
    assert config.experiment is not None
    registration = load_registration(config.experiment)
    try:
        view = build_view(config.experiment, config.entity or "", config.project)
        report = build_report(config.experiment, registration, config.entity or "", config.project, runs=config.push)
    except ImportError:
        raise ConfigError("wandb-workspaces is not installed", where="dashboard", next="pip install 'llama_eqx[dashboard]'") from None
    if config.push:
        try:
            return [f"view    {view.save().url}", f"report  {report.save().url}"]
        except Exception as error:  # W&B's client raises errors of any kind
            raise ConfigError(f"W&B did not take it: {first_line(error)}", where=config.project, next="wandb login") from error
    panels = [f"{name:13} {', '.join(metrics)}" for name, metrics in PANELS.items()]
    runs = f"runs of group {config.experiment}, grouped by arm, in the project {config.project}"
    return [f"view of {runs}:", *panels, "push=true entity=NAME saves it and a report on W&B; runs that were offline: wandb sync"]


def build_view(question: str, entity: str, project: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace`: the runs of the question, grouped by arm so that each curve is a mean over seeds."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=name, panels=_panels(metrics), is_open=name == "Loss", layout_settings=ws.SectionLayoutSettings(columns=3, rows=2))
        for name, metrics in PANELS.items()
    ]
    runs = ws.RunsetSettings(filters=[ws.Metric("Group") == question], groupby=[ws.Metric("JobType")])  # pyright: ignore[reportArgumentType]
    settings = ws.WorkspaceSettings(x_axis="tokens", group_by_prefix="first")
    return ws.Workspace(entity=entity, project=project, name=question, sections=sections, runset_settings=runs, settings=settings)


def build_report(question: str, registration: Registration, entity: str, project: str, *, runs: bool) -> Any:
    """A `wandb_workspaces.reports.v2.Report` with what was registered and the panels; `runs`, which needs a login, selects the runs."""
    import wandb_workspaces.reports.v2 as wr

    chosen: dict[str, Any] = {}
    if runs:
        one = wr.Runset(entity=entity, project=project, name=question, filters=f"Metric('Group') == '{question}'", groupby=["JobType"])
        chosen = {"runsets": [one]}
    family = [f"{name}: {_said(contrast)}" for name, contrast in registration.contrasts.items()]
    rule = f"{registration.metric} at the end, margin {registration.margin}: {registration.rule}"
    blocks = [
        wr.H1(question),
        wr.P(registration.question),
        wr.H2("Registered before the runs"),
        wr.UnorderedList([rule, *family, registration.stopping]),
        wr.P(f"registration {registration.hash()}"),
        *(block for name, metrics in PANELS.items() for block in (wr.H2(name), wr.PanelGrid(panels=_panels(metrics), **chosen))),
        wr.H2("Verdict"),
        wr.P(f"python -m llama_eqx.report experiment={question}"),
    ]
    return wr.Report(project=project, entity=entity, title=question, description=registration.question, blocks=blocks)  # pyright: ignore[reportArgumentType]


def _panels(metrics: tuple[str, ...]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.LinePlot(title=metric, x="tokens", y=[metric], title_x="tokens") for metric in metrics]


def _said(contrast: dict[str, float]) -> str:
    return " ".join(f"{weight:+g} {arm}" for arm, weight in contrast.items())
