"""Input tables of two markets, the scoring job on them, and what must hold after it whatever happened on the way."""

from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pandas as pd
import yaml

from csrm.bundle.loading import load_scorer
from csrm.scoring.scorer import PAIR_COLUMNS

KR, TW = "kr", "tw"
LEASE_SECONDS = 5
"""For runs that are killed: the next one waits so long. On a busy machine, a run that is to live needs the default."""
KEY = ["market", "query_id", "product_id"]
_LANGUAGES = {KR: "ko", TW: "zh-TW"}
_TITLES = ["캠핑 텐트", "수건 세트", "등산화 270", "露營帳篷", "防水登山外套", "Wireless Mouse"]
_QUERIES = ["텐트", "신발", "帳篷", "mouse"]


RESULTS = ("complete", "no duplicates", "equal scores", "bounded rework", "exit code and message")
"""What must hold after a fault."""


class Night:
    """A night's inputs and outputs in a folder."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self.bundle = folder, bundle
        self.shown: set[str] = set()
        """Those of RESULTS that were checked, and held."""
        self.catalog = pd.DataFrame(
            [(market, f"p{n:03}", f"{_TITLES[n % 6]} {n}") for market in (KR, TW) for n in range(40)],
            columns=["market", "product_id", "title"],
        )
        self.queries = pd.DataFrame(
            [(market, f"q{n}", query) for market in (KR, TW) for n, query in enumerate(_QUERIES)],
            columns=["market", "query_id", "query"],
        )
        self.candidates = self.queries[["market", "query_id"]].merge(self.catalog[["market", "product_id"]])
        self.retrieval_table: pd.DataFrame | None = None

    def arguments(self, run_id: str, **settings: Any) -> list[str]:
        """Command line of the scoring job, after the tables were written."""
        values: dict[str, Any] = {
            "markets": _LANGUAGES,
            "inputs": {},
            "tables": str(self.folder / "tables"),
            "bundle": self.bundle.as_uri(),
            "use_retrieved_titles": self.retrieval_table is not None,
            **settings,
        }
        tables = {"catalog": self.catalog, "queries": self.queries, "candidates": self.candidates}
        if self.retrieval_table is not None:
            tables["retrieval_table"] = self.retrieval_table
        for name, table in tables.items():
            path = self.folder / f"{name}.parquet"
            if not path.exists():
                table.to_parquet(path)
            values["inputs"][name] = {"path": str(path), "format": "parquet"}
        config = self.folder / "score_catalog.yaml"
        config.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        return ["--config", str(config), "--run-id", run_id]

    def table(self, name: str) -> pd.DataFrame:
        return deltalake.DeltaTable(str(self.folder / "tables" / name)).to_pandas()

    def version(self, name: str) -> int:
        """Newest version of a table; -1 where there is none."""
        log = self.folder / "tables" / name / "_delta_log"
        return max((int(path.stem) for path in log.glob("*.json") if path.stem.isdigit()), default=-1)

    def run(self, run_id: str) -> dict[str, Any]:
        (row,) = self.table("scoring_runs").query("run_id == @run_id").to_dict("records")
        return {**row, **{name: dict(row[name] or {}) for name in ("rejected", "changes", "seconds")}}

    def scores(self) -> pd.DataFrame:
        return self.table("relevance_scores").sort_values(KEY, ignore_index=True)

    def expected_scores(self) -> pd.DataFrame:
        """Of all candidates, by the core alone, without Spark: KEY and relevance_score."""
        pairs = self.candidates.merge(self.queries).merge(self.catalog)
        if self.retrieval_table is not None:
            by_rank = self.retrieval_table.sort_values("rank").groupby(["market", "query_id"])["title"]
            pairs = pairs.merge(by_rank.agg(list).rename("retrieved_titles").reset_index(), how="left")
        pairs = pairs.assign(**{name: None for name in PAIR_COLUMNS if name not in pairs})
        pairs["language"] = pairs["language"].fillna(pairs["market"].map(_LANGUAGES))
        pairs = pairs.astype(object).where(pairs.notna(), None)
        scores = load_scorer(self.bundle, "cpu", threads=1).score(pairs)["relevance_score"]
        return pairs[KEY].assign(relevance_score=scores).sort_values(KEY, ignore_index=True)

    def check_ended(self, code: int, output: str, expected_code: int, *texts: str) -> None:
        """The job ended with a code, and said some texts."""
        assert code == expected_code, output
        for text in texts:
            assert text in output, output
        self.shown.add("exit code and message")

    def check_reused(self, run_id: str, num_staged: int) -> None:
        """The run took every pair that was staged before it as it was."""
        run = self.run(run_id)
        assert run["num_reused"] == num_staged > 0
        assert run["num_scored"] == len(self.candidates) - run["num_unchanged"] - num_staged
        self.shown.add("bounded rework")

    def check_staged_once(self) -> None:
        """No pair was staged twice: what was done is not done again."""
        assert self.table("scores_staging").groupby(KEY).size().max() == 1
        self.shown.add("bounded rework")

    def check_scores(self, run_ids: set[str] | None = None) -> None:
        """Every candidate is there once, with the score that a night without faults gives it, from one of some runs."""
        scores, expected = self.scores(), self.expected_scores()
        assert expected["relevance_score"].std() > 0.01
        assert scores[KEY].equals(expected[KEY])
        np.testing.assert_allclose(scores["relevance_score"], expected["relevance_score"], atol=1e-5)
        assert run_ids is None or set(scores["run_id"]) == run_ids
        self.shown |= {"complete", "no duplicates", "equal scores"}

    def check_published(self, run_id: str) -> None:
        """The run published every candidate, once and with the right score, and its row says so."""
        self.check_scores({run_id})
        run = self.run(run_id)
        assert (run["verdict"], run["changes"]) == ("published", {"insert": len(self.candidates)})
        self.check_staged_once()
