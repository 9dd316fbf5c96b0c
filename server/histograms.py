"""Prometheus histograms that are filled a bucket at a time, from counts made elsewhere.

The contract with prometheus_client: a ``Histogram`` keeps what it counts in ``_buckets``, one value with ``inc`` for
each bucket (not cumulative, the last without a bound), and ``_sum``. These values are the library's own, so that in
multi-process mode (``PROMETHEUS_MULTIPROC_DIR``, which vLLM sets where several processes serve HTTP) they lie in
files that any of the processes adds up for ``/metrics``; a collector of our own would not be asked there.

As in the library, a histogram whose first bound is negative shows no sum: it need not grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Histogram


class PreBucketed(Histogram):
    def add(self, counts: Sequence[int], total: float) -> None:
        """Adds ``counts`` by bucket, one more than there are bounds, of values that sum up to ``total``."""
        self._raise_if_not_observable()  # type: ignore[no-untyped-call]
        if len(counts) != len(self._buckets):
            raise ValueError(f"{len(counts)} counts for {len(self._buckets)} buckets")
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)
