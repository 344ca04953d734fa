"""The server's inputs as knobs: nothing of predict.py's bounds is written down twice."""

import copy
import inspect

import pytest

from alpaca.errors import InputError
from alpaca.serving.request import PredictionInputs
from deploy import schema
from web.knobs import OMITTED, Knob, read_knobs


@pytest.fixture(scope="module")
def document() -> dict:
    return schema.build_schema()


@pytest.fixture(scope="module")
def knobs(document) -> dict[str, Knob]:
    return {knob.name: knob for knob in read_knobs(document)}


def test_every_input_of_the_predictor_is_there_in_its_order(knobs):
    import predict

    unused = ("self", "max_length", "max_tokens")  # the last two are listed in the schema as deprecated
    assert list(knobs) == [name for name in inspect.signature(predict.Predictor.run).parameters if name not in unused]


def test_what_an_untouched_page_sends_is_what_the_server_takes_by_itself(knobs):
    sent = {name: knob.sent(knob.shown) for name, knob in knobs.items() if knob.sent(knob.shown) is not OMITTED}
    assert None not in sent.values()  # the server refuses null
    assert {"seed", "total_tokens"}.isdisjoint(sent)
    assert PredictionInputs.from_mapping({**sent, "prompt": "x"}) == PredictionInputs(prompt="x")


def test_bounds_and_default_are_the_schemas(document, knobs):
    for name, entry in document["components"]["schemas"]["Input"]["properties"].items():
        if entry.get("deprecated"):
            continue
        knob = knobs[name]
        assert (knob.minimum, knob.maximum) == (entry.get("minimum"), entry.get("maximum"))
        assert knob.default == entry.get("default")
        assert knob.hint.startswith(entry["description"])
    assert knobs["temperature"].hint.endswith("0 to 5. Default 0.75.")
    assert knobs["seed"].hint.endswith("0 or more. Empty: left to the server.")


def test_a_slider_only_where_both_ends_are_known(knobs):
    sliders = {name for name, knob in knobs.items() if knob.slides}
    assert sliders == {
        "n", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "num_beams",
    }  # fmt: skip
    assert knobs["n"].step == 1
    assert knobs["temperature"].step == pytest.approx(0.01)


def test_both_bounds_are_allowed_and_what_lies_beyond_is_refused_by_name(knobs):
    for name, knob in knobs.items():
        for bound, beyond in ((knob.minimum, -1), (knob.maximum, 1)):
            if bound is not None:
                assert knob.sent(bound) == bound
                with pytest.raises(InputError, match=rf"^{name} must be .*; found "):
                    knob.sent(bound + beyond)


def test_whole_numbers_stay_whole(knobs):
    assert repr(knobs["max_new_tokens"].sent(5.0)) == "5"
    with pytest.raises(InputError, match="max_new_tokens must be a whole number"):
        knobs["max_new_tokens"].sent(5.5)
    with pytest.raises(InputError, match="top_p must be a finite number"):
        knobs["top_p"].sent(float("nan"))
    with pytest.raises(InputError, match="top_k must be a number; found 'many'"):
        knobs["top_k"].sent("many")


def test_an_emptied_field_is_left_out(knobs):
    assert knobs["temperature"].sent(None) is OMITTED
    assert knobs["seed"].sent("  ") is OMITTED
    assert knobs["prompt_template"].sent("") is OMITTED
    assert knobs["prompt"].sent("") is OMITTED
    assert Knob(name="text", kind="string", required=True).sent("") == ""


@pytest.mark.parametrize(
    ("shown", "sent"),
    [("", []), ("###\n\n END ", ["###", " END "]), (r"\n\n###", ["\n\n###"]), (r"\\n \q \t", ["\\n \\q \t"]),
     ("\\", ["\\"])],
)  # fmt: skip
def test_stop_texts_are_lines_with_escapes(knobs, shown, sent):
    assert knobs["stop"].sent(shown) == sent


@pytest.mark.parametrize("texts", [["a"], ["\n\n", "\\n"], [r"\\t", "ภาษา\t"]])
def test_stop_texts_shown_and_sent_again_are_the_same(texts):
    knob = Knob(name="stop", kind="strings", default=texts)
    assert knob.sent(knob.shown) == texts


def test_inputs_nobody_here_has_heard_of_appear_by_themselves(document):
    later = copy.deepcopy(document)
    schemas = later["components"]["schemas"]
    schemas["Input"]["properties"] |= {
        "replicate_weights": {"type": "string", "format": "uri", "nullable": True, "x-order": 30,
                              "description": "an adapter"},
        "dialect": {"allOf": [{"$ref": "#/components/schemas/dialect"}], "x-order": 31, "default": "dry"},
        "echo": {"type": "boolean", "nullable": True, "x-order": 32},
        "bias": {"type": "object", "nullable": True, "x-order": 33},
        "key": {"type": "string", "format": "password", "nullable": True, "x-order": 34},
        "old": {"type": "string", "deprecated": True, "x-order": 35},
    }  # fmt: skip
    schemas["dialect"] = {"type": "string", "enum": ["dry", "florid"]}
    *_, weights, dialect, echo, bias, key = read_knobs(later)
    assert weights == Knob(name="replicate_weights", kind="string", description="an adapter")
    assert weights.sent("") is OMITTED
    assert weights.sent("https://x/y.tar") == "https://x/y.tar"
    assert (dialect.choices, dialect.sent("florid")) == (("dry", "florid"), "florid")
    assert [echo.sent(value) for value in (None, False, True)] == [OMITTED, False, True]
    assert bias.sent('{"7": -1}') == {"7": -1}
    with pytest.raises(InputError, match="bias must be JSON: "):
        bias.sent("{7}")
    assert key.secret


def test_a_document_without_inputs_is_refused():
    with pytest.raises(InputError, match="describes no inputs; was it started with script/serve, without --train"):
        read_knobs({"components": {"schemas": {"TrainingInput": {}}}})
