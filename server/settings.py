"""Steersman's own settings: one frozen object, read from the environment, which the command line fills.

The environment is how settings reach the engine's processes, whichever command started the server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from steersman.steering.sites import Site


def default_store() -> str:
    return str(Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "steersman/store")


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
    max_plans: int = _option(4096, "plans resident on a worker")
    plan_memory_mb: int = _option(1024, "memory for resident plans, MiB")
    max_body_mb: int = _option(64, "largest request body, MiB")

    def __post_init__(self) -> None:
        for name in ("max_plans", "plan_memory_mb", "max_body_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"--steering-{name.replace('_', '-')} must be at least 1")
        if self.admin_key == "":
            raise ValueError("--steering-admin-key must not be empty: everybody has an empty key")
        self.hooked_sites  # noqa: B018 - raises for an unknown site

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
    if kind == "bool":
        if text not in ("0", "1"):
            raise ValueError(f"{name} must be 0 or 1, not {text!r}")
        return text == "1"
    return text
