"""Walk the whole way on a tiny model, printing each command, its time, and what came of it.

    Meta checkpoint -> convert/ -> train.py -> the real Cog server -> answers over HTTP

Everything is written to .demo/. What is printed as a command can be typed as it stands.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.data.example import Example  # noqa: E402
from alpaca.data.examples import split_examples  # noqa: E402
from alpaca.data.records import read_examples  # noqa: E402
from deploy.local_server import LocalServer, running_server, stop_children_on_sigterm  # noqa: E402

WORK = Path(".demo")
DATA = Path("alpaca/data/sample.json")
NUM_HELD_OUT, SEED, NUM_ASKED = 7, 42, 5
PYTHON = ".venv/bin/python"
STAGES = {
    "make a tiny checkpoint in Meta's layout, with its own tokenizer": [
        PYTHON, "script/tiny_checkpoint.py", "--output_dir", f"{WORK}/unconverted-weights",
    ],
    "convert it to Hugging Face format": [
        PYTHON, "-m", "convert.convert_llama_weights_to_hf", "--input_dir", f"{WORK}/unconverted-weights",
        "--model_size", "tiny", "--output_dir", f"{WORK}/weights",
    ],
    "fine-tune it: the recipe's loop, with steps fit for a tiny model that starts from nothing": [
        PYTHON, "train.py", "--model_name_or_path", f"{WORK}/weights/llama-tiny", "--data_path", str(DATA),
        "--output_dir", f"{WORK}/alpaca_out", "--num_train_epochs", "40", "--learning_rate", "3e-3",
        "--global_batch_size", "10", "--per_device_train_batch_size", "10", "--val_set_size", str(NUM_HELD_OUT),
        "--eval_strategy", "steps", "--eval_steps", "200", "--logging_steps", "20", "--save_strategy", "no",
        "--bf16", "False", "--tf32", "False", "--seed", str(SEED),
    ],
}  # fmt: skip
SERVE = ["script/serve", "--weights", f"{WORK}/alpaca_out"]


def main() -> None:
    stop_children_on_sigterm()
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    start = time.perf_counter()
    for number, (title, command) in enumerate(STAGES.items(), start=1):
        run_stage(number, title, command)
    print_losses()
    ask(len(STAGES) + 1)
    print(f"\nThe whole way in {time.perf_counter() - start:.0f} s. The loss curve: {WORK}/alpaca_out/loss.png")


def run_stage(number: int, title: str, command: list[str]) -> None:
    """Run one command, its output shown; stop the demo where it fails."""
    announce(number, title, command)
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"error: stage {number} failed with status {done.returncode}")
    print(f"    {time.perf_counter() - start:.1f} s", flush=True)


def announce(number: int, title: str, command: list[str]) -> None:
    print(f"\n[{number}] {title}\n    $ {shlex.join(command)}", flush=True)


def print_losses() -> None:
    history = json.loads((WORK / "alpaca_out" / "trainer_state.json").read_text())["log_history"]
    trained = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    print(f"    loss on what it learns:       {trained[0]:.2f} -> {trained[-1]:.2f}")
    print(f"    loss on {NUM_HELD_OUT} held-out examples: {held_out[0]:.2f} -> {held_out[-1]:.2f}")


def ask(number: int) -> None:
    """Serve the result with the real Cog server and print questions and answers."""
    announce(number, "serve it with the real Cog server, and ask", SERVE)
    learned, unseen = split_examples(read_examples(DATA), num_held_out=NUM_HELD_OUT, seed=SEED)
    start = time.perf_counter()
    with running_server(SERVE[1:], on_failure=print) as server:
        print(f"    ready at {server.url} after {time.perf_counter() - start:.1f} s")
        body = json.dumps({"input": inputs_of(learned[0])}, ensure_ascii=False)
        print(f"    $ curl -s {server.url}/predictions -H 'Content-Type: application/json' -d {shlex.quote(body)}")
        right = sum(answer(server, example, "learned") for example in learned[:NUM_ASKED])
        answer(server, unseen[0], "never seen: do not expect sense of a model this small")
    print(f"\n    {right} of {NUM_ASKED} learned answers are word for word the data's")
    if right < NUM_ASKED - 1:
        sys.exit("error: the model did not learn its examples")


def inputs_of(example: Example) -> dict[str, object]:
    return {"prompt": example.instruction, "input": example.input, "temperature": 0}


def answer(server: LocalServer, example: Example, label: str) -> bool:
    """Ask one question, print it, and say whether the answer is the data's."""
    prediction = server.predict(inputs_of(example))
    if prediction["status"] != "succeeded":
        sys.exit(f"error: the prediction failed: {prediction.get('error')}")
    speed = prediction["metrics"]["tokens_per_second"]
    question = " / ".join(filter(None, [example.instruction, example.input]))
    print(
        f"\n    ({label})\n    asked:    {question}\n    answered: {prediction['output'][0]}   [{speed:.0f} tokens/s]"
    )
    return prediction["output"] == [example.output]


if __name__ == "__main__":
    main()
