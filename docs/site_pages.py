"""What the documentation's site has beside the pages of docs/: a hook of mkdocs (see mkdocs.yml).

The reference of commands, settings and tables is written from the code. A page may link to any file of the repository:
a Markdown file becomes a page of the site, another one is brought along as it is.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from csrm import schemas
from csrm.__main__ import GROUPS
from csrm.config import Settings

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?\[[^\]\n]*\]\()([^)\s#]+)")
"""A link or an image: the text before its target, and the target without its anchor."""
EXAMPLE = re.compile(r"(?:^|\n)>>> ")
TYPE_NAMES = {str: "text", bool: "true or false", dict: "map", tuple: "list", list: "list"}
OUTSIDE = "repository"
"""Folder of the site for files of the repository that are not under docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and every file outside docs/ that a page links to."""
    for name, text in (("api", api_page()), ("commands", commands_page()), ("tables", tables_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    pages = [file.src_uri for file in files.documentation_pages() if not file.src_uri.startswith("reference/")]
    while pages:
        page = pages.pop()
        for target in linked_files(page):
            place = site_place(target)
            if files.get_file_from_path(place) is None and (ROOT / target).is_file():
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
                if target.endswith(".md"):
                    pages.append(place)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the places of their files in the site."""
    here = PurePosixPath(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = repository_path(page.file.src_uri, match[2])
        if "://" in match[2] or files.get_file_from_path(site_place(target)) is None:
            return match[0]
        return match[1] + relpath(site_place(target), here.parent.as_posix())

    return markdown if page.file.src_uri.startswith("reference/") else LINK.sub(moved, markdown)


class Examples(griffe.Extension):
    """Makes a section of the example that ends a docstring, so that it is shown as code."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for everything that has a docstring."""
        if obj.docstring is None:
            return
        text = inspect.cleandoc(obj.docstring.value)
        if (start := EXAMPLE.search(text)) is not None:
            example = "\n".join(f"    {line}" for line in text[start.start() :].strip("\n").splitlines())
            obj.docstring.value = f"{text[: start.start()].rstrip()}\n\nExamples:\n{example}"


def linked_files(page: str) -> list[str]:
    """Paths in the repository that a page of the site links to."""
    text = (ROOT / repository_path(page, "")).read_text(encoding="utf-8")
    return [repository_path(page, target) for _, target in LINK.findall(text) if "://" not in target]


def repository_path(page: str, target: str) -> str:
    """Path in the repository of a page of the site, or of what it links to."""
    source = page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"docs/{page}"
    return normpath(f"{PurePosixPath(source).parent}/{target}") if target else source


def site_place(path: str) -> str:
    """Path in the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def api_page() -> str:
    """Every public name."""
    return "# Python API\n\n::: csrm\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"


def commands_page() -> str:
    """Every command with its help, its settings, and the file that holds them."""
    lines = [
        "# Commands and settings",
        "",
        "Each command reads one YAML file, and `--set key=value` overrides a setting. `csrm COMMAND --help` shows the",
        "command's other arguments.",
        "",
    ]
    for group, commands in GROUPS.items():
        lines += [f"## {group}", ""]
        for command, what in commands.items():
            lines += command_section(command, what)
    return "\n".join(lines)


def command_section(command: str, what: str) -> list[str]:
    """One command's part of the page."""
    name = command.replace("-", "_")
    lines = [f"### {command}", "", f"{what[0].upper()}{what[1:]}.", ""]
    file = ROOT / "conf" / f"{name}.yaml"
    if file.exists():
        lines += ["```yaml", f"# conf/{file.name}", file.read_text(encoding="utf-8").rstrip(), "```", ""]
    try:
        module = import_module(f"csrm.commands.{name}")
    except ModuleNotFoundError:
        return lines
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Settings) and value.__name__.endswith("Config"):
            rows = setting_rows(value)
            lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return lines


def setting_rows(settings: type[Settings], prefix: str = "") -> list[str]:
    """Rows of a table: each setting as `--set` names it, those of a group after the group."""
    rows = []
    for name, field in settings.model_fields.items():
        default = "" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        parts = (field.annotation, *get_args(field.annotation))
        groups = [part for part in parts if inspect.isclass(part) and issubclass(part, Settings)]
        cells = (f"`{prefix}{name}`", type_name(field.annotation), "" if groups else default, field.description or "")
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
        for group in groups:
            rows += setting_rows(group, f"{prefix}{name}.")
    return rows


def type_name(annotation: object) -> str:
    """A type as a reader of a configuration file knows it."""
    if annotation is NoneType:
        return "null"
    if inspect.isclass(annotation) and annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(type_name, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if arguments := [type_name(argument) for argument in get_args(annotation) if argument is not Ellipsis]:
        return f"{type_name(get_origin(annotation))} of {' to '.join(arguments)}"
    if inspect.isclass(annotation) and issubclass(annotation, Settings):
        return "group"
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)


def tables_page() -> str:
    """Every table that CSRM reads or writes, with its columns."""
    tables = [table for table in vars(schemas).values() if isinstance(table, schemas.Table)]
    outputs = {table.name for table in schemas.OUTPUTS}
    inputs = [table for table in tables if table.name not in outputs]
    lines = ["# Columns of every table", ""]
    for title, group in (("Tables that you bring", inputs), ("Tables that CSRM writes", schemas.OUTPUTS)):
        lines += [f"## {title}", ""]
        for table in group:
            lines += [f"### {table.name}", "", f"{table.comment}. Key: {', '.join(table.key) or 'none'}.", ""]
            lines += ["| column | type | required | meaning |", "| --- | --- | --- | --- |"]
            for column in table.columns:
                needed = "yes" if column.required else "no"
                lines.append(f"| {column.name} | {column.type} | {needed} | {column.comment} |")
            lines += ["", *(f"- `{name}`: `{condition}`" for name, condition in table.checks), ""]
    return "\n".join(lines)
