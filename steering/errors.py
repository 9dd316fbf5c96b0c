"""The one error tree. Every failure that a client can see is a leaf of it.

::

    SteeringError                     (abstract)
    ├── InvalidRequest                400  invalid_steering        the request is not what the schema says
    │   ├── UnknownField              400  unknown_field           a field that nobody reads
    │   ├── AmbiguousVersion          400  ambiguous_version       a version prefix that several versions share
    │   ├── AssetKindMismatch         400  asset_kind_mismatch     e.g. a dictionary where a vector is wanted
    │   ├── ModelMismatch             400  model_mismatch          the asset was made for another model
    │   ├── WidthMismatch             400  width_mismatch          a tensor is not as wide as its site
    │   ├── LayerOutOfRange           400  layer_out_of_range      the model has no such layer
    │   ├── LayerMissing              400  layer_missing           the asset has no such layer
    │   ├── SiteUnsupported           400  site_unsupported        this engine cannot edit or read there
    │   ├── NonFinite                 400  non_finite              NaN or infinity
    │   ├── OutOfRange                400  out_of_range            a finite number beyond its bounds
    │   ├── InlineMalformed           400  inline_malformed        inline data whose bytes do not fit its shape
    │   ├── UploadMalformed           400  upload_malformed        an uploaded file that cannot be read
    │   ├── FeatureUnreadable         400  feature_unreadable      its activation cannot be told where it is asked for
    │   ├── GateOrder                 400  gate_order              a gate read after the edit that it decides
    │   ├── TooManyInterventions      400  too_many_interventions  more edits than a plan may hold
    │   └── DosageExceeded            400  dosage_exceeded         an edit larger than the server allows
    ├── Unauthorized                  401  unauthorized            the admin key is missing or wrong
    ├── PayloadTooLarge               413  payload_too_large       a body or an inline tensor over its limit
    ├── RateLimited                   429  rate_limited            a robot sends observations faster than it may
    ├── PolicyUnavailable             501  policy_unavailable      the served model is no robot policy
    ├── TooManySessions               503  too_many_sessions       as many robots or viewers are there as may be
    ├── UnknownJob                    404  job_not_found           no such job is remembered
    ├── TooManyJobs                   503  too_many_jobs           as many jobs wait as may
    ├── FormatUnavailable             501  format_unavailable      the library that reads the format is not installed
    ├── StoreError                    (abstract)
    │   ├── UnknownCapture            404  capture_not_found       no such capture is kept
    │   ├── UnknownAsset              404  asset_not_found         no such name or version
    │   ├── AssetExists               409  asset_exists            the name or version is taken by other content
    │   ├── AssetInUse                409  asset_in_use            e.g. the default profile cannot be deleted
    │   ├── AssetCorrupt              500  asset_corrupt           stored files do not match their hash
    │   └── StoreUnavailable          503  store_unavailable       the store's root cannot be reached
    └── EngineError                   (abstract)
        ├── EngineUnsteered           500  engine_unsteered        the engine did not apply the plan
        ├── ActionsMalformed          500  actions_malformed       what the policy wrote is no action
        └── CapacityExceeded          503  capacity_exceeded       no room for another resident plan

409 is only for conflicts that another try may find resolved: OpenAI's clients retry 408, 409, 429 and 5xx, and a retry
never cures a model mismatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self


class SteeringError(Exception):
    """Base of the tree. `param` is the JSON path of the bad field, such as `steering.interventions[0].vector`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "steering_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def at(self, prefix: str) -> Self:
        """This error with `prefix` put before its path: an inner function does not know where it was called from."""
        self.param = join_path(prefix, self.param)
        return self

    @property
    def type(self) -> str:
        return "invalid_request_error" if self.status < 500 else "internal_error"

    def body(self) -> dict[str, dict[str, Any]]:
        """OpenAI's error body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def join_path(prefix: str, path: str | None) -> str:
    """`a.b` + `c` = `a.b.c`; `a.b` + `[0]` = `a.b[0]`."""
    if not path:
        return prefix
    if not prefix:
        return path
    return prefix + path if path.startswith("[") else f"{prefix}.{path}"


@contextmanager
def located(prefix: str) -> Iterator[None]:
    """Errors raised inside get `prefix` before their path."""
    try:
        yield
    except SteeringError as error:
        error.at(prefix)
        raise


class InvalidRequest(SteeringError):
    status = 400
    code = "invalid_steering"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class AmbiguousVersion(InvalidRequest):
    code = "ambiguous_version"


class AssetKindMismatch(InvalidRequest):
    code = "asset_kind_mismatch"


class ModelMismatch(InvalidRequest):
    code = "model_mismatch"


class WidthMismatch(InvalidRequest):
    code = "width_mismatch"


class LayerOutOfRange(InvalidRequest):
    code = "layer_out_of_range"


class LayerMissing(InvalidRequest):
    code = "layer_missing"


class SiteUnsupported(InvalidRequest):
    code = "site_unsupported"


class NonFinite(InvalidRequest):
    code = "non_finite"


class OutOfRange(InvalidRequest):
    code = "out_of_range"


class InlineMalformed(InvalidRequest):
    code = "inline_malformed"


class UploadMalformed(InvalidRequest):
    code = "upload_malformed"


class FeatureUnreadable(InvalidRequest):
    code = "feature_unreadable"


class GateOrder(InvalidRequest):
    code = "gate_order"


class TooManyInterventions(InvalidRequest):
    code = "too_many_interventions"


class DosageExceeded(InvalidRequest):
    code = "dosage_exceeded"


class Unauthorized(SteeringError):
    status = 401
    code = "unauthorized"


class PayloadTooLarge(SteeringError):
    status = 413
    code = "payload_too_large"


class RateLimited(SteeringError):
    status = 429
    code = "rate_limited"


class PolicyUnavailable(SteeringError):
    status = 501
    code = "policy_unavailable"


class TooManySessions(SteeringError):
    status = 503
    code = "too_many_sessions"


class UnknownJob(SteeringError):
    status = 404
    code = "job_not_found"


class TooManyJobs(SteeringError):
    status = 503
    code = "too_many_jobs"


class FormatUnavailable(SteeringError):
    status = 501
    code = "format_unavailable"


class StoreError(SteeringError):
    """Abstract: what the store refuses or cannot do."""

    code = "store_error"


class UnknownAsset(StoreError):
    status = 404
    code = "asset_not_found"


class UnknownCapture(StoreError):
    status = 404
    code = "capture_not_found"


class AssetExists(StoreError):
    status = 409
    code = "asset_exists"


class AssetInUse(StoreError):
    status = 409
    code = "asset_in_use"


class AssetCorrupt(StoreError):
    status = 500
    code = "asset_corrupt"


class StoreUnavailable(StoreError):
    status = 503
    code = "store_unavailable"


class EngineError(SteeringError):
    """Abstract: what the engine refuses or failed to do."""

    code = "engine_error"


class EngineUnsteered(EngineError):
    status = 500
    code = "engine_unsteered"


class ActionsMalformed(EngineError):
    status = 500
    code = "actions_malformed"


class CapacityExceeded(EngineError):
    status = 503
    code = "capacity_exceeded"


ABSTRACT: tuple[type[SteeringError], ...] = (SteeringError, StoreError, EngineError)


def codes() -> dict[str, type[SteeringError]]:
    """Every stable code and the class that carries it, the abstract ones left out."""
    found: dict[str, type[SteeringError]] = {}
    queue: list[type[SteeringError]] = [SteeringError]
    while queue:
        cls = queue.pop(0)
        queue.extend(cls.__subclasses__())
        if cls not in ABSTRACT:
            found[cls.code] = cls
    return found
