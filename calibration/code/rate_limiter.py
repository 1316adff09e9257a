"""Token buckets for an asynchronous server: one per client, forgotten when they are full again."""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass


@dataclass
class Bucket:
    level: float
    updated: float


class RateLimited(Exception):
    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests, retry after {retry_after:.1f} s")
        self.retry_after = retry_after


class RateLimiter:
    """Allows `rate` requests a second per key, with bursts of at most `burst`."""

    def __init__(
        self,
        rate: float,
        burst: int,
        max_keys: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError("rate must be positive and burst at least 1")
        self.rate = rate
        self.burst = burst
        self.max_keys = max_keys
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def _refill(self, key: str) -> Bucket:
        now = self._clock()
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = Bucket(level=float(self.burst), updated=now)
        else:
            bucket.level = min(self.burst, bucket.level + (now - bucket.updated) * self.rate)
            bucket.updated = now
        self._buckets[key] = bucket  # the most recently used key is last
        while len(self._buckets) > self.max_keys:
            self._buckets.popitem(last=False)
        return bucket

    def acquire(self, key: str, cost: float = 1.0) -> None:
        """Takes `cost` tokens or raises RateLimited at once."""
        if cost > self.burst:
            raise ValueError(f"a request of cost {cost} can never pass a burst of {self.burst}")
        bucket = self._refill(key)
        if bucket.level < cost:
            raise RateLimited((cost - bucket.level) / self.rate)
        bucket.level -= cost

    async def wait(self, key: str, cost: float = 1.0) -> float:
        """Waits until `cost` tokens are there; returns the seconds waited."""
        started = self._clock()
        while True:
            try:
                self.acquire(key, cost)
            except RateLimited as limited:
                await asyncio.sleep(limited.retry_after)
            else:
                return self._clock() - started

    def sweep(self) -> int:
        """Forgets keys whose bucket has been refilled; returns how many."""
        now = self._clock()
        full = [
            key
            for key, bucket in self._buckets.items()
            if bucket.level + (now - bucket.updated) * self.rate >= self.burst
        ]
        for key in full:
            del self._buckets[key]
        return len(full)


class ConcurrencyLimit:
    """At most `limit` jobs at once and at most `queue` waiting; more are turned away."""

    def __init__(self, limit: int, queue: int) -> None:
        self._semaphore = asyncio.Semaphore(limit)
        self._queue = queue
        self._waiting = 0
        self.rejected = 0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        if self._semaphore.locked():
            if self._waiting >= self._queue:
                self.rejected += 1
                raise RateLimited(retry_after=1.0)
            self._waiting += 1
            try:
                await self._semaphore.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._semaphore.acquire()
        try:
            yield
        finally:
            self._semaphore.release()


async def demonstrate() -> None:
    limiter = RateLimiter(rate=5, burst=2)
    waits = [await limiter.wait("alice") for _ in range(6)]
    print("waited", " ".join(f"{seconds:.2f}" for seconds in waits))


if __name__ == "__main__":
    asyncio.run(demonstrate())
