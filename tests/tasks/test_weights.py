"""A column of weights, in every task whose rows come from files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from tests.conftest import ROOT, write_rows
from tests.toys.tasks import task_of
from trainer.data.render import Renderer
from trainer.data.rows import tokenise
from trainer.models.losses import ClassLoss

ROWS = {
    "classification": {"text": "a", "label": "x"},
    "completion": {"text": "one two"},
    "gsm8k": {"question": "1+1?", "answer": "2\n#### 2"},
    "metamath": {"query": "1+1?", "response": "The answer is: 2"},
    "mixture": {"prompt": "1+1=", "completion": "2"},
    "multi_label": {"text": "a", "labels": ["x"]},
    "regression": {"text": "a", "label": 0.5},
    "sft": {"prompt": "1+1=", "completion": "2"},
    "sql": {"question": "q", "context": "CREATE TABLE t (a INT)", "answer": "SELECT a FROM t"},
    "sst2": {"sentence": "a", "label": 0},
    "viggo": {"target": "It is x.", "meaning_representation": "inform(name[x])"},
}
WEIGHTS = [0.5, 2.0, 0.0, "3"]


def test_every_task_of_files_takes_one():
    names = {path.stem for path in (ROOT / "conf" / "task").glob("*.yaml")}
    assert names - {"bfcl"} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_rows_weight_reaches_its_tokens(name, tmp_path, tiny):
    """A row of weight 0 is left out, and the others bring theirs, as text of a csv file too."""
    rows = [ROWS[name] | {"w": weight} for weight in WEIGHTS]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = task_of(name, file, weight_column="w")
    assert [float(example.weight) for example in task.examples("train")] == [0.5, 2.0, 0.0, 3.0]
    table = tokenise(task, "train", Renderer(tiny.tokenizer, task), 512, "skip", 1)
    assert table.weights.tolist() == [0.5, 2.0, 3.0]
    assert table.report.weightless == 1
    assert not [name for name in table.report.unread if "'w'" in name]
    plain = task_of(name, file)
    assert {example.weight for example in plain.examples("train")} == {1.0}
    assert plain.fingerprint("train") != task.fingerprint("train")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_its_weight_is_named(name, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [ROWS[name], ROWS[name] | {"w": -1}])
    bad = list(task_of(name, file, weight_column="w").examples("train"))
    assert "no column 'w'" in bad[0].reason
    assert bad[1].reason == "w is -1, expected a number of at least 0: the row's weight"


class Fixed(torch.nn.Module):
    """A classifier that gives fixed scores."""

    def __init__(self, scores, problem):
        super().__init__()
        self.scores = torch.nn.Parameter(scores)
        self.config = SimpleNamespace(problem_type=problem)

    def forward(self, **_):
        return SimpleNamespace(logits=self.scores)


@pytest.mark.parametrize(
    ("problem", "targets"),
    [
        ("single_label_classification", torch.tensor([0, 2, -100, 1])),
        ("regression", torch.tensor([[0.5], [1.5], [float("nan")], [-1.0]])),
        (
            "multi_label_classification",
            torch.tensor([[1.0, 0, 1], [0, 0, 0], [float("nan")] * 3, [1, 1, 1]]),
        ),
    ],
)
def test_the_loss_of_a_classifier_counts_a_row_as_often_as_its_weight(problem, targets):
    """Against a loop over the rows; and a weight of 2 is the row twice."""
    torch.manual_seed(0)
    width = 1 if problem == "regression" else 3
    scores, weights = torch.randn(4, width), torch.tensor([0.5, 2.0, 7.0, 1.0])
    batch = {"input_ids": None, "attention_mask": None, "classes": targets}
    loss, sums = ClassLoss(Fixed(scores, problem))(
        batch | {"weights": weights[:, None].expand(-1, 8)}
    )
    total = 0.0
    for row in (0, 1, 3):
        logits, target = scores[row].double(), targets[row]
        if problem == "single_label_classification":
            term = -logits.log_softmax(-1)[target]
        elif problem == "regression":
            term = (logits[0] - target[0].double()) ** 2
        else:
            term = F.binary_cross_entropy(logits.sigmoid(), target.double())
        total += weights[row].double() * term
    assert loss.item() == pytest.approx(float(total), rel=1e-5)
    assert sums["tokens"].item() == 3.5
    twice = torch.tensor([0, 1, 1, 3])
    _, of_two = ClassLoss(Fixed(scores[twice], problem))(batch | {"classes": targets[twice]})
    ones = weights.clone()
    ones[0] = 1.0
    _, of_weight = ClassLoss(Fixed(scores, problem))(
        batch | {"weights": ones[:, None].expand(-1, 8)}
    )
    assert of_weight["loss"].item() == pytest.approx(of_two["loss"].item(), rel=1e-6)
    assert of_weight["tokens"].item() == of_two["tokens"].item() == 4
    if "right" in of_two:
        assert of_weight["right"].item() == of_two["right"].item()


def test_bfcl_takes_what_every_chat_takes():
    """Its rows are rendered by the same renderer, so a template can leave something out there."""
    config = OmegaConf.load(ROOT / "conf" / "task" / "bfcl.yaml")
    assert (config.on_lost, json.dumps(dict(config.chat_template_kwargs))) == ("error", "{}")
