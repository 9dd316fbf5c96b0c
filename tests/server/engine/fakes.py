"""What the tests of the runners' adapters share: requests as the scheduler sends them, and a runtime that records."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.wire import KEY
from steersman.steering.tokens import Ints, Prompt, Selection


class Recorder(Runtime):
    """A runtime whose passes are written down instead of laid out."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []  # the rows of each pass, "forward" and "end"
        self.read: Callable[[int, int], Ints] | None = None

    def begin(self, batch: Sequence[Scheduled], token_ids: Callable[[int, int], Ints], replayed: bool = False) -> None:
        self.log.append(list(batch))
        self.read = token_ids

    def end(self) -> None:
        self.log.append("end")
        super().end()


def steering(prompt_length: int, key: str = "k") -> dict[str, Any]:
    prompt = Prompt(range(prompt_length))
    selection = Selection.build(["all"], prompt, ["tokens"])
    return {"plan": "p", "edits": "p", "key": key, "selection": selection.to_json(), "decides": False}


def arrival(request_id: str, args: dict[str, Any] | None, prompt: Sequence[int] = range(8)) -> NewRequestData:
    return NewRequestData(
        req_id=request_id,
        prompt_token_ids=list(prompt),
        mm_features=[],
        sampling_params=SamplingParams(extra_args=None if args is None else {KEY: args}),
        pooling_params=None,
        block_ids=([0],),
        num_computed_tokens=0,
        lora_request=None,
    )


def step(
    counts: dict[str, int] | None = None, new: Sequence[NewRequestData] = (), finished: Sequence[str] = ()
) -> SchedulerOutput:
    out = SchedulerOutput.make_empty()
    out.num_scheduled_tokens = counts or {}
    out.total_num_scheduled_tokens = sum(out.num_scheduled_tokens.values())
    out.scheduled_new_reqs = list(new)
    out.finished_req_ids = set(finished)
    return out


def config(**changes: Any) -> Any:
    """The settings that `refuse` reads; their names are checked against vLLM's in a contract test."""
    mode = changes.pop("cudagraph_mode", None)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            use_ubatching=changes.pop("use_ubatching", False),
            prefill_context_parallel_size=changes.pop("prefill_context_parallel_size", 1),
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=changes.pop("kv_sharing_fast_prefill", False)),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(**changes), cudagraph_mode=mode, splitting_ops=None
        ),
    )


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def calls(function: Callable[..., Any]) -> list[str]:
    """The methods that `function` calls on `self` or on what self holds, in the order of the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    mine = [f for f in found if ast.unparse(f).startswith("self.")]
    return [ast.unparse(f).removeprefix("self.") for f in sorted(mine, key=lambda f: (f.lineno, f.col_offset))]


def calls_if(function: Callable[..., Any], condition: str) -> list[str]:
    """Methods that are called on `self` in the body of any `if condition:` of `function`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == condition]
    found = [n.func for body in bodies for s in body for n in ast.walk(s) if isinstance(n, ast.Call)]
    return [ast.unparse(f).removeprefix("self.") for f in found if ast.unparse(f).startswith("self.")]


def assigned(cls: type) -> set[str]:
    """The attributes that `cls` sets on itself, in any method."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {n.attr for n in stores if ast.unparse(n.value) == "self"}
