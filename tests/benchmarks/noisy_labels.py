"""What wrong labels cost a model that has learnt its market, and what each way to bear them gives back.

    pip install cleanlab        # only this benchmark needs it
    OMP_NUM_THREADS=1 python tests/benchmarks/noisy_labels.py --noises 0 0.4 --seeds 7 8 9
    OMP_NUM_THREADS=1 python tests/benchmarks/noisy_labels.py --ways "right labels" "wrong labels" distillation

Generated markets, one a seed, whose labels of split train are wrong with a probability of --noises, and a tiny model
from random weights that jobs/train.py trains in several passes, as conf/train.yaml does but for the other markets. Dev
and test are right: dev chooses the round or the step, test measures. Each way learns from the same labels with the same
tuning:

    right labels                what there is to lose
    wrong labels                nothing is done
    best step                   the step of the training that is best on dev (tuning.eval_steps)
    label smoothing             of 0.2
    distillation                the model of the round before is the teacher (num_folds 1)
    distillation, more queries  and it judges pairs of --unlabelled queries that nobody judged
    distillation, 2 folds       teachers did not see what they judge (num_folds 2)
    pruning                     labels that cleanlab's find_label_issues finds, by the same teachers, are left out

A way that has ended is not run again, so the command may be stopped and repeated. Intervals are 95% percentile
bootstrap intervals over the test queries of all seeds, of the difference to wrong labels.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from sklearn.metrics import ndcg_score
from speed_report import markdown

from csrm.cli import setting_arguments
from csrm.commands import generate_market, train
from csrm.evaluation.metrics import resample_weights
from csrm.scoring.labels import ESCI_LABELS
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.distillation.label_quality import resampled_auc
from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model
from csrm.training.trained import trained_scorer

REPOSITORY = Path(__file__).parents[2]
MARKETS = {"us": "en"}
NUM_RESAMPLES = 2_000
SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}
"""Of the judged queries."""
GAINS = {label.name: label.gain for label in ESCI_LABELS}
RIGHT, PLAIN, PRUNED, FOLDS = "right labels", "wrong labels", "pruning", "distillation, 2 folds"
PAIRS_PER_QUERY = 8
"""Of the queries that nobody judged."""


class Market:
    """The tables of one seed and noise, and the trainings on them."""

    def __init__(self, work: Path, noise: float, seed: int, args: argparse.Namespace) -> None:
        self.work, self.seed, self.args = work, seed, args
        sizes = {"queries_per_market": args.queries + args.unlabelled, "products_per_market": args.products}
        made = {"seed": seed, "label_noise": noise, "output": work / "inputs"}
        generate_market.main(setting_arguments(markets=MARKETS, **sizes, **made))
        judged = pd.read_parquet(work / "inputs" / "judgments.parquet")
        queries = np.random.default_rng(seed).permutation(judged["query_id"].unique())
        bounds = (np.cumsum(list(SHARES.values())) * (len(queries) - args.unlabelled)).round().astype(int)
        parts = zip((*SHARES, "unlabelled"), np.split(queries, bounds), strict=True)
        judged["split"] = judged["query_id"].map({id_: name for name, ids in parts for id_ in ids})
        unlabelled = judged[judged["split"] == "unlabelled"]
        unlabelled[["market", "query_id", "product_id"]].to_parquet(work / "candidates.parquet")
        judged = judged[judged["split"] != "unlabelled"]
        self.noisy = judged.assign(grade=judged["grade"].where(judged["split"] == "train", judged["true_grade"]))
        self.noisy.to_parquet(work / "judgments.parquet")
        with JudgedPairs(JudgedInputs.model_validate(self.inputs(judgments="judgments")), MARKETS) as pairs:
            self.tested = pairs.read("test")
        texts = [pd.read_parquet(work / "inputs" / f"{name}.parquet") for name in ("catalog", "queries")]
        tokenizer = train_byte_tokenizer([*texts[0]["title"].dropna(), *texts[1]["query"].dropna()], 2000)
        self.base_model = str(write_tiny_base_model(work / "base_model", tokenizer))

    def ways(self) -> dict[str, Mapping[str, Any]]:
        """Settings of jobs/train.py that differ."""
        distillation = {"rounds": self.args.rounds, "teacher_share": self.args.teacher_share}
        unlabelled = {
            "markets": MARKETS,
            "inputs": self.inputs(candidates="candidates"),
            "pairs_per_query": PAIRS_PER_QUERY,
            "weight": 1.0,
        }
        return {
            RIGHT: {},
            PLAIN: {},
            "best step": {"tuning.eval_steps": self.args.eval_steps},
            "label smoothing": {"tuning.label_smoothing": 0.2},
            "distillation": {"distillation": {**distillation, "num_folds": 1}},
            "distillation, more queries": {"distillation": {**distillation, "num_folds": 1, "unlabelled": unlabelled}},
            FOLDS: {"distillation": {**distillation, "num_folds": 2}},
            PRUNED: {},
        }

    def scores(self, way: str) -> np.ndarray:
        """Scores of the test pairs by a model that was trained this way; of one that has ended, as they were."""
        path = self.work / f"{way.replace(', ', ' ').replace(' ', '-')}.npy"
        if not path.exists():
            if way == RIGHT:
                judged = self.noisy.assign(grade=self.noisy["true_grade"])
            else:
                judged = self.pruned() if way == PRUNED else self.noisy
            np.save(path, self.train(path.with_suffix(""), judged, self.ways()[way]))
        found: np.ndarray = np.load(path)
        return found

    def train(self, folder: Path, judged: pd.DataFrame, changes: Mapping[str, Any]) -> np.ndarray:
        """Scores of the test pairs by a model that was trained with these settings."""
        plain = self.work / PLAIN.replace(" ", "-")
        if "distillation" in changes and plain.exists():
            shutil.copytree(plain, folder.with_suffix(".stages") / "round-0", dirs_exist_ok=True)  # not trained again
        judged.to_parquet(folder.with_suffix(".parquet"))
        tuning = {"method": "full", "learning_rate": 3e-3, "epochs": self.args.epochs, "random_negatives": 0.5}
        settings = {
            "markets": MARKETS,
            "inputs": self.inputs(judgments=folder.name),
            "base_model": {"folder": self.base_model},
            "translation": None,
            "title_pairs": None,
            "distillation": None,
            "tuning": {**tuning, "seed": self.seed, "eval_steps": 0},
            "model_dir": folder,
        }
        arguments = ["--config", str(REPOSITORY / "conf" / "train.yaml"), *setting_arguments(**{**settings, **changes})]
        if train.main(arguments):
            raise SystemExit(f"{folder.name}: the training failed")
        return trained_scorer(folder, "fp32").score(self.tested)["relevance_score"].to_numpy()

    def inputs(self, **tables: str) -> dict[str, Any]:
        """Inputs of a job: the texts, and tables of this benchmark by their names."""
        paths = {name: self.work / "inputs" / f"{name}.parquet" for name in ("catalog", "queries")}
        paths |= {name: self.work / f"{file}.parquet" for name, file in tables.items()}
        return {name: {"path": str(path), "format": "parquet"} for name, path in paths.items()}

    def pruned(self) -> pd.DataFrame:
        """The labels without those that cleanlab doubts, by the teachers of the run with two folds."""
        self.scores(FOLDS)
        soft = pd.read_parquet(self.work / "distillation-2-folds.stages" / "round-1-soft_labels.parquet")
        given, teacher = (np.stack(soft[name].tolist()) for name in ("given", "teacher"))
        issues = soft[find_label_issues(given.argmax(axis=1), teacher / teacher.sum(axis=1, keepdims=True))]
        key = ["market", "query_id", "product_id"]
        marked = self.noisy.merge(issues[key].assign(is_issue=True), on=key, how="left")
        return self.noisy[marked["is_issue"].isna().to_numpy()]


def report(tested: pd.DataFrame, scores: Mapping[str, np.ndarray]) -> str:
    """One row for each way: nDCG@10 and ROC-AUC of E, and what they are above doing nothing."""
    ndcgs = {name: query_ndcgs(tested, each) for name, each in scores.items()}
    weights = resample_weights(tested["query_id"].nunique(), NUM_RESAMPLES, seed=0)
    weights = np.vstack([np.ones_like(weights[:1]), weights])
    relevant, queries = (tested["grade"] == "E").to_numpy(), tested["query_id"].to_numpy()
    aucs = {name: resampled_auc(each, relevant, queries, NUM_RESAMPLES) for name, each in scores.items()}
    rows = []
    for name in scores:
        defined = np.isfinite(ndcgs[name])
        drawn = weights[:, defined]
        ndcg, plain = (drawn @ ndcgs[each][defined] / drawn.sum(axis=1) for each in (name, PLAIN))
        rows.append(
            {
                "learnt": name,
                "nDCG@10": f"{ndcg[0]:.3f}",
                "ROC-AUC": f"{aucs[name][0]:.3f}",
                "nDCG@10 gained": "" if name == PLAIN else gained(ndcg - plain),
                "ROC-AUC gained": "" if name == PLAIN else gained(aucs[name] - aucs[PLAIN]),
            }
        )
    return markdown(rows)


def query_ndcgs(tested: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """nDCG@10 of each query, in the order of their ids; NaN where no product has a gain."""
    queries = tested.assign(gain=tested["grade"].map(GAINS), score=scores).groupby("query_id")
    return np.array(
        [ndcg_score([rows["gain"]], [rows["score"]], k=10) if rows["gain"].max() > 0 else np.nan for _, rows in queries]
    )


def gained(differences: np.ndarray) -> str:
    low, high = np.percentile(differences[1:], [2.5, 97.5])
    return f"{differences[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=float, nargs="+", default=[0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--ways", nargs="+", default=[], help="all, where none is named")
    parser.add_argument("--queries", type=int, default=1_250)
    parser.add_argument("--unlabelled", type=int, default=2_000, help="queries that nobody judged")
    parser.add_argument("--products", type=int, default=2_000)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--eval-steps", type=int, default=100)
    parser.add_argument("--teacher-share", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "noisy_labels", help="work folder")
    args = parser.parse_args()
    for noise in args.noises:
        markets = [Market(args.work.resolve() / f"{noise:g}-{seed}", noise, seed, args) for seed in args.seeds]
        asked = args.ways or [*markets[0].ways()]
        scores = {
            way: np.concatenate([market.scores(way) for market in markets]) for way in dict.fromkeys([PLAIN, *asked])
        }
        tested = pd.concat(
            [market.tested.assign(query_id=f"{market.seed} " + market.tested["query_id"]) for market in markets],
            ignore_index=True,
        )
        print(f"{noise:.0%} of the labels are wrong\n\n{report(tested, scores)}\n", flush=True)


if __name__ == "__main__":
    main()
