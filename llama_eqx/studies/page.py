"""Headings, text, tables and pictures as Markdown beside PNG files, and as one self-contained page of HTML."""

import html
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from llama_eqx.errors import StorageError
from llama_eqx.studies.plots import save

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #e3e3e3; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: 0.28rem 0.7rem 0.28rem 0; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }
th { color: #5c5c5c; font-weight: 600; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.82rem; white-space: pre-wrap; }
svg { width: 100%; height: auto; }
"""


class Page:
    """A page whose parts are added in reading order; `write` files all of them."""

    def __init__(self, title: str):
        self._title = title
        self._markdown, self._html = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
        self._figures: list[tuple[str, Figure]] = []

    def heading(self, text: str) -> None:
        self._markdown.append(f"## {text}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._markdown.append(text)
        self._html.append(f"<p>{html.escape(text)}</p>")

    def verbatim(self, text: str) -> None:
        self._markdown.append(f"```text\n{text}\n```")
        self._html.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [head, ["---"] * len(head), *rows]
        self._markdown.append("\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines))
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        self._html.append(f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{cells}</table>")

    def figure(self, name: str, made: Figure | None, alternative: str) -> None:
        name = re.sub(r"\W+", "_", name)  # it names a file, and a metric's may have a slash
        if made is not None:
            self._figures.append((name, made))
            self._markdown.append(f"![{alternative}]({name}.png)")
            self._html.append(f"<figure aria-label='{html.escape(alternative)}'>\0{name}\0</figure>")

    def write(self, folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
        """Writes `<stem>.md`, its pictures, and `<stem>.html`. Raises `StorageError`."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            body = "\n".join(self._html)
            for number, (name, made) in enumerate(self._figures):
                # All pictures give their parts the same ids; on one page the ids must differ.
                svg = save(made, folder / f"{name}.png").replace('id="', f'id="{number}-').replace("#", "\1")
                svg = svg.replace("url(\1", f"url(#{number}-").replace('href="\1', f'href="#{number}-').replace("\1", "#")
                body = body.replace(f"\0{name}\0", svg)
            head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self._title)}</title>'
            (folder / f"{stem}.md").write_text("\n\n".join(self._markdown) + "\n", encoding="utf-8")
            page = f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>"
            (folder / f"{stem}.html").write_text(page, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"the report cannot be written: {error.strerror}", where=str(folder)) from error
        return [folder / f"{stem}.md", folder / f"{stem}.html"]
