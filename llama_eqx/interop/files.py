"""Files of a folder that somebody else wrote: which may be opened, what they really are, and which go with a model wherever it goes."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence

from llama_eqx.errors import CheckpointError
from llama_eqx.files import json_object

# The tokenizer's files, and generation's settings. Nothing else is copied, so no code can travel with the weights.
CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
OWN = ("tokenizer_kind.json", "tokenizer.bytes", "tokenizer.chars")  # of a run's own tokenizers, in a folder `tokenizer`
TOKENIZER = "tokenizer"
ORIGINAL = "original"  # where folders of Hugging Face keep Llama 3's tokenizer.model


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of that name in `folder`.

    A link is followed within the folder, and to the blobs of the same repository in Hugging Face's own cache.

    Raises `CheckpointError` when it would lead elsewhere.
    """
    try:
        file, root = (folder / name).resolve(), folder.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # whoever opens it says so
            file.stat()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or not a file name at all
        raise CheckpointError(f"{name[:80]!r} is no file: {error}", where=str(folder)) from None
    blobs = [root.parents[1] / "blobs"] if len(root.parents) > 1 and root.parent.name == "snapshots" else []
    if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts or not any(map(file.is_relative_to, (root, *blobs))):
        to = f": it leads to {file}" if (folder / name).is_symlink() else ""
        raise CheckpointError(
            f"{name} lies outside of the folder{to}",
            where=str(folder),
            kept="it was not opened",
            next="put the file itself into the folder",
        )
    return folder / name


def refuse_code(folder: pathlib.Path, *settings: str) -> None:
    """Raises `CheckpointError` when a folder brings code of its own: Python files, or settings whose `auto_map` names some."""
    found = sorted(path.name for path in folder.glob("*.py"))
    for name in settings:
        if (folder / name).is_file() and "auto_map" in json_object(inside(folder, name), CheckpointError):
            found.append(f"auto_map in {name}")
    if found:
        raise CheckpointError(
            f"a repository with code of its own: {', '.join(found)}",
            where=str(folder),
            kept="none of it was run",
            next="if the weights are a plain Llama's, remove the code and auto_map, having read them",
        )


def carried(folder: pathlib.Path, names: Sequence[str] = CARRIED) -> dict[str, pathlib.Path]:
    """The files in `folder` that go with a model, by their name in the new folder. Of those beside the weights, only `names`.

    Raises `CheckpointError` for a link that leads outside.
    """

    def present() -> Iterator[str]:
        yield from (name for name in names if (folder / name).is_file())
        yield from (f"{TOKENIZER}/{name}" for name in (*CARRIED, *OWN) if (folder / TOKENIZER / name).is_file())

    found = {name: inside(folder, name) for name in present()}
    if "tokenizer.model" in names and "tokenizer.model" not in found and (folder / ORIGINAL / "tokenizer.model").is_file():
        found["tokenizer.model"] = inside(folder, f"{ORIGINAL}/tokenizer.model")
    return found
