"""How well a model judges the dev split."""

import re

import pandas as pd

from csrm.evaluation.metrics import QUERY_METRICS, Evaluation, evaluate_scores
from csrm.scoring.scorer import PairScorer
from csrm.training.best_step import SCORE
from csrm.training.distillation.label_quality import resampled_auc
from csrm.training.distillation.rounds import DevMetrics
from csrm.training.settings import TrainConfig, grade_gains


def scored_pairs(scorer: PairScorer, pairs: pd.DataFrame) -> pd.DataFrame:
    """Judged pairs with the columns that the scorer adds."""
    return pd.concat([pairs, scorer.score(pairs)], axis=1)


def evaluate_scored(scored: pd.DataFrame, config: TrainConfig) -> Evaluation:
    """Metrics of scored judged pairs, with the gains of the configured labels."""
    gains, relevant, irrelevant = grade_gains(config)
    return evaluate_scores(scored, [SCORE], gains=gains, relevant_grades=relevant, irrelevant_grades=irrelevant)


def dev_values(evaluation: Evaluation | None) -> dict[str, float]:
    """What a tracker shows of the model: final/ndcg_at_10 and the like, over all markets; none that is undefined."""
    if evaluation is None:
        return {}
    own = evaluation.metrics[evaluation.metrics["ranking"] == SCORE].groupby("metric")["value"].last().dropna()
    names = {metric: re.sub(r"\W+", "_", metric.replace("@", "_at_")).lower() for metric in own.index}
    return {f"final/{names[metric]}": float(value) for metric, value in own.items()}


def dev_metrics(scored: pd.DataFrame, config: TrainConfig) -> DevMetrics:
    """What the rounds of distillation are compared by.

    Args:
        scored: judged pairs with their scores, at least one.
    """
    metrics = evaluate_scored(scored, config).metrics
    ndcg = metrics[(metrics["ranking"] == SCORE) & (metrics["metric"] == QUERY_METRICS[0])]
    _, relevant, _ = grade_gains(config)
    queries = scored["market"] + "/" + scored["query_id"]
    aucs = resampled_auc(scored[SCORE].to_numpy(), scored["grade"].isin(relevant).to_numpy(), queries.to_numpy())
    return DevMetrics(float(ndcg["value"].iloc[-1]), aucs)  # the last market is all of them
