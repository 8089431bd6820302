"""The table of what was measured on the items of a folder.

python scripts/rivals/table.py FOLDER  # writes tables.md and summary.json
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import measuring
import numpy as np

from hf_sparse.measure.statistics import bootstrap_means, percentile_interval
from hf_sparse.results import Record, ResultFile, markdown_table, write_json

HEADER = (
    "method",
    "keys kept",
    "perplexity / dense",
    "95 % interval",
    "worst text",
    "answer likeliest, %",
    "answer written, %",
)


def perplexity(rows: list[Record], dense: list[Record]) -> dict[str, Any]:
    """The ratio of perplexities over the texts."""
    tokens = np.array(
        [min(measuring.BLOCK, rows[0]["tokens"] - start) for start in range(0, rows[0]["tokens"], measuring.BLOCK)]
    )
    nll = np.array([[row["block_nll"] for row in side] for side in (rows, dense)])
    draws = bootstrap_means(nll, tokens.astype(np.float64), seed=0)
    low, high = percentile_interval(draws[:, 0] - draws[:, 1])
    excess = (nll[0] - nll[1]).sum(1) / tokens.sum()
    ratio, ends, worst = math.exp(excess.mean()), (math.exp(low), math.exp(high)), math.exp(excess.max())
    return {"ratio": ratio, "low": ends[0], "high": ends[1], "worst_text": worst}


def retrieval(rows: list[Record], true: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Shares of questions whose answer is likeliest, and is written."""
    answers = [(answer, ids) for row in rows for answer, ids in zip(row["answers"], true[row["item"]], strict=True)]
    return {
        "questions": len(answers),
        "likeliest": sum(answer["nll"][0] < min(answer["nll"][1:]) for answer, _ in answers) / len(answers),
        "written": sum(answer["written"] == ids for answer, ids in answers) / len(answers),
    }


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    items = dict(measuring.items(folder))
    true = {key: [question["candidates"][0] for question in item.get("questions", [])] for key, item in items.items()}
    by_method: dict[tuple[str, float | None], dict[str, Record]] = defaultdict(dict)
    for record in ResultFile(folder / "records.jsonl").records().values():
        by_method[record["method"], record["share"]][record["item"]] = record
    results = []
    for (method, share), records in by_method.items():
        dense = by_method["dense" if "package" in next(iter(records.values())) else measuring.RIVAL_DENSE, None]
        texts = [key for key, item in items.items() if item["kind"] == "perplexity"]
        asked = [record for key, record in records.items() if key not in texts]
        result = {"method": method, "share": share}
        result["density"] = float(np.mean([records[key]["density"] for key in texts]))
        result |= perplexity([records[key] for key in texts], [dense[key] for key in texts])
        results.append(result | retrieval(asked, true))
    results.sort(
        key=lambda result: (not result["method"].startswith("dense"), -(result["share"] or 1), result["ratio"])
    )
    write_json(folder / "summary.json", {"results": results})
    lines = [
        (
            result["method"],
            f"{result['density']:.3f}",
            f"{result['ratio']:.4f}",
            f"{result['low']:.4f} to {result['high']:.4f}",
            f"{result['worst_text']:.4f}",
            f"{100 * result['likeliest']:.0f}",
            f"{100 * result['written']:.0f}",
        )
        for result in results
    ]
    (folder / "tables.md").write_text(markdown_table(HEADER, lines, left=(0,)) + "\n")
    print(markdown_table(HEADER, lines, left=(0,)))


if __name__ == "__main__":
    main()
