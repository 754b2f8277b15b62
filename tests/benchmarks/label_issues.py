"""How well wrong labels are found: teachers out of fold and in sample, cleanlab on the same teachers, and TF-IDF.

    pip install cleanlab        # only this benchmark needs it
    OMP_NUM_THREADS=1 python tests/benchmarks/label_issues.py

For each share of wrong labels: generate a market, train a tiny model from scratch, and let one round of distillation
rank the given labels of split train. precision@k is the share of wrong labels among the first k, where k is the number
of wrong ones; a random order has the noise itself. `found` is what each way would put before a person without knowing
k, with its precision. What a user would do without CSRM is the last row: cross_val_predict of a logistic regression on
TF-IDF of query and title, by query, in cleanlab.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from csrm.cli import setting_arguments
from csrm.training.soft_labels import KEY, read_labelled, rows_of
from csrm.training.tiny import train_byte_tokenizer, write_tiny_base_model
from jobs import generate_market, train

GRADES = ["I", "C", "S", "E"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument(
        "--work", type=Path, help="keep the models here and go on with them; default: a temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="csrm-issues-") as folder:
        tables = [
            measure(noise, (args.work or Path(folder)) / f"noise-{noise}", args.queries, args.products, args.epochs)
            for noise in args.noises
        ]
    print(pd.concat(tables).to_string(index=False, float_format="%.3f"))


def measure(noise: float, work: Path, num_queries: int, num_products: int, epochs: float) -> pd.DataFrame:
    """One row for each way to find the wrong labels of one market."""
    generate_market.main(
        setting_arguments(
            markets={"us": "en"},
            label_noise=noise,
            queries_per_market=num_queries,
            products_per_market=num_products,
            output=work / "inputs",
        )
    )
    inputs = {
        name: {"path": work / "inputs" / f"{name}.parquet", "format": "parquet"}
        for name in ("catalog", "queries", "judgments")
    }
    texts = pd.read_parquet(work / "inputs" / "judgments.parquet").merge(
        pd.read_parquet(work / "inputs" / "queries.parquet")[["market", "query_id", "query"]]
    )
    texts = texts.merge(pd.read_parquet(work / "inputs" / "catalog.parquet")[["market", "product_id", "title"]])
    base_model = work / "base_model"
    if not base_model.exists():
        write_tiny_base_model(base_model, train_byte_tokenizer([*texts["title"], *texts["query"]], 2000), 64, 2)
    teachers = {}
    tuning = {"method": "full", "learning_rate": 3e-3, "epochs": epochs, "random_negatives": 0.5}
    stages = work / "model.stages"
    for name, num_folds in (("in sample", 1), ("out of fold", 2)):  # both begin with the same round 0
        train.main(
            setting_arguments(
                markets={"us": "en"},
                inputs=inputs,
                base_model={"folder": base_model},
                tuning=tuning,
                distillation={"rounds": 1, "num_folds": num_folds},
                model_dir=work / "model",
            )
        )
        table = read_labelled(stages / "round-1-soft_labels.parquet")
        teachers[name] = table.select(KEY).to_pandas().assign(teacher=list(rows_of(table, "teacher")))

    pairs = texts[texts["split"] == "train"].merge(teachers["out of fold"], on=KEY)
    given = pairs["grade"].map(GRADES.index).to_numpy()
    wrong = (pairs["grade"] != pairs["true_grade"]).to_numpy()
    own = np.stack(pairs["teacher"])
    in_sample = np.stack(pairs[KEY].merge(teachers["in sample"], on=KEY, how="left")["teacher"])
    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    words = [f"{' '.join('q_' + word for word in row.query.split())} {row.title}" for row in pairs.itertuples()]
    tfidf = cross_val_predict(
        classifier, words, given, groups=pairs["query_id"], cv=GroupKFold(5), method="predict_proba"
    )
    rows = []
    for name, probabilities in (("teachers", own), ("teachers in sample", in_sample), ("TF-IDF", tfidf)):
        probabilities = np.clip(probabilities, 1e-6, 1)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        if name != "TF-IDF":
            confidence = probabilities[np.arange(len(given)), given]
            rows.append((noise, name, *found(confidence, probabilities.argmax(axis=1) != given, wrong)))
        quality = get_label_quality_scores(given, probabilities, method="normalized_margin")
        rows.append((noise, f"cleanlab on {name}", *found(quality, find_label_issues(given, probabilities), wrong)))
    return pd.DataFrame(rows, columns=["noise", "way", "precision@k", "found", "precision of found"])


def found(quality: np.ndarray, is_issue: np.ndarray, wrong: np.ndarray) -> tuple[float, int, float]:
    """precision@k by the lowest quality, and the number and precision of the issues."""
    worst = np.argsort(quality, kind="stable")[: wrong.sum()]
    return float(wrong[worst].mean()), int(is_issue.sum()), float(wrong[is_issue].mean()) if is_issue.any() else np.nan


if __name__ == "__main__":
    main()
