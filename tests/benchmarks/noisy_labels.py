"""What wrong labels cost a model that has learnt its market, and what each way to bear them gives back.

    pip install cleanlab        # only this benchmark needs it
    OMP_NUM_THREADS=1 python tests/benchmarks/noisy_labels.py
    OMP_NUM_THREADS=1 python tests/benchmarks/noisy_labels.py --noise 0.2 --queries 2000

A generated market, whose labels of split train are wrong with a probability of --noise, and a tiny model from random
weights that jobs/train.py trains in several passes, as conf/train.yaml does but for the other markets. Dev and test are
right: dev chooses the round, test measures. Each way learns from the same labels with the same tuning:

    right labels            what there is to lose
    wrong labels            nothing is done
    distillation            the model of the round before is the teacher (num_folds 1)
    label smoothing         of 0.2
    distillation, 2 folds   teachers did not see what they judge (num_folds 2)
    pruning                 labels that cleanlab's find_label_issues finds, by the same teachers, are left out

Intervals are 95% percentile bootstrap intervals over test queries, of the difference to wrong labels.
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
GAINS = {label.name: label.gain for label in ESCI_LABELS}
PLAIN = "wrong labels"


def ways(share: float, rounds: int) -> dict[str, Mapping[str, Any]]:
    """Settings of jobs/train.py that differ."""
    distillation = {"rounds": rounds, "teacher_share": share}
    return {
        "distillation": {"distillation": {**distillation, "num_folds": 1}},
        "label smoothing": {"tuning.label_smoothing": 0.2},
        "distillation, 2 folds": {"distillation": {**distillation, "num_folds": 2}},
    }


class Market:
    """The tables, and the trainings on them."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        sizes = {"queries_per_market": args.queries, "products_per_market": args.products, "seed": args.seed}
        noise = {"label_noise": args.noise, "output": work / "inputs"}
        generate_market.main(setting_arguments(markets=MARKETS, **sizes, **noise))
        judged = pd.read_parquet(work / "inputs" / "judgments.parquet")
        queries = np.random.default_rng(args.seed).permutation(judged["query_id"].unique())
        bounds = (np.cumsum(list(SHARES.values())) * len(queries)).round().astype(int)
        split = {id_: name for name, ids in zip(SHARES, np.split(queries, bounds[:-1]), strict=True) for id_ in ids}
        judged["split"] = judged["query_id"].map(split)
        self.noisy = judged.assign(grade=judged["grade"].where(judged["split"] == "train", judged["true_grade"]))
        self.noisy.to_parquet(work / "judgments.parquet")
        with JudgedPairs(JudgedInputs.model_validate(self.inputs(work / "judgments.parquet")), MARKETS) as pairs:
            self.tested = pairs.read("test")
        texts = [pd.read_parquet(work / "inputs" / f"{name}.parquet") for name in ("catalog", "queries")]
        tokenizer = train_byte_tokenizer([*texts[0]["title"].dropna(), *texts[1]["query"].dropna()], 2000)
        self.base_model = str(write_tiny_base_model(work / "base_model", tokenizer))

    def train(self, name: str, judged: pd.DataFrame, changes: Mapping[str, Any]) -> np.ndarray:
        """Scores of the test pairs by a model that was trained with these settings."""
        folder, plain = (self.work / each.replace(", ", " ").replace(" ", "-") for each in (name, PLAIN))
        if "distillation" in changes and not folder.exists():
            shutil.copytree(plain, folder.with_suffix(".stages") / "round-0", dirs_exist_ok=True)  # not trained again
        judged.to_parquet(folder.with_suffix(".parquet"))
        settings = {
            "markets": MARKETS,
            "inputs": self.inputs(folder.with_suffix(".parquet")),
            "base_model": {"folder": self.base_model},
            "translation": None,
            "title_pairs": None,
            "distillation": None,
            "tuning": {"method": "full", "learning_rate": 3e-3, "epochs": self.args.epochs, "random_negatives": 0.5},
            "tuning.seed": self.args.seed,
            "model_dir": folder,
        }
        arguments = ["--config", str(REPOSITORY / "conf" / "train.yaml"), *setting_arguments(**{**settings, **changes})]
        if train.main(arguments):
            raise SystemExit(f"{name}: the training failed")
        return trained_scorer(folder, "fp32").score(self.tested)["relevance_score"].to_numpy()

    def inputs(self, judgments: Path) -> dict[str, Any]:
        paths = {name: self.work / "inputs" / f"{name}.parquet" for name in ("catalog", "queries")}
        return {
            name: {"path": str(path), "format": "parquet"} for name, path in {**paths, "judgments": judgments}.items()
        }

    def pruned(self) -> pd.DataFrame:
        """The labels without those that cleanlab doubts, by the teachers of the run with two folds."""
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
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--queries", type=int, default=1_250)
    parser.add_argument("--products", type=int, default=2_000)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--teacher-share", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "noisy_labels", help="work folder")
    args = parser.parse_args()
    market = Market(args.work.resolve(), args)
    right = market.noisy.assign(grade=market.noisy["true_grade"])
    scores = {
        "right labels": market.train("right labels", right, {}),
        PLAIN: market.train(PLAIN, market.noisy, {}),
        **{
            name: market.train(name, market.noisy, settings)
            for name, settings in ways(args.teacher_share, args.rounds).items()
        },
    }
    scores["pruning"] = market.train("pruning", market.pruned(), {})
    print(report(market.tested, scores), flush=True)


if __name__ == "__main__":
    main()
