"""The paper's claims as experiments: `hf-sparse theory`, for launchers that take a file.

python scripts/theory.py --output results/theory
python scripts/theory.py --scale full --model HuggingFaceTB/SmolLM2-135M-Instruct --text texts/ --output results/theory
"""

import sys

from hf_sparse.cli import main

if __name__ == "__main__":
    main(["theory", *sys.argv[1:]])
