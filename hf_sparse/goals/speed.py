"""What hf_sparse aims at in speed and memory."""

from __future__ import annotations

from hf_sparse.bench import end_to_end, layer
from hf_sparse.goals.judge import Bound, Goal
from hf_sparse.goals.reading import Reader
from hf_sparse.goals.speed_readings import Growth, Memory, Overhead, SpeedUp

_CPU = {"device": "cpu"}
_MODEL = {"device": "cpu", "layers": 2}
_H200 = {"device_name": "NVIDIA H200", "dtype": "bfloat16", "name": "llama-8b"}
_STOCK, _SDPA = end_to_end.BASELINE, layer.BASELINE


def _times(name: str, goal: float, least: float, reader: Reader) -> Goal:
    return Goal(name, Bound("speed-up", goal), Bound("speed-up", least), reader)


def _overhead(name: str, reader: Reader) -> Goal:
    return Goal(f"overhead below break-even, {name}, CPU", Bound("overhead", 0), Bound("overhead", 5), reader)


SPEED_GOALS = (
    _times(
        "decode end to end, 32,768 cached, against stock generate, CPU",
        4.5,
        3,
        SpeedUp("cached", "token", 32768, _STOCK, _MODEL),
    ),
    _times(
        "decode end to end, 131,072 cached, against stock generate, CPU",
        20,
        10,
        SpeedUp("cached", "token", 131072, _STOCK, _MODEL),
    ),
    _times(
        "decode attention, 131,072, against SDPA without concatenation, CPU",
        12,
        8,
        SpeedUp("decode", "seconds", 131072, _SDPA, _CPU),
    ),
    Goal(
        "prefill attention, 32,768, selection included, against causal SDPA, CPU",
        Bound("share of 1/density", 0.75),
        Bound("speed-up", 3),
        SpeedUp("prefill", "seconds", 32768, _SDPA, _CPU),
    ),
    _times(
        "time to first token, 32,768, against stock generate, CPU",
        12,
        5,
        SpeedUp("generate", "first_token", 32768, _STOCK, _MODEL),
    ),
    _times(
        "time to first token, 32,768 behind a pad token, against stock generate, CPU",
        12,
        5,
        SpeedUp("padded", "first_token", 32768, _STOCK, _MODEL),
    ),
    Goal(
        "exponent of decode time in n, 16,384 to 262,144, CPU",
        Bound("exponent - C", 0.1),
        Bound("exponent", 0.7),
        Growth(16384, 262144, _CPU),
    ),
    _overhead("first token of 1,024 and 4,096", Overhead("generate", "first_token", (1024, 4096), _MODEL)),
    _overhead("a token after 1,024 and 4,096", Overhead("cached", "token", (1024, 4096), _MODEL)),
    Goal(
        "peak memory of a prefill over model and cache, 32,768, against dense SDPA, CPU",
        Bound("peak memory", 1.2),
        Bound("peak memory", 1.5),
        Memory(32768),
    ),
    _times(
        "decode attention, 131,072, Llama-8B shape, against the fastest dense, H200",
        15,
        6,
        SpeedUp("decode", "seconds", 131072, None, _H200),
    ),
    _times(
        "prefill attention, 131,072, Llama-8B shape, against the fastest dense, H200",
        8,
        3,
        SpeedUp("prefill", "seconds", 131072, None, _H200),
    ),
)
"""The goals, in the order in which they are shown. An overhead is the worse of its two lengths."""
