"""Root verbs and direct objects: crafted instructions, and hand-made labels of real ones, which give `ACCURACY`."""

import json
import time
from pathlib import Path

import pytest

from alpaca.data.analysis.verbs import ACCURACY, find_root

CRAFTED = [
    ("Write a short story about a llama.", "write", "story"),
    ("Please list 3 famous mountains, then explain them.", "list", "mountain"),
    ("Can you give me some suggestions?", "give", "suggestion"),
    ("Given two numbers, and their sum, find the larger number.", "find", "number"),
    ("You are given a text. Sort the words in it.", "sort", "word"),
    ("Your task is to translate the sentences below.", "translate", "sentence"),
    ("Identify and list the primary colours.", "identify", "colour"),
    ("Describe in detail the process of making cheese", "describe", "process"),
    ("Look up the capital of Mali.", "look", "capital"),
    ("Create an analogy comparing two things", "create", "analogy"),
    ("Build a machine learning model.", "build", "model"),
    ("Re-write the children's books.", "rewrite", "book"),
    ("Summarise these analyses.", "summarize", "analysis"),
    ("Hyperbolize the following sentence.", "hyperbolize", "sentence"),
    ("Give each item a name.", "give", "name"),
    ("Come up with a list of names.", "come", ""),
    ("Explain why the sky is blue.", "explain", ""),
    ("Prove that it is so.", "prove", ""),
    ('Translate "Bonjour" into English.', "translate", "bonjour"),
    ("Classify the following as fruit or not:", "classify", "following"),
]


@pytest.mark.parametrize(("instruction", "verb", "object_"), CRAFTED)
def test_orders(instruction: str, verb: str, object_: str):
    root = find_root(instruction)
    assert (root.kind, root.verb, root.object) == ("order", verb, object_)


@pytest.mark.parametrize(
    ("instruction", "word"),
    [("What is the capital of Mali?", "what"), ("Is it cold?", "is"), ("In which year was it built?", "which"),
     ("If you could fly, where would you go?", "where"), ("Do you like tea?", "do"), ("When was it?", "when")],
)  # fmt: skip
def test_questions(instruction: str, word: str):
    root = find_root(instruction)
    assert (root.kind, root.verb, root.object) == ("question", word, "")


@pytest.mark.parametrize("instruction", ["", " \n", "...", "你好", "The sky.", "###", "1.", '"', "in, in, in, "])
def test_neither(instruction: str):
    assert find_root(instruction).kind == "other"


@pytest.mark.parametrize(
    "piece", ["in x, ", "please ", "a", "(", '"', "and write ", "write the ", "\n", "1. ", "given a "]
)
def test_long_texts_take_no_time(piece: str):
    """No rule may run away on a text made to hurt it."""
    start = time.process_time()
    find_root(piece * (40_000 // len(piece)))
    assert time.process_time() - start < 1


def score(instructions: list[str], labels: Path) -> tuple[int, int, int]:
    """(labels, verbs right, verbs and objects right)."""
    total = verbs = both = 0
    for line in labels.read_text().splitlines():
        if line.startswith("#"):
            continue
        index, verb, object_ = line.split("\t")
        root = find_root(instructions[int(index)])
        found = (root.verb if root.kind == "order" else "-", root.object or "-")
        total, verbs, both = total + 1, verbs + (found[0] == verb), both + (found == (verb, object_))
    return total, verbs, both


def test_accuracy_is_what_is_said(real: Path):
    folder = Path(__file__).parent
    alpaca = [record["instruction"] for record in json.loads((real / "alpaca_4000.json").read_text("utf-8"))]
    seeds = [json.loads(line)["instruction"] for line in (real / "seed_tasks.jsonl").read_text("utf-8").splitlines()]
    assert score(alpaca, folder / "verb_labels.tsv") == (200, 200, 197)
    assert score(seeds, folder / "verb_labels_seeds.tsv") == (60, 59, 58)
    assert "197 of 200" in ACCURACY
    assert "58 of 60" in ACCURACY
