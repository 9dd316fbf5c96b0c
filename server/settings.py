"""Steersman's own settings: one frozen object, read from the environment, which the command line fills.

The environment is how settings reach the engine's processes, whichever command started the server.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from steersman.server.policies.catalogue import CHOICES
from steersman.steering.sites import Site


def default_store() -> str:
    return str(Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "steersman/store")


def default_captures() -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steersman/captures")


def _option(default: Any, help: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every field is the option ``--steering-<name>`` and the variable ``STEERSMAN_<NAME>``."""

    store: str = _option(default_store, "where assets are kept: a folder or any fsspec URL")
    admin_key: str | None = _option(None, "key that changes to /v1/steering/* need (Authorization: Bearer)")
    default_profile: str | None = _option(None, "profile applied to every request that does not opt out")
    any_model: bool = _option(False, "accept assets of other models of the same size")
    sites: str = _option("all", "sites to hook, comma-separated; fewer cost less in a compiled model")
    fused_norm: str = _option("auto", "a GPU's edits and the norms after them in one launch: auto, on or off")
    max_plans: int = _option(4096, "plans resident on a worker")
    plan_memory_mb: int = _option(1024, "memory for resident plans, MiB")
    probe_memory_mb: int = _option(8, "memory on a GPU for what probes read in one step, MiB")
    carry_memory_mb: int = _option(64, "memory on a GPU for what injections carry between layers, MiB")
    max_body_mb: int = _option(64, "largest request body, MiB")
    monitor: str = _option("on", "statistics of every layer in /metrics: on or off")
    monitor_sample: str = _option("auto", "share of the forward passes that statistics look at: 1/N or a fraction")
    monitor_interval: float = _option(2.0, "seconds between two readings of the workers' statistics")
    monitor_probes: str = _option("", "stored vectors that statistics read in all requests, comma-separated")
    norm_baseline: str | None = _option(None, "stored baseline that norms are judged by, NAME[@VERSION]")
    detector: str | None = _option(None, "stored detector that scores steered requests' answers, NAME[@VERSION]")
    max_replays: int = _option(2, "answers that are replayed at once for the signal conflict")
    max_replay_tokens: int = _option(8192, "longest replay for the signal conflict, prompt and answer")
    max_relative_norm: float | None = _option(None, "largest edit beside the stream, ‖Δx‖/‖x‖ at one token and place")
    dosage: str = _option("warn", "what happens to larger ones: warn, cap or refuse")
    policy: str = _option("auto", f"robot policy that the model is: {', '.join(CHOICES)}; auto goes by config.json")
    max_action_delta: float | None = _option(None, "largest motion in an action, in the robot's units: more is cut")
    max_image_mb: int = _option(8, "largest picture of an observation, MiB as sent")
    max_image_megapixels: int = _option(16, "largest picture of an observation, million pixels")
    max_jobs: int = _option(8, "jobs (extraction, calibration) that may wait while one runs")
    max_job_mb: int = _option(2048, "activations that one extraction may hold, MiB")
    max_capture_mb: int = _option(256, "activations that one capture may take, and all at once, MiB")
    max_capture_prompts: int = _option(256, "prompts of one call of /v1/steering/captures")
    max_kept_captures_mb: int = _option(1024, "activations that are kept on the server, MiB")
    captures: str = _option(default_captures, "folder where activations are kept")
    max_robots: int = _option(64, "robots connected by WebSocket at once")
    max_robot_rate: int = _option(100, "observations a second that one WebSocket may send")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"--steering-{name.replace('_', '-')} must be at least 1")
        if self.max_action_delta is not None and not 0 < self.max_action_delta < math.inf:
            raise ValueError("--steering-max-action-delta must be a positive number")
        if self.monitor not in ("on", "off"):
            raise ValueError("--steering-monitor must be on or off")
        if self.fused_norm not in ("auto", "on", "off"):
            raise ValueError("--steering-fused-norm must be auto, on or off")
        if not 0.1 <= self.monitor_interval <= 3600:
            raise ValueError("--steering-monitor-interval must be 0.1 to 3600 seconds")
        if self.max_relative_norm is not None and not 0 < self.max_relative_norm < math.inf:
            raise ValueError("--steering-max-relative-norm must be a positive number")
        if self.dosage not in ("warn", "cap", "refuse"):
            raise ValueError("--steering-dosage must be warn, cap or refuse")
        self.monitor_every  # noqa: B018 - raises for what is no share
        if self.policy not in CHOICES:
            raise ValueError(f"--steering-policy must be one of {', '.join(CHOICES)}")
        if self.norm_baseline is not None and self.monitor == "off":
            raise ValueError("--steering-norm-baseline needs --steering-monitor on")
        if self.admin_key == "":
            raise ValueError("--steering-admin-key must not be empty: everybody has an empty key")
        self.hooked_sites  # noqa: B018 - raises for an unknown site

    @property
    def monitor_every(self) -> int | None:
        """N: statistics look at every N-th forward pass; None: the worker decides."""
        if self.monitor_sample == "auto":
            return None
        bad = ValueError(
            f"--steering-monitor-sample must be auto, 1/N or a fraction up to 1, not {self.monitor_sample!r}"
        )
        try:
            share = Fraction(self.monitor_sample)
        except (ValueError, ZeroDivisionError):
            raise bad from None
        if not 0 < share <= 1:
            raise bad
        return round(1 / share)

    @property
    def watched(self) -> list[str]:
        """The vectors of ``monitor_probes``."""
        return [name.strip() for name in self.monitor_probes.split(",") if name.strip()]

    @property
    def hooked_sites(self) -> frozenset[Site]:
        if self.sites == "all":
            return frozenset(Site)
        try:
            return frozenset(Site(s.strip()) for s in self.sites.split(","))
        except ValueError as error:
            known = ", ".join(Site)
            raise ValueError(f"--steering-sites: {error}; known sites: {known}, or all") from None

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        given: dict[str, Any] = {}
        for f in fields(cls):
            name = variable(f.name)
            if name in env:
                given[f.name] = _parse(name, str(f.type), env[name])
        return cls(**given)


def variable(name: str) -> str:
    """The environment variable of a field."""
    return f"STEERSMAN_{name.upper()}"


def _parse(name: str, kind: str, text: str) -> Any:
    if kind == "int":
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{name} must be an integer, not {text!r}") from None
    if kind in ("float", "float | None"):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, not {text!r}") from None
    if kind == "bool":
        if text not in ("0", "1"):
            raise ValueError(f"{name} must be 0 or 1, not {text!r}")
        return text == "1"
    return text
