"""How many tokens to draft before a check, from the times and the acceptance seen so far."""

from __future__ import annotations

from collections import deque
from statistics import median_low

MOST = 16
"""Most tokens of a draft, unless a caller fixes their number."""

# Tokens of a draft that is made to learn what drafts give, and tokens that must be left for that to be worth while.
_TRIAL, _LEAST_LEFT = 2, 16

# Times that are remembered of each kind, and how much of what was accepted earlier counts in every new check.
_RECENT, _KEPT = 5, 0.9

# Drafts must promise this much more than plain decoding. Where they do not, another trial is made after so many
# tokens, and after twice as many each time that it changes nothing; where they nearly do, sooner.
_GAIN, _NEARLY = 1.03, 0.9
_FIRST_WAIT, _LONGEST_WAIT, _SHORT_WAIT = 64, 1024, 16

# Checks after which one token is decoded without a draft, to see what that takes at the present length.
_REFRESH = 32


class Pace:
    """Chooses the length of each draft of one text so that most tokens come in a second.

    A draft of `gamma` tokens, each accepted with probability `a`, gives (1 - a^(gamma + 1)) / (1 - a) tokens with its
    check (arXiv 2211.17192, section 3.1). Its time is that of `gamma` sparse tokens, of one dense token, and of `gamma`
    further queries in the same dense pass; each is the median of what was measured lately.

    Args:
        fixed: The length of every draft; `None` to adapt it.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._plain, self._draft, self._query = (deque[float](maxlen=_RECENT) for _ in range(3))
        self._accepted, self._tried = 1.0, 2.0
        self._wait, self._waited, self._checks = _FIRST_WAIT, 0, 0

    def choose(self, left: int) -> int:
        """Tokens to draft now; 0 to decode one token by itself.

        Args:
            left: Tokens that may still follow, that of the check not counted.
        """
        if self._fixed is not None:
            return min(self._fixed, left)
        # The first token of a kind also pays for what is made once: keys in few bits, room in the cache.
        if len(self._plain) < 2 or left < 1:
            return 0
        if len(self._draft) < 2:
            return _TRIAL if left >= _LEAST_LEFT else 0
        best = max(range(1, MOST + 1), key=self._rate)
        gain = self._rate(best) / self._rate(0)
        if gain >= _GAIN:
            self._wait, self._waited = _FIRST_WAIT, 0
            return 0 if self._checks % _REFRESH == _REFRESH - 1 else min(best, left)
        self._waited += 1
        if self._waited < (_SHORT_WAIT if gain >= _NEARLY else self._wait) or left < _LEAST_LEFT:
            return 0
        if gain < _NEARLY:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._waited = 0
        return _TRIAL

    def learn(self, drafted: int, accepted: int, rejected: bool, draft: float, check: float) -> None:
        """Take in one draft and its check, or one token without a draft.

        Args:
            drafted: Tokens of the draft; 0 without one.
            accepted: How many of them are in the text.
            rejected: Whether the next one was rejected, rather than not looked at.
            draft: Seconds of the draft.
            check: Seconds of the dense pass.
        """
        self._checks += 1
        if not drafted:
            self._plain.append(check)
            return
        self._draft.append(draft / drafted)
        if self._plain:
            self._query.append(max(0.0, check - median_low(self._plain)) / drafted)
        self._accepted = _KEPT * self._accepted + accepted
        self._tried = _KEPT * self._tried + accepted + rejected

    def _rate(self, gamma: int) -> float:
        """Tokens per second with drafts of `gamma` tokens."""
        plain = median_low(self._plain)
        if not gamma:
            return 1 / plain
        accepted = min(0.99, self._accepted / self._tried)
        tokens = (1 - accepted ** (gamma + 1)) / (1 - accepted)
        return tokens / (plain + gamma * (median_low(self._draft) + median_low(self._query)))
