"""Server settings from the environment."""

import pytest

from alpaca.errors import InputError
from alpaca.serving.settings import ServerSettings


def test_environment_is_read_and_typed():
    settings = ServerSettings.from_environment(
        {"COG_WEIGHTS": "w", "ALPACA_MAX_CONTEXT": "512", "ALPACA_MEMORY_FRACTION": "0.5", "ALPACA_DTYPE": "", "X": "y"}
    )
    assert settings == ServerSettings(weights="w", max_context=512, memory_fraction=0.5)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("ALPACA_DTYPE", "int4", "ALPACA_DTYPE must be one of float32, bfloat16, float16; found 'int4'"),
        ("ALPACA_MAX_CONTEXT", "long", r"ALPACA_MAX_CONTEXT must be a number \(int\); found 'long'"),
        ("ALPACA_MAX_CONTEXT", "0", "ALPACA_MAX_CONTEXT must be at least 8; found 0"),
        ("ALPACA_MEMORY_FRACTION", "1.5", "above 0 and at most 1; found 1.5"),
        ("ALPACA_ENGINE", "vllm", "ALPACA_ENGINE must be one of auto, llama, transformers"),
    ],
)
def test_bad_settings_name_the_variable(variable, text, message):
    with pytest.raises(InputError, match=message):
        ServerSettings.from_environment({variable: text})
