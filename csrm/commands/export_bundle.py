"""Export a trained model, or a reranker as it is, to a bundle for ONNX Runtime, after proof that it scores alike.

python export/export_bundle.py --config conf/export_bundle.yaml --precision auto --device cpu
"""

import time
from collections.abc import Sequence
from pathlib import Path

from csrm.artefacts.tracking import check_reached, register_bundle
from csrm.bundle.card import bundle_card
from csrm.cli import job_parser, job_settings
from csrm.export.bundle import export_bundle
from csrm.export.ensemble import export_ensemble
from csrm.export.pairs import proof_pairs
from csrm.export.settings import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(__doc__, "conf/export_bundle.yaml")
    parser.add_argument("--precision", help="replaces the setting: auto, fp32, fp16, bf16, int8 or int4")
    parser.add_argument("--device", help="replaces the setting: cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    named = [f"{name}={getattr(args, name)}" for name in ("precision", "device") if getattr(args, name)]
    config = job_settings(args, ExportConfig, [*args.overrides, *named])
    start = time.monotonic()
    check_reached(config.tracking)
    pairs, judged = proof_pairs(config)
    bundle_dir = Path(config.bundle_dir)
    if config.ensemble is not None:
        bundle = export_ensemble(
            config.ensemble,
            bundle_dir,
            pairs=pairs,
            judged=judged,
            precision=config.precision,
            device=config.device,
            grade_labels=config.grade_labels,
            vote=config.vote,
        )
    else:
        bundle = export_bundle(
            config.model,
            bundle_dir,
            pairs,
            judged,
            config.precision,
            config.device,
            config.grade_labels,
            grade_costs=config.grade_costs,
            vote=config.vote,
        )
    card = bundle_card(bundle)
    print(card)
    print(f"\nexported in {time.monotonic() - start:.0f} s; look at it again: csrm bundle show {bundle.folder}")
    if config.tracking is not None:
        uri = register_bundle(
            bundle.folder,
            card,
            config,
            name=config.registered_model_name,
            digest=bundle.digest,
            trained_model=bundle.settings.origin.trained_model or "",
        )
        print(f"registered as {uri}")
    return 0
