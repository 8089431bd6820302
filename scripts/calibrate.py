"""Calibration of a law for every head: `hf-sparse calibrate`, as a file.

python scripts/calibrate.py HuggingFaceTB/SmolLM2-135M --text texts/ --held-out other-texts/ --target density=0.1@4096
"""

import sys

from hf_sparse.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
