"""A completion service for the tests: OpenAI's two endpoints and Cog's, with faults on demand."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCABULARY = [
    f"{head}{tail}" for head in "bdfglmnprst" for tail in ("aven", "illow", "orn", "ume", "eska", "iddle", "ant")
]
FIRST, LAST = 4, 19  # the blocks that a prompt with three tasks asks for

Reply = tuple[int, dict[str, str], bytes]


def write_tasks(prompt: str, *, first: int = FIRST, last: int = LAST) -> str:
    """Blocks in the expected format, always the same for a prompt; some of them not fit to be taken."""
    rng = random.Random(prompt)
    blocks = []
    for number in range(first, last + 1):
        instruction = "Explain " + " ".join(rng.sample(VOCABULARY, 8))
        label = number
        if number % 6 == 0:
            instruction = "Describe the picture of " + instruction
        if number % 7 == 0:
            label = number + 1
        head = "" if number == first else f"###\n{number}. Instruction:"
        blocks.append(
            f"{head} {instruction}\n{number}. Input:\n<noinput>\n{label}. Output:\nAbout {rng.choice(VOCABULARY)}.\n"
        )
    return "".join(blocks)


@dataclass
class Service:
    """What was asked, and how to answer. fault: of a request's number and body, another reply."""

    url: str = ""
    fault: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: None
    text: Callable[[str], str] = write_tasks
    finish_reason: str = "stop"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)  # prompts that were answered in full
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply_to(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.headers.append(headers)
        return self.fault(number, body) or self.answer(path, body)

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        prompt = prompt_of(body)
        text = self.text(prompt)
        with self.lock:
            self.served[prompt] += 1
        tokens = {"prompt_tokens": len(prompt) // 4, "output_tokens": len(text) // 4}
        if path.endswith("/predictions"):
            return 200, {}, json.dumps({"status": "succeeded", "output": [text], "metrics": tokens}).encode()
        usage = {"prompt_tokens": tokens["prompt_tokens"], "completion_tokens": tokens["output_tokens"]}
        usage["total_tokens"] = sum(usage.values())
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason, "logprobs": None}
        is_chat = path.endswith("/chat/completions")
        choice.update({"message": {"role": "assistant", "content": text}} if is_chat else {"text": text})
        reply = {
            "id": "1",
            "object": "x",
            "created": 0,
            "model": f"{body['model']}-1",
            "choices": [choice],
            "usage": usage,
        }
        return 200, {}, json.dumps(reply).encode()


def prompt_of(body: dict[str, Any]) -> str:
    if "input" in body:
        return body["input"]["prompt"]
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def error_reply(status: int, headers: dict[str, str] | None = None, **error: object) -> Reply:
    return status, headers or {}, json.dumps({"error": {"message": "no", **error}}).encode()


@contextmanager
def running_service() -> Iterator[Service]:
    """The service, on 127.0.0.1; stopped at the end of the block."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = {name.lower(): value for name, value in self.headers.items()}
            status, given, content = service.reply_to(self.path, body, asked)
            headers = dict(given)  # a fault may be given again
            length = headers.pop("X-Claim-Length", str(len(content)))
            time.sleep(float(headers.pop("X-Wait", "0")))
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": length, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client is gone: killed, or out of patience
                pass

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
