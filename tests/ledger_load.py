"""Load on a ledger, in a process that may be killed: python ledger_load.py URL KEY NAME NUM_THREADS.

Every line on stdout is an answer that the client got completely: its request id and its tokens.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading

from hayai.config import ServerConfig
from hayai.server.access import Access, open_access

_write = threading.Lock()


async def client(access: Access, key: str, name: str) -> None:
    principal = access.authenticate({"x-api-key": key})
    rng = random.Random(name)
    for number in range(1_000_000):
        request_id = f"{name}-{number}"
        ticket = access.admit(principal, request_id=request_id, endpoint="/v1/completions", model="m")
        await asyncio.sleep(rng.random() / 200)
        prompt_tokens, completion_tokens = rng.randrange(1, 50), rng.randrange(0, 50)
        leaves = rng.random() < 0.2
        ticket.settle(prompt_tokens, 0, completion_tokens, "cancelled" if leaves else "ok")
        if not leaves:
            await ticket.flushed()
            with _write:
                sys.stdout.write(f"{request_id} {prompt_tokens} {completion_tokens}\n")
                sys.stdout.flush()


def main(url: str, key: str, name: str, num_threads: int) -> None:
    access = open_access(ServerConfig(database=url))
    loops = [
        threading.Thread(target=asyncio.run, args=(client(access, key, f"{name}-{i}"),))
        for i in range(num_threads)
    ]
    for thread in loops:
        thread.start()
    for thread in loops:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
