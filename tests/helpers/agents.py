"""Environments for tests of agents: functions on the embedded task, and a module with them for a recipe."""

import httpx

ENVIRONMENTS = '''
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

LOCK, COUNTS = threading.Lock(), []


def chat(client, messages, **options):
    answer = client.post("/chat/completions", json={"messages": messages, **options})
    if answer.status_code != 200:
        raise RuntimeError(answer.json()["error"]["code"])
    return answer.json()


def play(row, base_url):
    """The student writes three passes of the sort; the tool writes the letter of each but the first."""
    letters = sorted(row["answer"])
    with httpx.Client(base_url=base_url, timeout=600) as client:
        messages, text = [{"role": "user", "content": row["prompt"]}], ""
        for turn in range(3):
            options = {"stop": ";", "include_stop_str_in_output": True}
            answer = chat(client, messages[:1] + [{"role": "assistant", "content": text}] * bool(text), **options)
            choice = answer["choices"][0]
            text += choice["message"]["content"]
            if choice["finish_reason"] != "stop" or not text.endswith(";"):
                break
            text += letters[turn + 1]
    return 1.0 if letters[0] == text[0] else 0.0


async def play_async(row, base_url):
    async with httpx.AsyncClient(base_url=base_url, timeout=600) as client:
        body = {"prompt": row["prompt"], "max_tokens": 5}
        await client.post("/completions", json=body)
        answer = await client.post("/completions", json=body)
        return [{"id": answer.json()["id"], "reward": 2}]


def fail_sometimes(row, base_url):
    if hash_of(row) % 4 == 0:
        raise ValueError("the tool is gone")
    return play(row, base_url)


def hang_sometimes(row, base_url):
    reward = play(row, base_url)
    if hash_of(row) % 4 == 0:
        time.sleep(3600)
    return reward


def fail(row, base_url):
    raise ValueError("no tool works")


def exhaust(row, base_url):
    """Ask until there is no room left."""
    with httpx.Client(base_url=base_url, timeout=600) as client:
        text = ""
        while True:
            messages = [{"role": "user", "content": row["prompt"]}]
            answer = chat(client, messages + [{"role": "assistant", "content": text}] * bool(text), max_tokens=3)
            text += answer["choices"][0]["message"]["content"] + "zz"


def hang(row, base_url):
    Path(os.environ["AGENT_MARKER"]).touch()
    time.sleep(3600)


def hang_in_pool(row, base_url):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(hang, row, base_url).result()


def die_once(row, base_url):
    """End the process in the second part, the first time."""
    marker = Path(os.environ["AGENT_MARKER"])
    with LOCK:
        COUNTS.append(row)
        if len(COUNTS) == 6 and not marker.exists():
            marker.touch()
            os._exit(9)
    return play(row, base_url)


def hash_of(row):
    return sum(map(ord, row["prompt"]))
'''
SETTINGS = ("rollout.engine=transformers", "rollout.max_tokens=60")


def environment_settings(function: str) -> list[str]:
    return [*SETTINGS, f"rollout.environment=agent_environments:{function}"]


def post(base_url: str, endpoint: str, body: object) -> httpx.Response:
    return httpx.post(f"{base_url}/{endpoint}", json=body, timeout=60)
