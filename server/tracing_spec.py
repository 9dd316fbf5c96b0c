"""What tracing jobs may be asked: questions with answers, how a run is corrupted, what is put back or taken out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import Field, model_validator

from steersman.steering.errors import SteeringError
from steersman.steering.spec import MAX_NEURONS, Boxes, Index, Layers, Model
from steersman.steering.tracing import COMPONENTS, GROUPS, Component, Group

MAX_QUESTIONS = 10_000
MAX_TEXT = 200_000  # characters
PIXEL_SIGMA = 100.0
EMBEDDING_SIGMA = 3.0

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Prompt = Text | Annotated[list[Index], Field(min_length=1)]
Sigma = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Question(Model):
    text: Text | None = Field(
        None, description="a user's message, by the server's chat template; the picture comes first"
    )
    prompt: Prompt | None = Field(
        None, description="in place of it the prompt as the model gets it: a text or token ids"
    )
    image: str | None = Field(None, description="PNG or JPEG in base64")
    answer: Text | Index = Field(
        description="as the model begins it after the prompt, a space included where it writes one; or a token's id"
    )
    object: Text | None = Field(None, description="its name as it stands in the text")
    box: Boxes | None = Field(None, description="of the object, in pixels of the image as sent")
    swap: Prompt | None = Field(None, description="what stands in place of text or prompt in a corrupted run")
    set: str = Field("", max_length=200, description="questions of one set are also told of apart from others")

    @model_validator(mode="after")
    def _consistent(self) -> Question:
        if (self.text is None) == (self.prompt is None):
            raise ValueError("give either text or prompt")
        if self.box is not None and self.image is None:
            raise ValueError("a box needs an image")
        if self.text is not None and self.swap is not None and not isinstance(self.swap, str):
            raise ValueError("swap must be a text, as text is")
        return self

    @property
    def given(self) -> str | list[int]:
        found = self.text if self.text is not None else self.prompt
        assert found is not None
        return found


class _Tracing(Model):
    questions: Annotated[list[Question], Field(min_length=1, max_length=MAX_QUESTIONS)]
    layers: Layers = "all"

    @property
    def name(self) -> str:
        return f"{len(self.questions)} question{'s' * (len(self.questions) > 1)}"


class TraceSpec(_Tracing):
    """Puts back one component of one layer for one group of tokens in a corrupted run: recovery rates (FCCT)."""

    kind: Literal["trace"]
    components: Annotated[list[Component], Field(min_length=1)] = Field([*COMPONENTS])
    groups: Annotated[list[Group], Field(min_length=1)] = Field([*GROUPS])
    window: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="layers that are put back together, around each"
    )
    sigma: Sigma | None = Field(
        None,
        description="of the noise. With an image: in the 255 steps of a colour, on every pixel (100). Without: in "
        "standard deviations of the prompt's embeddings, on those of the object's name (3)",
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    @model_validator(mode="after")
    def _corruptible(self) -> TraceSpec:
        for i, question in enumerate(self.questions):
            if question.swap is not None and question.image is not None:
                raise ValueError(f"questions[{i}] has an image, whose noise is the corruption: leave swap out")
            if question.image is None and question.swap is None and question.object is None:
                raise ValueError(f"questions[{i}] needs an image, a swap or an object: what is to be corrupted?")
        return self


class AblateSpec(_Tracing):
    """Takes out a layer's attention or MLP, a head or a neuron, one at a time: how far the answer falls."""

    kind: Literal["ablate"]
    units: Literal["layers", "heads", "neurons"]
    value: Literal["zero", "mean"] = Field("zero", description="what stands in its place: nothing, or its mean")
    neurons: Annotated[list[tuple[Index, Index]], Field(min_length=1, max_length=MAX_NEURONS)] | None = Field(
        None, description="[layer, index] of each neuron; for units neurons"
    )

    @model_validator(mode="after")
    def _neurons(self) -> AblateSpec:
        if (self.units == "neurons") != (self.neurons is not None):
            raise ValueError("neurons and units: neurons go together")
        if self.neurons is not None and "layers" in self.model_fields_set:
            raise ValueError("layers is not for neurons, which have theirs")
        return self


@contextmanager
def of_question(i: int, fields: Sequence[str] = ()) -> Iterator[None]:
    """An error within is the ``i``-th question's; fields that a question does not have are not the client's."""
    try:
        yield
    except SteeringError as error:
        field = (error.param or "").partition(".")[0]
        error.param = f"questions[{i}]" + (f".{field}" if field in fields else "")
        raise
