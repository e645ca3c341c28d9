"""Pre-train the embedded words checkpoint on data the script draws; see rlflow/pretrain/worlds.py."""

from pathlib import Path

from rlflow.pretrain.worlds import WORLDS, main

ASSETS = Path(__file__).parents[1] / "rlflow" / "assets"

if __name__ == "__main__":
    main(WORLDS["words"], out=ASSETS / "words")
