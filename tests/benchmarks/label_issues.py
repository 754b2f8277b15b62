"""How well wrong labels are found: by teachers out of fold and in sample, by cleanlab on the same, and by TF-IDF.

    pip install cleanlab        # only this benchmark needs it
    OMP_NUM_THREADS=1 python tests/benchmarks/label_issues.py
    python tests/benchmarks/label_issues.py --base-model FOLDER --epochs 1    # a pretrained one, with LoRA

For each share of wrong labels: generate a market, train a tiny model from scratch on its given labels, once on all and
once without each fold, and rank the labels by what these think of them. precision@k is the share of wrong
labels among the first k, where k is the number of wrong ones; a random order has the noise itself. `found` is what each
way would put before a person who does not know k: labels less probable than another one, as
csrm.training.distillation.soft_labels does, or cleanlab's find_label_issues. The last row is what a user would do
without CSRM: cross_val_predict by query of a logistic regression on TF-IDF of query and title, in cleanlab.

"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from csrm.cli import setting_arguments
from csrm.commands import generate_market
from csrm.config import InputSpec
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.data.judged import Fold, JudgedInputs, JudgedPairs
from csrm.training.data.packs import judged_packs
from csrm.training.model.base import BaseModel
from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model
from csrm.training.stage import train_stage
from csrm.training.targets import one_hot_targets
from csrm.training.trained import start_tokenizer_json
from csrm.training.tuning import Tuning

PACK_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--queries", type=int, default=250)
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--base-model", help="folder of a language model; default: a tiny one with random weights")
    args = parser.parse_args()
    for noise in args.noises:
        with tempfile.TemporaryDirectory(prefix="csrm-issues-") as folder:
            table = measure(noise, Path(folder), args.queries, args.products, args.epochs, args.folds, args.base_model)
        print(table.to_string(index=False, float_format="%.3f"), flush=True)


def measure(
    noise: float,
    work: Path,
    num_queries: int,
    num_products: int,
    epochs: float,
    num_folds: int,
    base_folder: str | None,
) -> pd.DataFrame:
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
    inputs = JudgedInputs(
        **{
            name: InputSpec(path=str(work / "inputs" / f"{name}.parquet"), format="parquet")
            for name in ("catalog", "queries", "judgments")
        }
    )
    with JudgedPairs(inputs, {"us": "en"}) as judged:
        pairs = judged.with_true_grades(judged.read("train"))
        if base_folder is None:
            tokenizer = train_byte_tokenizer([*pairs["title"], *pairs["query"]], 2000)
            base_model = BaseModel(folder=str(write_tiny_base_model(work / "base_model", tokenizer)))
            tuning = Tuning(method="full", learning_rate=3e-3, epochs=epochs, random_negatives=0.5)
        else:
            base_model = BaseModel(folder=base_folder)
            tuning = Tuning(epochs=epochs, random_negatives=0.5)
        in_sample = probabilities_of(teacher(judged, base_model, None, tuning, work / "all"), pairs)
        out_of_fold = np.empty_like(in_sample)
        rows_of_pair = pairs.reset_index().set_index(["query_id", "product_id"])["index"]
        for number in range(num_folds):
            fold = Fold(number, num_folds)
            scorer = teacher(judged, base_model, fold, tuning, work / f"fold-{number}")
            for batch in judged.batches("train", fold):
                rows = rows_of_pair.loc[list(zip(batch["query_id"], batch["product_id"], strict=True))]
                out_of_fold[rows] = probabilities_of(scorer, batch)

    names = [label.name for label in ESCI_LABELS]
    given = pairs["grade"].map(names.index).to_numpy()
    wrong = (pairs["grade"] != pairs["true_grade"]).to_numpy()
    rows = []
    for name, probabilities in (("teachers", out_of_fold), ("in-sample teacher", in_sample)):
        confidence = probabilities[np.arange(len(given)), given]
        rows.append((noise, name, *found(confidence, probabilities.argmax(axis=1) != given, wrong)))
        rows.append((noise, f"{name}, cleanlab", *by_cleanlab(given, probabilities, wrong)))
    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    words = [f"{' '.join('q_' + word for word in row.query.split())} {row.title}" for row in pairs.itertuples()]
    tfidf = cross_val_predict(
        classifier, words, given, groups=pairs["query_id"], cv=GroupKFold(5), method="predict_proba"
    )
    rows.append((noise, "TF-IDF, cleanlab", *by_cleanlab(given, tfidf, wrong)))
    return pd.DataFrame(rows, columns=["noise", "way", "precision@k", "found", "precision of found"])


def teacher(
    judged: JudgedPairs, base_model: BaseModel, without: Fold | None, tuning: Tuning, output_dir: Path
) -> PairScorer:
    """A model trained on the given labels, but for those of a fold."""
    tokenizer = PromptTokenizer.from_json(start_tokenizer_json(base_model), Budgets())
    groups = judged.groups("train", tuning.pairs_per_prefix, tuning.seed, tuning.random_negatives, without)
    with_targets = (rows.assign(target=list(one_hot_targets(rows["grade"], ESCI_LABELS, None))) for rows in groups)
    packs = judged_packs(with_targets, tokenizer, PACK_TOKENS)
    return train_stage(packs, base_model, tuning, ESCI_LABELS, Budgets(), PACK_TOKENS, output_dir)


def probabilities_of(scorer: PairScorer, pairs: pd.DataFrame) -> np.ndarray:
    return np.asarray(softmax(scorer.logits(pairs).astype(np.float64), axis=1))


def by_cleanlab(given: np.ndarray, probabilities: np.ndarray, wrong: np.ndarray) -> tuple[float, int, float]:
    quality = get_label_quality_scores(given, probabilities, method="normalized_margin")
    return found(quality, find_label_issues(given, probabilities), wrong)


def found(quality: np.ndarray, is_issue: np.ndarray, wrong: np.ndarray) -> tuple[float, int, float]:
    """precision@k by the lowest quality, and the number and precision of the issues."""
    worst = np.argsort(quality, kind="stable")[: wrong.sum()]
    return float(wrong[worst].mean()), int(is_issue.sum()), float(wrong[is_issue].mean()) if is_issue.any() else np.nan


if __name__ == "__main__":
    main()
