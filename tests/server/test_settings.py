from dataclasses import FrozenInstanceError, fields

import pytest

from steersman.server.settings import Settings, variable
from steersman.steering.sites import Site


def test_every_field_has_a_variable_and_a_help_text() -> None:
    for field in fields(Settings):
        assert field.metadata["help"]
        assert variable(field.name) == f"STEERSMAN_{field.name.upper()}"


def test_the_environment_fills_the_fields() -> None:
    given = {
        "STEERSMAN_STORE": "s3://bucket/store",
        "STEERSMAN_ADMIN_KEY": "secret",
        "STEERSMAN_DEFAULT_PROFILE": "calm",
        "STEERSMAN_ANY_MODEL": "1",
        "STEERSMAN_SITES": "resid_post, attn_z",
        "STEERSMAN_MAX_PLANS": "7",
        "STEERSMAN_PLAN_MEMORY_MB": "8",
        "STEERSMAN_MAX_BODY_MB": "9",
        "STEERSMAN_MONITOR": "off",
        "STEERSMAN_MONITOR_SAMPLE": "0.05",
        "STEERSMAN_MONITOR_INTERVAL": "0.5",
        "STEERSMAN_MAX_RELATIVE_NORM": "0.75",
        "STEERSMAN_DOSAGE": "cap",
        "STEERSMAN_POLICY": "openvla",
        "STEERSMAN_MAX_ACTION_DELTA": "0.05",
        "STEERSMAN_SERVER": "not a setting",
    }
    found = Settings.from_env(given)
    assert (found.store, found.admin_key, found.default_profile) == ("s3://bucket/store", "secret", "calm")
    assert found.any_model
    assert found.hooked_sites == {Site.RESID_POST, Site.ATTN_Z}
    assert (found.max_plans, found.plan_memory_mb, found.max_body_mb) == (7, 8, 9)
    assert (found.policy, found.max_action_delta) == ("openvla", 0.05)
    assert (found.monitor, found.monitor_every, found.monitor_interval) == ("off", 20, 0.5)
    assert (found.max_relative_norm, found.dosage) == (0.75, "cap")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    found = Settings.from_env({})
    assert found == Settings()
    assert found.store == "/data/steersman/store"
    assert found.hooked_sites == set(Site)
    assert found.admin_key is None
    assert not found.any_model


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("MAX_PLANS", "many", "STEERSMAN_MAX_PLANS must be an integer, not 'many'"),
        ("MAX_PLANS", "0", "--steering-max-plans must be at least 1"),
        ("PLAN_MEMORY_MB", "-1", "--steering-plan-memory-mb must be at least 1"),
        ("PROBE_MEMORY_MB", "0", "--steering-probe-memory-mb must be at least 1"),
        ("CARRY_MEMORY_MB", "0", "--steering-carry-memory-mb must be at least 1"),
        ("MAX_BODY_MB", "0", "--steering-max-body-mb must be at least 1"),
        ("FUSED_NORM", "yes", "--steering-fused-norm must be auto, on or off"),
        ("MONITOR", "yes", "--steering-monitor must be on or off"),
        ("MONITOR_SAMPLE", "0", "must be auto, 1/N or a fraction up to 1, not '0'"),
        ("MONITOR_SAMPLE", "2", "must be auto, 1/N"),
        ("MONITOR_SAMPLE", "1/0", "must be auto, 1/N"),
        ("MONITOR_INTERVAL", "0", "--steering-monitor-interval must be 0.1 to 3600 seconds"),
        ("MONITOR_INTERVAL", "nan", "must be 0.1 to 3600"),
        ("MAX_RELATIVE_NORM", "big", "STEERSMAN_MAX_RELATIVE_NORM must be a number"),
        ("MAX_RELATIVE_NORM", "inf", "--steering-max-relative-norm must be a positive number"),
        ("DOSAGE", "ignore", "--steering-dosage must be warn, cap or refuse"),
        ("ANY_MODEL", "yes", "STEERSMAN_ANY_MODEL must be 0 or 1"),
        ("SITES", "resid_post,nowhere", "known sites: resid_pre"),
        ("POLICY", "pi0", "--steering-policy must be one of auto, none, openvla"),
        ("MAX_ACTION_DELTA", "fast", "STEERSMAN_MAX_ACTION_DELTA must be a number, not 'fast'"),
        ("MAX_ACTION_DELTA", "0", "--steering-max-action-delta must be a positive number"),
        ("MAX_ACTION_DELTA", "nan", "--steering-max-action-delta must be a positive number"),
        ("MAX_ROBOTS", "0", "--steering-max-robots must be at least 1"),
        ("ADMIN_KEY", "", "--steering-admin-key must not be empty"),
    ],
)
def test_bad_values_are_named(name: str, value: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings.from_env({f"STEERSMAN_{name}": value})


def test_a_baseline_needs_the_monitor() -> None:
    assert Settings.from_env({"STEERSMAN_NORM_BASELINE": "usual"}).norm_baseline == "usual"
    with pytest.raises(ValueError, match="--steering-norm-baseline needs --steering-monitor on"):
        Settings.from_env({"STEERSMAN_NORM_BASELINE": "usual", "STEERSMAN_MONITOR": "off"})


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().max_plans = 3  # type: ignore[misc]
