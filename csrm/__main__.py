"""The command `csrm`, also `python -m csrm`: every command of csrm/commands by its name, with dashes."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import csrm
from csrm.cli import Main, run_job
from csrm.errors import ConfigError

GROUPS = {
    "Begin": {
        "init": "write the configuration of your tables into a folder, or copy the demo's",
        "demo": "two nights on three generated markets, from tables to a report",
        "jars": "put Delta's jars into the installed pyspark, once",
    },
    "Make input tables": {
        "generate-market": "tables of invented markets, whose relevance is known",
        "import-taxonomy": "tables of markets that are made of a product taxonomy",
        "import-esci": "tables of the public ESCI files",
    },
    "Build what scoring reads": {
        "build-retrieval-table": "the product titles that augment each query",
        "build-candidates": "the pairs to score",
        "embed-catalog": "vectors of titles and queries, of those that are new",
    },
    "Train and export": {
        "train": "train a language model to judge relevance",
        "train-on-spark": "the same on the executors of a Spark cluster",
        "export-bundle": "export a trained model to a bundle, after proof that it scores alike",
        "bundle": "show a bundle or an encoder, or verify it on this machine",
        "export-encoder": "export a text encoder, after proof that it gives the model's vectors",
        "demo-bundle": "train and export the tiny bundle that the demo scores with",
    },
    "Score every night": {
        "run": "the jobs of a night, one after the other: csrm run night --config FOLDER",
        "doctor": "check whether a night could run here, or on every executor",
        "capacity": "how long a night takes, what it needs, and what breaks first",
        "score-catalog": "score the pairs whose prompt changed, audit, and publish what changed",
        "report": "write the page about a run",
        "publish": "publish a run that its audit rejected, after a review, or discard it",
    },
    "Look after the scores": {
        "explain": "show why products have their scores for a query",
        "launch-report": "what a market that is to be opened lacks, by its published scores",
        "evaluate": "measure the published scores against human judgments, beside other scores",
        "compare": "compare two tables of scores, query by query, before one replaces the other",
        "rollback": "bring a market back to what an earlier run published",
        "retire": "take a market that is scored no more out of the published table",
        "maintain": "compact the tables, and delete old rows and files",
        "migrate": "bring tables of an older CSRM to this version's columns",
    },
}
"""Group to its commands, each with what it does, in the order of work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code (see csrm.cli.run_job)."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(csrm.__version__)
        return 0
    sys.argv[0] = f"csrm {name}"  # which argparse shows as the program's name
    return run_job(lambda words: _command(name)(words), rest)


def help_text() -> str:
    """All commands in their groups, one line each."""
    lines = ["usage: csrm COMMAND [ARGUMENTS]", "", "Search relevance for markets without labels.", ""]
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<22} {text}" for name, text in commands.items()), ""]
    return "\n".join([*lines, "csrm COMMAND --help shows the arguments of a command; csrm --version the version."])


def _command(name: str) -> Main:
    """Main function of a command.

    Raises:
        ConfigError: there is no such command; the message names those with a similar name.
    """
    names = [known for commands in GROUPS.values() for known in commands]
    if name not in names:
        similar = get_close_matches(name.replace("_", "-"), names, n=1)
        hint = f"Is it {similar[0]}?" if similar else "csrm --help lists them."
        raise ConfigError(f"csrm: there is no command {name!r}. {hint}")
    module = "csrm.spark.jars" if name == "jars" else f"csrm.commands.{name.replace('-', '_')}"
    main: Main = import_module(module).main
    return main


if __name__ == "__main__":
    sys.exit(main())
