"""How long a night takes: the formula, its figures, and what they are read from."""

import datetime
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csrm.bundle.loading import default_tokens_per_call, load_bundle
from csrm.capacity.figures import Run, bundle_figures, read_run, with_run
from csrm.capacity.formula import Figures, Machines, PhaseCost, Plan
from csrm.capacity.report import find_limits
from csrm.cli import run_job
from csrm.commands.capacity import main
from csrm.errors import InputError
from csrm.scoring.packing import Group, Pack, split_groups
from csrm.scoring.scorer import PairScorer, pair_texts

DEMO_BUNDLE = Path(__file__).parents[2] / "conf" / "demo_bundle"
STAGES = {
    "start": PhaseCost(10.0, 0.0),
    "inputs": PhaseCost(5.0, 0.0),
    "plan": PhaseCost(5.0, 16.0),
    "scoring": PhaseCost(6.0, 100.0),
    "audit": PhaseCost(4.0, 8.0),
    "publish": PhaseCost(2.0, 5.0),
}
FIGURES = Figures(
    prefix_tokens=100.0,
    suffix_tokens=20.0,
    prefix_bytes=300.0,
    suffix_bytes=60.0,
    titles_bytes=512.0,
    tokens_per_call=1_000_000_000,
    tokens_per_s=1_000.0,
    phases=STAGES,
    table_bytes={"scores_staging": 30.0, "run_pairs": 20.0, "relevance_scores": 25.0},
)


def test_a_night_worked_by_hand() -> None:
    """10,000 queries of 10 products: 30 tokens a pair, in calls so long that no prefix is repeated."""
    needs = Plan(FIGURES, Machines(slots=2, cores=8), products_per_query=10).needs(10_000)
    assert needs.num_pairs == 100_000
    assert needs.num_tokens == pytest.approx(3_000_000)
    assert needs.seconds == pytest.approx(
        {
            "start": 10.0,
            "inputs": 5.0,
            "plan": 5 + 1.6 / 8,
            "scoring": 6 + (10 + 3_000) / 2,
            "audit": 4 + 0.8 / 8,
            "publish": 2 + 0.5 / 8,
        }
    )
    assert needs.hours == pytest.approx((10 + 5 + 5.2 + 1511 + 4.1 + 2.0625) / 3600)
    assert needs.titles_bytes == 5_120_000
    assert needs.table_bytes == {"scores_staging": 3e6, "run_pairs": 2e6, "relevance_scores": 2.5e6}
    assert needs.num_files == pytest.approx(100_000 / 4096)


def test_a_night_that_scores_a_tenth_looks_at_all_pairs_but_stages_a_tenth() -> None:
    """One pair of each query changed: 120 tokens each, for nothing is shared."""
    needs = Plan(FIGURES, Machines(2, 8), products_per_query=10, share_scored=0.1).needs(10_000)
    assert needs.seconds["plan"] == 5.2
    assert needs.num_tokens == pytest.approx(1_200_000)
    assert needs.seconds["scoring"] == pytest.approx(6 + (1 + 1_200) / 2)
    assert needs.table_bytes == {"scores_staging": 3e5, "run_pairs": 2e6, "relevance_scores": 2.5e6}


@pytest.mark.parametrize("products_per_query", [1, 3, 12, 100, 256])
@pytest.mark.parametrize(("prefix", "suffix", "tokens_per_call"), [(60, 18, 512), (150, 40, 512), (150, 40, 2048)])
def test_the_tokens_of_a_pair_are_those_of_real_calls(
    products_per_query: int, prefix: int, suffix: int, tokens_per_call: int
) -> None:
    rng = np.random.default_rng(0)

    def lengths(mean: int, num: int) -> list[int]:
        return rng.integers(mean // 2, mean + mean // 2 + 1, num).tolist()

    groups = [
        Group([0] * length, [[0] * size for size in lengths(suffix, products_per_query)])
        for length in lengths(prefix, max(20, 6_000 // products_per_query))
    ]
    num_tokens = sum(group.num_tokens for part in split_groups(groups, tokens_per_call) for group in part)
    figures = replace(
        FIGURES,
        prefix_tokens=float(np.mean([len(group.prefix_ids) for group in groups])),
        suffix_tokens=float(np.mean([len(ids) for group in groups for ids in group.suffixes])),
        tokens_per_call=tokens_per_call,
    )
    num_pairs = products_per_query * len(groups)
    assert figures.tokens_per_pair(products_per_query) == pytest.approx(num_tokens / num_pairs, rel=0.05)


def test_products_beyond_a_chunk_share_no_more() -> None:
    assert FIGURES.tokens_per_pair(256) == FIGURES.tokens_per_pair(10_000)


def test_calls_are_as_long_as_the_longest_prompt() -> None:
    bundle = load_bundle(DEMO_BUNDLE)
    budgets = replace(bundle.settings.budgets, prefix=1_500)
    long = replace(bundle, settings=bundle.settings.model_copy(update={"budgets": budgets}))
    assert bundle_figures(bundle).tokens_per_call == 1_024
    assert bundle_figures(long).tokens_per_call == budgets.prompt


def test_a_bundle_tells_the_length_of_its_golden_pairs() -> None:
    bundle = load_bundle(DEMO_BUNDLE)
    figures, golden = bundle_figures(bundle), bundle.golden_pairs()
    num_tokens = np.mean([len(ids) for ids in golden.prompt_ids])
    assert figures.prefix_tokens + figures.suffix_tokens == pytest.approx(num_tokens)
    assert figures.tokens_per_pair(1) == pytest.approx(num_tokens)
    assert figures.tokens_per_s == pytest.approx(bundle.settings.precisions[0].pairs_per_s * num_tokens)
    titles = [title for query, _ in pair_texts(golden.pairs) for title in query.retrieved_titles]
    expected = sum(len(title.encode()) + 64 for title in titles) / len(golden)
    assert figures.titles_bytes == pytest.approx(expected)
    assert bundle_figures(bundle, tokens_per_s=5.0).tokens_per_s == 5.0


def finished_run(plan: Plan, num_queries: int) -> Run:
    needs = plan.needs(num_queries)
    return Run(
        bundle_digest="",
        num_candidates=round(needs.num_pairs),
        num_scored=round(needs.num_pairs),
        num_tokens=round(needs.num_tokens),
        products_per_query=plan.products_per_query,
        seconds=needs.seconds,
        table_bytes={name: size / needs.num_pairs for name, size in needs.table_bytes.items()},
    )


def test_a_run_tells_what_its_night_took_and_so_what_others_take() -> None:
    run_machines = Machines(slots=2, cores=4)
    truth = replace(FIGURES, tokens_per_call=512)
    run = finished_run(Plan(truth, run_machines, products_per_query=20), 10_000)
    other_costs = {name: STAGES[name]._replace(pair_us=1.0) for name in ("inputs", "plan", "audit", "publish")}
    guess = replace(truth, tokens_per_s=1.0, phases=STAGES | other_costs, table_bytes={})
    found = Plan(with_run(guess, run, run_machines), Machines(16, 64), products_per_query=100).needs(50_000)
    expected = Plan(truth, Machines(16, 64), products_per_query=100).needs(50_000)
    assert found.seconds == pytest.approx(expected.seconds)
    assert found.table_bytes == pytest.approx(expected.table_bytes)


def test_a_run_whose_texts_are_longer_than_the_golden_pairs_corrects_the_tokens() -> None:
    truth = replace(FIGURES, prefix_tokens=150.0, suffix_tokens=30.0)
    run = finished_run(Plan(truth, Machines(1, 1), products_per_query=20), 10_000)
    found = with_run(FIGURES, run, Machines(1, 1))
    assert (found.prefix_tokens, found.suffix_tokens) == pytest.approx((150.0, 30.0))


def test_a_small_run_tells_nothing_of_spark() -> None:
    run = finished_run(Plan(FIGURES, Machines(1, 1), products_per_query=10), 100)
    slow = replace(run, seconds={**run.seconds, "plan": 60.0})
    assert with_run(FIGURES, slow, Machines(1, 1)).phases == FIGURES.phases


def test_a_run_that_was_faster_than_all_but_the_model_is_refused() -> None:
    run = finished_run(Plan(FIGURES, Machines(1, 1), products_per_query=10), 10_000)
    with pytest.raises(InputError, match=r"scored 100,000 pairs in 9.0 s: expected more than the 10.0 s"):
        with_run(FIGURES, replace(run, seconds={**run.seconds, "scoring": 9.0}), Machines(1, 1))


def test_each_limit_is_met_by_the_night_that_it_names() -> None:
    plan = Plan(FIGURES, Machines(4, 16), products_per_query=100, num_markets=3)
    limits = find_limits(plan, window_hours=8, broadcast_limit_mb=256, driver_memory_gb=4, storage_gb=500)
    assert limits == sorted(limits)
    found = {limit.what.partition(" ")[2][:12]: plan.needs(limit.num_queries) for limit in limits}
    assert found["night is lon"].hours == pytest.approx(8)
    assert found["list of stag"].driver_bytes == pytest.approx(4 * 2**30)
    assert found["titles take "].titles_bytes == pytest.approx(256 * 2**20)
    assert found["take more th"].stored_bytes == pytest.approx(500e9)
    assert [limit.breaks for limit in limits if "titles" in limit.what] == [False]


def test_a_window_shorter_than_the_start_is_too_short_for_any_night() -> None:
    limits = find_limits(Plan(FIGURES, Machines(1, 1), 10), 0.005, 256, 4)
    assert limits[0].num_queries < 0
    assert "longer than 0.005 hours" in limits[0].what


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Tables of one finished run, 600 pairs of 30 queries of which 60 were published before, and of one that died."""
    deltalake = pytest.importorskip("deltalake")
    import pyarrow as pa

    def write(name: str, table: pa.Table, *partitions: str) -> None:
        deltalake.write_deltalake(str(tmp_path / name), table, partition_by=list(partitions), mode="append")

    at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    run: dict[str, Any] = {
        "run_id": "r1",
        "bundle_digest": load_bundle(DEMO_BUNDLE).digest,
        "num_candidates": 600,
        "num_scored": 540,
        "num_tokens": 10_800,
        "seconds": [("inputs", 6.0), ("plan", 7.0), ("scoring", 20.0), ("audit", 5.0), ("publish", 3.0)],
        "finished_at": at,
    }
    died = {**run, "run_id": "died", "num_scored": None, "finished_at": None}
    numbers = [(name, pa.int64()) for name in ("num_candidates", "num_scored", "num_tokens")]
    texts = [(name, pa.string()) for name in ("run_id", "bundle_digest")]
    others = [("seconds", pa.map_(pa.string(), pa.float64())), ("finished_at", pa.timestamp("us", "UTC"))]
    write("scoring_runs", pa.Table.from_pylist([run, died], pa.schema([*texts, *numbers, *others])))
    pairs = {
        "run_id": ["r1"] * 600,
        "market": ["tw"] * 600,
        "query_id": [f"q{number // 20}" for number in range(600)],
        "state": ["unchanged" if number < 60 else "to_score" for number in range(600)],
    }
    write("run_pairs", pa.table(pairs), "run_id")
    write("run_pairs", pa.table({**pairs, "run_id": ["other"] * 600}), "run_id")
    write("scores_staging", pa.table({name: values[60:] for name, values in pairs.items()}), "run_id", "market")
    write("relevance_scores", pa.table({name: values for name, values in pairs.items() if name != "state"}), "market")
    return tmp_path


def test_a_run_is_read_from_its_tables(tables: Path) -> None:
    run = read_run(str(tables), "r1")
    assert (run.num_candidates, run.num_scored, run.num_tokens) == (600, 540, 10_800)
    assert run.products_per_query == 20  # three of the 30 queries had nothing to score
    assert run.seconds["scoring"] == 20.0
    for name, num_rows in (("run_pairs", 600), ("scores_staging", 540), ("relevance_scores", 600)):
        parts = "run_id=r1/**/" if name != "relevance_scores" else "**/"
        size = sum(file.stat().st_size for file in (tables / name).glob(f"{parts}*.parquet"))
        assert run.table_bytes[name] == pytest.approx(size / num_rows)


@pytest.mark.parametrize(
    ("run_id", "message"),
    [("died", "it scored nothing, or has not finished"), ("r3", "there is none of this name")],
)
def test_a_run_that_tells_nothing_is_refused(tables: Path, run_id: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_run(str(tables), run_id)


def test_tables_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    pytest.importorskip("deltalake")
    with pytest.raises(InputError, match="cannot be read"):
        read_run(str(tmp_path), "r1")


WORDS = ["--queries", "50000", "--products-per-query", "20", "--bundle", str(DEMO_BUNDLE)]


def test_the_command_shows_the_night_beside_others_and_what_breaks_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--gpus", "4", "--tokens-per-second", "100000"]) == 0
    text = capsys.readouterr().out
    assert "100,000 tokens/s on each of 4 GPUs (from --tokens-per-second); 32 cores for the rest" in text
    rows = {line[:18].strip(): re.findall(".{12}", line[18:]) for line in text.splitlines()}
    assert [cell.strip() for cell in rows["pairs"]] == ["1 M", "1 M", "10 M", "100 M", "1 G", "10 G"]
    gpu_hours, hours = ([float(cell.replace(",", "")) for cell in rows[name]] for name in ("GPU-hours", "hours"))
    assert gpu_hours == pytest.approx([4 * one for one in hours], rel=0.02)
    assert "What breaks first: " in text
    assert text.rstrip().endswith("fits.")


def test_the_command_takes_the_figures_of_a_run(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--cores", "2", "--tables", str(tables), "--run-id", "r1"]
    assert main([*words, "--window-hours", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "on each of 2 cores (from run r1); 2 cores for the rest" in text
    assert "What breaks first: the night is longer than 0.1 hours." in text
    assert text.rstrip().endswith("does not fit.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "expected numbers above 0, not so: --gpus"),
        (["--scored", "1.5"], "--scored is at most 1"),
        (["--tables", "x"], "--tables and --run-id go together"),
        (["--tables", "schema:csrm", "--run-id", "r1"], "--tables 'schema:csrm': expected a folder, got a schema"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(main, [*WORDS, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_another_bundle_is_refused(
    tables: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS[:-1], str(tiny_bundle), "--tables", str(tables), "--run-id", "r1"]
    assert run_job(main, words) == 2
    assert "Name a run of this bundle" in capsys.readouterr().err


def test_a_real_scorer_computes_as_many_tokens_as_foretold() -> None:
    """The demo's golden pairs, each query with all products."""
    bundle = load_bundle(DEMO_BUNDLE)
    golden = bundle.golden_pairs().pairs
    queries, products = golden.columns[:4], golden.columns[4:]
    crossed = golden[queries].head(8).merge(golden[products], how="cross")
    settings = bundle.settings

    def zeros(pack: Pack) -> np.ndarray:
        return np.zeros((len(pack.last_index), len(settings.labels)))

    tokens_per_call = default_tokens_per_call("cpu")
    scorer = PairScorer(bundle.prompt_tokenizer(), settings.labels, pack_scorer=zeros, tokens_per_call=tokens_per_call)
    scorer.score(crossed)
    expected = bundle_figures(bundle).tokens_per_pair(len(golden)) * len(crossed)
    assert scorer.num_tokens == pytest.approx(expected, rel=0.1)
