"""Behaves as the gate and the runtime towards the endpoint, without a model: documents, health, refusals on demand.

The prompt, or the last message, says what to do: `slow S` (a pause before each piece), `fail ERROR`, `break` (the
connection ends after a piece), `vanish` and `vanish-once` (before the answer's head), `hold` (no head until `release`
is set). Anything else is answered: see `completion`.
"""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.deploy.gate.answering import AnsweringHandler, AnsweringServer

PROMPT_TOKENS = 7


def completion(prompt: str, index: int) -> list[str]:
    """The pieces that the fake answers with, a token each."""
    return [*(f" {word}" for word in prompt.split()), f" ไ{index}"]


def scored(text: str, num_top: int, *, logprob: float | None = -0.5) -> dict[str, Any]:
    top = [entry_of(f"{text}{i}", -0.5 - i) for i in range(num_top)]
    return {**entry_of(text, logprob), "top": top}


def entry_of(text: str, logprob: float | None) -> dict[str, Any]:
    return {"id": len(text), "text": text, "bytes": list(text.encode()), "logprob": logprob}


def documents(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `details` gives for these inputs."""
    prompt = prompt_of(values)
    for index in range(values.get("n", 1)):
        texts = completion(prompt, index)[: values["max_new_tokens"]]
        is_cut = len(texts) < len(completion(prompt, index))
        end = {"finish_reason": "length" if is_cut else "stop", "stop": None, "seed": values.get("seed", 1)}
        end |= {"prompt_tokens": PROMPT_TOKENS, "output_tokens": len(texts)}
        pieces = [[text] for text in texts] if values.get("stream") else [texts]
        for number, piece in enumerate(pieces):
            document: dict[str, Any] = {"index": index, "text": "".join(piece)}
            if "logprobs" in values:
                document["logprobs"] = [scored(text, values["logprobs"]) for text in piece]
                if values.get("echo") and number == 0:
                    told = [scored(f" {word}", values["logprobs"]) for word in prompt.split()]
                    document["prompt_logprobs"] = [scored("", 0, logprob=None), *told]  # BOS; and SentencePiece's blank
            if not values.get("stream"):
                document |= end
            yield document
        if values.get("stream"):
            yield {"index": index, "text": "", **end}


def prompt_of(values: dict[str, Any]) -> str:
    if "prompt" in values:
        return values["prompt"]
    content = values["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class FakeServer(AnsweringServer):
    """status: what its health says.   asked: (inputs, headers) of each prediction.   num_full: so many get 409 first.

    num_gone: clients that left before the end.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.asked, self.num_full, self.num_gone = "READY", [], 0, 0
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def prompts(self) -> list[str]:
        return [prompt_of(values) for values, _ in self.asked]

    def stop_listening(self) -> None:
        """May be called again."""
        self.shutdown()
        self.server_close()

    def stop(self) -> None:
        self.release.set()
        self.stop_listening()
        self._thread.join()


class Handler(AnsweringHandler, BaseHTTPRequestHandler):  # the second for ruff: do_GET is its word
    server: FakeServer

    def do_GET(self) -> None:
        self.reply(200, {"status": self.server.status})

    def do_POST(self) -> None:
        values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        if self.server.num_full:
            self.server.num_full -= 1
            return self.reply(409, {"error": "At capacity"})
        self.server.asked.append((values, dict(self.headers.items())))
        what, _, value = prompt_of(values).partition(" ")
        if values.get("n", 1) > 5:
            return self.reply(422, {"detail": [{"loc": ["body", "input", "n"], "msg": "9 is greater than 5.0"}]})
        if what == "vanish" or (what == "vanish-once" and self.server.prompts().count("vanish-once") == 1):
            self.close_connection = True
            return None
        if what == "hold":
            self.server.release.wait(10)
        return self.stream(values, what, value)

    def stream(self, values: dict[str, Any], what: str, value: str) -> None:
        self.begin_events()
        try:
            self.send_event("start", {})
            if what == "fail":
                error = f"Prediction failed: Generator iteration error: {value}"
                self.send_event("completed", {"status": "failed", "error": error})
            else:
                self.send_documents(values, what, value)
            self.send_chunk(b"")
        except OSError:
            self.server.num_gone += 1
            self.close_connection = True

    def send_documents(self, values: dict[str, Any], what: str, value: str) -> None:
        for document in documents(values):
            if what == "slow":
                time.sleep(float(value.split()[0]))
            self.send_event("output", {"chunk": json.dumps(document), "index": document["index"]})
            if what == "break":
                self.close_connection = True
                raise OSError
        self.send_event("completed", {"status": "succeeded", "output": []})

    def send_event(self, name: str, content: object) -> None:
        self.send_chunk(f"event: {name}\ndata: {json.dumps(content)}\n\n".encode())
