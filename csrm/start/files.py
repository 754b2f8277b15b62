"""The configuration files of a proposal: market.yaml, which all jobs share, and a short file for each job."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from csrm.artefacts.tracking import MODEL_SCHEME
from csrm.config import InputSpec, folder_of_tables, parse_yaml
from csrm.start.proposal import Proposal, base_model_setting

SHARED = "market.yaml"
_EXTENDS = f"extends: {SHARED}\n"
_PLAIN = {
    "build_retrieval_table": "The titles that augment each query.",
    "build_candidates": "The pairs to score.",
    "maintain": "Care for the tables after a night.",
    "migrate": "Brings tables of an older CSRM to the columns of this one.",
    "publish": "Publishes a rejected run after a review, or discards it.",
    "retire": "Takes a market out of the published table.",
    "rollback": "Brings a market back to what an earlier run published.",
    "score_catalog": "Scores the pairs whose prompt changed, and publishes; docs/nights.md explains the audit.",
}
"""Jobs that need nothing but what all share, each with what it does."""
_WITH_OUTPUT = {
    "explain": ("Why products have their scores for a query.", "explanations"),
    "report": ("The page about one scoring run.", "reports"),
}


def configuration(
    proposal: Proposal, folder: Path, recipes: Path, *, bundle: str, tables: str, base_model: str
) -> dict[str, str]:
    """Each file's name and its text.

    Args:
        proposal: what the tables are taken for.
        folder: where the files will be; what jobs write is beside them.
        recipes: folder of the configuration files that came with CSRM, where the recipes are.
        bundle: folder or URI of the bundle.
        tables: folder or URI of the tables that CSRM writes, or a schema with its folder.
        base_model: folder of the model to train, or of the reranker, or a GGUF file.

    Raises:
        ConfigError: a schema without its folder, where trainings and exports find tables that jobs wrote.
    """
    written = folder_of_tables(tables, "--tables").rstrip("/")
    shared = {
        "markets": proposal.markets,
        "inputs": {name: _spec(spec) for name, spec in proposal.inputs.items() if name != "candidates"},
        "tables": tables,
        "bundle": bundle,
        "device": "cpu",
    }
    head = (
        "# What all jobs of these markets share: each takes what it has a setting for. A job's own file goes first.\n"
    )
    files = {SHARED: head + _yaml(shared)}
    files |= {f"{job}.yaml": f"# {text}\n{_EXTENDS}" for job, text in _PLAIN.items()}
    for job, (text, output) in _WITH_OUTPUT.items():
        files[f"{job}.yaml"] = f"# {text}\n{_EXTENDS}" + _yaml({"output": _inside(folder, output)})
    if "candidates" in proposal.inputs:
        files["build_candidates.yaml"] += _yaml({"inputs": {"candidates": _spec(proposal.inputs["candidates"])}})
    recipe = proposal.recipe
    if recipe.judged:
        files["evaluate.yaml"] = _evaluate(proposal, folder)
        files["train.yaml"] = _train(proposal, folder, recipes, written=written, base_model=base_model)
        files["export_bundle.yaml"] = _export(proposal, folder, written=written, bundle=bundle)
    else:
        text = _export_reranker(proposal, folder, recipes, written=written, bundle=bundle, base_model=base_model)
        files["export_bundle.yaml"] = text
    if recipe.unjudged:
        values = {"markets": _markets(proposal, recipe.unjudged), "output": _inside(folder, "reports")}
        files["launch_report.yaml"] = f"# What markets without judgments lack, by their scores.\n{_EXTENDS}" + _yaml(
            values
        )
    return files


def _evaluate(proposal: Proposal, folder: Path) -> str:
    grades = proposal.grades
    assert grades is not None
    values = {
        "markets": _markets(proposal, proposal.recipe.judged),
        "output": _inside(folder, "evaluation"),
        "splits": ["test"] if "test" in proposal.splits else ["dev"] if "dev" in proposal.splits else [],
        "gains": dict(grades.gains),
        "relevant_grades": grades.relevant,
        "irrelevant_grades": grades.irrelevant,
    }
    return f"# Published scores against human grades of these splits.\n{_EXTENDS}" + _yaml(values)


def _train(proposal: Proposal, folder: Path, recipes: Path, *, written: str, base_model: str) -> str:
    """The recipe's settings, on tables that jobs have written.

    Rounds of distillation are left out: they cost much, and gave little.
    """
    recipe, grades = proposal.recipe, proposal.grades
    assert grades is not None
    settings: dict[str, Any] = parse_yaml((recipes / recipe.conf).read_text(encoding="utf-8"))
    titles = {"path": f"{written}/retrieval_table"}
    values: dict[str, Any] = {
        "markets": _markets(proposal, recipe.judged),
        "inputs": {"retrieval_table": titles},
        "base_model": base_model_setting(base_model),
    }
    if recipe.has_translation:
        spec = _spec(proposal.inputs["parallel_text"])
        values["translation"] = settings["translation"] | {"parallel_text": spec}
    if recipe.unjudged:
        queries = _spec(proposal.inputs["queries"])
        own = {"markets": proposal.markets, "queries": queries, "retrieval_table": titles}
        values["title_pairs"] = settings["title_pairs"] | own
    length = {} if "epochs" in settings["tuning"] else {"epochs": 1.0}
    tuning = {name: value for name, value in settings["tuning"].items() if name != "max_steps"}  # of other tables
    values["tuning"] = tuning | length | {"precision": "auto"}
    values["labels"] = [asdict(label) for label in grades.labels]
    if grades.grade_labels is not None:
        values["grade_labels"] = dict(grades.grade_labels)
    values |= {name: settings[name] for name in ("budgets", "pack_tokens") if name in settings}
    values["model_dir"] = _inside(folder, "model")
    return f"# Recipe {recipe.name}, of conf/{recipe.conf}; see docs/recipes.md.\n{_EXTENDS}" + _yaml(values)


def _export(proposal: Proposal, folder: Path, *, written: str, bundle: str) -> str:
    grades = proposal.grades
    assert grades is not None
    values: dict[str, Any] = {
        "markets": _markets(proposal, proposal.recipe.judged),
        "inputs": {"retrieval_table": {"path": f"{written}/retrieval_table"}},
        "model_dir": _inside(folder, "model"),
        "bundle_dir": _bundle_dir(folder, bundle),
    }
    if proposal.splits.get("dev"):
        values["vote"] = {"words": True}
    if grades.grade_labels is not None:
        values["grade_labels"] = dict(grades.grade_labels)
    return f"# The trained model to a bundle, after proof that it scores alike.\n{_EXTENDS}" + _yaml(values)


def _export_reranker(
    proposal: Proposal, folder: Path, recipes: Path, *, written: str, bundle: str, base_model: str
) -> str:
    """The recipe's text, whose template a person may have to change, with another base model."""
    recipe = proposal.recipe
    text = (recipes / recipe.conf).read_text(encoding="utf-8")
    section = text[text.index("reranker:\n") : text.index("bundle_dir:")].splitlines(keepends=True)
    base = f"  {_yaml({'base_model': base_model_setting(base_model)})}"
    reranker = "".join(base if line.startswith("  base_model:") else line for line in section)
    values = {
        "inputs": {"candidates": {"path": f"{written}/candidates"}},
        "bundle_dir": _bundle_dir(folder, bundle),
    }
    head = f"# Recipe {recipe.name}: Qwen3-Reranker as it is, of conf/{recipe.conf}; see docs/recipes.md.\n"
    return head + _EXTENDS + reranker + _yaml(values)


def _markets(proposal: Proposal, names: tuple[str, ...]) -> dict[str, str]:
    return {market: language for market, language in proposal.markets.items() if market in names}


def _bundle_dir(folder: Path, bundle: str) -> str:
    """Where an export writes, which needs a folder of this machine."""
    return _inside(folder, "bundle") if "://" in bundle or bundle.startswith(MODEL_SCHEME) else bundle


def _inside(folder: Path, name: str) -> str:
    return (folder / name).as_posix()


def _spec(spec: InputSpec) -> dict[str, Any]:
    """An input without what is the default."""
    values = {
        "path": spec.path,
        "format": spec.format,
        "columns": spec.columns,
        "market": spec.market,
        "options": spec.options,
    }
    return {name: value for name, value in values.items() if value and (name, value) != ("format", "delta")}


def _yaml(values: Mapping[str, Any]) -> str:
    """Values as YAML, each setting on a line of its own."""
    return "".join(
        yaml.safe_dump(
            {name: value},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None if isinstance(value, (dict, list)) else False,
            width=110,
        )
        for name, value in values.items()
    )
