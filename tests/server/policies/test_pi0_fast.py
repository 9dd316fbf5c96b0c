"""π0-FAST against an encoder of its own: SciPy's DCT, openpi's formulas, and a small BPE trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.fft import dct
from tokenizers import ByteLevelBPETokenizer
from tokenizers import Tokenizer as Bpe

from steersman.server.policies.catalogue import load
from steersman.server.policies.pi0_fast import Pi0Fast, cosines
from steersman.server.policies.policy import Observation
from steersman.steering.errors import ActionsMalformed, InvalidRequest
from tests.server.robots import SCENE, Station, Tokenizer, text_of

CHUNK, DIMS, SCALE, LEAST = 10, 4, 10.0, -60
VOCABULARY = 3000
STATS = {
    "action": {"q01": [-0.5, -1.0, 0.0, 2.0], "q99": [0.5, 3.0, 0.0, 4.0]},
    "proprio": {"q01": [0.0, -1.0], "q99": [2.0, 1.0]},
}
ABOUT = {"type": "pi0_fast", "fast": "fast", "vocab_size": VOCABULARY, "chunk": CHUNK, "norm_stats": {"arm": STATS}}
Numbers = NDArray[np.float64]


def smooth(seed: int) -> Numbers:
    """[chunk, dims] normalised actions, as an arm moves."""
    draw = np.random.default_rng(seed)
    return np.clip(np.cumsum(draw.normal(0, 0.15, (CHUNK, DIMS)), axis=0), -1, 1)


def spelt(actions: Numbers) -> str:
    """A chunk as FAST spells it: rounded coefficients, each a character."""
    coefficients = np.around(dct(actions, axis=0, norm="ortho") * SCALE).astype(int)
    return "".join(chr(c - LEAST) for c in coefficients.ravel())


class Words(Tokenizer):
    """Of the language model: its ids are characters."""

    eos_token_id = 2

    def __init__(self, folder: Path) -> None:
        self.name_or_path = str(folder)

    def __len__(self) -> int:
        return VOCABULARY + 1  # an image's token was added


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("policy")
    (out / "fast").mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [spelt(smooth(i)) for i in range(200)], vocab_size=500, min_frequency=2, show_progress=False
    )
    bpe.save(str(out / "fast" / "tokenizer.json"))
    about = {"processor_class": "UniversalActionProcessor", "scale": SCALE, "min_token": LEAST, "vocab_size": 500}
    (out / "fast" / "processor_config.json").write_text(json.dumps(about))
    return out


@pytest.fixture(scope="module")
def bpe(folder: Path) -> Any:
    return Bpe.from_file(str(folder / "fast" / "tokenizer.json"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Pi0Fast:
    return made(folder)


def made(folder: Path, **changes: Any) -> Pi0Fast:
    found = load("auto", {"steersman_policy": {**ABOUT, **changes}}, Words(folder))
    assert isinstance(found, Pi0Fast)
    return found


def answer(text: str, bpe: Any) -> list[int]:
    """What the language model writes for a chunk that is spelt so."""
    fast = bpe.encode(text).ids
    return [*map(ord, "Action: "), *(VOCABULARY - 1 - 128 - t for t in fast), ord("|")]


def seen(state: Any = (1.0, 0.0), **changes: Any) -> Observation:
    return Observation({"a": SCENE}, "Pick_up the Cup ", None if state is None else np.array(state), **changes)


@pytest.mark.parametrize("seed", range(5))
def test_what_an_encoder_wrote_is_read_back(policy: Pi0Fast, bpe: Any, seed: int) -> None:
    actions = smooth(1000 + seed)
    ids = answer(spelt(actions), bpe)
    assert len(ids) < len("Action: |") + CHUNK * DIMS, "the BPE joins nothing, so this shows little"
    found = policy.decode(ids, seen())
    q01, q99 = (np.array(STATS["action"][name]) for name in ("q01", "q99"))
    wanted = (actions + 1) / 2 * (q99 - q01 + 1e-6) + q01
    width = (q99 - q01 + 1e-6) / 2
    error = np.abs(found.actions - wanted) / width
    assert error.max() <= np.sqrt(CHUNK) * 0.5 / SCALE  # coefficients are rounded to 1/scale, and the DCT keeps lengths
    assert 0 < error.mean() < 0.5 / SCALE
    assert (found.strays, found.moves.tolist()) == (0, [True] * DIMS)


def test_rounded_coefficients_are_read_exactly(policy: Pi0Fast, bpe: Any) -> None:
    """A chunk whose coefficients are whole tenths comes back to the last digits, one coefficient being one cosine."""
    coefficients = np.zeros((CHUNK, DIMS))
    coefficients[2, 1], coefficients[0, 3] = 0.7, -3.1
    text = "".join(chr(round(10 * c) - LEAST) for c in coefficients.ravel())
    found = policy.decode(answer(text, bpe), seen()).actions
    t = np.arange(CHUNK)
    x = np.zeros((CHUNK, DIMS))
    x[:, 1] = 0.7 * np.sqrt(2 / CHUNK) * np.cos(np.pi * (2 * t + 1) * 2 / (2 * CHUNK))
    x[:, 3] = -3.1 / np.sqrt(CHUNK)
    q01, q99 = (np.array(STATS["action"][name]) for name in ("q01", "q99"))
    np.testing.assert_allclose(found, (x + 1) / 2 * (q99 - q01 + 1e-6) + q01, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 50])
def test_cosines_are_scipys(n: int) -> None:
    x = np.random.default_rng(n).normal(size=(n, 3))
    np.testing.assert_allclose(cosines(n) @ x, dct(x, axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(cosines(n).T @ cosines(n), np.eye(n), atol=1e-12)


def test_the_prompt_is_openpis(policy: Pi0Fast) -> None:
    found = policy.prompt(seen((1.0, 1.5)))
    text = "Task: pick up the cup, State: 127 255;\n"  # the middle falls below an edge by the 1e-6
    assert "".join(map(chr, found.token_ids[1:])) == text
    assert (found.token_ids[0], found.n_tokens, found.stop) == (1, 256, (ord("|"), 2))
    assert "".join(map(chr, policy.prompt(seen((-1.0, 0.0))).token_ids)).endswith("State: -1 127;\n")


def test_pictures_places_come_before_bos(folder: Path) -> None:
    found = made(folder, image_token=2999, cameras=1).prompt(seen())
    assert found.token_ids[:2] == [2999, 1]


MALFORMED = {
    "the start is missing": (lambda ids: ids[1:], "does not begin with 'Action: '"),
    "nothing": (lambda ids: [], "does not begin"),
    "the end is missing": (lambda ids: ids[:-1], "no end within 256"),
    "it ends at once": (lambda ids: [*ids[:8], ids[-1]], "0 coefficients"),
    "a token is missing": (lambda ids: [*ids[:8], *ids[9:]], "coefficients; 10 actions of 4 numbers have 40"),
    "one token is there twice": (lambda ids: [*ids[:9], *ids[8:]], "coefficients; 10 actions of 4 numbers have 40"),
    "a word": (lambda ids: [*ids[:9], ord("a"), *ids[9:]], "its 10., stands for no action"),
    "a token of segmentation": (lambda ids: [*ids[:9], VOCABULARY - 1, *ids[9:]], "stands for no action"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_an_answer_that_is_no_chunk_is_an_error_that_says_why(policy: Pi0Fast, bpe: Any, case: str) -> None:
    change, message = MALFORMED[case]
    with pytest.raises(ActionsMalformed, match=message):
        policy.decode(change(answer(spelt(smooth(3)), bpe)), seen())


def test_bytes_that_make_no_character_are_an_error(policy: Pi0Fast, bpe: Any) -> None:
    """ByteLevel's alphabet has a token for every byte; a lone first byte of two is none of a coefficient."""
    half = bpe.token_to_id("Ã")
    ids = [*map(ord, "Action: "), *[VOCABULARY - 1 - 128 - half] * CHUNK * DIMS, ord("|")]
    with pytest.raises(ActionsMalformed, match="do not spell whole coefficients"):
        policy.decode(ids, seen())


def test_what_comes_after_the_end_is_not_read(policy: Pi0Fast, bpe: Any) -> None:
    ids = answer(spelt(smooth(4)), bpe)
    wanted = policy.decode(ids, seen()).actions
    np.testing.assert_array_equal(policy.decode([*ids, *ids[8:]], seen()).actions, wanted)
    np.testing.assert_array_equal(policy.decode([*ids[:-1], 2], seen()).actions, wanted)  # the end of the sequence


@pytest.mark.parametrize("observation", [seen(None), seen((1.0,)), seen(unnorm_key="gone")])
def test_observations_that_the_policy_cannot_read(policy: Pi0Fast, observation: Observation) -> None:
    with pytest.raises(InvalidRequest):
        policy.prompt(observation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fast": "gone"}, "no FAST tokenizer"),
        ({"vocab_size": VOCABULARY + 2}, "at most the tokenizer's 3001"),
        ({"vocab_size": 300}, "room for 128"),
        ({"norm_stats": {"arm": {"action": STATS["action"]}}}, "'proprio'"),
        ({"chunk": 0}, "chunk"),
        ({"horizon": 3}, "horizon"),
    ],
)
def test_checkpoints_that_are_described_wrongly(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(folder, **changes)


@pytest.mark.parametrize("broken", [{"scale": 0, "min_token": 0}, {"scale": 1}, None])
def test_a_broken_fast_tokenizer(folder: Path, tmp_path: Path, broken: Any) -> None:
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "tokenizer.json").write_bytes((folder / "fast" / "tokenizer.json").read_bytes())
    (tmp_path / "fast" / "processor_config.json").write_text("?" if broken is None else json.dumps(broken))
    with pytest.raises(ValueError, match=r"FAST tokenizer|scale"):
        made(tmp_path)


def test_through_the_route(folder: Path, bpe: Any, tmp_path: Path) -> None:
    """The engine is asked to stop at the end's mark, and an answer that is none is an error of its own."""
    (tmp_path / "store").mkdir()
    station = Station(tmp_path / "store", {"steersman_policy": ABOUT}, tokenizer=Words(folder))
    written = answer(spelt(smooth(5)), bpe)
    station.engine.ids = lambda prompt, n: written
    asked = {"images": [text_of(SCENE)], "instruction": "go", "state": [1.0, 0.0]}
    found = station.http.post("/v1/actions", json=asked).json()
    np.testing.assert_allclose(found["actions"], made(folder).decode(written, seen()).actions, atol=1e-12)
    assert found["token_ids"] == written
    params = station.engine.params[0]
    assert (params.max_tokens, params.stop_token_ids) == (256, [ord("|"), 2])
    written = written[:-1]
    assert station.http.post("/v1/actions", json=asked).json()["error"]["code"] == "engine_unsteered"
    written = [*map(ord, "Action: |")]
    failed = station.http.post("/v1/actions", json=asked)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "actions_malformed")
