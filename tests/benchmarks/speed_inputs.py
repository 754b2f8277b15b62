"""Models and workloads of speed.py, in files that its contenders share.

    python tests/benchmarks/speed_inputs.py build/speed/qwen3 --model qwen3

A model's folder gets, for one and the same weights:

    model/       of a seeded model: a trained folder as jobs/train.py writes it, without the training
    classifier/  the body with a sequence-classification head whose rows are those of the label tokens, for
                 CrossEncoder; onnx/model.onnx in it is its padded graph, by Optimum's own exporter
    fp32/, int8/, int4/
                 bundles of the repository's exporter; those of 8 and 4 bits by the first recipe of their precision,
                 without the quality gate, which needs labels (see export_precisions.py)
    workloads/   pairs with their texts and token ids
    about.json   sizes and tolerances

Queries and products are paired at random, and five random titles augment each query: what is scored does not matter
here, how long it is does.
"""

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from csrm.artefacts.manifest import MANIFEST_NAME, TOKENIZER_NAME, file_digest, write_manifest
from csrm.bundle.contents import Precision
from csrm.bundle.loading import load_bundle
from csrm.market import generate_market
from csrm.market.categories import Storefront, category_markets
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.prompts import ANSWER_CUE, Line, prefix_lines, suffix_lines
from csrm.scoring.scorer import pair_texts
from csrm.scoring.tokenization import Budgets, PromptTokenizer

REPOSITORY = Path(__file__).parents[2]
PACK_TOKENS = 512
NUM_TITLES = 5
PARITY_PAIRS = 48
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
MARKETS = {"us": "en", "kr": "ko", "tw": "zh-TW"}
SEEDED_MODELS = {
    "qwen3": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1536, "vocab_size": 151_936},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 8_192},
}
"""qwen3: 38 M weights in its layers, beside a vocabulary of trained size. tiny: to try the benchmark itself."""
PAIRS = {"qwen3": 120, "gemma": 48, "tiny": 120}
"""Of a run, about; a query is never cut. Spark gets five times as many, so that a job is not all start."""
SPARK_FACTOR = 5

Texts = dict[str, tuple[list[str], list[str]]]
"""Market to its queries and product titles."""


class Workload(NamedTuple):
    """What is scored in one run."""

    products_per_query: int
    markets: tuple[str, ...]
    """Queries are of these in turn."""
    in_spark: bool = False


WORKLOADS = {
    **{f"12-{language}": Workload(12, (market,)) for market, language in MARKETS.items()},
    "100": Workload(100, tuple(MARKETS)),
    "1": Workload(1, tuple(MARKETS)),
    "spark-12": Workload(12, tuple(MARKETS), in_spark=True),
}


def read_texts(data: Path | None) -> Texts:
    """Queries and titles of each market: of the generated market, or of a folder of real text.

    The folder holds esci_us (English), taobao_zh (Chinese in Taiwan's characters), and shopify_taxonomy, of whose names
    the Korean market is made.
    """
    if data is None:
        market = generate_market(7, MARKETS, num_products=2_000, num_queries=300)
        catalog = market.catalog.dropna(subset="title")
        return {
            name: (
                market.queries.loc[market.queries["market"] == name, "query"].tolist(),
                catalog.loc[catalog["market"] == name, "title"].tolist(),
            )
            for name in MARKETS
        }
    judged = _read_tsv(data / "esci_us" / "judgments.tsv.gz")
    taobao = data / "taobao_zh"
    matching = _read_tsv(taobao / "query_item_matching.tsv.gz")
    korean = category_markets(data / "shopify_taxonomy", [Storefront("kr", "ko", None)], ("ko",), 0.0, 0)
    return {
        "us": (
            judged["query"].unique().tolist(),
            pd.read_parquet(data / "esci_us" / "products.parquet")["title"].tolist(),
        ),
        "kr": (korean.queries["query"].tolist(), korean.catalog["title"].dropna().tolist()),
        "tw": (matching["query_zh_tw"].unique().tolist(), matching["title_zh_tw"].unique().tolist()),
    }


def draw_pairs(texts: Texts, workload: Workload, num_pairs: int) -> pd.DataFrame:
    """About num_pairs pairs of whole queries: PAIR_COLUMNS, query_id and product_id."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(max(1, round(num_pairs / workload.products_per_query))):
        market = workload.markets[number % len(workload.markets)]
        queries, titles = texts[market]
        chosen = rng.choice(len(titles), NUM_TITLES + workload.products_per_query, replace=False)
        retrieved, products = np.split(chosen, [NUM_TITLES])
        query = {
            "market": market,
            "language": MARKETS[market],
            "query_id": f"q{number:06}",
            "query": queries[number % len(queries)],
            "retrieved_titles": [titles[place] for place in retrieved],
        }
        rows += [query | {"product_id": f"p{place:06}", "title": titles[place]} for place in products]
    return pd.DataFrame(rows).assign(brand=None, category=None, attributes=None)


def with_prompts(pairs: pd.DataFrame, tokenizer: PromptTokenizer) -> pd.DataFrame:
    """Pairs with prefix and suffix, texts that name them, and prefix_ids and suffix_ids, their tokens."""
    queries, products = zip(*pair_texts(pairs), strict=True)
    return pairs.assign(
        prefix=[_text(prefix_lines(query)) for query in queries],
        suffix=[_text(suffix_lines(product)) + ANSWER_CUE for product in products],
        prefix_ids=tokenizer.prefix_ids(queries),
        suffix_ids=tokenizer.suffix_ids(products),
    )


def write_workloads(folder: Path, texts: Texts, num_pairs: int) -> None:
    """The pairs of each workload, for the tokenizer of the folder's bundle."""
    tokenizer = load_bundle(folder / "fp32").prompt_tokenizer()
    (folder / "workloads").mkdir(exist_ok=True)
    for name, workload in WORKLOADS.items():
        pairs = draw_pairs(texts, workload, num_pairs * (SPARK_FACTOR if workload.in_spark else 1))
        with_prompts(pairs, tokenizer).to_pickle(folder / "workloads" / f"{name}.pkl")


def seeded_language_model(sizes: Mapping[str, int]) -> Any:
    """A random Qwen3 model.

    Its weights are large enough that scores differ from pair to pair, and the embeddings so much larger than what the
    layers add that 8 and 4 bits move the scores little: 38 M weights all of one size scramble them at 4 bits.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    width = sizes["hidden_size"] ** 0.5
    heads = sizes["hidden_size"] // 64
    shape = {"num_attention_heads": max(2, heads), "num_key_value_heads": max(1, heads // 2), "head_dim": 64, **sizes}
    config = Qwen3Config(**shape, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.9 / width)
    language_model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        language_model.model.embed_tokens.weight /= config.initializer_range
        language_model.model.norm.weight.fill_(2 / width)  # logits with a standard deviation of about 2
    return language_model


def write_seeded_model(folder: Path, name: str, tokenizer_file: Path) -> None:
    """A random Qwen3 model as a trained folder."""
    from csrm.training.trained import MODEL_KIND, ModelCard

    card = ModelCard(
        base_model={"folder": str(folder / "weights")},
        base_model_files={},
        tuning={"method": "full"},
        labels=ESCI_LABELS,
        budgets=Budgets(),
        pack_tokens=PACK_TOKENS,
        num_packs=0,
        loss=float("nan"),
        fingerprint="",
        versions={},
    )
    seeded_language_model(SEEDED_MODELS[name]).save_pretrained(folder / "weights")
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_NAME)
    (folder / "model.json").write_text(json.dumps(asdict(card)), encoding="utf-8")
    write_manifest(folder, MODEL_KIND)


def write_classifier(model_dir: Path, folder: Path) -> dict[str, float | str]:
    """The trained folder's model for sequence classification, in torch and as a padded graph; returns its sizes."""
    import torch
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    from csrm.export.packed_onnx import OPSET
    from csrm.training.trained import load_trained

    model, _, card = load_trained(model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / TOKENIZER_NAME))
    special_ids = [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    if not special_ids:
        raise SystemExit(f"{model_dir}: its tokenizer has no special token, which no prompt holds, to pad with")
    padding_id = min(special_ids)
    padding = tokenizer.id_to_token(padding_id)
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels, config.pad_token_id = len(card.labels), padding_id
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    classifier.model.load_state_dict(model.language_model.get_decoder().state_dict())
    classifier.score.weight.data = model.label_rows().detach().clone()
    classifier.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=padding).save_pretrained(folder)
    # Optimum has the graph of every decoder, but lists some (gemma3_text) without this task.
    task = {"exporter": "onnx", "model_type": config.model_type, "library_name": "transformers"}
    exporter = TasksManager.get_exporter_config_constructor(task="feature-extraction", **task)
    (folder / "onnx").mkdir()
    graph_config = type(exporter(config))(config, task="text-classification")
    export(classifier, graph_config, folder / "onnx" / "model.onnx", opset=OPSET)
    layers = classifier.model.layers
    return {
        "base_model": str(card.base_model.get("gguf_file") or Path(card.base_model["folder"] or "").parent.name),
        "num_parameters": sum(weight.numel() for weight in classifier.model.parameters()),
        "layer_weights": sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2),
    }


def write_bundles(model_dir: Path, folder: Path, pairs: pd.DataFrame) -> None:
    """The trained folder's bundles of all precisions."""
    from csrm.export.bundle import export_bundle
    from csrm.export.trials import write_best_precision
    from csrm.scoring.runtime import load_pack_scorer

    exact = export_bundle(model_dir, folder / "fp32", pairs)
    graph = exact.folder / "model.onnx"
    settings = exact.settings.model_copy(update={"precisions": ()})
    for precision in PRECISIONS[1:]:
        bundle = folder / precision
        bundle.mkdir()
        shutil.copyfile(exact.folder / TOKENIZER_NAME, bundle / TOKENIZER_NAME)
        scorer, _ = load_pack_scorer(graph, "cpu")
        sample, golden = pairs.iloc[:8], exact.golden_pairs()  # spread over packs is measured on the sample
        write_best_precision(graph, scorer, [precision], False, sample, None, None, golden, settings, bundle)


def code_digest(*patterns: str) -> str:
    """sha256 of source files, by patterns relative to the repository."""
    digest = hashlib.sha256()
    for path in _files(patterns):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files(patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(REPOSITORY.glob(pattern))


def _text(lines: Sequence[Line]) -> str:
    return "".join(line.start + line.text for line in lines)


def _read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument("--model", required=True, help=f"one of {', '.join(SEEDED_MODELS)}, or a trained folder")
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY / "conf" / "demo_bundle" / TOKENIZER_NAME)
    parser.add_argument("--data", type=Path, help="folder of real text; without it: the generated market's")
    parser.add_argument("--pairs", type=int, required=True, help="of a run, about")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts = read_texts(args.data)
    made_from = {
        "model": args.model if args.model in SEEDED_MODELS else file_digest(Path(args.model) / MANIFEST_NAME),
        "tokenizer": file_digest(args.tokenizer),
        "code": code_digest(
            "csrm/export/*.py", "csrm/scoring/*.py", "csrm/training/**/*.py", "tests/benchmarks/speed_inputs.py"
        ),
    }
    about = args.folder / "about.json"
    if not about.exists() or json.loads(about.read_text(encoding="utf-8"))["made_from"] != made_from:
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
        model_dir = Path(args.model)
        if args.model in SEEDED_MODELS:
            model_dir = args.folder / "model"
            write_seeded_model(model_dir, args.model, args.tokenizer)
        sizes = write_classifier(model_dir, args.folder / "classifier")
        pairs = pd.concat([draw_pairs(texts, WORKLOADS[f"12-{language}"], 24) for language in MARKETS.values()])
        write_bundles(model_dir, args.folder, pairs.head(PARITY_PAIRS).reset_index(drop=True))
        tolerances = {
            precision: load_bundle(args.folder / precision).settings.golden_tolerance for precision in PRECISIONS
        }
        made = {"made_from": made_from, **sizes, "tolerances": tolerances}
        about.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    write_workloads(args.folder, texts, args.pairs)


if __name__ == "__main__":
    main()
