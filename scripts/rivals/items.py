"""Texts and questions that every method is measured on.

python scripts/rivals/items.py MODEL --text TEXT ... --offset 30000 --length 4096 --output FOLDER

Writes FOLDER/items.jsonl: texts with the 512 tokens that follow them, and prompts of `hf-sparse retrieval`.
"""

import argparse
import json
from pathlib import Path

from hf_sparse.measure.data import load_documents
from hf_sparse.measure.retrieval_prompts import make_prompts
from hf_sparse.measure.windows import cut_windows
from hf_sparse.share.source import ModelSource

FOLLOWING = 512


def main() -> None:
    """Write the items."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tasks", default="needle-single,needle-multikey,copying")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--asked", type=int, default=2, help="texts, from the first, that questions are about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = ModelSource.find(args.model).tokenizer()
    documents = load_documents(args.text)
    rows = []
    for window in cut_windows(documents, tokenizer, [args.length + FOLLOWING], FOLLOWING, args.offset):
        ids = [*window.input_ids.tolist(), int(window.targets[-1])]
        # The token before those that are predicted is read with them.
        context, after = ids[: args.length], ids[args.length :]
        place = {"kind": "perplexity", "document": window.document, "length": args.length}
        rows.append({**place, "context": context, "after": after})
    windows = cut_windows(documents[: args.asked], tokenizer, [args.length], 1, args.offset)
    for prompt in make_prompts(windows, tokenizer, args.tasks.split(","), args.questions, args.seed, ["prefill"]):
        questions = [
            {"ids": each.input_ids.tolist(), "candidates": [ids.tolist() for ids in each.candidates]}
            for each in prompt.questions
        ]
        place = {"kind": "retrieval", "document": prompt.window.document, "task": prompt.task, "length": args.length}
        rows.append({**place, "context": prompt.input_ids.tolist(), "questions": questions})
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
