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
        "STEERSMAN_SERVER": "not a setting",
    }
    found = Settings.from_env(given)
    assert (found.store, found.admin_key, found.default_profile) == ("s3://bucket/store", "secret", "calm")
    assert found.any_model
    assert found.hooked_sites == {Site.RESID_POST, Site.ATTN_Z}
    assert (found.max_plans, found.plan_memory_mb, found.max_body_mb) == (7, 8, 9)


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
        ("MAX_BODY_MB", "0", "--steering-max-body-mb must be at least 1"),
        ("ANY_MODEL", "yes", "STEERSMAN_ANY_MODEL must be 0 or 1"),
        ("SITES", "resid_post,nowhere", "known sites: resid_pre"),
        ("ADMIN_KEY", "", "--steering-admin-key must not be empty"),
    ],
)
def test_bad_values_are_named(name: str, value: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings.from_env({f"STEERSMAN_{name}": value})


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().max_plans = 3  # type: ignore[misc]
