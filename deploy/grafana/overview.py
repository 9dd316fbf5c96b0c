"""The dashboard *Overview*: is the server well, how fast is it, and how much of its traffic is steered."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import Query, dashboard, distribution, lines, number
from deploy.grafana.promql import buckets, quantile, rate, select

ASKED = rate("steersman_requests_total")
STEERED = rate("steersman_requests_total", 'outcome="steered"')
FAILED = rate("steersman_requests_total", 'outcome="failed"')
ALL = rate("vllm:request_success_total")
GENERATED = rate("vllm:generation_tokens_total")
PROMPT = rate("vllm:prompt_tokens_total")
FIRING = 'count(ALERTS{alertname=~"Steersman.*", alertstate="firing"}) or vector(0)'


def percentiles(histogram: str) -> list[Query]:
    return [Query(quantile(q, histogram), f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)]


def overview() -> Dashboard:
    health = [
        number("Requests a second", "All requests that ended, steered or not.", Query(ALL), "reqps"),
        number(
            "Steered share",
            "Requests that were served steered, of all that ended.",
            Query(f"{STEERED} / {ALL}"),
            "percentunit",
        ),
        number(
            "Failing",
            "Requests for steering that ended in a server's error, of all that asked for steering.",
            Query(f"({FAILED} or vector(0)) / {ASKED}"),
            "percentunit",
            alarm=0.05,
        ),
        number(
            "Edits per token",
            "Edited tokens, counted once for each asset, beside the tokens that were computed or generated.",
            Query(f"{rate('steersman_edited_tokens_total')} / ({PROMPT} + {GENERATED})"),
        ),
        number(
            "Monitor's lag",
            "Age of the newest statistics that the engine has handed over.",
            Query(f"max({select('steersman_monitor_lag_seconds')})"),
            "s",
            alarm=30,
        ),
        number("Alerts", "Steersman's alerts that fire now.", Query(FIRING), alarm=1),
    ]
    traffic = [
        lines(
            "Requests for steering",
            "By outcome: steered, refused (4xx), failed (5xx), cancelled (the client has gone).",
            Query(rate("steersman_requests_total", by=["outcome"]), "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        lines(
            "All requests",
            "By the reason they ended.",
            Query(rate("vllm:request_success_total", by=["finished_reason"]), "{{finished_reason}}"),
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Running and waiting",
            "Requests in the batch and in the queue.",
            Query(f"sum({select('vllm:num_requests_running')})", "running"),
            Query(f"sum({select('vllm:num_requests_waiting')})", "waiting"),
        ),
        lines(
            "Tokens",
            "Prompt tokens read and tokens generated, each second.",
            Query(PROMPT, "prompt"),
            Query(GENERATED, "generated"),
            unit="short",
        ),
        lines(
            "Edited tokens",
            "Each second, by asset: a token that two assets edit counts for both.",
            Query(rate("steersman_edited_tokens_total", by=["asset"]), "{{asset}}"),
            stacked=True,
        ),
        lines(
            "KV cache",
            "Share of the KV cache in use.",
            Query(f"max by (instance) ({select('vllm:kv_cache_usage_perc')})", "{{instance}}"),
            unit="percentunit",
        ),
    ]
    latency = [
        lines("Request", "From arrival to the last token.", *percentiles("vllm:e2e_request_latency_seconds"), unit="s"),
        lines("First token", "From arrival to it.", *percentiles("vllm:time_to_first_token_seconds"), unit="s"),
        lines("Between tokens", "Of one request.", *percentiles("vllm:inter_token_latency_seconds"), unit="s"),
        distribution(
            "Request, distribution",
            "Requests a second in each range of latency.",
            Query(buckets("vllm:e2e_request_latency_seconds"), "{{le}}"),
            unit="s",
        ),
        lines(
            "Plan building",
            "From a request's steering object to a plan that is on every worker.",
            *percentiles("steersman_plan_build_seconds"),
            unit="s",
            width=12,
        ),
    ]
    store = [
        lines(
            "Plans on the workers",
            "Resident plans, by server.",
            Query(f"max by (instance) ({select('steersman_plans_resident')})", "{{instance}}"),
        ),
        lines(
            "Assets",
            "Versions in the store, by kind.",
            Query(f"max by (kind) ({select('steersman_store_assets')})", "{{kind}}"),
        ),
        lines(
            "Store errors",
            "By reason. asset_not_found is a client's mistake; asset_corrupt and store_unavailable are not.",
            Query(rate("steersman_store_errors_total", by=["reason"]), "{{reason}}"),
        ),
    ]
    return dashboard(
        "steersman-overview",
        "Steersman: overview",
        "Is the server well, how fast is it, and how much of its traffic is steered.",
        [],
        [("Health", health), ("Traffic", traffic), ("Latency", latency), ("Plans and store", store)],
    )
