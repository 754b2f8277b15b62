"""Golden pairs: real prompts with the scores of the trained model, which a bundle brings to prove itself by."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from csrm.artefacts.manifest import read_golden, write_golden
from csrm.config import Settings
from csrm.errors import BundleError
from csrm.scoring.scorer import PAIR_COLUMNS, PairScorer, pair_groups
from csrm.scoring.tokenization import PromptTokenizer


@dataclass(frozen=True)
class GoldenPairs:
    """What `golden.json` holds."""

    source: str
    """What computed the scores, for example torch 2.6."""
    pairs: pd.DataFrame
    """Columns PAIR_COLUMNS."""
    prompt_ids: list[list[int]]
    """Token ids of each pair's prompt."""
    scores: np.ndarray
    """Shape (num_pairs,), in [0, 1]."""

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, num_pairs: int) -> "GoldenPairs":
        """The first so many pairs."""
        part = slice(num_pairs)
        return GoldenPairs(self.source, self.pairs.iloc[part], self.prompt_ids[part], self.scores[part])

    def require_different(self, tolerance: float) -> None:
        """Check that the scores tell pairs apart: else they would prove any graph that gives all pairs one score.

        Args:
            tolerance: largest difference from a golden score that a graph may have.

        Raises:
            BundleError: there are several prompts, and no two scores differ by more than the tolerance.
        """
        if len({*map(tuple, self.prompt_ids)}) > 1 and np.ptp(self.scores) <= tolerance:
            raise BundleError(
                f"golden pairs: expected scores that tell pairs apart, got {self.scores.min():.6f} to "
                f"{self.scores.max():.6f} ({self.source}) for {len(self)} pairs, which a graph may miss by "
                f"{tolerance:.1e}. A model that gives all pairs one score ranks nothing: train it again. Where it does "
                "rank, export it with judgments of more pairs."
            )

    def write(self, path: Path) -> None:
        """One line a pair."""
        records = self.pairs.assign(prompt_ids=pd.Series(self.prompt_ids), score=self.scores).to_dict("records")
        write_golden(path, self.source, "pairs", records)

    @classmethod
    def read(cls, path: Path) -> "GoldenPairs":
        """Read a `golden.json`.

        Raises:
            BundleError: the file does not hold golden pairs.
        """
        file = read_golden(path, _GoldenFile, "bundle", "golden pairs")
        records = pd.DataFrame([pair.model_dump() for pair in file.pairs])
        return cls(
            file.source, records[PAIR_COLUMNS], records["prompt_ids"].tolist(), records["score"].to_numpy(np.float64)
        )


class _GoldenPair(Settings):
    """PAIR_COLUMNS of a pair, and what was computed from them."""

    market: str
    language: str
    query: str | None
    retrieved_titles: list[str] | None
    title: str | None
    brand: str | None
    category: str | None
    attributes: dict[str, str | None] | None
    prompt_ids: list[int]
    score: float = Field(allow_inf_nan=False)


class _GoldenFile(Settings):
    source: str
    pairs: list[_GoldenPair] = Field(min_length=1)


def choose_golden_pairs(
    pairs: pd.DataFrame, scores: np.ndarray, tokenizer: PromptTokenizer, source: str, num_pairs: int = 32
) -> GoldenPairs:
    """Pairs whose scores are spread over the range that the model gives, in an order that keeps any first few spread.

    Args:
        pairs: columns PAIR_COLUMNS.
        scores: of the trained model, shape (len(pairs),).
        source: what computed the scores.
        num_pairs: fewer where there are fewer.
    """
    by_score = np.argsort(scores, kind="stable")
    places = np.linspace(0, len(pairs) - 1, min(num_pairs, len(pairs))).round().astype(int)
    chosen = np.random.default_rng(0).permutation(by_score[places])
    golden = pairs.iloc[chosen][PAIR_COLUMNS].reset_index(drop=True)
    golden["attributes"] = golden["attributes"].map(lambda value: None if value is None else dict(value))
    golden = golden.astype(object).where(golden.notna(), None)
    return GoldenPairs(source, golden, prompt_ids(golden, tokenizer), scores[chosen].astype(np.float64))


def prompt_ids(pairs: pd.DataFrame, tokenizer: PromptTokenizer) -> list[list[int]]:
    """Token ids of each pair's prompt, in row order."""
    groups, rows = pair_groups(pairs, tokenizer)
    prompts = [[*group.prefix_ids, *suffix_ids] for group in groups for suffix_ids in group.suffixes]
    return [prompts[place] for place in np.argsort(rows)]


def check_golden_pairs(
    golden: GoldenPairs, tokenizer: PromptTokenizer, scorer: PairScorer, tolerance: float, runtime: str
) -> float:
    """Score golden pairs as any other pairs are scored.

    Args:
        tolerance: largest difference from a golden score.
        runtime: what computes the scores and its version, for the message.

    Returns:
        The largest difference.

    Raises:
        BundleError: a prompt has other tokens, or a score is farther away; the message shows the worst pair.
    """
    for place, (expected, got) in enumerate(zip(golden.prompt_ids, prompt_ids(golden.pairs, tokenizer), strict=True)):
        if expected != got:
            raise BundleError(
                f"golden pair {place} ({_shown(golden.pairs, place)}): expected {len(expected)} tokens "
                f"{expected[:8]}, got {len(got)}, {got[:8]}. The tokenizer is another model's, or another "
                "version, or the template is."
            )
    try:
        scores = scorer.score_parts(golden.pairs).astype(np.float64)
    except Exception as error:  # onnxruntime's errors have no common base
        raise BundleError(f"golden pairs: {error}, with {runtime}.") from error
    differences = np.abs(scores - golden.scores)
    worst = int(differences.argmax())
    if not differences[worst] <= tolerance:
        raise BundleError(
            f"golden pair {worst} ({_shown(golden.pairs, worst)}): expected score {golden.scores[worst]:.6f} "
            f"({golden.source}), got {scores[worst]:.6f} with {runtime}; allowed difference {tolerance:.1e}. "
            "What runs here does not compute what was exported. Export the bundle for this device, or score where it "
            "was proven."
        )
    return float(differences[worst])


def _shown(pairs: pd.DataFrame, place: int) -> str:
    return f"query {pairs['query'].iloc[place]!r}, product {pairs['title'].iloc[place]!r}"
