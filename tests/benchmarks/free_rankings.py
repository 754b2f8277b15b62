"""Is a trained model better than what is free: BM25 alone, an encoder alone, both fused? And what does a vote give?

    python tests/benchmarks/free_rankings.py --data FOLDER --gguf FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --encoder build/encoder

The folder of --data holds esci_us, and for the second table chorus_icecat. The first is of the US sample of ESCI, 120
queries in two folds. A model is trained on the queries of each fold, as conf/train_esci_sample.yaml does but with
--steps, and scores the pairs of the other one: no query is judged by a model that saw it. The encoder is an exported
one. Votes of words and encoder are fitted on a half of the scored queries of a fold, and measured on the other half, in
turns. Without a label, the encoder's vote is the sum of log-odds and cosine, each in standard deviations.

The second table is of another shop, Chorus, none of whose labels is learnt: both folds' models score its pairs, their
probabilities are averaged, and votes are fitted on ESCI, where each model scores what it did not learn.

Intervals are 95% percentile bootstrap intervals over queries. What has ended is not run again: the tables, models and
scores lie in --work.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cold_start.legs import read_english
from deltalake import DeltaTable
from scipy.special import logit, softmax
from sklearn.metrics import ndcg_score, roc_auc_score
from speed_report import markdown

from csrm.cli import setting_arguments
from csrm.commands import build_retrieval_table, import_esci, train
from csrm.embedding import load_encoder
from csrm.export.vote import fit_pair_map
from csrm.market.files import arrow_table
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.schemas import CATALOG, PAIR_KEY, QUERIES
from csrm.scoring.labels import ESCI_LABELS, expected_gain
from csrm.scoring.scorer import pair_texts
from csrm.scoring.vote import LabelMap, named_share
from csrm.spark.session import build_session
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.distillation.teacher import text_cosines
from csrm.training.trained import trained_scorer

REPOSITORY = Path(__file__).parents[2]
MARKETS = {"us": "en"}
NAMES = [label.name for label in ESCI_LABELS]
GAINS = np.array([label.gain for label in ESCI_LABELS])
NUM_RESAMPLES = 2_000


class Study:
    """The tables, models and scores in a work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work.resolve()
        inputs = self.work / "inputs"
        self.texts = {name: {"path": str(inputs / name)} for name in ("catalog", "queries")}
        if not (inputs / "judgments").exists():
            conf = ["--config", str(REPOSITORY / "conf" / "import_esci_sample.yaml")]
            import_esci.main([*conf, *setting_arguments(data=(args.data / "esci_us").resolve(), output=inputs)])
        if not (self.work / "tables").exists():
            conf = ["--config", str(REPOSITORY / "conf" / "build_retrieval_table.yaml")]
            tables = {"inputs": self.texts, "tables": self.work / "tables", "markets": MARKETS}
            build_retrieval_table.main([*conf, *setting_arguments(**tables)])
        self.judged = DeltaTable(str(inputs / "judgments")).to_pandas()
        self.queries = np.random.default_rng(0).permutation(sorted(self.judged["query_id"].unique()))

    def pairs(self) -> pd.DataFrame:
        """All judged pairs with a column for each ranking that needs no label."""
        path = self.work / "pairs.parquet"
        if not path.exists():
            pairs = self.read("all", self.judged.assign(split="test"))
            pairs["encoder"] = text_cosines(load_encoder(self.args.encoder), pairs)
            pairs["words"] = [named_share(query.query, product) for query, product in pair_texts(pairs)]
            spark = build_session("free_rankings")
            catalog_df, queries_df = (spark.read.format("delta").load(spec["path"]) for spec in self.texts.values())
            found = bm25_scores(product_terms(catalog_df), query_terms(queries_df)).toPandas()
            pairs = pairs.merge(found[[*PAIR_KEY, "bm25"]], on=[*PAIR_KEY], how="left").fillna({"bm25": 0.0})
            pairs[[*PAIR_KEY, "grade", "encoder", "words", "bm25"]].to_parquet(path)
        return pd.read_parquet(path)

    def inputs(self, name: str, judged: pd.DataFrame) -> dict[str, Any]:
        """Inputs of a training, with a table of judgments."""
        path = self.work / f"judgments-{name}.parquet"
        judged.to_parquet(path)
        titles = {"path": str(self.work / "tables" / "retrieval_table")}
        return {**self.texts, "judgments": {"path": str(path), "format": "parquet"}, "retrieval_table": titles}

    def read(self, name: str, judged: pd.DataFrame) -> pd.DataFrame:
        """The pairs of split test, with their texts."""
        with JudgedPairs(JudgedInputs.model_validate(self.inputs(name, judged)), MARKETS) as pairs:
            return pairs.read("test")

    def logits(self, fold: int) -> pd.DataFrame:
        """Pairs of a fold with the logits of the model that learnt the other one."""
        path = self.work / f"fold-{fold}.parquet"
        if not path.exists():
            is_test = self.judged["query_id"].isin(self.queries[fold::2])
            judged = self.judged.assign(split=np.where(is_test, "test", "train"))
            folder = self.work / f"fold-{fold}"
            settings = {
                "inputs": self.inputs(f"fold-{fold}", judged),
                "base_model": {"folder": str(self.args.gguf.resolve().parent), "gguf_file": self.args.gguf.name},
                "model_dir": folder,
                "tuning.max_steps": self.args.steps,
            }
            conf = REPOSITORY / "conf" / "train_esci_sample.yaml"
            if train.main(["--config", str(conf), *setting_arguments(**settings)]):
                raise SystemExit("the training failed")
            pairs = self.read(f"fold-{fold}", judged)
            logits = trained_scorer(folder, "fp32").logits(pairs)
            pairs[[*PAIR_KEY]].assign(fold=fold, logits=list(logits)).to_parquet(path)
        return pd.read_parquet(path)

    def other_shop(self) -> pd.DataFrame:
        """Pairs of Chorus with the mean probabilities of both models, as logits, and what needs no label."""
        path = self.work / "chorus.parquet"
        if not path.exists():
            pairs = read_english(self.args.data, has_titles=True)["Chorus"]
            scorers = [trained_scorer(self.work / f"fold-{fold}", "fp32") for fold in (0, 1)]
            mean = np.mean([softmax(scorer.logits(pairs), axis=1) for scorer in scorers], axis=0)
            pairs["encoder"] = text_cosines(load_encoder(self.args.encoder), pairs.fillna({"title": ""}))
            pairs["words"] = [named_share(query.query, product) for query, product in pair_texts(pairs)]
            spark = build_session("free_rankings")
            texts = {CATALOG: pairs.drop_duplicates("product_id"), QUERIES: pairs.drop_duplicates("query_id")}
            catalog_df, queries_df = (
                spark.createDataFrame(arrow_table(frame.reindex(columns=table.column_names), table))
                for table, frame in texts.items()
            )
            found = bm25_scores(product_terms(catalog_df), query_terms(queries_df)).toPandas()
            pairs = pairs.merge(found[[*PAIR_KEY, "bm25"]], on=[*PAIR_KEY], how="left").fillna({"bm25": 0.0})
            columns = [*PAIR_KEY, "gain", "encoder", "words", "bm25"]
            pairs[columns].assign(logits=list(np.log(mean))).to_parquet(path)
        return pd.read_parquet(path)


VOTES = {
    "words": ["odds", "words"],
    "the encoder": ["odds", "encoder"],
    "both": ["odds", "words", "encoder"],
}
"""Name to the features of the vote."""


def add_rankings(pairs: pd.DataFrame) -> list[str]:
    """Add a column for each ranking without a fitted vote; returns their names, the free ones first.

    Args:
        pairs: query_id, logits, encoder, words, bm25.
    """
    pairs["model"] = expected_gain(np.stack(pairs["logits"].tolist()), GAINS)
    pairs["BM25 and encoder, fused by reciprocal rank"] = reciprocal_rank(pairs, "bm25") + reciprocal_rank(
        pairs, "encoder"
    )
    pairs["odds"] = logit(pairs["model"].clip(1e-4, 1 - 1e-4))
    pairs["model and encoder, equal weights"] = standard(pairs["odds"]) + standard(pairs["encoder"])
    fused, equal = "BM25 and encoder, fused by reciprocal rank", "model and encoder, equal weights"
    return ["bm25", "encoder", fused, "words", "model", equal]


def fitted_vote(pairs: pd.DataFrame, columns: list[str]) -> LabelMap:
    """The vote that judged pairs choose."""
    given = pairs["grade"].map({name: place for place, name in enumerate(NAMES)}).to_numpy()
    _, queries = np.unique(pairs["query_id"], return_inverse=True)
    return fit_pair_map(pairs[columns].to_numpy(np.float64), GAINS[given], queries, given, len(NAMES))


def add_votes(pairs: pd.DataFrame) -> list[str]:
    """Add a column for each vote, fitted on a half of a fold's queries and measured on the other; returns their names.

    Args:
        pairs: fold, query_id, grade, odds, encoder, words.
    """
    for voters, columns in VOTES.items():
        voted = np.empty(len(pairs))
        for fold in sorted(pairs["fold"].unique()):
            queries = np.random.default_rng(1).permutation(sorted(pairs["query_id"][pairs["fold"] == fold].unique()))
            for half in (0, 1):
                fitted, measured = (pairs["query_id"].isin(queries[part::2]).to_numpy() for part in (half, 1 - half))
                label_map = fitted_vote(pairs[fitted], columns)
                voted[measured] = label_map.probabilities(pairs.loc[measured, columns].to_numpy(np.float64)) @ GAINS
        pairs[f"model and the vote of {voters}"] = voted
    return [f"model and the vote of {voters}" for voters in VOTES]


def reciprocal_rank(pairs: pd.DataFrame, column: str) -> pd.Series:
    """1 / (60 + rank) within the query (Cormack et al. 2009)."""
    return 1 / (60 + pairs.groupby("query_id")[column].rank(ascending=False))


def standard(values: pd.Series) -> pd.Series:
    """In standard deviations."""
    return (values - values.mean()) / values.std()


def report(pairs: pd.DataFrame, rankings: list[str]) -> str:
    """nDCG@10 and ROC-AUC of each ranking, and what its nDCG@10 is above each free one.

    Args:
        pairs: query_id, gain, and a column for each ranking.
        rankings: the free ones first.
    """
    queries = [rows for _, rows in pairs.groupby("query_id") if rows["gain"].max() > 0 and len(rows) > 1]
    is_best = pairs["gain"] == pairs["gain"].max()
    ndcgs = {name: np.array([ndcg_score([rows["gain"]], [rows[name]], k=10) for rows in queries]) for name in rankings}
    drawn = np.random.default_rng(0).integers(0, len(queries), (NUM_RESAMPLES, len(queries)))

    def shown(values: np.ndarray, form: str) -> str:
        low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"

    rows = []
    for name in rankings:
        row = {"ranking": name, "nDCG@10": shown(ndcgs[name], ".3f")}
        row |= {
            f"less {free}": shown(ndcgs[name] - ndcgs[free], "+.3f") if name != free else "" for free in rankings[:3]
        }
        rows.append(row | {"ROC-AUC of the best label": f"{roc_auc_score(is_best, pairs[name]):.3f}"})
    return f"{len(queries)} queries, {len(pairs):,} pairs\n\n{markdown(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that has esci_us, and chorus_icecat")
    parser.add_argument("--gguf", type=Path, required=True, help="the base model")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of an exported encoder")
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps of each training")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "free_rankings", help="work folder")
    study = Study(parser.parse_args())
    scored = pd.concat([study.logits(fold) for fold in (0, 1)])
    pairs = scored.merge(study.pairs(), on=[*PAIR_KEY])
    pairs["gain"] = pairs["grade"].map(dict(zip(NAMES, GAINS, strict=True)))
    print(f"ESCI: {report(pairs, add_rankings(pairs) + add_votes(pairs))}")
    if (study.args.data / "chorus_icecat").is_dir():
        other = study.other_shop()
        rankings = add_rankings(other)
        for voters, columns in VOTES.items():
            features = other[columns].to_numpy(np.float64)
            other[f"model and the vote of {voters}"] = fitted_vote(pairs, columns).probabilities(features) @ GAINS
            rankings.append(f"model and the vote of {voters}")
        print(f"\nChorus, none of whose labels was learnt: {report(other, rankings)}")


if __name__ == "__main__":
    main()
