"""Plots of the experiment `phases`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse.lab.experiment import Panel
from hf_sparse.lab.fits import Interval, freezing_norm, normal_keys, random_energy_exponent
from hf_sparse.lab.pages import COLORS, MARKERS, keys_axis
from hf_sparse.lab.rows import EPSILON
from hf_sparse.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARES = (1.0, 2.0, 4.0)


def panels(rows: Sequence[Row], fits: Sequence[dict[str, Any]]) -> list[Panel]:
    """The phase diagram, its edges, and sparsity patterns against length and norm."""
    grid = [row for row in rows if row["kind"] == "logits" and row["growth"] == 0]
    tokens = [row for row in rows if row["kind"] == "signs"]
    growing = [fit for fit in fits if fit["growth"] > 0]
    return [
        _diagram(grid),
        _shares(grid, tokens),
        _random_energy(growing),
        _patterns(grid),
        _map(grid, "entropy", "Entropy / ln n", lambda row: np.mean(row["entropy"]) / np.log(row["n"])),
        _negligible(grid),
    ]


def _values(rows: Sequence[Row], name: str) -> tuple[list[int], list[float], np.ndarray[Any, np.dtype[np.float64]]]:
    """Lengths, norms and means `(norms, lengths)` of one entry of the rows."""
    lengths, norms = sorted({row["n"] for row in rows}), sorted({row["norm"] for row in rows})
    by_place = {(row["norm"], row["n"]): np.mean(row[name]) for row in rows}
    return lengths, norms, np.array([[by_place[norm, n] for n in lengths] for norm in norms])


def _diagram(rows: Sequence[Row]) -> Panel:
    lengths, norms, keys = _values(rows, "keys_90")
    # Over two octaves: one is too noisy where few keys have the mass.
    exponents = (np.log(keys[:, 2:]) - np.log(keys[:, :-2])) / (np.log(lengths[2:]) - np.log(lengths[:-2]))
    middle = lengths[1:-1]
    freezing = [freezing_norm(n) for n in middle]
    below = [exponents[i, j] for i, norm in enumerate(norms) for j in range(len(middle)) if norm < freezing[j] / 2]
    beyond = [exponents[i, j] for i, norm in enumerate(norms) for j in range(len(middle)) if norm > freezing[j]]

    def draw(axes: Axes) -> None:
        mesh = axes.pcolormesh(middle, norms, exponents, cmap="viridis", vmin=0, vmax=1, shading="nearest")
        axes.plot(middle, freezing, color="#D55E00", linewidth=2, label="freezing, $\\sqrt{2\\,\\ln\\,n}$")
        axes.plot(middle, np.array(freezing) / 2, color="#D55E00", linestyle="--", label="half of it")
        axes.figure.colorbar(mesh, ax=axes, label="local exponent C of k$_{90}$")
        keys_axis(axes, middle)
        axes.set_ylabel("deviation of the logits, sigma = R")
        axes.legend(fontsize=7, loc="lower right")

    return Panel(
        "Phase diagram: exponent of k_90 between n/2 and 2n",
        f"Claim: C < 1. Found: below half of the freezing line C = {np.mean(below):.2f} on average (least "
        f"{min(below):.2f}), beyond the line {np.mean(beyond):.2f} on average (largest {max(beyond):.2f}).",
        draw,
    )


def _shares(rows: Sequence[Row], tokens: Sequence[Row]) -> Panel:
    def draw(axes: Axes) -> None:
        for norm, color in zip(_SHARES, COLORS, strict=False):
            for source, marker, filled in ((rows, "o", color), (tokens, "s", "white")):
                own = [row for row in source if row["norm"] == norm]
                label = f"{'normal logits' if source is rows else 'bounded tokens'}, R = {norm:g}"
                shares = [np.mean(row["keys_90"]) / row["n"] for row in own]
                line: dict[str, Any] = {
                    "color": color,
                    "marker": marker,
                    "markerfacecolor": filled,
                    "linewidth": 0.8,
                    "markersize": 5,
                }
                axes.plot([row["n"] for row in own], shares, **line, label=label)
            axes.axhline(normal_keys(norm, 0.1), color=color, linestyle="--", linewidth=1)
        keys_axis(axes, sorted({row["n"] for row in rows}))
        axes.set(yscale="log", ylabel="k$_{90}$ / n")
        axes.legend(fontsize=6.5, title="dashed: closed form, n to infinity", title_fontsize=6.5)

    lengths = sorted({row["n"] for row in rows})
    first, last = (
        {r["norm"]: np.mean(r["keys_90"]) / n for r in rows if r["n"] == n} for n in lengths[:: len(lengths) - 1]
    )
    return Panel(
        "Keys for 90 % of the mass, fixed norm",
        f"Claim: a share that falls with n. Found from n = {lengths[0]:,} to {lengths[-1]:,} (and closed form): "
        + "; ".join(
            f"R = {norm:g}: {first[norm]:.4f} to {last[norm]:.4f} ({normal_keys(norm, 0.1):.4f})" for norm in _SHARES
        )
        + ". A share that stays is C = 1.",
        draw,
    )


def _random_energy(fits: Sequence[dict[str, Any]]) -> Panel:
    scales = [fit["norm"] for fit in fits]
    known = [fit for fit in fits if fit["closed_form_exponent"] is not None]
    gap = max(abs(fit["exponent"]["value"] - fit["limit"]) for fit in fits)

    def draw(axes: Axes) -> None:
        line = np.linspace(0, 2, 101)
        axes.plot(line, [random_energy_exponent(c) for c in line], color="#000000", label="limit, 1 - c$^2$/2")
        values = [fit["exponent"]["value"] for fit in fits]
        bars = [[abs(fit["exponent"][end] - fit["exponent"]["value"]) for fit in fits] for end in ("low", "high")]
        lengths = fits[0]["lengths"]
        label = f"measured, n = {lengths[0]:,} to {lengths[1]:,}"
        axes.errorbar(scales, values, yerr=bars, color=COLORS[0], marker="o", linestyle="", capsize=3, label=label)
        predicted = [fit["closed_form_exponent"] for fit in known]
        axes.plot([fit["norm"] for fit in known], predicted, color=COLORS[1], marker="x", label="closed form, same n")
        axes.axvline(2**0.5, color="#666666", linestyle=":", label="freezing, c = $\\sqrt{2}$")
        axes.set(xlabel="c, with sigma = c sqrt(ln n)", ylabel="exponent C of k$_{90}$", ylim=(-0.05, 1.05))
        axes.legend(fontsize=7)

    return Panel(
        "Norms that grow as sqrt(ln n): where C is below 1",
        "Claim: C < 1. Found, by c: "
        + ", ".join(f"{fit['norm']:g}: {Interval(**fit['exponent'])}" for fit in fits)
        + f". The largest distance to the limit is {gap:.2f}: a C fitted over few octaves is not asymptotic.",
        draw,
    )


def _patterns(rows: Sequence[Row]) -> Panel:
    last = max(row["n"] for row in rows)
    own = sorted((row for row in rows if row["n"] == last), key=lambda row: float(row["norm"]))
    norms = [row["norm"] for row in own]

    def draw(axes: Axes) -> None:
        names = {"keys_50": "keys for 50 %", "keys_90": "keys for 90 %", "keys_99": "keys for 99 %"}
        for (name, label), color, marker in zip(names.items(), COLORS, MARKERS, strict=False):
            axes.plot(norms, [np.mean(row[name]) for row in own], color=color, marker=marker, label=label)
        axes.plot(
            norms, [np.mean(row["effective"]) for row in own], color="#000000", linestyle="--", label="1 / sum p$^2$"
        )
        axes.axvline(freezing_norm(last), color="#666666", linestyle=":", label="freezing")
        axes.set(xlabel="deviation of the logits, sigma = R", ylabel="keys", yscale="log")
        axes.legend(fontsize=7)

    chosen = own[:: max(1, len(own) // 4)]
    return Panel(
        f"Sparsity against the norm at n = {last:,}",
        "Keys for 90 % of the mass: "
        + ", ".join(f"{np.mean(row['keys_90']):,.0f} at R = {row['norm']:g}" for row in chosen)
        + ": at one length the norm decides how sparse a row is.",
        draw,
    )


def _map(rows: Sequence[Row], name: str, title: str, value: Any) -> Panel:
    lengths, norms, _ = _values(rows, name)
    by_place = {(row["norm"], row["n"]): value(row) for row in rows}
    grid = np.array([[by_place[norm, n] for n in lengths] for norm in norms])

    def draw(axes: Axes) -> None:
        mesh = axes.pcolormesh(lengths, norms, grid, cmap="magma", vmin=0, vmax=1, shading="nearest")
        axes.plot(lengths, [freezing_norm(n) for n in lengths], color="#56B4E9", linewidth=2, label="freezing")
        axes.figure.colorbar(mesh, ax=axes, label="1: all keys alike, 0: one key")
        keys_axis(axes, lengths)
        axes.set_ylabel("deviation of the logits, sigma = R")
        axes.legend(fontsize=7, loc="lower right")

    rising = (grid[:, -1] > grid[:, 0]).sum()
    return Panel(
        title,
        f"At the smallest norm {grid[0, 0]:.2f} at n = {lengths[0]:,} and {grid[0, -1]:.2f} at n = {lengths[-1]:,}, at "
        f"the largest {grid[-1, 0]:.2f} and {grid[-1, -1]:.2f}. It rises with n (rows disperse, not collapse) at "
        f"{rising} of {len(norms)} norms.",
        draw,
    )


def _negligible(rows: Sequence[Row]) -> Panel:
    norms = sorted({row["norm"] for row in rows})
    chosen = norms[:: max(1, len(norms) // 5)]

    def draw(axes: Axes) -> None:
        for norm, color, marker in zip(chosen, COLORS, MARKERS, strict=False):
            own = [row for row in rows if row["norm"] == norm]
            counts = [np.mean(row["above"]) for row in own]
            axes.plot(
                [row["n"] for row in own], counts, color=color, marker=marker, markersize=4, label=f"R = {norm:g}"
            )
        axes.axhline(1 / EPSILON, color="#666666", linestyle=":")
        keys_axis(axes, sorted({row["n"] for row in rows}))
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set(ylabel=f"entries above {EPSILON}", ylim=(0, 2 / EPSILON))
        axes.legend(fontsize=7, title="dotted: 1 / epsilon", title_fontsize=7)

    last = max(row["n"] for row in rows)
    counts = {row["norm"]: np.mean(row["above"]) for row in rows if row["n"] == last}
    return Panel(
        f"Entries that are not negligible (above {EPSILON})",
        "Claim: one, or a bounded number. True of any row, as at most 1 / epsilon entries can be above epsilon; at "
        f"n = {last:,} there are " + ", ".join(f"{counts[norm]:.1f} at R = {norm:g}" for norm in chosen) + ".",
        draw,
    )
