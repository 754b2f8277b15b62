"""What each technique is worth on a market without labels: a grid of small trainings, from one command.

    python tests/benchmarks/cold_start/study.py --data FOLDER --base-model FOLDER

`--data` holds shopify_taxonomy, esci_us and chorus_icecat, `--base-model` is Gemma-3-270M: its GGUF file, or a folder
as save_pretrained leaves it, with its tokenizer.json. Prints the cells that are missing and their hours, then runs
them, `--workers` at a time, one thread each, for `--hours` at most: no cell starts that would not end in time. Each
leaves a small file in results/, which is kept in version control: a later start goes on with what is missing, and with
what changed in its recipe. At the end, or at once with `--report`, the tables and the plot of what is there are
written.

A cell is one run of jobs/train.py with conf/train_taxonomy.yaml and some techniques switched off. Rows with pruning
need cleanlab (pip install cleanlab).
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from legs import GENERATED, REAL_NOISE, Leg, ndcg, read_english, write_english, write_esci
from report import JOINT_ROWS, joint_english, joint_results, write_report

from csrm.artefacts.manifest import file_digest
from csrm.cli import setting_arguments
from csrm.scoring.scorer import PairScorer
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.model.base import BaseModel, load_language_model, load_tokenizer
from csrm.training.trained import trained_scorer

REPOSITORY = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "results"
CONFIG = "conf/train_taxonomy.yaml"
SEEDS = (0, 1, 2)
NOISE = 0.4
PAIRS_PER_QUERY = 8
FEW, ALL = 300, 775
"""Queries of market kr; the taxonomy gives no more."""
ESCI_QUERIES, ESCI_PAIRS_PER_QUERY = 96, 20
MINUTES = 13.0
"""One thread, a training on FEW queries and its measurement."""

OFF: Mapping[str, Mapping[str, Any]] = {
    "translation": {"translation": None},
    "titles": {"inputs.retrieval_table": None, "tuning.drop_all_titles": 1.0},
    "title pairs": {"title_pairs": None},
    "distillation": {"distillation": None},
}


def without(*techniques: str) -> dict[str, Any]:
    """Settings that switch techniques off."""
    return {key: value for technique in techniques for key, value in OFF[technique].items()}


def only(*techniques: str) -> dict[str, Any]:
    """Settings that switch all other techniques off."""
    return without(*(technique for technique in OFF if technique not in techniques))


SMOOTHING = {"tuning.label_smoothing": 0.2}
TARGET = "labels of the target"
ENGLISH = "English title pairs"
"""Those of the market that is measured in English, in place of those of the taxonomy."""
ROWS: Mapping[str, Mapping[str, Any]] = {
    "labels only": only(),
    **{f"+ {technique}": only(technique) for technique in OFF},
    **{f"all but {technique}": without(technique) for technique in reversed(OFF)},
    "all": {},
    "translated labels": {**only("translation"), "translation.switched_share": 1.0},
    "+ label smoothing": {**only(), **SMOOTHING},
    "+ pruning by cleanlab": only(),
    "+ titles and distillation": only("titles", "distillation"),
    "+ titles and label smoothing": {**only("titles"), **SMOOTHING},
    "+ titles and pruning by cleanlab": only("titles"),
    TARGET: only(),
    f"{TARGET} + titles": only("titles"),
    ENGLISH: {**without("distillation"), "title_pairs.markets": {"us": "en"}},
}
PRUNED = ("+ pruning by cleanlab", "+ titles and pruning by cleanlab")
AFTER = ("all", "+ distillation", "+ titles and distillation")
"""Rows whose round 0 is the first cell of their group."""
ScoresOf = Callable[[pd.DataFrame], np.ndarray]
"""Scores of pairs with their texts, shape (num_pairs,)."""
BASE_ROW, E5_ROW = "nothing learnt", "multilingual-e5-small"
"""Made by base.py and e5.py."""


@dataclass(frozen=True)
class Cell:
    """One training and its measurement."""

    leg: Leg
    row: str
    num_queries: int
    noise: float
    seed: int

    @property
    def name(self) -> str:
        row = re.sub(r"[^a-z]+", "-", self.row.lower()).strip("-")
        return f"{self.leg.name}.{self.num_queries}.noise-{self.noise:.0%}.{row}.{self.seed}".replace("%", "")

    @property
    def minutes(self) -> float:
        """Of one thread, as a rule, without what an earlier cell of its group has trained."""
        row = ROWS[self.row]
        share = 1.0 + 0.7 * ("title_pairs" not in row)
        trainings = 1 + ("distillation" not in row and self.row not in AFTER) + (self.row in PRUNED)
        trainings += "distillation" not in row and self.leg is REAL_NOISE  # a half for each of two folds
        return MINUTES * trainings * share * (1.3 if self.leg is REAL_NOISE else self.num_queries / FEW)


def grid() -> Iterator[list[Cell]]:
    """Cells in groups; the later ones of a group use what the first one trained."""
    for seed in SEEDS:
        for rows in (
            ("all but distillation", "all"),
            ("labels only", "+ distillation"),
            ("+ title pairs",),
            ("+ titles",),
            ("+ translation",),
            (f"{TARGET} + titles",),
            (TARGET,),
        ):
            yield [Cell(GENERATED, row, FEW, 0.0, seed) for row in rows]
        for rows in (
            ("all but distillation", "all"),
            ("+ titles", "+ titles and distillation"),
            ("+ titles and label smoothing",),
            ("+ titles and pruning by cleanlab",),
            ("labels only",),
        ):
            yield [Cell(GENERATED, row, FEW, NOISE, seed) for row in rows]
    for seed in SEEDS:
        for row in ("all but title pairs", "all but titles", "all but translation", "translated labels"):
            yield [Cell(GENERATED, row, FEW, 0.0, seed)]
        yield [Cell(REAL_NOISE, "labels only", ESCI_QUERIES, 0.0, seed)]
        yield [Cell(REAL_NOISE, row, ESCI_QUERIES, NOISE, seed) for row in ("labels only", "+ distillation")]
        for row in ("+ label smoothing", "+ pruning by cleanlab"):
            yield [Cell(REAL_NOISE, row, ESCI_QUERIES, NOISE, seed)]
    for row in ("labels only", "+ translation"):
        yield [Cell(GENERATED, row, ALL, 0.0, SEEDS[0])]
    yield [Cell(GENERATED, row, ALL, 0.0, SEEDS[0]) for row in ("all but distillation", "all")]
    yield [Cell(GENERATED, ENGLISH, ALL, 0.0, SEEDS[0])]


class Study:
    """The grid in a work folder."""

    def __init__(self, data: Path, base_model: Path, work: Path) -> None:
        self.data, self.base_model, self.work = data, base_model, work
        is_gguf = base_model.is_file()
        self.weights = [base_model] if is_gguf else list(base_model.glob("*.safetensors"))
        self.base_model_folder = work / f"base_model-{file_digest(base_model)[:12]}" if is_gguf else base_model

    def prepare(self) -> None:
        """Tables of the legs, unless they are there."""
        inputs = self.inputs(GENERATED)
        if not (inputs / "judgments.parquet").exists():
            settings = setting_arguments(taxonomy=self.data / "shopify_taxonomy", output=inputs)
            run(["jobs/import_taxonomy.py", *settings], self.work / "import.log")
        if not (self.titles(GENERATED)).exists():
            texts = {name: parquet(inputs / f"{name}.parquet") for name in ("catalog", "queries")}
            markets = {**GENERATED.learnt, **GENERATED.measured}
            settings = setting_arguments(markets=markets, inputs=texts, tables=inputs.parent / "tables", num_titles=3)
            run(["jobs/build_retrieval_table.py", *settings], self.work / "retrieval.log")
        learnt_queries = self.learnt_queries(inputs)
        if not learnt_queries.exists():
            judged = pd.read_parquet(inputs / "judgments.parquet").drop_duplicates(["market", "query_id"])
            queries = pd.read_parquet(inputs / "queries.parquet")
            train = judged.loc[judged["split"] == "train", ["market", "query_id"]]
            queries.merge(train).to_parquet(learnt_queries)
        if not (self.inputs(REAL_NOISE) / "judgments.parquet").exists():
            write_esci(self.data / "esci_us", self.inputs(REAL_NOISE))
        if not (self.english_market / "retrieval_table.parquet").exists():
            write_english(self.data, self.english_market)

    def inputs(self, leg: Leg) -> Path:
        return self.work / leg.name / "inputs"

    def learnt_queries(self, inputs: Path) -> Path:
        """The queries of split train: only their titles are learnt."""
        return inputs / "train_queries.parquet"

    def titles(self, leg: Leg) -> Path:
        return self.work / leg.name / "tables" / "retrieval_table"

    @property
    def english_market(self) -> Path:
        return self.work / "english"

    def folder(self, cell: Cell) -> Path:
        return self.work / "cells" / cell.name

    def recipe(self, cell: Cell) -> str:
        """Digest of all that a cell's result follows from, but for the code."""
        files = [REPOSITORY / CONFIG, *self.inputs(cell.leg).glob("*.parquet"), *self.weights]
        parts = [json.dumps([ROWS[cell.row], cell.leg.settings]), *sorted(map(file_digest, files))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def has_ended(self, cell: Cell) -> bool:
        path = RESULTS / f"{cell.name}.json"
        return path.exists() and json.loads(path.read_text(encoding="utf-8"))["recipe"] == self.recipe(cell)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Settings of jobs/train.py."""
        row, inputs, folder = ROWS[cell.row], self.inputs(cell.leg), self.folder(cell)
        tables = {name: parquet(inputs / f"{name}.parquet") for name in ("catalog", "queries")}
        tables["judgments"] = parquet(folder / "judgments.parquet")
        if "inputs.retrieval_table" not in row:
            tables["retrieval_table"] = {"path": str(self.titles(cell.leg))}
        parallel = {
            "translation.parallel_text": parquet(inputs / "parallel_text.parquet"),
            "translation.num_held_out": 20,
        }
        title_pairs = {
            "title_pairs.queries": parquet(self.learnt_queries(inputs)),
            "title_pairs.retrieval_table": {"path": str(self.titles(cell.leg))},
        }
        if cell.row == ENGLISH:
            title_pairs = {
                f"title_pairs.{name}": parquet(self.english_market / f"{name}.parquet")
                for name in ("queries", "retrieval_table")
            }
        is_without_dev = {"distillation.choose_by": "agreement", "distillation.num_folds": 2}
        distillation = is_without_dev if cell.leg is REAL_NOISE else {}
        return {
            "markets": cell.leg.measured if cell.row.startswith(TARGET) else cell.leg.learnt,
            "inputs": tables,
            "base_model": {"folder": str(self.base_model_folder)},
            "tuning.seed": cell.seed,
            "model_dir": str(folder / "model"),
            **(parallel if "translation" not in row else {}),
            **(title_pairs if "title_pairs" not in row else {}),
            **(distillation if "distillation" not in row else {}),
            **cell.leg.settings,
            **{key: value for key, value in row.items() if not key.startswith("inputs.")},
        }

    def run_cell(self, cell: Cell, first: Cell) -> None:
        """Train, measure, and leave the result.

        Args:
            first: the first cell of the group.
        """
        folder, stages = self.folder(cell), self.folder(cell) / "model.stages"
        folder.mkdir(parents=True, exist_ok=True)
        judgments = self.judgments(cell)
        if cell.row in PRUNED:
            judgments = self.pruned(cell, judgments)
        judgments.to_parquet(folder / "judgments.parquet")
        translation = self.work / "translation" / f"{cell.leg.name}-{cell.seed}"
        found = {"translation": translation} | ({} if first is cell else {"round-0": self.folder(first) / "model"})
        for place, trained_before in found.items():
            if trained_before.exists():
                shutil.copytree(trained_before, stages / place, dirs_exist_ok=True)  # not trained again
        started = time.monotonic()
        command = ["jobs/train.py", "--config", CONFIG, *setting_arguments(**self.settings(cell))]
        run(command, folder / "train.log")
        trained = time.monotonic()
        if (stages / "translation").exists() and not same_manifest(stages / "translation", translation):
            shutil.rmtree(translation, ignore_errors=True)
            shutil.copytree(stages / "translation", partial := translation.with_name(f"{cell.name}.partial"))
            partial.rename(translation)
        scores_of = scores_with(trained_scorer(folder / "model", "bf16"))
        has_titles = "inputs.retrieval_table" not in ROWS[cell.row]
        rounds = json.loads(path.read_text(encoding="utf-8")) if (path := stages / "rounds.json").exists() else []
        result = {
            "leg": cell.leg.name,
            "row": cell.row,
            "num_queries": cell.num_queries,
            "noise": cell.noise,
            "seed": cell.seed,
            "recipe": self.recipe(cell),
            "training_seconds": round(trained - started),
            "scores": [round(float(score), 4) for score in scores_of(self.measured(cell))],
            **(self.english(scores_of, has_titles) if cell.num_queries == ALL else {"english": None}),
            "rounds": [
                {name: one[name] for name in ("dev_auc", "dev_ndcg", "doubts", "flips", "calibration")}
                for one in rounds
            ],
        }
        write(RESULTS / f"{cell.name}.json", json.dumps(result))

    def judgments(self, cell: Cell) -> pd.DataFrame:
        """A sample of the judged training pairs with wrong labels, and split dev."""
        (market,) = cell.leg.measured if cell.row.startswith(TARGET) else cell.leg.learnt
        judged = pd.read_parquet(self.inputs(cell.leg) / "judgments.parquet")
        judged = judged[judged["market"] == market]
        train = judged[judged["split"] == "train"]
        order = {id_: hashlib.md5(f"{cell.seed} {id_}".encode()).digest() for id_ in train["query_id"].unique()}
        train = train[train["query_id"].isin(sorted(order, key=order.__getitem__)[: cell.num_queries])]
        num_pairs = ESCI_PAIRS_PER_QUERY if cell.leg is REAL_NOISE else PAIRS_PER_QUERY
        train = train.sample(frac=1, random_state=cell.seed).groupby("query_id").head(num_pairs)
        wrong = np.random.default_rng(cell.seed).random(len(train)) < cell.noise
        noisy = train["grade"].mask(wrong, train["grade"].map({"yes": "no", "no": "yes"}))
        return pd.concat([train.assign(grade=noisy, true_grade=train["grade"]), judged[judged["split"] == "dev"]])

    def pruned(self, cell: Cell, judgments: pd.DataFrame) -> pd.DataFrame:
        """Judgments without the labels that cleanlab finds wrong by models of the other half of the queries."""
        from cleanlab.filter import find_label_issues

        train, dev = (judgments[judgments["split"] == split] for split in ("train", "dev"))
        is_second = train["query_id"].isin(train["query_id"].unique()[1::2])
        probabilities = pd.Series(index=train.index, dtype=float)
        for number, is_learnt in enumerate((is_second, ~is_second)):
            folder = self.folder(cell) / f"half-{number}"
            folder.mkdir(exist_ok=True)
            pd.concat([train[is_learnt], dev]).to_parquet(folder / "judgments.parquet")
            settings = self.settings(cell) | {"model_dir": str(folder / "model")}
            settings["inputs"] = {**settings["inputs"], "judgments": parquet(folder / "judgments.parquet")}
            run(["jobs/train.py", "--config", CONFIG, *setting_arguments(**settings)], folder / "train.log")
            train[~is_learnt].to_parquet(folder / "others.parquet")
            inputs = {**settings["inputs"], "judgments": parquet(folder / "others.parquet")}
            with JudgedPairs(JudgedInputs.model_validate(inputs), settings["markets"]) as pairs:
                others = pairs.read("train")
            scores = scores_with(trained_scorer(folder / "model", "bf16"))(others)
            keyed = pd.Series(scores, index=pd.MultiIndex.from_frame(others[["query_id", "product_id"]]))
            keys = pd.MultiIndex.from_frame(train.loc[~is_learnt, ["query_id", "product_id"]])
            probabilities[~is_learnt] = keyed.loc[keys].to_numpy()
        given = (train["grade"] == "yes").to_numpy().astype(int)
        issues = find_label_issues(given, np.stack([1 - probabilities, probabilities], axis=1))
        return pd.concat([train[~issues], dev])

    def measured(self, cell: Cell) -> pd.DataFrame:
        """The test pairs with their texts, as the cell's model sees them."""
        tables = {
            name: parquet(self.inputs(cell.leg) / f"{name}.parquet") for name in ("catalog", "queries", "judgments")
        }
        titles = {"retrieval_table": {"path": str(self.titles(cell.leg))}}
        inputs = JudgedInputs.model_validate(
            tables | (titles if "inputs.retrieval_table" not in ROWS[cell.row] else {})
        )
        with JudgedPairs(inputs, cell.leg.measured) as pairs:
            tested = pairs.read("test")
        catalog = pd.read_parquet(tables["catalog"]["path"], columns=["market", "product_id", "language"])
        return tested.merge(catalog.rename(columns={"language": "title_language"}), on=["market", "product_id"])

    def english(self, scores_of: ScoresOf, has_titles: bool) -> dict[str, dict[str, list[float]]]:
        """Of the English data sets: nDCG@10 of each query in the order of their ids, and the score of each pair."""
        judged = read_english(self.data, has_titles)
        scores = {name: scores_of(pairs) for name, pairs in judged.items()}
        return {
            "english": {name: ndcg(judged[name], of_pairs) for name, of_pairs in scores.items()},
            "english_scores": {name: of_pairs.round(4).tolist() for name, of_pairs in scores.items()},
        }

    def converted_base_model(self) -> Path:
        """The base model as a folder: a GGUF file is converted once."""
        if not self.base_model_folder.exists():
            write_folder(self.base_model, self.base_model_folder)
        return self.base_model_folder


def scores_with(scorer: PairScorer) -> ScoresOf:
    """The scorer's relevance scores."""
    return lambda pairs: scorer.score(pairs)["relevance_score"].to_numpy()


def measure_untrained(study: Study, row: str, scores_of: ScoresOf) -> None:
    """Leave the result of what learnt nothing, as a row of the study."""
    study.prepare()
    pairs = study.measured(Cell(GENERATED, "labels only", FEW, 0.0, 0))
    english = study.english(scores_of, has_titles=False)
    result = {
        "leg": GENERATED.name,
        "row": row,
        "num_queries": 0,
        "noise": 0.0,
        "seed": 0,
        "recipe": "none",
        "training_seconds": 0,
        "scores": [round(float(score), 4) for score in scores_of(pairs)],
        **english,
        "rounds": None,
    }
    write(RESULTS / f"{GENERATED.name}.{row.replace(' ', '-')}.json", json.dumps(result))
    print({name: round(float(np.mean(values)), 3) for name, values in english["english"].items()})


def write_folder(gguf: Path, folder: Path) -> None:
    """A GGUF file as a folder with the same weights, which is read in a second instead of a minute."""
    base_model = BaseModel(folder=str(gguf.parent), gguf_file=gguf.name)
    partial = folder.with_name(folder.name + ".partial")
    load_language_model(base_model).save_pretrained(partial)
    load_tokenizer(base_model).save(str(partial / "tokenizer.json"))
    partial.rename(folder)


def same_manifest(*folders: Path) -> bool:
    """Whether folders hold the same trained model."""
    manifests = [folder / "manifest.json" for folder in folders]
    return all(path.exists() for path in manifests) and len({path.read_bytes() for path in manifests}) == 1


def parquet(path: Path) -> dict[str, str]:
    """An input of a job."""
    return {"path": str(path), "format": "parquet"}


def run(command: Sequence[str], log: Path) -> None:
    """Run a script of the repository; its output goes to a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(
            [sys.executable, *command], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    if ended.returncode:
        raise SystemExit(f"{command[0]} ended with {ended.returncode}: see {log}")


def write(path: Path, text: str) -> None:
    """Write a file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def run_grid(study: Study, chosen: str, workers: int, hours: float, only_list: bool) -> None:
    """Run the cells that are missing, as many as end in time."""
    missing = [
        (group[0], [cell for cell in group if re.search(chosen, cell.name) and not study.has_ended(cell)])
        for group in grid()
    ]
    for _, cells in missing:
        for cell in cells:
            print(f"{cell.name}: {cell.minutes:.0f} minutes")
    total = sum(cell.minutes for _, cells in missing for cell in cells)
    print(f"{sum(len(cells) for _, cells in missing)} cells, {total / 60:.1f} hours of one thread", flush=True)
    if only_list:
        return
    study.converted_base_model()
    deadline = time.monotonic() + 3600 * hours

    def run_group(first: Cell, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if study.has_ended(cell) or time.monotonic() + 60 * cell.minutes > deadline:
                continue
            started = time.monotonic()
            arguments = ["--data", study.data, "--base-model", study.base_model, "--work", study.work]
            log = study.work / "cells" / f"{cell.name}.log"
            run([__file__, *map(str, arguments), "--one", cell.name, first.name], log)
            print(f"{cell.name}: {(time.monotonic() - started) / 60:.0f} minutes", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for ended in [pool.submit(run_group, first, cells) for first, cells in missing]:
            ended.result()


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """What every script of the study asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--base-model", type=Path, required=True, help="GGUF file, or folder with model.safetensors")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "cold_start_study", help="work folder")
    return parser


def study_of(args: argparse.Namespace) -> Study:
    """The study that the arguments of study_parser name."""
    return Study(args.data.resolve(), args.base_model.resolve(), args.work.resolve())


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--hours", type=float, default=14.0, help="most hours to run")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time")
    parser.add_argument("--cells", default="", help="only those whose name this regular expression finds")
    parser.add_argument("--list", action="store_true", help="print the missing cells and stop")
    parser.add_argument("--report", action="store_true", help="write the report of what is there and stop")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    study = study_of(args)
    if args.one:
        cells = {cell.name: cell for group in grid() for cell in group}
        study.run_cell(*(cells[name] for name in args.one))
        return
    study.prepare()
    if not args.report:
        run_grid(study, args.cells, args.workers, args.hours, args.list)
    if not args.list:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
        measured = {
            leg.name: (leg, study.measured(Cell(leg, "labels only", FEW, 0.0, 0))) for leg in (GENERATED, REAL_NOISE)
        }
        english = joint_english(results, E5_ROW, read_english(study.data, has_titles=False))
        rows = [BASE_ROW, E5_ROW, *ROWS, *JOINT_ROWS]
        write_report([*results, *joint_results(results, E5_ROW)], measured, rows, english, E5_ROW)


if __name__ == "__main__":
    main()
