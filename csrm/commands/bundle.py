"""Show a bundle, or prove that it scores here as it did where it was exported.

csrm bundle show FOLDER      what it is, how good, how big, how fast, for which device
csrm bundle verify FOLDER    the same, after all its golden pairs were scored here
"""

import argparse
from collections.abc import Sequence

from csrm.bundle.card import bundle_card
from csrm.bundle.loading import load_bundle, load_scorer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="csrm bundle", description="Look at a bundle, or prove it here.")
    parser.add_argument("action", choices=["show", "verify"])
    parser.add_argument("folder", help="folder of the bundle, or its URI")
    parser.add_argument("--device", default="cpu", help="verify: cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    bundle = load_bundle(args.folder)
    print(bundle_card(bundle))
    if args.action == "verify":
        scorer = load_scorer(bundle.folder, args.device, num_golden=None)
        print(
            f"\nverified: every file is as it was exported, and {len(bundle.golden_pairs())} golden pairs have their "
            f"scores on {args.device} ({scorer.provider})"
        )
    return 0
