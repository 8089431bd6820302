"""Time against perplexity of the selectors that look for keys: which finds good keys in less time?

python scripts/frontier.py quality MODEL --text TEXT ... --lengths 4096,8192 --output FOLDER  # resumes
python scripts/frontier.py time MODEL --text TEXT --lengths 4096,8192 --output FOLDER         # alone on the machine
python scripts/frontier.py draw FOLDER

`quality` reads each text once per selector and alpha, and compares the loss of the last tokens with dense attention's.
`time` reads a text, takes the queries, keys and values of a layer in the middle, and times that layer's prefill beside
PyTorch's causal `scaled_dot_product_attention` in the same rounds. Both append to FOLDER/records.jsonl; `draw` makes
points.json, tables.md and frontier.png of them.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.attention import LayerState, attend
from hf_sparse.bench import dense
from hf_sparse.bench.timing import Rounds, timed
from hf_sparse.call import AttentionCall
from hf_sparse.measure.perplexity import token_nll
from hf_sparse.results import device_name, software
from hf_sparse.results.tables import markdown_table
from hf_sparse.selectors import parse_selector

TARGETS = 1024
"""Tokens whose loss is compared, the last ones of a window."""

MARKERS = "os^vD"


def windows(args: argparse.Namespace, length: int) -> dict[str, torch.Tensor]:
    """The tokens of each text from `--offset` on, with one more to predict."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = {}
    for path in map(Path, args.text):
        ids = tokenizer(path.read_text()[: 8 * (args.offset + length)], return_tensors="pt").input_ids[0]
        found[path.name] = ids[args.offset : args.offset + length + 1]
    return found


def designs(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Every selector with every alpha."""
    return [(selector, alpha) for selector in args.selectors for alpha in args.alphas]


def records(folder: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record at once, so that nothing is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record, flush=True)


def quality(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Losses of every design on every window, dense first."""
    done = {(r["length"], r["text"], r["selector"], r["alpha"]) for r in records(args.output) if r["kind"] == "loss"}
    for length in args.lengths:
        for text, ids in windows(args, length).items():
            for selector, alpha in [("dense", 0.0), *designs(args)]:
                if (length, text, selector, alpha) in done:
                    continue
                nll, density = loss(model, ids, selector, alpha)
                facts = {"length": length, "text": text, "selector": selector, "alpha": alpha}
                append(args.output, {"kind": "loss", **facts, "nll": nll, "density": density, **args.about})


def loss(model: torch.nn.Module, ids: torch.Tensor, selector: str, alpha: float) -> tuple[float, float]:
    """Mean loss of the last tokens in nats, and the density."""
    targets = ids[1:][-TARGETS:]
    if selector == "dense":
        return float(token_nll(model, ids[:-1], targets).mean()), 1.0
    with hf_sparse.patched(model, selector=parse_selector(selector), alpha=alpha):
        nll = float(token_nll(model, ids[:-1], targets).mean())
        return nll, hf_sparse.report(model).density


@torch.no_grad()
def time(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Seconds of one layer's prefill by every design and by SDPA, in turn."""
    for length in args.lengths:
        layer, call = call_of_a_layer(model, next(iter(windows(args, length).values()))[:-1])
        samplers = {"sdpa": sampler(call, dense.sdpa)}
        for selector, alpha in designs(args):
            config = hf_sparse.SparseAttentionConfig(selector=parse_selector(selector), alpha=alpha)
            state = LayerState(layer, config)
            samplers[f"{selector} {alpha:g}"] = sampler(call, partial(attended, state))
        for warm_up in samplers.values():
            warm_up()
        facts = {"length": length, "layer": layer, "heads": call.query.shape[1], "kv_heads": call.key.shape[1]}
        for name, samples in Rounds(args.repeats, 0.0).alternate(samplers).items():
            append(args.output, {"kind": "time", **facts, "design": name, **samples, **args.about})


def call_of_a_layer(model: torch.nn.Module, ids: torch.Tensor) -> tuple[int, AttentionCall]:
    """The attention call of the first layer from the middle on that sees the whole text."""
    taken: list[tuple[int, AttentionCall]] = []

    def take(layer: int, call: AttentionCall) -> None:
        if layer >= model.config.num_hidden_layers // 2 and not taken and call.ranges.most_visible == len(ids):
            taken.append((layer, call))

    with hf_sparse.observed(model, take):
        model(ids[None], use_cache=False, logits_to_keep=1)
    return taken[0]


def sampler(call: AttentionCall, run: Callable[[AttentionCall], torch.Tensor]) -> Callable[[], dict[str, float]]:
    """Seconds of one run, measured when called."""
    return lambda: timed(lambda: call, run, call.query.device)


def attended(state: LayerState, call: AttentionCall) -> torch.Tensor:
    """Sparse attention of one call."""
    return attend(state, call)[0]


def draw(folder: Path) -> None:
    """The summary, and a panel for each length: time over dense against perplexity over dense."""
    import matplotlib.pyplot as plt

    losses: dict[tuple[int, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    times: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for record in records(folder):
        if record["kind"] == "loss":
            losses[record["length"], f"{record['selector']} {record['alpha']:g}"][record["text"]] = record
        else:
            times[record["length"]][record["design"]] = record["seconds"]
    points = []
    for (length, design), by_text in losses.items():
        selector, alpha = design.split()
        if selector == "dense":
            continue
        base = losses[length, "dense 0"]
        changes = {text: record["nll"] - base[text]["nll"] for text, record in by_text.items()}
        point: dict[str, Any] = {"length": length, "selector": selector, "alpha": float(alpha)}
        point["perplexity_ratio"] = math.exp(statistics.mean(changes.values()))
        point["texts"] = {text: math.exp(change) for text, change in changes.items()}
        point["density"] = statistics.mean(record["density"] for record in by_text.values())
        if design in times[length]:
            ratios = [own / sdpa for own, sdpa in zip(times[length][design], times[length]["sdpa"], strict=True)]
            point["time_ratio"] = statistics.median(ratios)
            point["time_range"] = [min(ratios), max(ratios)]
        points.append(point)
    points.sort(key=lambda point: (point["length"], point["selector"], point["alpha"]))
    (folder / "tables.md").write_text(table(points))
    (folder / "points.json").write_text(json.dumps({"points": points}, indent=1) + "\n")
    lengths = sorted({point["length"] for point in points})
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False, sharey=True)
    for axis, length in zip(axes[0], lengths, strict=True):
        for selector, marker in zip(sorted({point["selector"] for point in points}), MARKERS, strict=False):
            own = [p for p in points if (p["length"], p["selector"]) == (length, selector) and "time_ratio" in p]
            x, y = ([p[name] for p in own] for name in ("time_ratio", "perplexity_ratio"))
            axis.plot(x, y, marker=marker, label=selector)
            for p in own:
                axis.annotate(f"{p['alpha']:g}", (p["time_ratio"], p["perplexity_ratio"]), fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(title=f"{length:,} tokens (numbers: alpha)", xlabel="time of a layer's prefill / dense")
        axis.legend()
    axes[0][0].set_ylabel("perplexity / dense")
    figure.tight_layout()
    figure.savefig(folder / "frontier.png", dpi=110)


def table(points: list[dict[str, Any]]) -> str:
    """What was found, a line for each length, selector and alpha."""
    header = ("tokens", "selector", "alpha", "density", "perplexity / dense", "by text", "time / dense")
    lines = []
    for p in points:
        by_text = ", ".join(f"{ratio:.4f}" for ratio in p["texts"].values())
        took = (
            f"{p['time_ratio']:.2f} ({p['time_range'][0]:.2f} to {p['time_range'][1]:.2f})"
            if "time_ratio" in p
            else "-"
        )
        facts = (f"{p['length']:,}", p["selector"], f"{p['alpha']:g}", f"{p['density']:.3f}")
        lines.append((*facts, f"{p['perplexity_ratio']:.4f}", by_text, took))
    return markdown_table(header, lines, left=(1,)) + "\n"


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("quality", "time", "draw"))
    parser.add_argument("model", help="A model's id or folder; for draw, the folder of results.")
    parser.add_argument("--text", action="append", help="A text file; may be repeated.")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[4096])
    parser.add_argument(
        "--selectors",
        type=lambda text: text.split(","),
        default=["grouped"],
        help="Names, or FILE.py:CLASS; default: grouped.",
    )
    parser.add_argument(
        "--alphas", type=lambda text: [float(part) for part in text.split(",")], default=[8.0, 12.0, 16.0]
    )
    parser.add_argument("--offset", type=int, default=0, help="Tokens of each text that are left out first.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.step == "draw":
        draw(Path(args.model))
        return
    if not args.text or args.output is None:
        parser.error(f"{args.step} needs --text and --output")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    args.about = {
        "model": Path(args.model).name,
        "threads": torch.get_num_threads(),
        "device": device_name(model.device),
        "software": software(),
    }
    (quality if args.step == "quality" else time)(args, model)


if __name__ == "__main__":
    main()
