"""What the page says of a prediction, event by event."""

import re

import pytest

from alpaca.errors import InputError
from web.client import Ended, Piece, Started, Waiting
from web.knobs import Knob
from web.sheet import Sheet, figures, values_to_send

KNOBS = [
    Knob(name="prompt", kind="string", required=True),
    Knob(name="n", kind="integer", default=1, minimum=1, maximum=5),
    Knob(name="num_beams", kind="integer", default=1, minimum=1, maximum=8),
    Knob(name="seed", kind="integer", minimum=0),
    Knob(name="stream", kind="boolean", default=False),
]
METRICS = {"output_tokens": 12, "tokens_per_second": 40.25, "time_to_first_token_s": 0.5, "seed": 7, "queue_s": 0.0001}


def texts(sheet: Sheet) -> list[str]:
    return re.findall(r'<div class="text" dir="auto">(.*?)</div>', sheet.answers(), flags=re.DOTALL)


def test_pieces_of_one_text_are_joined():
    sheet = Sheet({"stream": True})
    for event in (Started(), Piece(index=0, text="อัล"), Piece(index=1, text="ปากา\n")):
        sheet.take(event)
    assert texts(sheet) == ["อัลปากา\n"]
    assert "2 pieces" in sheet.line()
    assert not sheet.is_complete
    sheet.take(Ended(status="succeeded", metrics=METRICS))
    assert sheet.is_complete
    assert sheet.line() == '<p class="note">12 tokens · 40.2 tokens/s · first token after 0.500 s · seed 7</p>'


def test_completions_stand_side_by_side_each_as_it_is_done():
    sheet = Sheet({"n": 3})
    assert texts(sheet) == ["", "", ""]
    assert "not streamed: the server streams single completions" in sheet.line()
    sheet.take(Piece(index=0, text="a"))
    sheet.take(Piece(index=1, text="b"))
    assert texts(sheet) == ["a", "b", ""]
    assert [f"{i} of 3" in sheet.answers() for i in (1, 2, 3)] == [True] * 3


def test_what_the_model_writes_is_no_markup():
    sheet = Sheet({"stream": True})
    sheet.take(Piece(index=0, text='</div><img src=x onerror="alert(1)">'))
    assert "<img" not in sheet.answers()
    assert texts(sheet) == ["&lt;/div&gt;&lt;img src=x onerror=&#34;alert(1)&#34;&gt;"]
    sheet.take(Ended(status="failed", error="<b>no</b>"))
    assert sheet.line() == '<p class="complaint" role="alert">&lt;b&gt;no&lt;/b&gt;.</p>'
    assert texts(sheet)  # what there was stays


def test_waiting_is_said_until_it_is_over():
    sheet = Sheet({"stream": True})
    sheet.take(Waiting(seconds=4.2))
    assert "All slots of the server are taken; waiting for 4 s." in sheet.line()
    sheet.take(Started())
    assert "0 pieces" in sheet.line()


def test_stopped_before_and_after_the_first_piece():
    sheet = Sheet({"stream": True})
    sheet.take(Ended(status="canceled"))
    assert "before there was any text" in sheet.line()
    assert sheet.answers() == ""
    other = Sheet({"stream": True})
    other.take(Piece(index=0, text="a"))
    other.take(Ended(status="canceled"))
    assert "Stopped after 1 pieces and 0.0 s; the first came after 0.00 s." in other.line()
    assert texts(other) == ["a"]


def test_figures_that_are_missing_are_left_out():
    assert figures({"seed": 0, "other": "x"}) == "seed 0"
    assert figures({}) == "Done."


@pytest.mark.parametrize(
    ("shown", "sent"),
    [
        (["x", 1, 1, None, True], {"prompt": "x", "n": 1, "num_beams": 1, "stream": True}),
        (["x", 3, 1, 0, True], {"prompt": "x", "n": 3, "num_beams": 1, "seed": 0}),
        (["", 1, 4, None, True], {"prompt": "", "n": 1, "num_beams": 4}),
        (["x", 1, 1, None, False], {"prompt": "x", "n": 1, "num_beams": 1, "stream": False}),
    ],
)
def test_streams_what_can_be_streamed(shown, sent):
    assert values_to_send(KNOBS, shown) == sent


def test_a_bad_value_is_named_before_anything_is_sent():
    with pytest.raises(InputError, match="n must be 1 to 5; found 6"):
        values_to_send(KNOBS, ["x", 6, 1, None, True])
