"""Every kind of policy, and which of them a served model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from steersman.server.policies.bins import Bins
from steersman.server.policies.openvla import OpenVla
from steersman.server.policies.pi0_fast import Pi0Fast
from steersman.server.policies.policy import Policy

POLICIES: Mapping[str, Callable[[Mapping[str, Any], Any], Policy]] = {
    "openvla": OpenVla,
    "bins": Bins,
    "pi0_fast": Pi0Fast,
}
CHOICES = ("auto", "none", *POLICIES)


def load(chosen: str, config: Mapping[str, Any], tokenizer: Any) -> Policy | None:
    """The policy that the model is served as, None if it is none.

    ``config`` is that of the checkpoint. ``chosen`` is one of ``CHOICES``; "auto" goes by the checkpoint's
    ``steersman_policy.type``, else by its ``model_type``. Raises ValueError where the checkpoint lacks what the policy
    needs.
    """
    if chosen == "none":
        return None
    about = config.get("steersman_policy")
    if chosen == "auto":
        if about is not None and (not isinstance(about, Mapping) or about.get("type") not in POLICIES):
            raise ValueError(f"steersman_policy.type in config.json must be one of {', '.join(POLICIES)}")
        chosen = str(config.get("model_type") if about is None else about["type"])
        if chosen not in POLICIES:
            return None
    try:
        return POLICIES[chosen](config, tokenizer)
    except KeyError as error:
        raise ValueError(f"the policy {chosen} needs {error} in the model's config.json") from None
    except ValueError as error:
        raise ValueError(f"the policy {chosen}: {error}") from None
