"""Write the configuration of your own tables into a folder, or copy the configuration files of the demo there.

    csrm init my_market --catalog catalog.parquet --queries queries --judgments judgments
    csrm init conf

With tables, the folder gets market.yaml, which all jobs share, and a short file for each job. Columns, languages,
grades and a recipe are proposed; what cannot be told is asked. Without tables, the folder gets the settings of every
command on the demo's tables, those of clusters in deploy, and the demo's bundle.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import csrm
from csrm.errors import ConfigError
from csrm.start.files import configuration
from csrm.start.proposal import Given, propose
from csrm.start.summary import format_proposal

DEFAULT_FOLDER = Path("conf")
"""Where commands look for their configuration file, from the working directory."""

_DEMO_BUNDLE = "demo_bundle"
_TABLES = {
    "catalog": "products of each market",
    "queries": "search queries of each market",
    "judgments": "human relevance labels, of some markets",
    "behaviour": "clicks or purchases",
    "candidates": "pairs that are scored in any case",
    "parallel-text": "translations between the markets' languages",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new or empty; commands look into one named conf by themselves")
    for name, text in _TABLES.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=f"{text}: a Delta table, or Parquet, CSV or JSON files")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="TABLE.NAME=THERE",
        help="name of a column there; null where no column stands for it",
    )
    parser.add_argument(
        "--language", action="append", default=[], metavar="MARKET=CODE", help="language of a market, BCP 47"
    )
    parser.add_argument("--grades", default="", metavar="GRADE=GAIN,...", help="gain of each grade, 0 to 1")
    parser.add_argument(
        "--base-model",
        metavar="PATH",
        help="model to train, or reranker: folder or GGUF file; default: FOLDER/base_model",
    )
    parser.add_argument(
        "--bundle", metavar="PATH", help="bundle to score with; default: FOLDER/bundle, which export-bundle writes"
    )
    parser.add_argument(
        "--tables",
        metavar="PATH",
        help="folder or URI for the tables that CSRM writes, or schema:NAME?folder=URI; default: FOLDER/tables",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    folder: Path = args.folder
    paths = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _TABLES}
    given = {name: path for name, path in paths.items() if path is not None}
    if given:
        _init_market(args, given)
        return 0
    if args.column or args.language or args.grades or args.base_model or args.bundle or args.tables:
        raise ConfigError("csrm init: expected --catalog and --queries beside other options, which say more of them.")
    copy_configuration(shipped_configuration(), folder)
    print(f"wrote {folder}: the settings of each command, deploy/ for clusters, {_DEMO_BUNDLE}/ to try them with\n")
    if folder == DEFAULT_FOLDER:
        print("next:")
        print("  csrm jars      once: Delta's jars for Spark")
        print("  csrm doctor    whether a night could run here")
        print("  csrm demo      two nights on generated markets, in build/demo")
        print(f"then edit {folder / 'score_catalog.yaml'}: its markets, inputs and tables. csrm --help shows the way.")
    else:
        print(f"next: edit them, and name them: csrm score-catalog --config {folder / 'score_catalog.yaml'}")
    return 0


def _init_market(args: argparse.Namespace, paths: Mapping[str, str]) -> None:
    """Propose a configuration for tables, and write it."""
    folder: Path = args.folder
    if missing := [name for name in ("catalog", "queries") if name not in paths]:
        raise ConfigError(
            f"csrm init: expected --catalog and --queries, without which no job runs; {missing} is missing."
        )
    _require_empty(folder)
    columns: dict[str, dict[str, str]] = {}
    for name, there in _pairs("--column", args.column, "catalog.title=name").items():
        table, _, column = name.partition(".")
        columns.setdefault(table, {})[column] = there
    given = Given(paths, columns, _pairs("--language", args.language, "tw=zh-TW"), _gains(args.grades))
    if given.gains and "judgments" not in paths:
        raise ConfigError("--grades: expected --judgments PATH beside it, whose grades it explains.")
    proposal = propose(given)
    files = configuration(
        proposal,
        folder,
        shipped_configuration(),
        bundle=args.bundle or (folder / "bundle").as_posix(),
        tables=args.tables or (folder / "tables").as_posix(),
        base_model=args.base_model or (folder / "base_model").as_posix(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"csrm init: {str(folder)!r} cannot be written: {error}. Name another folder.") from error
    print(format_proposal(proposal, folder, has_bundle=args.bundle is not None))


def _pairs(option: str, words: Sequence[str], example: str) -> dict[str, str]:
    """`a=b` words as a mapping.

    Raises:
        ConfigError: a word is no such pair.
    """
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {word!r}: expected a pair such as {example}.")
        pairs[name] = value
    return pairs


def _gains(text: str) -> dict[str, float]:
    pairs = _pairs("--grades", [part.strip() for part in text.split(",") if part.strip()], "good=1,bad=0")
    try:
        return {grade: float(gain) for grade, gain in pairs.items()}
    except ValueError as error:
        raise ConfigError(f"--grades {text!r}: expected numbers from 0 to 1, such as good=1,bad=0.") from error


def _require_empty(folder: Path) -> None:
    """Nothing is ever overwritten.

    Raises:
        ConfigError: the folder holds something already, or is a file.
    """
    try:
        held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ConfigError(f"csrm init: {str(folder)!r} cannot be written: {error}. Name another folder.") from error
    if held:
        raise ConfigError(
            f"csrm init: expected a new or empty folder, got {str(folder)!r} with {', '.join(held[:3])}"
            f"{', ...' if len(held) > 3 else ''}. Name another folder: nothing is ever overwritten."
        )


def shipped_configuration() -> Path:
    """Folder of the configuration files that came with CSRM: in an installed package, or in a checkout beside it.

    Raises:
        ConfigError: they are not there, as where only the code was copied.
    """
    package = Path(csrm.__path__[0])
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / _DEMO_BUNDLE).is_dir():
            return folder
    raise ConfigError(
        f"csrm init: expected the configuration files in {str(package / 'conf')!r}, found none. Install CSRM as a "
        "wheel, or copy conf/ from its repository."
    )


def copy_configuration(source: Path, folder: Path) -> None:
    """Copy the files. Settings that name the demo's bundle name it in the new folder.

    Raises:
        ConfigError: the folder holds something already, or cannot be written.
    """
    try:
        _require_empty(folder)
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for path in folder.glob("*.yaml"):
            text = path.read_text(encoding="utf-8")
            moved = text.replace(f" conf/{_DEMO_BUNDLE}", f" {(folder / _DEMO_BUNDLE).as_posix()}")
            path.write_text(moved, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"csrm init: {str(folder)!r} cannot be written: {error}. Name another folder.") from error
