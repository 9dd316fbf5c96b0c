"""``GET /v1/steering/norms``, with workers that are a list of answers."""

from pathlib import Path
from typing import Any

from tests.server.fakes import client, frontend

SEEN = {"worker": "a", "count": [3.0], "mean": [0.5], "square": [0.25]}


def test_each_worker_that_counts(tmp_path: Path) -> None:
    async def rpc(method: str, *args: Any) -> list[Any]:
        assert (method, args) == ("steersman_norms", ())
        return [SEEN, None, {**SEEN, "worker": "b"}]

    made = frontend(tmp_path)
    made._rpc = rpc
    found = client(made).get("/v1/steering/norms").json()
    assert found == {"object": "list", "data": [SEEN, {**SEEN, "worker": "b"}]}


def test_without_statistics_there_is_nothing_to_tell(tmp_path: Path) -> None:
    answer = client(frontend(tmp_path, monitor="off")).get("/v1/steering/norms")
    assert answer.status_code == 400
    assert "--steering-monitor off" in answer.json()["error"]["message"]
