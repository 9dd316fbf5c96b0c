"""Short ways to write the PromQL that the dashboards share. Every function returns text.

A histogram's name comes without ``_sum``, ``_count`` or ``_bucket``, a counter's with ``_total``. Matchers are
PromQL's, such as ``outcome="failed"``; the dashboard's choice of servers is always among them.
"""

from __future__ import annotations

from collections.abc import Sequence

SERVERS = 'instance=~"$instance"'
WINDOW = "$__rate_interval"


def select(metric: str, *matchers: str) -> str:
    return f"{metric}{{{', '.join((SERVERS, *matchers))}}}"


def rate(counter: str, *matchers: str, by: Sequence[str] = ()) -> str:
    """Per second, summed over everything but ``by``."""
    return f"sum{_by(by)} (rate({select(counter, *matchers)}[{WINDOW}]))"


def mean(histogram: str, *matchers: str, by: Sequence[str] = ()) -> str:
    """Mean of what was observed.

    Only for what cannot be negative: the sum of a histogram with negative values is no counter, rate() would take each
    fall for a restart, and clients leave such a sum out. Take the median there.
    """
    total, count = (rate(f"{histogram}_{end}", *matchers, by=by) for end in ("sum", "count"))
    return f"{total} / {count}"


def quantile(q: float, histogram: str, *matchers: str, by: Sequence[str] = ()) -> str:
    return f"histogram_quantile({q}, {buckets(histogram, *matchers, by=by)})"


def buckets(histogram: str, *matchers: str, by: Sequence[str] = ()) -> str:
    """Observations per second in each cumulative bucket."""
    return rate(f"{histogram}_bucket", *matchers, by=(*by, "le"))


def in_order(expr: str, label: str = "layer") -> str:
    """Pads the layer's number to three digits: Prometheus sorts series by the text of their labels, 10 before 2."""
    for zeros, digits in (("00", "."), ("0", "..")):
        expr = f'label_replace({expr}, "{label}", "{zeros}$1", "{label}", "({digits})")'
    return expr


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
