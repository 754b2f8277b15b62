"""How long a night takes, what it needs, and what breaks first."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from csrm.bundle.loading import load_bundle
from csrm.capacity.figures import bundle_figures, read_run, with_run
from csrm.capacity.formula import Machines, Plan
from csrm.capacity.report import capacity_report, find_limits, search_report
from csrm.capacity.search import SearchPlan, encoder_rate
from csrm.config import folder_of_tables
from csrm.embedding.encoder import read_encoder
from csrm.errors import ConfigError
from csrm.night.settings import BROADCAST_LIMIT_MB


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="csrm capacity", description="How long a night takes, what it needs, and what breaks first."
    )
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--products-per-query", type=float, required=True)
    parser.add_argument("--bundle", required=True, help="folder of the bundle, or its URI")
    parser.add_argument("--gpus", type=int, help="that score; default: cores do")
    parser.add_argument("--cores", type=int, help="of the executors; default: 8 for each GPU, else this machine's")
    parser.add_argument(
        "--scored", type=float, default=1.0, help="share of the pairs that the night scores; default: 1"
    )
    parser.add_argument("--markets", type=int, default=1, help="default: 1")
    parser.add_argument("--tokens-per-second", type=float, help="of the model on one GPU or core")
    parser.add_argument("--tables", help="with --run-id: CSRM's tables: their folder, or schema:NAME?folder=URI")
    parser.add_argument("--run-id", help="a finished run of this bundle, whose figures are used")
    parser.add_argument("--run-gpus", type=int, help="that the run had; default: those of --gpus")
    parser.add_argument("--run-cores", type=int, help="that the run had; default: those of --cores")
    parser.add_argument("--window-hours", type=float, default=8.0, help="how long a night may take; default: 8")
    parser.add_argument(
        "--broadcast-limit-mb", type=float, default=BROADCAST_LIMIT_MB, help="as configured; default: %(default)s"
    )
    parser.add_argument("--driver-memory-gb", type=float, default=4.0, help="spark.driver.memory; default: 4")
    parser.add_argument("--storage-gb", type=float, help="that the tables may take; default: any")
    parser.add_argument(
        "--products", type=int, help="with --encoder: of all markets; shows what search by meaning takes"
    )
    parser.add_argument("--encoder", help="folder of the encoder, or its URI")
    parser.add_argument(
        "--texts-per-second", type=float, help="of the encoder on one GPU or core; default: measured here, on one core"
    )
    parser.add_argument("--new-texts", type=float, default=1.0, help="share of texts without a vector yet; default: 1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    bundle = load_bundle(args.bundle)
    figures = bundle_figures(bundle, args.tokens_per_second, device="cpu" if args.gpus is None else "cuda")
    source = "the bundle's export, a rough figure" if args.tokens_per_second is None else "--tokens-per-second"
    if args.run_id is not None:
        run = read_run(folder_of_tables(args.tables, "--tables"), args.run_id)
        if run.bundle_digest != bundle.digest:
            raise ConfigError(
                f"--run-id {args.run_id!r}: scored with bundle {run.bundle_digest[:12]}, expected {bundle.digest[:12]} "
                "of --bundle. Name a run of this bundle."
            )
        figures, source = with_run(figures, run, _machines(args, "run_")), f"run {args.run_id}"
        if args.tokens_per_second is not None:
            figures = replace(figures, tokens_per_s=args.tokens_per_second)
            source = "--tokens-per-second"
    plan = Plan(figures, _machines(args), args.products_per_query, args.scored, args.markets)
    products = max(1.0, args.scored * args.products_per_query)
    cores = f"{plan.machines.cores} cores"
    slots = cores if args.gpus is None else f"{args.gpus} GPUs"
    print(
        f"bundle {bundle.digest[:12]} ({bundle.settings.precision}): {figures.prefix_tokens:.1f} tokens of a query "
        f"with its titles, {figures.suffix_tokens:.1f} of a product, calls of {figures.tokens_per_call}\n"
        f"{figures.tokens_per_pair(products):.1f} tokens are computed for a pair, {products:g} pairs of a query\n"
        f"{figures.tokens_per_s:,.0f} tokens/s on each of {slots} (from {source}); {cores} for the rest\n"
    )
    limits = find_limits(plan, args.window_hours, args.broadcast_limit_mb, args.driver_memory_gb, args.storage_gb)
    print(capacity_report(plan, args.queries, limits, args.gpus))
    if args.encoder is not None:
        settings, digest, _ = read_encoder(args.encoder)
        rate = args.texts_per_second or encoder_rate(args.encoder)
        search = SearchPlan(settings.dimensions, rate, plan.machines, args.new_texts, args.markets)
        measured = "measured here" if args.texts_per_second is None else "--texts-per-second"
        print(
            f"\nencoder {digest[:12]}: {settings.dimensions} dimensions; {rate:,.0f} texts/s on each of {slots} (from "
            f"{measured}); {cores} compare vectors\n\n{search_report(search, args.products, args.queries, args.gpus)}"
        )
    return 0


def _machines(args: argparse.Namespace, prefix: str = "") -> Machines:
    """Those of the night, or with run_ those of the run, which are the same where nothing else is said."""
    gpus = args.gpus if getattr(args, f"{prefix}gpus") is None else getattr(args, f"{prefix}gpus")
    cores = args.cores if getattr(args, f"{prefix}cores") is None else getattr(args, f"{prefix}cores")
    if cores is None:
        cores = 8 * gpus if gpus is not None else os.cpu_count() or 1
    return Machines(cores if gpus is None else gpus, cores)


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ConfigError: a number that makes no sense, or an argument without the one that it goes with.
    """
    above_0 = [name for name, value in vars(args).items() if isinstance(value, int | float) and value <= 0]
    if above_0 or max(args.scored, args.new_texts) > 1 or args.products_per_query < 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in above_0)
        raise ConfigError(
            f"expected numbers above 0{f', not so: {names}' if names else ''}; --scored is at most 1, as is "
            "--new-texts, --products-per-query at least 1."
        )
    if (args.products is None) != (args.encoder is None):
        raise ConfigError("--products and --encoder go together: the products, and what embeds their titles.")
    if args.encoder is not None and args.gpus is not None and args.texts_per_second is None:
        raise ConfigError("--texts-per-second: expected the encoder's rate on one GPU, got none. Measure it there.")
    if (args.tables is None) != (args.run_id is None):
        raise ConfigError("--tables and --run-id go together: the folder of the tables, and the run in it.")
