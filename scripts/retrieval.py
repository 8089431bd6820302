"""Retrieval from long texts: `hf-sparse retrieval`, for launchers that take a file.

python scripts/retrieval.py HuggingFaceTB/SmolLM2-135M-Instruct --text emozilla/pg19 --lengths 1024,2048,4096
accelerate launch --num_processes 2 scripts/retrieval.py HuggingFaceTB/SmolLM2-135M-Instruct --text texts/ --mode both
"""

import sys

from hf_sparse.cli import main

if __name__ == "__main__":
    main(["retrieval", *sys.argv[1:]])
