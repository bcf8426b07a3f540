"""Operators spread over worker processes; each result is written down at once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: Seconds that a process may take to import PyTorch's database.
START = 600.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One operator in one dtype, with its first samples (None: all)."""

    operator: str
    dtype: str
    limit: int | None


def _work(connection: Connection) -> None:
    import torch

    from .judge import judge_operator

    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        try:
            dtype = getattr(torch, task.dtype)
            result = judge_operator(task.operator, dtype, task.limit, connection.send)
        except Exception as error:
            # Making the samples failed: that is not the package's doing.
            text = f"the samples raise {type(error).__name__}: {error}"
            result = {"outcome": "not comparable", "reason": text[:400], "counts": {}}
        connection.send(result)


class _Worker:
    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.sample: int | None = None
        self.started = 0.0

    def begin(self, task: Task) -> None:
        self.task, self.sample, self.started = task, None, time.monotonic()
        self.connection.send(task)

    def listen(self) -> dict[str, Any] | None:
        """Return a result, or None after a mere sign of progress."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return self._lost(f"the process ended with exit code {self.process.exitcode}")
        if isinstance(message, dict):
            return message
        if self.sample is None:
            self.started = time.monotonic()  # the first task waits for the imports
        self.sample = message
        return None

    def stop(self, seconds: float) -> dict[str, Any]:
        self.process.kill()
        self.process.join()
        return self._lost(f"not finished after {seconds:.0f} s")

    def _lost(self, reason: str) -> dict[str, Any]:
        counts = {"failed": 1}
        return {"outcome": "failed", "reason": reason, "sample": self.sample, "counts": counts}


def run(tasks: Iterable[Task], jobs: int, seconds: float) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yield each task with its result as it comes; a crash or a time-out is a result too."""
    context = multiprocessing.get_context("spawn")
    queue = deque(tasks)
    workers = [_Worker(context) for _ in range(min(jobs, len(queue)))]
    for worker in workers:
        worker.begin(queue.popleft())
    try:
        while workers:
            ready = wait([w.connection for w in workers], timeout=1.0)
            for worker in list(workers):
                result = worker.listen() if worker.connection in ready else None
                elapsed = time.monotonic() - worker.started
                starting = worker.sample is None
                if result is None and elapsed > (START if starting else seconds):
                    result = worker.stop(seconds)
                if result is None:
                    continue
                assert worker.task is not None
                yield worker.task, {**result, "seconds": round(elapsed, 2)}
                if queue:
                    if not worker.process.is_alive():
                        workers[workers.index(worker)] = worker = _Worker(context)
                    worker.begin(queue.popleft())
                else:
                    workers.remove(worker)
                    if worker.process.is_alive():
                        worker.connection.send(None)
    finally:
        for worker in workers:
            worker.process.kill()


def load(path: Path, version: str) -> dict[Task, dict[str, Any]]:
    """Return the results written down so far with this version of PyTorch."""
    found: dict[Task, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                task = Task(record["operator"], record["dtype"], record["limit"])
            except (ValueError, KeyError):
                continue  # the line that was being written when the run was cut off
            if record.get("torch") == version:
                found[task] = record
    return found


def record(path: Path, version: str, task: Task, result: dict[str, Any]) -> None:
    """Append one result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**dataclasses.asdict(task), "torch": version, **result})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
