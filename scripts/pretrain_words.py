"""Pre-train the embedded words checkpoint on data the script draws; see rlflow/train/worlds.py."""

from rlflow.train.worlds import WORLDS, main

if __name__ == "__main__":
    main(WORLDS["words"])
