"""The dashboard *Robots*: how many actions each policy gives, how late, and how much was cut to the limit."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import Column, Query, choice, dashboard, distribution, lines, listing
from deploy.grafana.promql import buckets, mean, quantile, rate

ACTIONS = "steersman_actions_total"
SECONDS = "steersman_action_seconds"
POLICY = 'policy=~"$policy"'
SATURATED = (
    f"{rate('steersman_action_saturation_total', POLICY, by=['policy'])} / {rate(ACTIONS, POLICY, by=['policy'])}"
)


def robots() -> Dashboard:
    traffic = [
        lines(
            "Actions",
            "Each second, by policy.",
            Query(rate(ACTIONS, POLICY, by=["policy"]), "{{policy}}"),
            unit="ops",
        ),
        lines(
            "Outcomes",
            "Actions each second by how they ended.",
            Query(rate(ACTIONS, POLICY, by=["outcome"]), "{{outcome}}"),
            unit="ops",
            stacked=True,
        ),
        lines(
            "Saturation",
            "Values cut to the limit (--steering-max-action-delta), for each answer.",
            Query(SATURATED, "{{policy}}"),
        ),
    ]
    latency = [
        lines(
            "Latency",
            "From an observation's arrival to its action, median, 95th and 99th percentile.",
            *(
                Query(quantile(q, SECONDS, POLICY, by=["policy"]), f"{{{{policy}}}} p{round(100 * q)}")
                for q in (0.5, 0.95, 0.99)
            ),
            unit="s",
            width=12,
        ),
        distribution(
            "Latency, distribution",
            "Actions a second in each range of latency, of the chosen policies.",
            Query(buckets(SECONDS, POLICY), "{{le}}"),
            unit="s",
        ),
        listing(
            "Now",
            "The latest of every chosen policy.",
            "policy",
            Column("Actions/s", rate(ACTIONS, POLICY, by=["policy"]), "ops"),
            Column("Latency, mean", mean(SECONDS, POLICY, by=["policy"]), "s"),
            Column("Latency, p99", quantile(0.99, SECONDS, POLICY, by=["policy"]), "s"),
            Column("Saturated values per action", SATURATED),
        ),
    ]
    return dashboard(
        "steersman-robots",
        "Steersman: robots",
        "How many actions each policy gives, how late, and how much was cut to the limit.",
        [choice("policy", "Policies", f"label_values({ACTIONS}, policy)")],
        [("Actions", traffic), ("Latency", latency)],
    )
