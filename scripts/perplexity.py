"""Perplexity across context lengths, dense against sparse: `hf-sparse perplexity`, for launchers that take a file.

python scripts/perplexity.py HuggingFaceTB/SmolLM2-135M --text emozilla/pg19 --lengths 512,1024,2048,4096
accelerate launch --num_processes 2 scripts/perplexity.py HuggingFaceTB/SmolLM2-135M --text texts/ --output results/run
"""

import sys

from hf_sparse.cli import main

if __name__ == "__main__":
    main(["perplexity", *sys.argv[1:]])
