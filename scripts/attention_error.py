"""Attention error across context lengths: `hf-sparse attention-error`, for launchers that take a file.

python scripts/attention_error.py HuggingFaceTB/SmolLM2-135M --text emozilla/pg19 --lengths 512,1024,2048,4096
accelerate launch --num_processes 2 scripts/attention_error.py HuggingFaceTB/SmolLM2-135M --text texts/
"""

import sys

from hf_sparse.cli import main

if __name__ == "__main__":
    main(["attention-error", *sys.argv[1:]])
