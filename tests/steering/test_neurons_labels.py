"""The file of labels, the search for neurons by words, and the texts of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steersman.steering import neurons_vocabulary
from steersman.steering.errors import InvalidRequest, LayerMissing, OutOfRange, UploadMalformed
from steersman.steering.neurons_labels import NeuronLabels, Rank
from steersman.steering.neurons_projection import Projection, project

VOCABULARY = ["up", " Up", " upper", "down", " cup", "[action: 0.502]", "\n", "é", ""]


class Given:
    """Weights whose columns [layers, d_ff, d] and unembedding are what they are."""

    def __init__(self, columns: dict[int, Tensor], head: Tensor) -> None:
        self.columns, self.head, self.d_model = columns, head, head.shape[1]

    def widths(self, layers: tuple[int, ...] | None = None) -> dict[int, int]:
        return {layer: len(rows) for layer, rows in self.columns.items()}

    def down(self, layer: int) -> Tensor:
        return self.columns[layer]

    def unembedding(self, start: int, stop: int) -> Tensor:
        return self.head[start:stop]


def labelled(columns: dict[int, Tensor], k: int = 3) -> NeuronLabels:
    """With an unembedding that is the identity, so that a column's entries are its logits."""
    weights = Given(columns, torch.eye(len(VOCABULARY)))
    about = {"model": {"id": "org/tiny", "n_layers": 4, "d_model": len(VOCABULARY)}, "final_norm": False}
    return NeuronLabels(about, weights.widths(), project(weights, len(VOCABULARY), top_k=k), VOCABULARY)


def column(**logits: float) -> Tensor:
    """`t3=2.0`: token 3 has the logit 2; the others little, the last tokens most."""
    out = 0.01 * torch.arange(len(VOCABULARY)).float()
    for name, value in logits.items():
        out[int(name[1:])] = value
    return out


@pytest.fixture
def labels() -> NeuronLabels:
    return labelled(
        {
            1: torch.stack([column(t0=1.0), column(t3=9.0, t0=0.5), column(t0=0.9, t1=0.9), column(t5=1.0)]),
            3: torch.stack([column(t2=8.0, t4=7.0, t7=6.0), column(t0=50.0, t3=49.0)]),
        }
    )


def test_a_token_matches_whatever_its_case_and_spaces(labels: NeuronLabels) -> None:
    found = labels.search(["UP"])
    assert {f.neuron for f in found} == {(1, 0), (1, 1), (1, 2), (3, 1)}
    assert next(f for f in found if f.neuron == (1, 2)).words in {("up", " Up"), (" Up", "up")}
    assert labels.search(["upper", "down"]) == labels.search(["down", " Upper"])


def test_a_part_matches_more(labels: NeuronLabels) -> None:
    only = {f.neuron for f in labels.search(["up"], match="part")} - {f.neuron for f in labels.search(["up"])}
    assert only == {(3, 0)}
    assert labels.search(["[action:"], match="part")[0].neuron == (1, 3)
    assert labels.search(["upp"], match="part")[0].words == (" upper",)


@pytest.mark.parametrize("rank", ["z", "probability", "count"])
def test_scores_are_what_the_whole_distribution_gives(labels: NeuronLabels, rank: Rank) -> None:
    columns = {1: 4, 3: 2}
    weights = torch.cat([labelled_columns(labels, layer, n) for layer, n in columns.items()])
    for found in labels.search(["up"], rank=rank):
        logits = weights[labels.row(found.neuron)].double()
        at = [i for i in logits.topk(3).indices.tolist() if i in (0, 1)]
        z = (logits - logits.mean()) / logits.std(correction=0)
        wanted = {"z": z[at].sum(), "probability": logits.softmax(0)[at].sum(), "count": len(at)}[rank]
        assert found.score == pytest.approx(float(wanted), rel=1e-5)
    scores = [f.score for f in labels.search(["up"], rank=rank)]
    assert scores == sorted(scores, reverse=True)


def labelled_columns(labels: NeuronLabels, layer: int, n: int) -> Tensor:
    """The columns of the fixture again: what `labelled` was given."""
    made = {
        1: [column(t0=1.0), column(t3=9.0, t0=0.5), column(t0=0.9, t1=0.9), column(t5=1.0)],
        3: [column(t2=8.0, t4=7.0, t7=6.0), column(t0=50.0, t3=49.0)],
    }
    return torch.stack(made[layer])


def test_each_rank_has_its_own_best(labels: NeuronLabels) -> None:
    best = {rank: labels.search(["up"], rank=rank)[0].neuron for rank in ("z", "probability", "count")}  # type: ignore[arg-type]
    assert best == {"z": (1, 2), "probability": (3, 1), "count": (1, 2)}
    assert labels.search(["up"], layers=[3])[0].neuron == (3, 1)
    assert {f.neuron[0] for f in labels.search(["up"], match="part", layers=[3])} == {3}


def test_words_that_no_token_is(labels: NeuronLabels) -> None:
    with pytest.raises(InvalidRequest, match=r"no token is 'upw'; look for a part"):
        labels.search(["upw"])
    for bad in ([], [" "], ["up", ""]):
        with pytest.raises(InvalidRequest) as raised:
            labels.search(bad, match="part")
        assert raised.value.param == "words"


def test_rows_and_neurons_are_each_other_s_inverse(labels: NeuronLabels) -> None:
    assert [labels.neuron(row) for row in range(6)] == [(1, 0), (1, 1), (1, 2), (1, 3), (3, 0), (3, 1)]
    assert [labels.row(labels.neuron(row)) for row in range(6)] == [*range(6)]
    assert labels.rows([3]).tolist() == [4, 5]
    assert labels.d_ff is None
    assert labels.words((3, 0)) == [" upper", " cup", "é"]
    with pytest.raises(LayerMissing, match="labelled are 1, 3"):
        labels.row((0, 0))
    with pytest.raises(OutOfRange):
        labels.row((3, 2))


def test_a_file_comes_back_whole(labels: NeuronLabels, tmp_path: Path) -> None:
    labels.write(tmp_path / "x.safetensors")
    back = NeuronLabels.read(tmp_path / "x.safetensors")
    assert (dict(back.about), back.widths, back.vocabulary) == (labels.about, labels.widths, VOCABULARY)
    for name in ("tokens", "logits", "mean", "deviation", "logsumexp"):
        assert torch.equal(getattr(back.projection, name), getattr(labels.projection, name))
    assert back.search(["up"]) == labels.search(["up"])


def test_files_that_are_none(tmp_path: Path, labels: NeuronLabels) -> None:
    (tmp_path / "text").write_text("x")
    save_file({"tokens": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(UploadMalformed, match="no file of neuron labels"):
            NeuronLabels.read(tmp_path / name)
    p = labels.projection
    cut = Projection(p.tokens[:5], p.logits, p.mean, p.deviation, p.logsumexp)
    with pytest.raises(UploadMalformed, match="tokens is"):
        NeuronLabels(labels.about, labels.widths, cut, VOCABULARY)
    with pytest.raises(UploadMalformed, match="beyond the vocabulary"):
        NeuronLabels(labels.about, labels.widths, p, VOCABULARY[:5])


class SentencePiece:
    """As Llama's tokenizer: it marks spaces, and drops the one at the start of what it turns into text."""

    tokens = ("<s>", "▁up", "up", "▁▁", "<0x0A>", "北")

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join("\n" if t == "<0x0A>" else t for t in tokens).replace("▁", " ").removeprefix(" ")


def test_texts_keep_their_spaces_and_actions_have_theirs() -> None:
    found = neurons_vocabulary.texts(SentencePiece(), 9, {2: 0.50196, 5: -1.0, 8: 0.1})
    assert found == ["<s>", " up", "[action: 0.502]", "  ", "\n", "[action: -1.000]"]
    assert len(neurons_vocabulary.texts(SentencePiece(), 4)) == 4


def test_texts_of_a_byte_level_tokenizer() -> None:
    from tests.models.tiny import _tokenizer

    tokenizer: Any = _tokenizer()
    found = neurons_vocabulary.texts(tokenizer, 10_000)
    assert len(found) == len(tokenizer)
    for text in (" the", "the", " Paris"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(found[i] for i in ids) == text
    assert "\n" in found
