"""What a request may say. A refusal names the setting, its value and what was expected."""

from __future__ import annotations

import json

import pytest

from trainer.serving.errors import ApiError
from trainer.serving.requests import ChatSettings, TextSettings, parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "m", "prompt": "a"}
REFUSED = [
    (b"{", "the body is no JSON: "),
    (b"", "the body is no JSON: "),
    (b"\xff\xfe", "the body is no JSON: "),
    (b'{"model": "\\ud800", "messages": []}', "the body is no JSON: "),
    (b"[" * 100_000, "the body is no JSON: "),
    (b"[1]", "the body must be a JSON object"),
    ({"messages": CHAT["messages"]}, "model: missing"),
    ({"model": "m"}, "messages: missing"),
    ({**CHAT, "model": 3}, "model=3: expected a valid string"),
    ({**CHAT, "messages": []}, "messages=[]: "),
    ({**CHAT, "messages": "hello"}, "messages='hello': expected a valid array"),
    ({**CHAT, "messages": ["hello"]}, "messages.0='hello': "),
    ({**CHAT, "temperature": "0"}, "temperature='0': expected a valid number"),
    ({**CHAT, "temperature": 2.5}, "temperature=2.5: expected less than or equal to 2"),
    ({**CHAT, "temperature": float("nan")}, "temperature=nan: expected a finite number"),
    ({**CHAT, "top_p": 0}, "top_p=0: expected greater than 0"),
    ({**CHAT, "max_tokens": 0}, "max_tokens=0: expected at least 1, or /v1/completions with echo"),
    ({**CHAT, "max_tokens": -1}, "max_tokens=-1: expected greater than or equal to 0"),
    ({**CHAT, "echo": True}, "echo: there is no such setting"),
    ({**CHAT, "max_tokens": True}, "max_tokens=True: expected a valid integer"),
    ({**CHAT, "max_tokens": 1.5}, "max_tokens=1.5: expected a valid integer"),
    ({**CHAT, "n": 2}, "n=2: expected 1"),
    ({**CHAT, "seed": 2**63}, f"seed={2**63}: expected less than {2**63}"),
    ({**CHAT, "stop": ""}, "stop='': string should have at least 1 character"),
    ({**CHAT, "stop": ["a"] * 17}, "stop=['a', 'a'"),
    ({**CHAT, "logit_bias": {"5": 1.0}}, "logit_bias={'5': 1.0}: "),
    ({**CHAT, "frequency_penalty": 0.5}, "frequency_penalty=0.5: expected less than or equal to 0"),
    ({**CHAT, "response_format": {"type": "json_object"}}, "response_format.type='json_object': "),
    ({**CHAT, "top_logprobs": 2}, "top_logprobs=2 has no effect without logprobs=true"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs=21: expected less than or"),
    ({**CHAT, "stream_options": {}}, "stream_options has no effect without stream=true"),
    ({**CHAT, "max_token": 5}, "max_token: there is no such setting. Did you mean max_tokens?"),
    ({**CHAT, "\x1b]0;x\x07": 5}, "there is no such setting"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_chat_is_refused(body, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as refusal:
        parse(ChatSettings, content)
    assert refusal.value.status == 400
    assert message in refusal.value.message
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 5}, "prompt=5: expected a valid string or a valid array"),
        ({"prompt": [-1]}, "prompt.0=-1: expected greater than or equal to 0"),
        ({"prompt": [65, -1]}, "prompt.1=-1: expected greater than or equal to 0"),
        ({"prompt": [[1], [-2]]}, "prompt.1.0=-2: expected greater than or equal to 0"),
        ({"prompt": ["a", 5]}, "prompt.1=5: expected a valid string"),
        ({"prompt": [1.5]}, "prompt.0=1.5: expected a valid integer or a valid string or a"),
        ({"stop": ["", "x"]}, "stop.0='': string should have at least 1 character"),
        ({"stop": ["a"] * 17}, "list should have at most 16 items"),
        ({"echo": "yes"}, "echo='yes': expected a valid boolean"),
        ({"max_tokens": 0}, "max_tokens=0: expected at least 1"),
        ({"max_tokens": 0, "echo": False}, "max_tokens=0: expected at least 1"),
        ({"best_of": 2}, "best_of=2: expected 1"),
        ({"suffix": "x"}, "suffix='x': "),
        ({"messages": []}, "messages: there is no such setting"),
    ],
)
def test_a_text_is_refused(change, message):
    with pytest.raises(ApiError) as refusal:
        parse(TextSettings, json.dumps(TEXT | change).encode())
    assert message in refusal.value.message


def test_settings_are_read():
    more = {
        "max_completion_tokens": 7,
        "logprobs": True,
        "top_logprobs": 3,
        "stop": "x",
        "user": "u",
    }
    chat = parse(ChatSettings, json.dumps(CHAT | more).encode())
    assert (chat.max_tokens, chat.top, chat.stops) == (7, 3, ["x"])
    assert parse(ChatSettings, json.dumps(CHAT | {"logprobs": True}).encode()).top == 0
    assert parse(ChatSettings, json.dumps(CHAT).encode()).top is None
    text = parse(TextSettings, json.dumps(TEXT | {"logprobs": 2, "stop": ["a", "b"]}).encode())
    assert (text.top, text.stops, text.max_tokens) == (2, ["a", "b"], None)


def test_an_error_has_the_form_of_openai():
    error = ApiError(404, "text", "model", "model_not_found")
    assert error.body == {
        "error": {
            "message": "text",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert ApiError(429, "x").body["error"]["type"] == "rate_limit_error"
    assert ApiError(503, "x").body["error"]["type"] == "server_error"
    assert ApiError(429, "x").headers == {"retry-after": "1"}
