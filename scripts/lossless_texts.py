"""Is the text of lossless generation that of dense decoding, what is accepted, and how long does a token take?

python scripts/lossless_texts.py MODEL --text TEXT ... --lengths 4096,8192,16384 --output FOLDER  # resumes
python scripts/lossless_texts.py MODEL --dtype bfloat16 --sample --output FOLDER  # Python's language reference

Each prompt is read densely once; dense decoding (stock attention, on a cache that grows in place) and lossless
generation both go on from copies of its cache. FOLDER/records.jsonl gets a record for every prompt, and tables.md the
table that is printed. Where texts differ, `gap` is by how much the dense model prefers its own token in a pass over
one token, and `gaps_in_checks` in passes over 2, 3, ...: of different sign, the dense model disagrees with itself.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.bench.generation import Clock
from hf_sparse.measure.data import load_documents
from hf_sparse.measure.windows import cut_windows
from hf_sparse.patching.caches import cache_argument
from hf_sparse.results import ResultFile, markdown_table, provenance, record_key, resume, text_table
from hf_sparse.share.source import ModelSource

GAPS = ("gap", "gaps_in_checks")
HEADER = ("length", "prompts", "same text", "accepted", "tokens a check", "plain", "ms dense", "ms lossless", "ratio")
WIDEST = 9
"""Tokens of the widest pass in which the dense model is asked again."""


def continued(generate: Callable[..., Tensor], ids: Tensor, args: argparse.Namespace) -> tuple[list[int], float]:
    """The new tokens, and seconds for each but the first."""
    torch.manual_seed(args.seed)
    clock = Clock(ids.device)
    options: dict[str, Any] = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    out = generate(ids, attention_mask=torch.ones_like(ids), do_sample=args.sample, streamer=clock, **options)
    _, first, *later = clock.times
    return out[0, ids.shape[1] :].tolist(), (later[-1] - first) / len(later)


@torch.no_grad()
def compared(model: PreTrainedModel, prompt: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Both texts after one prompt, int64 `(tokens,)`."""
    ids, cache = prompt[None].to(model.device), hf_sparse.SparseCache(model.config.get_text_config())
    model(ids[:, :-1], **cache_argument(model, cache), logits_to_keep=1)
    dense, dense_seconds = continued(partial(model.generate, **cache_argument(model, copy.deepcopy(cache))), ids, args)
    with hf_sparse.patched(model):
        lossless = partial(hf_sparse.generate_lossless, model, **cache_argument(model, copy.deepcopy(cache)))
        ours, seconds = continued(lossless, ids, args)
        drafts = asdict(hf_sparse.report(model).drafts)
    same = next((i for i, (one, other) in enumerate(zip(dense, ours, strict=True)) if one != other), len(dense))
    found = {"same_tokens": same, "dense_seconds": dense_seconds, "seconds": seconds, "drafts": drafts}
    if same < len(dense):
        text = torch.cat([ids, torch.tensor([dense[:same]], device=ids.device)], dim=1)
        gaps = []
        for queries in range(1, min(WIDEST, same + 1) + 1):
            past = cache_argument(model, copy.deepcopy(cache))
            if text.shape[1] - queries > ids.shape[1] - 1:
                model(text[:, ids.shape[1] - 1 : -queries], **past)
            logits = model(text[:, -queries:], **past).logits[0, -1]
            gaps.append(float(logits[dense[same]] - logits[ours[same]]))
        found |= {"gap": gaps[0], "gaps_in_checks": gaps[1:]}
    return found


def line(length: int, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The prompts of one length."""
    drafts = {name: sum(row["drafts"][name] for row in rows) for name in rows[0]["drafts"]}
    times = [1000 * sum(row[name] for row in rows) / len(rows) for name in ("dense_seconds", "seconds")]
    return (
        f"{length:,}",
        str(len(rows)),
        str(sum(row["same_tokens"] == row["new_tokens"] for row in rows)),
        f"{drafts['accepted'] / max(1, drafts['drafted']):.3f}",
        f"{drafts['checked'] / max(1, drafts['checks']):.2f}",
        str(drafts["plain"]),
        *(f"{time:.1f}" for time in times),
        f"{times[0] / times[1]:.2f}",
    )


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=4, help="texts made of the language reference or of a data set")
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = ModelSource.find(args.model)
    lengths = [int(length) for length in args.lengths.split(",")]
    documents = load_documents(args.text, count=args.count, tokens=lengths[-1] + 1)
    windows = cut_windows(documents, source.tokenizer(), lengths, targets=1)
    model = source.model(dtype=args.dtype, device_map=args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    results = ResultFile(args.output / "records.jsonl")
    about = provenance(source.info(), model, args.seed)
    places = [({**window.about(), "new_tokens": args.new_tokens, "sample": args.sample}, window) for window in windows]
    machine = {name: value for name, value in about.items() if name != "commit"}
    wanted = {record_key(**place, **machine): (place, window) for place, window in places}

    def measure(missing: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, (place, window) in missing.items():
            yield key, {**place, **compared(model, window.input_ids, args), **about}

    rows = resume(results, wanted, measure)
    table = [line(length, [row for row in rows if row["length"] == length]) for length in lengths]
    print(text_table(HEADER, table))
    (args.output / "tables.md").write_text(markdown_table(HEADER, table) + "\n", encoding="utf-8")
    for row in rows:
        if "gap" in row:
            print(json.dumps({name: row[name] for name in ("document", "length", "same_tokens", *GAPS)}))


if __name__ == "__main__":
    main()
