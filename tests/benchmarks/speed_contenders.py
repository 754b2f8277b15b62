"""The contenders of speed.py, each in a process of its own.

    python tests/benchmarks/speed_contenders.py ours-fp32 FOLDER_OF_A_MODEL --threads 2

Loads, says so in a line of JSON, then scores a workload for each line of input ({"workload": ..., "scores": a file for
them}) and answers with what it cost.

CrossEncoder and predict_batch_udf get token ids from a table instead of tokenising, so that all score the very same
tokens; that much work they are spared.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from csrm.bundle.loading import load_bundle, load_scorer
from csrm.scoring.labels import expected_gain
from csrm.scoring.scorer import PAIR_COLUMNS

BATCH_SIZE = 32
"""CrossEncoder's default."""
MATMUL_SHAPE = (512, 1024, 2048)
"""Tokens of a pack, and weights of a middling layer."""
MATMUL_SECONDS = 0.3
PAIR_SCHEMA = (
    "market string, language string, query string, retrieved_titles array<string>, title string, brand string, "
    "category string, attributes map<string,string>, query_id string, product_id string, prefix string, suffix string"
)

Run = Callable[[pd.DataFrame], tuple[np.ndarray, int]]
"""Pairs to their scores, shape (num_pairs,), and the number of tokens that had to be computed, without padding."""


def label_gains(folder: Path) -> np.ndarray:
    return np.array([label.gain for label in load_bundle(folder / "fp32").settings.labels])


def token_table(pairs: pd.DataFrame) -> dict[str, list[int]]:
    """Text of each prefix and suffix to its tokens."""
    return dict(zip(pairs["prefix"], pairs["prefix_ids"], strict=True)) | dict(
        zip(pairs["suffix"], pairs["suffix_ids"], strict=True)
    )


def num_prompt_tokens(pairs: pd.DataFrame) -> int:
    return int(pairs["prefix_ids"].map(len).sum() + pairs["suffix_ids"].map(len).sum())


def session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


def cross_encoder(folder: Path, threads: int, backend: str) -> Run:
    """CrossEncoder.predict with its defaults: batches of 32, sorted by the length of their texts."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(threads)

    class TokenTable(PreTrainedTokenizerFast):
        """Looks token ids up."""

        ids: dict[str, list[int]]

        def __call__(self, text: Sequence[tuple[str, str]], **options: Any) -> Any:
            prompts = [[*self.ids[prefix], *self.ids[suffix]] for prefix, suffix in text]
            return self.pad({"input_ids": prompts}, return_tensors=options["return_tensors"])

    options = {"provider": "CPUExecutionProvider", "session_options": session_options(threads)}
    model_kwargs = options if backend == "onnx" else {}
    model = CrossEncoder(
        str(folder / "classifier"), device="cpu", backend=backend, local_files_only=True, model_kwargs=model_kwargs
    )
    table = TokenTable.from_pretrained(folder / "classifier")
    model[0].processor = table
    gains = label_gains(folder)

    def run(pairs: pd.DataFrame) -> tuple[np.ndarray, int]:
        table.ids = token_table(pairs)
        logits = model.predict(list(zip(pairs["prefix"], pairs["suffix"], strict=True)), show_progress_bar=False)
        return expected_gain(logits, gains), num_prompt_tokens(pairs)

    return run


def padded_scorer(folder: Path, threads: int) -> Callable[[Sequence[Sequence[int]]], np.ndarray]:
    """Scores of one batch of prompts, padded to the longest, by the padded graph in ONNX Runtime."""
    import onnxruntime

    classifier = folder / "classifier"
    path = str(classifier / "onnx" / "model.onnx")
    padding_id = json.loads((classifier / "config.json").read_text(encoding="utf-8"))["pad_token_id"]
    session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    gains = label_gains(folder)

    def score(prompts: Sequence[Sequence[int]]) -> np.ndarray:
        mask = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
        input_ids = np.full_like(mask, padding_id)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        (logits,) = session.run(["logits"], {"input_ids": input_ids, "attention_mask": mask})
        return expected_gain(logits, gains)

    return score


def padded_onnx(folder: Path, threads: int) -> Run:
    """Batches of 32 prompts sorted by their number of tokens. It is spared tokenising, too."""
    score = padded_scorer(folder, threads)

    def run(pairs: pd.DataFrame) -> tuple[np.ndarray, int]:
        prompts = [[*prefix, *suffix] for prefix, suffix in zip(pairs["prefix_ids"], pairs["suffix_ids"], strict=True)]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        scores = np.empty(len(prompts), dtype=np.float32)
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            scores[rows] = score([prompts[row] for row in rows])
        return scores, num_prompt_tokens(pairs)

    return run


def ours(folder: Path, threads: int, precision: str) -> Run:
    """PairScorer, which makes prompts, tokens and packs of the texts. All golden pairs are scored first."""
    scorer = load_scorer(folder / precision, "cpu", threads=threads, num_golden=None)

    def run(pairs: pd.DataFrame) -> tuple[np.ndarray, int]:
        before = scorer.num_tokens
        scores = scorer.score(pairs[PAIR_COLUMNS])["relevance_score"].to_numpy()
        return scores, scorer.num_tokens - before

    return run


class SparkTables:
    """Workloads as cached Spark tables, so that a run does not pay for its input."""

    def __init__(self, threads: int) -> None:
        from csrm.spark.session import build_session

        self.spark = build_session("csrm-bench-speed")
        num_cores = self.spark.sparkContext.defaultParallelism
        if num_cores != threads:  # local[*] takes the cores that the process may use
            raise SystemExit(f"Spark runs {num_cores} tasks at a time, expected {threads}")
        self._threads = threads
        self._cached: tuple[pd.DataFrame, Any] | None = None

    def table(self, pairs: pd.DataFrame) -> Any:
        """Pairs in four equal parts for each core."""
        if self._cached is None or self._cached[0] is not pairs:
            columns = [field.split()[0] for field in PAIR_SCHEMA.split(", ")]
            pairs_df = self.spark.createDataFrame(pairs[columns].to_dict("records"), PAIR_SCHEMA)
            pairs_df = pairs_df.repartition(4 * self._threads).cache()
            pairs_df.count()
            self._cached = (pairs, pairs_df)
        return self._cached[1]


def spark_udf(folder: Path, threads: int) -> Run:
    """predict_batch_udf with the padded graph, one thread a task; batches of 32 pairs in the order of the rows."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import FloatType

    tables = SparkTables(threads)

    def make_udf(table_file: str) -> Any:
        def make_predict_fn() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
            score, ids = padded_scorer(folder, 1), pd.read_pickle(table_file)

            def predict(prefixes: np.ndarray, suffixes: np.ndarray) -> np.ndarray:
                return score([[*ids[prefix], *ids[suffix]] for prefix, suffix in zip(prefixes, suffixes, strict=True)])

            return predict

        return predict_batch_udf(make_predict_fn, return_type=FloatType(), batch_size=BATCH_SIZE)

    udfs: dict[int, Any] = {}

    def run(pairs: pd.DataFrame) -> tuple[np.ndarray, int]:
        if id(pairs) not in udfs:  # Spark keeps the model of a udf in its workers
            table_file = str(folder / "workloads" / "token_table.pkl")
            pd.to_pickle(token_table(pairs), table_file)
            udfs[id(pairs)] = make_udf(table_file)
        score = udfs[id(pairs)]("prefix", "suffix").alias("relevance_score")
        scored = tables.table(pairs).select("query_id", "product_id", score).toPandas()
        return in_order(pairs, scored), num_prompt_tokens(pairs)

    return run


def spark_ours(folder: Path, threads: int) -> Run:
    """The operator of the nightly job behind its layout, which shuffles the pairs; fp32, one thread a task."""
    from pyspark.sql import functions as F

    from csrm.night.plan import num_scoring_partitions, with_scoring_layout
    from csrm.spark.progress import ScoringProgress
    from csrm.spark.scoring import ScorerPlace, with_relevance_score

    tables = SparkTables(threads)
    bundle = load_bundle(folder / "fp32")

    def run(pairs: pd.DataFrame) -> tuple[np.ndarray, int]:
        progress = ScoringProgress(tables.spark, len(pairs), stream=io.StringIO())
        pairs_df = tables.table(pairs).drop("prefix", "suffix").withColumn("pair_key", F.lit(0).cast("long"))
        laid_out_df = with_scoring_layout(pairs_df, num_scoring_partitions(len(pairs), threads), 256)
        scored_df = with_relevance_score(
            laid_out_df,
            ScorerPlace(str(bundle.folder)),
            bundle_digest=bundle.digest,
            run_id="bench",
            progress=progress,
        )
        scored = scored_df.select("query_id", "product_id", "relevance_score").toPandas()
        return in_order(pairs, scored), progress.num_tokens.value

    return run


def in_order(pairs: pd.DataFrame, scored: pd.DataFrame) -> np.ndarray:
    """Scores in the order of the pairs; an absent one is NaN."""
    key = ["query_id", "product_id"]
    return pairs[key].merge(scored, on=key, how="left", validate="1:1")["relevance_score"].to_numpy()


def matmul_rates(threads: int) -> Callable[[], dict[str, float]]:
    """Measures the multiplications and additions a second of matrix products, whichever library is the fastest."""
    import onnx
    import onnxruntime
    import torch
    from onnx import TensorProto, helper, numpy_helper

    torch.set_num_threads(threads)
    rows, inner, columns = MATMUL_SHAPE
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    small_left, small_right = left.mul(30).to(torch.int8), right.mul(30).to(torch.int8)
    tensors = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("left", (rows, inner)), ("product", (rows, columns)))
    ]
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    weights = numpy_helper.from_array(right.numpy(), "right")
    graph = helper.make_graph([node], "matmul", *tensors, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(threads))
    feeds = {"left": left.numpy()}
    products: dict[str, list[Callable[[], object]]] = {
        "fp32": [lambda: torch.mm(left, right), lambda: session.run(None, feeds)],
        "int8": [lambda: torch._int_mm(small_left, small_right)],
    }

    def rate(product: Callable[[], object]) -> float:
        product()
        fastest, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            product()
            fastest = min(fastest, time.perf_counter() - start)
        return 2.0 * rows * inner * columns / fastest

    return lambda: {name: max(map(rate, ways)) for name, ways in products.items()}


LOADERS: dict[str, Callable[[Path, int], Run]] = {
    "crossencoder": lambda folder, threads: cross_encoder(folder, threads, "torch"),
    "crossencoder-onnx": lambda folder, threads: cross_encoder(folder, threads, "onnx"),
    "padded-onnx": padded_onnx,
    **{
        f"ours-{precision}": lambda folder, threads, precision=precision: ours(folder, threads, precision)
        for precision in ("fp32", "int8", "int4")
    },
    "spark-udf": spark_udf,
    "spark-ours": spark_ours,
}
MATMUL = "matmul"
"""Not a contender: the rate of the machine, measured in turn with them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=[*LOADERS, MATMUL])
    parser.add_argument("folder", type=Path, help="of the model, made by speed_inputs.py")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    measure = matmul_rates(args.threads) if args.contender == MATMUL else None
    run = LOADERS[args.contender](args.folder, args.threads) if measure is None else None
    print(json.dumps({"loaded": args.contender}), file=answers, flush=True)
    workloads: dict[str, pd.DataFrame] = {}
    for line in sys.stdin:
        if run is None:
            assert measure is not None
            print(json.dumps(measure()), file=answers, flush=True)
            continue
        order = json.loads(line)
        if order["workload"] not in workloads:
            workloads[order["workload"]] = pd.read_pickle(order["workload"])
        pairs = workloads[order["workload"]]
        start = time.perf_counter()
        scores, num_tokens = run(pairs)
        seconds = time.perf_counter() - start
        np.save(order["scores"], scores)
        print(json.dumps({"seconds": seconds, "num_tokens": num_tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
