"""Show a bundle or an encoder, compare those of a folder, or prove one on this machine.

csrm bundle show FOLDER      what it is, how good, how big, how fast, for which device
csrm bundle verify FOLDER    the same, after all its golden pairs were scored here, or its golden texts embedded
csrm bundle list FOLDER      every bundle below a folder, one a line, the newest first
"""

import argparse
from collections.abc import Sequence

from csrm.artefacts.cache import artefact_kind, fetch_folder
from csrm.artefacts.manifest import GOLDEN_NAME
from csrm.bundle.card import bundle_card, bundle_rows, find_bundles
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.embedding.card import encoder_card
from csrm.embedding.contents import ENCODER_KIND, GoldenTexts
from csrm.embedding.encoder import load_encoder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="csrm bundle", description="Look at a bundle or encoder, or prove it here.")
    parser.add_argument("action", choices=["show", "verify", "list"])
    parser.add_argument("folder", help="folder of the bundle or encoder, or its URI; list: a folder of this machine")
    parser.add_argument("--device", default="cpu", help="verify: cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    if args.action == "list":
        print("\n".join(bundle_rows(find_bundles(args.folder))))
        return 0
    if artefact_kind(args.folder) == ENCODER_KIND:
        folder = fetch_folder(args.folder, ENCODER_KIND)
        print(encoder_card(str(folder)))
        if args.action == "verify":
            encoder = load_encoder(folder, args.device)
            num_texts = len(GoldenTexts.read(folder / GOLDEN_NAME).texts)
            _say_verified(f"{num_texts} golden texts have their vectors", args.device, encoder.provider)
        return 0
    bundle = load_bundle(args.folder)
    print(bundle_card(bundle))
    if args.action == "verify":
        scorer = load_scorer(bundle.folder, args.device, num_golden=None)
        _say_verified(f"{len(bundle.golden_pairs())} golden pairs have their scores", args.device, scorer.provider)
    return 0


def _say_verified(what: str, device: str, provider: str) -> None:
    print(f"\nverified: every file is as it was exported, and {what} on {device} ({provider})")
