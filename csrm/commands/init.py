"""Copy the configuration files into a folder, to edit them.

    csrm init conf

The folder then holds the settings of every command, those of clusters in deploy, and the demo's bundle.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import csrm
from csrm.errors import ConfigError

DEFAULT_FOLDER = Path("conf")
"""Where commands look for their configuration file, from the working directory."""

_DEMO_BUNDLE = "demo_bundle"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Copy the configuration files into a folder, to edit them.")
    parser.add_argument("folder", type=Path, help="new or empty; commands look into one named conf by themselves")
    folder: Path = parser.parse_args(argv).folder
    copy_configuration(shipped_configuration(), folder)
    print(f"wrote {folder}: the settings of each command, deploy/ for clusters, {_DEMO_BUNDLE}/ to try them with\n")
    if folder == DEFAULT_FOLDER:
        print("next:")
        print("  csrm jars      once: Delta's jars for Spark")
        print("  csrm doctor    whether a night could run here")
        print("  csrm demo      two nights on generated markets, in build/demo")
        print(f"then edit {folder / 'score_catalog.yaml'}: its markets, inputs and tables. csrm --help shows the way.")
    else:
        print(f"next: edit them, and name them: csrm score-catalog --config {folder / 'score_catalog.yaml'}")
    return 0


def shipped_configuration() -> Path:
    """Folder of the configuration files that came with CSRM: in an installed package, or in a checkout beside it.

    Raises:
        ConfigError: they are not there, as where only the code was copied.
    """
    package = Path(csrm.__path__[0])
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / _DEMO_BUNDLE).is_dir():
            return folder
    raise ConfigError(
        f"csrm init: expected the configuration files in {str(package / 'conf')!r}, found none. Install CSRM as a "
        "wheel, or copy conf/ from its repository."
    )


def copy_configuration(source: Path, folder: Path) -> None:
    """Copy the files. Settings that name the demo's bundle name it in the new folder.

    Raises:
        ConfigError: the folder holds something already, or cannot be written.
    """
    try:
        if folder.exists() and (held := sorted(path.name for path in folder.iterdir())):
            raise ConfigError(
                f"csrm init: expected a new or empty folder, got {str(folder)!r} with {', '.join(held[:3])}"
                f"{', ...' if len(held) > 3 else ''}. Name another folder: nothing is ever overwritten."
            )
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for path in folder.glob("*.yaml"):
            text = path.read_text(encoding="utf-8")
            moved = text.replace(f" conf/{_DEMO_BUNDLE}", f" {(folder / _DEMO_BUNDLE).as_posix()}")
            path.write_text(moved, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"csrm init: {str(folder)!r} cannot be written: {error}. Name another folder.") from error
