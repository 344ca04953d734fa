"""Asks by langchain: `python ask_langchain.py URL MODEL`; the last line of the output is JSON."""

import asyncio
import json
import sys

from langchain_openai import ChatOpenAI, OpenAI

SAID = [("system", "You tell stories."), ("human", "Once upon a time")]


def main() -> None:
    url, model = sys.argv[1:]
    given = {"base_url": url, "api_key": "any", "model": model, "temperature": 0, "max_tokens": 12}
    chat, raw = ChatOpenAI(**given), OpenAI(**given)
    whole = chat.invoke(SAID)
    found = {
        "whole": whole.content,
        "usage": whole.usage_metadata["output_tokens"],
        "streamed": "".join(piece.content for piece in chat.stream(SAID)),
        "asynchronous": asyncio.run(chat.ainvoke(SAID)).content,
        "raw": raw.invoke("Once upon a time"),
        "batch": raw.batch(["Once upon a time", "The dog"]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
